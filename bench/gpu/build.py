"""Build the native modules in place, by the checkout's own setup.py, and meanwhile compile all Triton kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import torch

from bench.gpu import precompile
from bench.gpu.records import Records, Where
from bench.harness.command import ROOT


def build(where: Where, records: Records) -> None:
    """With CUDA if there is an nvcc, for this GPU's architecture alone (without a GPU for Hopper's)."""
    home = os.environ.get("CUDA_HOME", "")
    nvcc = (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")
    variables = {"DISTILBERT_FAST_CUDA": "1" if nvcc else "0"}
    if not nvcc:
        records.add("failure", what="build of _cuda", reason="there is no nvcc on PATH and none in CUDA_HOME")
    elif "DISTILBERT_FAST_CUDA_ARCHS" not in os.environ:
        variables["DISTILBERT_FAST_CUDA_ARCHS"] = _arch() if where.gpu else "90a"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    building = subprocess.Popen(command, cwd=ROOT, env=os.environ | variables)
    if where.gpu:
        precompile.compile_all(records)
    if status := building.wait():
        raise SystemExit(f"setup.py ended with status {status}")
    from distilbert_fast import _build_info as info

    records.note(f"_cpu by {info.compiler}; _cuda {'built' if info.cuda_built else 'not built'}: {info.cuda_reason}")


def _arch() -> str:
    """This GPU's architecture as setup.py names it: Hopper with the instructions that are its alone."""
    major, minor = torch.cuda.get_device_capability()
    return {"90": "90a"}.get(f"{major}{minor}", f"{major}{minor}")
