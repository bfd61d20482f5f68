"""The ops that work row by row, 65,536 tokens of 768: all of them are bound by memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import distilbert_fast
from bench.gpu.measure import Call, Case, Work, compiled, run
from bench.gpu.records import Records, Where
from bench.harness.contest import forgetting
from distilbert_fast.ops.quantize import quantize_reference

DTYPE = torch.bfloat16


def rows(where: Where, records: Records) -> None:
    n, c = where.size((65_536, 768), (6, 20))
    torch.manual_seed(0)
    x, residual = (torch.randn(n, c, dtype=DTYPE, device=where.device) for _ in range(2))
    weight, bias = (torch.randn(c, device=where.device, dtype=DTYPE) for _ in range(2))
    matrix = x.nbytes
    shape = f"{n} x {c}, bf16"

    def compete(op: str, name: str, moved: float, ours: Call, eager: Call, tolerance: float = 0.02) -> None:
        case = Case(op, f"{name}, {shape}", Work(moved_bytes=moved), "torch", tolerance)
        case.ours(where, (DTYPE,), lambda: torch.no_grad()(ours))
        case.calls["torch"] = torch.no_grad()(eager)
        with compiled() as compile:
            case.rival(where, "torch.compile", lambda: torch.no_grad()(compile(eager)), compiled=True)
            run(case, where, records)

    compete(
        "quantize",
        "one scale a row",
        1.5 * matrix,
        lambda: distilbert_fast.quantize(x),
        lambda: quantize_reference(x.float()),
    )
    compete(
        "layer_norm",
        "with a residual",
        3 * matrix,
        lambda: distilbert_fast.layer_norm(x, weight, bias, residual),
        lambda: F.layer_norm(x + residual, (c,), weight, bias, 1e-12),
    )

    def normalized_codes():
        y = F.layer_norm((x + residual).float(), (c,), weight.float(), bias.float(), 1e-12)
        return y.to(DTYPE), *quantize_reference(y)

    compete(
        "layer_norm",
        "with a residual, and quantize",
        3.5 * matrix,
        lambda: distilbert_fast.layer_norm_quantize(x, weight, bias, residual),
        normalized_codes,
    )
    _embedding(where, compete, n, c, weight, bias)
    _with_gradients(where, records, x, residual, weight, bias)


def _embedding(where: Where, compete, n: int, c: int, weight: torch.Tensor, bias: torch.Tensor) -> None:
    v, length = where.size((30_522, 128), (50, 6))
    ids = torch.randint(0, v, (n,), device=where.device)
    places = torch.arange(n, device=where.device) % length
    word, position = (torch.randn(k, c, dtype=DTYPE, device=where.device) for k in (v, 512))
    compete(
        "embedding",
        f"V={v}",
        2 * n * c * 2,
        lambda: distilbert_fast.embedding(ids, places, word, position, weight, bias),
        lambda: F.layer_norm(word[ids] + position[places], (c,), weight, bias, 1e-12),
    )


def _with_gradients(where: Where, records: Records, x, residual, weight, bias) -> None:
    """Forward and backward of what training uses."""
    student, teacher = x.detach().requires_grad_(), residual
    w, b = (p.detach().requires_grad_() for p in (weight, bias))
    upstream = torch.randn_like(x)

    forget = forgetting(student, w, b)

    def loss(function):
        def call():
            value = function(student, teacher)
            value.backward()
            return value, student.grad

        return call

    def norm(function):
        def call():
            y = function()
            y.backward(upstream)
            return y, student.grad, w.grad, b.grad

        return call

    def by_torch(s, t):
        return 1 - F.cosine_similarity(s.float(), t.float(), dim=1).mean()

    def eager_norm():
        return F.layer_norm(student + teacher, w.shape, w, b, 1e-12)

    shape = f"forward and backward, {x.shape[0]} x {x.shape[1]}, bf16"
    for op, way, ours, eager, moved in (
        ("cosine_loss", loss, distilbert_fast.cosine_loss, by_torch, 5 * x.nbytes),
        ("layer_norm", norm, lambda: distilbert_fast.layer_norm(student, w, b, teacher), eager_norm, 7 * x.nbytes),
    ):
        case = Case(op, shape, Work(moved_bytes=moved), "torch", 0.02, forget)
        case.ours(where, (DTYPE,), lambda way=way, ours=ours: way(ours))
        case.calls["torch"] = way(eager)
        with compiled() as compile:
            case.rival(where, "torch.compile", lambda way=way, eager=eager: way(compile(eager)), compiled=True)
            run(case, where, records)
