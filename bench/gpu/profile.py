"""Nsight Compute's basic set of three kernels: what they wait for, as far as a profiler says."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from bench.gpu.records import Records, Where
from bench.gpu.tests import MARGIN, run

KERNELS = {  # a kernel's name, and the call of bench.gpu.one that launches it
    "_int8_linear_kernel": "int8_linear, 8192 tokens",
    "_attention_fwd_kernel": "attention, 64 x 512",
    "_kl_div_fwd_kernel": "kl_div",
}


def profile(where: Where, records: Records) -> None:
    """One launch of each; the profiler's page goes to the log, and as notes its lines of throughput and of limits."""
    program = shutil.which("ncu") or next(map(str, sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"))), None)
    if program is None or not where.gpu:
        records.note(
            "Nsight Compute (ncu) is not installed" if program is None else "there is no CUDA device to run on"
        )
        return
    for kernel, call in KERNELS.items():
        with records.attempt(f"ncu of {kernel}"):
            command = [program, "--set", "basic", "--kernel-name", kernel, "--launch-skip", "1", "--launch-count", "1"]
            said, code = run([*command, sys.executable, "-m", "bench.gpu.one", call], {}, where.seconds / 3 - MARGIN)
            print(said)
            if code != 0:
                raise RuntimeError("it did not finish in time" if code is None else f"it ended with status {code}")
            for line in said.splitlines():
                if any(word in line for word in ("Throughput", "Registers Per", "Occupancy", "Duration")):
                    records.note(f"{kernel}: {' '.join(line.split())}")
