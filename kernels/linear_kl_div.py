"""The losses of linear_kl_div on a chunk of logits, and their gradients: one program a row, nothing new in memory.

    kl = τ² Σ p_t (log p_t − log p_s), p = softmax(logits / τ)       d kl / d s = τ (p_s − p_t)
    ce = −log softmax(s)[label]                                      d ce / d s = softmax(s) − onehot(label)

Logits are h Wᵀ, as a matrix product left them, plus a bias [V] that is added as they are read. Two passes over a row,
as in kl_div: one for the statistics, one, from its end, that writes the gradients. That of the KL may overwrite the
teacher's logits, that of the cross-entropy the student's: so each of the two [R, V] crosses memory once each way.
The cross-entropy knows no temperature: its exponentials at τ = 1 are those of the KL at τ = 2, squared.

A chunk is made for these kernels: its rows are padded to PAD columns, so every load and store is of 16 bytes, and the
bias is the lowest number in the padding, so no column needs a mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from distilbert_fast.kernels.common import (
    LOG2E,
    LOWEST,
    UNIT,
    body_tile,
    divergence,
    fold_divergence,
    logits_configuration,
    merge_lanes,
    online_softmax,
)

PAD = 16  # columns


@triton.jit
def _logits(x, bias, columns, valid):
    """fp32 [LANES, K]; −inf in lanes that hold no column."""
    b = tl.load(bias + columns, mask=valid, other=float("-inf")).to(tl.float32)
    return tl.load(x + columns, mask=valid, other=0.0).to(tl.float32) + b


@triton.jit
def _at_one(e, below, POWER: tl.constexpr):
    """exp(x) of below = UNIT x and e = exp(x / τ). POWER = τ where that is 1 or 2, else 0."""
    return e if POWER == 1 else e * e if POWER == 2 else tl.exp(below * (1.0 / UNIT))


# Labels and losses begin at any row of a chunk: where must not make the compiler start again.
@triton.jit(do_not_specialize_on_alignment=["labels", "kl", "ce"])
def _linear_kl_div_fwd_kernel(
    student,  # [R, width], without bias
    student_bias,  # [width], lowest in the padding
    teacher,  # [R, width] or None: these rows have no KL
    teacher_bias,
    labels,  # int64 [R] or None: these rows have no cross-entropy
    kl,  # fp32 [R]
    ce,  # fp32 [R]
    kl_gradient,  # [R, width] or None; may be teacher
    ce_gradient,  # [R, width] or None; may be student
    student_stride,
    teacher_stride,
    kl_gradient_stride,
    ce_gradient_stride,
    V,
    width,
    temperature,
    c,  # log2(e) / temperature
    POWER: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    if teacher is not None:
        teacher += row * teacher_stride
    if labels is not None:
        # Before the first barrier: once past the last, other threads overwrite the row. Out of range: NaN, no read.
        label = tl.load(labels + row)
        known = (label >= 0) & (label < V)
        at_label = tl.load(student + label, mask=known, other=float("nan")).to(tl.float32)
        at_label += tl.load(student_bias + label, mask=known, other=0.0).to(tl.float32)

    low, zero = tl.full([LANES], LOWEST, tl.float32), tl.zeros([LANES], tl.float32)
    m_s, z_s, m_t, z_t, w, z_one = low, zero, low, zero, zero, zero
    blocks = tl.cdiv(width, LANES * GROUP)
    for block in tl.range(blocks, num_stages=STAGES):
        columns, valid = body_tile(block, width, LANES, GROUP)
        s = _logits(student, student_bias, columns, valid)
        if teacher is None:
            m_s, z_one, _, _, _ = online_softmax(s, m_s, z_one, c)  # τ = 1
        else:
            t, older = _logits(teacher, teacher_bias, columns, valid), m_s
            m_s, z_s, m_t, z_t, w, below, e, shrink = fold_divergence(s, t, valid, c, m_s, z_s, m_t, z_t, w)
            if labels is not None:
                shrink = _at_one(shrink, (older - m_s) * UNIT, POWER)
                z_one = shrink * z_one + tl.sum(_at_one(e, below, POWER), axis=1)

    if labels is not None:
        row_m_s = tl.max(m_s, axis=0)
        z_one = tl.sum(tl.exp(m_s - row_m_s) * z_one, axis=0)
        tl.store(ce + row, tl.log(z_one) - (at_label - row_m_s))
    if teacher is not None:
        m_s, z_s, m_t, z_t, w = merge_lanes(m_s, z_s, m_t, z_t, w, c)
        tl.store(kl + row, divergence(z_s, z_t, w, temperature))
    else:
        m_s = row_m_s

    if kl_gradient is not None or ce_gradient is not None:
        for done in tl.range(blocks, num_stages=STAGES):
            columns, valid = body_tile(blocks - 1 - done, width, LANES, GROUP)
            s = _logits(student, student_bias, columns, valid) - m_s
            e = tl.exp2(s * c)
            if kl_gradient is not None:
                t = _logits(teacher, teacher_bias, columns, valid) - m_t
                ds = (temperature / z_s) * e - (temperature / z_t) * tl.exp2(t * c)
                out = kl_gradient + row * kl_gradient_stride + columns
                tl.store(out, ds.to(kl_gradient.dtype.element_ty), mask=valid)
            if ce_gradient is not None:
                ds = _at_one(e, s * UNIT, POWER) / z_one - tl.where(columns == label, 1.0, 0.0)
                out = ce_gradient + row * ce_gradient_stride + columns
                tl.store(out, ds.to(ce_gradient.dtype.element_ty), mask=valid)


def width(columns: int) -> int:
    """Columns of a row with its padding."""
    return triton.cdiv(columns, PAD) * PAD


def padded_bias(bias: torch.Tensor | None, like: torch.Tensor, columns: int) -> torch.Tensor:
    """A bias [V], or none, in the padded width and the dtype of ``like``."""
    padded = like.new_full((width(columns),), torch.finfo(like.dtype).min)
    padded[:columns] = 0.0 if bias is None else bias
    return padded


def linear_kl_div_fwd(
    student: torch.Tensor,
    student_bias: torch.Tensor,
    teacher: torch.Tensor,
    teacher_bias: torch.Tensor,
    labels: torch.Tensor,
    columns: int,
    temperature: float,
    kl: torch.Tensor,
    ce: torch.Tensor,
    kl_gradient: torch.Tensor | None,
    ce_gradient: torch.Tensor | None,
) -> None:
    """Write the row losses of a chunk, and their gradients where a tensor is given for them.

    Args:
        student: h Wᵀ [R, width], float32 or bfloat16, without bias; rows start at multiples of 16 bytes, last stride
            1, and whatever is in the padding is finite.
        student_bias: [width] of ``padded_bias``.
        teacher, teacher_bias: the same of the first rows, those that count for the KL, [R_kl, width].
        labels: int64 [R_ce], contiguous, of the last rows, those that count for the cross-entropy; R_kl + R_ce ≥ R. One
            outside [0, columns) makes its row's loss NaN.
        columns: V.
        temperature: τ > 0 of the KL.
        kl, ce: float32 [R_kl] and [R_ce], contiguous; get the row losses.
        kl_gradient: [R_kl, width], rows at multiples of 16 bytes; gets d kl / d logits, 0 in the padding. May be
            ``teacher``.
        ce_gradient: [R_ce, width]; gets d ce / d logits. May be the last rows of ``student``.
    """
    first, n_kl, n = len(student) - len(labels), len(teacher), len(student)
    power = int(temperature) if temperature in (1.0, 2.0) else 0
    configuration = logits_configuration(student.shape[1], max(student.element_size(), teacher.element_size()))
    # Three kinds of rows: of the KL alone, of both losses, of the cross-entropy alone.
    for begin, end, has_kl, has_ce in ((0, first, True, False), (first, n_kl, True, True), (n_kl, n, False, True)):
        if begin == end:
            continue
        s, t = student[begin:end], teacher[begin:end]
        dkl = kl_gradient[begin:end] if has_kl and kl_gradient is not None else None
        dce = ce_gradient[begin - first : end - first] if has_ce and ce_gradient is not None else None
        tau = float(temperature) if has_kl else 1.0
        with torch.cuda.device_of(student):
            _linear_kl_div_fwd_kernel[(end - begin,)](
                s,
                student_bias,
                t if has_kl else None,
                teacher_bias if has_kl else None,
                labels[begin - first :] if has_ce else None,
                kl[begin:] if has_kl else None,
                ce[begin - first :] if has_ce else None,
                dkl,
                dce,
                s.stride(0),
                t.stride(0) if has_kl else 0,
                0 if dkl is None else dkl.stride(0),
                0 if dce is None else dce.stride(0),
                columns,
                student.shape[1],
                tau,
                LOG2E / tau,
                POWER=power if has_kl else 1,
                enable_fp_fusion=True,
                **configuration,
            )
