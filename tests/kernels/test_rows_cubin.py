"""The machine code of the kernels that hold whole rows in registers, for three generations of GPU.

At C = 768 every matrix moves 16 bytes an access, a row crosses memory once, nothing is spilled, and the quantizing
forms divide as IEEE says and never flush a subnormal or fuse a product into the rounding sum.
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

from distilbert_fast.kernels import cosine_loss, layer_norm, quantize, tuning  # noqa: E402
from distilbert_fast.kernels.common import row_configs  # noqa: E402

C = 768
MATRICES = ("a", "b", "c", "x", "y", "dy", "dh", "student", "teacher", "dstudent")
TYPES = {
    **dict.fromkeys(["weight", "bias", "mean", "rstd", "scale", "found", "dparameters"], "*fp32"),
    **dict.fromkeys(["loss", "stats", "drows"], "*fp32"),
    **dict.fromkeys(["a_ids", "b_ids", "c_ids"], "*i64"),
    **dict.fromkeys(["a_height", "b_height", "c_height", "N", "scale_stride", "mask_stride"], "i32"),
    **dict.fromkeys(["y_q", "x_q"], "*i8"),
    **dict.fromkeys(["eps", "epsilon"], "fp32"),
    **{f"{name}_stride": "i32:16" for name in MATRICES},
    "mask": "*i1",
    "C": "i32:16",
}


@pytest.fixture(autouse=True)
def nothing_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(kernel, arch, dtype, config, absent, special=None):
    """Compile for matrices of this dtype; ``absent`` arguments are None, an absent term with all that belongs to it."""
    types = {**TYPES, **dict.fromkeys(MATRICES, f"*{dtype}")}
    if kernel is layer_norm._layer_norm_bwd_kernel and "a_ids" not in absent:
        types["dh"] = "*fp32"
    constants = {**config, **dict.fromkeys(absent), **(special or {})}
    warps = constants.pop("num_warps")
    for term in {"a", "b", "c"} & set(absent):
        constants |= {f"{term}_ids": None, f"{term}_height": 0, f"{term}_stride": 0}
    return cubin.compiled(kernel, arch, types, constants, num_warps=warps)


def backward_config(columns, gathered=False):
    """The configuration that the launcher of the LayerNorm backward takes first: asked for without a launch."""

    class Enough(Exception):
        pass

    def stop(kernel, key, candidates):
        raise Enough(candidates[0])

    x = torch.zeros(2, columns)
    with tuning.choosing(stop), pytest.raises(Enough) as stopped:
        layer_norm.normalize_bwd(x, [x], [x if gathered else None], x[0], x[:, 0], x[:, 0], x, x[0], x[0])
    return stopped.value.args[0]


# Kernel, arguments that are absent, what it reads and what it writes: m a matrix of the dtype, f one of float32, q one
# of codes, p a row of parameters.
FORWARD, BACKWARD, SUM = layer_norm._layer_norm_fwd_kernel, layer_norm._layer_norm_bwd_kernel, ("c", "a_ids", "b_ids")
CASES = {
    "layer_norm": (FORWARD, (*SUM, "y_q", "scale", "found"), "mmpp", "m"),
    "layer_norm_quantize": (FORWARD, (*SUM, "mean", "rstd", "scale"), "mmpp", "mq"),
    "embedding_quantize": (FORWARD, ("c", "mean", "rstd", "scale"), "mmpp", "mq"),
    "layer_norm_bwd": (BACKWARD, SUM, "mmmp", "mpp"),
    "embedding_bwd": (BACKWARD, (), "mmmmp", "fpp"),
    "quantize": (quantize._quantize_kernel, ("scale",), "m", "q"),
    "quantize_by_given_scale": (quantize._quantize_kernel, ("found",), "m", "q"),
    "cosine_loss_fwd": (cosine_loss._cosine_loss_fwd_kernel, (), "mm", ""),
    "cosine_loss_bwd": (cosine_loss._cosine_loss_bwd_kernel, ("mask",), "mm", "m"),
}


@pytest.mark.parametrize("arch", cubin.ARCHS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("case", CASES)
def test_machine_code(case, dtype, arch, tmp_path):
    kernel, absent, read, written = CASES[case]
    config = backward_config(C, "b_ids" not in absent) if kernel is BACKWARD else row_configs(C)[0]
    program = compiled(kernel, arch, dtype, config, absent)
    ptx = program.asm["ptx"]
    need = cubin.resources(program, tmp_path)
    assert need["LOCAL"] == 0 and ".local" not in ptx
    assert need["STACK"] <= 16, "more than two pointers are parked"
    assert need["REG"] * 32 * (16 if kernel is BACKWARD else 14) <= 65536, "too few warps fit on a multiprocessor"
    pipelined = config.get("STAGES") == 2
    assert program.metadata.shared <= (25 << 10 if pipelined else 4096)
    assert cubin.residents(program, tmp_path) >= 4
    assert not re.search(r"\b(atom|red)\.", ptx), "an order of additions that changes from run to run"

    columns, size = config["BLOCK_C"], 2 if dtype == "bf16" else 4
    tile = config["ROWS"] * columns
    bytes_of = {"m": tile * size, "f": tile * 4, "q": tile, "p": columns * 4}
    if pipelined:  # matrices are copied ahead, 16 bytes at a time; once before the loop, once in it
        copies = re.findall(r"cp\.async\.c[ga]\.shared\.global [^;]*, (?:0x)?(\d+), %r\d+;", ptx)
        sixteen = sum(size in ("10", "16") for size in copies)
        assert sixteen * 16 * 32 * config["num_warps"] == 2 * sum(bytes_of[each] for each in read if each == "m")
        read = read.replace("m", "")
    for instruction, what in (("ld", read), ("st", written)):
        accesses = re.findall(rf"{instruction}\.global\S*\.(v\d\.\S+)", ptx)
        assert set(accesses) <= {"v4.b32"}, accesses
        assert len(accesses) * 16 * 32 * config["num_warps"] == sum(bytes_of[each] for each in what)
    if "q" in written:
        assert "div.rn.f32" in ptx and not re.search(r"\.ftz|div\.(full|approx)", ptx)
    if kernel is quantize._quantize_kernel:
        assert "fma" not in ptx, "a product that is not rounded before the sum that rounds it"
    if kernel is not BACKWARD and "q" not in written:
        assert "bar.sync" not in ptx, "a row is more than one warp's"


@pytest.mark.parametrize("columns", [1, 4096])
@pytest.mark.parametrize("case", CASES)
def test_other_widths_compile(case, columns, tmp_path):
    """One column, where Triton makes constants of C and the strides; and the widest model. Any N is one program."""
    kernel, absent, _, _ = CASES[case]
    config = backward_config(columns, "b_ids" not in absent) if kernel is BACKWARD else row_configs(columns)[0]
    sizes = {"C", *(f"{name}_stride" for name in (*MATRICES, "mask"))} & set(kernel.arg_names)
    special = dict.fromkeys(sizes, 1) if columns == 1 else {}
    assert [param.name for param in kernel.params if param.do_not_specialize] == ["N"]
    program = compiled(kernel, 90, "bf16", config, absent, special)
    assert cubin.resources(program, tmp_path)["LOCAL"] == 0
