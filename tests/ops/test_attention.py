"""attention and padded_attention against torch's scaled_dot_product_attention, in every layout that breaks things."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from attention_oracle import check_padded, cumulated, projection, results, sdpa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import served
from torch._subclasses.fake_tensor import FakeTensorMode
from traced import Traced

import distilbert_fast
from distilbert_fast import attention, padded_attention
from distilbert_fast.ops import _attention_backends
from distilbert_fast.ops.attention import attention_reference
from distilbert_fast.testing import assert_twice_rule

TRACED = {
    "attention": Traced(
        lambda q, k, v, c, m: attention(q, k, v, c, m),
        lambda n: [*torch.randn(3, n, 2, 8), torch.tensor([0, n // 2, n], dtype=torch.int32), torch.rand(2, 2)],
    ),
    "padded_attention": Traced(
        lambda q, k, v, a, m: padded_attention(q, k, v, a, m),
        lambda n: [
            *torch.randn(3, 2, n, 2, 8),
            torch.arange(n).expand(2, n) < torch.tensor([[n], [n - 1]]),
            torch.rand(2),
        ],
    ),
}

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Empty ones first, last and between; runs of one length; one token; past every power of two up to 129.
LENGTHS = [(0, 3, 0), (1,), (7, 7, 7), (16, 15, 17, 17, 0, 0, 1), (129, 64), ()]


@pytest.mark.covering(together=2)
@pytest.mark.parametrize(("forced", "dtype"), served("attention", DTYPES), indirect=["forced"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("heads", "size", "mask"), [(1, 1, None), (3, 5, "H"), (2, 64, "BH"), (4, 33, None)])
def test_output_and_gradients(lengths, heads, size, mask, forced, dtype):
    cu_seqlens = cumulated(lengths)
    n = int(cu_seqlens[-1])
    shape = {None: None, "H": (heads,), "BH": (len(lengths), heads)}[mask]
    head_mask = None if shape is None else torch.linspace(-1, 2, math.prod(shape)).view(shape)
    double = None if head_mask is None else head_mask.double()
    found = []
    for seed in range(8 if n < 50 else 2):  # pooled: where few values are compared, torch is at times exact by luck
        qkv, do = projection(n, heads, size, dtype, seed), projection(n, heads, size, dtype, seed + 100)[:, 0]
        ours = results(attention, qkv, do, cu_seqlens, head_mask=head_mask)
        assert ours[0].dtype == dtype and ours[0].is_contiguous()
        torchs = results(sdpa, qkv, do, cu_seqlens, head_mask=head_mask)
        found.append((ours, torchs, results(sdpa, qkv.double(), do.double(), cu_seqlens, head_mask=double)))
    ours, torchs, exact = ([torch.cat(x) for x in zip(*seeds, strict=True)] for seeds in zip(*found, strict=True))
    for what, *three in zip(("o", "dqkv", "dm"), ours, torchs, exact, strict=False):
        assert_twice_rule(*three, what)


@pytest.mark.parametrize(("forced", "dtype"), served("attention", DTYPES), indirect=["forced"])
@pytest.mark.parametrize(("length", "size"), [(384, 64), (1030, 32), (70, 128)])
def test_long_sequences_and_the_usual_heads(length, size, forced, dtype):
    cu_seqlens = cumulated((length,))
    qkv, do = projection(length, 2, size, dtype), projection(length, 2, size, dtype, seed=1)[:, 0]
    ours, torchs = (results(function, qkv, do, cu_seqlens) for function in (attention, sdpa))
    exact = results(sdpa, qkv.double(), do.double(), cu_seqlens)
    for what, *three in zip(("o", "dqkv"), ours, torchs, exact, strict=True):
        assert_twice_rule(*three, what)


TOLERANCES = {
    torch.float32: {"rtol": 1e-4, "atol": 5e-5},  # scores of a scale of 1 differ by 30: gradients are what cancels
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 40), max_size=6),
    heads=st.integers(1, 4),
    size=st.integers(1, 70),
    scale=st.sampled_from([None, 0.05, 1.0]),
    dtype=st.sampled_from(list(TOLERANCES)),
    data=st.data(),
)
def test_any_sequences_heads_and_masks(forced, lengths, heads, size, scale, dtype, data):
    """Views of one projection; empty sequences and masks of 0 among the others, which are dead or only measured."""
    cu_seqlens, n = cumulated(lengths), sum(lengths)
    values = st.sampled_from([0.0, 0.5, 1.0, -2.0])
    shape = data.draw(st.sampled_from([None, (heads,), (len(lengths), heads)]))
    head_mask = None
    if shape is not None:
        head_mask = torch.tensor(data.draw(st.lists(values, min_size=math.prod(shape), max_size=math.prod(shape))))
        head_mask = head_mask.view(shape)
    qkv, do = projection(n, heads, size, dtype), projection(n, heads, size, dtype, seed=1)[:, 0]
    before = qkv.clone()
    double = None if head_mask is None else head_mask.double()
    exact = results(attention_reference, qkv.double(), do.double(), cu_seqlens, head_mask=double, scale=scale)
    found = results(attention, qkv, do, cu_seqlens, head_mask=head_mask, scale=scale)
    for x, y in zip(found, exact, strict=True):
        torch.testing.assert_close(x.double(), y, **TOLERANCES[dtype])
    leaf = qkv.clone().requires_grad_()  # and where the gradient of the mask is not asked for
    o = attention(*leaf.unbind(1), cu_seqlens, head_mask, scale=scale)
    same = {"rtol": 0, "atol": 0} if forced != "torch" else TOLERANCES[dtype]  # torch's own products vary
    torch.testing.assert_close(o, found[0], **same)
    torch.testing.assert_close(torch.autograd.grad(o, leaf, do)[0], found[1], **same)
    assert torch.equal(qkv, before)


@pytest.mark.parametrize("scale", [None, 0.3, 2])
def test_reference_is_torchs_attention(scale):
    cu_seqlens, qkv = cumulated((4, 0, 6)), projection(10, 2, 5)
    q, k, v = qkv.unbind(1)
    whole = F.scaled_dot_product_attention(*(x[4:].transpose(0, 1) for x in (q, k, v)), scale=scale)
    torch.testing.assert_close(attention_reference(q, k, v, cu_seqlens, scale=scale)[4:], whole.transpose(0, 1))
    torch.testing.assert_close(attention(q, k, v, cu_seqlens, scale=scale)[4:], whole.transpose(0, 1))


@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("scores", [1, 20, 2**18])
def test_gradcheck(per_sequence, dropout_p, scores, monkeypatch):
    """In float64, whatever the tiles; a head of mask 0 among the others; the same dropout in each evaluation."""
    monkeypatch.setattr(_attention_backends, "_scores", lambda q: scores)
    cu_seqlens = cumulated((2, 0, 3, 3))
    qkv = projection(8, 2, 2).requires_grad_()
    head_mask = torch.tensor([0.7, 0.0], dtype=torch.float64)
    if per_sequence:
        head_mask = torch.stack([head_mask, head_mask.flip(0), head_mask * 0, head_mask - 1])
    head_mask.requires_grad_()

    def function(qkv, head_mask):
        torch.manual_seed(5)
        return attention(*qkv.unbind(1), cu_seqlens, head_mask, dropout_p)

    every_entry = scores == 20 and per_sequence and dropout_p > 0
    assert torch.autograd.gradcheck(function, (qkv, head_mask), fast_mode=not every_entry)
    fixed = head_mask.detach()
    assert torch.autograd.gradcheck(lambda qkv: function(qkv, fixed), (qkv,), fast_mode=True)


def test_gradient_of_the_head_mask_where_it_is_zero(forced):
    cu_seqlens, qkv = cumulated((5, 8)), projection(13, 3, 4, torch.float32)
    do = projection(13, 3, 4, torch.float32, seed=1)[:, 0]
    for head_mask in (torch.zeros(3), torch.tensor([[0.0, 1, 0], [0, 0, 1]])):
        ours = results(attention, qkv, do, cu_seqlens, head_mask=head_mask)
        for x, y in zip(ours, results(attention_reference, qkv, do, cu_seqlens, head_mask=head_mask), strict=True):
            torch.testing.assert_close(x, y)
        assert (ours[2] != 0).all()


def test_a_dead_head_is_not_even_read(forced):
    """Its queries, keys and values, NaN here, reach neither output nor gradient."""
    cu_seqlens, qkv = cumulated((5, 0, 5, 2)), projection(12, 3, 4, torch.float32)
    do = projection(12, 3, 4, torch.float32, seed=1)[:, 0]
    for head_mask in (torch.tensor([2.0, 0.0, 1.0]), torch.tensor([[2.0, 0.0, 1.0]]).repeat(4, 1)):
        expected = results(attention_reference, qkv, do, cu_seqlens, head_mask=head_mask)
        leaf = qkv.clone()
        leaf[:, :, 1] = math.nan
        leaf.requires_grad_()
        o = attention(*leaf.unbind(1), cu_seqlens, head_mask)
        torch.testing.assert_close(o.detach(), expected[0])
        torch.testing.assert_close(torch.autograd.grad(o, leaf, do)[0], expected[1])


def test_a_head_of_mask_zero_costs_nothing(monkeypatch):
    """Its queries, keys and values, NaN here, reach neither output nor gradient, and torch never sees them."""
    seen = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *a, **k: seen.append(tuple(q.shape)) or original(q, *a, **k)
    )
    cu_seqlens, qkv, do = cumulated((5, 5, 2)), projection(12, 3, 4), projection(12, 3, 4, seed=1)[:, 0]
    head_mask = torch.tensor([2.0, 0.0, 1.0])
    expected = results(attention_reference, qkv, do, cu_seqlens, head_mask=head_mask.double())
    qkv[:, :, 1] = math.nan
    leaf = qkv.requires_grad_()
    o = attention(*leaf.unbind(1), cu_seqlens, head_mask)
    o.backward(do)
    assert seen == [(2, 2, 5, 4), (1, 2, 2, 4)]
    assert (o[:, 1] == 0).all() and (leaf.grad[:, :, 1] == 0).all()
    torch.testing.assert_close(o.detach(), expected[0])
    torch.testing.assert_close(leaf.grad, expected[1])
    # Dead in one sequence only: zeros there, not NaN.
    qkv.requires_grad_(False)[5:, :, 1] = 1.0
    o = attention(*qkv.unbind(1), cu_seqlens, torch.tensor([[1.0, 0, 1], [1, 1, 1], [1, 1, 1]]))
    assert (o[:5, 1] == 0).all() and o.isfinite().all()


@pytest.mark.parametrize("lengths", [(6,) * 5, (4, 4, 7, 7, 7, 4)], ids=str)
def test_neighbours_of_one_length_share_a_call(lengths, monkeypatch):
    calls = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: calls.append(k["attn_mask"]) or original(*a, **k)
    )
    attention(*projection(sum(lengths), 2, 4).unbind(1), cumulated(lengths))
    assert calls == [None] * len(list(itertools.groupby(lengths)))
    calls.clear()
    x = torch.randn(5, 6, 2, 4, dtype=torch.float64)
    padded_attention(x, x, x)
    padded_attention(x, x, x, torch.ones(5, 6, dtype=torch.bool))
    assert calls == [None, None]


# Layouts -----------------------------------------------------------------------------------------------------


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same [N, H, D] with other strides and offsets; NaN or garbage lies between."""
    n, h, d = x.shape
    nan = lambda *shape: torch.full(shape, math.nan, dtype=x.dtype)  # noqa: E731
    return {
        "contiguous": x.contiguous(),
        "fused projection": nan(n, 3, h, d)[:, 1].copy_(x),
        "heads first": nan(h, n, d).transpose(0, 1).copy_(x),
        "last stride 2": nan(n, h, 2 * d)[..., ::2].copy_(x),
        "last dimension first": nan(d, n, h).permute(1, 2, 0).copy_(x),
        **{f"offset {i}": nan(n * h * d + i)[i:].view(n, h, d).copy_(x) for i in (1, 2, 3)},
    }


@pytest.mark.parametrize("layout", list(layouts(torch.zeros(0, 1, 1))))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_of_inputs_and_gradient(layout, dtype, forced):
    cu_seqlens, qkv = cumulated((5, 9, 9)), projection(23, 3, 8, dtype)
    do = projection(23, 3, 8, dtype, seed=1)[:, 0]
    contiguous = [x.contiguous().requires_grad_() for x in qkv.unbind(1)]
    laid_out = [layouts(x.detach())[layout].requires_grad_() for x in contiguous]
    before = [x.detach().clone() for x in laid_out]
    o = attention(*laid_out, cu_seqlens)
    expected = attention(*contiguous, cu_seqlens)
    torch.testing.assert_close(o, expected)
    strided = layouts(do)[layout]
    gradients = torch.autograd.grad(o, laid_out, strided, retain_graph=True)
    for x, y in zip(gradients, torch.autograd.grad(expected, contiguous, do), strict=True):
        torch.testing.assert_close(x, y)
    again = torch.autograd.grad(o, laid_out, strided)
    assert all(torch.equal(x, y) for x, y in zip(gradients, again, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(laid_out, before, strict=True))
    assert torch.equal(strided, do)


def test_a_gradient_of_stride_zero(forced):
    cu_seqlens, qkv = cumulated((5, 3)), projection(8, 2, 4, torch.float32).requires_grad_()
    attention(*qkv.unbind(1), cu_seqlens).sum().backward()
    expected = torch.autograd.grad(attention_reference(*qkv.unbind(1), cu_seqlens).sum(), qkv)[0]
    torch.testing.assert_close(qkv.grad, expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_same_bits_every_run_and_on_any_number_of_threads(dropout_p, forced):
    cu_seqlens, qkv, do = cumulated((33, 0, 40, 1)), projection(74, 4, 32, torch.float32), torch.ones(74, 4, 32)
    mask = torch.linspace(0, 1, 4)
    before = torch.get_num_threads()

    def everything():
        torch.manual_seed(0)
        return results(attention, qkv, do, cu_seqlens, head_mask=mask, dropout_p=dropout_p)

    try:
        first = everything()
        for threads in (1, 2, 3, 1, 5) if forced != "torch" else (before,) * 3:
            torch.set_num_threads(threads)
            assert all(torch.equal(x, y) for x, y in zip(first, everything(), strict=True))
    finally:
        torch.set_num_threads(before)


def test_huge_scores_do_not_overflow(forced):
    qkv = projection(20, 2, 8, torch.float32) * 1e4
    o, dqkv = results(attention, qkv, torch.ones(20, 2, 8), cumulated((20,)))
    assert o.isfinite().all() and dqkv.isfinite().all()
    torch.testing.assert_close(o.double(), sdpa(*qkv.double().unbind(1), cumulated((20,))))


def test_a_certain_query_takes_one_value(forced):
    """All other probabilities underflow; equal keys share."""
    q = torch.ones(7, 1, 3)
    k = torch.full((7, 1, 3), -1e4).index_fill_(0, torch.tensor([2]), 0.0)
    v = torch.arange(7.0)[:, None, None].expand(7, 1, 3)
    assert torch.equal(attention(q, k, v, cumulated((7,))), torch.full((7, 1, 3), 2.0))
    torch.testing.assert_close(attention(q, torch.full_like(k, -1e4), v, cumulated((7,))), torch.full((7, 1, 3), 3.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_sequence_leaves_the_others_exact(bad, forced):
    cu_seqlens, qkv = cumulated((6, 6, 4)), projection(16, 2, 8, torch.float32)
    clean = attention(*qkv.unbind(1), cu_seqlens)
    qkv[7, :, 0, 0] = bad
    o = attention(*qkv.unbind(1), cu_seqlens)
    torch.testing.assert_close(o[:6], clean[:6], rtol=0, atol=0)
    torch.testing.assert_close(o[12:], clean[12:], rtol=0, atol=0)
    assert not o[6:12].isfinite().all()


# Padding -----------------------------------------------------------------------------------------------------


@st.composite
def padded_batches(draw):
    b, t, h, d = (draw(st.integers(0, top)) for top in (5, 6, 2, 2))
    mask = draw(st.lists(st.lists(st.booleans(), min_size=t, max_size=t), min_size=b, max_size=b))
    shape = draw(st.sampled_from([None, (h + 1,), (b, h + 1)]))
    values = st.sampled_from([0.0, 0.5, 1.0, -2.0])
    heads = None if shape is None else draw(st.lists(values, min_size=math.prod(shape), max_size=math.prod(shape)))
    head_mask = None if heads is None else torch.tensor(heads, dtype=torch.float64).view(shape)
    return torch.tensor(mask, dtype=torch.bool).view(b, t), (b, t, h + 1, d + 1), head_mask


@settings(max_examples=60, deadline=None)
@given(padded_batches())
def test_padding_anywhere(batch):
    check_padded(*batch)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(padded_batches())
def test_padding_anywhere_in_float32(forced, batch):
    check_padded(*batch, torch.float32, **TOLERANCES[torch.float32])


def test_long_padding_and_holes(forced):
    mask = torch.rand(3, 150, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[1, 90:] = False
    check_padded(mask, (3, 150, 2, 40), torch.tensor([0.5, 1.0]), torch.float32, **TOLERANCES[torch.float32])


@settings(max_examples=30, deadline=None)
@given(padded_batches())
def test_padding_anywhere_as_a_gpu_computes_it(batch):
    """There nobody waits to learn where the padding is: one call for the batch, with a mask of its keys."""

    def whole(q, call):
        if q.numel():
            yield slice(0, q.shape[0]), slice(0, q.shape[1]), call.attention_mask

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_attention_backends, "_runs", whole)
        check_padded(*batch)


def test_padding_on_the_right_is_never_computed(monkeypatch):
    shapes = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *a, **k: shapes.append(tuple(q.shape)) or original(q, *a, **k)
    )
    x = torch.randn(4, 9, 2, 4, dtype=torch.float64)
    lengths = torch.tensor([9, 9, 3, 0])
    padded_attention(x, x, x, torch.arange(9) < lengths[:, None])
    assert shapes == [(2, 2, 9, 4), (1, 2, 3, 4)]


def test_padded_form_takes_heads_first_views(forced):
    """transformers hands over [B, H, T, D]; its transpose costs no copy and changes no bit."""
    q, k, v = (torch.randn(2, 3, 5, 4).transpose(1, 2) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    contiguous = padded_attention(q.contiguous(), k.contiguous(), v.contiguous(), mask)
    assert torch.equal(padded_attention(q, k, v, mask), contiguous)


@pytest.mark.parametrize(("shape", "tokens"), [((0, 4, 2, 3), 0), ((3, 0, 2, 3), 0), ((2, 4, 0, 3), 8)])
def test_nothing_to_attend_to(shape, tokens, forced):
    q = torch.zeros(shape, requires_grad=True)
    mask = torch.ones(shape[:2], dtype=torch.bool)
    head_mask = torch.ones(shape[0], shape[2], requires_grad=True)
    for padding in (None, mask):
        o = padded_attention(q, q, q, padding, head_mask)
        assert o.shape == shape
        gradients = torch.autograd.grad(o.sum(), (q, head_mask))
        assert [x.shape for x in gradients] == [q.shape, head_mask.shape]
    o = attention(*torch.zeros(3, tokens, *shape[2:]), cumulated((tokens,)))
    assert o.shape == (tokens, *shape[2:])


# Dropout -----------------------------------------------------------------------------------------------------


def recovered_dropout(cu_seqlens, q, k, p):
    """drop(p) itself [N, H, T], by attending to the identity; T tokens in each sequence."""
    t = int(cu_seqlens[1])
    v = torch.eye(t, dtype=q.dtype).repeat(len(cu_seqlens) - 1, 1)[:, None].expand(-1, q.shape[1], t)
    torch.manual_seed(3)
    return attention(q, k, v, cu_seqlens, dropout_p=p, scale=0.5)


@pytest.mark.parametrize("scores", [70, 2**18])
def test_dropout_drops_and_scales(scores, monkeypatch, forced):
    monkeypatch.setattr(_attention_backends, "_scores", lambda q: scores)
    p, cu_seqlens = 0.3, cumulated((16, 16, 16))
    q, k, _ = projection(48, 4, 16, torch.float32).unbind(1)
    dropped = recovered_dropout(cu_seqlens, q, k, p)
    kept = recovered_dropout(cu_seqlens, q, k, 0.0)
    torch.testing.assert_close(dropped, torch.where(dropped == 0, 0, kept / (1 - p)))
    count = dropped.numel()
    assert abs(int((dropped == 0).sum()) - p * count) < 5 * math.sqrt(count * p * (1 - p))
    # No two tiles, heads or sequences share what they drop.
    patterns = (dropped == 0).view(3, 16, 4, 16).transpose(1, 2).reshape(12, -1)
    assert len(patterns.unique(dim=0)) == 12


def test_dropout_drops_each_probability_as_often(forced):
    """Over many seeds: every place of query and key, and neighbours independently of each other."""
    p, t, count = 0.25, 20, 400
    q = torch.zeros(t * count, 1, t)
    dropped = (recovered_dropout(cumulated((t,) * count), q, q, p) == 0).view(count, t * t).double()
    spread = math.sqrt(p * (1 - p) / count)
    assert float((dropped.mean(dim=0) - p).abs().max()) < 5 * spread
    correlation = torch.corrcoef(dropped.T).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 6 / math.sqrt(count)
    assert float(correlation.square().mean()) == pytest.approx(1 / count, rel=0.05)


def test_dropout_gradients_are_those_of_what_was_dropped(forced):
    p, cu_seqlens = 0.3, cumulated((8, 8))
    qkv, do = projection(16, 2, 8, torch.float32), projection(16, 2, 8, torch.float32, seed=1)[:, 0]
    z = (recovered_dropout(cu_seqlens, *qkv.unbind(1)[:2], p) != 0) / (1 - p)

    def written_out(q, k, v, cu_seqlens, head_mask):
        q, k, v = (x.view(2, 8, 2, 8).transpose(1, 2) for x in (q, k, v))
        probabilities = torch.softmax(q @ k.mT * 0.5, dim=-1) * z.view(2, 8, 2, 8).transpose(1, 2)
        return (probabilities @ v * head_mask[:, None, None]).transpose(1, 2).reshape(16, 2, 8)

    def ours(q, k, v, cu_seqlens, head_mask):
        torch.manual_seed(3)
        return attention(q, k, v, cu_seqlens, head_mask, p, 0.5)

    head_mask = torch.tensor([0.5, 2.0])
    expected = results(written_out, qkv, do, cu_seqlens, head_mask=head_mask)
    for x, y in zip(results(ours, qkv, do, cu_seqlens, head_mask=head_mask), expected, strict=True):
        torch.testing.assert_close(x, y, **TOLERANCES[torch.float32])


def test_dropout_follows_torchs_generator(forced):
    cu_seqlens, (q, k, v) = cumulated((9, 4)), projection(13, 2, 4, torch.float32).unbind(1)
    torch.manual_seed(0)
    first, second = (attention(q, k, v, cu_seqlens, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(attention(q, k, v, cu_seqlens, dropout_p=0.5), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    attention(q, k, v, cu_seqlens)
    assert torch.equal(torch.get_rng_state(), state), "without dropout no random number is drawn"


def test_dropout_with_padding_and_a_dead_head_is_exact():
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    q, k, v = (torch.randn(3, 4, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    head_mask = torch.tensor([0.0, 1.5], dtype=torch.float64)

    def function(q, k, v):
        torch.manual_seed(1)
        return padded_attention(q, k, v, mask, head_mask, 0.5)

    assert torch.autograd.gradcheck(function, (q, k, v), fast_mode=True)


# torch's own machinery ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["packed", "padded"])
def test_opcheck(form):
    q, k, v = projection(8, 2, 4, torch.float32).unbind(1)  # strided
    if form == "padded":
        q, k, v = (x.view(2, 4, 2, 4).transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        where = (None, torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1]], dtype=torch.bool))
    else:
        where = (cumulated((5, 0, 3)), None)
    batch = 2 if form == "padded" else 3
    for head_mask, dm in ((None, False), (torch.rand(batch, 2), False), (torch.rand(batch, 2), True)):
        call = (*where, head_mask, torch.tensor([7]), 0.1, 0.5, dm, 0)
        ops = torch.ops.distilbert_fast
        torch.library.opcheck(ops.attention_forward.default, (q, k, v, *call))
        torch.library.opcheck(ops.attention_forward_keeping.default, (q, k, v, *call))
        _, unmasked, stats = ops.attention_forward_keeping.default(q, k, v, *call)
        do = torch.randn(q.shape)
        torch.library.opcheck(ops.attention_backward.default, (q, k, v, *call, do, unmasked, stats))


def counting_backend():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend, graphs


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_compile(gradients, dropout_p):
    cu_seqlens = cumulated((5, 3))
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)

    def function(qkv, head_mask):
        o = attention(*qkv.unbind(1), cu_seqlens, head_mask, dropout_p)
        q, k, v = qkv.unflatten(0, (2, 4)).unbind(2)
        return o.view(2, 4, 2, 4) + padded_attention(q, k, v, mask, head_mask, dropout_p)

    qkv, head_mask = projection(8, 2, 4, torch.float32), torch.tensor([0.5, 1.0])
    if gradients:
        qkv.requires_grad_(), head_mask.requires_grad_()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    o = compiled(qkv, head_mask)
    assert o.requires_grad == gradients
    if gradients:
        o.square().sum().backward()
    if dropout_p == 0:
        expected = function(qkv, head_mask)
        torch.testing.assert_close(o, expected)
        if gradients:
            dqkv, dm = torch.autograd.grad(expected.square().sum(), (qkv, head_mask))
            torch.testing.assert_close(qkv.grad, dqkv)
            torch.testing.assert_close(head_mask.grad, dm)


def test_compiles_over_fifty_lengths():
    backend, graphs = counting_backend()
    compiled = torch.compile(attention, backend=backend, fullgraph=True)
    for length in range(2, 52):
        cu_seqlens = cumulated((length,) * (length % 5 + 1))
        q, k, v = projection(int(cu_seqlens[-1]), 2, 4, torch.float32).unbind(1)
        torch.testing.assert_close(compiled(q, k, v, cu_seqlens), attention(q, k, v, cu_seqlens))
    assert len(graphs) <= 3


def test_fake_and_meta_tensors():
    for dtype, mode in itertools.product((torch.float32, torch.bfloat16), ("fake", "meta")):
        with FakeTensorMode() if mode == "fake" else torch.device("meta"):
            qkv = torch.empty(8, 3, 2, 4, dtype=dtype, requires_grad=True)
            head_mask = torch.empty(2, requires_grad=True)
            o = attention(*qkv.unbind(1), torch.empty(4, dtype=torch.int32), head_mask, 0.1)
            assert (o.shape, o.dtype, o.is_contiguous()) == ((8, 2, 4), dtype, True)
            dqkv, dm = torch.autograd.grad(o.sum(), (qkv, head_mask))
            assert (dqkv.shape, dm.shape) == (qkv.shape, head_mask.shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """As torch's attention: computed in the dtype of autocast, with float32 gradients for float32 leaves."""
    cu_seqlens, qkv = cumulated((6, 7)), projection(13, 2, 8, torch.float32).requires_grad_()
    head_mask = torch.tensor([0.5, 2.0], requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        q, k, v = qkv.unbind(1)
        o = attention(q.to(dtype), k, v.double().float(), cu_seqlens, head_mask, 0.1)
        o = attention(q.to(dtype), k, v, cu_seqlens, head_mask)
    assert o.dtype == dtype
    o.float().square().sum().backward()
    assert qkv.grad.dtype == head_mask.grad.dtype == torch.float32
    lower = results(attention, qkv.detach().to(dtype), 2 * o.detach(), cu_seqlens, head_mask=head_mask)
    assert torch.equal(lower[0], o)
    torch.testing.assert_close(lower[2], head_mask.grad, rtol=1e-2, atol=1e-2)


def test_float16_gradients_under_a_loss_scale():
    cu_seqlens, qkv = cumulated((64,)), projection(64, 2, 32, torch.float16)
    do = torch.full((64, 2, 32), 2.0**-20, dtype=torch.float32)
    scaled = results(attention, qkv, (do * 2**16).half(), cu_seqlens)[1].double() / 2**16
    exact = results(attention, qkv.double(), do.double(), cu_seqlens)[1]
    assert float((scaled - exact).abs().max()) < 2e-3 * float(exact.abs().max())


def test_the_reference_serves_when_it_is_forced():
    cu_seqlens, (q, k, v) = cumulated((3, 4)), projection(7, 2, 4).unbind(1)
    with distilbert_fast.backend("torch"):
        torch.testing.assert_close(attention(q, k, v, cu_seqlens), attention_reference(q, k, v, cu_seqlens))


# Bad input ---------------------------------------------------------------------------------------------------

CU = torch.tensor([0, 3, 7], dtype=torch.int32)
X = torch.zeros(7, 2, 4)


def packed(q=X, k=X, v=X, cu_seqlens=CU, **keywords):
    return lambda: attention(q, k, v, cu_seqlens, **keywords)


def padded(q=X[None], k=X[None], v=X[None], attention_mask=None, **keywords):
    return lambda: padded_attention(q, k, v, attention_mask, **keywords)


def offsets(*values):
    return torch.tensor(values, dtype=torch.int32)


FLOATS = "float32 or bfloat16 or float16 or float64"
BAD = [
    (packed([1.0]), TypeError, "attention: q must be a tensor, got list"),
    (packed(X.int()), TypeError, f"attention: q must be {FLOATS}, got int32"),
    (packed(X[0]), ValueError, "attention: q must be of shape [N, H, D], got [2, 4]"),
    (packed(k=X[:6]), ValueError, "attention: k must be of shape [7, 2, 4], got [6, 2, 4]"),
    (packed(v=X.double()), TypeError, "attention: v must be float32, got float64"),
    (packed(v=None), TypeError, "attention: v must be a tensor, got NoneType"),
    (packed(k=X.to("meta")), ValueError, "attention: k must be on cpu, got meta"),
    (
        packed(*[torch.zeros(7, 2, 0)] * 3),
        ValueError,
        "attention: q must be of head size D ≥ 1, got [7, 2, 0]",
    ),
    (packed(cu_seqlens=[0, 7]), TypeError, "attention: cu_seqlens must be a tensor, got list"),
    (packed(cu_seqlens=CU.long()), TypeError, "attention: cu_seqlens must be int32, got int64"),
    (packed(cu_seqlens=CU[None]), ValueError, "attention: cu_seqlens must be of shape [B + 1], got [1, 3]"),
    (packed(cu_seqlens=CU[:0]), ValueError, "attention: cu_seqlens must be of shape [B + 1], B ≥ 0, got [0]"),
    (packed(cu_seqlens=CU.to("meta")), ValueError, "attention: cu_seqlens must be on cpu, got meta"),
    (packed(cu_seqlens=offsets(1, 7)), ValueError, "attention: cu_seqlens must be 0 at the start, got 1"),
    (packed(cu_seqlens=offsets(0, 6)), ValueError, "attention: cu_seqlens must be N = 7 at the end, got 6"),
    (packed(cu_seqlens=offsets(0)), ValueError, "attention: cu_seqlens must be N = 7 at the end, got 0"),
    (packed(cu_seqlens=offsets(0, 9)), ValueError, "attention: cu_seqlens must be N = 7 at the end, got 9"),
    (
        packed(cu_seqlens=offsets(0, 5, 4, 7)),
        ValueError,
        "attention: cu_seqlens must be non-decreasing, got 4 after 5 at 2",
    ),
    (packed(head_mask=torch.ones(3)), ValueError, "attention: head_mask must be of shape [2], got [3]"),
    (packed(head_mask=torch.ones(3, 2)), ValueError, "attention: head_mask must be of shape [2, 2], got [3, 2]"),
    (packed(head_mask=torch.ones(2) > 0), TypeError, f"attention: head_mask must be {FLOATS}, got bool"),
    (packed(head_mask=[1, 0]), TypeError, "attention: head_mask must be a tensor, got list"),
    (packed(dropout_p=1.0), ValueError, "attention: dropout_p must be at least 0 and below 1, got 1.0"),
    (packed(dropout_p=-0.1), ValueError, "attention: dropout_p must be at least 0 and below 1, got -0.1"),
    (packed(dropout_p=math.nan), ValueError, "attention: dropout_p must be at least 0 and below 1, got nan"),
    (packed(dropout_p="0"), TypeError, "attention: dropout_p must be a number, got str"),
    (packed(scale=0.0), ValueError, "attention: scale must be finite and above 0, got 0.0"),
    (packed(scale=math.inf), ValueError, "attention: scale must be finite and above 0, got inf"),
    (padded(X), ValueError, "padded_attention: q must be of shape [B, T, H, D], got [7, 2, 4]"),
    (padded(v=X[None, :6]), ValueError, "padded_attention: v must be of shape [1, 7, 2, 4], got [1, 6, 2, 4]"),
    (
        padded(attention_mask=torch.ones(1, 7)),
        TypeError,
        "padded_attention: attention_mask must be bool, got float32",
    ),
    (
        padded(attention_mask=torch.ones(7, 1) > 0),
        ValueError,
        "padded_attention: attention_mask must be of shape [1, 7], got [7, 1]",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
