"""One call of every op, with gradients where it has them, by name: what the tests here and the sanitizer run.

A call is given a dtype and a device and returns its results. On a wider scale (``size``) shapes are real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

import distilbert_fast as df
from distilbert_fast.ops.attention import attention_reference
from distilbert_fast.ops.cosine_loss import cosine_loss_reference
from distilbert_fast.ops.embedding import embedding_reference
from distilbert_fast.ops.kl_div import kl_div_reference
from distilbert_fast.ops.layer_norm import layer_norm_reference
from distilbert_fast.ops.linear_kl_div import linear_kl_div_reference


class Sizes(NamedTuple):
    lengths: Sequence[int]
    heads: int
    head_size: int
    vocabulary: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def hidden(self) -> int:
        return self.heads * self.head_size


SMALL = Sizes((5, 0, 1, 17, 33), 3, 16, 131)
REAL = Sizes((128, 0, 1, 77, 512, 64, 300), 12, 64, 30_522)


class Op(NamedTuple):
    """Inputs (the first ``differentiable`` of them get gradients), our function and its definition."""

    name: str
    inputs: Callable[[Sizes], list[torch.Tensor]]  # float64 on the CPU
    ours: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    reference: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    differentiable: int


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _starts(size: Sizes, device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *size.lengths], device=device).cumsum(0).to(torch.int32)


def ops(size: Sizes) -> dict[str, Op]:
    n, c, v = size.tokens, size.hidden, size.vocabulary
    torch.manual_seed(0)
    ids, labels = torch.randint(0, v, (n,)), torch.randint(0, v, (n,)).masked_fill(torch.rand(n) > 0.3, -100)
    places, counted = torch.arange(n) % 50, torch.rand(n) < 0.7
    heads = lambda: _random(n, size.heads, size.head_size)  # noqa: E731
    on = lambda like, *tensors: [tensor.to(like.device) for tensor in tensors]  # noqa: E731

    def embedding(function):
        return lambda word, position, w, b: function(*on(word, ids, places), word, position, w, b)

    def linear_kl_div(function):
        return lambda h, w, b, *t: function(h, w, b, *t, 2.0, *on(h, counted, labels))

    return {
        op.name: op
        for op in (
            Op(
                "kl_div",
                lambda s: [4 * _random(min(n, 256), v), 4 * _random(min(n, 256), v)],
                lambda s, t: df.kl_div(s, t, 2.0, *on(s, counted[: s.shape[0]])),
                lambda s, t: kl_div_reference(s, t, 2.0, *on(s, counted[: s.shape[0]])),
                1,
            ),
            Op(
                "linear_kl_div",
                lambda s: [_random(n, c), _random(v, c) / c**0.5, _random(v)] * 2,
                linear_kl_div(df.linear_kl_div),
                linear_kl_div(linear_kl_div_reference),
                3,
            ),
            Op(
                "attention",
                lambda s: [heads(), heads(), heads(), torch.arange(size.heads).double() / 2],
                lambda q, k, v, m: df.attention(q, k, v, _starts(size, q.device), m),
                lambda q, k, v, m: attention_reference(q, k, v, _starts(size, q.device), m),
                4,
            ),
            Op(
                "layer_norm",
                lambda s: [_random(n, c), _random(c), _random(c), _random(n, c)],
                df.layer_norm,
                lambda x, w, b, r: layer_norm_reference(x, w, b, r, 1e-12),
                4,
            ),
            Op(
                "embedding",
                lambda s: [_random(v, c), _random(50, c), _random(c), _random(c)],
                embedding(df.embedding),
                embedding(embedding_reference),
                4,
            ),
            Op(
                "cosine_loss",
                lambda s: [_random(n, c), _random(n, c)],
                lambda s, t: df.cosine_loss(s, t, *on(s, counted)),
                lambda s, t: cosine_loss_reference(s, t, *on(s, counted)),
                1,
            ),
        )
    }


def results(op: Op, function: Callable[..., object], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs and, by upstream gradients that are the same each time, those of the inputs."""
    leaves = [x.detach().requires_grad_(i < op.differentiable) for i, x in enumerate(inputs)]
    out = function(*leaves)
    outputs = [out] if isinstance(out, torch.Tensor) else list(out)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, leaves[: op.differentiable], upstream)
    return [*(y.detach() for y in outputs), *gradients]


def quantized(size: Sizes, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Every op that makes or reads codes: no gradients there."""
    n, c = size.tokens, size.hidden
    torch.manual_seed(0)
    x, residual = (_random(n, c).to(device, dtype) for _ in range(2))
    weight, bias = (_random(c).to(device, dtype) for _ in range(2))
    w_q, w_scale = df.quantize(_random(2 * c, c).to(device, torch.float32))
    x_q, x_scale = df.quantize(x)
    y, y_q, y_scale = df.layer_norm_quantize(x, weight, bias, residual)
    ids, places = torch.arange(n, device=device) % 7, torch.arange(n, device=device) % 5
    e, e_q, e_scale = df.embedding_quantize(ids, places, x[:7], residual[:5], weight, bias)
    wide = df.int8_linear(x_q, x_scale, w_q, w_scale, None, "gelu", out_dtype=dtype)
    codes = df.int8_linear(x_q, x_scale, w_q, w_scale, None, "gelu", out_scale=0.1)
    return [x_q, x_scale, y, y_q, y_scale, e, e_q, e_scale, wide, codes]


def main() -> None:
    """Every op by every backend that serves it, on small shapes: for compute-sanitizer."""
    from distilbert_fast import backends

    device = torch.device("cuda")
    for name in ("cuda", "triton"):
        for op in ops(SMALL).values():
            for dtype in (torch.float32, torch.bfloat16):
                with df.backend(name):
                    try:
                        backends.select(op.name, device, dtype)
                    except df.BackendError:
                        continue
                    results(op, op.ours, [x.to(device, dtype) for x in op.inputs(SMALL)])
                    print(name, op.name, dtype)
    if "triton" in backends.KERNELS["int8_linear"]:
        quantized(SMALL, torch.bfloat16, device)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
