"""Self-attention relations of MiniLMv2: how a layer's queries relate to each other, its keys, its values.

    R_x = softmax(x xᵀ / √d)   for x = q, k, v, split again into A heads of d = C / A
    loss of a token = 1/A Σ_heads Σ_x KL(R_x of the teacher ‖ R_x of the student)

A relation is [T, T] whatever C is, so that a student may be narrower than its teacher, and have other heads.
Wang, Bao, Huang, Dong, Wei: MiniLMv2: Multi-Head Self-Attention Relation Distillation, arXiv:2012.15828.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distilbert_fast.ops.kl_div import kl_div

# Far below any logit at any temperature, yet finite: p = 0 on both sides counts 0 in a KL divergence, not NaN.
EXCLUDED = -1e9

Projections = tuple[Tensor, Tensor, Tensor]  # q, k, v [B, T, C]


def relation_kl(student: Projections, teacher: Projections, real: Tensor, heads: int) -> Tensor:
    """Sum over real tokens of the loss above.

    Args:
        student, teacher: q, k, v [B, T, C_s] and [B, T, C_t]; both widths are multiples of ``heads``.
        real: bool [B, T], True = token; no relation looks at any other.
        heads: A.

    The relations [B, A, T, T] of one x exist at a time, in forward and again in backward.
    """
    total = student[0].new_zeros(())
    for of_student, of_teacher in zip(student, teacher, strict=True):
        total = total + checkpoint(_relation_kl, of_student, of_teacher, real, heads, use_reentrant=False)
    return total


def _relation_kl(student: Tensor, teacher: Tensor, real: Tensor, heads: int) -> Tensor:
    rows = real[:, None, :].expand(-1, heads, -1).flatten()  # [B·A·T]
    return kl_div(_scores(student, real, heads), _scores(teacher, real, heads), 1.0, rows, "sum") / heads


def _scores(x: Tensor, real: Tensor, heads: int) -> Tensor:
    x = x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, A, T, d]
    scores = (x * x.shape[-1] ** -0.5) @ x.transpose(-1, -2)  # [B, A, T, T]
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return scores.masked_fill(~real[:, None, None, :], EXCLUDED).flatten(0, 2)  # [B·A·T, T]
