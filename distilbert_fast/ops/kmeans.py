"""kmeans: k-means of numbers on a line, exact.

    minimise Σ_i w_i (x_i − c_{a_i})²   over the centroids c_0 … c_{k−1} and the codes a_i

Wang, Song: Ckmeans.1d.dp, The R Journal 3(2), 2011; how it is computed: csrc/cpu/ops/kmeans.cpp.
"""

from __future__ import annotations

import torch

from distilbert_fast import backends
from distilbert_fast.ops import _check, _rows

OP = "kmeans"


def kmeans(
    x: torch.Tensor, k: int, weight: torch.Tensor | None = None, threads: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best k values for the numbers of each row, and which of them is the nearest to each number.

    Args:
        x: [R, n], any float dtype and device; computed in float32 on the CPU, sums in float64. Each row is a problem
            of its own.
        k: 1 to 256.
        weight: [R, n], what a squared error counts, 0 or more; None: 1. A row of zeros counts as one of ones.
        threads: that share the rows; None: torch's.

    Returns:
        Centroids float32 [R, k], ascending, each the weighted mean of its numbers, and codes uint8 [R, n], the number
        of the nearest centroid, of two the lower. A row of fewer than k different numbers has these, the last one
        repeated; so has one where more would gain nothing that float64 can tell from rounding.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, by name; a NaN or an infinity in
            x or weight, or a negative weight.
        BackendError: the native module is not built.
    """
    _check.tensor(OP, "x", x, ("R", "n"))
    if not isinstance(k, int) or isinstance(k, bool):
        _check.refuse(OP, "k", "an integer", type(k).__name__, TypeError)
    if weight is not None:
        _check.tensor(OP, "weight", weight, tuple(x.shape), device=x.device)
    found = backends.availability("cpu")
    if not found.ok:
        raise backends.BackendError(f"{OP}: the native module is needed: {found.reason}")
    numbers, weights = (None if t is None else _rows.parameter(t.detach().cpu()) for t in (x, weight))
    assert numbers is not None
    centroids = torch.empty(x.shape[0], max(k, 0), dtype=torch.float32, device="cpu")
    codes = torch.empty(x.shape, dtype=torch.uint8, device="cpu")
    backends.cpu().kmeans(
        *(numbers.data_ptr(), _rows.address(weights), *x.shape, k, centroids.data_ptr(), codes.data_ptr()),
        torch.get_num_threads() if threads is None else threads,
    )
    return centroids.to(x.device), codes.to(x.device)


def kmeans_reference(x: torch.Tensor, k: int, weight: torch.Tensor | None = None) -> torch.Tensor:
    """The least Σ_i w_i (x_i − c_{a_i})² of each row [R], float64, by dynamic programming over all pairs of cuts."""
    order = x.double().sort(dim=1)
    w = torch.ones_like(order.values) if weight is None else weight.double().gather(1, order.indices)
    s0, s1, s2 = (torch.nn.functional.pad((w * order.values**p).cumsum(1), (1, 0)) for p in (0, 1, 2))  # [R, n + 1]
    between = [s[:, None, :] - s[:, :, None] for s in (s0, s1, s2)]  # [R, start, end]
    cost = between[2] - between[1] ** 2 / between[0]
    cost = torch.where(between[0] > 0, cost.clamp(min=0), 0.0)
    cost.masked_fill_(torch.ones_like(cost, dtype=torch.bool).tril(-1), torch.inf)
    best = cost[:, 0]
    for _ in range(k - 1):
        best = (best[:, :, None] + cost).amin(dim=1)
    return best[:, -1]
