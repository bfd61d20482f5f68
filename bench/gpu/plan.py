"""What the suite does, in order, and the seconds that each part may take: everything, or one of two short runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

START = 10  # seconds until the first part begins, and after the last


class Part(NamedTuple):
    name: str
    seconds: int  # its share of the budget; what it does not need goes to the parts after it
    work: str  # module and function of bench.gpu, called with (Where, Records)
    about: str
    rivals: str = "all"  # which take part: Where.rivals

    def function(self) -> Callable[..., None]:
        module, name = self.work.split(":")
        return getattr(importlib.import_module(f"bench.gpu.{module}"), name)


_PARTS = (
    Part(
        "build", 60, "build:build", "the native modules for this GPU alone; meanwhile all Triton kernels, in parallel"
    ),
    Part("peaks", 12, "peaks:measure", "what the GPU reaches: copying, bf16 and int8 products"),
    Part("tune", 60, "tune:tune", "each Triton kernel's configurations, into kernels/tuned"),
    Part("kl_div", 30, "losses:kl_div", "beside eager, Liger, torch.compile"),
    Part("linear_kl_div", 40, "losses:linear_kl_div", "beside the same; all rows, and the 15% that are masked"),
    Part("attention", 45, "attention:attention", "beside SDPA by cuDNN, flash and efficient, FlexAttention"),
    Part("int8_linear", 45, "int8:int8_linear", "beside torch._int_mm, torchao, bf16 cuBLAS"),
    Part("rows", 30, "rows:rows", "layer_norm, embedding, quantize, cosine_loss beside eager and torch.compile"),
    Part("models", 40, "models:models", "DistilBERT-base beside transformers with sdpa and flash-attention"),
    Part("compiled", 50, "models:compiled", "the same beside torch.compile with max-autotune and CUDA graphs"),
    Part("step", 40, "step:step", "a distillation step of 16,384 tokens beside the original distiller's form"),
    Part("small", 15, "tests:small", "every op and backend in bfloat16 on small shapes against float64"),
    Part("tests", 45, "tests:gpu_tests", "every op and backend against float64, streams, graphs, a second GPU"),
    Part("sanitizer", 18, "tests:sanitizer", "compute-sanitizer: memcheck and racecheck on small shapes"),
    Part("profile", 30, "profile:profile", "Nsight Compute's basic set of three kernels"),
)
PARTS = {part.name: part for part in _PARTS}


class Plan(NamedTuple):
    seconds: int  # in all
    parts: tuple[Part, ...]
    about: str


def _of(*shares: tuple[str, int, str]) -> tuple[Part, ...]:
    return tuple(PARTS[name]._replace(seconds=seconds, rivals=rivals) for name, seconds, rivals in shares)


PLANS = {
    "all": Plan(sum(part.seconds for part in _PARTS) + START, _PARTS, "everything, beside everybody"),
    "first": Plan(
        270,
        _of(
            ("build", 45, "none"),
            ("small", 25, "none"),
            ("peaks", 12, "none"),
            ("attention", 30, "none"),
            ("int8_linear", 30, "none"),
            ("kl_div", 15, "none"),
            ("linear_kl_div", 23, "none"),
            ("rows", 30, "none"),
            ("profile", 50, "none"),
        ),
        "does it run, and what do our kernels take",
    ),
    "second": Plan(
        330,
        _of(
            ("build", 45, "none"),
            ("peaks", 10, "none"),
            ("tune", 55, "none"),
            ("models", 40, "ready"),
            ("step", 30, "ready"),
            ("attention", 30, "ready"),
            ("int8_linear", 25, "ready"),
            ("linear_kl_div", 20, "ready"),
            ("kl_div", 25, "all"),
            ("tests", 40, "none"),
        ),
        "tuned, whole models, beside the rivals that need no compiler",
    ),
}
BUDGET = PLANS["all"].seconds
