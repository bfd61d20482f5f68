"""What this machine can do at most, as far as torch's own kernels reach it: the rates that shares are taken of."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from bench.harness.worker import serve

SHAPES = ((1024, 1024, 1024), (1024, 3072, 768), (2048, 2048, 2048))  # M, N, K
READS = {"L2": 1 << 20, "L3": 24 << 20, "DRAM": 1 << 29}  # bytes a thread
SECONDS = 0.3  # spent on each
Call = Callable[[], object]


def machine_peaks(threads: int) -> dict[str, Any]:
    """Highest rates of a CPU: operations a second of int8, bf16 and fp32 products, bytes a second read, by cache level.

    "how" names the kernels; a machine's true peak is somewhat higher. bf16 counts at least as fp32 does: without AMX
    torch's bf16 products are the slower ones.
    """
    torch.set_num_threads(threads)
    rates = {unit: product_rate(unit, SHAPES, torch.device("cpu"), fastest) for unit in ("int8", "bf16", "fp32")}
    rates["bf16"] = max(rates["bf16"], rates["fp32"])
    reads = {}
    for level, size in READS.items():
        block = torch.ones(threads * size // 4, dtype=torch.int32)
        reads[level] = block.nbytes / fastest(lambda block=block: block.amax())
    how = f"torch {torch.__version__}: onednn.qlinear (int8, prepacked), mm (bf16, fp32), amax of int32 (reads)"
    return {"operations_per_second": rates, "read_bytes_per_second": reads, "how": how}


def fastest(call: Call) -> float:
    """Seconds of the fastest call, on a CPU."""
    call()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while (start := time.perf_counter()) < end:
        call()
        best = min(best, time.perf_counter() - start)
    return best


def product_rate(
    unit: str, shapes: Iterable[tuple[int, int, int]], device: torch.device, seconds: Callable[[Call], float]
) -> float:
    """Operations a second of the fastest product [M, K] x [K, N]; ``seconds`` times a call.

    Where a call took longer than SECONDS, the shapes after it would say the same, but in minutes.
    """
    rate = 0.0
    for m, n, k in shapes:
        taken = seconds(product(unit, m, n, k, device))
        rate = max(rate, 2 * m * n * k / taken)
        if taken > SECONDS:
            break
    return rate


def product(unit: str, m: int, n: int, k: int, device: torch.device) -> Call:
    if unit != "int8":
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[unit]
        x, weight = (torch.randn(rows, k, dtype=dtype, device=device) for rows in (m, n))
        return lambda: x @ weight.t()
    x, weight = (torch.randint(-127, 128, (rows, k), dtype=torch.int8, device=device) for rows in (m, n))
    if device.type == "cuda":
        return lambda: torch._int_mm(x, weight.t())
    codes = x.view(torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack(weight, [m, k])
    scales, zeros = torch.ones(n), torch.zeros(n, dtype=torch.int64)
    return lambda: torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, 0, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


if __name__ == "__main__":
    serve(lambda given: (machine_peaks(given["threads"]), lambda message: {}))
