"""Attention of packed or padded sequences, forward: one program a block of queries of one (sequence, head).

With c = scale · log2(e), of each query m = max c q·k and Z = Σ_keys exp2(c q·k − m):

    o = m_h · 1 / (Z (1 − p)) · Σ_keys drop(exp2(c q·k − m)) v

Blocks of keys pass by once, and what is summed shrinks whenever m grows; where the host knows that one tile holds all
keys, no loop is compiled. So q, k, v are read and o is written once (k and v once a block of queries, from the L2
cache). For backward m and 1 / Z are kept, two floats a query: one log-sum-exp would round at the size of the scores.
So is o before the head mask, where the gradient of the mask is wanted.

Sums and softmax are float32; products multiply the dtype of q, float32 exactly ("ieee", on the ordinary cores: "tf32"
would take the tensor cores, but with 10 bits of each factor it misses the rule of twice torch's error by far).

Where a sequence lies is read on the device. A packed batch gets N // BLOCK + B blocks, a bound that needs no lengths:
those of sequence b begin at block cu_seqlens[b] // BLOCK + b, and which sequence a block belongs to is searched. Where
the host promises a longest length, every sequence gets as many blocks as that takes, and nothing is searched; what a
longer one has beyond them is NaN. A padded row ends at its last token that counts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from distilbert_fast.kernels import tuning
from distilbert_fast.kernels.attention_tiles import (
    counts,
    find_block,
    find_sequence,
    head_mask_of,
    head_of,
    heads,
    is_kept,
    load_rows,
    place_of,
    random_bits,
    spoil,
    store_rows,
)
from distilbert_fast.kernels.common import LOG2E, LOWEST

# No kernel is compiled again because of the value of one of these.
PLAIN = ["head_mask_stride", "threshold", "batch", "length", "longest", "tokens", "H"]


# Forward -----------------------------------------------------------------------------------------------------


@triton.jit
def scores(a, b, counted):
    """a bᵀ, and −∞ in the columns that do not count (None: all do)."""
    s = tl.dot(a, tl.trans(b), input_precision="ieee")
    return s if counted is None else tl.where(counted[None, :], s, float("-inf"))


@triton.jit
def _fold(
    o,  # [BLOCK_M, BLOCK_D] so far
    m,  # [BLOCK_M]
    z,
    q,  # tile [BLOCK_M, BLOCK_D]
    k,  # address of the head
    v,
    k_stride,
    v_stride,
    start,
    count,
    mask,
    rank,
    bits,
    threshold,
    c,
    WHOLE: tl.constexpr,  # all keys of the block count
    ONE_TILE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Fold the block of keys that begins at ``start`` into the sums."""
    row = start + tl.arange(0, BLOCK_N)
    counted = None if WHOLE else counts(mask, row, count)
    s = scores(q, load_rows(k, k_stride, start, counted, BLOCK_N, D, BLOCK_D), counted)  # [BLOCK_M, BLOCK_N]
    new_m = tl.maximum(m, tl.max(s, axis=1) * c)  # finite where no key counts: −∞ − −∞ would be NaN
    p = tl.exp2(s * c - new_m[:, None])
    total = tl.sum(p, axis=1)
    if bits is not None:
        p = tl.where(is_kept(bits[:, None], place_of(rank, row, row < count)[None, :], threshold), p, 0.0)
    values = load_rows(v, v_stride, start, counted, BLOCK_N, D, BLOCK_D)
    p = p.to(values.dtype)
    if ONE_TILE:
        o = tl.dot(p, values, input_precision="ieee")
        z = total
    else:
        shrink = tl.exp2(m - new_m)
        # Not as the product's third operand: on Hopper each part of such a product is waited for alone.
        o = tl.fma(o, tl.broadcast_to(shrink[:, None], o.shape), tl.dot(p, values, input_precision="ieee"))
        z = z * shrink + total
    return o, new_m, z


@triton.jit
def _store_outputs(
    o, unmasked, stats, b, begin, head, first, place, inside, H, tokens, masked, acc, m, one_over_z,
    BLOCK_M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    store_rows(head_of(o, b, begin, head), o.token, first, masked, inside, BLOCK_M, D, BLOCK_D)
    if unmasked is not None:
        store_rows(head_of(unmasked, b, begin, head), unmasked.token, first, acc, inside, BLOCK_M, D, BLOCK_D)
    if stats is not None:
        tl.store(stats + place, m, mask=inside)
        tl.store(stats + H.to(tl.int64) * tokens + place, one_over_z, mask=inside)


@triton.jit(do_not_specialize=PLAIN)
def _attention_fwd_kernel(
    q,  # Heads of [N, H, D] or [B, T, H, D]
    k,
    v,
    o,
    unmasked,  # as o, before the head mask; or None
    stats,  # fp32 [2, H, tokens]: m and 1 / Z; or None
    cu_seqlens,  # int32 [B + 1], or None: padded
    mask,  # bool [B, T] or None
    rank,  # int32 [B, T]: places among the tokens that count; or None
    head_mask,  # fp32 [B, H], rows head_mask_stride elements apart; or None
    head_mask_stride,
    seed,  # int64 [1], or None: no dropout
    threshold: tl.uint32,  # of 2^32, the share that is dropped
    keep,  # 1 / (1 - p)
    batch,  # B
    length,  # T; 0: packed
    longest,  # T, or what the host promises of packed sequences; 0: nothing
    tokens,  # N or B T
    H,
    c,  # scale · log2(e)
    KNOWN: tl.constexpr,  # longest is
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONE_TILE: tl.constexpr,  # no sequence has more than BLOCK_N rows
):
    head = tl.program_id(0) % H
    b, first = find_block(tl.program_id(0) // H, cu_seqlens, batch, longest, BLOCK_M, KNOWN)
    begin, rows, count = find_sequence(b, cu_seqlens, mask, length, tokens)
    if first >= rows:
        return
    if KNOWN and cu_seqlens is not None:
        if ONE_TILE:  # noqa: SIM102
            if rows > BLOCK_N:
                if first == 0:
                    spoil(o, b, begin, head, 0, rows, BLOCK_M, D, BLOCK_D)
                return
        if first == 0:
            spoil(o, b, begin, head, tl.cdiv(longest, BLOCK_M) * BLOCK_M, rows, BLOCK_M, D, BLOCK_D)
    query = first + tl.arange(0, BLOCK_M)
    m_h = head_mask_of(head_mask, head_mask_stride, b, head)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m, z = tl.full([BLOCK_M], LOWEST, tl.float32), tl.zeros([BLOCK_M], tl.float32)
    place = head.to(tl.int64) * tokens + b.to(tl.int64) * length + begin + query
    dead = first >= count
    if unmasked is None:
        dead |= m_h == 0.0
    if dead:
        _store_outputs(
            o, unmasked, stats, b, begin, head, first, place, query < rows, H, tokens, acc, acc, m, z,
            BLOCK_M, D, BLOCK_D,
        )  # fmt: skip
        return

    if mask is not None:
        mask += b.to(tl.int64) * length
    if rank is not None:
        rank += b.to(tl.int64) * length
    counted = counts(mask, query, count)
    bits = None
    if seed is not None:
        bits = random_bits(seed, b.to(tl.int64) * H + head, place_of(rank, query, counted))
    q_tile = load_rows(head_of(q, b, begin, head), q.token, first, counted, BLOCK_M, D, BLOCK_D)
    k_head, v_head = head_of(k, b, begin, head), head_of(v, b, begin, head)
    if ONE_TILE:
        acc, m, z = _fold(
            acc, m, z, q_tile, k_head, v_head, k.token, v.token, 0 * first, count, mask, rank, bits, threshold, c,
            False, True, D, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    else:
        whole = count // BLOCK_N * BLOCK_N if mask is None else 0
        for start in range(0, whole, BLOCK_N):
            acc, m, z = _fold(
                acc, m, z, q_tile, k_head, v_head, k.token, v.token, start, count, mask, rank, bits, threshold, c,
                True, False, D, BLOCK_D, BLOCK_N,
            )  # fmt: skip
        for start in range(whole, count, BLOCK_N):
            acc, m, z = _fold(
                acc, m, z, q_tile, k_head, v_head, k.token, v.token, start, count, mask, rank, bits, threshold, c,
                False, False, D, BLOCK_D, BLOCK_N,
            )  # fmt: skip

    one_over_z = 1 / z
    acc *= (keep * one_over_z)[:, None]
    out = acc
    if head_mask is not None:
        out = tl.where(m_h == 0.0, 0.0, out * m_h)
    if mask is not None:
        out = tl.where(counted[:, None], out, 0.0)
    _store_outputs(
        o, unmasked, stats, b, begin, head, first, place, query < rows, H, tokens, out, acc, m, one_over_z,
        BLOCK_M, D, BLOCK_D,
    )  # fmt: skip


# Launch ------------------------------------------------------------------------------------------------------


def blocks(q: torch.Tensor, cu_seqlens: torch.Tensor | None, block: int, max_length: int) -> int:
    """Enough blocks of ``block`` rows for every sequence, whatever the lengths."""
    if cu_seqlens is None:
        return q.shape[0] * triton.cdiv(q.shape[1], block)
    if max_length > 0:
        return (cu_seqlens.shape[0] - 1) * triton.cdiv(max_length, block)
    return q.shape[0] // block + cu_seqlens.shape[0] - 1


def longest(q: torch.Tensor, max_length: int) -> int:
    """A bound for the length of a sequence: T, what is promised, or N."""
    return min(q.shape[-3], max_length or q.shape[-3])


def call_arguments(
    q: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    head_mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
    scale: float,
    max_length: int,
) -> tuple[tuple[Any, ...], dict[str, int]]:
    """The arguments that all kernels take after their tensors of heads, and their constants."""
    padded = cu_seqlens is None
    rank = None
    if seed is not None and attention_mask is not None:
        rank = attention_mask.cumsum(1, dtype=torch.int32) - 1  # [B, T]
    arguments = (
        cu_seqlens,
        attention_mask,
        rank,
        head_mask,
        0 if head_mask is None else head_mask.stride(0),
        seed,
        int(dropout_p * 2**32),
        1 / (1 - dropout_p),
        q.shape[0] if padded else cu_seqlens.shape[0] - 1,
        q.shape[1] if padded else 0,
        q.shape[1] if padded else max_length,
        q.shape[0] * q.shape[1] if padded else q.shape[0],
        q.shape[-2],
        scale * LOG2E,
    )
    size = q.shape[-1]
    return arguments, {"KNOWN": padded or max_length > 0, "D": size, "BLOCK_D": max(16, triton.next_power_of_2(size))}


def mean_length(q: torch.Tensor, cu_seqlens: torch.Tensor | None) -> int:
    """What is known about lengths without asking the device."""
    return q.shape[1] if cu_seqlens is None else q.shape[0] // max(cu_seqlens.shape[0] - 1, 1)


def key(q: torch.Tensor, cu_seqlens: torch.Tensor | None) -> str:
    """What a configuration depends on: dtype, head size, mean length."""
    mean = mean_length(q, cu_seqlens)
    bucket = next((f"S<={bound}" for bound in (64, 128, 512) if mean <= bound), "S>512")
    return f"{str(q.dtype)[6:]},D={triton.next_power_of_2(q.shape[-1])},{bucket}"


def tile(block_m: int, block_n: int, num_warps: int, num_stages: int) -> tuning.Config:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}


def _candidates(q: torch.Tensor, cu_seqlens: torch.Tensor | None) -> list[tuning.Config]:
    row = max(16, triton.next_power_of_2(q.shape[-1])) * q.element_size()  # bytes
    if q.element_size() == 4:  # float32 products run on the ordinary cores, from registers
        return [tile(32, 32, 8, 1), tile(32, 32, 4, 2)] if row <= 256 else [tile(16, 16, 4, 1), tile(16, 32, 4, 1)]
    if row > 256:
        return [tile(64, 32, 4, 2), tile(64, 64, 8, 2)]
    if row > 128:
        return [tile(128, 64, 8, 2), tile(64, 64, 4, 2), tile(64, 64, 4, 3)]
    mean = mean_length(q, cu_seqlens)
    if mean <= 64:
        return [tile(64, 64, 4, 2), tile(32, 64, 2, 2), tile(32, 64, 4, 2)]
    if mean <= 128:
        return [tile(128, 128, 8, 2), tile(64, 128, 4, 2), tile(64, 64, 4, 2)]
    return [tile(128, 64, 8, 3), tile(128, 128, 8, 2), tile(128, 128, 8, 3), tile(64, 64, 4, 3)]


def attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    head_mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
    scale: float,
    o: torch.Tensor,
    unmasked: torch.Tensor | None = None,
    stats: torch.Tensor | None = None,
    max_length: int = 0,
) -> None:
    """Write the output, and what backward needs where a tensor is given for it.

    Args:
        q, k, v: [N, H, D] or [B, T, H, D] float32, bfloat16 or float16; any strides, the last 1.
        cu_seqlens: int32 [B + 1], contiguous; None: padded.
        attention_mask: bool [B, T], contiguous; None: no padding.
        head_mask: float32 [B, H], last stride 1; None: 1.
        seed: int64 [1]; None: no dropout.
        dropout_p, scale: as for the op.
        o: shape and dtype of q, last stride 1; gets the output, 0 at padding and where the head mask is 0.
        unmasked: as o; gets the output before the head mask. A head of mask 0 is computed only if this is given.
        stats: float32 [2, H, N] or [2, H, B T], contiguous; gets m and 1 / Z of each query.
        max_length: that no packed sequence exceeds; 0: nothing is known.
    """
    if q.numel() == 0:
        return
    arguments, constants = call_arguments(q, cu_seqlens, attention_mask, head_mask, seed, dropout_p, scale, max_length)

    def launch(config: tuning.Config) -> None:
        with torch.cuda.device_of(q):
            _attention_fwd_kernel[(blocks(q, cu_seqlens, config["BLOCK_M"], max_length) * q.shape[-2],)](
                *(heads(x) for x in (q, k, v, o)),
                None if unmasked is None else heads(unmasked),
                stats,
                *arguments,
                **constants,
                ONE_TILE=longest(q, max_length) <= config["BLOCK_N"],
                enable_fp_fusion=True,
                **config,
            )

    launch(tuning.pick("attention_fwd", key(q, cu_seqlens), _candidates(q, cu_seqlens), q.device, launch))
