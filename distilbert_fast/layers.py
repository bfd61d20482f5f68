"""Differentiable building blocks of a transformer encoder, made from ops.

A padded batch [B, T] holds N real tokens. ``unpad`` keeps their rows [N, ...], sequence after sequence, every
layer works on those, and ``pad`` puts them back: padding is never computed. Not so where a call is ``traced``.

Shapes: B batch, T sequence, N tokens, C hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from distilbert_fast.ops import _check
from distilbert_fast.ops._operator import function, is_eager
from distilbert_fast.ops.codebook_linear import codebook_linear, pack_codes, packed_size, unpack_codes
from distilbert_fast.ops.fit_scale import fit_scale
from distilbert_fast.ops.int8_linear import int8_linear
from distilbert_fast.ops.kmeans import kmeans
from distilbert_fast.ops.quantize import quantize


def unpad(x: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keep the rows of real tokens.

    Args:
        x: [B, T, ...] of any dtype.
        attention_mask: [B, T]; a position is a token where it is not 0, wherever in its row that is.

    Returns:
        x of the tokens [N, ...]; cu_seqlens int32 [B+1], where each sequence starts in it; indices int64 [N],
        the place of each token in the flattened [B·T]. Where every position is a token, x is a view.

    Raises:
        TypeError, ValueError: a mask that is no tensor, or not of the shape [B, T] of x.
    """
    cu_seqlens, indices = _places(token_mask("unpad", attention_mask, x.shape[0], x.shape[1]))
    return Tokens(x.shape[0], x.shape[1], cu_seqlens, indices).rows(x), cu_seqlens, indices


def _places(real: torch.Tensor, count: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """cu_seqlens and indices of ``unpad`` from bool [B, T]. On a GPU the host waits unless it knows the count."""
    cu_seqlens = F.pad(real.sum(dim=1).cumsum(dim=0), (1, 0)).to(torch.int32)  # [B + 1]
    real = real.flatten()
    indices = real.nonzero() if count is None else torch.nonzero_static(real, size=count)  # [N, 1]
    return cu_seqlens, indices.flatten()


def pad(x: torch.Tensor, indices: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """Undo ``unpad``: x [N, ...] and its indices [N] become [batch, length, ...], with 0 where no token was."""
    if x.shape[0] != indices.shape[0]:
        _check.refuse("pad", "x", f"of {indices.shape[0]} rows, one for each index", list(x.shape))
    if x.shape[0] != batch * length:
        x = x.new_zeros(batch * length, *x.shape[1:]).index_copy(0, indices, x)
    return x.unflatten(0, (batch, length))


def token_mask(caller: str, attention_mask: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """``attention_mask`` as bool [B, T], True = token. Refuses any other shape, so also 4-D (causal) masks."""
    if not isinstance(attention_mask, torch.Tensor):
        _check.refuse(caller, "attention_mask", "a tensor", type(attention_mask).__name__, TypeError)
    if attention_mask.shape != (batch, length):
        _check.refuse(caller, "attention_mask", f"of shape [{batch}, {length}]", list(attention_mask.shape))
    return is_token(attention_mask)


def is_token(attention_mask: torch.Tensor) -> torch.Tensor:
    """Where a mask of any dtype and shape says that a position is a token, as bool; −0.0 says that it is padding."""
    return attention_mask != 0


class Padding(NamedTuple):
    """The padding of a batch."""

    none: bool  # every position is a token
    left: bool  # some sequence starts with padding, or is nothing else
    empty: bool  # some sequence has no token
    num_tokens: int | None  # on a GPU; not needed elsewhere

    @classmethod
    def around(cls, real: torch.Tensor) -> Padding:
        """That around tokens, bool [B, T]."""
        if not real.is_cuda and bool(real.all()):
            return NO_PADDING
        left, every = (~real[:, :1].any(1)).any(), real.any(1).all()
        if real.is_cuda:  # the host waits once for all answers
            full, starts, tokens, count = torch.stack([real.all(), left, every, real.sum()]).tolist()
            return cls(bool(full), bool(starts), not tokens, count)
        return cls(False, bool(left), not bool(every), None)


NO_PADDING = Padding(True, False, False, None)


def labels_padding(labels: torch.Tensor, attention_mask: torch.Tensor) -> bool:
    """Whether a loss counts a padded position: labels [B, T], −100 for none, of a mask [B, T]."""
    if labels.shape != attention_mask.shape:
        return False  # the model or its loss will refuse
    return bool((labels.ne(-100) & ~is_token(attention_mask).to(labels.device)).any())


def parse_head_mask(
    caller: str,
    head_mask: torch.Tensor,
    num_heads: int,
    num_layers: int | None,
    device: torch.device,
    batch: int | None = None,
) -> torch.Tensor:
    """Factors of all heads, on ``device`` and floating-point: [H] for every layer, [L, H], or [L, B, H].

    Args:
        head_mask: [H], [L, H] or, where a batch is given, the older [L, 1 or B, H, 1, 1], of any real dtype.
        num_layers: L; None for who does not know, which leaves [H].

    Raises:
        TypeError, ValueError: no tensor, or one of another shape, by name, as ``caller``.
    """
    if not isinstance(head_mask, torch.Tensor):
        _check.refuse(caller, "head_mask", "a tensor", type(head_mask).__name__, TypeError)
    allowed: list[tuple[int | None, ...]] = [(num_heads,), (num_layers, num_heads)]
    expected = f"[{num_heads}] or [{num_layers}, {num_heads}]"
    if batch is not None:
        allowed += [(num_layers, size, num_heads, 1, 1) for size in (1, batch)]
        expected = f"[{num_heads}], [{num_layers}, {num_heads}] or [{num_layers}, 1 or {batch}, {num_heads}, 1, 1]"
    if tuple(head_mask.shape) not in allowed:
        _check.refuse(caller, "head_mask", f"of shape {expected}", list(head_mask.shape))
    mask = head_mask.to(device, head_mask.dtype if head_mask.is_floating_point() else torch.float32)
    if mask.dim() < 5:
        return mask
    mask = mask.flatten(2)  # [L, 1 or B, H]
    return mask[:, 0] if mask.shape[1] == 1 else mask


def head_masks(
    caller: str,
    head_mask: torch.Tensor | None,
    num_heads: int,
    kept: Sequence[Sequence[int]],
    device: torch.device,
    batch: int | None = None,
) -> list[torch.Tensor | None]:
    """For each layer None, [H_l] or [B, H_l]: factors of the heads that are left in it; differentiable in head_mask.

    Args:
        head_mask: as for ``parse_head_mask``, over the heads of the unpruned model.
        kept: for each layer the numbers of its heads.
    """
    if head_mask is None:
        return [None] * len(kept)
    mask = parse_head_mask(caller, head_mask, num_heads, len(kept), device, batch)
    rows = mask.unbind() if mask.dim() > 1 else [mask] * len(kept)
    return [
        row if len(left) == num_heads else row.index_select(-1, torch.tensor(left, dtype=torch.int64, device=device))
        for row, left in zip(rows, kept, strict=True)
    ]


class Tokens(NamedTuple):
    """How rows x [N, ...] of the real tokens form B sequences of up to T tokens.

    ``cu_seqlens`` int32 [B+1] and ``indices`` [N] are as from ``unpad``; indices is None where N = B·T.
    """

    batch: int
    length: int
    cu_seqlens: torch.Tensor
    indices: torch.Tensor | None = None

    @classmethod
    def unpadded(
        cls, mask: torch.Tensor | None, batch: int, length: int, device: torch.device, count: int | None = None
    ) -> Tokens:
        """Make it from mask [B, T], on ``device`` or on the CPU: tokens are where it is not 0; there are ``count``."""
        if mask is None:
            return cls(batch, length, torch.arange(batch + 1, dtype=torch.int32, device=device) * length)
        places = _places(token_mask("unpad", mask, batch, length), count)
        cu_seqlens, indices = (part.to(device, non_blocking=True) for part in places)
        return cls(batch, length, cu_seqlens, indices)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, ...] -> [N, ...]."""
        rows = x.flatten(0, 1)
        if self.indices is None or self.indices.shape[0] == rows.shape[0]:
            return rows
        return rows.index_select(0, self.indices)

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, ...] -> [B, T, ...]; 0 at positions that have no row."""
        if self.indices is None:
            return x.unflatten(0, (self.batch, self.length))
        return pad(x, self.indices, self.batch, self.length)


def traced(*tensors: torch.Tensor | None) -> bool:
    """Whether a computation on these is recorded or transformed, and not only run.

    By torch.compile, torch.export, torch.jit or torch.fx, a torch.func transform or forward-mode gradients, a mode
    (make_fx, FakeTensorMode, FLOP counters), a CUDA graph, or tensors that are not plain ones that hold numbers.
    Then nothing may depend on what the tensors hold, and no op that the tracer does not know may be used.
    """
    return (
        torch.compiler.is_compiling()
        or not is_eager(tensors, default_device=True)
        or (any(x is not None and x.is_cuda for x in tensors) and torch.cuda.is_current_stream_capturing())
    )


def exported(*tensors: torch.Tensor | None) -> bool:
    """Whether a computation is ``traced``, but not by torch.compile, which takes our ops as they are."""
    compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return not compiled and traced(*tensors)


class Int8Linear(nn.Module):
    """A linear layer of int8 weights, one scale a row: y = x Wᵀ + b with W[f] = weight_scale[f] · weight[0, f].

    x [..., C] of any float dtype is quantized for each row on its own as it comes; y [..., F] has its dtype.

    Parameters and buffers:
        weight: codes int8 [1, F, C]. The leading 1 makes loaders that take them for weights of an nn.Linear fail
            on the shape instead of computing with codes.
        weight_scale: [F]. It stays float32 whatever the rest of the model is cast to.
        bias: [F] or None.

    The gradient for x is that of the dequantized layer, roundings taken as identity (straight-through: Bengio,
    Léonard, Courville, arXiv:1308.3432). Bias gets one too; weight and weight_scale are fixed.
    """

    weight_scale: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        codes = torch.empty(1, out_features, in_features, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("weight_scale", torch.empty(out_features, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls,
        linear: nn.Linear,
        mean: torch.Tensor | None = None,
        mean_square: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> Int8Linear:
        """Quantize the weights of ``linear``.

        Args:
            linear: its bias is shared, unless it is corrected.
            mean: E[x] of its inputs, float32 [C]. What rounding the weights would add to the mean of the outputs, the
                bias takes back: b − (Ŵ − W) E[x]. Nagel, van Baalen, Blankevoort, Welling: arXiv:1906.04721, §4.2.
            mean_square: E[x²], float32 [C]: scales are those of the least error of the outputs, see ``fit_scale``.
                None: the largest weight of each row gets the code 127.
            scale: float32 [F], instead of those.
        """
        made = cls(linear.in_features, linear.out_features, bias=False, device=linear.weight.device)
        if scale is None and mean_square is not None:
            scale = fit_scale(linear.weight, mean_square)
        codes, made.weight_scale = quantize(linear.weight, scale)  # [F, C], [F]
        made.weight, made.bias = nn.Parameter(codes[None], requires_grad=False), linear.bias
        if mean is not None and linear.bias is not None:
            added = (made.dequantized() - linear.weight.float()) @ mean  # [F]
            bias = (linear.bias.float() - added).to(linear.bias.dtype)
            made.bias = nn.Parameter(bias, linear.bias.requires_grad)
        return made.train(linear.training)

    @property
    def codes(self) -> torch.Tensor:
        """int8 [F, C]."""
        return self.weight[0]

    def dequantized(self) -> torch.Tensor:
        """W, float32 [F, C]."""
        return self.codes * self.weight_scale[:, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(math.prod(x.shape[:-1]), self.in_features)  # numel() would not trace a size that may vary
        y = _dynamic_int8_linear(rows, self.codes, self.weight_scale, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> Int8Linear:
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


@function()
def _dynamic_int8_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _StraightThrough.apply(x, weight, scale, bias)
    return _int8_linear(x, weight, scale, bias)


def _int8_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    x_q, x_scale = quantize(x)
    return int8_linear(x_q, x_scale, weight, scale, bias, out_dtype=x.dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, scale)
        return _int8_linear(x, weight, scale, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        dx = (dy * scale.to(dy.dtype)) @ weight.to(dy.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, None, dy.sum(dim=0) if ctx.needs_input_grad[3] else None


class CodebookLinear(nn.Module):
    """A linear layer whose weights share few values: y = x Wᵀ + b with W[f, c] = values[f div group_size, code (f, c)].

    x [..., C] and y [..., F] are of one float dtype. Han, Mao, Dally: Deep Compression, arXiv:1510.00149, §3.

    Parameters:
        weight: packed codes uint8 [1, F, bytes], of 8, 6 or 4 bits for 256, 64 or 16 values, see ``pack_codes``. They
            are fixed. The leading 1 is there as in ``Int8Linear``.
        values: [G, K], those that each ``group_size`` rows in a row share; G = ⌈F / group_size⌉, or 1 where all rows
            share them (None). The gradient of a value is the sum of those of its weights.
        bias: [F] or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_values: int,
        group_size: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check.choice("CodebookLinear", "num_values", num_values, CODEBOOK_SIZES)
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size = (num_values - 1).bit_length(), group_size
        codes = torch.empty(1, out_features, packed_size(in_features, self.bits), dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        groups = -(-out_features // self._rows)
        self.values = nn.Parameter(torch.empty(groups, num_values, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls,
        linear: nn.Linear,
        num_values: int,
        group_size: int | None = None,
        importance: torch.Tensor | None = None,
        threads: int | None = None,
    ) -> CodebookLinear:
        """The best shared values for the weights of ``linear``, see ``kmeans``; its bias is shared.

        Args:
            num_values: 256, 64 or 16.
            group_size: rows that share values; None: all.
            importance: [F, C], 0 or more: what a squared error of each weight counts; None: all the same.
            threads: as for ``kmeans``.
        """
        c, f, weight = linear.in_features, linear.out_features, linear.weight
        made = cls(c, f, num_values, group_size, False, weight.device, weight.dtype)
        made.assign(weight, importance, threads)
        made.bias = linear.bias
        return made.train(linear.training)

    @torch.no_grad()
    def assign(self, weight: torch.Tensor, importance: torch.Tensor | None = None, threads: int | None = None) -> None:
        """Make ``values`` and the codes the best ones for weights [F, C], see ``from_linear``."""
        (f, c), size = weight.shape, self._rows
        codes = torch.zeros(f, c, dtype=torch.uint8, device=weight.device)
        self.values.zero_()
        whole = f // size * size  # the last group may be smaller
        for begin, end in ((0, whole), (whole, f)):
            if (end - begin) * c == 0:
                continue
            rows = max((end - begin) // size, 1)
            counts = None if importance is None else importance[begin:end].reshape(rows, -1)
            values, found = kmeans(weight[begin:end].reshape(rows, -1), self.values.shape[1], counts, threads)
            self.values[begin // size : begin // size + rows] = values.to(self.values.dtype)
            codes[begin:end] = found.view(end - begin, c)
        self.weight.copy_(pack_codes(codes, self.bits)[None])

    @property
    def _rows(self) -> int:
        """Those that share a codebook."""
        return self.group_size or max(self.out_features, 1)

    @property
    def codes(self) -> torch.Tensor:
        """Unpacked, uint8 [F, C]."""
        return unpack_codes(self.weight[0], self.in_features, self.bits)

    def dequantized(self) -> torch.Tensor:
        """W [F, C], in the dtype of ``values``."""
        rows = torch.arange(self.out_features, device=self.values.device)[:, None] // self._rows
        return self.values[rows, self.codes.int()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(math.prod(x.shape[:-1]), self.in_features)  # numel() would not trace a size that may vary
        y = codebook_linear(rows, self.weight[0], self.values, self.bias, self.bits, self._rows)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, num_values={self.values.shape[1]}, group_size={self.group_size}"


CODEBOOK_SIZES = (256, 64, 16)
QUANTIZED_LINEARS = (Int8Linear, CodebookLinear)  # whose ``weight`` holds codes, and which have ``dequantized``
