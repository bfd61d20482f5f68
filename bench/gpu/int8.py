"""int8_linear of DistilBERT-base's layers on 65,536 tokens; FFN in with GELU and codes for FFN out in one epilogue."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

import distilbert_fast
from bench.gpu.measure import Case, Work, compiled, run
from bench.gpu.records import Records, Where

DTYPE = torch.bfloat16
LAYERS = {  # C, F, and whether GELU and codes for the next layer belong to it
    "QKV": (768, 2304, False),
    "out": (768, 768, False),
    "FFN in, GELU, requantize": (768, 3072, True),
    "FFN out": (3072, 768, False),
}


def int8_linear(where: Where, records: Records) -> None:
    for rows in where.size((65_536, 128), (32,)):
        for name, (c, f, requantize) in LAYERS.items():
            if not where.gpu:
                c, f = c // 24, f // 24
            _layer(where, records, rows, name, c, f, requantize, compiles=rows > 128 and name.startswith("FFN"))


def _layer(where: Where, records: Records, n: int, name: str, c: int, f: int, requantize: bool, compiles: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(n, c, dtype=DTYPE, device=where.device)
    linear = torch.nn.Linear(c, f, dtype=DTYPE, device=where.device).requires_grad_(False)
    x_q, x_scale = distilbert_fast.quantize(x)
    w_q, w_scale = distilbert_fast.quantize(linear.weight)
    bias = linear.bias
    largest = F.gelu(F.linear(x[:4096], linear.weight, bias)).abs().max().float()
    out_scale = largest / 127 if requantize else None

    def ours():
        activation = "gelu" if requantize else None
        return distilbert_fast.int8_linear(
            x_q, x_scale, w_q, w_scale, bias, activation, out_scale=out_scale, out_dtype=DTYPE
        )

    def epilogue(acc):
        y = acc.float() * x_scale[:, None] * w_scale + bias
        if not requantize:
            return y.to(DTYPE)
        return (F.gelu(y) / out_scale).round().clamp(-127, 127).to(torch.int8)

    def separate():
        return epilogue(torch._int_mm(x_q, w_q.t()))

    def torchao():
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        module = copy.deepcopy(linear)
        module = torch.nn.Sequential(module, torch.nn.GELU()) if requantize else torch.nn.Sequential(module)
        quantize_(module, Int8DynamicActivationInt8WeightConfig())
        return inference(torch.compile(module, dynamic=False))

    def bf16():
        y = F.linear(x, linear.weight, bias)
        return F.gelu(y) if requantize else y

    def inference(module):
        @torch.no_grad()
        def call():
            return module(x)

        return call

    def values(y):
        return y.float() * out_scale if y.dtype == torch.int8 else y

    moved = x_q.nbytes + w_q.nbytes + n * f * (1 if requantize else 2)
    work = Work(2 * n * c * f, "int8", moved)
    case = Case("int8_linear", f"{name}, {n} x {c} to {f}", work, "_int_mm, eager", 0.05, read=values)
    case.ours(where, (DTYPE, DTYPE), lambda: ours)
    case.calls["_int_mm, eager"] = separate
    case.rival(where, "bf16, cuBLAS", lambda: bf16, gpu=False)
    with compiled() as compile:
        if compiles or not where.gpu:  # the two largest layers: compiling all would take minutes
            case.rival(where, "_int_mm, torch.compile", lambda: compile(separate), compiled=True)
            case.rival(where, "torchao, x quantized too", torchao, "torchao", compiled=True)
            case.rival(where, "bf16, torch.compile", lambda: compile(bf16), compiled=True)
        run(case, where, records)
