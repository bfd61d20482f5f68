"""The machine code of kernels/linear_kl_div.py, compiled for three generations of GPU on a machine that has none.

It is what the kernel was designed to become: loads and stores of 16 bytes, the next tiles copied into shared memory
while one is computed (whole before any thread goes on, so a gradient may overwrite the logits it is made of), nothing
spilled, no atomic sums.
"""

from __future__ import annotations

import re

import pytest

from distilbert_fast import backends

triton = pytest.importorskip("triton")
if backends.interpreted():
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

import cubin  # noqa: E402

from distilbert_fast.kernels import linear_kl_div as kernels  # noqa: E402
from distilbert_fast.kernels.common import logits_configuration  # noqa: E402

NO_TEACHER = dict.fromkeys(("teacher", "teacher_bias", "kl", "kl_gradient"))
NO_LABELS = dict.fromkeys(("labels", "ce", "ce_gradient"))
CASES = {
    "both": ("bf16", "bf16", {}),
    "both at tau 3": ("bf16", "bf16", {"POWER": 0}),
    "kl": ("bf16", "bf16", NO_LABELS),
    "ce": ("bf16", "bf16", {**NO_TEACHER, "POWER": 1}),
    "both fp32": ("fp32", "fp32", {}),
    "mixed": ("fp32", "bf16", {}),
    "losses alone": ("bf16", "bf16", {"kl_gradient": None, "ce_gradient": None}),
}


@pytest.fixture(autouse=True)
def nothing_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(arch, student, teacher, changed):
    types = {
        **dict.fromkeys(["student", "student_bias", "kl_gradient", "ce_gradient"], f"*{student}"),
        **dict.fromkeys(["teacher", "teacher_bias"], f"*{teacher}"),
        **dict.fromkeys(["kl", "ce"], "*fp32"),
        **dict.fromkeys(["student_stride", "teacher_stride", "kl_gradient_stride", "ce_gradient_stride"], "i32:16"),
        **dict.fromkeys(["temperature", "c"], "fp32"),
        "labels": "*i64",
        "V": "i32",
        "width": "i32:16",
    }
    constants = {"POWER": 2, **logits_configuration(kernels.width(30522), 2 if student == teacher == "bf16" else 4)}
    warps = constants.pop("num_warps")
    kernel, rows = kernels._linear_kl_div_fwd_kernel, ("labels", "kl", "ce")
    return cubin.compiled(kernel, arch, types, {**constants, **changed}, misaligned=rows, num_warps=warps)


@pytest.mark.parametrize("arch", cubin.ARCHS)
@pytest.mark.parametrize("case", CASES)
def test_machine_code(case, arch, tmp_path):
    student, teacher, changed = CASES[case]
    program = compiled(arch, student, teacher, changed)
    ptx = program.asm["ptx"]
    need = cubin.resources(program, tmp_path)
    assert need["LOCAL"] == 0 and need["STACK"] <= (16 if "3" in case else 8) and ".local" not in ptx, need
    assert not re.search(r"\b(atom|red)\.global", ptx)
    least = {"mixed": 1, "both fp32": 2, "both at tau 3": 2}.get(case, 3)
    assert arch != 90 or cubin.residents(program, tmp_path) >= least
    loops = [loop for loop in cubin.loops(ptx) if "cp.async" in loop]
    assert len(loops) == (1 if "alone" in case else 2)
    for loop in loops:
        assert loop.count("bar.sync") <= 2, "threads wait for each other, and not for copies alone"
        accesses = re.findall(r"(?:ld|st)\.global\S*", loop)
        narrow = "v2.b32" if student != teacher else "v4.b32"  # of two widths the narrower moves 8 bytes
        assert all(access.endswith(("v4.b32", narrow)) for access in accesses), accesses


def test_at_temperature_2_the_cross_entropy_costs_no_exponential():
    """Its exponentials are the squares of the KL's; at any other a thread has 16 more in its tile, in either pass."""
    exponentials = {power: compiled(90, "bf16", "bf16", {"POWER": power}).asm["ptx"].count("ex2") for power in (2, 0)}
    assert exponentials[0] >= exponentials[2] + 2 * 16
