"""What this GPU reaches by torch's own kernels: the rates that the limits of all cases are made of."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton.testing

from bench.gpu.records import Records, Where
from bench.harness.peaks import product_rate

SHAPES = ((8192, 8192, 8192), (16384, 4096, 4096))  # M, N, K
COPIED = 2 << 30  # bytes


def measure(where: Where, records: Records) -> None:
    """Highest rates seen: bytes a second copied (read and written), operations a second of bf16 and int8 products."""
    shapes = where.size(SHAPES, ((64, 64, 64),))
    rates: dict[str, float] = {}
    with records.attempt("copy bandwidth"):
        source = torch.ones(where.size(COPIED, 1 << 16), dtype=torch.uint8, device=where.device)
        target = torch.empty_like(source)
        rates["bytes"] = 2 * source.numel() / _seconds(where, lambda: target.copy_(source))
    for unit in ("bf16", "int8"):
        with records.attempt(f"{unit} products"):
            rates[unit] = product_rate(unit, shapes, where.device, functools.partial(_seconds, where))
    if where.gpu:
        records.add("peaks", **rates)


def _seconds(where: Where, call: Callable[[], object]) -> float:
    if not where.gpu:
        call()
        return 1.0
    return triton.testing.do_bench(call, warmup=50, rep=300, return_mode="min") / 1000
