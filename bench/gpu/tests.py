"""The tests that need a GPU, and compute-sanitizer over every op; without a GPU, the tests of compiled machine code."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence

from bench.gpu.records import Records, Where
from bench.harness.command import ROOT
from bench.harness.processes import wait

GPU_TESTS = ("tests/gpu", "tests/kernels")
CUBIN_TESTS = ("tests/kernels",)
INTERPRETER = "tests/kernels/test_interpreter.py"
MARGIN = 3.0  # seconds before this part's own end in which what was found is written down
TOOLS = ("memcheck", "racecheck")


def small(where: Where, records: Records) -> None:
    """The quickest sign that kernels are right: every op by every backend on small shapes, in bfloat16."""
    if where.gpu:
        _pytest(where, records, ["tests/gpu/test_ops_gpu.py", "-k", "small and bfloat16"])
    else:
        records.note("there is no CUDA device to run on")


def gpu_tests(where: Where, records: Records) -> None:
    """All of them; without a GPU those of machine code."""
    chosen = [*GPU_TESTS, "-k", "gpu or triton", f"--ignore={INTERPRETER}"]
    _pytest(where, records, chosen if where.gpu else [*CUBIN_TESTS, "-k", "cubin"])


def _pytest(where: Where, records: Records, chosen: Sequence[str]) -> None:
    """Several at once where pytest-xdist is there; what has passed counts even if time runs out."""
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *chosen]
    if where.gpu and importlib.util.find_spec("xdist") is not None:
        command += ["-n", "8"]
    said, code = run(command, {}, where.seconds - MARGIN)
    print(said)
    verdicts = {
        name: len(re.findall(rf"(?:^\S+::.* {name}\b|^\[gw\d+\].* {name} tests)", said, re.MULTILINE))
        for name in ("PASSED", "FAILED", "ERROR", "SKIPPED")
    }
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
    records.add("tests", verdicts=verdicts, failed=failed[:50], complete=code is not None)
    if code not in (0, 5) or verdicts["FAILED"] or verdicts["ERROR"]:
        how = "did not finish in time" if code is None else f"ended with status {code}"
        found = f"{verdicts['FAILED']} failed, {verdicts['ERROR']} errors, {verdicts['PASSED']} passed"
        records.add("failure", what="pytest", reason=f"{how}: {found}")


def sanitizer(where: Where, records: Records) -> None:
    """Every op by every backend on small shapes (tests/gpu/small.py), each tool in a process beside the others."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None:
        records.note("compute-sanitizer is not installed")
        return
    if not where.gpu:
        records.note(f"{program} is there, and no CUDA device to run on")
        return

    def check(tool: str) -> None:
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "gpu.small"]
        variables = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        said, code = run(command, variables, where.seconds - MARGIN)
        print(said)
        summary = re.findall(r"=+ (?:ERROR|RACECHECK) SUMMARY: .*", said)
        ran = len(re.findall(r"^(?:cuda|triton) \w+", said, re.MULTILINE))
        if code == 0:
            records.note(f"{tool}: {ran} calls, {summary[-1].strip('= ') if summary else 'no error'}")
        else:
            how = "did not finish in time" if code is None else f"ended with status {code}"
            reason = f"{how} after {ran} calls{': ' + summary[-1].strip('= ') if summary else ''}"
            records.add("failure", what=f"compute-sanitizer {tool}", reason=reason)

    threads = [threading.Thread(target=check, args=(tool,)) for tool in TOOLS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def run(command: Sequence[str], variables: Mapping[str, str], limit: float) -> tuple[str, int | None]:
    """What a command said, and its status; None if it had to be ended."""
    with tempfile.TemporaryFile("w+", errors="replace") as out:  # a pipe would wait for what the command started
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **variables}, stdout=out, stderr=subprocess.STDOUT
        )
        code = wait(process, limit)
        out.seek(0)
        return out.read(), code
