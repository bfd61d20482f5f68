"""LayerNorm of rows that are sums:  h = a + b + c,  ĥ = (h − μ) · rstd,  y = ĥ · w + b,  and int8 codes of y.

a, b and c are matrices, or tables of which ids name the rows (kernels/embedding.py); b and c may be missing.

Forward reads h once into registers, and takes from there a rounded mean m and the sums of d = h − m and d². The mean of
d is what m lacks, so μ = m + mean d and the variance mean d² − (mean d)² keep their digits under any offset.

Backward, with dŷ = dy · w:  dh = rstd · (dŷ − mean dŷ − ĥ · mean (dŷ · ĥ)),  dw = Σ_n dy · ĥ,  db = Σ_n dy
reads h and dy once and writes dh. A program goes through every P-th tile and keeps its part of dw and db in registers;
the P parts are added afterwards, in their order: no atomics, so the bits are the same every run.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from distilbert_fast.kernels import tuning
from distilbert_fast.kernels.common import launch_rows, quantize_rows, row_configs, row_tile, rows_key
from distilbert_fast.kernels.quantize import stride_of


@triton.jit
def _load_term(term, ids, height, stride, rows, columns, counted, inside):
    """fp32 [ROWS, BLOCK_C] of a matrix, or of the rows that ids name in a table [height, C]: NaN for one outside it."""
    if ids is None:
        values = tl.load(term + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    else:
        named = tl.load(ids + rows, mask=counted, other=0).to(tl.int64)  # [ROWS]
        outside = counted & ((named < 0) | (named >= height))
        place = term + named[:, None] * stride + columns[None, :]
        values = tl.load(place, mask=inside & ~outside[:, None], other=0.0).to(tl.float32)
        values = tl.where(outside[:, None], float("nan"), values)
    return values


@triton.jit
def _normalize(h, inside, C, eps):
    """ĥ [ROWS, BLOCK_C], μ and rstd [ROWS] of h, which is 0 where it is not inside."""
    n = tl.cast(tl.maximum(C, 1), tl.float32)  # a row without columns has scale 0, not NaN
    m = tl.div_rn(tl.sum(h, axis=1), n)
    d = tl.where(inside, h - m[:, None], 0.0)
    lacking = tl.div_rn(tl.sum(d, axis=1), n)
    variance = tl.maximum(tl.div_rn(tl.sum(d * d, axis=1), n) - lacking * lacking, 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    return (d - lacking[:, None]) * rstd[:, None], m + lacking, rstd


@triton.jit(do_not_specialize=["N"])
def _layer_norm_fwd_kernel(
    a,  # [N, C] or, with ids, a table [a_height, C]; rows a_stride elements apart
    b,  # likewise, or None
    c,  # likewise, or None
    a_ids,  # int32 or int64 [N], or None
    b_ids,
    c_ids,
    a_height,
    b_height,
    c_height,
    a_stride,
    b_stride,
    c_stride,
    weight,  # [C]
    bias,  # [C]
    y,  # [N, C]
    mean,  # fp32 [N], or None
    rstd,  # fp32 [N], or None
    y_q,  # int8 [N, C], or None
    scale,  # fp32, scale_stride elements apart, or None: each row's own
    found,  # fp32 [N], or None
    N,
    C,
    scale_stride,
    eps,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows, columns, counted, inside = row_tile(tl.program_id(0), N, C, ROWS, BLOCK_C)
    h = _load_term(a, a_ids, a_height, a_stride, rows, columns, counted, inside)
    if b is not None:
        h += _load_term(b, b_ids, b_height, b_stride, rows, columns, counted, inside)
    if c is not None:
        h += _load_term(c, c_ids, c_height, c_stride, rows, columns, counted, inside)
    normal, row_mean, row_rstd = _normalize(h, inside, C, eps)
    w = tl.load(weight + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    shift = tl.load(bias + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    result = normal * w + shift
    out = rows[:, None] * C + columns[None, :]
    tl.store(y + out, result.to(y.dtype.element_ty), mask=inside)
    if mean is not None:
        tl.store(mean + rows, row_mean, mask=counted)
        tl.store(rstd + rows, row_rstd, mask=counted)
    if y_q is not None:
        tl.store(y_q + out, quantize_rows(result, rows, counted, scale, scale_stride, found), mask=inside)


@triton.jit(do_not_specialize=["N"])
def _layer_norm_bwd_kernel(
    dy,  # [N, C], rows dy_stride elements apart
    a,  # a … c_stride: as in forward
    b,
    c,
    a_ids,
    b_ids,
    c_ids,
    a_height,
    b_height,
    c_height,
    a_stride,
    b_stride,
    c_stride,
    weight,  # [C]
    mean,  # fp32 [N]
    rstd,  # fp32 [N]
    dh,  # [N, C], or None
    dparameters,  # fp32 [2, P, C]: each program's part of dw and of db
    N,
    C,
    dy_stride,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr = 1,  # tiles in flight
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK_C)
    n = tl.cast(C, tl.float32)
    w = tl.load(weight + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    dweight, dbias = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    for block in tl.range(program, tl.cdiv(N, ROWS), programs, num_stages=STAGES):
        rows, columns, counted, inside = row_tile(block, N, C, ROWS, BLOCK_C)
        h = _load_term(a, a_ids, a_height, a_stride, rows, columns, counted, inside)
        if b is not None:
            h += _load_term(b, b_ids, b_height, b_stride, rows, columns, counted, inside)
        if c is not None:
            h += _load_term(c, c_ids, c_height, c_stride, rows, columns, counted, inside)
        dresult = tl.load(dy + rows[:, None] * dy_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        row_mean = tl.load(mean + rows, mask=counted, other=0.0)[:, None]
        row_rstd = tl.load(rstd + rows, mask=counted, other=0.0)[:, None]
        normal = tl.where(inside, (h - row_mean) * row_rstd, 0.0)
        dweight += tl.sum(dresult * normal, axis=0)
        dbias += tl.sum(dresult, axis=0)
        if dh is not None:
            dnormal = tl.fma(dresult, w, 0.0)  # rounded: fused with the subtraction, C = 1 would leave more than 0
            offset = tl.div_rn(tl.sum(dnormal, axis=1), n)[:, None]
            slope = tl.div_rn(tl.sum(dnormal * normal, axis=1), n)[:, None]
            dsum = row_rstd * (dnormal - offset - normal * slope)
            tl.store(dh + rows[:, None] * C + columns[None, :], dsum.to(dh.dtype.element_ty), mask=inside)
    part = dparameters + program * C + columns
    tl.store(part, dweight, mask=columns < C)
    tl.store(part + programs * C, dbias, mask=columns < C)


def normalize_fwd(
    terms: Sequence[torch.Tensor | None],
    ids: Sequence[torch.Tensor | None],
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    y: torch.Tensor,
    mean: torch.Tensor | None = None,
    rstd: torch.Tensor | None = None,
    y_q: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    found: torch.Tensor | None = None,
) -> None:
    """Write the LayerNorm of the sum of one to three terms, and what else a tensor is given for.

    Args:
        terms: float32, bfloat16 or float16 [N, C], or [rows, C] with ids; any row stride, last stride 1. None: nothing.
        ids: of each term, int32 or int64 [N], contiguous: which of its rows. None: its own N rows. The result of a row
            with an id outside its table is NaN; nothing is read for it.
        weight, bias: [C], any float dtype, contiguous.
        eps: ε, added to the variance.
        y: [N, C], contiguous, as all that follow.
        mean, rstd: float32 [N].
        y_q: int8 [N, C], the codes of the unrounded result.
        scale: of y_q: float32 [] or [N] of any stride; None finds each row's own and writes it to ``found``.
        found: float32 [N].
    """
    launch_rows(
        _layer_norm_fwd_kernel,
        y,
        "layer_norm_fwd" if y_q is None else "layer_norm_quantize_fwd",
        terms,
        **_terms(terms, ids),
        weight=weight,
        bias=bias,
        y=y,
        mean=mean,
        rstd=rstd,
        y_q=y_q,
        scale=scale,
        found=found if scale is None else None,
        scale_stride=stride_of(scale),
        eps=float(eps),  # Triton would compile again for an int
    )


def normalize_bwd(
    dy: torch.Tensor,
    terms: Sequence[torch.Tensor | None],
    ids: Sequence[torch.Tensor | None],
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dh: torch.Tensor | None,
    dweight: torch.Tensor,
    dbias: torch.Tensor,
) -> None:
    """Write the gradients of ``normalize_fwd``.

    Args:
        dy: [N, C], any row stride, last stride 1.
        terms, ids, weight: as given to ``normalize_fwd``.
        mean, rstd: float32 [N], contiguous; what it wrote.
        dh: [N, C], contiguous; gets the gradient of the sum. None: it is not wanted.
        dweight, dbias: float32 [C].
    """
    n, c = dy.shape

    def launch(config: tuning.Config) -> None:
        resident = max(1, 16 // config["num_warps"]) * _multiprocessors(dy.device)
        programs = max(1, min(triton.cdiv(n, config["ROWS"]), resident))
        parts = torch.empty((2, programs, c), dtype=torch.float32, device=dy.device)
        with torch.cuda.device_of(dy):
            _layer_norm_bwd_kernel[(programs,)](
                dy=dy,
                **_terms(terms, ids),
                weight=weight,
                mean=mean,
                rstd=rstd,
                dh=dh,
                dparameters=parts,
                N=n,
                C=c,
                dy_stride=dy.stride(0),
                **config,
            )
        torch.sum(parts[0], dim=0, out=dweight)
        torch.sum(parts[1], dim=0, out=dbias)

    # Four warps for 1024 columns: dw and db stay in registers for the whole run, eight columns of each a thread.
    # The next tile is fetched meanwhile, but not where ids name the rows: their addresses would take the registers.
    stages = 1 if any(named is not None for named in ids) else 2
    configs = [config | {"STAGES": stages} for config in row_configs(c, 256, ((2, 1), (1, 1), (4, 2), (2, 2), (1, 2)))]
    launch(tuning.pick("layer_norm_bwd", rows_key(terms, c), configs, dy.device, launch))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _terms(terms: Sequence[torch.Tensor | None], ids: Sequence[torch.Tensor | None]) -> dict[str, object]:
    arguments: dict[str, object] = {}
    for i, name in enumerate("abc"):
        term, named = (terms[i], ids[i]) if i < len(terms) else (None, None)
        arguments |= {name: term, f"{name}_ids": named}
        arguments[f"{name}_height"] = 0 if named is None else term.shape[0]
        arguments[f"{name}_stride"] = 0 if term is None else term.stride(0)
    return arguments
