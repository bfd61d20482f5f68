"""fit_scale: the scale of each row of a weight matrix by which its int8 codes come nearest to it.

    s_f = argmin_s Σ_c h_c (w_fc − s · clamp(round(w_fc / s), −127, 127))²

over s = max|w_f| / 127 · (1.05 − i / 800), i = 0 … 79. With h_c = E[x_c²] of a layer's inputs, an error in a column
counts as what it does to the output: a few columns are far larger than the others, and a scale is found on whose
multiples their weights nearly lie. Choukroun, Kravchik, Kisilev: Low-bit Quantization of Neural Networks for Efficient
Inference, arXiv:1902.06822.
"""

from __future__ import annotations

import torch

from distilbert_fast import backends
from distilbert_fast.ops import _check, _rows
from distilbert_fast.ops._rows import TINY

OP = "fit_scale"
FACTORS = [1.05 - i / 800 for i in range(80)]


def fit_scale(w: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """The scales for ``quantize(w, scale)`` that leave the least squared error.

    Args:
        w: [F, C], float32, bfloat16, float16 or float64; computed in float32.
        importance: float32 [C], on w's device: what a squared error in each column counts, 0 or more; None: 1.

    Returns:
        float32 [F]. A row that ``quantize`` would give the scale 0, or one that is not finite, has that one here; and
        of scales with the same error the larger is taken.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, by name.
    """
    _check.tensor(OP, "w", w, ("F", "C"))
    if importance is not None:
        _check.tensor(OP, "importance", importance, (w.shape[1],), (torch.float32,), w.device)
        importance = importance.detach()
    return _FORWARD[backends.select(OP, w.device, w.dtype)](w.detach(), importance)


def fit_scale_reference(w: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """The definition of ``fit_scale`` in torch, in the dtype of w."""
    largest = w.abs().amax(dim=1) / 127 if w.shape[1] else w.new_zeros(w.shape[0])  # [F]
    largest = torch.where(largest < TINY, 0.0, largest)
    best, least = largest, torch.full_like(largest, torch.inf)
    for factor in FACTORS:
        scale = largest * factor
        error = w - (w / scale[:, None]).round_().clamp_(-127, 127) * scale[:, None]
        error = error.square_() if importance is None else error.square_() * importance
        total = error.sum(dim=1)
        best, least = torch.where(total < least, scale, best), torch.minimum(total, least)
    return torch.where(largest >= TINY, best, largest)


def _forward_torch(w: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    return fit_scale_reference(w.to(torch.float32).contiguous(), importance)


def _forward_cpu(w: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    scale = w.new_empty(w.shape[0], dtype=torch.float32)
    w, importance = _rows.whole_rows(w), _rows.parameter(importance)
    backends.cpu().fit_scale(
        *(*_rows.matrix_arguments(w, backends.CPU_DTYPE), *w.shape, _rows.address(importance)),
        *(scale.data_ptr(), torch.get_num_threads()),
    )
    return scale


_FORWARD = {"torch": _forward_torch, "cpu": _forward_cpu}
