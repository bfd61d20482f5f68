"""The logic of csrc/cuda/attention*.cu without a GPU, through the op: compiled for the CPU by cuda_on_cpu/, behind the
real bindings. What a GPU does with it (speed, memory, rounding of its matrix products) is not seen here.
"""

from __future__ import annotations

import math
import os
import re

import pytest
import torch
from attention_oracle import check_padded, cumulated, projection, results, sdpa

from distilbert_fast import attention, backends, padded_attention
from distilbert_fast.ops import _attention_backends as op
from distilbert_fast.ops.attention import attention_reference
from distilbert_fast.testing import assert_twice_rule

BF16, FP16 = torch.bfloat16, torch.float16
CLOSE = {"rtol": 4e-3, "atol": 4e-3}  # of float16
needs_cpu = pytest.mark.skipif(not backends.availability("cpu").ok, reason="the native module is not built")


@pytest.fixture(autouse=True)
def emulated(cuda_on_cpu, monkeypatch):
    """Attention on CPU tensors is served by the emulated kernels, whose shared memory is read without conflicts."""
    monkeypatch.setattr(backends, "select", lambda *call, **rest: "cuda")
    yield cuda_on_cpu
    assert cuda_on_cpu.emulated_bank_conflicts() == 0


def masked(shape):
    """None, or a head mask with a 0 in it."""
    return None if shape is None else torch.linspace(-1, 2, math.prod(shape)).view(shape).round()


def check(lengths, heads, size, dtype, mask=None, seeds=1):
    """Output and all gradients follow the rule of twice torch's error, pooled over some seeds."""
    cu_seqlens, n = cumulated(lengths), sum(lengths)
    head_mask = masked({None: None, "H": (heads,), "BH": (len(lengths), heads)}[mask])
    double = None if head_mask is None else head_mask.double()
    found = []
    for seed in range(seeds):
        qkv, do = projection(n, heads, size, dtype, seed), projection(n, heads, size, dtype, seed + 100)[:, 0]
        before = qkv.clone()
        ours = results(attention, qkv, do, cu_seqlens, head_mask=head_mask)
        assert torch.equal(qkv, before) and ours[0].is_contiguous()
        torchs = results(sdpa, qkv, do, cu_seqlens, head_mask=head_mask)
        found.append((ours, torchs, results(sdpa, qkv.double(), do.double(), cu_seqlens, head_mask=double)))
    ours, torchs, exact = ([torch.cat(x) for x in zip(*seeds, strict=True)] for seeds in zip(*found, strict=True))
    for what, *three in zip(("o", "dqkv", "dm"), ours, torchs, exact, strict=False):
        assert_twice_rule(*three, what)


# One token; a warp's 16 and one more; a tile's 64 and one more; a block's 128 and more than two tiles.
@pytest.mark.parametrize("length", [1, 16, 17, 64, 65, 128, 130])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_lengths(length, dtype):
    check((length,), 1, 64, dtype, seeds=4)


@pytest.mark.parametrize("size", [1, 7, 8, 31, 32, 33, 40, 64, 65, 96, 100, 128])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_head_sizes(size, dtype):
    check((19, 66), 1, size, dtype, seeds=2)


@pytest.mark.parametrize("lengths", [(0, 3, 0), (16, 15, 17, 0, 0, 65, 1), ()], ids=str)
@pytest.mark.parametrize(("heads", "mask"), [(1, None), (3, "H"), (2, "BH")])
def test_sequences_and_head_masks(lengths, heads, mask):
    check(lengths, heads, 32, BF16, mask, seeds=4)


def test_more_sequences_than_lanes_look_at_once():
    check([i % 3 for i in range(70)] + [130] + [0] * 40 + [1], 1, 32, FP16)


@pytest.mark.parametrize("scale", [0.05, 1, 2.0])
def test_scales(scale):
    cu_seqlens, qkv, do = cumulated((20, 3)), projection(23, 2, 8, FP16), projection(23, 2, 8, FP16, 1)[:, 0]
    found = results(attention, qkv, do, cu_seqlens, scale=scale)
    exact = results(attention_reference, qkv.double(), do.double(), cu_seqlens, scale=scale)
    for x, y in zip(found, exact, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-2, atol=1e-2)


# Where: layouts, offsets, padding ------------------------------------------------------------------------------


def layouts(x):
    """The same [N, H, D] with other strides and offsets; NaN lies between."""
    n, h, d = x.shape
    nan = lambda *shape: torch.full(shape, math.nan, dtype=x.dtype)  # noqa: E731
    return {
        "fused projection": nan(n, 3, h, d)[:, 1].copy_(x),
        "heads first": nan(h, n, d).transpose(0, 1).copy_(x),
        "last stride 2": nan(n, h, 2 * d)[..., ::2].copy_(x),
        "misaligned": nan(n * h * d + 1)[1:].view(n, h, d).copy_(x),
        "odd stride": nan(n, h * d + 1)[:, : h * d].view(n, h, d).copy_(x),
    }


@pytest.mark.parametrize("layout", list(layouts(torch.zeros(0, 1, 1))))
@pytest.mark.parametrize("size", [8, 5])
def test_layouts_of_inputs_and_gradient(layout, size):
    cu_seqlens, qkv, do = cumulated((5, 70)), projection(75, 2, size, BF16), projection(75, 2, size, BF16, 1)[:, 0]
    contiguous = [x.contiguous().requires_grad_() for x in qkv.unbind(1)]
    laid_out = [layouts(x.detach())[layout].requires_grad_() for x in contiguous]
    o, expected = attention(*laid_out, cu_seqlens), attention(*contiguous, cu_seqlens)
    assert torch.equal(o, expected)
    gradients = torch.autograd.grad(o, laid_out, layouts(do)[layout])
    for x, y in zip(gradients, torch.autograd.grad(expected, contiguous, do), strict=True):
        assert torch.equal(x, y)


def test_a_gradient_of_stride_zero():
    cu_seqlens, qkv = cumulated((5, 20)), projection(25, 2, 8, FP16).requires_grad_()
    attention(*qkv.unbind(1), cu_seqlens).sum().backward()
    expected = torch.autograd.grad(attention_reference(*qkv.double().unbind(1), cu_seqlens).sum(), qkv)[0]
    torch.testing.assert_close(qkv.grad, expected, **CLOSE)


LONG = torch.arange(200)
MASKS = {
    "right": torch.stack([LONG < 200, LONG < 70, LONG < 3]),
    "left": torch.stack([LONG >= 199, LONG >= 100]),
    "holes": torch.stack([LONG % 3 > 0, LONG < 0, (LONG < 5) | (LONG > 140), LONG == 64]),
    "none": torch.stack([LONG >= 0] * 2),
}


@pytest.mark.parametrize("heads", [None, "H", "BH"])
@pytest.mark.parametrize("where", list(MASKS))
def test_padding_anywhere(where, heads):
    """NaN lies in the padding; whole tiles and blocks of it are passed over."""
    mask = MASKS[where]
    head_mask = masked({None: None, "H": (2,), "BH": (len(mask), 2)}[heads])
    tolerance = {"rtol": 1e-2, "atol": 3e-2 if heads else 1e-2}  # dm is a sum over all tokens
    check_padded(mask, (*mask.shape, 2, 8), head_mask, FP16, **tolerance)


def test_padded_without_a_mask():
    qkv, do = projection(140, 1, 8, FP16), projection(140, 1, 8, FP16, 1)[:, 0]
    leaf = qkv.view(2, 70, 3, 1, 8).clone().requires_grad_()
    o = padded_attention(*leaf.unbind(2))
    (gradient,) = torch.autograd.grad(o, leaf, do.view(2, 70, 1, 8))
    expected = results(attention, qkv, do, cumulated((70, 70)))
    assert torch.equal(o.flatten(0, 1), expected[0]) and torch.equal(gradient.flatten(0, 1), expected[1])


@pytest.mark.parametrize(("shape", "tokens"), [((0, 4, 2, 3), 0), ((3, 0, 2, 3), 0), ((2, 4, 0, 3), 8)])
def test_nothing_to_attend_to(shape, tokens):
    q = torch.zeros(shape, requires_grad=True, dtype=BF16)
    head_mask = torch.ones(shape[0], shape[2], requires_grad=True)
    for padding in (None, torch.ones(shape[:2], dtype=torch.bool)):
        o = padded_attention(q, q, q, padding, head_mask)
        dq, dm = torch.autograd.grad(o.sum(), (q, head_mask))
        assert o.shape == dq.shape == shape and torch.equal(dm, torch.zeros_like(head_mask))
    for lengths in ((tokens,), (0,) * 3 + (tokens,), ()):
        n = sum(lengths)
        assert attention(*torch.zeros(3, n, *shape[2:], dtype=BF16), cumulated(lengths)).shape == (n, *shape[2:])


def launch(module, x, cu_seqlens, head_mask=None, dm=None):
    """Both passes past the checks of the op; x: q, k, v, do, o, unmasked, dq, dk, dv of [N, H, D]."""
    n, heads = x["q"].shape[:2]
    call = op.Call(x["q"], x["k"], x["v"], cu_seqlens, None, head_mask, None, 0.0, 0.5, dm is not None, 0)
    arguments = op._cuda_arguments(call)
    at = {name: op._heads_argument(tensor) for name, tensor in x.items()}
    stats, r = torch.full((4, heads, n), 77.0), torch.empty(heads, n)
    module.attention_forward(arguments, at["o"], at.get("unmasked", (0, 0, 0, 0)), stats[1].data_ptr(), 0, 0)
    address = 0 if dm is None else dm.data_ptr()
    kept = at["o" if dm is None else "unmasked"]
    gradients = (at[name] for name in ("dq", "dk", "dv"))
    module.attention_backward(arguments, at["do"], kept, stats[1].data_ptr(), r.data_ptr(), *gradients, address, 0, 0)
    assert (stats[::3] == 77).all()


NAMES = ("q", "k", "v", "do", "o", "unmasked", "dq", "dk", "dv")


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("size", [5, 8])
def test_nothing_outside_the_outputs_is_written(size, dtype, cuda_module):
    """Outputs lie in the middle of buffers of a sentinel, with a gap behind each head."""
    lengths, sentinel = (67, 0, 5), 77.0
    n = sum(lengths)
    whole = torch.full((5, n + 2, 2, 24), sentinel, dtype=dtype)
    outputs = whole[:, 1:-1, :, 8 : 8 + size]
    x = {name: projection(n, 2, size, dtype, seed)[:, 0] for seed, name in enumerate(NAMES[:4])}
    x |= dict(zip(NAMES[4:], outputs, strict=True))
    dm = torch.full((3, 2), math.nan)
    launch(cuda_module, x, cumulated(lengths), torch.tensor([[1.0, 0], [1, 1], [0, 2]]), dm)
    assert dm.isfinite().all() and not (outputs == sentinel).any()
    outputs.fill_(sentinel)
    assert (whole == sentinel).all()


@pytest.mark.parametrize("size", [5, 8, 64])
@pytest.mark.parametrize("form", ["packed", "padded"])
def test_no_byte_behind_a_tensor_is_touched(form, size, fenced, monkeypatch):
    """Heads that lie in whole 16 bytes or not, and tokens that end in the middle of a tile."""
    mask = torch.arange(70).expand(2, 70) < torch.tensor([[70], [69]])
    where = (None, fenced(mask)) if form == "padded" else (fenced(cumulated((70, 0, 70))), None)
    head_mask = fenced(torch.tensor([[0.5, 2.0]] * (2 if form == "padded" else 3)))
    seed = fenced(torch.tensor([5]))
    q, k, v, do = (fenced(projection(140, 2, size, BF16, seed)[:, 0].contiguous()) for seed in range(4))
    if form == "padded":
        q, k, v, do = (x.unflatten(0, (2, 70)) for x in (q, k, v, do))
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *x, **rest: fenced(new_empty(*x, **rest)))
    call = op.Call(q, k, v, *where, head_mask, seed, 0.1, 0.5, True, 0)
    _, *kept = op._forward_keeping_cuda(call)
    for gradient in op._backward_cuda(call, do, *kept):
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    "offsets", [(0, 9, 4000), (-5, 1000, 2), (0, 0, -1000), (50, 60, 70), (2**31 - 1, -(2**31), 7)], ids=str
)
def test_wrong_offsets_reach_no_memory_but_the_outputs(offsets, cuda_module):
    """On a GPU the host never reads them."""
    n, sentinel = 40, 77.0
    whole = torch.full((4, 3 * n, 1, 8), sentinel, dtype=FP16)
    x = {name: projection(n, 1, 8, FP16, seed)[:, 0] for seed, name in enumerate(NAMES[:4])}
    x |= dict(zip(("o", "dq", "dk", "dv"), whole[:, n : 2 * n], strict=True))
    launch(cuda_module, x, torch.tensor(offsets, dtype=torch.int32))
    assert (whole[:, :n] == sentinel).all() and (whole[:, 2 * n :] == sentinel).all()


def far_tokens(path, n, heads, size):
    """float16 [n, H, D] whose tokens lie so far apart that int32 holds the place of the second, not of the third."""
    stride = 2**30 + 2**28
    whole = torch.from_file(str(path), shared=True, size=(n - 1) * stride + heads * size, dtype=FP16)  # sparse
    os.unlink(path)
    return whole.as_strided((n, heads, size), (stride, size, 1))


@pytest.mark.parametrize("far", NAMES)
def test_offsets_past_int32(tmp_path, far, cuda_module):
    def computed(place):
        x = {name: projection(3, 2, 8, FP16, seed)[:, 0].contiguous() for seed, name in enumerate(NAMES)}
        if place is not None:
            x[far] = place.copy_(x[far])
        launch(cuda_module, x, cumulated((3,)), torch.tensor([[0.5, 2.0]]), torch.empty(1, 2))
        return [x[name] for name in NAMES[4:]]

    for x, y in zip(computed(far_tokens(tmp_path / far, 3, 2, 8)), computed(None), strict=True):
        assert torch.equal(x, y)


# Heads that count for nothing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_sequence", [False, True])
def test_a_dead_head_is_not_even_read(per_sequence):
    """Its queries, keys and values, NaN here, reach neither output nor gradient."""
    cu_seqlens, qkv, do = cumulated((5, 0, 20)), projection(25, 3, 8, FP16), projection(25, 3, 8, FP16, 1)[:, 0]
    head_mask = torch.tensor([2.0, 0.0, 1.0])
    if per_sequence:
        head_mask = head_mask.repeat(3, 1)
    expected = results(attention, qkv, do, cu_seqlens, head_mask=head_mask)
    leaf = qkv.clone()
    leaf[:, :, 1] = math.nan
    leaf.requires_grad_()
    o = attention(*leaf.unbind(1), cu_seqlens, head_mask)
    assert torch.equal(o, expected[0]) and (o[:, 1] == 0).all()
    torch.testing.assert_close(torch.autograd.grad(o, leaf, do)[0], expected[1], **CLOSE)


def test_gradient_of_the_head_mask_where_it_is_zero():
    cu_seqlens, qkv, do = cumulated((5, 70)), projection(75, 3, 8, FP16), projection(75, 3, 8, FP16, 1)[:, 0]
    for head_mask in (torch.zeros(3), torch.tensor([[0.0, 1, 0], [0, 0, 1]])):
        ours = results(attention, qkv, do, cu_seqlens, head_mask=head_mask)
        exact = results(attention_reference, qkv.double(), do.double(), cu_seqlens, head_mask=head_mask.double())
        for x, y in zip(ours, exact, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-2, atol=1e-2)
        assert (ours[2] != 0).all() and (ours[0][:5, 0] == 0).all()


# Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_huge_scores_do_not_overflow(dtype):
    qkv, cu_seqlens = projection(70, 2, 8, dtype), cumulated((70,))
    qkv[:, :2] *= 1e4
    o, dqkv = results(attention, qkv, torch.ones(70, 2, 8, dtype=dtype), cu_seqlens)
    assert dqkv.isfinite().all()
    torch.testing.assert_close(o.double(), sdpa(*qkv.double().unbind(1), cu_seqlens), rtol=1e-2, atol=1e-2)


def test_a_common_offset_of_all_scores_costs_gradients_no_accuracy():
    """m and 1 / Z are kept apart: their logarithm would round at the size of the scores, here 10^4."""
    qkv, do, cu_seqlens = projection(40, 1, 8, FP16), projection(40, 1, 8, FP16, 1)[:, 0], cumulated((40,))
    qkv[:, :2, :, 0] = 200.0
    ours, torchs = (results(function, qkv, do, cu_seqlens)[1] for function in (attention, sdpa))
    assert_twice_rule(ours, torchs, results(sdpa, qkv.double(), do.double(), cu_seqlens)[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_sequence_leaves_the_others_exact(bad):
    cu_seqlens, qkv, do = cumulated((6, 20, 4)), projection(30, 2, 8, BF16), projection(30, 2, 8, BF16, 1)[:, 0]
    clean = results(attention, qkv, do, cu_seqlens)
    qkv[7, :, 0, 0] = bad
    for x, y in zip(results(attention, qkv, do, cu_seqlens), clean, strict=True):
        assert torch.equal(x[:6], y[:6]) and torch.equal(x[26:], y[26:])
        assert not x[6:26].isfinite().all()


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_same_bits_every_run(dropout_p):
    cu_seqlens, qkv = cumulated((66, 0, 3)), projection(69, 2, 32, BF16)
    do, mask = torch.ones(69, 2, 32, dtype=BF16), torch.linspace(0, 1, 2)

    def everything():
        torch.manual_seed(0)
        return results(attention, qkv, do, cu_seqlens, head_mask=mask, dropout_p=dropout_p)

    first = everything()
    assert all(torch.equal(x, y) for x, y in zip(first, everything(), strict=True))


# Dropout ---------------------------------------------------------------------------------------------------------


@needs_cpu
@pytest.mark.parametrize(("form", "p"), [("packed", 0.1), ("right", 0.75), ("left", 0.3), ("holes", 0.4)])
def test_a_seed_drops_the_same_as_on_the_cpu(form, p):
    """Values are parts of the identity, so that o shows drop(p) itself; with padding, tokens are numbered as if
    packed. Gradients are those of what was dropped."""
    mask = MASKS["right" if form == "packed" else form][:2]
    t = mask.shape[1]
    where = (cumulated((t, t)), None) if form == "packed" else (None, mask)
    q, k, do = (projection(2 * t, 2, 64, BF16, seed)[:, 0] for seed in range(3))
    seen = torch.eye(t, 64, dtype=BF16).roll(40, 0)  # of keys 40 to 103
    v = seen.repeat(2, 1)[:, None].expand(-1, 2, -1)
    if form != "packed":
        q, k, v, do = (x.unflatten(0, (2, t)) for x in (q, k, v, do))
    head_mask = torch.tensor([0.5, 2.0]).expand(2, 2)
    for seed in (2**63 - 2, 0):
        call = op.Call(q, k, v, *where, head_mask, torch.tensor([seed]), p, 0.1, True, 0)
        o, *kept = op._forward_keeping_cuda(call)
        cpus = op._forward_cpu(call)
        assert torch.equal(o == 0, cpus == 0) and (o == 0).any()
        torch.testing.assert_close(o, cpus, rtol=2e-2, atol=1e-3)
    gradients = op._backward_cuda(call, do, *kept)
    for x, y in zip(gradients, op._backward_cpu(call, do, *kept), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)


# Backends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dm", [False, True])
def test_forward_on_another_backend(dm):
    cu_seqlens, do = cumulated((20, 70)), projection(90, 2, 8, FP16, 1)[:, 0]
    (q, k, v), head_mask = projection(90, 2, 8, FP16).unbind(1), torch.tensor([[0.0, 2.0], [1.0, 0.5]])
    call = op.Call(q, k, v, cu_seqlens, None, head_mask, None, 0.0, 0.5, dm, 0)
    o, *kept = op._forward_keeping_cuda(call)
    expected = op._backward_cuda(call, do, *(kept if dm else (o, kept[1])))
    for x, y in zip(op._backward_cuda(call, do, *op.nothing_like(q)), expected, strict=True):
        assert torch.equal(x, y)


def test_device_and_stream(cuda_on_cpu, monkeypatch):
    x = torch.ones(20, 1, 8, dtype=BF16)
    monkeypatch.setattr(backends, "device_and_stream", lambda device: (1, 0x1234))
    attention(x, x, x, cumulated((20,)))
    assert cuda_on_cpu.emulated_launch_device() == 1
    assert cuda_on_cpu.emulated_launch_stream() == 0x1234
    assert cuda_on_cpu.emulated_device() == 0
    monkeypatch.setattr(backends, "device_and_stream", lambda device: (7, 0))
    with pytest.raises(RuntimeError, match=r"^attention: cudaSetDevice: invalid device ordinal$"):
        attention(x, x, x, cumulated((20,)))


CALL = dict(q=(64, 0, 8, 8), k=(64, 0, 8, 8), v=(64, 0, 8, 8), dtype=1, cu_seqlens=64, mask=0, tokens=4, length=0)
CALL |= dict(batch=1, heads=1, head_size=8, head_mask=0, head_mask_stride=0, every_head=False, scale=1.0)
CALL |= dict(dropout_p=0.0, seed=0)
BAD = [
    ("batch", -1, "batch must be 0 to 1073741823, got -1"),
    ("tokens", 2**31, "tokens must be 0 to 2147483519, got 2147483648"),
    ("length", -1, "length must be 0 to 2147483519, got -1"),
    ("heads", 65536, "heads must be 0 to 65535, got 65536"),
    ("head_size", 0, "head_size must be 1 to 128, got 0"),
    ("head_size", 129, "head_size must be 1 to 128, got 129"),
    ("dtype", 0, "dtype must be 1 to 2, got 0"),
    ("dtype", 3, "dtype must be 1 to 2, got 3"),
    ("scale", 0.0, "scale must be finite and above 0, got 0.000000"),
    ("scale", math.inf, "scale must be finite and above 0, got inf"),
    ("dropout_p", 1.0, "dropout_p must be at least 0 and below 1, got 1.000000"),
    ("dropout_p", math.nan, "dropout_p must be at least 0 and below 1, got nan"),
    ("dropout_p", 0.5, "seed must point to a number where there is dropout, got null"),
    ("k", (0, 0, 8, 8), "q, k and v must point to memory, got null"),
]
HEADS = (64, 0, 8, 8)


@pytest.mark.parametrize(("name", "value", "message"), BAD, ids=[message for *_, message in BAD])
def test_both_refuse(cuda_module, name, value, message):
    arguments = tuple((CALL | {name: value}).values())
    with pytest.raises(ValueError, match=f"^attention: {re.escape(message)}$"):
        cuda_module.attention_forward(arguments, HEADS, (0,) * 4, 64, 0, 0)
    with pytest.raises(ValueError, match=f"^attention: {re.escape(message)}$"):
        cuda_module.attention_backward(arguments, HEADS, HEADS, 64, 64, HEADS, HEADS, HEADS, 0, 0, 0)


def test_outputs_that_point_nowhere(cuda_module):
    arguments, nowhere = tuple(CALL.values()), (0,) * 4
    with pytest.raises(ValueError, match=r"^attention: o must point to memory, got null$"):
        cuda_module.attention_forward(arguments, nowhere, nowhere, 64, 0, 0)
    with pytest.raises(ValueError, match=r"^attention: do, o, stats, r, dq, dk and dv must point to memory, got null$"):
        cuda_module.attention_backward(arguments, HEADS, HEADS, 0, 64, HEADS, HEADS, HEADS, 0, 0, 0)
    with pytest.raises(ValueError, match=r"^attention: every_head must be true where dm is wanted, got false$"):
        cuda_module.attention_backward(arguments, HEADS, HEADS, 64, 64, HEADS, HEADS, HEADS, 64, 0, 0)
