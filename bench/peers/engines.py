"""Every engine configuration that takes part: its name, its class of precision, and what builds it.

An engine is a class with

    __init__(model: Path, cache: Path, threads: int, **options)     loads the model; what it makes of it goes to cache
    prepare(batches: list[Batch]) -> Job                            shapes are fixed here; not timed

and is imported only in the worker process that runs it.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness.errors import NotAvailableError
from bench.harness.isa import smaller_processor
from bench.harness.machine import cpu_flags

PRECISIONS = ("int8", "bf16", "fp32")
TCMALLOC = (
    "/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4",
    "/usr/lib/aarch64-linux-gnu/libtcmalloc_minimal.so.4",
    "/usr/lib64/libtcmalloc_minimal.so.4",
    "/usr/lib/libtcmalloc_minimal.so.4",
)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), in a process of its own: what a conversion imports and starts stays out of the engine's."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


class Job:
    """An engine with its inputs at hand. ``call`` computes all of them once: last hidden states, one a batch."""

    def __init__(self, call: Callable[[], Sequence[Any]]) -> None:
        self.call = call

    def outputs(self) -> list[np.ndarray]:
        """fp32 [B, T, C] of each batch."""
        return [np.array(output, np.float32) for output in self.call()]

    def seconds(self, calls: int) -> float:
        """The median over calls."""
        timed = []
        for _ in range(calls):
            start = time.perf_counter()
            self.call()
            timed.append(time.perf_counter() - start)
        return statistics.median(timed)


@dataclass(frozen=True)
class Spec:
    name: str
    precision: str  # of PRECISIONS: whom it is compared with
    build: str  # "module:Class" in this package
    options: Mapping[str, Any] = field(default_factory=dict)
    packages: tuple[str, ...] = ()  # distributions, import names where they differ aside: what it needs installed
    ours: bool = False
    tcmalloc: bool = False  # faster with it
    pads: bool = True  # computes padding: it gets ragged batches in length buckets too

    def missing(self) -> str | None:
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"not installed: pip install {' '.join(absent)}" if absent else None

    def engine(self, model: Path, cache: Path, threads: int) -> Any:
        module, _, name = self.build.partition(":")
        try:
            kind = getattr(importlib.import_module(f"bench.peers.{module}"), name)
        except ImportError as error:
            raise NotAvailableError(f"cannot be imported: {error}") from error
        return kind(model, cache, threads, **self.options)


def _ours() -> list[Spec]:
    kinds = {"int8": {}, "int8-static": {"static": True}, "bf16": {}, "fp32": {}}
    return [
        Spec(
            f"distilbert_fast-{name}",
            name.partition("-")[0],
            "ours:Optimized",
            {"precision": name.partition("-")[0], **options},
            ours=True,
            pads=False,
        )
        for name, options in kinds.items()
    ]


def _torch() -> list[Spec]:
    specs = []
    for precision in ("bf16", "fp32"):
        specs += [
            Spec(
                f"transformers-{attention}-{precision}",
                precision,
                "with_torch:Transformers",
                {"precision": precision, "attention": attention},
                tcmalloc=True,
            )
            for attention in ("eager", "sdpa")
        ]
    kinds = {"int8-pt2e": "Pt2e", "int8-torchao": "TorchAo", "bf16": "Inductor", "fp32": "Inductor"}
    for suffix, cpp_wrapper in (("", False), ("-cpp", True)):
        for name, kind in kinds.items():
            if kind == "TorchAo" and cpp_wrapper:
                continue  # far behind PT2E: not worth its compilation
            options: dict[str, Any] = {"cpp_wrapper": cpp_wrapper}
            if kind == "Inductor":
                options["precision"] = name
            packages = ("torchao",) if name.startswith("int8") else ()
            specs.append(
                Spec(
                    f"inductor-{name}{suffix}",
                    name.partition("-")[0],
                    f"with_torch:{kind}",
                    options,
                    packages,
                    tcmalloc=True,
                )
            )
    return specs


def _openvino() -> list[Spec]:
    kinds = {  # name: class of precision, hint for what is not int8
        "int8": ("int8", "bf16"),
        "int8-fp32": ("int8", "f32"),
        "bf16": ("bf16", "bf16"),
        "f16": ("bf16", "f16"),
        "fp32": ("fp32", "f32"),
    }
    return [
        Spec(
            f"openvino-{name}{suffix}",
            precision,
            "with_openvino:OpenVino",
            {"int8": precision == "int8", "hint": hint, "in_flight": in_flight},
            ("openvino", "nncf") if precision == "int8" else ("openvino",),
        )
        for name, (precision, hint) in kinds.items()
        for suffix, in_flight in (("", 1), ("-pair", 2))
    ]


def _onnxruntime() -> list[Spec]:
    return [
        Spec(
            f"onnxruntime-{precision}",
            precision,
            "with_onnxruntime:OnnxRuntime",
            {"int8": precision == "int8"},
            ("onnxruntime", "onnx"),
        )
        for precision in ("int8", "fp32")
    ]


def _ctranslate2() -> list[Spec]:
    kinds = {"int8": "int8", "bf16": "bfloat16", "fp32": "float32"}
    return [
        Spec(
            f"ctranslate2-{precision}",
            precision,
            "with_ctranslate2:CTranslate2",
            {"compute_type": compute_type},
            ("ctranslate2",),
            tcmalloc=True,
        )
        for precision, compute_type in kinds.items()
    ]


ENGINES: Mapping[str, Spec] = {
    spec.name: spec for make in (_ours, _torch, _openvino, _onnxruntime, _ctranslate2) for spec in make()
}
REFERENCE = "transformers-eager-fp32"  # its output is what errors are measured against


def environment(spec: Spec, threads: int, cache: Path, isa: str | None) -> dict[str, str]:
    """The variables of an engine's process."""
    variables = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    variables |= {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(cache / f"inductor-{isa or 'all'}"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    ctranslate2 = ctranslate2_isa(isa)
    if ctranslate2:
        variables["CT2_FORCE_CPU_ISA"] = ctranslate2
    if isa:
        variables |= smaller_processor(isa)
    preload = [variables.get("LD_PRELOAD"), tcmalloc() if spec.tcmalloc else None]
    return variables | ({"LD_PRELOAD": ":".join(filter(None, preload))} if any(preload) else {})


def ctranslate2_isa(isa: str | None) -> str | None:
    """What CTranslate2 is told to use: it fails where the processor lacks that. None: what it takes by itself."""
    flags = cpu_flags()
    if isa not in ("avx2", "avx_vnni") and flags >= {f"avx512{part}" for part in ("f", "cd", "vl", "bw", "dq")}:
        return "AVX512"
    return "AVX2" if "avx2" in flags else None


def tcmalloc() -> str | None:
    return next((path for path in TCMALLOC if Path(path).exists()), None)
