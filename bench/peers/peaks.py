"""What this machine can do at most, as far as torch's own kernels reach it: matrix products and reading."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

SHAPES = ((1024, 1024, 1024), (1024, 3072, 768), (2048, 2048, 2048))  # M, N, K
READS = {"L2": 1 << 20, "L3": 24 << 20, "DRAM": 1 << 29}  # bytes a thread
SECONDS = 0.3  # spent on each


def machine_peaks(threads: int) -> dict[str, Any]:
    """Highest rates seen: operations a second of int8, bf16 and fp32 products, bytes a second read, by cache level.

    "how" names the kernels; a machine's true peak is somewhat higher. bf16 counts at least as fp32 does: without AMX
    torch's bf16 products are the slower ones.
    """
    import torch

    torch.set_num_threads(threads)
    rates = {
        precision: max(2 * m * n * k / fastest(make(m, n, k)) for m, n, k in SHAPES)
        for precision, make in (("int8", int8_product), ("bf16", bf16_product), ("fp32", fp32_product))
    }
    rates["bf16"] = max(rates["bf16"], rates["fp32"])
    reads = {}
    for level, size in READS.items():
        block = torch.ones(threads * size // 4, dtype=torch.int32)
        reads[level] = block.nbytes / fastest(lambda block=block: block.amax())
    how = f"torch {torch.__version__}: onednn.qlinear (int8, prepacked), mm (bf16, fp32), amax of int32 (reads)"
    return {"operations_per_second": rates, "read_bytes_per_second": reads, "how": how}


def fastest(call: Callable[[], object]) -> float:
    """Seconds of the fastest call."""
    call()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while (start := time.perf_counter()) < end:
        call()
        best = min(best, time.perf_counter() - start)
    return best


def int8_product(m: int, n: int, k: int) -> Callable[[], object]:
    import torch

    x = torch.randint(0, 255, (m, k), dtype=torch.uint8)
    weight = torch.ops.onednn.qlinear_prepack(torch.randint(-127, 127, (n, k), dtype=torch.int8), [m, k])
    scales, zeros = torch.ones(n), torch.zeros(n, dtype=torch.int64)
    return lambda: torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 0, weight, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def bf16_product(m: int, n: int, k: int) -> Callable[[], object]:
    import torch

    x, weight = torch.ones(m, k, dtype=torch.bfloat16), torch.ones(k, n, dtype=torch.bfloat16)
    return lambda: x @ weight


def fp32_product(m: int, n: int, k: int) -> Callable[[], object]:
    import torch

    x, weight = torch.ones(m, k), torch.ones(k, n)
    return lambda: x @ weight
