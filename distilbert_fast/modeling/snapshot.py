"""Tell whether a module tree has changed since it was read, which is asked before each use of packed weights."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from distilbert_fast import backends

_LINES = 256  # cache lines of a small model that a sample compares: some 20 µs
_version = operator.attrgetter("_version")
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
    those bytes; None on another device than a CPU, and where the native module is not built.
    """

    def __init__(
        self,
        root: nn.Module,
        copied: Iterable[nn.Module],
        settings: Iterable[tuple[Callable[[Any], Any], nn.Module]] = (),
    ) -> None:
        self._inner = [m for m in root.modules() if m is not root]
        self._dropouts = [(m, x) for m in self._inner for x in (m, *m.children()) if isinstance(x, nn.Dropout)]
        self._types: list[Any] = list(map(type, self._inner))
        self._forwards = {kind: kind.forward for kind in self._types}
        self._entries = _entries([root, *self._inner])
        self._tensors = [entry for entry in self._entries if isinstance(entry, torch.Tensor)]
        self._addresses = list(map(torch.Tensor.data_ptr, self._tensors))
        self._versions = list(map(_version, self._tensors))
        self._settings = list(settings)
        self._set = [get(module) for get, module in self._settings]
        values = [tensor for module in copied for tensor in (*module.parameters(), *module.buffers())]
        self.fingerprint: Any = None
        if backends.availability("cpu").ok and all(tensor.device.type == "cpu" for tensor in values):
            self._storages = [tensor.untyped_storage() for tensor in values]  # not freed while their bytes are read
            self.fingerprint = backends.fingerprint(values, _LINES)
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

    def glance(self, root: nn.Module, threads: int) -> tuple[bool, str | None]:
        """``look``, and whether some of the bytes, others with every call, are what they were."""
        seen = self._seen
        if seen is not None and seen.root is vars(root):
            tree, memory = seen.watch.holds_with(self.fingerprint, threads)
            if tree:
                return memory, seen.obstacle
        holds, obstacle = self.look(root)
        return holds and (self.fingerprint is None or self.fingerprint.matches_sample(threads)), obstacle

    def _sight(self, root: nn.Module) -> _Sight | None:
        """None where the native module is not built, and for what is no tree of dictionaries and plain tensors."""
        if not backends.availability("cpu").ok:
            return None
        modules = (root, *self._inner)
        dictionaries: list[Any] = [*map(vars, modules), *(home for m in modules for home in _homes(m)), *self._hooks()]
        forwards = [(kind, "forward", kind.forward) for kind in self._forwards]
        try:
            watched = ([(live, dict(live)) for live in dictionaries], self._inner, forwards, self._tensors)
            return _Sight(vars(root), backends.cpu().TreeWatch(*watched), watched, None)
        except (TypeError, ValueError):
            return None

    def _holds(self, root: nn.Module) -> bool:
        entries = _entries([root, *self._inner])
        return (
            len(entries) == len(self._entries)
            and all(map(operator.is_, entries, self._entries))
            and list(map(type, self._inner)) == self._types
            and list(map(torch.Tensor.data_ptr, self._tensors)) == self._addresses
            and list(map(_version, self._tensors)) == self._versions
            and [get(module) for get, module in self._settings] == self._set
        )

    def _obstacle(self) -> str | None:
        """Why the modules below the root must be called: a hook, a replaced forward, or training (an active dropout).
        transformers' own hooks, which collect requested outputs, do not count.
        """
        if any(module.training and dropout.p > 0 for module, dropout in self._dropouts):
            return "a module inside the encoder in training mode"
        if any(_GLOBAL_HOOKS):
            return "a hook on all modules"
        hooks = (hook for found in self._hooks() for hook in found.values())
        if any(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks):
            return "a hook inside the encoder"
        replaced = any(kind.forward is not forward for kind, forward in self._forwards.items())
        return "another forward inside the encoder" if replaced or any(map(is_patched, self._inner)) else None

    def _hooks(self) -> list[dict[int, Any]]:
        own = [hooks for m in self._inner for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        return [*own, *_GLOBAL_HOOKS]

    def requires_grad(self) -> bool:
        return any(tensor.requires_grad for tensor in self._tensors)


def is_patched(module: nn.Module) -> bool:
    """Whether a module has a forward of its own, which is not that of its class."""
    own = vars(module)
    return "forward" in own and getattr(own["forward"], "__func__", None) is not type(module).forward


def _homes(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """The dictionaries in which it has its modules, parameters and buffers."""
    return module._modules, module._parameters, module._buffers


def _entries(modules: Iterable[nn.Module]) -> list[Any]:
    """The homes of modules, and all names and values in them."""
    homes = [home for module in modules for home in _homes(module)]
    return [*homes, *(part for home in homes for entry in home.items() for part in entry)]
