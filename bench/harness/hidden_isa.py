"""Run a process as on a processor with fewer instructions, whatever it asks, by ``hide_cpuid.c``."""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from pathlib import Path

# Where CPUID says what a processor has: leaf.subleaf.register.bit (Intel SDM, volume 2A, CPUID).
_AMX_AND_FP16 = (
    "7.0.d.22",
    "7.0.d.23",
    "7.0.d.24",
    "7.0.d.25",
    "7.1.a.21",
)  # AMX-BF16, AVX512-FP16, AMX-TILE, -INT8, -FP16
_BF16 = ("7.1.a.5",)
_AVX_VNNI = (
    "7.1.a.4",
    "7.1.a.23",
    "7.1.d.4",
    "7.1.d.5",
    "7.1.d.10",
)  # AVX-VNNI, -IFMA, -VNNI-INT8, -NE-CONVERT, -INT16
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


def variables(tier: str) -> dict[str, str]:
    """For the environment of a process that shall see no more than ``tier``; none where that cannot be."""
    return {"LD_PRELOAD": str(library()), "HIDE_CPUID": ",".join(HIDDEN[tier])} if library() else {}
