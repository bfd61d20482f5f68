"""How each backend computes ops/attention.py: torch in tiles of neighbouring sequences, kernels by their launchers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from distilbert_fast import backends
from distilbert_fast.ops import _check
from distilbert_fast.ops._operator import triton_kernels
from distilbert_fast.ops._rows import accumulation_dtype, address

OP = "attention"
CUDA_HEAD_SIZE = 128  # the largest in csrc/cuda


class Call(NamedTuple):
    """All arguments: q, k, v [N, H, D] with cu_seqlens, [B, T, H, D] without."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens: torch.Tensor | None  # int32 [B + 1]
    attention_mask: torch.Tensor | None  # bool [B, T]
    head_mask: torch.Tensor | None  # [B, H] in the dtype of the arithmetic
    seed: torch.Tensor | None  # int64 [1] if there is dropout
    dropout_p: float
    scale: float
    dm: bool  # the gradient of the head mask is wanted, even where the mask is 0
    max_length: int  # that no packed sequence exceeds; 0: nothing is known


Forward = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def gradients_like(call: Call) -> Gradients:
    """Memory for dq, dk, dv, and dm [B, H], or [0, 0] if it is not wanted."""
    q, shape = call.q, call.head_mask.shape if call.head_mask is not None and call.dm else (0, 0)
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    return dq, dk, dv, q.new_empty(shape, dtype=accumulation_dtype(q.dtype))


def kept_like(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for what forward keeps on a GPU: the output before the head mask if dm is wanted, and m and 1 / Z."""
    q = call.q
    stats = q.new_empty((2, q.shape[-2], math.prod(q.shape[:-2])), dtype=torch.float32)
    return q.new_empty(q.shape if call.dm else 0), stats


def nothing_like(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(0), q.new_empty((0, 0, 0), dtype=torch.float32)


# torch -----------------------------------------------------------------------------------------------------


class _Tile(NamedTuple):
    """Some heads of b neighbouring sequences of one length t."""

    sequences: slice  # of B
    tokens: slice  # of N, or of T in the padded form
    length: int
    heads: slice | torch.Tensor
    keys: torch.Tensor | None  # bool [b, t], False = padding between tokens

    def at(self, x: torch.Tensor) -> torch.Tensor:
        """Their part of [N, H, D] or [B, T, H, D], all heads: a view [b, t, H, D]."""
        if x.dim() == 3:
            return x[self.tokens].unflatten(0, (-1, self.length))
        return x[self.sequences, self.tokens]

    def read(self, x: torch.Tensor) -> torch.Tensor:
        part = self.at(x)[:, :, self.heads]
        if self.keys is not None:
            part = part.masked_fill(~self.keys[:, :, None, None], 0)
        return part.transpose(1, 2)  # [b, h, t, D]

    def write(self, x: torch.Tensor, value: torch.Tensor, m: torch.Tensor | None) -> None:
        """Store m · value [b, h, t, D], 0 at padding and wherever m is 0."""
        if m is not None:
            value = torch.where(m == 0, 0, m * value)
        if self.keys is not None:
            value = value.masked_fill(~self.keys[:, None, :, None], 0)
        self.at(x)[:, :, self.heads] = value.transpose(1, 2).to(x.dtype)

    def mask(self, head_mask: torch.Tensor | None) -> torch.Tensor | None:
        """Their part of [B, H]: [b, h, 1, 1]."""
        return None if head_mask is None else head_mask[self.sequences][:, self.heads, None, None]

    def attended(self) -> torch.Tensor | None:
        """Keys that count [b, 1, 1, t]; all where a sequence has none: softmax wants one, nobody reads it."""
        if self.keys is None:
            return None
        return (self.keys | ~self.keys.any(dim=-1, keepdim=True))[:, None, None, :]


def _offsets(cu_seqlens: torch.Tensor, tokens: int) -> list[int]:
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0:
        _check.refuse(OP, "cu_seqlens", "0 at the start", offsets[0])
    for b, (begin, end) in enumerate(itertools.pairwise(offsets)):
        if end < begin:
            _check.refuse(OP, "cu_seqlens", "non-decreasing", f"{end} after {begin} at {b + 1}")
    if offsets[-1] != tokens:
        _check.refuse(OP, "cu_seqlens", f"N = {tokens} at the end", offsets[-1])
    return offsets


def _runs(q: torch.Tensor, call: Call) -> Iterator[tuple[slice, slice, torch.Tensor | None]]:
    """Sequences, tokens and keys of neighbours of the same length and, if padded, the same place."""
    mask = call.attention_mask
    b = 0
    if call.cu_seqlens is not None:
        offsets = _offsets(call.cu_seqlens, q.shape[0])
        for _, run in itertools.groupby(end - begin for begin, end in itertools.pairwise(offsets)):
            begin, b = b, b + len(list(run))
            yield slice(begin, b), slice(offsets[begin], offsets[b]), None
    elif mask is None or q.device.type != "cpu":  # a GPU computes padding sooner than it tells where it is
        yield slice(0, q.shape[0]), slice(0, q.shape[1]), mask
    elif mask.numel() > 0:
        bits = mask.to(torch.uint8)
        first, last = bits.argmax(dim=1), mask.shape[1] - bits.flip(1).argmax(dim=1)
        count = mask.sum(dim=1)
        last = torch.where(count > 0, last, first)
        places = zip(first.tolist(), last.tolist(), (count < last - first).tolist(), strict=True)
        for (start, end, holes), same in itertools.groupby(places):
            begin, b = b, b + len(list(same))
            yield slice(begin, b), slice(start, end), mask[begin:b, start:end] if holes else None


def _tiles(call: Call, scores: int | None) -> Iterator[_Tile]:
    """What has to be computed, in tiles of about that many scores; None = as large as they come."""
    q = call.q
    for sequences, tokens, keys in _runs(q, call):
        count = sequences.stop - sequences.start
        length = tokens.stop - tokens.start
        if q.dim() == 3 and count > 0:
            length //= count
        live = None
        if call.head_mask is not None and not call.dm and q.device.type == "cpu":
            live = (call.head_mask[sequences] != 0).any(dim=0).nonzero().flatten()
        heads = q.shape[-2] if live is None else len(live)
        if count * length * heads == 0:
            continue
        pairs = count * heads if scores is None else max(1, scores // length**2)
        rows, columns = max(1, min(count, pairs // heads)), min(heads, pairs)
        for b, h in itertools.product(range(0, count, rows), range(0, heads, columns)):
            some = slice(sequences.start + b, min(sequences.start + b + rows, sequences.stop))
            place = tokens
            if q.dim() == 3:
                place = slice(tokens.start + b * length, min(tokens.start + (b + rows) * length, tokens.stop))
            head = slice(h, min(h + columns, heads))
            part = None if keys is None else keys[b : b + rows]
            yield _Tile(some, place, length, head if live is None else live[head], part)


def _forward_torch(call: Call) -> torch.Tensor:
    q, k, v = call[:3]
    o = q.new_zeros(q.shape)
    drop = None if call.seed is None else _Dropout(call.seed, call.dropout_p)
    # Backward has to find again what is dropped here, tile by tile, so dropout wants its tiles.
    for tile in _tiles(call, None if drop is None else _scores(q)):
        q_t, k_t, v_t = tile.read(q), tile.read(k), tile.read(v)
        if drop is None:
            o_t = F.scaled_dot_product_attention(q_t, k_t, v_t, attn_mask=tile.attended(), scale=call.scale)
        else:
            q_t, k_t, v_t = (x.to(accumulation_dtype(q.dtype)) for x in (q_t, k_t, v_t))
            p = _probabilities(q_t, k_t, tile, call.scale)
            o_t = (p * drop(p)) @ v_t
        tile.write(o, o_t, tile.mask(call.head_mask))
    return o


def _backward_torch(call: Call, do: torch.Tensor, _o: torch.Tensor, _stats: torch.Tensor) -> Gradients:
    q, k, v = call[:3]
    dq, dk, dv, dm = (x.zero_() for x in gradients_like(call))
    drop = None if call.seed is None else _Dropout(call.seed, call.dropout_p)
    for tile in _tiles(call, _scores(q)):
        q_t, k_t, v_t, g = (tile.read(x).to(accumulation_dtype(q.dtype)) for x in (q, k, v, do))  # [b, h, t, D]
        p = _probabilities(q_t, k_t, tile, call.scale)
        dp = g @ v_t.mT  # [b, h, t, t]
        dropped = p
        if drop is not None:
            z = drop(p)
            dropped = p * z
            dp *= z
        r = (p * dp).sum(dim=-1, keepdim=True)  # [b, h, t, 1]
        m = tile.mask(call.head_mask)
        tile.write(dv, dropped.mT @ g, m)
        ds = dp.sub_(r).mul_(p)
        tile.write(dq, ds @ (k_t * call.scale), m)
        tile.write(dk, ds.mT @ (q_t * call.scale), m)
        if call.dm:
            dm[tile.sequences, tile.heads] = r.sum(dim=(2, 3))
    return dq, dk, dv, dm


def _scores(q: torch.Tensor) -> int:
    """Scores written out at a time: they stay in the cache of a CPU core, and cost a GPU few launches."""
    return 2**18 if q.device.type == "cpu" else 2**26


def _probabilities(q: torch.Tensor, k: torch.Tensor, tile: _Tile, scale: float) -> torch.Tensor:
    scores = (q * scale) @ k.mT  # [b, h, t, t]
    keys = tile.attended()
    return torch.softmax(scores if keys is None else scores.masked_fill_(~keys, -math.inf), dim=-1)


class _Dropout:
    """What to multiply probabilities by, 0 or 1 / (1 - p): the same series for the same seed."""

    def __init__(self, seed: torch.Tensor, p: float) -> None:
        self.p = p
        self.generator = torch.Generator(seed.device).manual_seed(int(seed))

    def __call__(self, like: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(like).bernoulli_(1 - self.p, generator=self.generator).div_(1 - self.p)


# cpu -----------------------------------------------------------------------------------------------------------


def _heads_argument(x: torch.Tensor) -> tuple[int, ...]:
    """Address and strides of sequences, tokens and heads."""
    return x.data_ptr(), *((0,) if x.dim() == 3 else ()), *x.stride()[:-1]


def _native_arguments(call: Call, dtype_codes: dict[torch.dtype, int]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What all native entries begin with, and the sizes and heads that they go on with.

    What ``call`` names must outlive them, and be contiguous.
    """
    q, k, v, cu_seqlens, mask, head_mask = call[:6]
    first = *(_heads_argument(x) for x in (q, k, v)), dtype_codes[q.dtype], address(cu_seqlens), address(mask)
    length, batch = (q.shape[1], q.shape[0]) if cu_seqlens is None else (0, cu_seqlens.shape[0] - 1)
    head_mask_stride = 0 if head_mask is None else head_mask.stride(0)
    return first, (length, batch, *q.shape[-2:], address(head_mask), head_mask_stride)


def _cpu_arguments(call: Call) -> tuple[Any, ...]:
    first, sizes = _native_arguments(call, backends.CPU_DTYPE)
    seed = 0 if call.seed is None else int(call.seed)
    return *first, *sizes, call.scale, call.dropout_p, seed, call.q.shape[0]


def _in_order(call: Call) -> Call:
    """The same call with its integers, mask and heads side by side; [H] expanded to [B, H] stays as it is."""
    head_mask = call.head_mask
    if head_mask is not None and head_mask.stride(1) != 1:
        head_mask = head_mask.contiguous()
    return call._replace(
        cu_seqlens=None if call.cu_seqlens is None else call.cu_seqlens.contiguous(),
        attention_mask=None if call.attention_mask is None else call.attention_mask.contiguous(),
        head_mask=head_mask,
    )


def _forward_cpu(call: Call) -> torch.Tensor:
    call = _in_order(call)
    o = torch.empty(call.q.shape, dtype=call.q.dtype)
    backends.cpu().attention_forward(
        *_cpu_arguments(call), _heads_argument(o), backends.CPU_DTYPE[o.dtype], torch.get_num_threads()
    )
    return o


def _backward_cpu(call: Call, do: torch.Tensor, _o: torch.Tensor, _stats: torch.Tensor) -> Gradients:
    call = _in_order(call)
    dq, dk, dv, dm = gradients_like(call)
    backends.cpu().attention_backward(
        *_cpu_arguments(call),
        *(_heads_argument(x) for x in (do, dq, dk, dv)),
        dm.data_ptr() if call.dm else 0,
        torch.get_num_threads(),
    )
    return dq, dk, dv, dm


# gpu -----------------------------------------------------------------------------------------------------------


def _ready(call: Call) -> Call:
    """The same call in order; its offsets are checked where nobody waits for them, in Triton's interpreter."""
    if call.cu_seqlens is not None and call.q.device.type == "cpu":
        _offsets(call.cu_seqlens, call.q.shape[0])
    return _in_order(call)


def _forward_triton(
    call: Call, unmasked: torch.Tensor | None = None, stats: torch.Tensor | None = None
) -> torch.Tensor:
    o = call.q.new_empty(call.q.shape)
    triton_kernels("attention").attention_fwd(*_ready(call)[:9], o, unmasked, stats, call.max_length)
    return o


def _keeping(forward: Callable[..., torch.Tensor]) -> Callable[[Call], Forward]:
    """The same forward, which keeps what backward reads."""

    def forward_keeping(call: Call) -> Forward:
        unmasked, stats = kept_like(call)
        return forward(call, unmasked if call.dm else None, stats), unmasked, stats

    return forward_keeping


_forward_keeping_triton = _keeping(_forward_triton)


def _backward_triton(call: Call, do: torch.Tensor, o: torch.Tensor, stats: torch.Tensor) -> Gradients:
    if stats.shape[0] == 0:  # another backend served forward
        o, unmasked, stats = _forward_keeping_triton(call)
        o = unmasked if call.dm else o
    dq, dk, dv, dm = gradients_like(call)
    delta = stats.new_empty(stats.shape[1:])
    triton_kernels("attention_backward").attention_bwd(
        do, *call[:3], o, stats, *_ready(call)[3:9], dq, dk, dv, dm if call.dm else None, delta, call.max_length
    )
    return dq, dk, dv, dm


def _cuda_arguments(call: Call) -> tuple[Any, ...]:
    first, sizes = _native_arguments(call, backends.CUDA_DTYPE)
    tokens = 0 if call.cu_seqlens is None else call.q.shape[0]
    return *first, tokens, *sizes, call.dm, call.scale, call.dropout_p, address(call.seed)


def _forward_cuda(call: Call, unmasked: torch.Tensor | None = None, stats: torch.Tensor | None = None) -> torch.Tensor:
    call = _ready(call)
    o = call.q.new_empty(call.q.shape)
    backends.cuda().attention_forward(
        _cuda_arguments(call),
        _heads_argument(o),
        (0, 0, 0, 0) if unmasked is None else _heads_argument(unmasked),
        address(stats),
        *backends.device_and_stream(call.q.device),
    )
    return o


_forward_keeping_cuda = _keeping(_forward_cuda)


def _backward_cuda(call: Call, do: torch.Tensor, o: torch.Tensor, stats: torch.Tensor) -> Gradients:
    call = _ready(call)
    if stats.shape[0] == 0:  # another backend served forward
        o, unmasked, stats = _forward_keeping_cuda(call)
        o = unmasked if call.dm else o
    gradients = gradients_like(call)
    r = stats.new_empty(stats.shape[1:])  # [H, N]
    backends.cuda().attention_backward(
        _cuda_arguments(call),
        _heads_argument(do),
        _heads_argument(o),
        stats.data_ptr(),
        r.data_ptr(),
        *(_heads_argument(x) for x in gradients[:3]),
        gradients[3].data_ptr() if call.dm else 0,
        *backends.device_and_stream(call.q.device),
    )
    return gradients


def backend_of(q: torch.Tensor) -> str:
    """Who serves heads of this dtype and size."""
    size = q.shape[-1]
    if size <= CUDA_HEAD_SIZE:
        return backends.select(OP, q.device, q.dtype)
    reason = f"its attention takes heads of up to {CUDA_HEAD_SIZE}, not {size}"
    return backends.select(OP, q.device, q.dtype, unfit=(("cuda", reason),))


FORWARD = {"torch": _forward_torch, "cpu": _forward_cpu, "triton": _forward_triton, "cuda": _forward_cuda}
# The others make again in backward what they need.
FORWARD_KEEPING = {"triton": _forward_keeping_triton, "cuda": _forward_keeping_cuda}
BACKWARD = {"torch": _backward_torch, "cpu": _backward_cpu, "triton": _backward_triton, "cuda": _backward_cuda}
