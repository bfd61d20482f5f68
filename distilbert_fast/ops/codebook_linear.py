"""codebook_linear: a linear layer whose weights share at most 256 values.

    W_fc = codebook[codes_fc]        y = x · Wᵀ + b

    dx = dy · W        dW = dyᵀ · x,   dcodebook_k = Σ_{fc: codes_fc = k} dW_fc        db = Σ_n dy_n

Han, Mao, Dally: Deep Compression, arXiv:1510.00149, section 3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from distilbert_fast import backends
from distilbert_fast.ops import _check, _rows
from distilbert_fast.ops._autocast import as_written, autocast
from distilbert_fast.ops._operator import function, operator

OP = "codebook_linear"


@function(casts=True)
def codebook_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x · codebook[codes]ᵀ + b.

    Args:
        x: [N, C], float32, bfloat16, float16 or float64. Differentiable, as are codebook and bias.
        codes: uint8 [F, C], same device: each weight's index into codebook.
        codebook: [K], K ≤ 256, same device and dtype as x.
        bias: [F], likewise; None adds nothing.

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
    _check.tensor(OP, "codes", codes, ("F", x.shape[1]), (torch.uint8,), x.device)
    _check.tensor(OP, "codebook", codebook, ("K",), (x.dtype,), x.device)
    if codebook.shape[0] > 256:
        _check.refuse(OP, "codebook", "of at most 256 values", list(codebook.shape))
    if bias is not None:
        _check.tensor(OP, "bias", bias, (codes.shape[0],), (x.dtype,), x.device)
    differentiable = (x, codebook) if bias is None else (x, codebook, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable):
        return _CodebookLinear.apply(x, codes, codebook, bias)
    return _forward(Call(x, codes, codebook, bias))


def codebook_linear_reference(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition of ``codebook_linear`` in differentiable torch, in the dtype of its arguments."""
    return torch.nn.functional.linear(x, codebook[codes.long()], bias)


class _CodebookLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        """Arguments: those of ``Call``."""
        ctx.save_for_backward(*arguments[:3])
        return _forward(Call(*arguments))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, _, codebook, bias = ctx.needs_input_grad
        dx, dcodebook, dbias = _backward(Gradient(*(dy, *ctx.saved_tensors, [x, codebook, bias])))
        return dx if x else None, None, dcodebook if codebook else None, dbias if bias else None


class Call(NamedTuple):
    """All arguments of forward."""

    x: torch.Tensor  # [N, C]
    codes: torch.Tensor  # uint8 [F, C]
    codebook: torch.Tensor  # [K]
    bias: torch.Tensor | None  # [F]


class Gradient(NamedTuple):
    """All arguments of backward."""

    dy: torch.Tensor  # [N, F]
    x: torch.Tensor  # [N, C]
    codes: torch.Tensor  # uint8 [F, C]
    codebook: torch.Tensor  # [K]
    wanted: list[bool]  # which of dx, dcodebook, dbias


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
    """dx [N, C], dcodebook [K] and dbias [F], each [0] if not wanted."""
    return _BACKWARD[backends.select_backward(OP, call.x.device, call.x.dtype)](call)


# torch ------------------------------------------------------------------------------------------------------


def _look_up(codes: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return codebook.index_select(0, codes.reshape(-1).int()).view(codes.shape)  # [F, C]


def _forward_torch(call: Call) -> torch.Tensor:
    if call.codebook.shape[0] < 256:
        _check.below(OP, "codes", call.codes, call.codebook.shape[0], "the values of codebook")
    with as_written(call.x.device):
        return torch.nn.functional.linear(call.x, _look_up(call.codes, call.codebook), call.bias)


def _backward_torch(call: Gradient) -> Gradients:
    dy, x, codes, codebook, wanted = call
    dx, dcodebook, dbias = (x.new_empty(0) for _ in wanted)
    with as_written(x.device):
        if wanted[0]:
            dx = dy @ _look_up(codes, codebook)
        if wanted[1]:
            dw = dy.t() @ x  # [F, C]
            sums = torch.zeros(codebook.shape, dtype=torch.float64, device=x.device)
            # In float64 index_put_ adds in a fixed order on the CPU too: the same bits every run.
            sums.index_put_((codes.reshape(-1).int(),), dw.reshape(-1).to(torch.float64), accumulate=True)
            dcodebook = sums.to(codebook.dtype)
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
        *(codes.data_ptr(), codes.stride(0), codebook.data_ptr(), codebook.shape[0], _rows.address(bias)),
        *(x.shape[0], *codes.shape, y.data_ptr(), torch.get_num_threads()),
    )
    return y


_FORWARD = {"torch": _forward_torch, "cpu": _forward_cpu}
_BACKWARD = {"torch": _backward_torch}
