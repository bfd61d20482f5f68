"""attention of DistilBERT-base, 64 sequences, 12 heads of 64: forward and backward, no head or half of them masked."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

import distilbert_fast
from bench.gpu.measure import Case, Work, run
from bench.gpu.records import Records, Where

DTYPE = torch.bfloat16
FLEX = "FlexAttention"


def attention(where: Where, records: Records) -> None:
    heads, size = where.size((12, 64), (3, 8))
    for batch, length in where.size(((64, 128), (64, 512)), ((2, 5),)):
        for masked in (False, True):
            _forward_and_backward(where, records, batch, length, heads, size, masked)


def _forward_and_backward(
    where: Where, records: Records, batch: int, length: int, heads: int, size: int, masked: bool
) -> None:
    torch.manual_seed(0)
    n = batch * length
    qkv = torch.randn(n, 3, heads, size, dtype=DTYPE, device=where.device)
    upstream = torch.randn(n, heads, size, dtype=DTYPE, device=where.device)
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=where.device) * length
    mask = (torch.arange(heads, device=where.device) % 2).float() if masked else None
    computed = int(mask.sum()) if masked else heads  # a head that is masked need not be
    factors = None if mask is None else mask.to(DTYPE)  # for those that multiply their output
    products = 2 * batch * computed * length**2 * size  # operations of one
    matrix = n * computed * size * qkv.element_size()  # bytes of q

    def ours(q, k, v):
        return distilbert_fast.attention(q, k, v, cu_seqlens, mask, max_length=length)

    def by_sequences(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """For those that take [B, H, T, D]; the views cost nothing."""

        def call(q, k, v):
            q, k, v = (x.unflatten(0, (batch, length)).transpose(1, 2) for x in (q, k, v))
            out = function(q, k, v)
            out = out if mask is None else out * factors[:, None, None]
            return out.transpose(1, 2).flatten(0, 1)

        return call

    def sdpa(backend: str) -> Callable[..., torch.Tensor]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        @by_sequences
        def call(q, k, v):
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return F.scaled_dot_product_attention(q, k, v)

        return call

    def flex() -> Callable[..., torch.Tensor]:
        function = compiled_flex_attention()
        return by_sequences(lambda q, k, v: function(q, k, v))

    def flash() -> Callable[..., torch.Tensor]:
        from flash_attn import flash_attn_varlen_func

        def call(q, k, v):
            out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, length, length)
            return out if mask is None else out * factors[:, None]

        return call

    rivals = {
        "SDPA cuDNN": ("", True, lambda: sdpa("CUDNN_ATTENTION")),
        "SDPA flash": ("", True, lambda: sdpa("FLASH_ATTENTION")),
        "SDPA efficient": ("", True, lambda: sdpa("EFFICIENT_ATTENTION")),
        "SDPA math": ("", False, lambda: sdpa("MATH")),
        "flash-attention": ("flash_attn", True, flash),
        FLEX: ("", True, flex),
    }

    def forward(function):
        q, k, v = qkv.unbind(1)

        @torch.no_grad()
        def call():
            return function(q, k, v)

        return call

    def backward(function):
        leaves = [x.detach().requires_grad_() for x in qkv.unbind(1)]
        out: list[torch.Tensor] = []

        def call():
            if not out:  # the first call, which is not timed, also makes what backward goes through
                out.append(function(*leaves))
            return torch.autograd.grad(out[0], leaves, upstream, retain_graph=True)

        return call

    shape = f"B={batch} S={length} H={heads} D={size}, bf16{', half of the heads masked' if masked else ''}"
    for name, way, work in (
        ("forward", forward, Work(2 * products, "bf16", 4 * matrix)),
        ("backward", backward, Work(5 * products, "bf16", 8 * matrix)),
    ):
        case = Case("attention", f"{name}, {shape}", work, "SDPA math", 0.05)
        case.ours(where, (DTYPE,), lambda way=way: way(ours))
        for rival, (package, gpu, make) in rivals.items():
            case.rival(where, rival, lambda make=make, way=way: way(make()), package, gpu, compiled=rival == FLEX)
        run(case, where, records)


@functools.cache
def compiled_flex_attention() -> Callable[..., torch.Tensor]:
    """Compiled once a shape, with and without gradients."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
