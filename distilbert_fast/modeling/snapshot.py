"""Tell whether a module tree has changed since it was read, which is asked before each use of packed weights."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from distilbert_fast import backends
from distilbert_fast.engine.native_encoder import Watched
from distilbert_fast.modeling.architectures import CALLS, COMPUTING_METHODS, TENSORS

_BLOCKS = 120  # of 128 bytes, which a sample of a small model compares: some 5 µs
_TOKENS = 16  # of a call, for each of which that is a small part of its time
_GLOBAL_HOOKS = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)


# What they compute depends on no child, and on no buffer or parameter where they have none.
_LEAVES = frozenset({nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.Identity, nn.GELU, nn.Tanh})

_Setting = tuple[Callable[[Any], Any], nn.Module]


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

    ``look`` sees each time: a replaced, added or removed module or tensor; a tensor written in place (by its version
    counter), moved or cast (by its address) or laid out otherwise (by shape and strides); another class; and the
    settings that ``watch`` was given. torch does not count what fused optimizers, ``parameter.data``, NumPy, DLPack and
    other processes write. ``fingerprint`` holds hashes of those bytes; None before ``watch``, on another device than
    a CPU, and where the native module is not built.
    """

    def __init__(self, root: nn.Module) -> None:
        self._inner = [m for m in root.modules() if m is not root]
        self._types: list[Any] = list(map(type, self._inner))
        kinds = {*self._types, own_class(root), nn.Module}
        methods = [(kind, name) for kind in kinds for name in COMPUTING_METHODS if hasattr(kind, name)]
        self._methods = [(kind, name, getattr(kind, name)) for kind, name in methods]
        self._entries = _entries([root, *self._inner])
        self._tensors = [entry for entry in self._entries if isinstance(entry, torch.Tensor)]
        self._states = list(map(_state, self._tensors))
        self._settings: list[_Setting] = []
        self._set: list[Any] = []
        self.fingerprint: Any = None
        self._seen: _Sight | None = None

    def watch(self, copied: Sequence[torch.Tensor], settings: Iterable[_Setting]) -> None:
        """Also watch the bytes of tensors, before they are copied, and settings.

        Args:
            copied: whose values are going to be copied, so that a write to them must be seen.
            settings: what else changes results: how to read it, and from which module.
        """
        self._settings = list(settings)
        self._set = [get(module) for get, module in self._settings]
        if backends.availability("cpu").ok and all(tensor.device.type == "cpu" for tensor in copied):
            self._storages = [tensor.untyped_storage() for tensor in copied]  # not freed while their bytes are read
            self.fingerprint = backends.fingerprint(copied, _BLOCKS)

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
        obstacle = self._obstacle(root)
        if sight is not None:
            self._seen = sight._replace(obstacle=obstacle)
        return True, obstacle

    def sampled(self, tokens: int) -> Watched | None:
        """What a call of so many tokens is to compare of the bytes: others with every call, more for more tokens."""
        if self.fingerprint is None:
            return None
        return Watched(self.fingerprint, max(tokens // _TOKENS, 1), self._seen.watch if self._seen else None)

    def _sight(self, root: nn.Module) -> _Sight | None:
        """None where the native module is not built, and for what is no tree of dictionaries and plain tensors."""
        if not backends.availability("cpu").ok:
            return None
        modules = (root, *self._inner)
        homes = (home for m in modules for home in _homes(m) if home or type(m) not in _LEAVES)
        dictionaries: list[Any] = [*map(vars, modules), *homes, *_hooks(self._inner), *_GLOBAL_HOOKS]
        configs = {id(vars(m)["config"]): vars(m)["config"] for m in modules if "config" in vars(m)}
        dictionaries += [vars(config) for config in configs.values()]
        attributes = [(kind, name, getattr(kind, name, None)) for kind, name, _ in self._methods]
        try:
            watched = ([(live, dict(live)) for live in dictionaries], self._inner, attributes, self._tensors)
            return _Sight(vars(root), backends.cpu().TreeWatch(*watched), watched, None)
        except (TypeError, ValueError):
            return None

    def _holds(self, root: nn.Module) -> bool:
        entries = _entries([root, *self._inner])
        return (
            len(entries) == len(self._entries)
            and all(map(operator.is_, entries, self._entries))
            and list(map(type, self._inner)) == self._types
            and list(map(_state, self._tensors)) == self._states
            and [get(module) for get, module in self._settings] == self._set
        )

    def _obstacle(self, root: nn.Module) -> str | None:
        """Why the modules below the root must be called."""
        replaced = any(getattr(kind, name, None) is not method for kind, name, method in self._methods)
        replaced = replaced or any(name in vars(root) for name in COMPUTING_METHODS if name not in CALLS)
        return obstacle(self._inner, root) or (_PATCHED if replaced else None)

    def has_any(self, identities: set[int]) -> bool:
        """Whether one of its tensors is among those with these ``id``s."""
        return any(id(tensor) in identities for tensor in self._tensors)

    def requires_grad(self) -> bool:
        """Whether a parameter does, or a hook of transformers' makes an output require them."""
        hooks = (hook for found in _hooks(self._inner) for hook in found.values())
        return any(tensor.requires_grad for tensor in self._tensors) or any(map(_is_for_gradients, hooks))


_PATCHED = "another forward inside the encoder"
_CAPTURING = "transformers.utils.output_capturing"  # of its hooks
_FUNCTIONS = ("act", "_gradient_checkpointing_func")  # of GELUActivation, which settings watch; in training


def obstacle(inner: Iterable[nn.Module], root: nn.Module) -> str | None:
    """Why the modules inside an encoder must be called: a hook, a replaced forward, training (an active dropout), or an
    attention of its own. transformers' own hooks, which collect requested outputs or ask for gradients, do not count.
    """
    inner = list(inner)
    dropouts = ((m, x) for m in inner for x in (m, *m.children()) if isinstance(x, nn.Dropout))
    if any(module.training and dropout.p > 0 for module, dropout in dropouts):
        return "a module inside the encoder in training mode"
    if any(_GLOBAL_HOOKS):
        return "a hook on all modules"
    hooks = (hook for found in _hooks(inner) for hook in found.values())
    if not all(getattr(hook, "__module__", None) == _CAPTURING or _is_for_gradients(hook) for hook in hooks):
        return "a hook inside the encoder"
    if any(_attention(m) not in (None, _attention(root)) for m in inner):
        return "another attention implementation inside the encoder"
    return _PATCHED if any(map(_has_function, inner)) else None


def _is_for_gradients(hook: Any) -> bool:
    """Whether it is the hook of ``enable_input_require_grads``, which gradient checkpointing leaves on embeddings."""
    names = getattr(hook, "__module__", None), getattr(hook, "__name__", None)
    return names == ("transformers.modeling_utils", "make_inputs_require_grads")


def _attention(module: nn.Module) -> str | None:
    """The attention implementation that its config names, if it has one."""
    return getattr(vars(module).get("config"), "_attn_implementation", None)


def _hooks(modules: Iterable[nn.Module]) -> list[dict[int, Any]]:
    return [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]


def is_patched(module: nn.Module) -> bool:
    """Whether a module has a method of its own by which it computes, which is not that of its class."""
    own = vars(module)
    return any(name in own and not _is_own_method(module, name, own[name]) for name in COMPUTING_METHODS)


def _has_function(module: nn.Module) -> bool:
    """Whether a module has a function of its own where its forward may find it: in the place of a method, of a module
    that was deleted, or of a compiled call."""
    found = ((x, value) for x, value in vars(module).items() if callable(value) and x not in _FUNCTIONS)
    return any(not isinstance(x[1], (torch.Tensor, nn.Module)) and not _is_own_method(module, *x) for x in found)


def _is_own_method(module: nn.Module, name: str, value: Any) -> bool:
    """Whether an attribute is the method that a module's class has under this name; any, if it has none."""
    if name == "_compiled_call_impl":  # what Module.compile() made
        value, name = getattr(value, "_torchdynamo_orig_callable", None), "_call_impl"
    function = getattr(value, "__func__", None)
    own = getattr(value, "__self__", None) is module
    return own and function is getattr(type(module), name, function)


def own_class(model: nn.Module) -> type:
    """Its class before ``optimize`` exchanged it."""
    for kind in type(model).__mro__:
        exchanged: type | None = vars(kind).get("_exchanged")
        if exchanged is not None:
            return exchanged
    return type(model)


def own_tensors(module: nn.Module) -> list[torch.Tensor]:
    """A module's parameters and buffers, and what stands in their places."""
    held = (*module._parameters.values(), *module._buffers.values(), *dict(loose_tensors(module)).values())
    return [tensor for tensor in held if tensor is not None]


def loose_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """By name, what stands in the places of parameters and buffers and is neither, as pruning, hypernetworks and
    meta-learning put it there."""
    own = vars(module)
    return [(name, own[name]) for name in TENSORS if isinstance(own.get(name), torch.Tensor)]


def _homes(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """The dictionaries in which it has its modules, parameters and buffers."""
    return module._modules, module._parameters, module._buffers


def _entries(modules: Iterable[nn.Module]) -> list[Any]:
    """The homes of modules, and all names and values in them and in their places."""
    modules = list(modules)
    homes = [home for module in modules for home in _homes(module)]
    entries = [*(entry for home in homes for entry in home.items()), *(x for m in modules for x in loose_tensors(m))]
    return [*homes, *(part for entry in entries for part in entry)]


def _state(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Its class, and what torch tells of its memory."""
    version = None if tensor.is_inference() else tensor._version
    return type(tensor), tensor.data_ptr(), version, tensor.shape, tensor.stride()
