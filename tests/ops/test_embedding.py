"""embedding and embedding_quantize: against torch and a real BERT, gradients, ids at the edges, doors, messages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import on_any_tier
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from traced import Traced

import distilbert_fast
from distilbert_fast import backends
from distilbert_fast.ops.embedding import embedding, embedding_quantize, embedding_reference
from distilbert_fast.ops.quantize import quantize
from distilbert_fast.testing import LAYOUTS, assert_twice_rule, lay_out, logits


def traced(n: int) -> list[torch.Tensor]:
    ids = [torch.randint(high, (n,)) for high in (9, 5)]
    return [*ids, torch.randn(9, 8), torch.randn(5, 8), torch.randn(8), torch.randn(8)]


TRACED = {
    "embedding": Traced(lambda *x: embedding(*x), traced),
    "embedding_quantize": Traced(lambda *x: embedding_quantize(*x), traced, gradient=False),
}

pytestmark = pytest.mark.usefixtures("place")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = [(0, 9, 5), (1, 1, 3), (7, 30522, 4), (33, 50, 129), (17, 40, 768)]  # N, V, C
POSITIONS, TYPES = 12, 2


def make_ids(n: int, v: int, seed: int = 0, dtype: torch.dtype = torch.int64) -> list[torch.Tensor]:
    """input_ids, position_ids, token_type_ids, with the first and last row of every table among them."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, rows, (n,), generator=generator, dtype=dtype) for rows in (v, POSITIONS, TYPES)]
    for i, rows in zip(ids, (v, POSITIONS, TYPES), strict=True):
        i[:1], i[1:2] = rows - 1, 0
    return ids


def make_tables(v: int, c: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """word, position, weight, bias, token_type."""
    weight = 1 + logits(1, c, torch.float64, seed + 3, spread=0.3)[0]
    word, position, token_type = (
        logits(rows, c, dtype, seed + i, spread=1.0) for i, rows in enumerate((v, POSITIONS, TYPES))
    )
    return [word, position, weight.to(dtype), logits(1, c, dtype, seed + 4)[0], token_type]


def call(op, ids, tables, *more):
    """``op`` with token types if there are five tables."""
    input_ids, position_ids, token_type_ids = ids
    if len(tables) == 4:
        return op(input_ids, position_ids, *tables, None, None, 1e-12, *more)
    return op(input_ids, position_ids, *tables[:4], token_type_ids, tables[4], 1e-12, *more)


def torchs(input_ids, position_ids, word, position, weight, bias, token_type_ids, token_type, eps):
    look_up = torch.nn.functional.embedding
    h = look_up(input_ids, word) + look_up(position_ids, position)
    if token_type is not None:
        h = h + look_up(token_type_ids, token_type)
    return torch.nn.functional.layer_norm(h, h.shape[1:], weight, bias, eps)


def results(op, ids, tables, dy) -> list[torch.Tensor]:
    """y and the gradients of all of ``tables``."""
    leaves = [table.detach().requires_grad_() for table in tables]
    y = call(op, ids, leaves)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def check(ids, tables, dy) -> None:
    exact = results(embedding_reference, ids, [table.double() for table in tables], dy)
    same = results(torchs, ids, tables, dy)
    for ours, torch_, want in zip(results(embedding, ids, tables, dy), same, exact, strict=True):
        assert ours.dtype == torch_.dtype
        assert_twice_rule(ours, torch_, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "v", "c"), SHAPES)
def test_error_is_at_most_twice_torchs(n, v, c, dtype):
    tables = make_tables(v, c, dtype)
    dy = logits(n, c, dtype, seed=9)
    check(make_ids(n, v), tables, dy)
    check(make_ids(n, v, seed=1, dtype=torch.int32), tables[:4], dy)


def test_no_columns_and_empty_tables():
    ids = make_ids(3, 5)
    assert call(embedding, ids, make_tables(5, 0, torch.float32)).shape == (3, 0)
    none = [i[:0] for i in ids]
    empty = torch.empty(0, 4, requires_grad=True)
    y = call(embedding, none, [empty, empty, torch.ones(4), torch.ones(4)])
    y.sum().backward()
    assert y.shape == empty.grad.shape == (0, 4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_ids_tables_and_upstream_gradient(layout):
    def laid(x: torch.Tensor) -> torch.Tensor:
        return lay_out(x, layout) if x.dim() == 2 else lay_out(torch.stack([x, x]), layout)[0]

    n, v, c = 19, 23, 37
    ids, tables, dy = make_ids(n, v), make_tables(v, c, torch.float32), logits(n, c, seed=9)
    want = results(embedding, ids, tables, dy)
    given = [laid(i) for i in ids], [laid(table) for table in tables]
    for _ in range(2):
        found = results(embedding, *given, laid(dy))
        assert found[0].is_contiguous()
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(given[0] + given[1], ids + tables, strict=True))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 9),
    v=st.integers(1, 40),
    c=st.integers(3, 70),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    dtype=st.sampled_from(DTYPES),
    integer=st.sampled_from([torch.int32, torch.int64]),
    count=st.sampled_from([4, 5]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_layout(n, v, c, layouts, dtype, integer, count, seed):
    tables = make_tables(v, c, dtype, seed)
    tables[:2] = [lay_out(table, layout) for table, layout in zip(tables, layouts[:2], strict=False)]
    check(make_ids(n, v, seed, integer), tables[:count], lay_out(logits(n, c, dtype, seed), layouts[2]))


def test_ids_of_two_integer_types_and_beyond_31_bits():
    ids, tables = make_ids(7, 11), make_tables(11, 5, torch.float32)
    want = call(embedding, ids, tables)
    assert torch.equal(call(embedding, [ids[0].int(), ids[1], ids[2].int()], tables), want)
    row = tables[0][:1]
    far = torch.tensor([0, 2**31, 2**31 + 8])
    y = embedding(far, far * 0, row.expand(2**31 + 9, 5), *tables[1:4])
    assert torch.equal(y, embedding(far * 0, far * 0, row, *tables[1:4]))


@pytest.mark.parametrize("count", [4, 5])
def test_gradcheck(count):
    ids = make_ids(6, 4)  # more tokens than words: rows gather from several
    tables = [table.requires_grad_() for table in make_tables(4, 5, torch.float64)[:count]]
    assert torch.autograd.gradcheck(lambda *tables: call(embedding, ids, tables), tables)


@pytest.mark.parametrize("wanted", range(5))
def test_each_gradient_alone(wanted):
    ids, tables = make_ids(6, 4), make_tables(4, 5, torch.float64)
    tables[wanted].requires_grad_()
    call(embedding, ids, tables).square().sum().backward()
    ours, tables[wanted].grad = tables[wanted].grad, None
    call(embedding_reference, ids, tables).square().sum().backward()
    torch.testing.assert_close(ours, tables[wanted].grad)
    assert all(table.grad is None for i, table in enumerate(tables) if i != wanted)


def test_dtype_of_word_and_of_each_gradient():
    ids, tables = make_ids(6, 4), make_tables(4, 5, torch.float32)
    tables[0], tables[1] = tables[0].bfloat16(), tables[1].half()
    y, *gradients = results(embedding, ids, tables, torch.randn(6, 5))
    assert y.dtype == torch.bfloat16
    assert [gradient.dtype for gradient in gradients] == [table.dtype for table in tables]


def test_a_non_finite_row_leaves_the_others_exact():
    ids, tables = [torch.tensor([0, 1, 2])] * 2 + [torch.zeros(3, dtype=torch.int64)], make_tables(3, 5, torch.float32)
    clean = call(embedding_quantize, ids, tables)
    tables[0][1, 2] = float("inf")
    y, y_q, y_scale = call(embedding_quantize, ids, tables)
    assert y[1].isnan().all() and y_scale[1].isnan() and not y_q[1].any()
    for found, want in zip((y, y_q, y_scale), clean, strict=True):
        assert torch.equal(found[[0, 2]], want[[0, 2]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_is_that_of_the_unrounded_result(dtype):
    ids, tables = make_ids(17, 40), make_tables(40, 129, dtype)
    y = call(embedding, ids, tables)
    with distilbert_fast.backend(backends.select("embedding", y.device, dtype)):  # the one that made y
        unrounded = y.float() if dtype == torch.float64 else call(embedding, ids, [table.float() for table in tables])
    for scale in (None, 0.03125, torch.rand(17)):
        same, y_q, y_scale = call(embedding_quantize, ids, tables, scale)
        want_q, want_scale = quantize(unrounded, scale)
        assert torch.equal(same, y)
        assert torch.equal(y_q, want_q) and torch.equal(y_scale, want_scale)
    leaves = [table.requires_grad_() for table in tables]
    assert not any(result.requires_grad for result in call(embedding_quantize, ids, leaves))


def test_same_bits_on_any_number_of_threads(place):
    ids, tables, dy = make_ids(301, 40), make_tables(40, 768, torch.float32), logits(301, 768, seed=9)
    before = torch.get_num_threads()

    def everything():
        gradients = [] if place == "torch" else results(embedding, ids, tables, dy)  # torch's own depend on it
        return [*call(embedding_quantize, ids, tables), *gradients]

    try:
        want = everything()
        for threads in (1, 2, 3, 1, 5):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(everything(), want, strict=True))
    finally:
        torch.set_num_threads(before)


def test_it_is_the_embedding_of_a_real_bert(bert, tokenizer):
    batch = tokenizer(
        ["The cat sat on the mat.", "Un été à la mer"], ["Why?", "Parce que."], padding=True, return_tensors="pt"
    )
    layer = bert.embeddings
    want = layer(batch["input_ids"], batch["token_type_ids"])  # [B, T, C]
    positions = torch.arange(want.shape[1]).repeat(want.shape[0])
    found = embedding(
        batch["input_ids"].flatten(),
        positions,
        layer.word_embeddings.weight,
        layer.position_embeddings.weight,
        layer.LayerNorm.weight,
        layer.LayerNorm.bias,
        batch["token_type_ids"].flatten(),
        layer.token_type_embeddings.weight,
        layer.LayerNorm.eps,
    )
    torch.testing.assert_close(found.view_as(want), want, rtol=1e-5, atol=1e-6)


@on_any_tier
def test_registered_ops():
    ops = torch.ops.distilbert_fast
    ids, (word, position, weight, bias, token_type) = make_ids(5, 9), make_tables(9, 7, torch.bfloat16)
    mean, rstd, dy = torch.randn(5), torch.rand(5), logits(5, 7, torch.bfloat16)
    tables = [lay_out(word, "transposed"), position.float(), token_type]
    for count, keep, scale in ((2, "statistics", None), (3, "nothing", torch.tensor(0.1))):
        given = weight, bias, ids[:count], tables[:count]
        torch.library.opcheck(ops.embedding_forward.default, (*given, None, 1e-12, keep))
        torch.library.opcheck(ops.embedding_forward.default, (*given, scale, 1e-12, "codes"))
        wanted = [keep == "statistics", True, False][:count]
        torch.library.opcheck(ops.embedding_backward.default, (dy, weight, *given[2:], mean, rstd, wanted))


@on_any_tier
def test_compiles_whole_with_gradients():
    compiled = torch.compile(embedding, fullgraph=True, dynamic=True, backend="aot_eager")
    tables = make_tables(9, 33, torch.float32)
    for n in (2, 5):
        ids, dy = make_ids(n, 9), logits(n, 33)
        for found, want in zip(results(compiled, ids, tables, dy), results(embedding, ids, tables, dy), strict=True):
            assert torch.equal(found, want)
    with pytest.raises(ValueError, match="embedding: input_ids must be in \\[0, 9\\), the rows of word, got 10"):
        call(compiled, [ids[0] + 2, *ids[1:]], tables)


@on_any_tier
def test_compiles_whole_and_once_for_all_lengths():
    counter = CompileCounter()
    compiled = torch.compile(embedding_quantize, fullgraph=True, dynamic=True, backend=counter)
    tables = make_tables(9, 33, torch.float32)
    for n in range(20, 30):  # no table has as many rows, or its size and N would be taken for one
        ids = make_ids(n, 9)
        for found, want in zip(call(compiled, ids, tables), call(embedding_quantize, ids, tables), strict=True):
            assert torch.equal(found, want)
    assert counter.frame_count == 1


def test_fake_and_meta():
    with FakeTensorMode():
        ids = torch.empty(3, dtype=torch.int32)
        word, vector = torch.empty(9, 4, dtype=torch.float16, requires_grad=True), torch.empty(4)
        y = embedding(ids, ids, word, word, vector, vector)
        assert y.shape == (3, 4) and y.dtype == torch.float16
        y.sum().backward()
        assert word.grad.shape == (9, 4)
        y, y_q, y_scale = embedding_quantize(ids, ids, word, word, vector, vector)
        assert y_q.shape == (3, 4) and y_q.dtype == torch.int8 and y_scale.shape == (3,)
    ids, word = torch.empty(3, dtype=torch.int64, device="meta"), torch.empty(9, 4, device="meta")
    assert embedding(ids, ids, word, word, word[0], word[0]).device.type == "meta"


IDS = torch.tensor([3, 0])
TABLE = torch.ones(4, 6)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"input_ids": [3, 0]}, TypeError, "input_ids must be a tensor, got list"),
        ({"input_ids": IDS.float()}, TypeError, "input_ids must be int64 or int32, got float32"),
        ({"input_ids": IDS[None]}, ValueError, "input_ids must be of shape [N], got [1, 2]"),
        ({"input_ids": IDS + 1}, ValueError, "input_ids must be in [0, 4), the rows of word, got 4"),
        ({"input_ids": IDS - 1}, ValueError, "input_ids must be in [0, 4), the rows of word, got -1"),
        ({"word": TABLE[:0]}, ValueError, "input_ids must be in [0, 0), the rows of word, got 3"),
        ({"position_ids": IDS[:1]}, ValueError, "position_ids must be of shape [2], got [1]"),
        (
            {"position_ids": torch.tensor([0, 512])},
            ValueError,
            "position_ids must be in [0, 4), the rows of position, got 512",
        ),
        ({"word": TABLE[0]}, ValueError, "word must be of shape [V, C], got [6]"),
        ({"word": TABLE.long()}, TypeError, "word must be float32 or bfloat16 or float16 or float64, got int64"),
        ({"word": TABLE.to("meta")}, ValueError, "word must be on cpu, got meta"),
        ({"position": torch.ones(4, 5)}, ValueError, "position must be of shape [P, 6], got [4, 5]"),
        ({"weight": torch.ones(4)}, ValueError, "weight must be of shape [6], got [4]"),
        ({"bias": TABLE}, ValueError, "bias must be of shape [6], got [4, 6]"),
        ({"token_type_ids": IDS}, ValueError, "token_type must be given with token_type_ids, got None"),
        ({"token_type": TABLE}, ValueError, "token_type_ids must be given with token_type, got None"),
        (
            {"token_type_ids": IDS, "token_type": TABLE[:2]},
            ValueError,
            "token_type_ids must be in [0, 2), the rows of token_type, got 3",
        ),
        (
            {"token_type_ids": IDS, "token_type": TABLE[:, :2]},
            ValueError,
            "token_type must be of shape [K, 6], got [4, 2]",
        ),
        ({"eps": -1.0}, ValueError, "eps must be finite and above 0, got -1.0"),
    ],
)
@pytest.mark.parametrize("op", [embedding, embedding_quantize])
def test_bad_input(op, changed, error, message):
    good = {"input_ids": IDS, "position_ids": IDS, "word": TABLE, "position": TABLE}
    with pytest.raises(error) as raised:
        op(**{**good, "weight": TABLE[0], "bias": TABLE[0], **changed})
    assert str(raised.value) == f"{op.__name__}: {message}"


def test_bad_out_scale():
    with pytest.raises(TypeError) as raised:
        embedding_quantize(IDS, IDS, TABLE, TABLE, TABLE[0], TABLE[0], out_scale=torch.tensor(1))
    assert str(raised.value) == "embedding_quantize: out_scale must be float32, got int64"
