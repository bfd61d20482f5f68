"""The machine code of kernels/int8_linear.py, compiled for three generations of GPU on a machine that has none.

It is what the kernels were designed to become: products of int8 in tensor cores, operands loaded asynchronously 16
bytes at a time, nothing spilled, whatever the epilogue.
"""

from __future__ import annotations

import re

import pytest

from distilbert_fast import backends

triton = pytest.importorskip("triton")
if backends.interpreted():
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

import cubin  # noqa: E402

from distilbert_fast.kernels import int8_linear as kernels  # noqa: E402

MMA = r"mma\.sync\.aligned\.m16n8k32\.row\.col\S*\.s32\.s8\.s8\.s32"
TCGEN05 = r"tcgen05\.mma\S*\.kind::i8"
PRODUCT = {
    80: MMA,
    90: r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8",
    100: MMA if triton.__version__.startswith("3.6.") else TCGEN05,  # 3.6 knows no int8 of the fifth generation
}
ATOMIC = r"\b(atom|red)\.global"
COPY = r"cp\.async\.c[ag]\.shared\.global"
TILES = [(64, 0), (64, 2), (4096, 0), (4096, 2)]  # rows, and a candidate for them: the deepest pipeline of its tile
ABSENT = {"residual": None, "out_scale": None, "GELU": False}


@pytest.fixture(autouse=True)
def nothing_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(kernel, arch, config, y="bf16", sums=False, whole=True, misaligned=(), **changed):
    """Compile for a layer whose C and F are multiples of 16, or not (``misaligned``), in the usual strides."""
    types = {
        **dict.fromkeys(["x_q", "w_q"], "*i8"),
        **dict.fromkeys(["x_scale", "w_scale", "out_scale"], "*fp32"),
        **dict.fromkeys(["bias", "residual"], "*bf16"),
        **dict.fromkeys(["N", "splits", "x_scale_stride", "out_scale_stride"], "i32"),
        **dict.fromkeys(["F", "C", "depth", "x_stride", "w_stride", "residual_stride"], "i32:16"),
        **dict.fromkeys(["x_column_stride", "w_column_stride"], "i32"),
        "sums": "*i32",
        "y": f"*{y}",
    }
    ones = ["x_column_stride", "w_column_stride", "w_scale_stride", "bias_stride", "residual_column_stride"]
    constants = {**config, "GELU": True, "WHOLE": whole, **dict.fromkeys(ones, 1), **changed}
    if not sums:
        constants["sums"] = None
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names and value != "absent"}
    if kernel is kernels._int8_linear_kernel:
        names = ("residual", "out_scale")
        options["maxnreg"] = kernels.most_registers(arch, *(constants.get(name, 0) is not None for name in names))
    return cubin.compiled(kernel, arch, types, constants, misaligned, **options)


def assert_nothing_spilled(program, folder, parked=8):
    """``parked``: bytes that a thread may keep outside of its registers, in the epilogue."""
    need = cubin.resources(program, folder)
    assert need["LOCAL"] == 0 and need["STACK"] <= parked and ".local" not in program.asm["ptx"], need


@pytest.mark.parametrize("arch", cubin.ARCHS)
@pytest.mark.parametrize(("n", "candidate"), TILES)
def test_machine_code(n, candidate, arch, tmp_path):
    """With everything in the epilogue that there is."""
    config = kernels.configurations(n, cubin.SHARED_LIMIT[arch])[candidate]
    program = compiled(kernels._int8_linear_kernel, arch, config, y="i8")
    ptx = program.asm["ptx"]
    assert re.search(PRODUCT[arch], ptx)
    copies = re.findall(COPY + r"[^;]*;", ptx)
    assert copies and all(re.search(r", (0x10|16)[,;]", copy) for copy in copies)
    assert program.metadata.shared <= cubin.SHARED_LIMIT[arch]
    assert not re.search(ATOMIC, ptx)
    assert_nothing_spilled(program, tmp_path)


@pytest.mark.parametrize(
    ("y", "changed", "parked"),
    [
        ("bf16", ABSENT, 0),
        ("bf16", {**ABSENT, "GELU": True}, 0),
        ("bf16", {"GELU": False, "out_scale": None}, 32),
        ("i8", {"residual": None}, 48),
    ],
    ids=["bias", "gelu", "residual", "codes"],
)
def test_two_programs_share_a_multiprocessor(y, changed, parked, tmp_path):
    """The epilogues that encoders have, on Hopper; all products of a step are in flight before one is waited for."""
    config = kernels.configurations(4096, cubin.SHARED_LIMIT[90])[0]
    program = compiled(kernels._int8_linear_kernel, 90, config, y, **changed)
    assert_nothing_spilled(program, tmp_path, parked)
    assert cubin.residents(program, tmp_path) == 2
    cubin.assert_products_overlap(program, tmp_path)


def test_the_gelu_of_codes_is_a_polynomial(tmp_path):
    """Half of erf's instructions, and no exponential."""
    config = kernels.configurations(4096, cubin.SHARED_LIMIT[90])[0]
    count = {}
    for y, exact in (("bf16", False), ("fp32", True)):
        program = compiled(kernels._int8_linear_kernel, 90, config, y, residual=None, out_scale=None)
        assert ("ex2" in program.asm["ptx"]) == exact
        count[y] = len(cubin.instructions(program, tmp_path))
    assert count["bf16"] < count["fp32"] - 64 * 16


@pytest.mark.parametrize("arch", cubin.ARCHS)
def test_the_kernels_of_split_products(arch, tmp_path):
    config = kernels.configurations(64, cubin.SHARED_LIMIT[arch])[0]
    first = compiled(kernels._int8_linear_kernel, arch, config, sums=True)
    assert re.search(PRODUCT[arch], first.asm["ptx"])
    second = compiled(kernels._int8_linear_sums_kernel, arch, {"BLOCK_N": 16, "BLOCK_F": 128}, sums=True)
    loads = [load for loop in cubin.loops(second.asm["ptx"]) for load in re.findall(r"ld\.global\S*", loop)]
    assert loads and all(load.endswith("v4.b32") for load in loads), loads
    for program in (first, second):
        assert not re.search(ATOMIC, program.asm["ptx"])
        assert_nothing_spilled(program, tmp_path)


def test_weights_of_other_strides_still_meet_in_tensor_cores():
    """Transposed weights: the first stride is 1."""
    config = kernels.configurations(4096, cubin.SHARED_LIMIT[90])[0]
    program = compiled(kernels._int8_linear_kernel, 90, config, w_stride=1, w_column_stride="absent")
    assert re.search(PRODUCT[90], program.asm["ptx"])


def test_columns_that_are_no_multiple_of_16_are_not_read_16_at_a_time():
    """The counterpart: without the promise, the compiler must not assume it."""
    config = kernels.configurations(4096, cubin.SHARED_LIMIT[90])[0]
    odd = ("C", "x_stride", "w_stride")
    program = compiled(kernels._int8_linear_kernel, 90, config, whole=False, misaligned=odd, **ABSENT)
    ptx = program.asm["ptx"]
    assert re.search(PRODUCT[90], ptx) and not re.search(COPY, ptx)
    assert re.search(r"ld\.global\.b8", ptx)
