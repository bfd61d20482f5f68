"""Argument checks: one wording for every op, ``op: argument must be …, got …``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def refuse(op: str, argument: str, expected: str, given: object, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{op}: {argument} must be {expected}, got {given}")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype)[6:] for dtype in dtypes)


def tensor(
    op: str,
    argument: str,
    value: torch.Tensor,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype] = FLOATS,
    device: torch.device | None = None,
) -> None:
    """Check type, dtype, shape and device. In ``shape`` a name stands for any size, a number for itself."""
    if not isinstance(value, torch.Tensor):
        refuse(op, argument, "a tensor", type(value).__name__, TypeError)
    if value.dtype not in dtypes:
        refuse(op, argument, f"{_names(dtypes)}", str(value.dtype)[6:], TypeError)
    given = value.shape
    if type(shape) is torch.Size:
        fits = given == shape
    else:
        fits = len(given) == len(shape)
        for i, size in enumerate(shape):  # a plain loop: every call of every op passes here
            if fits and type(size) is not str and given[i] != size:
                fits = False
    if not fits:
        refuse(op, argument, f"of shape [{', '.join(map(str, shape))}]", f"{list(given)}")
    if device is not None and value.device != device:
        refuse(op, argument, f"on {device}", f"{value.device}")


def positive(op: str, argument: str, value: float) -> None:
    """Check for a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        refuse(op, argument, "a number", type(value).__name__, TypeError)
    if not 0 < value < math.inf:  # math.isfinite would not trace on a symbolic float
        refuse(op, argument, "finite and above 0", value)


def below(op: str, argument: str, x: torch.Tensor, end: int, of: str) -> None:
    """Refuse an integer outside [0, end), where a look at the values is free: on the CPU."""
    if x.device.type == "cpu" and x.numel():
        low, high = (int(bound) for bound in torch.aminmax(x))
        if low < 0 or high >= end:
            refuse(op, argument, f"in [0, {end}), {of}", low if low < 0 else high)


def choice(op: str, argument: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed or type(value) is float:  # 16.0 is in (16,)
        refuse(op, argument, f"one of {', '.join(map(repr, allowed))}", repr(value))
