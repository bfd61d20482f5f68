"""codebook_linear: a linear layer whose weights share at most 256 values.

    W_fc = codebook[codes_fc]        y = x · Wᵀ + b

    dx = dy · W        dW = dyᵀ · x,   dcodebook_k = Σ_{fc: codes_fc = k} dW_fc        db = Σ_n dy_n

Han, Mao, Dally: Deep Compression, arXiv:1510.00149, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from distilbert_fast import backends
from distilbert_fast.ops import _check
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

    W [F, C] is looked up for the product and dropped; backward looks it up again, and sums the gradient of
    codebook in float64.

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
    return _forward(x, codes, codebook, bias)


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
    def forward(
        ctx: Any, x: torch.Tensor, codes: torch.Tensor, codebook: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, codes, codebook)
        return _forward(x, codes, codebook, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, codes, codebook = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad)
        dx, dcodebook, dbias = _backward(dy, x, codes, codebook, [wanted[0], wanted[2], wanted[3]])
        return dx if wanted[0] else None, None, dcodebook if wanted[2] else None, dbias if wanted[3] else None


def _check_range(codes: torch.Tensor, codebook: torch.Tensor) -> None:
    """Refuse a code outside the codebook, where a look at the values is free: on the CPU."""
    k = codebook.shape[0]
    if codes.device.type == "cpu" and codes.numel() and k < 256:
        highest = int(codes.amax())
        if highest >= k:
            _check.refuse(OP, "codes", f"in [0, {k}), the values of codebook", highest)


def _forward_fake(
    x: torch.Tensor, codes: torch.Tensor, codebook: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]))


@operator("codebook_linear_forward", _forward_fake)
def _forward(x: torch.Tensor, codes: torch.Tensor, codebook: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """y [N, F]."""
    _check_range(codes, codebook)
    return _FORWARD[backends.select(OP, x.device, x.dtype)](x, codes, codebook, bias)


def _backward_fake(
    dy: torch.Tensor, x: torch.Tensor, codes: torch.Tensor, codebook: torch.Tensor, wanted: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        x.new_empty(x.shape if wanted[0] else (0,)),
        x.new_empty(codebook.shape[0] if wanted[1] else 0),
        x.new_empty(codes.shape[0] if wanted[2] else 0),
    )


@operator("codebook_linear_backward", _backward_fake)
def _backward(
    dy: torch.Tensor, x: torch.Tensor, codes: torch.Tensor, codebook: torch.Tensor, wanted: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx [N, C], dcodebook [K] and dbias [F], each [0] if not wanted."""
    return _BACKWARD[backends.select(OP, x.device, x.dtype)](dy, x, codes, codebook, wanted)


# torch ------------------------------------------------------------------------------------------------------


def _look_up(codes: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return codebook.index_select(0, codes.reshape(-1).int()).view(codes.shape)  # [F, C]


def _forward_torch(
    x: torch.Tensor, codes: torch.Tensor, codebook: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    with as_written(x.device):
        return torch.nn.functional.linear(x, _look_up(codes, codebook), bias)


def _backward_torch(
    dy: torch.Tensor, x: torch.Tensor, codes: torch.Tensor, codebook: torch.Tensor, wanted: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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


_FORWARD = {"torch": _forward_torch}
_BACKWARD = {"torch": _backward_torch}
