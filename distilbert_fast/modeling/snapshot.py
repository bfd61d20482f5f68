"""Has a module tree changed since it was read? What packed weights need to know before each use."""

from __future__ import annotations

from torch import nn


class Snapshot:
    """The modules below ``root`` and their tensors, as they are now.

    Seen later: a replaced, added or removed module or parameter; a tensor written in place (by its version
    counter), moved or cast (by its address). Not seen: writes through ``parameter.data``, which torch does not
    count.
    """

    def __init__(self, root: nn.Module) -> None:
        modules = list(root.modules())
        self._children = [(m._modules, len(m._modules)) for m in modules]
        self._edges = [(m._modules, name, child) for m in modules for name, child in m._modules.items()]
        self._tensors = [
            (tensors, name, tensor, tensor.data_ptr(), tensor._version)
            for m in modules
            for tensors in (m._parameters, m._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
        ]
        inner = [m for m in modules if m is not root]
        self._hooks = [hooks for m in inner for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._patchable = [(m.__dict__, type(m)) for m in inner]

    def holds(self, root: nn.Module) -> bool:
        """Whether this is the tree that was read, and nothing that can be seen has changed in it."""
        return (
            root._modules is self._children[0][0]
            and all(len(children) == count for children, count in self._children)
            and all(children.get(name) is child for children, name, child in self._edges)
            and all(
                tensors.get(name) is tensor and tensor._version == version and tensor.data_ptr() == address
                for tensors, name, tensor, address, version in self._tensors
            )
        )

    def observed(self) -> bool:
        """Whether somebody hooked into, or replaced, the forward of a module below the root.

        transformers' own hooks, which collect outputs when asked to, do not count.
        """
        hooks = (hook for found in self._hooks if found for hook in found.values())
        if any(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks):
            return True
        return any(
            "forward" in attributes and getattr(attributes["forward"], "__func__", None) is not kind.forward
            for attributes, kind in self._patchable
        )

    def requires_grad(self) -> bool:
        return any(tensor.requires_grad for _, _, tensor, _, _ in self._tensors)
