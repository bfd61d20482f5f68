"""kernels/attention.py and attention_backward.py through the op, on a CUDA device or in Triton's interpreter.

Without a device this module is skipped here and run by test_interpreter.py. The interpreter multiplies no bfloat16
matrices (it takes their bits for integers): those are left to a device, and to test_attention_cubin.py.
"""

from __future__ import annotations

import contextlib
import math
import os

import pytest
import torch
from attention_oracle import check_padded, cumulated, projection, results, sdpa

import distilbert_fast
from distilbert_fast import attention, backends, padded_attention
from distilbert_fast.ops import attention as op
from distilbert_fast.ops.attention import attention_reference
from distilbert_fast.testing import assert_twice_rule

pytest.importorskip("triton")
DEVICE = "cpu" if backends.interpreted() else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("no CUDA device here; test_interpreter.py runs this module", allow_module_level=True)

from distilbert_fast.kernels import attention as kernels  # noqa: E402  (needs Triton)
from distilbert_fast.kernels import attention_backward, tuning  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy: −inf − −inf, and a hash that overflows
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
DTYPES = (torch.float32, torch.float16) if DEVICE == "cpu" else (torch.float32, torch.float16, torch.bfloat16)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
# Empty ones first, last and between; runs of one length; one token; whole blocks of 16 and one more or less.
LENGTHS = [(0, 3, 0), (16, 15, 17, 0, 0, 1, 32), (40,)]


def small(kernel, key, candidates):
    """Blocks of 16 and 32: what is one token longer is long, and takes the kernels that walk over blocks."""
    if kernel == "attention_bwd_short":
        return {"BLOCK": 16, "num_warps": 4}
    wide = {"attention_fwd": (16, 32), "attention_bwd_dq": (16, 32), "attention_bwd_dkv": (32, 16)}
    return kernels.tile(*wide[kernel], 4, 2)


@pytest.fixture(autouse=True)
def tiles(request):
    """Small tiles, or, in a test that asks for them, those of the launchers."""
    choice = tuning.choosing(small) if getattr(request, "param", "small") == "small" else contextlib.nullcontext()
    with distilbert_fast.backend("triton"), choice:
        yield


both_tiles = pytest.mark.parametrize("tiles", ["small", "tuned"], indirect=True)
tuned_tiles = pytest.mark.parametrize("tiles", ["tuned"], indirect=True)


def packed(n, heads, size, dtype=torch.float32, seed=0):
    return projection(n, heads, size, dtype, seed, DEVICE)


def masked(shape):
    """None, or a head mask with a 0 in it."""
    return None if shape is None else torch.linspace(-1, 2, math.prod(shape), device=DEVICE).view(shape).round()


def check(lengths, heads, size, dtype, mask=None, seeds=2, max_length=None):
    """Output and all gradients follow the rule of twice torch's error, pooled over some seeds."""
    cu_seqlens, n = cumulated(lengths, DEVICE), sum(lengths)
    head_mask = masked({None: None, "H": (heads,), "BH": (len(lengths), heads)}[mask])
    double = None if head_mask is None else head_mask.double()
    found = []
    for seed in range(seeds):
        qkv, do = packed(n, heads, size, dtype, seed), packed(n, heads, size, dtype, seed + 100)[:, 0]
        before = qkv.clone()
        ours = results(attention, qkv, do, cu_seqlens, head_mask=head_mask, max_length=max_length)
        assert torch.equal(qkv, before)
        torchs = results(sdpa, qkv, do, cu_seqlens, head_mask=head_mask)
        found.append((ours, torchs, results(sdpa, qkv.double(), do.double(), cu_seqlens, head_mask=double)))
    ours, torchs, exact = ([torch.cat(x) for x in zip(*seeds, strict=True)] for seeds in zip(*found, strict=True))
    for what, *three in zip(("o", "dqkv", "dm"), ours, torchs, exact, strict=False):
        assert_twice_rule(*three, what)


@both_tiles
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("heads", "size", "mask"), [(3, 5, "H"), (2, 32, "BH")])
def test_output_and_gradients(lengths, heads, size, mask, dtype):
    check(lengths, heads, size, dtype, mask)


@both_tiles
@pytest.mark.parametrize("max_length", [16, 32, 50])
def test_promised_lengths(max_length):
    """One tile, several, and more than there are."""
    check((16, 0, 15, 1, 3), 2, 32, torch.float16, "BH", max_length=max_length)
    if max_length >= 32:
        check((0, 17, 32), 3, 5, torch.float32, "H", max_length=max_length)


@pytest.mark.parametrize("max_length", [16, 32])
def test_a_broken_promise_gives_nan(max_length):
    """On a device the host never reads the offsets; here the launchers are called past the check of the op."""
    lengths, n = (7, 70, 5), 82
    cu_seqlens = cumulated(lengths, DEVICE)
    q, k, v, do = (packed(n, 2, 8, seed=seed)[:, 0] for seed in range(4))
    found = {}
    for promised in (0, max_length):
        o, dq, dk, dv = torch.full((4, n, 2, 8), 77.0, device=DEVICE)
        stats, delta = torch.zeros(2, 2, n, device=DEVICE), torch.zeros(2, n, device=DEVICE)
        call = (cu_seqlens, None, None, None, 0.0, 0.5)
        kernels.attention_fwd(q, k, v, *call, o, None, stats, promised)
        attention_backward.attention_bwd(do, q, k, v, o, stats, *call, dq, dk, dv, None, delta, promised)
        found[promised] = torch.stack([o, dq, dk, dv])
    kept, broken = found[0], found[max_length]
    for short in (slice(0, 7), slice(77, n)):
        torch.testing.assert_close(broken[:, short], kept[:, short], **CLOSE)
    assert not (broken == 77).any(), "memory that nobody wrote"
    assert broken[:, 7 + max_length : 77].isnan().all()
    if DEVICE == "cpu":
        said = f"attention: cu_seqlens must be sequences of at most max_length = {max_length} tokens, got 70"
        with pytest.raises(ValueError, match=said):
            attention(q, k, v, cu_seqlens, max_length=max_length)


@pytest.mark.parametrize("size", [1, 16, 33, 100, 256])
def test_head_sizes(size):
    for dtype in DTYPES:
        check((19, 2), 1, size, dtype, seeds=4)


@tuned_tiles
def test_longer_than_one_tile():
    check((130, 300), 1, 64, DTYPES[-1], "H", seeds=1)
    check((70, 3), 1, 64, torch.float32, seeds=1)


@pytest.mark.parametrize("scale", [0.05, 1, 2.0])
def test_scales(scale):
    cu_seqlens, qkv, do = cumulated((20, 3), DEVICE), packed(23, 2, 8), packed(23, 2, 8, seed=1)[:, 0]
    found = results(attention, qkv, do, cu_seqlens, scale=scale)
    exact = results(attention_reference, qkv.double(), do.double(), cu_seqlens, scale=scale)
    for x, y in zip(found, exact, strict=True):
        torch.testing.assert_close(x.double(), y, **CLOSE)


# Where: layouts, offsets, padding ------------------------------------------------------------------------------


def layouts(x):
    """The same [N, H, D] with other strides and offsets; NaN lies between."""
    n, h, d = x.shape
    nan = lambda *shape: torch.full(shape, math.nan, dtype=x.dtype, device=x.device)  # noqa: E731
    return {
        "fused projection": nan(n, 3, h, d)[:, 1].copy_(x),
        "heads first": nan(h, n, d).transpose(0, 1).copy_(x),
        "last stride 2": nan(n, h, 2 * d)[..., ::2].copy_(x),
        "misaligned": nan(n * h * d + 1)[1:].view(n, h, d).copy_(x),
    }


@pytest.mark.parametrize("layout", list(layouts(torch.zeros(0, 1, 1))))
def test_layouts_of_inputs_and_gradient(layout):
    cu_seqlens, qkv, do = cumulated((5, 19), DEVICE), packed(24, 3, 8), packed(24, 3, 8, seed=1)[:, 0]
    contiguous = [x.contiguous().requires_grad_() for x in qkv.unbind(1)]
    laid_out = [layouts(x.detach())[layout].requires_grad_() for x in contiguous]
    o, expected = attention(*laid_out, cu_seqlens), attention(*contiguous, cu_seqlens)
    assert torch.equal(o, expected) and o.is_contiguous()
    gradients = torch.autograd.grad(o, laid_out, layouts(do)[layout], retain_graph=True)
    for x, y in zip(gradients, torch.autograd.grad(expected, contiguous, do), strict=True):
        assert torch.equal(x, y)
    again = torch.autograd.grad(o, laid_out, layouts(do)[layout])
    assert all(torch.equal(x, y) for x, y in zip(gradients, again, strict=True))


def test_a_gradient_of_stride_zero():
    cu_seqlens, qkv = cumulated((5, 20), DEVICE), packed(25, 2, 4).requires_grad_()
    attention(*qkv.unbind(1), cu_seqlens).sum().backward()
    expected = torch.autograd.grad(attention_reference(*qkv.unbind(1), cu_seqlens).sum(), qkv)[0]
    torch.testing.assert_close(qkv.grad, expected)


MASKS = {
    "right": [[1] * 20, [1] * 17 + [0] * 3, [1] * 3 + [0] * 17],
    "left": [[0] * 18 + [1] * 2, [0] * 5 + [1] * 15],
    "holes": [[1, 0, 0, 1] * 5, [0] * 20, [0, 1] * 10, [1] + [0] * 19],
    "none": [[1] * 20] * 2,
}


@both_tiles
@pytest.mark.parametrize("heads", [None, "H", "BH"])
@pytest.mark.parametrize("where", list(MASKS))
def test_padding_anywhere(where, heads):
    mask = torch.tensor(MASKS[where], dtype=torch.bool, device=DEVICE)
    head_mask = masked({None: None, "H": (2,), "BH": (len(mask), 2)}[heads])
    check_padded(mask, (*mask.shape, 2, 5), head_mask, torch.float32, **CLOSE)


@both_tiles
@pytest.mark.parametrize("length", [16, 129])
def test_padded_without_a_mask(length):
    qkv, do = packed(2 * length, 1, 8).view(2, length, 3, 1, 8), packed(2 * length, 1, 8, seed=1)[:, 0]
    leaf = qkv.clone().requires_grad_()
    o = padded_attention(*leaf.unbind(2))
    (gradient,) = torch.autograd.grad(o, leaf, do.view(2, length, 1, 8))
    expected = results(attention, qkv.flatten(0, 1), do, cumulated((length, length), DEVICE))
    torch.testing.assert_close(o.flatten(0, 1).detach(), expected[0])
    torch.testing.assert_close(gradient.flatten(0, 1), expected[1])


@pytest.mark.parametrize(("shape", "tokens"), [((0, 4, 2, 3), 0), ((3, 0, 2, 3), 0), ((2, 4, 0, 3), 8)])
def test_nothing_to_attend_to(shape, tokens):
    q = torch.zeros(shape, requires_grad=True, device=DEVICE)
    head_mask = torch.ones(shape[0], shape[2], requires_grad=True, device=DEVICE)
    for padding in (None, torch.ones(shape[:2], dtype=torch.bool, device=DEVICE)):
        o = padded_attention(q, q, q, padding, head_mask)
        dq, dm = torch.autograd.grad(o.sum(), (q, head_mask))
        assert o.shape == dq.shape == shape and torch.equal(dm, torch.zeros_like(head_mask))
    for lengths in ((tokens,), (0,) * 3 + (tokens,), ()):
        n = sum(lengths)
        o = attention(*torch.zeros(3, n, *shape[2:], device=DEVICE), cumulated(lengths, DEVICE))
        assert o.shape == (n, *shape[2:])


def test_wrong_offsets_reach_no_memory_but_the_outputs():
    """On a device the host never reads them; here the launchers are called past the check of the op."""
    n, sentinel = 40, 77.0
    q, k, v, do = (packed(n, 1, 8, seed=seed)[:, 0] for seed in range(4))
    for offsets in ((0, 9, 4000), (-5, 1000, 2), (0, 0, -1000), (50, 60, 70)):
        cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
        call = (cu_seqlens, None, None, None, 0.0, 0.5)
        whole = torch.full((4, 3 * n, 1, 8), sentinel, device=DEVICE)
        o, dq, dk, dv = whole[:, n : 2 * n]
        stats, delta = torch.zeros(2, 1, n, device=DEVICE), torch.zeros(1, n, device=DEVICE)
        kernels.attention_fwd(q, k, v, *call, o, None, stats)
        attention_backward.attention_bwd(do, q, k, v, o, stats, *call, dq, dk, dv, None, delta)
        assert (whole[:, :n] == sentinel).all() and (whole[:, 2 * n :] == sentinel).all()
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="attention: cu_seqlens must be N = 40 at the end, got 39"):
            attention(q, k, v, cumulated((39,)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_outside_the_outputs_is_written(dtype):
    """Outputs lie in the middle of buffers of a sentinel, with a gap behind each head."""
    lengths, sentinel = (17, 0, 5), 77.0
    n = sum(lengths)
    q, k, v, do = (packed(n, 2, 5, dtype, seed)[:, 0] for seed in range(4))
    head_mask = torch.tensor([[1.0, 0], [1, 1], [0, 2]], device=DEVICE)
    whole = torch.full((5, n + 2, 2, 9), sentinel, dtype=dtype, device=DEVICE)
    o, unmasked, dq, dk, dv = whole[:, 1:-1, :, 2:7]
    all_stats = torch.full((4, 2, n), sentinel, device=DEVICE)
    stats, delta = all_stats[1:3], torch.zeros(2, n, device=DEVICE)
    dm = torch.full((3, 2), math.nan, device=DEVICE)
    call = (cumulated(lengths, DEVICE), None, head_mask, None, 0.0, 0.5)
    kernels.attention_fwd(q, k, v, *call, o, unmasked, stats)
    attention_backward.attention_bwd(do, q, k, v, unmasked, stats, *call, dq, dk, dv, dm, delta)
    assert dm.isfinite().all() and not (all_stats[1:3] == sentinel).any() and (all_stats[::3] == sentinel).all()
    assert not (whole[:, 1:-1, :, 2:7] == sentinel).any()
    whole[:, 1:-1, :, 2:7] = sentinel
    assert (whole == sentinel).all()


def far_tokens(path, n, heads, size):
    """float16 [n, H, D] whose tokens lie so far apart that int32 holds the place of the second, not of the third."""
    stride = 2**30 + 2**28
    if DEVICE == "cuda":
        whole = torch.zeros((n - 1) * stride + heads * size, dtype=torch.float16, device=DEVICE)
    else:  # sparse: no memory
        whole = torch.from_file(str(path), shared=True, size=(n - 1) * stride + heads * size, dtype=torch.float16)
        os.unlink(path)
    return whole.as_strided((n, heads, size), (stride, size, 1))


@pytest.mark.parametrize("far", ["k", "do", "dv"])
def test_offsets_past_int32(tmp_path, far):
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free GPU memory")
    names = ("q", "k", "v", "do", "o", "dq", "dk", "dv")
    stats, delta = torch.zeros(2, 2, 3, device=DEVICE), torch.zeros(2, 3, device=DEVICE)
    call = (cumulated((3,), DEVICE), None, None, None, 0.0, 0.5)

    def computed(place):
        x = {name: packed(3, 2, 4, torch.float16, seed)[:, 0].contiguous() for seed, name in enumerate(names)}
        if place is not None:
            x[far] = place.copy_(x[far])
        q, k, v, do, o, dq, dk, dv = x.values()
        kernels.attention_fwd(q, k, v, *call, o, None, stats)
        attention_backward.attention_bwd(do, q, k, v, o, stats, *call, dq, dk, dv, None, delta)
        return o, dq, dk, dv

    for x, y in zip(computed(far_tokens(tmp_path / far, 3, 2, 4)), computed(None), strict=True):
        assert torch.equal(x, y)


# Heads that count for nothing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_sequence", [False, True])
def test_a_dead_head_is_not_even_read(per_sequence):
    """Its queries, keys and values, NaN here, reach neither output nor gradient."""
    cu_seqlens, qkv, do = cumulated((5, 0, 20), DEVICE), packed(25, 3, 4), packed(25, 3, 4, seed=1)[:, 0]
    head_mask = torch.tensor([2.0, 0.0, 1.0], device=DEVICE)
    if per_sequence:
        head_mask = head_mask.repeat(3, 1)
    expected = results(attention_reference, qkv, do, cu_seqlens, head_mask=head_mask)
    leaf = qkv.clone()
    leaf[:, :, 1] = math.nan
    leaf.requires_grad_()
    o = attention(*leaf.unbind(1), cu_seqlens, head_mask)
    torch.testing.assert_close(o.detach(), expected[0], **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(o, leaf, do)[0], expected[1], **CLOSE)
    assert (attention(*leaf.detach().unbind(1), cu_seqlens, head_mask)[:, 1] == 0).all()


def test_gradient_of_the_head_mask_where_it_is_zero():
    cu_seqlens, qkv, do = cumulated((5, 20), DEVICE), packed(25, 3, 4), packed(25, 3, 4, seed=1)[:, 0]
    for head_mask in (torch.zeros(3), torch.tensor([[0.0, 1, 0], [0, 0, 1]])):
        head_mask = head_mask.to(DEVICE)
        ours = results(attention, qkv, do, cu_seqlens, head_mask=head_mask)
        for x, y in zip(ours, results(attention_reference, qkv, do, cu_seqlens, head_mask=head_mask), strict=True):
            torch.testing.assert_close(x, y, **CLOSE)
        assert (ours[2] != 0).all() and (ours[0][:5, 0] == 0).all()


# Numbers ---------------------------------------------------------------------------------------------------------


def test_huge_scores_do_not_overflow():
    qkv, cu_seqlens = packed(20, 2, 8) * 1e4, cumulated((20,), DEVICE)
    o, dqkv = results(attention, qkv, torch.ones(20, 2, 8, device=DEVICE), cu_seqlens)
    assert o.isfinite().all() and dqkv.isfinite().all()
    torch.testing.assert_close(o.double(), sdpa(*qkv.double().unbind(1), cu_seqlens))


def test_a_common_offset_of_all_scores_costs_gradients_no_accuracy():
    """m and Z are kept apart: their logarithm would round at the size of the scores, here 10^4."""
    qkv, do, cu_seqlens = packed(40, 1, 8), packed(40, 1, 8, seed=1)[:, 0], cumulated((40,), DEVICE)
    qkv[:, :2, :, 0] = 200.0
    ours, torchs = (results(function, qkv, do, cu_seqlens)[1] for function in (attention, sdpa))
    assert_twice_rule(ours, torchs, results(sdpa, qkv.double(), do.double(), cu_seqlens)[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_sequence_leaves_the_others_exact(bad):
    cu_seqlens, qkv, do = cumulated((6, 20, 4), DEVICE), packed(30, 2, 8), packed(30, 2, 8, seed=1)[:, 0]
    clean = results(attention, qkv, do, cu_seqlens)
    qkv[7, :, 0, 0] = bad
    found = results(attention, qkv, do, cu_seqlens)
    for x, y in zip(found, clean, strict=True):
        assert torch.equal(x[:6], y[:6]) and torch.equal(x[26:], y[26:])
        assert not x[6:26].isfinite().all()


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_same_bits_every_run(dropout_p):
    cu_seqlens, qkv = cumulated((33, 0, 3), DEVICE), packed(36, 2, 32)
    do, mask = torch.ones(36, 2, 32, device=DEVICE), torch.linspace(0, 1, 2, device=DEVICE)

    def everything():
        torch.manual_seed(0)
        return results(attention, qkv, do, cu_seqlens, head_mask=mask, dropout_p=dropout_p)

    first = everything()
    assert all(torch.equal(x, y) for x, y in zip(first, everything(), strict=True))


# Dropout ---------------------------------------------------------------------------------------------------------


def dropped_everything(backend, x, where, p, seed, device):
    """Output and gradients of one call with this seed; the head mask's too."""
    heads, batch = x[0].shape[-2], x[0].shape[0] if where[0] is None else len(where[0]) - 1
    head_mask = torch.linspace(-1, 2, heads, device=device).expand(batch, heads)
    where = [None if w is None else w.to(device) for w in where]
    q, k, v, do = (y.to(device) for y in x)
    call = (*where, head_mask, torch.tensor([seed], device=device), p, 0.5, True, 0)
    with distilbert_fast.backend(backend):
        call = op.Call(q, k, v, *call)
        o, unmasked, stats = op._forward_keeping(call)
        return [y.cpu() for y in (o, *op._backward(call, do, unmasked, stats))]


@both_tiles
@pytest.mark.parametrize(("form", "p"), [("packed", 0.1), ("padded", 0.75), ("holes", 0.4)])
@pytest.mark.skipif(not backends.availability("cpu").ok, reason="the native module is not built")
def test_a_seed_drops_the_same_as_on_the_cpu(form, p):
    """Values are the identity, so that o shows drop(p) itself; with holes, tokens are numbered as if packed."""
    t, d = 20, 20
    q, k, _ = projection(2 * t, 2, d, torch.float32).unbind(1)
    x = [q, k, torch.eye(t).repeat(2, 1)[:, None].expand(-1, 2, t), projection(2 * t, 2, d, torch.float32, 1)[:, 0]]
    where = [cumulated((t, t)), None]
    if form != "packed":
        x = [y.unflatten(0, (2, t)) for y in x]
        where = [None, torch.tensor(MASKS["right" if form == "padded" else "holes"][::2], dtype=torch.bool)[:2]]
    for seed in (0, 2**63 - 2):
        ours = dropped_everything("triton", x, where, p, seed, DEVICE)
        cpus = dropped_everything("cpu", x, where, p, seed, "cpu")
        assert torch.equal(ours[0] == 0, cpus[0] == 0)
        for y, z in zip(ours, cpus, strict=True):
            torch.testing.assert_close(y, z, **CLOSE)


def test_dropout_follows_torchs_generator():
    cu_seqlens, (q, k, v) = cumulated((9, 4), DEVICE), packed(13, 2, 4).unbind(1)
    torch.manual_seed(0)
    first, second = (attention(q, k, v, cu_seqlens, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(attention(q, k, v, cu_seqlens, dropout_p=0.5), first)
    assert not torch.equal(first, second)


# Backends and torch's machinery ------------------------------------------------------------------------------


@pytest.mark.parametrize("forward, backward", [("torch", "triton"), ("triton", "torch")])
def test_forward_and_backward_on_different_backends(forward, backward):
    cu_seqlens, do = cumulated((20, 3), DEVICE), packed(23, 2, 8, seed=1)[:, 0]
    head_mask = torch.tensor([0.0, 2.0], device=DEVICE)
    expected = results(attention_reference, packed(23, 2, 8), do, cu_seqlens, head_mask=head_mask)
    qkv, leaf = packed(23, 2, 8).requires_grad_(), head_mask.clone().requires_grad_()
    for mask in (leaf, head_mask):
        with distilbert_fast.backend(forward):
            o = attention(*qkv.unbind(1), cu_seqlens, mask)
        inputs = [x for x in (qkv, mask) if x.requires_grad]
        with distilbert_fast.backend(backward):
            gradients = torch.autograd.grad(o, inputs, do)
        for x, y in zip(gradients, expected[1:], strict=False):
            torch.testing.assert_close(x, y, **CLOSE)


@pytest.mark.parametrize("form", ["packed", "padded"])
def test_opcheck(form):
    q, k, v = packed(8, 2, 4).unbind(1)
    where = (cumulated((5, 0, 3), DEVICE), None)
    if form == "padded":
        q, k, v = (x.view(2, 4, 2, 4) for x in (q, k, v))
        where = (None, torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1]], dtype=torch.bool, device=DEVICE))
    head_mask, dm = (torch.rand(2, 2, device=DEVICE), True) if form == "padded" else (None, False)
    call = (*where, head_mask, torch.tensor([7], device=DEVICE), 0.1, 0.5, dm, 0)
    ops = torch.ops.distilbert_fast
    torch.library.opcheck(ops.attention_forward_keeping.default, (q, k, v, *call))
    o, unmasked, stats = ops.attention_forward_keeping.default(q, k, v, *call)
    assert torch.equal(o, ops.attention_forward.default(q, k, v, *call))
    assert stats.shape == (2, 2, 8) and unmasked.shape == (q.shape if dm else (0,))
    backward = (q, k, v, *call, torch.randn(q.shape, device=DEVICE), unmasked if dm else o, stats)
    torch.library.opcheck(ops.attention_backward.default, backward)


def test_compile():
    cu_seqlens, mask = cumulated((5, 3), DEVICE), torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1]], device=DEVICE) > 0

    def function(qkv, head_mask):
        o = attention(*qkv.unbind(1), cu_seqlens, head_mask)
        q, k, v = qkv.unflatten(0, (2, 4)).unbind(2)
        return o.view(2, 4, 2, 4) + padded_attention(q, k, v, mask, head_mask)

    qkv, head_mask = packed(8, 2, 4).requires_grad_(), torch.tensor([0.5, 1.0], device=DEVICE, requires_grad=True)
    compiled, expected = torch.compile(function, backend="aot_eager", fullgraph=True), function(qkv, head_mask)
    o = compiled(qkv, head_mask)
    torch.testing.assert_close(o, expected)
    do = torch.randn_like(o)
    inputs = (qkv, head_mask)
    for x, y in zip(*(torch.autograd.grad(z, inputs, do) for z in (o, expected)), strict=True):
        torch.testing.assert_close(x, y)


# On a device only ------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@tuned_tiles
@needs_gpu
@pytest.mark.parametrize("size", [32, 64, 128, 256])
@pytest.mark.parametrize("length", [127, 128, 129, 512])
def test_the_usual_heads_at_the_usual_lengths(size, length):
    for dtype in DTYPES:
        check((length, 40, length), 4, size, dtype, "BH", seeds=1)


@pytest.mark.gpu
@tuned_tiles
@needs_gpu
def test_more_blocks_than_a_grid_dimension_of_65535():
    lengths = (1,) * 70_000 + (3,)
    qkv, cu_seqlens = packed(sum(lengths), 1, 4), cumulated(lengths, DEVICE)
    do = packed(sum(lengths), 1, 4, seed=1)[:, 0]
    found = results(attention, qkv, do, cu_seqlens)
    last = results(attention, qkv[-4:], do[-4:], cumulated((1, 3), DEVICE))
    assert all(torch.equal(x[-4:], y) for x, y in zip(found, last, strict=True))


@pytest.mark.gpu
@tuned_tiles
@needs_gpu
def test_on_a_side_stream():
    cu_seqlens, qkv, do = cumulated((300, 20), DEVICE), packed(320, 2, 64), packed(320, 2, 64, seed=1)[:, 0]
    expected = results(attention, qkv, do, cu_seqlens)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # whatever runs on another stream does not wait for this
        ours = results(attention, qkv + 0, do, cu_seqlens)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(x, y) for x, y in zip(ours, expected, strict=True))


@pytest.mark.gpu
@tuned_tiles
@needs_gpu
@pytest.mark.parametrize("form", ["packed", "padded"])
def test_inside_a_cuda_graph(form):
    """Replayed with other lengths and another mask: the host has never known them."""
    qkv, do = packed(400, 2, 64, torch.float16), packed(400, 2, 64, torch.float16, seed=1)[:, 0]
    mask = torch.arange(200, device=DEVICE) < torch.tensor([[150], [200]], device=DEVICE)
    cu_seqlens = cumulated((60, 340), DEVICE)

    def everything():
        if form == "packed":
            return results(attention, qkv, do, cu_seqlens)
        qkv_padded, do_padded = qkv.view(2, 200, 3, 2, 64), do.reshape(2, 200, 2, 64)
        leaf = qkv_padded.detach().clone().requires_grad_()
        o = padded_attention(*leaf.unbind(2), mask)
        return [o.detach(), *torch.autograd.grad(o, leaf, do_padded)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        everything()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    cu_seqlens.copy_(cumulated((250, 150), DEVICE))
    mask.copy_(mask.flip(0, 1))
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(captured, everything(), strict=True))


@pytest.mark.gpu
@tuned_tiles
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_a_device_that_is_not_current():
    arguments = packed(150, 2, 64), packed(150, 2, 64, seed=1)[:, 0], cumulated((140, 10), DEVICE)
    there = results(attention, *(x.to("cuda:1") for x in arguments))
    for x, y in zip(there, results(attention, *arguments), strict=True):
        assert x.device.index == 1 and torch.equal(x.to(DEVICE), y)
