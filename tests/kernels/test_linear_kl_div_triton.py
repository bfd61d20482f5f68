"""kernels/linear_kl_div.py, and the op on it, on a CUDA device or in Triton's interpreter.

Without a device this module is skipped here and run by test_interpreter.py. The interpreter checks the logic; its
bfloat16 stores truncate where a GPU rounds, which the bound on errors still covers.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
import torch.nn.functional as F

import distilbert_fast
from distilbert_fast import backends
from distilbert_fast.ops import _vocabulary_losses as shared
from distilbert_fast.ops.linear_kl_div import linear_kl_div_reference
from distilbert_fast.testing import LAYOUTS, assert_twice_rule, lay_out, logits

pytest.importorskip("triton")
DEVICE = "cpu" if backends.interpreted() else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("no CUDA device here; test_interpreter.py runs this module", allow_module_level=True)

from distilbert_fast.kernels import linear_kl_div as kernels  # noqa: E402  (needs Triton)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in the interpreter: −inf − −inf
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
IGNORE = -100
FLOAT_PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]


def sides(n, v, c_s=6, c_t=9, dtype=torch.float32, teacher_dtype=None, bias=True, seed=0) -> list:
    """h_s, W_s, b_s, h_t, W_t, b_t with logits of a standard deviation of about 2."""
    generator = torch.Generator().manual_seed(seed)

    def side(c, dtype):
        h, w, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((n, c), (v, c), (v,)))
        w *= 2 / math.sqrt(c)
        return [h.to(DEVICE, dtype), w.to(DEVICE, dtype), b.to(DEVICE, dtype) if bias else None]

    return [*side(c_s, dtype), *side(c_t, teacher_dtype or dtype)]


def rows(n, v, seed=0):
    """Half of the rows for the KL and, independently, half of them with a label."""
    generator = torch.Generator().manual_seed(seed)
    kd_mask = torch.rand(n, generator=generator) < 0.5
    labels = torch.randint(0, v, (n,), generator=generator)
    labels = labels.masked_fill(torch.rand(n, generator=generator) < 0.5, IGNORE)
    return kd_mask.to(DEVICE), labels.to(DEVICE)


def results(function, tensors, *arguments, weights=(1.0, 1.0), **keywords):
    """kl, ce, and the gradients dh_s, dW_s, db_s of their weighted sum."""
    leaves = [None if x is None else x.detach().requires_grad_(i < 3) for i, x in enumerate(tensors)]
    kl, ce = function(*leaves, *arguments, **keywords)
    student = [x for x in leaves[:3] if x is not None]
    return [kl.detach(), ce.detach(), *torch.autograd.grad(weights[0] * kl + weights[1] * ce, student)]


def triton(tensors, *arguments, **keywords):
    with distilbert_fast.backend("triton"):
        return results(distilbert_fast.linear_kl_div, tensors, *arguments, **keywords)


def double(tensors):
    return [None if x is None else x.double() for x in tensors]


def close(found, expected, **tolerance):
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y.to(x.dtype), **tolerance)


def assert_as_good_as_torch(n, v, dtype=torch.float32, teacher_dtype=None, bias=True, temperature=2.0) -> None:
    found = []
    for seed in range(4):  # pooled: of a few numbers, torch is at times exact by luck
        tensors = sides(n, v, 24, 9, dtype, teacher_dtype or dtype, bias, seed)
        arguments = (temperature, *rows(n, v, seed))
        before = [None if x is None else x.clone() for x in tensors]
        ours = triton(tensors, *arguments, weights=(0.3, 1.7))
        assert all(x is y or torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
        assert [x.dtype for x in ours] == [torch.float32] * 2 + [dtype] * (len(ours) - 2)
        same_dtype = results(linear_kl_div_reference, tensors, *arguments, weights=(0.3, 1.7))
        exact = results(linear_kl_div_reference, double(tensors), *arguments, weights=(0.3, 1.7))
        found.append([[x.flatten() for x in these] for these in (ours, same_dtype, exact)])
    three = ([torch.cat(x) for x in zip(*seeds, strict=True)] for seeds in zip(*found, strict=True))
    for what, *compared in zip(("kl", "ce", "dh", "dW", "db"), *three, strict=False):
        assert_twice_rule(*compared, what)


@pytest.fixture(params=[4, 10_000], ids=lambda size: f"chunks of {size}")
def chunk(request, monkeypatch):
    monkeypatch.setattr(shared, "chunk_rows", lambda v, device: request.param)


# The op --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", FLOAT_PAIRS, ids=lambda pair: "-".join(str(dtype)[6:] for dtype in pair))
@pytest.mark.parametrize(("n", "v"), [(0, 7), (1, 1), (13, 31)])
def test_losses_and_gradients(n, v, dtypes, chunk):
    assert_as_good_as_torch(n, v, *dtypes)


def test_without_bias():
    assert_as_good_as_torch(13, 31, bias=False)


@pytest.mark.parametrize("temperature", [0.5, 1, 1.0, 2, 3.7, 20.0])
def test_temperatures(temperature):
    assert_as_good_as_torch(9, 40, temperature=temperature)


@pytest.mark.parametrize("v", [1, 15, 16, 17, 33])
@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_rows_of_one_kind(v, distilled, labelled):
    tensors = sides(5, v)
    kd_mask = torch.full((5,), distilled, device=DEVICE)
    labels = torch.full((5,), v - 1 if labelled else IGNORE, device=DEVICE)
    found = triton(tensors, 2.0, kd_mask, labels)
    expected = results(linear_kl_div_reference, double(tensors), 2.0, kd_mask, labels)
    close(found, expected, rtol=1e-4, atol=1e-5)
    if not distilled:
        assert found[0] == 0
    if not labelled:
        assert found[1] == 0


def test_all_rows_without_mask_and_labels(chunk):
    tensors = sides(7, 33)
    close(triton(tensors, 2.0), results(linear_kl_div_reference, double(tensors), 2.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.25, -3.0)])
def test_any_weights_of_the_losses(weights, chunk):
    tensors, arguments = sides(11, 17), (2.0, *rows(11, 17))
    expected = results(linear_kl_div_reference, double(tensors), *arguments, weights=weights)
    close(triton(tensors, *arguments, weights=weights), expected, rtol=1e-4, atol=1e-5)


def test_no_gradient_wanted():
    tensors, arguments = sides(11, 33), (2.0, *rows(11, 33))
    with distilbert_fast.backend("triton"):
        losses = distilbert_fast.linear_kl_div(*tensors, *arguments)
    assert not losses[0].requires_grad
    close(losses, triton(tensors, *arguments)[:2], rtol=0, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_non_finite_row_leaves_others_exact_in_every_chunk(bad, dtype, monkeypatch):
    """V is no multiple of 16: what the row leaves in the padding must not reach the next chunk's."""
    monkeypatch.setattr(shared, "chunk_rows", lambda v, device: 2)
    tensors, (kd_mask, labels) = sides(9, 7, dtype=dtype), rows(9, 7)
    kd_mask[:], labels[0] = True, IGNORE
    clean = triton(tensors, 2.0, kd_mask, labels)
    tensors[0][0, 2] = bad
    found = triton(tensors, 2.0, kd_mask, labels)
    assert not found[0].isfinite() and torch.equal(found[1], clean[1])
    assert torch.equal(found[2][1:], clean[2][1:]) and not found[2][0].isfinite().all()


def test_rows_that_do_not_count_may_be_anything(chunk):
    tensors, (kd_mask, labels) = sides(12, 33), rows(12, 33)
    clean = triton(tensors, 2.0, kd_mask, labels)
    tensors[0][~kd_mask & (labels == IGNORE)] = math.nan
    tensors[3][~kd_mask] = math.nan
    close(triton(tensors, 2.0, kd_mask, labels), clean, rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    tensors, arguments = sides(9, 33, 16, 16), (2.0, *rows(9, 33))
    placed = [lay_out(x, layout) if x.dim() == 2 else lay_out(x[:, None], layout)[:, 0] for x in tensors]
    close(triton(placed, *arguments), triton(tensors, *arguments), rtol=1e-5, atol=1e-6)


def test_same_bits_every_run(monkeypatch):
    monkeypatch.setattr(shared, "chunk_rows", lambda v, device: 8)
    tensors, arguments = sides(20, 501, 32, 32, torch.bfloat16), (2.0, *rows(20, 501))
    first = triton(tensors, *arguments)
    for _ in range(2):
        close(triton(tensors, *arguments), first, rtol=0, atol=0)


# The kernel ----------------------------------------------------------------------------------------------------


def chunk_of(n, v, dtype=torch.float32, seed=0):
    """Logits in the padded rows of a chunk, and the bias that goes with it."""
    padded = torch.zeros((n, kernels.width(v)), dtype=dtype, device=DEVICE)
    padded[:, :v] = logits(n, v, dtype, seed=seed, device=DEVICE)
    bias = logits(1, v, dtype, seed=seed + 100, spread=0.5, device=DEVICE)[0]
    return padded, bias, kernels.padded_bias(bias, padded, v)


def launch(s, b_s, t, b_t, labels, v, dkl, dce, temperature=2.0):
    kl, ce = torch.empty(len(t), device=DEVICE), torch.empty(len(labels), device=DEVICE)
    kernels.linear_kl_div_fwd(s, b_s, t, b_t, labels, v, temperature, kl, ce, dkl, dce)
    return kl, ce


@pytest.mark.parametrize("v", [9, 600])
@pytest.mark.parametrize(("n_kl", "n_ce"), [(7, 0), (0, 7), (7, 7), (5, 4), (7, 3), (2, 7)])
def test_gradients_over_the_logits_are_those_beside_them(n_kl, n_ce, v):
    n = 7
    (s, bias_s, b_s), (t, bias_t, b_t) = chunk_of(n, v), chunk_of(n_kl, v, seed=5)
    labels = torch.arange(n_ce, device=DEVICE) % v
    beside = torch.full_like(t, math.nan), torch.full_like(s[:n_ce], math.nan)
    s_before, t_before = s.clone(), t.clone()
    losses = launch(s, b_s, t, b_t, labels, v, *beside)
    assert torch.equal(s, s_before) and torch.equal(t, t_before)
    over = launch(s, b_s, t, b_t, labels, v, t, s[n - n_ce :])
    close(over, losses, rtol=0, atol=0)
    assert torch.equal(t, beside[0]) and torch.equal(s[n - n_ce :], beside[1])
    assert torch.equal(s[: n - n_ce], s_before[: n - n_ce]), "rows without a label stay logits"
    assert (t[:, v:] == 0).all() and (s[n - n_ce :, v:] == 0).all()

    exact = (s_before[:, :v] + bias_s).double().requires_grad_()
    teacher = (t_before[:, :v] + bias_t).double()
    log_s, log_t = F.log_softmax(exact[:n_kl] / 2, dim=1), F.log_softmax(teacher / 2, dim=1)
    kl = 4 * (log_t.exp() * (log_t - log_s)).sum(dim=1)
    ce = F.cross_entropy(exact[n - n_ce :], labels, reduction="none")
    close(losses, (kl, ce), rtol=1e-4, atol=1e-4)
    (dkl,) = torch.autograd.grad(kl.sum(), exact, retain_graph=True)
    (dce,) = torch.autograd.grad(ce.sum(), exact)
    close((t[:, :v], s[n - n_ce :, :v]), (dkl[:n_kl], dce[n - n_ce :]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.7])
@pytest.mark.parametrize("v", [5003, 30522])
def test_rows_of_many_tiles(v, temperature):
    """Each of the four results by itself: in a whole step, the errors of the products around the kernel hide it."""
    n = 4
    (s, bias_s, b_s), (t, bias_t, b_t) = chunk_of(n, v), chunk_of(n, v, seed=5)
    labels = torch.tensor([0, v // 2, v - 1, 1], device=DEVICE)
    columns = s[:, :v].clone(), t[:, :v].clone()
    ours = [*launch(s, b_s, t, b_t, labels, v, t, s, temperature), t[:, :v], s[:, :v]]

    def four(dtype):
        student, teacher = (x.to(dtype) + b.to(dtype) for x, b in zip(columns, (bias_s, bias_t), strict=True))
        student.requires_grad_()
        log_s, log_t = (F.log_softmax(x / temperature, dim=1) for x in (student, teacher))
        kl = temperature**2 * (log_t.exp() * (log_t - log_s)).sum(dim=1)
        ce = F.cross_entropy(student, labels, reduction="none")
        gradients = [torch.autograd.grad(loss.sum(), student, retain_graph=True)[0] for loss in (kl, ce)]
        return [kl.detach(), ce.detach(), *gradients]

    for what, *compared in zip(("kl", "ce", "dkl", "dce"), ours, four(torch.float32), four(torch.float64), strict=True):
        assert_twice_rule(*compared, what)


def test_a_label_out_of_range_reads_nothing_and_is_no_number():
    (s, _, b_s), (t, _, b_t) = chunk_of(4, 9), chunk_of(0, 9)
    labels = torch.tensor([3, 9, -1, 2**62], device=DEVICE)
    _, ce = launch(s, b_s, t, b_t, labels, 9, None, None)
    assert ce.isnan().tolist() == [False, True, True, True]


def test_vocabulary_masked_by_the_lowest_number():
    """By the bias too: the sum of two lowest numbers is −inf, and counts for nothing."""
    v, lowest = 40, torch.finfo(torch.float32).min
    (s, _, b_s), (t, _, b_t) = chunk_of(3, v), chunk_of(3, v, seed=5)
    s[:, 20:v] = lowest
    t[:, 20:v] = lowest
    labels = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    kl, ce = launch(s, b_s, t, b_t, labels, v, None, None)
    short = [torch.cat([x[..., :20], x[..., v:]], dim=-1)[..., : kernels.width(20)] for x in (s, b_s, t, b_t)]
    short[0][:, 20:], short[2][:, 20:] = 0.0, 0.0
    close((kl, ce), launch(*short, labels, 20, None, None), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("far", ["student", "teacher", "kl_gradient", "ce_gradient"])
def test_offsets_past_int32(tmp_path, far):
    """Three rows, places 0, 1.1 · 10⁹ and 2.2 · 10⁹ of their tensor: a chunk of 70,000 rows and more."""
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free GPU memory")
    n, v, stride = 3, 30522, 36_000 * 30528
    (s, _, b_s), (t, _, b_t) = chunk_of(n, v, torch.bfloat16), chunk_of(n, v, torch.bfloat16, seed=5)
    tensors = {"student": s, "teacher": t, "kl_gradient": torch.empty_like(t), "ce_gradient": torch.empty_like(s)}
    labels = torch.tensor([0, 7, v - 1], device=DEVICE)

    def run(student, teacher, kl_gradient, ce_gradient):
        return *launch(student, b_s, teacher, b_t, labels, v, kl_gradient, ce_gradient), kl_gradient, ce_gradient

    want = [x.clone() for x in run(**tensors)]
    size = 2 * stride + s.shape[1]
    if DEVICE == "cuda":
        whole = torch.zeros(size, dtype=torch.bfloat16, device=DEVICE)
    else:
        whole = torch.from_file(str(tmp_path / far), shared=True, size=size, dtype=torch.bfloat16)  # sparse: no memory
        os.unlink(tmp_path / far)
    tensors[far] = whole.as_strided(s.shape, (stride, 1)).copy_(tensors[far])
    close(run(**tensors), want, rtol=0, atol=0)


# On a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
def test_memory_does_not_grow_with_the_logits():
    """Four times the rows add a few hidden states a row; stored logits would add 60 KB a side."""
    v, c = 30522, 64

    def peak(n):
        tensors, arguments = sides(n, v, c, c, torch.bfloat16), (2.0, *rows(n, v))
        triton(tensors, *arguments)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        triton(tensors, *arguments)
        return torch.cuda.max_memory_allocated() - before

    few, many = peak(8192), peak(32768)
    assert many - few < (32768 - 8192) * 30 * c


@pytest.mark.gpu
@needs_gpu
def test_the_real_vocabulary():
    tensors, arguments = sides(5000, 30522, 64, 64, torch.bfloat16), (2.0, *rows(5000, 30522))
    found = triton(tensors, *arguments)
    expected = results(linear_kl_div_reference, tensors, *arguments)
    exact = results(linear_kl_div_reference, double(tensors), *arguments)
    for what, *compared in zip(("kl", "ce", "dh", "dW", "db"), found, expected, exact, strict=True):
        assert_twice_rule(*compared, what)


@pytest.mark.gpu
@needs_gpu
def test_the_host_waits_once():
    tensors, arguments = sides(9000, 3001, 64, 64, torch.bfloat16), (2.0, *rows(9000, 3001))
    triton(tensors, *arguments)  # compiles
    with pytest.warns(UserWarning, match="called a synchronizing") as waits:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            triton(tensors, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([wait for wait in waits if "called a synchronizing" in str(wait.message)]) == 1
