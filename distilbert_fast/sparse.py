"""SparseLinear: a linear layer most of whose weights are 0, and stay so while the others are trained.

It computes as a dense one, in the same time. On disk it is a bit for each weight, and those that are left.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from distilbert_fast.layers import QUANTIZED_LINEARS, traced
from distilbert_fast.ops import _check
from distilbert_fast.ops.linear import linear


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """A bit a number: bool [F, C] -> uint8 [F, ⌈C / 8⌉]. Column c is bit c mod 8, from the lowest, of byte c div 8."""
    rows, columns = mask.shape
    bits = F.pad(mask.to(torch.uint8), (0, -columns % 8)).view(rows, -(-columns // 8), 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def unpack_mask(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """``pack_mask`` undone: uint8 [F, ⌈C / 8⌉] -> bool [F, C]."""
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1  # [F, bytes, 8]
    return bits.flatten(1)[:, :columns].bool()


class SparseLinear(nn.Module):
    """A linear layer with weights where its mask is True, and 0 elsewhere: y = x (W ∘ mask)ᵀ + b.

    x [..., C] and y [..., F] are of one float dtype. No gradient reaches a weight outside of the mask, so any optimizer
    trains those that are left. What the parameter holds there is neither computed with nor saved.

    Parameters and buffers:
        weight: [F, C].
        mask: bool [F, C].
        bias: [F] or None.
        scores: [F, C], only while training chooses the mask by movement. Their gradient is that of W ∘ mask times W,
            also outside of the mask (straight-through: Sanh, Wolf, Rush, arXiv:2005.07683).

    Its state, and so its file, has in their place "weight", the mask packed by ``pack_mask``, uint8 [1, F, ⌈C / 8⌉],
    and "values" [n], the n weights in it, row after row; with scores also these, and "hidden", the other weights.
    """

    mask: torch.Tensor
    bias: nn.Parameter | None
    scores: nn.Parameter | None

    def __init__(self, weight: torch.Tensor, mask: torch.Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        _check.tensor("SparseLinear", "mask", mask, tuple(weight.shape), (torch.bool,), weight.device)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(torch.where(mask, weight.detach(), 0))
        self.register_buffer("mask", mask, persistent=False)
        self.bias = bias
        self.register_parameter("scores", None)

    @classmethod
    def from_linear(cls, linear: Any, mask: torch.Tensor) -> SparseLinear:
        """``linear`` without the weights where mask [F, C] is False; its bias is shared."""
        made = cls(linear.weight, mask, linear.bias)
        made.weight.requires_grad_(linear.weight.requires_grad)
        return made.train(linear.training)

    def dequantized(self) -> torch.Tensor:
        """W ∘ mask [F, C], what it computes with; differentiable."""
        if self.scores is None:
            return torch.where(self.mask, self.weight, 0)
        found: torch.Tensor = _Scored.apply(self.weight, self.scores, self.mask)
        return found

    def dense(self) -> nn.Linear:
        """The same layer without a mask; its bias is shared."""
        made = nn.Linear(1, 1, bias=False, device=self.weight.device, dtype=self.weight.dtype)
        made.weight = nn.Parameter(self.dequantized().detach())
        made.register_parameter("bias", self.bias)
        made.in_features, made.out_features = self.in_features, self.out_features
        return made.train(self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = F.linear if traced(x) else linear
        return product(x, self.dequantized(), self.bias)

    def extra_repr(self) -> str:
        left = f"{float(self.mask.float().mean()):.1%} of its weights" if self.mask.numel() else "no weights"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {left}"

    # Its state -------------------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if torch.onnx.is_in_onnx_export():  # by TorchScript, which takes parameters from the state
            return
        destination[f"{prefix}weight"] = pack_mask(self.mask)[None]
        destination[f"{prefix}values"] = self.weight.detach()[self.mask]
        if self.scores is not None:
            destination[f"{prefix}hidden"] = self.weight.detach()[~self.mask]

    @torch.no_grad()
    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = ("weight", "values") if self.scores is None else ("weight", "values", "hidden")
        parts = {name: state_dict.get(f"{prefix}{name}") for name in names}
        packed, values = parts["weight"], parts["values"]
        given = {name: x for name, x in state_dict.items() if name.removeprefix(prefix) not in names}
        given[f"{prefix}weight"] = self.weight
        super()._load_from_state_dict(given, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if packed is None or values is None or any(part is None for part in parts.values()):
            missing_keys += [f"{prefix}{name}" for name, part in parts.items() if part is None]
        elif (why := mask_fault(packed, values.shape, self.out_features, self.in_features)) is not None:
            error_msgs.append(f"{prefix}{why}")
        else:
            self.mask.copy_(unpack_mask(packed[0], self.in_features))
            self.weight.zero_()[self.mask] = values.to(self.weight.device, self.weight.dtype)
            if self.scores is not None:
                self.weight[~self.mask] = parts["hidden"].to(self.weight.device, self.weight.dtype)


class _Scored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight, mask)
        return torch.where(mask, weight, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dw: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, mask = ctx.saved_tensors
        return torch.where(mask, dw, 0), dw * weight, None


def mask_fault(packed: torch.Tensor, values: torch.Size, rows: int, columns: int) -> str | None:
    """Why a packed mask and values of such a shape are not those of a layer; None if they are."""
    shape = [1, rows, -(-columns // 8)]
    if packed.dtype != torch.uint8 or list(packed.shape) != shape:
        return f"weight must be a mask, uint8 {shape}, got {str(packed.dtype)[6:]} {list(packed.shape)}"
    if columns % 8 and bool((packed[..., -1] >> columns % 8).any()):
        return f"weight must have 0 in the {-columns % 8} bits after the last of {columns} columns, got other ones"
    left = int(unpack_mask(packed[0], columns).sum())
    if list(values) != [left]:
        return f"values must be the [{left}] that its mask leaves, got {list(values)}"
    return None


class PackedSparseLinear(nn.Module):
    """The place for the state of a ``SparseLinear`` that is read from a file, and then becomes one."""

    def __init__(self, like: nn.Linear, left: int) -> None:
        super().__init__()
        self.out_features, self.in_features = like.out_features, like.in_features
        of_like: Any = {"dtype": like.weight.dtype, "device": like.weight.device}
        packed = torch.empty(
            1, self.out_features, -(-self.in_features // 8), dtype=torch.uint8, device=of_like["device"]
        )
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.values = nn.Parameter(torch.empty(left, **of_like))
        self.bias = None if like.bias is None else nn.Parameter(torch.empty(self.out_features, **of_like))

    @torch.no_grad()
    def unpack(self) -> None:
        """Become a ``SparseLinear``, in place."""
        mask = unpack_mask(self.weight[0], self.in_features)
        weight = torch.zeros(mask.shape, dtype=self.values.dtype, device=self.values.device)
        weight[mask] = self.values
        del self.values
        self.weight = nn.Parameter(weight)
        self.register_buffer("mask", mask, persistent=False)
        self.register_parameter("scores", None)
        unpacked: Any = self
        unpacked.__class__ = SparseLinear


LINEARS = (nn.Linear, SparseLinear, *QUANTIZED_LINEARS)  # what the linear layers of a model may be
