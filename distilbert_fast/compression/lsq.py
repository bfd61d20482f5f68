"""LsqLinear: float weights that are trained while they compute as the int8 ones that they become, and their scales too.

    ŵ = s · round(clamp(w / s, −127, 127)),    x̂ = x quantized, a scale a token;    y = x̂ ŵᵀ + b
    ∂w = ∂ŵ where |w / s| ≤ 127, else 0        ∂s = Σ_c ∂ŵ · (round(w / s) − w / s, or ±127 outside) / √(127 · C)

Learned step sizes: Esser, McKinstry, Bablani, Appuswamy, Modha: arXiv:1902.08153. Two things are otherwise.
Scales start where the squared error is least (``fit_scale``): LSQ's 2·E|w|/√127 is meant for few bits, and at 8 is some
five times that. And the parameter is s in units of its start: the steps of Adam are as large as the learning rate,
whatever the gradient, and so one learning rate fits weights and scales.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from distilbert_fast.ops.fit_scale import fit_scale
from distilbert_fast.ops.int8_linear import int8_linear
from distilbert_fast.ops.linear import linear
from distilbert_fast.ops.quantize import quantize

LARGEST_CODE = 127


class LsqLinear(nn.Linear):
    """An nn.Linear [C] -> [F] whose forward is that of the ``Int8Linear`` of its weights and scales, bit for bit.

    x is [..., C] of any float dtype, y [..., F] of the same.

    Parameters and buffers, beside those of nn.Linear:
        factor: [F], 1 at first; the scale of row f is ``start``[f] · |factor[f]|.
        start: [F].
    """

    factor: nn.Parameter
    start: torch.Tensor

    @classmethod
    @torch.no_grad()
    def adopt(cls, plain: nn.Linear) -> None:
        """Make it one, in place."""
        start = fit_scale(plain.weight)
        plain.register_buffer("start", start)
        plain.register_parameter("factor", nn.Parameter(torch.ones_like(start)))
        adopted: Any = plain
        adopted.__class__ = cls

    def release(self) -> None:
        """Make it an nn.Linear again, in place."""
        del self.start, self.factor
        plain: Any = self
        plain.__class__ = nn.Linear

    @property
    def weight_scale(self) -> torch.Tensor:
        """s, float32 [F]."""
        return (self.start * self.factor.abs()).float()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = input.reshape(input.shape[:-1].numel(), self.in_features)  # [N, C]
        y: torch.Tensor = _Lsq.apply(rows, self.weight, self.weight_scale, self.bias)
        return y.view(*input.shape[:-1], self.out_features)


class _Lsq(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        codes, _ = quantize(weight, scale)
        x_q, x_scale = quantize(x)
        ctx.save_for_backward(x_q, x_scale, codes, weight, scale)
        ctx.dtype = x.dtype
        return int8_linear(x_q, x_scale, codes, scale, bias, out_dtype=x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_q, x_scale, codes, weight, scale = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            dx = linear(dy, (codes * scale[:, None]).to(ctx.dtype).t())  # [N, C]
        dw = linear(dy.t(), (x_q * x_scale[:, None]).to(ctx.dtype).t()).float()  # [F, C]
        inside = weight.float().abs() <= LARGEST_CODE * scale[:, None]
        within = inside & (scale > 0)[:, None]
        wrong = codes - torch.where(within, weight / scale[:, None], 0)  # [F, C]
        ds = (dw * wrong).sum(1) / math.sqrt(LARGEST_CODE * max(weight.shape[1], 1))  # [F]
        db = dy.sum(0) if ctx.needs_input_grad[3] else None
        return dx, torch.where(inside, dw, 0).to(weight.dtype), ds, db
