"""What the suite does, in order, and the seconds that each part may take."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

BUDGET = 540  # seconds in all


class Part(NamedTuple):
    name: str
    seconds: int  # its share of the budget; what it does not need goes to the parts behind it
    work: str  # module and function of bench.gpu, called with (Where, Records)
    about: str

    def function(self) -> Callable[..., None]:
        module, name = self.work.split(":")
        return getattr(importlib.import_module(f"bench.gpu.{module}"), name)


_PARTS = (
    Part("build", 80, "build:build", "the native modules, for this GPU alone"),
    Part("peaks", 12, "peaks:measure", "what the GPU reaches: copying, bf16 and int8 products"),
    Part("tune", 60, "tune:tune", "each Triton kernel's configurations, into kernels/tuned"),
    Part("kl_div", 30, "losses:kl_div", "beside eager, torch.compile, Liger"),
    Part("linear_kl_div", 40, "losses:linear_kl_div", "beside the same; all rows, and the 15% that are masked"),
    Part("attention", 50, "attention:attention", "beside SDPA by flash, cuDNN and efficient, FlexAttention"),
    Part("int8_linear", 45, "int8:int8_linear", "beside torch._int_mm, torchao, bf16 cuBLAS"),
    Part("rows", 30, "rows:rows", "layer_norm, embedding, quantize, cosine_loss beside eager and torch.compile"),
    Part("models", 40, "models:models", "DistilBERT-base beside transformers with sdpa and flash-attention"),
    Part("compiled", 50, "models:compiled", "the same beside torch.compile with max-autotune and CUDA graphs"),
    Part("step", 40, "step:step", "a distillation step of 16,384 tokens beside the original distiller's form"),
    Part("tests", 45, "tests:gpu_tests", "every op and backend against float64, streams, graphs, a second GPU"),
    Part("sanitizer", 18, "tests:sanitizer", "compute-sanitizer: memcheck and racecheck on small shapes"),
)
PARTS = {part.name: part for part in _PARTS}
