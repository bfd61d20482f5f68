"""linear_kl_div: the two vocabulary losses of distillation straight from hidden states, logits never stored.

    s = h_s W_sᵀ + b_s    t = h_t W_tᵀ + b_t
    kl = mean over kd_mask of τ² KL(softmax(t/τ) ‖ softmax(s/τ))        d / d s = τ (p_s − p_t)
    ce = mean over labels ≠ ignore_index of −log softmax(s)[label]      d / d s = softmax(s) − onehot(label)

Rows that neither loss counts are never projected. The others are projected a chunk at a time, and each chunk is
turned into its share of the losses and of the gradients dh = G W, dW = Gᵀ h, db = Σ G before the next is made.

The weights α of the two losses reach an op only in its backward. So the forward keeps the gradients of the two
apart, and backward adds them: dW [2, V, C], the size of two weight matrices whatever N is, and each projection is
computed once. (Projecting again in backward would need no such memory and two matrix products in six more.)
L_ce and L_mlm of Sanh et al.: DistilBERT, a distilled version of BERT, arXiv:1910.01108.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from distilbert_fast.ops import _check
from distilbert_fast.ops._linear_kl_div_backends import FORWARD, OP, Call
from distilbert_fast.ops._operator import function
from distilbert_fast.ops._vocabulary_losses import check_rows, check_side, losses_of, reference_cross_entropy
from distilbert_fast.ops.kl_div import kl_div_reference

_losses = losses_of(OP, Call, FORWARD, ("h", "h_t"))


@function(casts=True)
def linear_kl_div(
    h_s: torch.Tensor,
    W_s: torch.Tensor,
    b_s: torch.Tensor | None,
    h_t: torch.Tensor,
    W_t: torch.Tensor,
    b_t: torch.Tensor | None,
    temperature: float = 1.0,
    kd_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL to the teacher's soft targets and cross-entropy to labels, each on rows of its own.

    Args:
        h_s, W_s, b_s: the student's hidden states [N, C_s] and vocabulary projection [V, C_s], [V] or None, one
            dtype: float32, bfloat16, float16 or float64. The losses are differentiable in these three.
        h_t, W_t, b_t: the teacher's, [N, C_t], [V, C_t], [V] or None, one dtype, not necessarily the student's.
            Never get a gradient.
        temperature: τ > 0 of the KL; the cross-entropy has none.
        kd_mask: bool [N], True = the row counts for the KL. None counts all.
        labels: int64 [N] in [0, V), or ignore_index where the row does not count for the cross-entropy. None =
            no row counts. On CUDA a label out of range is a device assertion.
        ignore_index: the label of rows without one.
        reduction: "mean" of each loss over the rows that it counts, or their "sum".

    Returns:
        (kl, ce), two scalars, float32 (float64 if the student is). No counted row: 0, gradient 0.

    The logits have the dtype of their side (float16 is projected in float32: gradients of unit scale would
    underflow before a loss scale could lift them), the losses and dW are summed in float32, in float64 for
    float64. Memory beyond inputs and gradients is that of one chunk of rows. Under torch.autocast the arguments
    are cast as for a matrix product; where the ``linear`` op's product serves, float32 weights are rounded as they are
    packed, and dW stays float32.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, by name.
    """
    _check.tensor(OP, "h_s", h_s, ("N", "C_s"))
    _check.tensor(OP, "h_t", h_t, (h_s.shape[0], "C_t"), device=h_s.device)
    h_s, W_s, b_s = check_side(OP, h_s, W_s, b_s, "_s")
    h_t, W_t, b_t = check_side(OP, h_t, W_t, b_t, "_t", W_s.shape[0])
    _check.positive(OP, "temperature", temperature)
    check_rows(OP, h_s, kd_mask, labels, ignore_index, reduction)
    h_t, W_t, b_t = h_t.detach(), W_t.detach(), None if b_t is None else b_t.detach()
    mean = reduction == "mean"
    return _losses(h_s, W_s, b_s, h_t, W_t, b_t, kd_mask, labels, float(temperature), ignore_index, mean)


def linear_kl_div_reference(
    h_s: torch.Tensor,
    W_s: torch.Tensor,
    b_s: torch.Tensor | None,
    h_t: torch.Tensor,
    W_t: torch.Tensor,
    b_t: torch.Tensor | None,
    temperature: float = 1.0,
    kd_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of ``linear_kl_div`` in differentiable torch, both logits stored."""
    s, t = F.linear(h_s, W_s, b_s), F.linear(h_t, W_t, b_t).detach()  # [N, V]
    kl = kl_div_reference(s, t, temperature, kd_mask, reduction)
    return kl, reference_cross_entropy(s, labels, ignore_index, reduction)
