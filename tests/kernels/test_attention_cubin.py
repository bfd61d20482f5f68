"""The machine code of kernels/attention.py and attention_backward.py, compiled for three generations of GPU.

It is what the kernels were designed to become: the matrix instructions of the generation, copies of 16 bytes that run
ahead of them, nothing spilled, shared memory that fits, no atomics.
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

from distilbert_fast.kernels import attention, attention_backward, attention_tiles  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRODUCT = {80: r"mma\.sync\S*", 90: r"wgmma\.mma_async\S*", 100: r"tcgen05\.mma\S*"}
# What a call may bring along: nothing but offsets; or padding, dropout and a head mask with its gradient.
PACKED = ("mask", "rank", "head_mask", "seed", "unmasked", "dm")
PADDED = ("cu_seqlens",)


@pytest.fixture(autouse=True)
def nothing_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(name, arch, dtype, absent=PACKED, size=64, length=512):
    """Compile with the tile that the launcher takes for heads of ``size`` in sequences of ``length`` tokens."""
    q = torch.empty((2, length, 12, size), dtype=DTYPES[dtype], device="meta")
    kernel, candidates, constants = {
        "fwd": (attention._attention_fwd_kernel, attention._candidates(q, None), {}),
        "bwd_short": (
            attention_backward._attention_bwd_short_kernel,
            attention_backward._short_candidates(q, None),
            {"EARLY": arch >= 90},
        ),
        "bwd_dq": (
            attention_backward._attention_bwd_dq_kernel,
            attention_backward._candidates(q, "BLOCK_M"),
            {"SHORT": 128, "DM": absent == PADDED},
        ),
        "bwd_dkv": (
            attention_backward._attention_bwd_dkv_kernel,
            attention_backward._candidates(q, "BLOCK_N"),
            {"SHORT": 128},
        ),
    }[name]
    tile = dict(candidates[0])
    options = {option: tile.pop(option) for option in ("num_warps", "num_stages") if option in tile}
    if name == "fwd":
        constants = {"ONE_TILE": length <= tile["BLOCK_N"]}
    constants["KNOWN"] = absent == PADDED or length <= 128
    types = {
        **dict.fromkeys(
            ["q", "k", "v", "o", "unmasked", "do", "dq", "dk", "dv"],
            attention_tiles.Heads(f"*{dtype}", "i64:16", "i32:16", "i32:16"),
        ),
        **dict.fromkeys(["stats", "delta", "dm", "head_mask"], "*fp32"),
        **dict.fromkeys(["cu_seqlens", "rank"], "*i32"),
        "mask": "*i1",
        "seed": "*i64",
        "threshold": "u32",
        **dict.fromkeys(["head_mask_stride", "batch", "length", "longest", "tokens", "H"], "i32"),
        **dict.fromkeys(["keep", "c", "scale"], "fp32"),
    }
    return cubin.compiled(
        kernel, arch, types, {"D": size, "BLOCK_D": size, **tile, **constants, **dict.fromkeys(absent)}, **options
    )


def check(program, arch, dtype, tmp_path, parked=8):
    """``parked``: bytes of pointers and masks that a thread may keep outside its registers."""
    ptx = program.asm["ptx"]
    products = set(re.findall(PRODUCT[arch], ptx))
    assert products and not any(re.search(PRODUCT[other], ptx) for other in PRODUCT if other != arch)
    assert arch == 100 or all({"bf16": ".bf16", "fp16": ".f16"}[dtype] in product for product in products)
    need = cubin.resources(program, tmp_path)
    assert need["LOCAL"] == 0 and need["STACK"] <= parked and ".local" not in ptx, "spilled"
    assert program.metadata.shared <= cubin.SHARED_LIMIT[arch]
    assert not re.search(r"\b(atom|red)\.", ptx), "an order of additions that changes from run to run"
    return ptx


KERNELS = ("fwd", "bwd_short", "bwd_dq", "bwd_dkv")


@pytest.mark.parametrize("arch", cubin.ARCHS)
@pytest.mark.parametrize("name", KERNELS)
def test_machine_code(name, arch, tmp_path):
    program = compiled(name, arch, "bf16")
    ptx = check(program, arch, "bf16", tmp_path)
    if arch == 90:
        cubin.assert_products_overlap(program, tmp_path)
        assert name != "fwd" or cubin.residents(program, tmp_path) == 2
    if name != "bwd_short":  # it reads all it needs at once
        assert "cp.async.cg.shared.global" in ptx, "the next block is not fetched while this one is computed"
    heads = re.findall(r"ld\.global\S*\.(?:b16|v2\.b16|v4\.b16)", ptx)
    assert not heads, "queries, keys or values are read in pieces of less than 16 bytes"


@pytest.mark.parametrize("name", KERNELS)
def test_with_padding_dropout_and_the_gradient_of_a_head_mask(name, tmp_path):
    check(compiled(name, 90, "bf16", absent=PADDED), 90, "bf16", tmp_path, parked=48)


@pytest.mark.parametrize("name", ["fwd", "bwd_dkv"])
def test_float16(name, tmp_path):
    check(compiled(name, 90, "fp16"), 90, "fp16", tmp_path)


@pytest.mark.parametrize("arch", cubin.ARCHS)
def test_forward_whose_keys_fit_one_tile_has_no_loop(arch, tmp_path):
    """Of packed sequences, too, where the host promises that they are so short."""
    ptx = check(compiled("fwd", arch, "bf16", length=128), arch, "bf16", tmp_path)
    assert not any(re.search(PRODUCT[arch], loop) for loop in cubin.loops(ptx))


@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize("name", ["fwd", "bwd_dkv"])
def test_other_heads(name, size, tmp_path):
    check(compiled(name, 90, "bf16", size=size), 90, "bf16", tmp_path)
