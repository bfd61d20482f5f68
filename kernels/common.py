"""Pure functions on tiles that the Triton kernels share, and how rows are cut into tiles.

A row of C hidden states fits in registers: a tile is [ROWS, BLOCK_C], whole rows, read once (``row_tile``).

A row of V = 30522 two-byte logits starts at any multiple of 4 bytes, and a load of 16 bytes may not. So a row is
its *body*, whole groups of GROUP columns that start at multiples of GROUP elements, and its *edges*, the fewer
than GROUP columns before the body and after it. Columns count from the body's first one:

    [-head, 0)  [0, body)  [body, V - head)          body and all offsets of the body are multiples of GROUP

A tile is [LANES, K]: the body is read GROUP columns a lane (K = GROUP), the edges one column a lane (K = 1).
Statistics are kept per lane and merged once a row, so that threads synchronize once a row and not once a tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from distilbert_fast.kernels import tuning

LOG2E = 1.4426950408889634
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32: finite, so that a difference to it is never NaN
SMALLEST_SCALE = tl.constexpr(2.0**-126)  # TINY of ops/_rows.py: the reciprocal of any scale from here up is finite
UNIT = tl.constexpr(2.0**-20)  # exact factor under which 2^20 differences sum without overflow, be they to LOWEST


@triton.jit
def split_row(first, V, GROUP: tl.constexpr):
    """How many columns the head and the body of a row hold whose column 0 is element ``first`` of its tensor.

    A row that ends before the next multiple of GROUP lies in the head, which then is longer than the row.
    """
    head = ((GROUP - first % GROUP) % GROUP).to(tl.int32)
    return head, tl.maximum(V - head, 0) // GROUP * GROUP


@triton.jit
def body_offset(first, head, ALIGNED: tl.constexpr, GROUP: tl.constexpr):
    """Offset of the body in its tensor. If ALIGNED it is a multiple of GROUP, in a form the compiler can see."""
    return (first + head) // GROUP * GROUP if ALIGNED else first + head


@triton.jit
def body_tile(block, body, LANES: tl.constexpr, GROUP: tl.constexpr):
    """Columns [LANES, GROUP] of tile number ``block`` of a body, and which lanes [LANES, 1] lie inside it."""
    lane = block * LANES * GROUP + tl.arange(0, LANES)[:, None] * GROUP
    return lane + tl.arange(0, GROUP)[None, :], lane < body


@triton.jit
def edge_tile(head, body, V, LANES: tl.constexpr, GROUP: tl.constexpr):
    """Columns [LANES, 1] of both edges, head first, and which lanes [LANES, 1] hold one. LANES >= 2 GROUP."""
    lane = tl.arange(0, LANES)[:, None]
    column = tl.where(lane < GROUP, lane - GROUP, body + lane - GROUP)
    return column, (column >= -head) & (column < V - head)


@triton.jit
def online_softmax(x, m, z, c):
    """Fold a tile x [LANES, K] into each lane's maximum m and z = Σ exp2(c (x − m)).

    Lanes that hold no column are −inf. Returns the new m and z, the tile's UNIT (x − m) and exp2(c (x − m)), and
    the factor by which older sums shrink. tl.max drops NaN, but x − m does not: a NaN ends in z.
    """
    new_m = tl.maximum(m, tl.max(x, axis=1))  # [LANES]
    below = x * UNIT - (new_m * UNIT)[:, None]  # [LANES, K]; one fused multiply-add
    e = tl.exp2(below * (c / UNIT))
    shrink = tl.exp2((m - new_m) * c)
    return new_m, z * shrink + tl.sum(e, axis=1), below, e, shrink


@triton.jit
def fold_divergence(s, t, valid, c, m_s, z_s, m_t, z_t, w):
    """Fold tiles s, t [LANES, K] of two rows into each lane's maxima, sums and w = Σ exp2(c (t − m_t)) ((t − m_t) −
    (s − m_s)), in UNITs. ``valid`` [LANES, 1] excludes lanes. Returns these five, and of s what online_softmax does.
    """
    new_m_s, z_s, s, e_s, shrink_s = online_softmax(s, m_s, z_s, c)
    new_m_t, new_z_t, t, e_t, shrink = online_softmax(t, m_t, z_t, c)
    # The older sum moves to the new maxima. Its weight comes first: 0 · huge is 0 where huge · Z may be inf.
    w = shrink * w + (shrink * z_t) * ((m_t - new_m_t) - (m_s - new_m_s)) * UNIT
    return new_m_s, z_s, new_m_t, new_z_t, w + tl.sum(tl.where(valid, e_t * (t - s), 0.0), axis=1), s, e_s, shrink_s


@triton.jit
def merge_lanes(m_s, z_s, m_t, z_t, w, c):
    """Merge the statistics that fold_divergence gathered in each lane into those of the row."""
    row_m_s, row_m_t = tl.max(m_s, axis=0), tl.max(m_t, axis=0)
    weight = tl.exp2((m_t - row_m_t) * c)
    w = tl.sum(weight * w + (weight * z_t) * ((m_t - row_m_t) - (m_s - row_m_s)) * UNIT, axis=0)
    z_s = tl.sum(tl.exp2((m_s - row_m_s) * c) * z_s, axis=0)
    return row_m_s, z_s, row_m_t, tl.sum(weight * z_t, axis=0), w


@triton.jit
def divergence(z_s, z_t, w, temperature):
    """τ² Σ p_t (log p_t − log p_s), from the values that merge_lanes returns."""
    return temperature * (w / z_t / UNIT - temperature * tl.log(z_t / z_s))


@triton.jit
def to_int8(x, r):
    """round(clamp(x · r, −127, 127)), ties to even, and 0 where x · r is NaN. x fp32, r fp32 that broadcasts to it.

    In [2^23, 2^24) a float32 is an integer: adding 1.5 · 2^23 rounds as the hardware rounds a sum, and leaves the
    code, in two's complement, in the low byte. The clamp between product and sum keeps them from becoming one FMA.
    """
    product = x * r
    product = tl.where(product == product, product, 0.0)
    shifted = tl.minimum(tl.maximum(product, -127.0), 127.0) + 12582912.0
    return shifted.to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def gelu(x):
    """x Φ(x) = x/2 (1 + erf(x/√2)), fp32."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def rounded_gelu(x):
    """gelu(x) within 6e-5, exact in the tails, for what is rounded to bfloat16 or int8: half of erf's instructions.

    erf(x/√2) ≈ x Q(x²) on [−4.5, 4.5], ±1 beyond; Q of degree 8 makes the largest error of the result least.
    """
    t = tl.minimum(tl.maximum(x, -4.5), 4.5)
    u = t * t
    q = 6.000019231455767e-11 * u - 6.5678293914572805e-09
    q = q * u + 3.1605162575942813e-07
    q = q * u - 8.863372386258561e-06
    q = q * u + 1.6241947014350444e-04
    q = q * u - 2.0725068170577288e-03
    q = q * u + 1.916130818426609e-02
    q = q * u - 1.3195453584194183e-01
    q = q * u + 7.97417163848877e-01
    half = 0.5 * x
    return half * tl.minimum(tl.maximum(t * q, -1.0), 1.0) + half


@triton.jit
def largest_magnitude(x):
    """max |x| of each row of x fp32 [ROWS, BLOCK_C]. As integers NaN stands above ∞: one anywhere ends in it."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def quantize_rows(x, rows, counted, scale, scale_stride, found):
    """int8 codes of x fp32 [ROWS, BLOCK_C], 0 where there is no column, by the contract of ops/quantize.py.

    Each row's scale is the given one, at ``scale``; where that is None its own, which is written to ``found``.
    """
    if scale is None:
        step = tl.div_rn(largest_magnitude(x), 127.0)  # [ROWS]
        step = tl.where(step < SMALLEST_SCALE, 0.0, step)
        tl.store(found + rows, step, mask=counted)
    else:
        step = tl.load(scale + rows * scale_stride, mask=counted, other=1.0)
    return to_int8(x, tl.where(step >= SMALLEST_SCALE, tl.div_rn(1.0, step), 0.0)[:, None])


@triton.jit
def row_tile(block, N, C, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Tile ``block`` of whole rows: rows [ROWS], columns [BLOCK_C], which rows exist [ROWS], which elements."""
    rows = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_C)
    counted = rows < N
    return rows, columns, counted, counted[:, None] & (columns < C)[None, :]


def row_configs(
    C: int,
    per_warp: int = 1024,
    multiples: Sequence[tuple[int, int]] = ((1, 1), (2, 2), (4, 4), (2, 1), (1, 2), (1, 4)),
) -> list[dict[str, int]]:
    """Tiles of whole rows in registers, the best guess first.

    A row of up to ``per_warp`` columns is one warp's own, so that no warp waits for another in a row's sums; short rows
    share a warp, long ones take more. Each candidate is that with its rows and its warps multiplied.
    """
    block = max(1, triton.next_power_of_2(C))
    rows, warps = max(1, per_warp // block), min(32, max(1, block // per_warp))
    room = [(k, w) for k, w in multiples if w * warps <= 32 and k * rows * block <= 2 * per_warp * w * warps]
    return [{"ROWS": k * rows, "BLOCK_C": block, "num_warps": w * warps} for k, w in room or [(1, 1)]]


def rows_key(matrices: Iterable[torch.Tensor | None], columns: int) -> str:
    """What a configuration of ``row_configs`` depends on: the dtypes of what is read, and C."""
    return ",".join([*(str(x.dtype)[6:] for x in matrices if x is not None), f"C={columns}"])


def launch_rows(
    kernel: Any, like: torch.Tensor, name: str, matrices: Sequence[torch.Tensor | None], *arguments: Any, **named: Any
) -> None:
    """Launch a kernel, one program a tile of whole rows of ``like`` [N, C].

    Args:
        name: of the kernel in the tables of configurations; the key is that of the ``matrices``.
        arguments, named: all that the kernel takes but N, C and its configuration.
    """
    n, c = like.shape
    if n == 0:
        return

    def launch(config: tuning.Config) -> None:
        with torch.cuda.device_of(like):
            kernel[(triton.cdiv(n, config["ROWS"]),)](*arguments, N=n, C=c, **named, **config)

    launch(tuning.pick(name, rows_key(matrices, c), row_configs(c), like.device, launch))


def logits_configuration(columns: int, element_size: int) -> dict[str, int]:
    """Tile and warps for rows of logits: loads of 16 bytes, 16 logits of each side a thread, at most 8 warps a row.

    STAGES tiles are in flight, as many as leave room for two rows or more on a multiprocessor: without that, half of
    the loads would wait for the other half to be used.
    """
    group, tile = 16 // element_size, min(4096, max(512, triton.next_power_of_2(columns)))
    return {"LANES": tile // group, "GROUP": group, "STAGES": 3 if element_size < 4 else 2, "num_warps": tile // 512}
