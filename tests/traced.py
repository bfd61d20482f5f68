"""An op as tests/ops/test_tracers.py calls it: each test_<op>.py says so in TRACED."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Traced(NamedTuple):
    call: Callable[..., Any]
    tensors: Callable[[int], list[torch.Tensor]]  # for N rows
    gradient: bool = True
