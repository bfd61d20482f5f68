"""Softmax-temperature KL divergence of logit rows: one program a row, nothing of size [N, V] but the gradient.

With s, t = student, teacher logits, c = log2(e) / τ, and of each side the maximum m and Z = Σ exp2(c (x − m)):

    W          = Σ exp2(c (t − m_t)) ((t − m_t) − (s − m_s))       measured from the maxima: a common offset cancels
    loss       = τ (W / Z_t − τ ln(Z_t / Z_s))                      = τ² Σ p_t (log p_t − log p_s)
    d loss / d s = τ (exp2(c (s − m_s)) / Z_s − exp2(c (t − m_t)) / Z_t)

Forward: pass 1 reads both rows for m, Z and W. Pass 2, if the gradient is wanted, reads them again from their end,
which the caches still hold, and writes it. So each of the three [N, V] matrices crosses memory once.
Backward, where forward kept only m and Z, is pass 2 alone. Where it kept the gradient, that is multiplied by the
upstream gradient, which only the device knows: ``scale_gradient`` looks at it, and where it is 1 reads nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from distilbert_fast.kernels import tuning
from distilbert_fast.kernels.common import (
    LOG2E,
    LOWEST,
    body_offset,
    body_tile,
    divergence,
    edge_tile,
    fold_divergence,
    logits_configuration,
    merge_lanes,
    rows_key,
    split_row,
)

SCALED = 8192  # numbers of a gradient that a program multiplies at a time
SCALING_PROGRAMS = 1024  # enough for any GPU, few enough to be gone at once where the factor is 1


@triton.jit
def _fold(student, teacher, columns, valid, c, m_s, z_s, m_t, z_t, w):
    """Pass 1 over one tile: fold it into the lanes' statistics [LANES] of both sides, w in UNITs."""
    s = tl.load(student + columns, mask=valid, other=float("-inf")).to(tl.float32)  # [LANES, K]
    t = tl.load(teacher + columns, mask=valid, other=float("-inf")).to(tl.float32)
    m_s, z_s, m_t, z_t, w, _, _, _ = fold_divergence(s, t, valid, c, m_s, z_s, m_t, z_t, w)
    return m_s, z_s, m_t, z_t, w


@triton.jit
def _store_gradient(student, teacher, gradient, columns, valid, c, m_s, k_s, m_t, k_t):
    """Pass 2 over one tile: k_s exp2(c (s − m_s)) − k_t exp2(c (t − m_t))."""
    s = tl.load(student + columns, mask=valid, other=0.0, eviction_policy="evict_first").to(tl.float32)
    t = tl.load(teacher + columns, mask=valid, other=0.0, eviction_policy="evict_first").to(tl.float32)
    ds = k_s * tl.exp2((s - m_s) * c) - k_t * tl.exp2((t - m_t) * c)
    tl.store(gradient + columns, ds.to(gradient.dtype.element_ty), mask=valid)


@triton.jit
def _store_zeros(gradient, head, body, V, LANES: tl.constexpr, GROUP: tl.constexpr):
    """The gradient of a row that does not count."""
    edges, valid = edge_tile(head, body, V, LANES, GROUP)
    tl.store(gradient + edges, tl.zeros_like(edges).to(gradient.dtype.element_ty), mask=valid)
    for block in range(tl.cdiv(body, LANES * GROUP)):
        columns, valid = body_tile(block, body, LANES, GROUP)
        tl.store(gradient + columns, tl.zeros_like(columns).to(gradient.dtype.element_ty), mask=valid)


@triton.jit
def _store_stats(stats, m_s, z_s, m_t, z_t):
    tl.store(stats, m_s)
    tl.store(stats + 1, z_s)
    tl.store(stats + 2, m_t)
    tl.store(stats + 3, z_t)


@triton.jit
def _kl_div_fwd_kernel(
    student,  # [N, V], rows student_stride elements apart
    teacher,  # [N, V]
    mask,  # bool [N], True = counted, or None
    scale,  # fp32 scalar: the gradient is multiplied by it
    rows,  # fp32 [N]: loss
    stats,  # fp32 [N, 4]: m_s, Z_s, m_t, Z_t; or None
    gradient,  # [N, V] or None
    student_stride,
    teacher_stride,
    gradient_stride,
    mask_stride,
    V,
    temperature,
    c,  # log2(e) / temperature
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head, body = split_row(row * student_stride, V, GROUP)
    student += body_offset(row * student_stride, head, ALIGNED, GROUP)
    teacher += body_offset(row * teacher_stride, head, ALIGNED, GROUP)
    if gradient is not None:
        gradient += body_offset(row * gradient_stride, head, ALIGNED, GROUP)
    if mask is not None:  # noqa: SIM102  (a branch of its own: without a mask nothing below it is compiled)
        if tl.load(mask + row * mask_stride) == 0:
            tl.store(rows + row, 0.0)
            if stats is not None:
                _store_stats(stats + 4 * row, 0.0, 1.0, 0.0, 1.0)
            if gradient is not None:
                _store_zeros(gradient, head, body, V, LANES, GROUP)
            return

    low, zero = tl.full([LANES], LOWEST, tl.float32), tl.zeros([LANES], tl.float32)
    edges, valid = edge_tile(head, body, V, LANES, GROUP)
    m_s, z_s, m_t, z_t, w = _fold(student, teacher, edges, valid, c, low, zero, low, zero, zero)
    blocks = tl.cdiv(body, LANES * GROUP)
    for block in tl.range(blocks, num_stages=STAGES):
        columns, valid = body_tile(block, body, LANES, GROUP)
        m_s, z_s, m_t, z_t, w = _fold(student, teacher, columns, valid, c, m_s, z_s, m_t, z_t, w)

    m_s, z_s, m_t, z_t, w = merge_lanes(m_s, z_s, m_t, z_t, w, c)
    tl.store(rows + row, divergence(z_s, z_t, w, temperature))
    if stats is not None:
        _store_stats(stats + 4 * row, m_s, z_s, m_t, z_t)
    if gradient is not None:
        k_s, k_t = temperature * tl.load(scale) / z_s, temperature * tl.load(scale) / z_t
        for done in tl.range(blocks, num_stages=STAGES):
            columns, valid = body_tile(blocks - 1 - done, body, LANES, GROUP)
            _store_gradient(student, teacher, gradient, columns, valid, c, m_s, k_s, m_t, k_t)
        edges, valid = edge_tile(head, body, V, LANES, GROUP)
        _store_gradient(student, teacher, gradient, edges, valid, c, m_s, k_s, m_t, k_t)


@triton.jit
def _kl_div_bwd_kernel(
    student,  # [N, V], rows student_stride elements apart
    teacher,  # [N, V]
    mask,  # bool [N], True = counted, or None
    drows,  # fp32 [N]: upstream gradient
    stats,  # fp32 [N, 4]: m_s, Z_s, m_t, Z_t
    dstudent,  # [N, V]
    student_stride,
    teacher_stride,
    dstudent_stride,
    mask_stride,
    V,
    temperature,
    c,  # log2(e) / temperature
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head, body = split_row(row * student_stride, V, GROUP)
    student += body_offset(row * student_stride, head, ALIGNED, GROUP)
    teacher += body_offset(row * teacher_stride, head, ALIGNED, GROUP)
    dstudent += body_offset(row * dstudent_stride, head, ALIGNED, GROUP)
    if mask is not None:  # noqa: SIM102  (a branch of its own: without a mask nothing below it is compiled)
        if tl.load(mask + row * mask_stride) == 0:
            _store_zeros(dstudent, head, body, V, LANES, GROUP)
            return

    stats += 4 * row
    k = temperature * tl.load(drows + row)
    m_s, k_s = tl.load(stats), k / tl.load(stats + 1)
    m_t, k_t = tl.load(stats + 2), k / tl.load(stats + 3)
    edges, valid = edge_tile(head, body, V, LANES, GROUP)
    _store_gradient(student, teacher, dstudent, edges, valid, c, m_s, k_s, m_t, k_t)
    for block in tl.range(tl.cdiv(body, LANES * GROUP), num_stages=STAGES):
        columns, valid = body_tile(block, body, LANES, GROUP)
        _store_gradient(student, teacher, dstudent, columns, valid, c, m_s, k_s, m_t, k_t)


@triton.jit(do_not_specialize=["size"])
def _scale_gradient_kernel(
    gradient,  # [size]
    factor,  # fp32 [1]
    size,
    BLOCK: tl.constexpr,
):
    by = tl.load(factor)
    if by == 1.0:
        return
    for block in tl.range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0)):
        place = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < size
        x = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(gradient + place, (x * by).to(gradient.dtype.element_ty), mask=inside)


def configurations(student: torch.Tensor, teacher: torch.Tensor, dstudent: torch.Tensor | None) -> list[tuning.Config]:
    """Tile, stages and warps, the default first, and whether all rows start at one place between multiples of 16 bytes.

    More warps a row leave fewer rows on a multiprocessor, and so more of each in the L2 cache for pass 2.
    """
    tile = logits_configuration(student.shape[1], max(student.element_size(), teacher.element_size()))
    others = [teacher] if dstudent is None else [teacher, dstudent]
    tile["ALIGNED"] = all((x.stride(0) - student.stride(0)) % tile["GROUP"] == 0 for x in others)
    found = [tile, tile | {"STAGES": 2}]
    for times, stages in ((2, 3), (2, 2), (4, 2)):
        lanes, warps = times * tile["LANES"], times * tile["num_warps"]
        if lanes * tile["GROUP"] <= student.shape[1] and warps <= 32:
            found.append(tile | {"LANES": lanes, "num_warps": warps, "STAGES": stages})
    return found


def kl_div_fwd(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    scale: torch.Tensor,
    temperature: float,
    rows: torch.Tensor,
    stats: torch.Tensor | None,
    gradient: torch.Tensor | None,
) -> None:
    """Write the row losses, and the softmax statistics and the gradient where a tensor is given for them.

    Args:
        student, teacher: [N, V] float32, bfloat16 or float16; any row stride, last stride 1.
        mask: bool [N] of any stride, or None.
        scale: float32 scalar that multiplies the gradient.
        temperature: τ > 0.
        rows: float32 [N], contiguous; gets the loss, 0 in rows that do not count.
        stats: float32 [N, 4], contiguous; gets m_s, Z_s, m_t, Z_t.
        gradient: [N, V], any row stride, last stride 1; gets scale · d rows / d student.
    """
    _launch("kl_div_fwd", _kl_div_fwd_kernel, student, teacher, mask, temperature, gradient, scale, rows, stats)


def kl_div_bwd(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    drows: torch.Tensor,
    stats: torch.Tensor,
    temperature: float,
    dstudent: torch.Tensor,
) -> None:
    """Write the gradient from the statistics that ``kl_div_fwd`` kept.

    Args:
        student, teacher, mask, temperature: as given to ``kl_div_fwd``.
        drows: float32 [N], contiguous; the upstream gradient of each row's loss.
        stats: float32 [N, 4], contiguous.
        dstudent: [N, V], any row stride, last stride 1; gets drows · d rows / d student.
    """
    _launch("kl_div_bwd", _kl_div_bwd_kernel, student, teacher, mask, temperature, dstudent, drows, stats)


def scale_gradient(gradient: torch.Tensor, factor: torch.Tensor) -> None:
    """gradient *= factor, in float32; nothing is read or written where the factor is 1.

    Args:
        gradient: contiguous, float32, bfloat16 or float16.
        factor: float32 [] or [1].
    """
    if gradient.numel() == 0:
        return
    with torch.cuda.device_of(gradient):
        blocks = triton.cdiv(gradient.numel(), SCALED)
        _scale_gradient_kernel[(min(blocks, SCALING_PROGRAMS),)](
            gradient, factor, gradient.numel(), BLOCK=SCALED, num_warps=8
        )


def _launch(
    name: str,
    kernel: Any,
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    temperature: float,
    gradient: torch.Tensor | None,
    *others: torch.Tensor | None,
) -> None:
    """Launch a program a row.

    Args:
        name: of the kernel in the tables of configurations.
        others: what the kernel takes between the mask and the gradient.
    """
    if student.shape[0] == 0:
        return

    def launch(config: tuning.Config) -> None:
        with torch.cuda.device_of(student):
            kernel[(student.shape[0],)](
                student,
                teacher,
                mask,
                *others,
                gradient,
                student.stride(0),
                teacher.stride(0),
                0 if gradient is None else gradient.stride(0),
                0 if mask is None else mask.stride(0),
                student.shape[1],
                float(temperature),  # Triton would compile again for an int
                LOG2E / temperature,
                enable_fp_fusion=True,
                **config,
            )

    candidates = configurations(student, teacher, gradient)
    key = f"{rows_key((student, teacher), student.shape[1])},aligned={candidates[0]['ALIGNED']}"
    key += "" if gradient is not None else ",loss alone"
    launch(tuning.pick(name, key, candidates, student.device, launch))
