"""The machine code of kernels/kl_div.py, compiled for three generations of GPU on a machine that has none.

It is what the kernels were designed to become: loads and stores of 16 bytes, the next tiles copied into shared memory
while one is computed, loops in which threads wait for these copies alone, nothing spilled.
"""

from __future__ import annotations

import re

import pytest
import torch

from distilbert_fast import backends

triton = pytest.importorskip("triton")
if backends.interpreted():
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

import cubin  # noqa: E402

from distilbert_fast.kernels import kl_div as kernels  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def nothing_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(kernel, arch, student, teacher, aligned=True, absent=()):
    """Compile for logits of these dtypes, with the tile that the launcher takes for V = 30522."""
    types = {
        **dict.fromkeys(["student", "gradient", "dstudent"], f"*{student}"),
        "teacher": f"*{teacher}",
        "mask": "*i1",
        **dict.fromkeys(["scale", "rows", "stats", "drows"], "*fp32"),
        **dict.fromkeys(
            ["student_stride", "teacher_stride", "gradient_stride", "dstudent_stride", "mask_stride"], "i64"
        ),
        "V": "i32",
        **dict.fromkeys(["temperature", "c"], "fp32"),
    }
    logits = {name: torch.empty((1, 30522), dtype=dtype, device="meta") for name, dtype in DTYPES.items()}
    constants = kernels.configurations(logits[student], logits[teacher], logits[student])[0]
    warps = constants.pop("num_warps")
    constants |= {"ALIGNED": aligned, **dict.fromkeys(absent)}
    return cubin.compiled(kernel, arch, types, constants, num_warps=warps)


@pytest.mark.parametrize("arch", cubin.ARCHS)
@pytest.mark.parametrize(
    "name, student, teacher, absent",
    [
        ("fwd", "bf16", "bf16", ("mask", "stats")),
        ("fwd", "fp32", "fp32", ("stats",)),
        ("fwd", "fp16", "fp32", ("gradient",)),
        ("bwd", "bf16", "bf16", ()),
    ],
    ids=["fwd_bf16", "fwd_fp32_masked", "fwd_mixed_stats_only", "bwd_bf16_masked"],
)
def test_machine_code(name, student, teacher, absent, arch, tmp_path):
    program = compiled(getattr(kernels, f"_kl_div_{name}_kernel"), arch, student, teacher, absent=absent)
    ptx = program.asm["ptx"]
    need = cubin.resources(program, tmp_path)
    assert need["LOCAL"] == 0 and ".local" not in ptx
    assert need["STACK"] <= 8, "more than one pointer is parked outside the loops"
    assert cubin.residents(program, tmp_path) >= 2, "less than two rows fit on a multiprocessor"
    assert arch != 90 or name == "bwd" or student == "fp32" or cubin.residents(program, tmp_path) >= 3
    assert program.metadata.shared <= 65536
    assert not re.search(r"\b(atom|red)\.", ptx), "an order of additions that changes from run to run"

    row_loops = list(cubin.loops(ptx))
    passes = {"fwd": 1 if "gradient" in absent else 2, "bwd": 1}[name]
    assert sum("cp.async" in loop for loop in row_loops) == passes, "the next tiles are not fetched meanwhile"
    for loop in row_loops:
        assert loop.count("bar.sync") <= 2, "threads wait for each other, and not for copies alone"
        loads = re.findall(r"ld\.global\S*", loop)
        stores = re.findall(r"st\.global\S*", loop)
        narrow = "v2.b32" if student != teacher else "v4.b32"  # of two widths the narrower moves 8 bytes
        assert all(access.endswith(("v4.b32", narrow)) for access in loads + stores), loads + stores


def test_rows_that_differ_in_alignment_are_read_one_by_one():
    """The counterpart: without the promise that the bodies are aligned, the compiler must not assume it."""
    program = compiled(kernels._kl_div_fwd_kernel, 90, "bf16", "bf16", aligned=False, absent=("mask", "stats"))
    accesses = re.findall(r"(?:ld|st)\.global\S*", program.asm["ptx"])
    assert accesses and not any(re.search(r"\.v[248]\.", access) for access in accesses)
