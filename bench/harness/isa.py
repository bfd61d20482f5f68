"""Run a process as on a processor with fewer instructions: libraries that take a word for it are told, and from all
CPUID hides the rest, by ``hide_cpuid.c``.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from distilbert_fast.backends import isa_report

_ONEDNN = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
FORCED_ISA: Mapping[str, Mapping[str, str]] = {
    "avx512_bf16": {
        "DISTILBERT_FAST_ISA": "avx512_bf16",
        **dict.fromkeys(_ONEDNN, "AVX512_CORE_BF16"),
        "MKL_ENABLE_INSTRUCTIONS": "AVX512_E2",
        "ATEN_CPU_CAPABILITY": "avx512",
    },
    "avx512_vnni": {
        "DISTILBERT_FAST_ISA": "avx512_vnni",
        **dict.fromkeys(_ONEDNN, "AVX512_CORE_VNNI"),
        "MKL_ENABLE_INSTRUCTIONS": "AVX512_E1",
        "ATEN_CPU_CAPABILITY": "avx512",
    },
    "avx_vnni": {
        "DISTILBERT_FAST_ISA": "avx_vnni",
        **dict.fromkeys(_ONEDNN, "AVX2_VNNI"),
        "MKL_ENABLE_INSTRUCTIONS": "AVX2_E1",
        "ATEN_CPU_CAPABILITY": "avx2",
    },
    "avx2": {
        "DISTILBERT_FAST_ISA": "avx2",
        **dict.fromkeys(_ONEDNN, "AVX2"),
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
    },
}

# Where CPUID says what a processor has: leaf.subleaf.register.bit (Intel SDM, volume 2A, CPUID).
_AMX_AND_FP16 = (*(f"7.0.d.{bit}" for bit in (22, 24, 25, 23)), "7.1.a.21")  # AMX BF16, TILE, INT8; FP16, AMX FP16
_BF16 = ("7.1.a.5",)
_AVX_VNNI = (*(f"7.1.a.{bit}" for bit in (4, 23)), *(f"7.1.d.{bit}" for bit in (4, 5, 10)))  # and its later kin
_AVX512 = (
    *(f"7.0.b.{bit}" for bit in (16, 17, 21, 28, 30, 31)),  # F, DQ, IFMA, CD, BW, VL
    *(f"7.0.c.{bit}" for bit in (1, 6, 11, 12, 14)),  # VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ
    *("7.0.d.8", "7.1.d.19"),  # VP2INTERSECT, AVX10
)
HIDDEN = {  # of a tier: what processors of that tier lack
    "avx512_bf16": _AMX_AND_FP16,
    "avx512_vnni": (*_AMX_AND_FP16, *_BF16),
    "avx_vnni": (*_AMX_AND_FP16, *_BF16, *_AVX512),
    "avx2": (*_AMX_AND_FP16, *_BF16, *_AVX512, *_AVX_VNNI),
}


@functools.cache
def library() -> Path | None:
    """The library to preload; None where it cannot be made or the processor does not let CPUID fault."""
    made = Path(tempfile.mkdtemp(prefix="hide-cpuid-")) / "hide_cpuid.so"
    compiler = ["cc", "-O2", "-shared", "-fPIC", "-o", str(made), str(Path(__file__).with_name("hide_cpuid.c"))]
    try:
        subprocess.run(compiler, check=True, capture_output=True)
        subprocess.run([sys.executable, "-c", ""], env={"LD_PRELOAD": str(made)}, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return made


def smaller_processor(tier: str) -> dict[str, str]:
    """For the environment of a process that shall see no more than ``tier``."""
    hidden = {"LD_PRELOAD": str(library()), "HIDE_CPUID": ",".join(HIDDEN[tier])} if library() else {}
    return {**FORCED_ISA[tier], **hidden}


def said(tier: str) -> str:
    """What a record says of it."""
    told = ", ".join(f"{name}={value}" for name, value in FORCED_ISA[tier].items())
    hidden = "CPUID hides the rest" if library() else "ONNX Runtime has no such switch and uses what is there"
    return f"ISA forced by {told}; {hidden}"


def checked_isa(tier: str | None) -> str | None:
    """``--isa`` as it was given; ValueError where it names no tier, or one that cannot run here."""
    if tier is not None and tier not in FORCED_ISA:
        raise ValueError(f"--isa: expected {' or '.join(FORCED_ISA)}, got {tier!r}")
    lacking = isa_report()["missing"].get(tier)
    if lacking:  # torch, for one, takes our word for it
        raise ValueError(f"--isa: {tier} cannot run here: {lacking}")
    return tier
