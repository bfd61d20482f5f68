"""Input makers and the error rule, shared by tests/ and bench/."""

from __future__ import annotations

import torch

LAYOUTS = ("contiguous", "strided_rows", "strided_columns", "transposed", "misaligned")


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same matrix [N, C] with other strides or another storage offset; the gaps between rows hold NaN."""
    if layout == "contiguous":
        return x.contiguous()
    n, c = x.shape
    filler = float("nan") if x.dtype.is_floating_point else 113
    if layout == "strided_rows":
        room = torch.full((n, c + 5), filler, dtype=x.dtype, device=x.device)[:, 2 : 2 + c]
    elif layout == "strided_columns":
        room = torch.full((n, 2 * c), filler, dtype=x.dtype, device=x.device)[:, ::2]
    elif layout == "transposed":
        room = torch.full((c, n), filler, dtype=x.dtype, device=x.device).t()
    elif layout == "misaligned":
        room = torch.full((n * c + 1,), filler, dtype=x.dtype, device=x.device)[1:].view(n, c)
    else:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    return room.copy_(x)


def logits(
    n: int,
    v: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    spread: float = 4.0,
    device: str = "cpu",
) -> torch.Tensor:
    """Normal logits [n, v] with standard deviation ``spread``, the same for every dtype and device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, v, generator=generator, dtype=torch.float64) * spread).to(device, dtype)


def error(x: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute difference to a float64 result; infinite where only one of the two is finite."""
    if x.numel() == 0:
        return 0.0
    difference = (x.double() - exact.double()).abs()
    same = (x.double() == exact.double()) | (x.isnan() & exact.isnan())
    return float(torch.where(same, 0.0, difference.nan_to_num(nan=float("inf"))).max())


def assert_twice_rule(ours: torch.Tensor, torchs: torch.Tensor, exact: torch.Tensor, what: str = "result") -> None:
    """Our error against float64 is at most twice that of torch in the same dtype.

    Args:
        ours: the result under test.
        torchs: the torch reference computed in the dtype under test.
        exact: the torch reference computed in float64 from the same (rounded) inputs.

    One rounding of the largest value is granted on top: torch may be exact by luck where one value is compared.
    Float64 has no better oracle, only another order of sums: it is held to 1e-12 of the largest value, or of 1.
    """
    assert ours.shape == exact.shape, f"{what}: shape {list(ours.shape)}, expected {list(exact.shape)}"
    finite = exact[exact.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    if ours.dtype == torch.float64:
        bound = 1e-12 * max(largest, 1.0)
    else:
        bound = 2 * error(torchs, exact) + torch.finfo(ours.dtype).eps * largest
    found = error(ours, exact)
    assert found <= bound, f"{what}: error {found:.3e} to float64, allowed {bound:.3e}"
