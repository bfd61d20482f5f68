"""Attention of packed or padded sequences, backward. With p and drop as in forward, g = d loss / d o and o not masked:

    dp = drop(g vᵀ)     r = rowsum(p ∘ dp) = rowsum(g ∘ o)     ds = p ∘ (dp − r)
    dv = m_h · drop(p)ᵀ g         dq = m_h · scale · ds k         dk = m_h · scale · dsᵀ q         dm_h = Σ r

A sequence of up to BLOCK tokens is one tile: one program a head does all of it, from q, k, v and g alone. A longer one
takes two kernels, which make p again from the kept m and 1 / Z: the first, a program a block of queries, sums dq over
the keys and leaves r; the second, a program a block of keys, sums dk and dv over the queries, and dm in the program of
the first block. Seven products where five would do with atomics, but the same bits every run.

Where the host does not know which sequences of a packed batch are longer, it launches all three, and each program
returns at once where another kernel serves. What a sequence has beyond the length that it promises is NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from distilbert_fast.kernels import tuning
from distilbert_fast.kernels.attention import PLAIN, blocks, call_arguments, key, longest, mean_length, scores, tile
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
    store_gradient,
)


@triton.jit(do_not_specialize=PLAIN)
def _attention_bwd_short_kernel(
    q,  # Heads of [N, H, D] or [B, T, H, D]
    k,
    v,
    do,
    dq,
    dk,
    dv,
    dm,  # fp32 [B, H] or None
    cu_seqlens,  # from here on as in forward
    mask,
    rank,
    head_mask,
    head_mask_stride,
    seed,
    threshold: tl.uint32,
    keep,
    batch,
    length,
    longest,
    tokens,
    H,
    c,
    scale,
    KNOWN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,  # all four matrices are loaded before the first product; on Ampere that would spill
):
    head, b = tl.program_id(0) % H, tl.program_id(0) // H
    begin, rows, count = find_sequence(b, cu_seqlens, mask, length, tokens)
    if rows > BLOCK:
        if KNOWN and cu_seqlens is not None:  # noqa: SIM102  (nobody else computes it where it was to be short)
            if longest <= BLOCK:
                spoil(dq, b, begin, head, 0, rows, BLOCK, D, BLOCK_D)
                spoil(dk, b, begin, head, 0, rows, BLOCK, D, BLOCK_D)
                spoil(dv, b, begin, head, 0, rows, BLOCK, D, BLOCK_D)
        return
    m_h = head_mask_of(head_mask, head_mask_stride, b, head)
    first = 0 * b
    row = tl.arange(0, BLOCK)
    if mask is not None:
        mask += b.to(tl.int64) * length
    if rank is not None:
        rank += b.to(tl.int64) * length
    counted = counts(mask, row, count)
    dead = count == 0
    if dm is None:
        dead |= m_h == 0.0
    else:
        tl.store(dm + b.to(tl.int64) * H + head, 0.0, mask=dead)
    if dead:
        zeros = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        store_gradient(dq, b, begin, head, first, zeros, m_h * scale, counted, rows, BLOCK, D, BLOCK_D)
        store_gradient(dk, b, begin, head, first, zeros, m_h * scale, counted, rows, BLOCK, D, BLOCK_D)
        store_gradient(dv, b, begin, head, first, zeros, m_h * scale, counted, rows, BLOCK, D, BLOCK_D)
        return

    queries = load_rows(head_of(q, b, begin, head), q.token, first, counted, BLOCK, D, BLOCK_D)
    keys = load_rows(head_of(k, b, begin, head), k.token, first, counted, BLOCK, D, BLOCK_D)
    if EARLY:
        g = load_rows(head_of(do, b, begin, head), do.token, first, counted, BLOCK, D, BLOCK_D)
        values = load_rows(head_of(v, b, begin, head), v.token, first, counted, BLOCK, D, BLOCK_D)
    s = scores(queries, keys, counted)  # [BLOCK, BLOCK]
    e = tl.exp2(s * c - (tl.max(s, axis=1) * c)[:, None])
    p = e * (1 / tl.sum(e, axis=1))[:, None]
    if not EARLY:
        g = load_rows(head_of(do, b, begin, head), do.token, first, counted, BLOCK, D, BLOCK_D)
        values = load_rows(head_of(v, b, begin, head), v.token, first, counted, BLOCK, D, BLOCK_D)
    dp = scores(g, values, None)
    dropped = p
    if seed is not None:
        place = place_of(rank, row, counted)
        bits = random_bits(seed, b.to(tl.int64) * H + head, place)
        kept = is_kept(bits[:, None], place[None, :], threshold)
        dropped = tl.where(kept, p, 0.0)
        dp = tl.where(kept, dp * keep, 0.0)
    r = tl.sum(p * dp, axis=1)
    if dm is not None:
        tl.store(dm + b.to(tl.int64) * H + head, tl.sum(r, axis=0))
    ds = (p * (dp - r[:, None])).to(queries.dtype)
    x = tl.dot(tl.trans(dropped.to(g.dtype)), g, input_precision="ieee")
    store_gradient(dv, b, begin, head, first, x, m_h * keep, counted, rows, BLOCK, D, BLOCK_D)
    x = tl.dot(ds, keys, input_precision="ieee")
    store_gradient(dq, b, begin, head, first, x, m_h * scale, counted, rows, BLOCK, D, BLOCK_D)
    x = tl.dot(tl.trans(ds), queries, input_precision="ieee")
    store_gradient(dk, b, begin, head, first, x, m_h * scale, counted, rows, BLOCK, D, BLOCK_D)


@triton.jit
def _add_dq(
    acc,  # [BLOCK_M, BLOCK_D] so far
    queries,  # tiles [BLOCK_M, BLOCK_D]
    g,
    m,  # [BLOCK_M]
    one_over_z,
    r,
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
    keep,
    c,
    WHOLE: tl.constexpr,  # all keys of the block count
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add ds k over the block of keys that begins at ``start``."""
    row = start + tl.arange(0, BLOCK_N)
    counted = None if WHOLE else counts(mask, row, count)
    keys = load_rows(k, k_stride, start, counted, BLOCK_N, D, BLOCK_D)
    p = tl.exp2(scores(queries, keys, counted) * c - m[:, None]) * one_over_z[:, None]  # [BLOCK_M, BLOCK_N]
    dp = scores(g, load_rows(v, v_stride, start, counted, BLOCK_N, D, BLOCK_D), None)
    if bits is not None:
        kept = is_kept(bits[:, None], place_of(rank, row, row < count)[None, :], threshold)
        dp = tl.where(kept, dp * keep, 0.0)
    return tl.dot((p * (dp - r[:, None])).to(keys.dtype), keys, acc, input_precision="ieee")


@triton.jit(do_not_specialize=PLAIN)
def _attention_bwd_dq_kernel(
    q,
    k,
    v,
    do,
    o,  # Heads: before the head mask if dm is wanted, else after it
    stats,  # fp32 [2, H, tokens]: m and 1 / Z
    dq,
    delta,  # fp32 [H, tokens]; gets r
    cu_seqlens,
    mask,
    rank,
    head_mask,
    head_mask_stride,
    seed,
    threshold: tl.uint32,
    keep,
    batch,
    length,
    longest,
    tokens,
    H,
    c,
    scale,
    SHORT: tl.constexpr,  # sequences of up to so many rows are served by the short kernel
    DM: tl.constexpr,
    KNOWN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = tl.program_id(0) % H
    b, first = find_block(tl.program_id(0) // H, cu_seqlens, batch, longest, BLOCK_M, KNOWN)
    begin, rows, count = find_sequence(b, cu_seqlens, mask, length, tokens)
    if (rows <= SHORT) | (first >= rows):
        return
    if KNOWN and cu_seqlens is not None:  # noqa: SIM102
        if first == 0:
            spoil(dq, b, begin, head, tl.cdiv(longest, BLOCK_M) * BLOCK_M, rows, BLOCK_M, D, BLOCK_D)
    query = first + tl.arange(0, BLOCK_M)
    if mask is not None:
        mask += b.to(tl.int64) * length
    if rank is not None:
        rank += b.to(tl.int64) * length
    counted = counts(mask, query, count)
    m_h = head_mask_of(head_mask, head_mask_stride, b, head)
    live = (first < count) & (m_h != 0.0)
    measured = live  # r is wanted
    if DM:
        measured = first < count
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if measured:
        g = load_rows(head_of(do, b, begin, head), do.token, first, counted, BLOCK_M, D, BLOCK_D)
        out = load_rows(head_of(o, b, begin, head), o.token, first, counted, BLOCK_M, D, BLOCK_D)
        r = tl.sum(g.to(tl.float32) * out.to(tl.float32), axis=1)
        if not DM:
            r /= m_h
        place = head.to(tl.int64) * tokens + b.to(tl.int64) * length + begin + query
        tl.store(delta + place, r, mask=counted)
        if live:
            bits = None
            if seed is not None:
                bits = random_bits(seed, b.to(tl.int64) * H + head, place_of(rank, query, counted))
            queries = load_rows(head_of(q, b, begin, head), q.token, first, counted, BLOCK_M, D, BLOCK_D)
            m = tl.load(stats + place, mask=counted, other=0.0)
            one_over_z = tl.load(stats + H.to(tl.int64) * tokens + place, mask=counted, other=0.0)
            k_head, v_head = head_of(k, b, begin, head), head_of(v, b, begin, head)
            whole = count // BLOCK_N * BLOCK_N if mask is None else 0
            for start in range(0, whole, BLOCK_N):
                acc = _add_dq(
                    acc, queries, g, m, one_over_z, r, k_head, v_head, k.token, v.token, start, count, mask, rank,
                    bits, threshold, keep, c, True, D, BLOCK_D, BLOCK_N,
                )  # fmt: skip
            for start in range(whole, count, BLOCK_N):
                acc = _add_dq(
                    acc, queries, g, m, one_over_z, r, k_head, v_head, k.token, v.token, start, count, mask, rank,
                    bits, threshold, keep, c, False, D, BLOCK_D, BLOCK_N,
                )  # fmt: skip
    store_gradient(dq, b, begin, head, first, acc, m_h * scale, counted, rows, BLOCK_M, D, BLOCK_D)


@triton.jit(do_not_specialize=PLAIN)
def _attention_bwd_dkv_kernel(
    q,
    k,
    v,
    do,
    stats,  # fp32 [2, H, tokens]: m and 1 / Z
    delta,  # fp32 [H, tokens]: r
    dk,
    dv,
    dm,  # fp32 [B, H] or None
    cu_seqlens,
    mask,
    rank,
    head_mask,
    head_mask_stride,
    seed,
    threshold: tl.uint32,
    keep,
    batch,
    length,
    longest,
    tokens,
    H,
    c,
    scale,
    SHORT: tl.constexpr,
    KNOWN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = tl.program_id(0) % H
    b, first = find_block(tl.program_id(0) // H, cu_seqlens, batch, longest, BLOCK_N, KNOWN)
    begin, rows, count = find_sequence(b, cu_seqlens, mask, length, tokens)
    if (rows <= SHORT) | (first >= rows):
        return
    if KNOWN and cu_seqlens is not None:  # noqa: SIM102
        if first == 0:
            spoil(dk, b, begin, head, tl.cdiv(longest, BLOCK_N) * BLOCK_N, rows, BLOCK_N, D, BLOCK_D)
            spoil(dv, b, begin, head, tl.cdiv(longest, BLOCK_N) * BLOCK_N, rows, BLOCK_N, D, BLOCK_D)
    row = first + tl.arange(0, BLOCK_N)
    if mask is not None:
        mask += b.to(tl.int64) * length
    if rank is not None:
        rank += b.to(tl.int64) * length
    counted = counts(mask, row, count)
    m_h = head_mask_of(head_mask, head_mask_stride, b, head)
    base = head.to(tl.int64) * tokens + b.to(tl.int64) * length + begin
    stats += base
    delta += base
    if dm is not None:  # noqa: SIM102
        if first == 0:
            total = tl.zeros([BLOCK_M], tl.float32)
            for start in range(0, count, BLOCK_M):
                query = start + tl.arange(0, BLOCK_M)
                total += tl.load(delta + query, mask=counts(mask, query, count), other=0.0)
            tl.store(dm + b.to(tl.int64) * H + head, tl.sum(total, axis=0))

    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if (first < count) & (m_h != 0.0):
        keys = load_rows(head_of(k, b, begin, head), k.token, first, counted, BLOCK_N, D, BLOCK_D)
        values = load_rows(head_of(v, b, begin, head), v.token, first, counted, BLOCK_N, D, BLOCK_D)
        q_head, g_head = head_of(q, b, begin, head), head_of(do, b, begin, head)
        key_place = place_of(rank, row, counted)
        for start in range(0, count, BLOCK_M):
            query = start + tl.arange(0, BLOCK_M)
            asked = counts(mask, query, count)
            queries = load_rows(q_head, q.token, start, asked, BLOCK_M, D, BLOCK_D)
            m = tl.load(stats + query, mask=asked, other=0.0)
            one_over_z = tl.load(stats + H.to(tl.int64) * tokens + query, mask=asked, other=0.0)
            # Keys that do not count get rows of nonsense, which are never written; queries that do not get g = 0.
            p = tl.exp2(scores(keys, queries, None) * c - m[None, :]) * one_over_z[None, :]  # [BLOCK_N, BLOCK_M]
            g = load_rows(g_head, do.token, start, asked, BLOCK_M, D, BLOCK_D)
            dp = scores(values, g, None)
            dropped = p
            if seed is not None:
                bits = random_bits(seed, b.to(tl.int64) * H + head, place_of(rank, query, asked))
                kept = is_kept(bits[None, :], key_place[:, None], threshold)
                dropped = tl.where(kept, p, 0.0)
                dp = tl.where(kept, dp * keep, 0.0)
            dv_acc = tl.dot(dropped.to(g.dtype), g, dv_acc, input_precision="ieee")
            r = tl.load(delta + query, mask=asked, other=0.0)
            ds = (p * (dp - r[None, :])).to(queries.dtype)
            dk_acc = tl.dot(ds, queries, dk_acc, input_precision="ieee")
    store_gradient(dk, b, begin, head, first, dk_acc, m_h * scale, counted, rows, BLOCK_N, D, BLOCK_D)
    store_gradient(dv, b, begin, head, first, dv_acc, m_h * keep, counted, rows, BLOCK_N, D, BLOCK_D)


# Launch ------------------------------------------------------------------------------------------------------


def _row_bytes(q: torch.Tensor) -> int:
    return max(16, triton.next_power_of_2(q.shape[-1])) * q.element_size()


def _short_candidates(q: torch.Tensor, cu_seqlens: torch.Tensor | None, max_length: int = 0) -> list[tuning.Config]:
    """One BLOCK for all of them, since it says which sequences the kernel serves."""
    row = _row_bytes(q)
    most = 128 if row <= 128 else 64 if row <= 256 else 32 if row <= 512 else 16
    if q.element_size() == 4:
        most = min(most, 32)
    if mean_length(q, cu_seqlens) <= 64:
        most = min(most, 64)
    block = min(most, triton.next_power_of_2(max(longest(q, max_length), 16)))
    return [{"BLOCK": block, "num_warps": warps} for warps in ((8,) if block == 128 else (4, 8))]  # 4 would spill


def _candidates(q: torch.Tensor, own: str) -> list[tuning.Config]:
    """``own`` names the tile that a program keeps: BLOCK_M in the dq kernel, BLOCK_N in the dk, dv kernel."""
    row = _row_bytes(q)
    if q.element_size() == 4:
        return [tile(32, 32, 8, 1), tile(16, 32, 4, 1)] if row <= 256 else [tile(16, 16, 4, 1), tile(32, 16, 4, 1)]
    if row > 256:
        return [tile(32, 32, 4, 1), tile(64, 32, 8, 1)]
    if row > 128:
        return [tile(64, 64, 8, 2), tile(64, 64, 4, 1)]
    wide = (128, 64) if own == "BLOCK_M" else (64, 128)
    return [tile(*wide, 8, 2), tile(*wide, 8, 3), tile(64, 64, 4, 2), tile(64, 64, 4, 3), tile(128, 128, 8, 2)]


def attention_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    stats: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    head_mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
    scale: float,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    dm: torch.Tensor | None,
    delta: torch.Tensor,
    max_length: int = 0,
) -> None:
    """Write the gradients from what ``attention_fwd`` kept.

    Args:
        do: upstream gradient, shape and dtype of q, any strides, the last 1.
        q, k, v, cu_seqlens, attention_mask, head_mask, seed, dropout_p, scale: as given to ``attention_fwd``.
        o: its ``unmasked`` if dm is wanted, else its output.
        stats: float32 [2, H, N] or [2, H, B T].
        dq, dk, dv: shape and dtype of q, last stride 1; 0 at padding and where the head mask is 0.
        dm: float32 [B, H], contiguous, gets the gradient of the head mask; or None.
        delta: float32 [H, N] or [H, B T], contiguous; working memory.
        max_length: as given to ``attention_fwd``.
    """
    if q.numel() == 0:
        if dm is not None:
            dm.zero_()
        return
    arguments, constants = call_arguments(q, cu_seqlens, attention_mask, head_mask, seed, dropout_p, scale, max_length)
    arguments = (*arguments, float(scale))
    inputs = [heads(x) for x in (q, k, v, do)]
    count = q.shape[-2]
    batch = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    early = not q.is_cuda or tuning.architecture(q.device.index) >= 90

    def short(config: tuning.Config) -> None:
        with torch.cuda.device_of(q):
            _attention_bwd_short_kernel[(batch * count,)](
                *inputs, *(heads(x) for x in (dq, dk, dv)), dm, *arguments,
                **constants, EARLY=early, enable_fp_fusion=True, **config,
            )  # fmt: skip

    one_tile = tuning.pick(
        "attention_bwd_short", key(q, cu_seqlens), _short_candidates(q, cu_seqlens, max_length), q.device, short
    )
    bound = one_tile["BLOCK"]
    if cu_seqlens is not None or longest(q, max_length) <= bound:
        short(one_tile)
    if longest(q, max_length) <= bound:
        return

    def queries(config: tuning.Config) -> None:
        with torch.cuda.device_of(q):
            _attention_bwd_dq_kernel[(blocks(q, cu_seqlens, config["BLOCK_M"], max_length) * count,)](
                *inputs, heads(o), stats, heads(dq), delta, *arguments,
                **constants, SHORT=bound, DM=dm is not None, enable_fp_fusion=True, **config,
            )  # fmt: skip

    def keys(config: tuning.Config) -> None:
        with torch.cuda.device_of(q):
            _attention_bwd_dkv_kernel[(blocks(q, cu_seqlens, config["BLOCK_N"], max_length) * count,)](
                *inputs, stats, delta, heads(dk), heads(dv), dm, *arguments,
                **constants, SHORT=bound, enable_fp_fusion=True, **config,
            )  # fmt: skip

    for name, own, launch in (("attention_bwd_dq", "BLOCK_M", queries), ("attention_bwd_dkv", "BLOCK_N", keys)):
        launch(tuning.pick(name, key(q, cu_seqlens), _candidates(q, own), q.device, launch))
