"""int8_linear: products of int8 codes in tensor cores, and the whole epilogue before anything is stored.

    acc = Σ_c x_q w_q, exact in int32        y = gelu?(acc · x_scale · w_scale + bias) + residual, or its codes

One pass: x_q [N, C] and w_q [F, C] are read tile by tile, y [N, F] is written once. The weights of a layer fit in
L2; the tiles are ordered so that rows of x_q are reused there too. A program computes one tile, and a multiprocessor
holds two or more, so that one's loads and products go on while another's epilogue stores.

With few rows there are fewer tiles than places for programs. Then C is split between several: they store int32 sums
[SPLITS, N, F], and a second kernel adds these and applies the epilogue. The sums are exact, so no split changes a bit.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from distilbert_fast.kernels import tuning
from distilbert_fast.kernels.common import gelu, quantize_rows, rounded_gelu

FEW_ROWS = 256  # up to here the tiles of a layer do not fill a large GPU


@triton.jit
def _tile(number, N, F, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, GROUP: tl.constexpr):
    """Rows [BLOCK_N] and columns [BLOCK_F] of a tile of y. GROUP tiles of rows pass all columns before the next do."""
    tiles_n, tiles_f = tl.cdiv(N, BLOCK_N), tl.cdiv(F, BLOCK_F)
    first = number // (GROUP * tiles_f) * GROUP
    height = tl.minimum(tiles_n - first, GROUP)
    inside = number % (GROUP * tiles_f)
    rows = (first + inside % height) * BLOCK_N + tl.arange(0, BLOCK_N)
    return rows, inside // height * BLOCK_F + tl.arange(0, BLOCK_F)


@triton.jit
def _store_epilogue(
    acc,  # int32 [BLOCK_N, BLOCK_F]
    rows,
    columns,
    x_scale,
    w_scale,
    bias,
    residual,
    out_scale,
    y,
    N,
    F,
    x_scale_stride,
    w_scale_stride,
    bias_stride,
    residual_stride,
    residual_column_stride,
    out_scale_stride,
    GELU: tl.constexpr,
    WHOLE: tl.constexpr,
):
    row, column = rows < N, tl.full(columns.shape, True, tl.int1) if WHOLE else columns < F
    inside = row[:, None] & column[None, :]
    rows, columns = rows.to(tl.int64), columns.to(tl.int64)
    values = acc.to(tl.float32) * tl.load(x_scale + rows * x_scale_stride, mask=row, other=0.0)[:, None]
    values *= tl.load(w_scale + columns * w_scale_stride, mask=column, other=0.0)[None, :]
    if bias is not None:
        values += tl.load(bias + columns * bias_stride, mask=column, other=0.0).to(tl.float32)[None, :]
    if GELU and (out_scale is not None or y.dtype.element_ty == tl.bfloat16):
        values = rounded_gelu(values)
    elif GELU:
        values = gelu(values)
    if residual is not None:
        offsets = (rows * residual_stride)[:, None] + (columns * residual_column_stride)[None, :]
        values += tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
    if out_scale is not None:
        values = quantize_rows(values, rows, row, out_scale, out_scale_stride, None)
    tl.store(y + (rows * F)[:, None] + columns[None, :], values.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N"])
def _int8_linear_kernel(
    x_q,  # int8 [N, C] of any strides
    w_q,  # int8 [F, C] of any strides
    sums,  # int32 [SPLITS, N, F], or None: C is not split
    x_scale,  # fp32 [N], or of stride 0
    w_scale,  # fp32 [F]
    bias,  # [F] or None
    residual,  # [N, F] or None
    out_scale,  # fp32 [N] or of stride 0, or None: y holds floats
    y,  # [N, F] contiguous
    N,
    F,
    C,
    depth,  # columns of C that one split sums, a multiple of BLOCK_C
    x_stride,
    x_column_stride,
    w_stride,
    w_column_stride,
    x_scale_stride,
    w_scale_stride,
    bias_stride,
    residual_stride,
    residual_column_stride,
    out_scale_stride,
    GELU: tl.constexpr,
    WHOLE: tl.constexpr,  # C and F are multiples of BLOCK_C and BLOCK_F: no column needs a mask
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles = tl.cdiv(N, BLOCK_N) * tl.cdiv(F, BLOCK_F)
    c = tl.arange(0, BLOCK_C)
    work = tl.program_id(0)
    rows, columns = _tile(work % tiles, N, F, BLOCK_N, BLOCK_F, GROUP)
    begin = work // tiles * depth
    # Rows past the end read a row that there is: what they sum is not stored.
    x_tile = x_q + ((rows % N).to(tl.int64) * x_stride)[:, None]  # [BLOCK_N, 1]
    w_tile = w_q + ((columns if WHOLE else columns % F).to(tl.int64) * w_stride)[None, :]  # [1, BLOCK_F]
    acc = tl.zeros([BLOCK_N, BLOCK_F], tl.int32)
    for block in range(begin, tl.minimum(begin + depth, C), BLOCK_C):
        x_block = x_tile + ((block + c).to(tl.int64) * x_column_stride)[None, :]
        w_block = w_tile + ((block + c).to(tl.int64) * w_column_stride)[:, None]
        if WHOLE:
            x, w = tl.load(x_block), tl.load(w_block)
        else:
            x = tl.load(x_block, mask=(block + c < C)[None, :], other=0)
            w = tl.load(w_block, mask=(block + c < C)[:, None], other=0)
        acc = tl.dot(x, w, acc, out_dtype=tl.int32)
    if sums is not None:
        offsets = ((work // tiles * N + rows).to(tl.int64) * F)[:, None] + columns[None, :]
        tl.store(sums + offsets, acc, mask=(rows < N)[:, None] & (columns < F)[None, :])
    else:
        _store_epilogue(
            acc, rows, columns, x_scale, w_scale, bias, residual, out_scale, y, N, F, x_scale_stride,
            w_scale_stride, bias_stride, residual_stride, residual_column_stride, out_scale_stride, GELU, WHOLE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N", "splits"])
def _int8_linear_sums_kernel(
    sums,  # int32 [SPLITS, N, F]
    x_scale,
    w_scale,
    bias,
    residual,
    out_scale,
    y,
    splits,
    N,
    F,
    x_scale_stride,
    w_scale_stride,
    bias_stride,
    residual_stride,
    residual_column_stride,
    out_scale_stride,
    GELU: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    rows, columns = _tile(tl.program_id(0), N, F, BLOCK_N, BLOCK_F, 1)
    inside = (rows < N)[:, None] & (columns < F)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_F], tl.int32)
    for split in range(splits):
        offsets = ((split * N + rows).to(tl.int64) * F)[:, None] + columns[None, :]
        acc += tl.load(sums + offsets, mask=inside, other=0)
    _store_epilogue(
        acc, rows, columns, x_scale, w_scale, bias, residual, out_scale, y, N, F, x_scale_stride,
        w_scale_stride, bias_stride, residual_stride, residual_column_stride, out_scale_stride, GELU, WHOLE,
    )  # fmt: skip


class Device(NamedTuple):
    """A GPU's multiprocessors, bytes of shared memory that a program may take on one, and architecture."""

    places: int
    shared: int
    arch: int


@functools.cache
def _device(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device(4, 227 << 10, 90)  # the interpreter: as an H100, with few programs
    it = torch.cuda.get_device_properties(device)
    return Device(it.multi_processor_count, it.shared_memory_per_block_optin, 10 * it.major + it.minor)


def most_registers(arch: int, residual: bool, codes: bool) -> int | None:
    """That a thread may take; None: the compiler's choice.

    On Hopper as many as let two programs of eight warps share a multiprocessor, at the price of some 40 bytes that a
    thread parks while it makes codes. Not where a residual is added before that, which would park 280; nor elsewhere:
    for the products of Ampere a thread needs more, and on Blackwell sums are not in registers.
    """
    return 128 if arch == 90 and not (residual and codes) else None


def _shared(config: tuning.Config) -> int:
    """Bytes of the tiles in flight."""
    return config["num_stages"] * (config["BLOCK_N"] + config["BLOCK_F"]) * config["BLOCK_C"]


def configurations(n: int, shared: int) -> list[tuning.Config]:
    """Tiles and pipelines for n rows that ``shared`` bytes hold, the default first.

    Hopper's tensor cores take rows in multiples of 64 and warps in fours. A thread holds at most 64 sums: with 128 the
    epilogue needs more registers than there are.
    """
    few = [(64, 64, 256, 4, 4), (64, 64, 256, 4, 3)]
    many = [(128, 128, 128, 8, 3), (128, 128, 128, 8, 4), (64, 256, 128, 8, 2)]
    short = [(64, 64, 128, 4, 4), (64, 64, 128, 4, 3)]
    found = [
        {"BLOCK_N": block_n, "BLOCK_F": block_f, "BLOCK_C": block_c, "GROUP": 8, "num_warps": w, "num_stages": stages}
        for block_n, block_f, block_c, w, stages in (*(few if n <= FEW_ROWS else many), *short)
    ]
    return [config for config in found if _shared(config) < shared]


def int8_linear(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    w_q: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    gelu: bool,
    residual: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    y: torch.Tensor,
) -> None:
    """Write y = gelu?(x_q w_qᵀ · x_scale · w_scale + bias) + residual, or its codes.

    Args:
        x_q, w_q: int8 [N, C] and [F, C], any strides; C ≤ 131071. Fastest with rows that start at multiples of 16
            bytes and C a multiple of 16: then loads are asynchronous and of 16 bytes.
        x_scale: float32 [N] of any stride, or [].
        w_scale: float32 [F], any stride.
        bias: float32, bfloat16 or float16 [F], any stride, or None.
        gelu: whether GELU comes between bias and residual.
        residual: float32, bfloat16 or float16 [N, F], any strides, or None.
        out_scale: float32 [N] of any stride or [], by which y is quantized; or None.
        y: [N, F] contiguous: float32, bfloat16 or float16, or int8 if there is an out_scale.
    """
    (n, c), f = x_q.shape, w_q.shape[0]
    if n == 0 or f == 0:
        return
    places, shared, arch = _device(x_q.device)
    registers = most_registers(arch, residual is not None, out_scale is not None)
    operands = x_scale, w_scale, bias, residual, out_scale, y
    strides = (
        _stride(x_scale),
        w_scale.stride(0),
        0 if bias is None else bias.stride(0),
        *((0, 0) if residual is None else residual.stride()),
        0 if out_scale is None else _stride(out_scale),
    )

    def run(config: tuning.Config) -> None:
        block_n, block_f, block_c = config["BLOCK_N"], config["BLOCK_F"], config["BLOCK_C"]
        tiles, blocks = triton.cdiv(n, block_n) * triton.cdiv(f, block_f), triton.cdiv(c, block_c)
        # A split sums at least what a pipeline holds: less would only wait for its loads.
        splits = max(1, min(places // tiles, blocks // config["num_stages"]))
        depth = block_c * max(1, triton.cdiv(blocks, splits))
        splits = max(1, triton.cdiv(c, depth))
        sums = y.new_empty((splits, n, f), dtype=torch.int32) if splits > 1 else None
        _int8_linear_kernel[(tiles * splits,)](
            x_q, w_q, sums, *operands, n, f, c, depth, *x_q.stride(), *w_q.stride(), *strides,
            GELU=gelu, WHOLE=c % block_c == 0 and f % block_f == 0, maxnreg=registers, **config,
        )  # fmt: skip
        if sums is not None:
            _int8_linear_sums_kernel[(triton.cdiv(n, 16) * triton.cdiv(f, 128),)](
                sums, *operands, splits, n, f, *strides, GELU=gelu, WHOLE=f % 128 == 0, BLOCK_N=16, BLOCK_F=128,
            )  # fmt: skip

    with torch.cuda.device_of(x_q):
        bucket = next((bound for bound in (64, FEW_ROWS, 1024, 8192) if n <= bound), "any")
        key = f"C={c},F={f},N<={bucket}"
        run(tuning.pick("int8_linear", key, configurations(n, shared), x_q.device, run))


def _stride(scale: torch.Tensor) -> int:
    """The stride of a scale: 0 for one scale for all rows."""
    return scale.stride(0) if scale.dim() else 0
