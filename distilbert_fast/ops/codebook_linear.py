"""codebook_linear: a linear layer whose weights share at most 256 values.

    W_fc = codebook[f div g, codes_fc]        y = x · Wᵀ + b        g: rows that share a codebook

    dx = dy · W        dW = dyᵀ · x,   dcodebook_ik = Σ_{fc: f div g = i, codes_fc = k} dW_fc        db = Σ_n dy_n

Han, Mao, Dally: Deep Compression, arXiv:1510.00149, section 3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from distilbert_fast import backends
from distilbert_fast.ops import _check, _rows
from distilbert_fast.ops._autocast import autocast, without_autocast
from distilbert_fast.ops._operator import function, operator

OP = "codebook_linear"


@function(casts=True)
def codebook_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    bias: torch.Tensor | None = None,
    bits: int = 8,
    group_size: int | None = None,
) -> torch.Tensor:
    """x · codebook[codes]ᵀ + b.

    Args:
        x: [N, C], float32, bfloat16, float16 or float64. Differentiable, as are codebook and bias.
        codes: uint8 [F, C], same device: each weight's index into its codebook. Of fewer bits: [F, ⌈C · bits / 8⌉], as
            ``pack_codes`` lays them out.
        codebook: [K], K ≤ 256, same device and dtype as x; with ``group_size`` [⌈F / group_size⌉, K].
        bias: [F], likewise; None adds nothing.
        bits: of a code: 8, 6 or 4.
        group_size: so many rows of W in a row share a codebook; None: all share one.

    Returns:
        y [N, F] in the dtype of x. Inside torch.autocast all is first cast as for torch.nn.functional.linear.

    On the CPU the weights are looked up as they are multiplied, some columns at a time, and sums are float32 for
    bfloat16 too. Elsewhere W [F, C] is looked up for the product and dropped. Backward looks it up again, and sums
    the gradient of codebook in float64.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, by name; on the CPU also
            a code outside codebook. On CUDA a look at the codes would wait for the device, so there torch's
            own gather stops with a device-side assertion.
    """
    _check.tensor(OP, "x", x, ("N", "C"))
    x, codebook, bias = autocast(x.device, x, codebook, bias)
    _check.choice(OP, "bits", bits, (8, 6, 4))
    _check.tensor(OP, "codes", codes, ("F", packed_size(x.shape[1], bits)), (torch.uint8,), x.device)
    if group_size is None:
        _check.tensor(OP, "codebook", codebook, ("K",), (x.dtype,), x.device)
    else:
        if not isinstance(group_size, int) or group_size < 1:
            _check.refuse(OP, "group_size", "an integer of 1 or more", repr(group_size))
        _check.tensor(OP, "codebook", codebook, (-(-codes.shape[0] // group_size), "K"), (x.dtype,), x.device)
    if codebook.shape[-1] > 256:
        _check.refuse(OP, "codebook", "of at most 256 values", list(codebook.shape))
    if bias is not None:
        _check.tensor(OP, "bias", bias, (codes.shape[0],), (x.dtype,), x.device)
    differentiable = (x, codebook) if bias is None else (x, codebook, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable):
        return _CodebookLinear.apply(x, codes, codebook, bias, bits, group_size or 0)
    return _forward(Call(x, codes, codebook, bias, bits, group_size or 0))


def codebook_linear_reference(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    bias: torch.Tensor | None = None,
    bits: int = 8,
    group_size: int | None = None,
) -> torch.Tensor:
    """The definition of ``codebook_linear`` in differentiable torch, in the dtype of its arguments."""
    codes = unpack_codes(codes, x.shape[1], bits).long()
    if group_size is None:
        return torch.nn.functional.linear(x, codebook[codes], bias)
    rows = torch.arange(codes.shape[0], device=x.device)[:, None] // group_size
    return torch.nn.functional.linear(x, codebook[rows, codes], bias)


# Code c of fewer than 8 bits is in the bits [c · bits, (c + 1) · bits) of its row, from the lowest of each byte on.
# Bits that are left over are 0.


def packed_size(columns: int, bits: int) -> int:
    """Bytes of a row."""
    return -(-columns * bits // 8)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes below 2^bits, uint8 [F, C], as uint8 [F, ⌈C · bits / 8⌉]; bits is 8, 6 or 4."""
    if bits == 8:
        return codes
    packed = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 4))
    if bits == 4:
        packed = packed[:, ::2] | packed[:, 1::2] << 4
    else:
        a, b, c, d = packed.unflatten(1, (-1, 4)).unbind(2)
        packed = torch.stack([a | b << 6, b >> 2 | c << 4, c >> 4 | d << 2], dim=2).flatten(1)
    return packed[:, : packed_size(codes.shape[1], bits)].contiguous()


def unpack_codes(packed: torch.Tensor, columns: int, bits: int) -> torch.Tensor:
    """Undo ``pack_codes``: uint8 [F, C]."""
    if bits == 8:
        return packed
    if bits == 4:
        parts = [packed & 15, packed >> 4]
    else:
        a, b, c = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 3)).unflatten(1, (-1, 3)).unbind(2)
        parts = [a & 63, a >> 6 | (b & 15) << 2, b >> 4 | (c & 3) << 4, c >> 2]
    return torch.stack(parts, dim=2).flatten(1)[:, :columns]


class _CodebookLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        """Arguments: those of ``Call``."""
        ctx.save_for_backward(*arguments[:3])
        ctx.layout = arguments[4:]
        return _forward(Call(*arguments))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, _, codebook, bias = ctx.needs_input_grad[:4]
        dx, dcodebook, dbias = _backward(Gradient(*(dy, *ctx.saved_tensors, [x, codebook, bias], *ctx.layout)))
        return dx if x else None, None, dcodebook if codebook else None, dbias if bias else None, None, None


class Call(NamedTuple):
    """All arguments of forward."""

    x: torch.Tensor  # [N, C]
    codes: torch.Tensor  # uint8 [F, bytes]
    codebook: torch.Tensor  # [K] or [G, K]
    bias: torch.Tensor | None  # [F]
    bits: int = 8
    group_size: int = 0  # 0: all rows share the codebook [K]


class Gradient(NamedTuple):
    """All arguments of backward."""

    dy: torch.Tensor  # [N, F]
    x: torch.Tensor  # [N, C]
    codes: torch.Tensor  # uint8 [F, bytes]
    codebook: torch.Tensor  # [K] or [G, K]
    wanted: list[bool]  # which of dx, dcodebook, dbias
    bits: int = 8
    group_size: int = 0


Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _forward_like(call: Call) -> torch.Tensor:
    return call.x.new_empty((call.x.shape[0], call.codes.shape[0]))


@operator("codebook_linear_forward", _forward_like)
def _forward(call: Call) -> torch.Tensor:
    """y [N, F]."""
    return _FORWARD[backends.select(OP, call.x.device, call.x.dtype)](call)


def _backward_like(call: Gradient) -> Gradients:
    x, shapes = call.x, (call.x.shape, call.codebook.shape, call.codes.shape[:1])
    dx, dcodebook, dbias = (x.new_empty(shape if want else 0) for shape, want in zip(shapes, call.wanted, strict=True))
    return dx, dcodebook, dbias


@operator("codebook_linear_backward", _backward_like)
def _backward(call: Gradient) -> Gradients:
    """dx [N, C], dcodebook as codebook and dbias [F], each [0] if not wanted."""
    return _BACKWARD[backends.select_backward(OP, call.x.device, call.x.dtype)](call)


# torch ------------------------------------------------------------------------------------------------------


def _places(call: Call | Gradient) -> torch.Tensor:
    """Where in the flattened codebooks each weight is, int32 [F, C]."""
    codes = unpack_codes(call.codes, call.x.shape[1], call.bits).int()
    if call.group_size == 0:
        return codes
    rows = torch.arange(codes.shape[0], dtype=torch.int32, device=codes.device)
    return codes + (rows // call.group_size * call.codebook.shape[1])[:, None]


def _look_up(call: Call | Gradient) -> torch.Tensor:
    places = _places(call)
    return call.codebook.flatten().index_select(0, places.flatten()).view(places.shape)  # [F, C]


def _forward_torch(call: Call) -> torch.Tensor:
    values = call.codebook.shape[-1]
    if values < 1 << call.bits:
        codes = unpack_codes(call.codes, call.x.shape[1], call.bits)
        _check.below(OP, "codes", codes, values, "the values of codebook")
    with without_autocast(call.x.device):
        return torch.nn.functional.linear(call.x, _look_up(call), call.bias)


def _backward_torch(call: Gradient) -> Gradients:
    dy, x, codebook, wanted = call.dy, call.x, call.codebook, call.wanted
    dx, dcodebook, dbias = (x.new_empty(0) for _ in wanted)
    with without_autocast(x.device):
        if wanted[0]:
            dx = dy @ _look_up(call)
        if wanted[1]:
            dw = dy.t() @ x  # [F, C]
            sums = torch.zeros(codebook.numel(), dtype=torch.float64, device=x.device)
            # In float64 index_put_ adds in a fixed order on the CPU too: the same bits every run.
            sums.index_put_((_places(call).flatten(),), dw.flatten().to(torch.float64), accumulate=True)
            dcodebook = sums.view(codebook.shape).to(codebook.dtype)
        if wanted[2]:
            dbias = dy.sum(dim=0)
    return dx, dcodebook, dbias


# cpu: forward only ------------------------------------------------------------------------------------------


def _forward_cpu(call: Call) -> torch.Tensor:
    y = _forward_like(call)
    x, codes = _rows.whole_rows(call.x), _rows.whole_rows(call.codes)
    codebook, bias = _rows.parameter(call.codebook), _rows.parameter(call.bias)
    backends.cpu().codebook_linear(
        *_rows.matrix_arguments(x, backends.CPU_DTYPE),
        *(codes.data_ptr(), codes.stride(0), call.bits, codebook.data_ptr(), codebook.shape[-1]),
        *(call.group_size or max(codes.shape[0], 1), _rows.address(bias)),
        *(x.shape[0], codes.shape[0], x.shape[1], y.data_ptr(), torch.get_num_threads()),
    )
    return y


_FORWARD = {"torch": _forward_torch, "cpu": _forward_cpu}
_BACKWARD = {"torch": _backward_torch}
