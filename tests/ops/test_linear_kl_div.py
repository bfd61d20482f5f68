"""linear_kl_div against the two losses on stored logits, its chunks, its memory and its gradients."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import served
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from traced import Traced

import distilbert_fast
from distilbert_fast import backends, linear_kl_div
from distilbert_fast.ops import _linear_kl_div_backends as op
from distilbert_fast.ops import _vocabulary_losses as shared
from distilbert_fast.ops.linear_kl_div import linear_kl_div_reference
from distilbert_fast.testing import LAYOUTS, assert_twice_rule, lay_out

TRACED = {
    "linear_kl_div": Traced(
        lambda *x: linear_kl_div(*x, temperature=2.0)[0],
        lambda n: [torch.randn(n, 8), torch.randn(11, 8), torch.randn(11)] * 2,
    )
}

IGNORE = -100


def sides(n, v, c_s=6, c_t=9, dtype=torch.float32, teacher_dtype=None, bias=True, seed=0) -> list:
    """h_s, W_s, b_s, h_t, W_t, b_t with logits of a standard deviation of about 2."""
    generator = torch.Generator().manual_seed(seed)

    def side(c, dtype):
        shapes = (n, c), (v, c), (v,)
        h, w, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        return [h.to(dtype), (2 / math.sqrt(c) * w).to(dtype), b.to(dtype) if bias else None]

    return [*side(c_s, dtype), *side(c_t, teacher_dtype or dtype)]


def rows(n, v, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    """Half of the rows for the KL and, independently, half of them with a label."""
    generator = torch.Generator().manual_seed(seed)
    kd_mask = torch.rand(n, generator=generator) < 0.5
    labels = torch.randint(0, v, (n,), generator=generator)
    return kd_mask, labels.masked_fill(torch.rand(n, generator=generator) < 0.5, IGNORE)


def results(function, tensors, *arguments, weights=(1.0, 1.0), **keywords) -> list[torch.Tensor]:
    """kl, ce, and the gradients dh_s, dW_s, db_s of their weighted sum."""
    leaves = [None if x is None else x.detach().requires_grad_(i < 3) for i, x in enumerate(tensors)]
    kl, ce = function(*leaves, *arguments, **keywords)
    student = [x for x in leaves[:3] if x is not None]
    weighted = [weight * loss for weight, loss in zip(weights, (kl, ce), strict=True) if weight is not None]
    gradients = torch.autograd.grad(sum(weighted), student, materialize_grads=True)
    return [kl.detach(), ce.detach(), *gradients]


def close(found, expected, **tolerance) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y.to(x.dtype), **tolerance)


def double(tensors):
    return [None if x is None else x.double() for x in tensors]


@pytest.fixture(params=[1, 4, 10_000], ids=lambda size: f"chunks of {size}")
def chunk(request, monkeypatch):
    monkeypatch.setattr(shared, "chunk_rows", lambda v, device: request.param)
    return request.param


# Accuracy ----------------------------------------------------------------------------------------------------


DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]


def assert_as_good_as_torch(n, v, dtype, teacher_dtype, bias=True, context=contextlib.nullcontext) -> None:
    found = []
    for seed in range(8 if n * v < 20_000 else 3):  # pooled: of a few numbers, torch is at times exact by luck
        tensors, (kd_mask, labels) = sides(n, v, 24, 9, dtype, teacher_dtype, bias, seed), rows(n, v, seed)
        arguments = (2.0, kd_mask, labels)
        with context():
            ours = results(linear_kl_div, tensors, *arguments, weights=(0.3, 1.7))
            same_dtype = results(linear_kl_div_reference, tensors, *arguments, weights=(0.3, 1.7))
        assert [x.dtype for x in ours] == [torch.float32] * 2 + [dtype] * (len(ours) - 2)
        exact = results(linear_kl_div_reference, double(tensors), *arguments, weights=(0.3, 1.7))
        found.append([[x.flatten() for x in these] for these in (ours, same_dtype, exact)])
    three = ([torch.cat(x) for x in zip(*seeds, strict=True)] for seeds in zip(*found, strict=True))
    for what, *compared in zip(("kl", "ce", "dh", "dW", "db"), *three, strict=False):
        assert_twice_rule(*compared, what)


@pytest.mark.covering(together=2)
@pytest.mark.parametrize(("forced", "dtypes"), served("linear_kl_div", DTYPES), indirect=["forced"])
@pytest.mark.parametrize(("n", "v"), [(0, 7), (1, 1), (13, 2), (13, 31), (29, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_losses_and_gradients(n, v, dtypes, bias, chunk, forced):
    assert_as_good_as_torch(n, v, *dtypes, bias)


@pytest.mark.parametrize(("forced", "dtypes"), served("linear_kl_div", DTYPES), indirect=["forced"])
def test_many_columns(dtypes, monkeypatch, forced):
    monkeypatch.setattr(shared, "chunk_rows", lambda v, device: 32)
    assert_as_good_as_torch(40, 3001, *dtypes)


@pytest.mark.parametrize("temperature", [0.5, 1, 2.0, 10.0])
@pytest.mark.parametrize("weights", [(1.0, None), (None, 1.0), (1.0, 1.0), (0.25, -3.0), (0.0, 1.0), (5, 0.0)])
def test_any_weights_of_the_losses(weights, temperature, chunk):
    """Weights that the op learns in backward only; None = the loss is not used at all."""
    tensors, (kd_mask, labels) = sides(11, 17, dtype=torch.float64), rows(11, 17)
    arguments = (temperature, kd_mask, labels)
    found = results(linear_kl_div, tensors, *arguments, weights=weights)
    close(found, results(linear_kl_div_reference, tensors, *arguments, weights=weights))


@pytest.mark.parametrize("labelled", [True, False])
def test_gradcheck(labelled, chunk):
    tensors, (kd_mask, labels) = sides(6, 5, dtype=torch.float64), rows(6, 5, seed=1)
    arguments = (*tensors[3:], 1.7, kd_mask, labels if labelled else None)
    student = [x.requires_grad_() for x in tensors[:3]]
    fast = chunk != 4 or not labelled
    assert torch.autograd.gradcheck(lambda h, W, b: linear_kl_div(h, W, b, *arguments), student, fast_mode=fast)


def test_the_reference_is_torchs_cross_entropy_and_kl_div():
    tensors, (kd_mask, labels) = sides(9, 7, dtype=torch.float64), rows(9, 7)
    kl, ce = linear_kl_div_reference(*tensors, 2.0, kd_mask, labels)
    s, t = F.linear(*tensors[:3]), F.linear(*tensors[3:])
    torch.testing.assert_close(ce, F.cross_entropy(s, labels))
    log_s, log_t = (F.log_softmax(x[kd_mask] / 2, dim=-1) for x in (s, t))
    torch.testing.assert_close(kl, 4 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True))


# Rows --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(-1, 6)), max_size=9), st.integers(1, 4), st.booleans())
def test_random_rows(counted, size, all_distilled):
    """Any masks and labels, any ignore_index. Rows that count for nothing, NaN here, reach nothing."""
    n = len(counted)
    tensors = sides(n, 7, dtype=torch.float64)
    kd_mask = None if all_distilled else torch.tensor([mask for mask, _ in counted], dtype=torch.bool)
    labels = torch.tensor([label for _, label in counted], dtype=torch.int64)
    expected = results(linear_kl_div_reference, tensors, 2.0, kd_mask, labels, ignore_index=-1)
    if kd_mask is not None:
        tensors[0][~kd_mask & (labels == -1)] = math.nan
        tensors[3][~kd_mask] = math.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "chunk_rows", lambda v, device: size)
        close(results(linear_kl_div, tensors, 2.0, kd_mask, labels, ignore_index=-1), expected)


@pytest.mark.parametrize("n", [0, 5])
@pytest.mark.parametrize("labels", [None, torch.full((5,), IGNORE)], ids=["no labels", "all ignored"])
def test_nothing_counted(n, labels):
    tensors = sides(n, 7)
    if n:
        tensors[0].fill_(math.nan)
    labels = None if labels is None else labels[:n]
    found = results(linear_kl_div, tensors, 2.0, torch.zeros(n, dtype=torch.bool), labels)
    assert all((x == 0).all() for x in found)
    assert [x.shape for x in found] == [(), (), (n, 6), (7, 6), (7,)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counted=st.lists(st.tuples(st.booleans(), st.integers(-1, 66)), max_size=9),
    v=st.integers(1, 67),
    size=st.integers(1, 4),
    temperature=st.floats(0.5, 10),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16])] * 2),
)
def test_random_rows_in_float32_and_bfloat16(forced, counted, v, size, temperature, dtypes):
    n = len(counted)
    tensors = sides(n, v, dtype=dtypes[0], teacher_dtype=dtypes[1])
    kd_mask = torch.tensor([mask for mask, _ in counted], dtype=torch.bool)
    labels = torch.tensor([min(label, v - 1) for _, label in counted], dtype=torch.int64)
    expected = results(linear_kl_div_reference, double(tensors), temperature, kd_mask, labels, ignore_index=-1)
    tensors[0][~kd_mask & (labels == -1)] = math.nan
    tensors[3][~kd_mask] = math.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "chunk_rows", lambda v, device: size)
        found = results(linear_kl_div, tensors, temperature, kd_mask, labels, ignore_index=-1)
    tolerance = {"rtol": 0.1, "atol": 0.1} if torch.bfloat16 in dtypes else {"rtol": 1e-4, "atol": 1e-5}
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y, **tolerance)


def test_without_labels_the_cross_entropy_is_zero():
    tensors = sides(5, 7, dtype=torch.float64)
    found = results(linear_kl_div, tensors, 2.0)
    assert found[1] == 0 and found[1].shape == ()
    close(found, results(linear_kl_div_reference, tensors, 2.0))


def test_only_counted_rows_are_projected(monkeypatch, forced):
    projected = []
    if forced == "torch":
        linear = F.linear
        monkeypatch.setattr(F, "linear", lambda h, *a: projected.append(tuple(h.shape)) or linear(h, *a))
    else:
        into = op.product_into
        monkeypatch.setattr(op, "product_into", lambda y, h, *a: projected.append(tuple(h.shape)) or into(y, h, *a))
    monkeypatch.setattr(shared, "chunk_rows", lambda v, device: 4)
    kd_mask = torch.tensor([0, 1, 0, 1, 1, 0, 0, 0, 1, 1], dtype=torch.bool)
    labels = torch.tensor([IGNORE, 1, 2, IGNORE, IGNORE, IGNORE, 3, 0, IGNORE, IGNORE])
    linear_kl_div(*sides(10, 7), 2.0, kd_mask, labels)
    student, teacher = ([shape for shape in projected if shape[1] == c] for c in (6, 9))
    assert student == [(4, 6), (4, 6)], "5 rows of the KL and 3 more with labels"
    assert teacher == [(4, 9), (1, 9)], "5 rows of the KL"


@pytest.mark.parametrize("frozen", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_the_gradients_asked_for(frozen):
    tensors, (kd_mask, labels) = sides(9, 7, dtype=torch.float64), rows(9, 7)
    expected = results(linear_kl_div_reference, tensors, 2.0, kd_mask, labels)[2:]
    leaves = [x.detach().requires_grad_(not stays) for x, stays in zip(tensors, frozen, strict=False)]
    teacher = [x.requires_grad_() for x in tensors[3:]]
    kl, ce = linear_kl_div(*leaves, *teacher, 2.0, kd_mask, labels)
    assert kl.requires_grad == ce.requires_grad == (not all(frozen))
    if not all(frozen):
        (kl + ce).backward()
    for leaf, gradient, stays in zip(leaves, expected, frozen, strict=True):
        if stays:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, gradient)
    assert all(x.grad is None for x in teacher)
    with torch.no_grad():
        assert not linear_kl_div(*leaves, *teacher, 2.0, kd_mask, labels)[0].requires_grad


def test_tied_weights():
    """The vocabulary projection is the word embedding: its gradient is the sum of both uses."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(11, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([1, 5, 5, 0, 10, 3])
    _, _, b_s, *teacher = sides(6, 11, dtype=torch.float64)
    kd_mask, labels = rows(6, 11)

    def gradient(function):
        kl, ce = function(embedding[ids].tanh(), embedding, b_s, *teacher, 2.0, kd_mask, labels)
        return torch.autograd.grad(3 * kl + ce, embedding)[0]

    torch.testing.assert_close(gradient(linear_kl_div), gradient(linear_kl_div_reference))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_row_leaves_other_rows_exact(bad, chunk, forced):
    tensors, (kd_mask, labels) = sides(9, 7), rows(9, 7)
    kd_mask[3], labels[3], kd_mask[:3], labels[4] = True, IGNORE, True, 2
    clean = results(linear_kl_div, tensors, 2.0, kd_mask, labels)
    tensors[0][3, 2] = bad
    found = results(linear_kl_div, tensors, 2.0, kd_mask, labels)
    others = torch.arange(9) != 3
    assert not found[0].isfinite() and torch.equal(found[1], clean[1])
    assert torch.equal(found[2][others], clean[2][others])
    assert not found[2][3].isfinite().all()


# Layouts, bits, memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(layout, dtype, forced):
    tensors, (kd_mask, labels) = sides(9, 33, 16, 16, dtype=dtype), rows(9, 33)
    expected = results(linear_kl_div, tensors, 2.0, kd_mask, labels)
    placed = [lay_out(x, layout) if x.dim() == 2 else lay_out(x[:, None], layout)[:, 0] for x in tensors]
    before = [x.clone() for x in placed]
    wide = torch.stack([kd_mask, ~kd_mask], dim=1)[:, 0], torch.stack([labels, labels], dim=1)[:, 1]
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    close(results(linear_kl_div, placed, 2.0, *wide), expected, **tolerance)
    assert all(torch.equal(x, y) for x, y in zip(placed, before, strict=True))


def test_backward_twice_changes_nothing(forced):
    tensors, (kd_mask, labels) = sides(9, 33), rows(9, 33)
    leaves = [x.clone().requires_grad_(i < 3) for i, x in enumerate(tensors)]
    kl, ce = linear_kl_div(*leaves, 2.0, kd_mask, labels)
    dkl = torch.tensor(0.5).expand(())
    torch.autograd.backward((kl, ce), (dkl, torch.tensor(2.0)), retain_graph=True)
    first = [x.grad.clone() for x in leaves[:3]]
    for x in leaves[:3]:
        x.grad.mul_(7)
        x.grad = None
    torch.autograd.backward((kl, ce), (dkl, torch.tensor(2.0)))
    assert all(torch.equal(x.grad, y) for x, y in zip(leaves, first, strict=False))
    assert all(torch.equal(x, y) for x, y in zip(leaves, tensors, strict=True))


def test_same_bits_every_run(monkeypatch, forced):
    monkeypatch.setattr(shared, "chunk_rows", lambda v, device: 16)
    tensors, (kd_mask, labels) = sides(70, 501, 32, 32), rows(70, 501)
    first = results(linear_kl_div, tensors, 2.0, kd_mask, labels)
    for _ in range(3):
        again = results(linear_kl_div, tensors, 2.0, kd_mask, labels)
        assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True))


def test_the_native_losses_have_the_same_bits_on_any_number_of_threads(tier):
    """The products around them are torch's."""
    n, n_kl, v = 23, 17, 5003
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(n, v, generator=generator) for _ in range(2))
    labels = torch.randint(0, v, (n,), generator=generator).masked_fill(torch.arange(n) % 3 == 0, -1)

    def everything(threads):
        out = [s.clone(), torch.empty(n_kl), torch.empty(n), torch.empty(int((labels >= 0).sum()), v)]
        pointers = [x.data_ptr() for x in out]
        backends.cpu().linear_kl_div(
            pointers[0], t.data_ptr(), 0, 0, n, n_kl, v, 2.0, labels.data_ptr(), True, *pointers[1:], threads
        )
        return out

    first = everything(1)
    for threads in (2, 3, 1, 5):
        assert all(torch.equal(x, y) for x, y in zip(everything(threads), first, strict=True))
    assert torch.equal(first[0][n_kl:], s[n_kl:]), "rows without a teacher stay logits"
    kept = labels >= 0
    torch.testing.assert_close(first[2][kept], F.cross_entropy(s[kept], labels[kept], reduction="none"))
    assert (first[2][~kept] == 0).all()
    torch.testing.assert_close(first[3], s[kept].softmax(dim=1) - F.one_hot(labels[kept], v))


def test_accumulation_over_two_halves_is_the_whole():
    """Sums, not means, add up: weighted by its counts, each half contributes its share."""
    tensors, (kd_mask, labels) = sides(10, 7, dtype=torch.float64), rows(10, 7)
    whole = results(linear_kl_div, tensors, 2.0, kd_mask, labels)
    counts = lambda rows: (int(kd_mask[rows].sum()), int((labels[rows] != IGNORE).sum()))  # noqa: E731
    total, parts = counts(slice(None)), []
    for half in (slice(0, 5), slice(5, 10)):
        share = [part / all_ for part, all_ in zip(counts(half), total, strict=True)]
        some = [tensors[0][half], *tensors[1:3], tensors[3][half], *tensors[4:]]
        kl, ce, dh, *gradients = results(linear_kl_div, some, 2.0, kd_mask[half], labels[half], weights=share)
        parts.append([kl * share[0], ce * share[1], dh, *gradients])
    first, second = parts
    joined = [torch.cat([x, y]) if i == 2 else x + y for i, (x, y) in enumerate(zip(first, second, strict=True))]
    close(joined, whole)


class LiveMemory(TorchDispatchMode):
    """The most bytes that tensors made inside the block held at one time."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.largest = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.largest = max(self.largest, storage.nbytes())
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


def memory_beyond_the_gradients(function, n, v, c, chunk):
    tensors, (kd_mask, labels) = sides(n, v, c, c), rows(n, v)
    leaves = [x.requires_grad_(i < 3) for i, x in enumerate(tensors)]
    with pytest.MonkeyPatch.context() as patch, LiveMemory() as memory:
        patch.setattr(shared, "chunk_rows", lambda v, device: chunk)
        kl, ce = function(*leaves, 2.0, kd_mask, labels)
        (kl + ce).backward()
    return memory.peak - 4 * 3 * (n + v) * c - 4 * 3 * v, memory.largest


def test_memory_does_not_grow_with_the_logits():
    """Four times the rows: not a byte more but a few numbers a row. The stored logits would be the 40-fold."""
    v, c, chunk = 4001, 8, 16
    few, _ = memory_beyond_the_gradients(linear_kl_div, 160, v, c, chunk)
    many, largest = memory_beyond_the_gradients(linear_kl_div, 640, v, c, chunk)
    logits = 4 * chunk * v
    assert largest <= max(logits, 4 * 2 * v * c)
    assert many < few + 480 * 100 and many < 8 * logits
    stored, _ = memory_beyond_the_gradients(linear_kl_div_reference, 640, v, c, chunk)
    assert stored > 40 * logits, "the measure sees stored logits"


def test_chunks_of_the_real_vocabulary():
    v = 30522
    assert shared.chunk_rows(v, torch.device("cpu")) * v * 4 <= 32 * 2**20
    assert 2048 <= shared.chunk_rows(v, torch.device("cuda")) <= 4500
    assert shared.chunk_rows(2**40, torch.device("cpu")) == 1
    n = shared.chunk_rows(v, torch.device("cpu")) + 3
    tensors, labels = sides(n, v, 4, 4), torch.full((n,), IGNORE)
    labels[[0, n - 1]] = torch.tensor([v - 1, 0])
    close(
        results(linear_kl_div, tensors, 2.0, None, labels),
        results(linear_kl_div_reference, double(tensors), 2.0, None, labels),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("counted", ["some", "all", "none"])
def test_sums(chunk, counted):
    """Losses and gradients that are not divided by the counts of rows, whatever the chunks."""
    tensors, (kd_mask, labels) = sides(9, 7, dtype=torch.float64), rows(9, 7)
    if counted != "some":
        kd_mask = torch.full_like(kd_mask, counted == "all")
        labels = labels.clamp(min=0) if counted == "all" else torch.full_like(labels, IGNORE)
    call = 2.0, None if counted == "all" else kd_mask, labels
    found = results(linear_kl_div, tensors, *call, weights=(3.0, 0.7), reduction="sum")
    close(found, results(linear_kl_div_reference, tensors, *call, weights=(3.0, 0.7), reduction="sum"))
    means = linear_kl_div(*tensors, *call)
    counts = int(kd_mask.sum()), int((labels != IGNORE).sum())
    close(found[:2], [mean * count for mean, count in zip(means, counts, strict=True)])
    close(linear_kl_div(*tensors, *call, reduction="sum"), found[:2])
    compiled = torch.compile(linear_kl_div, backend="aot_eager", fullgraph=True)
    close(results(compiled, tensors, *call, weights=(3.0, 0.7), reduction="sum"), found)


# torch's own machinery ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled", [False, True])
def test_opcheck(labelled):
    tensors, (kd_mask, labels) = sides(5, 7), rows(5, 7)
    tensors[0], tensors[1] = lay_out(tensors[0], "transposed"), lay_out(tensors[1], "strided_rows")
    forward = torch.ops.distilbert_fast.linear_kl_div_forward.default
    call = (*tensors, kd_mask, labels if labelled else None, 2.0, IGNORE)
    for gradients in ((True, True, True), (False, True, False), (False, False, False)):
        torch.library.opcheck(forward, (*call, *gradients))
    torch.library.opcheck(forward, (*sides(5, 7, bias=False), None, None, 2.0, IGNORE, True, True, False))


@pytest.mark.parametrize("weights", [(1.0, 2.0), (1.0, None)])
def test_compile(weights):
    tensors, (kd_mask, labels) = sides(6, 33), rows(6, 33)
    compiled = torch.compile(linear_kl_div, backend="aot_eager", fullgraph=True)
    expected = results(linear_kl_div, tensors, 2.0, kd_mask, labels, weights=weights)
    close(results(compiled, tensors, 2.0, kd_mask, labels, weights=weights), expected)
    close(compiled(*tensors, 2.0, kd_mask, labels), expected[:2])


def test_compiles_over_fifty_lengths():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(linear_kl_div, backend=backend, fullgraph=True)
    for n in range(2, 52):
        tensors, (kd_mask, labels) = sides(n, 17), rows(n, 17)
        found, expected = (results(f, tensors, 2.0, kd_mask, labels) for f in (compiled, linear_kl_div))
        close(found, expected)
    assert len(graphs) <= 2


@pytest.mark.parametrize("mode", ["fake", "meta"])
def test_fake_and_meta_tensors(mode):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        with FakeTensorMode() if mode == "fake" else torch.device("meta"):
            h, W, b = (torch.empty(shape, dtype=dtype, requires_grad=True) for shape in ((4, 6), (9, 6), (9,)))
            labels = torch.empty(4, dtype=torch.int64)
            kl, ce = linear_kl_div(h, W, b, h, W, None, 2.0, torch.empty(4, dtype=torch.bool), labels)
            for loss in (kl, ce):
                assert loss.shape == () and loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            gradients = torch.autograd.grad(kl + ce, (h, W, b))
            assert [x.shape for x in gradients] == [(4, 6), (9, 6), (9,)]
            assert all(x.dtype == dtype for x in gradients)


@pytest.mark.parametrize("name", ["", "torch"], ids=["free choice", "torch"])  # whose products autocast would cast
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, name, monkeypatch):
    """As torch's linear: projected in the dtype of autocast, with float32 gradients for float32 leaves."""
    monkeypatch.setenv("DISTILBERT_FAST_BACKEND", name)
    tensors, (kd_mask, labels) = sides(9, 33), rows(9, 33)
    with distilbert_fast.backend("torch"):
        with torch.autocast("cpu", dtype=dtype):
            found = results(linear_kl_div, tensors, 2.0, kd_mask, labels)
        assert all(x.dtype == torch.float32 for x in found)
        close(found, results(linear_kl_div, [x.to(dtype) for x in tensors], 2.0, kd_mask, labels), rtol=0, atol=0)


@pytest.mark.covering(together=2)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "v"), [(0, 7), (1, 1), (13, 31), (29, 640)])
def test_autocast_is_as_good_as_torchs(n, v, bias, chunk, place):
    """Where the products are ours, weights stay float32 and their gradients are not rounded."""
    context = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    assert_as_good_as_torch(n, v, torch.float32, torch.float32, bias, context)


def test_only_autocast_mixes_dtypes():
    tensors = [x.bfloat16() if i % 3 == 0 else x for i, x in enumerate(sides(3, 4))]
    with pytest.raises(TypeError, match=r"^linear_kl_div: W_s must be bfloat16, got float32$"):
        linear_kl_div(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_kl_div(*tensors)[0].isfinite()


def test_float16_with_a_loss_scale():
    """The small gradients of a mean over many rows survive: unit-scale sums are float32, scaled before rounding."""
    tensors, (kd_mask, labels) = sides(64, 3001, dtype=torch.float16), rows(64, 3001)
    scale = 2.0**16
    found = results(linear_kl_div, tensors, 2.0, kd_mask, labels, weights=(scale, scale))
    exact = results(linear_kl_div_reference, double(tensors), 2.0, kd_mask, labels, weights=(scale, scale))
    for x, y in zip(found[2:], exact[2:], strict=True):
        torch.testing.assert_close(x.double(), y, rtol=4e-3, atol=2.0**-24)


def test_chunks_go_through_kl_div(monkeypatch):
    """So the kernels of kl_div serve where this op has none."""
    seen = []
    original = op._kl_div_forward
    monkeypatch.setattr(shared, "chunk_rows", lambda v, device: 4)
    monkeypatch.setattr(
        op, "_kl_div_forward", lambda call: seen.append((tuple(call.student.shape), call.keep)) or original(call)
    )
    tensors = sides(9, 7, dtype=torch.float16)
    linear_kl_div(*tensors, 2.0)
    tensors[1].requires_grad_()
    linear_kl_div(*tensors, 2.0)
    shapes = [(4, 7), (4, 7), (1, 7)]
    assert seen == [(shape, keep) for keep in ("none", "gradient") for shape in shapes]


def test_the_reference_serves_when_it_is_forced():
    tensors = sides(5, 9)
    with distilbert_fast.backend("torch"):
        close(linear_kl_div(*tensors, 2.0), linear_kl_div_reference(*tensors, 2.0))


# Bad input ---------------------------------------------------------------------------------------------------

H, W, B = torch.zeros(3, 4), torch.zeros(7, 4), torch.zeros(7)
LABELS = torch.tensor([0, 6, IGNORE])
FLOATS = "float32 or bfloat16 or float16 or float64"


def call(h_s=H, W_s=W, b_s=B, h_t=H, W_t=W, b_t=B, **keywords):
    return lambda: linear_kl_div(h_s, W_s, b_s, h_t, W_t, b_t, **keywords)


BAD = [
    (call(h_s=[1.0]), TypeError, "h_s must be a tensor, got list"),
    (call(h_s=H.int()), TypeError, f"h_s must be {FLOATS}, got int32"),
    (call(h_s=H[0]), ValueError, "h_s must be of shape [N, C_s], got [4]"),
    (call(W_s=W.t()), ValueError, "W_s must be of shape [V, 4], got [4, 7]"),
    (call(W_s=W.double()), TypeError, "W_s must be float32, got float64"),
    (call(W_s=W[:0]), ValueError, "W_s must be of at least one row, got [0, 4]"),
    (call(W_s=W.to("meta")), ValueError, "W_s must be on cpu, got meta"),
    (call(b_s=B[:6]), ValueError, "b_s must be of shape [7], got [6]"),
    (call(b_s=B.bfloat16()), TypeError, "b_s must be float32, got bfloat16"),
    (call(h_t=H[:2]), ValueError, "h_t must be of shape [3, C_t], got [2, 4]"),
    (call(h_t=None), TypeError, "h_t must be a tensor, got NoneType"),
    (call(W_t=W[:6]), ValueError, "W_t must be of shape [7, 4], got [6, 4]"),
    (call(h_t=H.bfloat16()), TypeError, "W_t must be bfloat16, got float32"),
    (call(b_t=B[None]), ValueError, "b_t must be of shape [7], got [1, 7]"),
    (call(temperature=0.0), ValueError, "temperature must be finite and above 0, got 0.0"),
    (call(temperature=math.nan), ValueError, "temperature must be finite and above 0, got nan"),
    (call(kd_mask=B[:3]), TypeError, "kd_mask must be bool, got float32"),
    (call(kd_mask=B > 0), ValueError, "kd_mask must be of shape [3], got [7]"),
    (call(labels=LABELS.int()), TypeError, "labels must be int64, got int32"),
    (call(labels=LABELS[:2]), ValueError, "labels must be of shape [3], got [2]"),
    (call(labels=LABELS + 1), ValueError, "labels must be in [0, V = 7) or ignore_index = -100, got 7"),
    (
        call(labels=LABELS, ignore_index=-1),
        ValueError,
        "labels must be in [0, V = 7) or ignore_index = -1, got -100",
    ),
    (call(ignore_index=None), TypeError, "ignore_index must be an integer, got NoneType"),
    (call(reduction="none"), ValueError, "reduction must be one of 'mean', 'sum', got 'none'"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[bad[-1] for bad in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == f"linear_kl_div: {message}"
