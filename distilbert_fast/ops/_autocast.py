"""How an op that holds matrix products behaves inside ``torch.autocast``."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def enabled(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast(device: torch.device, *tensors: Any) -> tuple[Any, ...]:
    """The arguments as autocast hands them to a matrix product: floats other than float64 in its dtype."""
    if not enabled(device.type):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)

    def cast(x: Any) -> Any:
        lower = isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if lower else x

    return tuple(cast(x) for x in tensors)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Inside an op every product runs in the dtype its code says."""
    return torch.autocast(device.type, enabled=False) if enabled(device.type) else contextlib.nullcontext()
