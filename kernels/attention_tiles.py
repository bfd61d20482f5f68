"""Pure functions on tiles that the attention kernels share: where a sequence and a block lie, rows, dropout."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


class Heads(NamedTuple):
    """[N, H, D] or [B, T, H, D] as the kernels take it: an address and strides; those of D are 1."""

    data: Any
    sequence: Any  # 0 in the packed form
    token: Any
    head: Any


def heads(x: torch.Tensor) -> Heads:
    return Heads(x, *((0,) if x.dim() == 3 else ()), *x.stride()[:-1])


# Where -------------------------------------------------------------------------------------------------------


@triton.jit
def find_sequence(b, cu_seqlens, mask, length, tokens):
    """Sequence ``b``: its first row in the packed form (else 0), its row count, and that up to the last counted row."""
    if cu_seqlens is not None:  # clamped: wrong offsets make wrong results, but reach nothing out of bounds
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + b), 0), tokens)
        rows = tl.minimum(tl.load(cu_seqlens + b + 1), tokens) - begin
        count = rows
    else:
        begin = b * 0
        rows = begin + length
        count = rows
        if mask is not None:
            count = begin
            for start in range(0, length, 512):
                row = start + tl.arange(0, 512)
                counted = tl.load(mask + b.to(tl.int64) * length + row, mask=row < length, other=0)
                count = tl.maximum(count, tl.max(tl.where(counted != 0, row + 1, 0), axis=0))
    return begin, rows, count


@triton.jit
def find_block(block, cu_seqlens, batch, longest, BLOCK: tl.constexpr, KNOWN: tl.constexpr):
    """The sequence that block number ``block`` belongs to, and the block's first row in it, maybe after its end."""
    if KNOWN:
        blocks = tl.cdiv(longest, BLOCK)
        b = block // blocks
        first = (block - b * blocks) * BLOCK
    else:
        b = block * 0  # the last sequence whose blocks begin at or before this one
        end = b + batch
        while end - b > 1:
            middle = (b + end) // 2
            before = tl.load(cu_seqlens + middle) // BLOCK + middle <= block
            b = tl.where(before, middle, b)
            end = tl.where(before, end, middle)
        first = tl.maximum(block - tl.load(cu_seqlens + b) // BLOCK - b, 0) * BLOCK
    return b, first


@triton.jit
def head_of(x, b, begin, head):
    """Address of a head's first row."""
    return x.data + b.to(tl.int64) * x.sequence + begin.to(tl.int64) * x.token + head.to(tl.int64) * x.head


@triton.jit
def head_mask_of(head_mask, head_mask_stride, b, head):
    return 1.0 if head_mask is None else tl.load(head_mask + b.to(tl.int64) * head_mask_stride + head)


@triton.jit
def counts(mask, row, count):
    """Which rows of a sequence hold a token that counts."""
    inside = row < count
    if mask is not None:
        inside &= tl.load(mask + row, mask=inside, other=0) != 0
    return inside


@triton.jit
def load_rows(at, stride, first, inside, R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [R, BLOCK_D] from ``first`` on; 0 from column D on and where not ``inside`` (None: all are)."""
    column = tl.arange(0, BLOCK_D)[None, :]
    places = at + tl.cast(first, tl.int64) * stride + tl.arange(0, R).to(tl.int64)[:, None] * stride + column
    if inside is None and D == BLOCK_D:
        x = tl.load(places)
    elif inside is None:
        x = tl.load(places, mask=column < D, other=0.0)
    elif D == BLOCK_D:
        x = tl.load(places, mask=inside[:, None], other=0.0)
    else:
        x = tl.load(places, mask=inside[:, None] & (column < D), other=0.0)
    return x


@triton.jit
def store_rows(at, stride, first, value, inside, R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write value [R, BLOCK_D] to the rows that are ``inside``."""
    column = tl.arange(0, BLOCK_D)[None, :]
    places = at + tl.cast(first, tl.int64) * stride + tl.arange(0, R).to(tl.int64)[:, None] * stride + column
    tl.store(places, value.to(at.dtype.element_ty), mask=inside[:, None] & (column < D))


@triton.jit
def spoil(x, b, begin, head, start, rows, R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """NaN in the rows of a sequence from ``start`` on: it is longer than was promised."""
    nothing = tl.full([R, BLOCK_D], float("nan"), tl.float32)
    for row in range(start, rows, R):
        store_rows(head_of(x, b, begin, head), x.token, row, nothing, row + tl.arange(0, R) < rows, R, D, BLOCK_D)


# Dropout: csrc/cpu/attention/attention_heads.h bit for bit, so that a seed drops the same on every backend ----------


@triton.jit
def _mix(x):
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def place_of(rank, row, inside):
    """Places among the tokens that count."""
    return row if rank is None else tl.load(rank + row, mask=inside, other=0)


@triton.jit
def random_bits(seed, pair, query):
    """64 bits for each query of pair number sequence · H + head."""
    return _mix(_mix(tl.load(seed).to(tl.uint64) + pair.to(tl.uint64)) + query.to(tl.uint64))


@triton.jit
def is_kept(bits, key, threshold):
    """Which probabilities stay, of queries with these bits and keys at these places, broadcast."""
    x = key.to(tl.uint32) + bits.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D ^ (bits >> 32).to(tl.uint32)
    x = (x ^ (x >> 15)) * 0x846CA68B
    return (x ^ (x >> 16)) >= threshold


@triton.jit
def store_gradient(x, b, begin, head, first, value, factor, counted, rows, R: tl.constexpr, D: tl.constexpr,
                    BLOCK_D: tl.constexpr):  # fmt: skip
    """factor · value [R, BLOCK_D], 0 where nothing counts or the factor is 0."""
    value = tl.where(counted[:, None], tl.where(factor == 0.0, 0.0, value * factor), 0.0)
    store_rows(head_of(x, b, begin, head), x.token, first, value, first + tl.arange(0, R) < rows, R, D, BLOCK_D)
