"""Pure functions on tiles that the Triton kernels share, and how a row of logits is cut into tiles.

A row of V = 30522 two-byte logits starts at any multiple of 4 bytes, and a load of 16 bytes may not. So a row is
its *body*, whole groups of GROUP columns that start at multiples of GROUP elements, and its *edges*, the fewer
than GROUP columns before the body and behind it. Columns count from the body's first one:

    [-head, 0)  [0, body)  [body, V - head)          body and all offsets of the body are multiples of GROUP

A tile is [LANES, K]: the body is read GROUP columns a lane (K = GROUP), the edges one column a lane (K = 1).
Statistics are kept per lane and merged once a row, so that threads meet once a row and not once a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = 1.4426950408889634
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32: finite, so that a difference to it is never NaN
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
def to_int8(x, r):
    """round(clamp(x · r, −127, 127)), ties to even, and 0 where x · r is NaN. x fp32, r fp32 that broadcasts to it.

    In [2^23, 2^24) a float32 is an integer: adding 1.5 · 2^23 rounds as the hardware rounds a sum, and leaves the
    code, in two's complement, in the low byte. The clamp between product and sum keeps them from becoming one FMA.
    """
    product = x * r
    product = tl.where(product == product, product, 0.0)
    shifted = tl.minimum(tl.maximum(product, -127.0), 127.0) + 12582912.0
    return shifted.to(tl.int32, bitcast=True).to(tl.int8)
