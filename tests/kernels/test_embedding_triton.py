"""The embedding layer, whose kernel is that of layer_norm gathering by ids, on a CUDA device or in the interpreter.

The interpreter checks the logic; its bfloat16 stores truncate where a GPU rounds, which the bound on errors still
covers. It takes CPU tensors, whose ids are checked, so what becomes of an id outside its table is seen at the launcher.
"""

from __future__ import annotations

import pytest
import torch

import distilbert_fast
from distilbert_fast import backends
from distilbert_fast.ops.embedding import embedding, embedding_quantize, embedding_reference
from distilbert_fast.ops.quantize import quantize
from distilbert_fast.testing import LAYOUTS, assert_twice_rule, lay_out, logits

pytest.importorskip("triton")
DEVICE = "cpu" if backends.interpreted() else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("no CUDA device here; test_interpreter.py runs this module", allow_module_level=True)

from distilbert_fast.kernels import layer_norm as kernels  # noqa: E402  (needs Triton)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in the interpreter: 0 / 0
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(0, 9, 5), (1, 1, 1), (1, 1, 3), (33, 50, 129), (9, 40, 768)]  # N, V, C
POSITIONS, TYPES = 12, 2


def make_ids(n, v, dtype=torch.int64):
    """input_ids, position_ids, token_type_ids, with the first and last row of every table among them."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, rows, (n,), generator=generator, dtype=dtype) for rows in (v, POSITIONS, TYPES)]
    for i, rows in zip(ids, (v, POSITIONS, TYPES), strict=True):
        i[:1], i[1:2] = rows - 1, 0
    return [i.to(DEVICE) for i in ids]


def make_tables(v, c, dtype=torch.float32):
    """word, position, weight, bias, token_type."""
    weight = 1 + logits(1, c, torch.float64, 3, spread=0.3)[0]
    word, position, token_type = (logits(rows, c, dtype, i, 1.0) for i, rows in enumerate((v, POSITIONS, TYPES)))
    tables = word, position, weight.to(dtype), logits(1, c, dtype, 4)[0], token_type
    return [table.to(DEVICE) for table in tables]


def call(op, ids, tables, *more):
    """``op`` with token types if there are five tables."""
    if len(tables) == 4:
        return op(*ids[:2], *tables, None, None, 1e-12, *more)
    return op(*ids[:2], *tables[:4], ids[2], tables[4], 1e-12, *more)


def torchs(input_ids, position_ids, word, position, weight, bias, token_type_ids, token_type, eps):
    look_up = torch.nn.functional.embedding
    h = look_up(input_ids, word) + look_up(position_ids, position)
    if token_type is not None:
        h = h + look_up(token_type_ids, token_type)
    return torch.nn.functional.layer_norm(h, h.shape[1:], weight, bias, eps)


def results(op, ids, tables, dy):
    """y and the gradients of all of ``tables``."""
    leaves = [table.detach().requires_grad_() for table in tables]
    y = call(op, ids, leaves)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def triton(ids, tables, dy):
    with distilbert_fast.backend("triton"):
        return results(embedding, ids, tables, dy)


def triton_quantize(ids, tables, *scale):
    with distilbert_fast.backend("triton"):
        return call(embedding_quantize, ids, tables, *scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype):
    n, v, c = shape
    ids, tables, dy = make_ids(n, v), make_tables(v, c, dtype), logits(n, c, dtype, seed=9, device=DEVICE)
    for given in (tables, tables[:4]):
        before = [table.clone() for table in given]
        ours = triton(ids, given, dy)
        assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))
        exact = results(embedding_reference, ids, [table.double() for table in given], dy.double())
        for found, same, want in zip(ours, results(torchs, ids, given, dy), exact, strict=True):
            assert found.dtype == dtype and found.is_contiguous()
            assert_twice_rule(found, same, want)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_tables_and_kinds_of_ids(layout, dtype):
    ids, tables, dy = make_ids(9, 20), make_tables(20, 37), logits(9, 37, seed=9, device=DEVICE)
    want = triton(ids, tables, dy)
    wide = lay_out(torch.stack(tables[2:4]), layout)
    laid = [lay_out(tables[0], layout), lay_out(tables[1], layout), wide[0], wide[1], lay_out(tables[4], layout)]
    strided = [torch.stack([i.to(dtype), i.to(dtype)], dim=1)[:, 0] for i in ids]
    for found, expected in zip(triton(strided, laid, lay_out(dy, layout)), want, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


def test_one_position_for_all():
    ids, tables = make_ids(9, 20), make_tables(20, 33)
    ids[1] = torch.full((1,), 5, device=DEVICE).expand(9)
    dy = torch.ones((), device=DEVICE).expand(9, 33)
    exact = results(embedding_reference, ids, [table.double() for table in tables], dy.double())
    for found, same, want in zip(triton(ids, tables, dy), results(torchs, ids, tables, dy), exact, strict=True):
        assert_twice_rule(found, same, want)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_is_that_of_the_result(shape):
    n, v, c = shape
    ids, tables = make_ids(n, v), make_tables(v, c)
    each = 0.01 + torch.rand(n, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for scale in (None, 0.03125, each):
        y, y_q, y_scale = triton_quantize(ids, tables, scale)
        with distilbert_fast.backend("torch"):
            want_q, want = quantize(y.cpu(), scale.cpu() if isinstance(scale, torch.Tensor) else scale)
        assert torch.equal(y_q.cpu(), want_q) and torch.equal(y_scale.cpu(), want)


def test_codes_are_made_before_a_bfloat16_result_is_rounded():
    ids, tables = make_ids(40, 50), make_tables(50, 768, torch.bfloat16)
    y, y_q, y_scale = triton_quantize(ids, tables)
    exact = call(embedding_reference, ids, [table.double() for table in tables])
    assert y.dtype == torch.bfloat16
    assert (y_q * y_scale.double()[:, None] - exact).abs().max() <= 0.5001 * y_scale.max()


@pytest.mark.parametrize("wanted", range(5))
def test_nothing_but_what_is_wanted_has_a_gradient(wanted):
    ids, tables = make_ids(9, 20), make_tables(20, 33)
    everything = triton(ids, tables, torch.ones(9, 33, device=DEVICE))[1:]
    leaves = [table.detach().requires_grad_(i == wanted) for i, table in enumerate(tables)]
    with distilbert_fast.backend("triton"):
        call(embedding, ids, leaves).sum().backward()
    assert torch.equal(leaves[wanted].grad, everything[wanted])
    assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i != wanted)


def test_same_bits_every_run():
    """Every id is that of many tokens, which atomics would add up in another order every time."""
    n = 21 if DEVICE == "cpu" else 30_001
    ids, tables, dy = make_ids(n, 5), make_tables(5, 129), logits(n, 129, seed=9, device=DEVICE)
    runs = [[*triton(ids, tables, dy), *triton_quantize(ids, tables)] for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("outside", [-1, "rows", 2**40, -(2**40)])
def test_an_id_outside_its_table_reads_nothing_and_makes_its_row_nan(which, outside):
    ids, tables = make_ids(5, 20), make_tables(20, 33)
    clean = triton_quantize(ids, tables)
    matrices = [tables[0], tables[1], tables[4]]
    ids[which][3] = matrices[which].shape[0] if outside == "rows" else outside
    y, y_q = torch.empty(5, 33, device=DEVICE), torch.empty(5, 33, dtype=torch.int8, device=DEVICE)
    mean, rstd, y_scale = (torch.empty(5, device=DEVICE) for _ in range(3))
    kernels.normalize_fwd(matrices, ids, *tables[2:4], 1e-12, y, mean, rstd, y_q, None, y_scale)
    assert y[3].isnan().all() and y_scale[3].isnan() and not y_q[3].any()
    dh = torch.empty(5, 33, device=DEVICE)
    dweight, dbias = (torch.empty(33, device=DEVICE) for _ in range(2))
    kernels.normalize_bwd(torch.ones_like(y), matrices, ids, tables[2], mean, rstd, dh, dweight, dbias)
    assert dh.isnan().all(dim=1).tolist() == [False, False, False, True, False]
    good = [0, 1, 2, 4]
    for found, want in zip((y, y_q, y_scale), clean, strict=True):
        assert torch.equal(found[good], want[good])
    assert dh[good].isfinite().all() and dweight.isnan().all() and dbias.isfinite().all()


@pytest.mark.parametrize("v", [0, 20])
def test_an_id_outside_its_table_through_the_public_function(v):
    """In the interpreter it is refused; on a GPU it is seen in y and in the gradients, and nothing else is harmed."""
    ids, tables = make_ids(5, 20), make_tables(v, 33)
    ids[0][2] = 20
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=rf"embedding: input_ids must be in \[0, {v}\), the rows of word, got 20"):
            triton(ids, tables, torch.ones(5, 33))
        return
    y, dword, *_ = triton(ids, tables, torch.ones(5, 33, device=DEVICE))
    assert y[2].isnan().all() and y.isnan().any(dim=1).sum() == (5 if v == 0 else 1)
    assert dword.isnan().any(dim=1).sum() == (0 if v == 0 else 1)


@pytest.mark.gpu
@needs_gpu
def test_a_vocabulary_inside_a_cuda_graph():
    ids, tables = make_ids(4096, 30522), make_tables(30522, 768, torch.bfloat16)
    dy = logits(4096, 768, torch.bfloat16, seed=9, device=DEVICE)

    def everything():
        return [*triton(ids, tables, dy), *triton_quantize(ids, tables)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        everything()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    ids[0].copy_(ids[0].flip(0))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, everything(), strict=True))
