"""Tell whether a module tree has changed since it was read, which is asked before each use of packed weights."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from distilbert_fast import backends

_LINES = 256  # cache lines of a small model that a sample compares: some 20 µs
_version, _training, _forward = map(operator.attrgetter, ("_version", "training", "forward"))
_hooks, _pre_hooks = map(operator.attrgetter, ("_forward_hooks", "_forward_pre_hooks"))
_GLOBAL_HOOKS = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)


class _Sight(NamedTuple):
    """The state of the tree at the last look. Nothing has changed in it while ``watch`` holds.

    Copies of dictionaries keep what was in them, such as a hook that was removed, until the next look.
    """

    root: dict[str, Any]  # vars() of it: a shallow copy of a model has another root
    watch: Any  # csrc/cpu/watch/tree_watch.h
    watched: Any  # keeps alive what the watch points to
    obstacle: str | None


class Snapshot:
    """The modules below ``root`` and their tensors, as they are now.

    Args:
        root: whose modules and tensors may be exchanged.
        copied: modules below it whose values were copied, so that a write to them must be seen.
        settings: what else changes results: how to read it, and from which module.

    ``look`` sees each time: a replaced, added or removed module or parameter; a tensor written in place (by its
    version counter), moved or cast (by its address); another class or setting. torch does not count what fused
    optimizers, ``parameter.data``, NumPy, DLPack and other processes write. ``fingerprint`` holds hashes of
    those bytes, on a CPU.
    """

    def __init__(
        self,
        root: nn.Module,
        copied: Iterable[nn.Module],
        settings: Iterable[tuple[Callable[[Any], Any], nn.Module]] = (),
    ) -> None:
        modules = list(root.modules())
        children = [m._modules for m in modules]
        self._children, self._counts = children, [len(names) for names in children]
        places = [(m._modules, name, child) for m in modules for name, child in m._modules.items()]
        tensors = [
            (owner, name, tensor)
            for m in modules
            for owner in (m._parameters, m._buffers)
            for name, tensor in owner.items()
            if tensor is not None
        ]
        # Columns, which map() walks without a line of Python for each.
        self._owners, self._names, self._objects = zip(*places, *tensors, strict=True)
        self._tensors = [tensor for _, _, tensor in tensors]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        self._versions = sum(map(_version, self._tensors))  # each only grows
        self._settings = list(settings)
        self._set = [get(module) for get, module in self._settings]
        self._inner = [m for m in modules if m is not root]
        self._random = [m for m in self._inner if any(isinstance(x, nn.Dropout) for x in (m, *m.children()))]
        self._homes = list(map(_homes, modules))
        self._types = list(map(type, self._inner))
        self._kinds = list(set(self._types))
        self._forwards = list(map(_forward, self._kinds))
        self._storages, self.fingerprint = _fingerprint(copied)
        self._seen: _Sight | None = None

    def look(self, root: nn.Module) -> tuple[bool, str | None]:
        """Whether this is the tree that was read, with its settings and with nothing written that torch counts; and why
        the modules below the root must be called one by one all the same, None if they need not.

        Where nothing at all has changed since the last look, which is nearly always, it takes a tenth of the time.
        """
        seen = self._seen
        if seen is not None and seen.root is vars(root) and seen.watch.holds():
            return True, seen.obstacle
        sight = self._sight(root)  # before it is judged: what another thread changes meanwhile is seen the next time
        if not self._holds(root):
            return False, None
        obstacle = self._obstacle()
        if sight is not None:
            self._seen = sight._replace(obstacle=obstacle)
        return True, obstacle

    def _sight(self, root: nn.Module) -> _Sight | None:
        """None where the native module is not built, and for what is no tree of dictionaries and plain tensors."""
        if not backends.availability("cpu").ok:
            return None
        modules = (root, *self._inner)
        hooks = [found for module in self._inner for found in (_hooks(module), _pre_hooks(module))]
        dictionaries = [*map(vars, modules), *(home for m in modules for home in _homes(m)), *hooks, *_GLOBAL_HOOKS]
        forwards = [(kind, "forward", _forward(kind)) for kind in self._kinds]
        try:
            watched = ([(live, dict(live)) for live in dictionaries], self._inner, forwards, self._tensors)
            return _Sight(vars(root), backends.cpu().TreeWatch(*watched), watched, None)
        except (TypeError, ValueError):
            return None

    def _holds(self, root: nn.Module) -> bool:
        return (
            all(
                all(map(operator.is_, _homes(m), homes))
                for m, homes in zip((root, *self._inner), self._homes, strict=True)
            )
            and list(map(len, self._children)) == self._counts
            and all(map(operator.is_, map(dict.get, self._owners, self._names), self._objects))
            and list(map(torch.Tensor.data_ptr, self._tensors)) == self._addresses
            and sum(map(_version, self._tensors)) == self._versions
            and list(map(type, self._inner)) == self._types
            and [get(module) for get, module in self._settings] == self._set
        )

    def _obstacle(self) -> str | None:
        """Why the modules below the root must be called: a hook, a replaced forward, or training (an active dropout).
        transformers' own hooks, which collect requested outputs, do not count.
        """
        if any(map(_training, self._random)) and any(m.training and _dropout(m) > 0 for m in self._random):
            return "a module inside the encoder in training mode"
        if any(_GLOBAL_HOOKS):
            return "a hook on all modules"
        hooks = (hook for m in self._inner for found in (_hooks(m), _pre_hooks(m)) for hook in found.values())
        if any(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks):
            return "a hook inside the encoder"
        replaced = list(map(_forward, self._kinds)) != self._forwards or any(
            "forward" in vars(m) and getattr(vars(m)["forward"], "__func__", None) is not _forward(kind)
            for m, kind in zip(self._inner, self._types, strict=True)
        )
        return "another forward inside the encoder" if replaced else None

    def requires_grad(self) -> bool:
        return any(map(operator.attrgetter("requires_grad"), self._tensors))


def _homes(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """The dictionaries in which it has its modules, parameters and buffers."""
    return module._modules, module._parameters, module._buffers


def _dropout(module: nn.Module) -> float:
    """The probability with which a dropout, or a module that has one, drops."""
    return max(float(m.p) for m in (module, *module.children()) if isinstance(m, nn.Dropout))


def _fingerprint(modules: Iterable[nn.Module]) -> tuple[list[torch.UntypedStorage], Any]:
    """Hashes of the bytes of all tensors in modules, with what keeps these from being freed while they are read; None
    where they lie on another device, or where the native module is not built.
    """
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    if not backends.availability("cpu").ok or any(tensor.device.type != "cpu" for tensor in tensors):
        return [], None
    storages = [tensor.untyped_storage() for tensor in tensors]
    return storages, backends.fingerprint(tensors, _LINES)
