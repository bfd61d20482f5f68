"""Fill kernels/tuned: every Triton kernel's configurations, timed at the shapes that matter.

The launchers themselves search (kernels/tuning.py, DISTILBERT_FAST_AUTOTUNE=all) while the ops are called here. The
table is written after each op, so that a part that is ended leaves what it found.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch

import distilbert_fast
from bench.gpu.records import Records, Where
from distilbert_fast import backends

BATCHES = ((64, 128), (64, 512), (1, 128))  # sequences of tokens


def tune(where: Where, records: Records) -> None:
    from distilbert_fast.kernels import tuning

    if not where.gpu:  # the calls alone, by whatever serves here
        for op, name, call in calls(where):
            with records.attempt(f"{op}, {name}"):
                call()
        return
    os.environ["DISTILBERT_FAST_AUTOTUNE"] = "all"
    arch = tuning.architecture(torch.cuda.current_device())
    for op, name, call in calls(where):
        if "triton" in backends.KERNELS[op]:
            with records.attempt(f"{op}, {name}"), distilbert_fast.backend("triton"):
                call()
                torch.cuda.synchronize()
            tuning.write_table(arch, tuning.searched(arch))
    records.add("tuned", arch=arch, table=tuning.searched(arch))


def calls(where: Where) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """(op, what, call) by weight: what most of the time is spent in comes first."""
    batches = where.size(BATCHES, ((2, 5),))
    for batch, length in batches:
        yield "attention", f"{batch} x {length}", _attention(where, batch, length)
    for batch, length in batches:
        yield "int8_linear", f"{batch * length} tokens", _int8_linear(where, batch * length)
    for batch, length in batches[:1]:
        yield "linear_kl_div", "", _linear_kl_div(where, batch * length)
        yield "kl_div", "", _kl_div(where, batch * length)
        yield "layer_norm", "", _layer_norm(where, batch * length)


def _attention(where: Where, batch: int, length: int) -> Callable[[], object]:
    heads, size = where.size((12, 64), (3, 8))

    def call():
        qkv = torch.randn(batch * length, 3, heads, size, dtype=torch.bfloat16, device=where.device, requires_grad=True)
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=where.device) * length
        distilbert_fast.attention(*qkv.unbind(1), cu_seqlens, max_length=length).sum().backward()

    return call


def _int8_linear(where: Where, tokens: int) -> Callable[[], object]:
    c, f = where.size((768, 3072), (24, 40))

    def call():
        for columns, rows, gelu in ((c, 3 * c, False), (c, c, False), (c, f, True), (f, c, False)):
            x = torch.randn(tokens, columns, device=where.device)
            weight = torch.randn(rows, columns, device=where.device)
            codes = (*distilbert_fast.quantize(x), *distilbert_fast.quantize(weight))
            activation = "gelu" if gelu else None
            distilbert_fast.int8_linear(*codes, None, activation, out_dtype=torch.bfloat16)
            if gelu:
                distilbert_fast.int8_linear(*codes, None, activation, out_scale=0.1)

    return call


def _linear_kl_div(where: Where, tokens: int) -> Callable[[], object]:
    v, c = where.size((30_522, 768), (67, 12))

    def call():
        def make(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, dtype=torch.bfloat16, device=where.device, requires_grad=True)

        labels = torch.randint(0, v, (tokens,), device=where.device)
        kl, ce = distilbert_fast.linear_kl_div(
            make(tokens, c), make(v, c), make(v), make(tokens, c), make(v, c), make(v), 2.0, None, labels
        )
        (kl + ce).backward()

    return call


def _kl_div(where: Where, tokens: int) -> Callable[[], object]:
    v = where.size(30_522, 67)

    def call():
        student = torch.randn(tokens, v, dtype=torch.bfloat16, device=where.device, requires_grad=True)
        distilbert_fast.kl_div(student, torch.randn_like(student), 2.0).backward()

    return call


def _layer_norm(where: Where, tokens: int) -> Callable[[], object]:
    c = where.size(768, 20)

    def call():
        x, weight, bias = (
            torch.randn(*shape, dtype=torch.bfloat16, device=where.device, requires_grad=True)
            for shape in ((tokens, c), (c,), (c,))
        )
        distilbert_fast.layer_norm(x, weight, bias, x.detach()).sum().backward()
        distilbert_fast.layer_norm_quantize(x, weight, bias, x.detach())

    return call
