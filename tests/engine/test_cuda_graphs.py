"""Buckets, padding, eviction and threads of cuda_graphs.py, by a recorder in the place of a GPU: its replay is the
captured function, computed again from the same memory. Real graphs are in gpu/test_engine_gpu.py.
"""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from tiny_encoder import MASK, V, make, reference

from distilbert_fast import backend
from distilbert_fast.engine import cuda_graphs
from distilbert_fast.engine.cuda_graphs import Captured, Graphs, sequence_bucket, token_bucket
from distilbert_fast.engine.engine import Engine


class Recorder:
    """Counts what it is asked for, and sees that nobody runs beside another."""

    def __init__(self):
        self.captured, self.replayed, self.busy, self.filled = 0, 0, False, []

    def free(self, dtype):
        return True

    @contextlib.contextmanager
    def in_turn(self):
        assert not self.busy
        self.busy = True
        try:
            yield
        finally:
            self.busy = False

    def capture(self, make, function):
        self.captured += 1
        inputs = make()
        output = function(inputs).clone()

        def replay():
            self.replayed += 1
            self.filled.append([x if x is None else x.clone() for x in inputs])
            output.copy_(function(inputs))

        return Captured(inputs, output, replay)


def recorded(model, precision=None, graphs=cuda_graphs.GRAPHS):
    engine = Engine(None, model, precision, [None] * len(model.layers), graphs=graphs)
    engine.graphs = Graphs(engine._op_encoder(), graphs, Recorder())
    return engine


def eager(model, precision=None):
    return Engine(None, model, precision, [None] * len(model.layers), graphs=0)


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randint(0, V, MASK.shape)


def test_buckets():
    sizes = sorted({token_bucket(n) for n in range(1, 1025)})
    assert sizes[:8] == [16, 32, 48, 64, 80, 96, 112, 128]
    assert sizes[8:] == [160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024]
    for n in (1, 16, 17, 128, 129, 1000, 16_384):
        assert token_bucket(n) >= n and token_bucket(token_bucket(n)) == token_bucket(n)
        assert token_bucket(n) <= max(1.25 * n, n + 15)
    assert token_bucket(cuda_graphs.MOST_TOKENS) == cuda_graphs.MOST_TOKENS
    assert [sequence_bucket(1, p) for p in (0, 1, 128, 129, 256, 257)] == [1, 2, 2, 3, 3, 4]
    assert sequence_bucket(64, 0) == 64 and sequence_bucket(64, 1) == 80 and sequence_bucket(0, 16) == 1


@pytest.mark.parametrize("precision", [None, "int8"])
@pytest.mark.parametrize("mask", [None, MASK, MASK[:, :1].expand_as(MASK)], ids=["full", "holes", "whole sequences"])
def test_padding_changes_nothing(mask, precision, ids):
    """Every op works row by row or inside a sequence; float32 products alone may depend on how many rows there are."""
    model = make()
    found, want = recorded(model, precision)(ids, mask), eager(model, precision)(ids, mask)
    if precision == "int8":
        assert torch.equal(found, want)
    else:
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found, reference(model, ids, mask).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", [None, "int8"])
def test_first_rows(precision, ids):
    model = make()
    engine, plain = recorded(model, precision), eager(model, precision)
    for mask in (None, MASK):
        found, want = engine.encode(ids, mask, rows="first").last, plain.encode(ids, mask, rows="first").last
        assert found.shape == (4, 1, 30)
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    engine(ids)
    assert engine.graphs._device.captured == 3  # all rows have a graph of their own


def test_what_a_graph_reads(ids):
    engine = recorded(make())
    engine(ids, MASK)
    read, positions, types, cu_seqlens = engine.graphs._device.filled[0]
    n = int(MASK.sum())
    assert read.shape == (16,) and n < 16
    assert torch.equal(read[:n], ids[MASK.bool()])
    assert positions[:n].tolist() == MASK.nonzero()[:, 1].tolist() and types[:n].eq(0).all()
    assert cu_seqlens.tolist() == [0, 6, 8, 8, n, 16]  # 4 sequences and 1 of padding
    assert cu_seqlens.dtype == torch.int32
    engine(ids.repeat(2, 1), MASK.repeat(2, 1))
    cu_seqlens = engine.graphs._device.filled[1].pop()
    assert cu_seqlens[8:].tolist() == [2 * n, 32, 32]  # 8 sequences, 1 of padding, 1 empty


def test_padding_is_cut_into_short_sequences():
    engine = recorded(make(layers=0))
    engine.graphs.run(
        torch.zeros(1025, dtype=torch.int64),
        2,
        lambda: cuda_graphs.TokenLayout(torch.zeros(1025), torch.zeros(1025), torch.tensor([0, 1000, 1025])),
    )
    (_, _, _, cu_seqlens) = engine.graphs._device.filled[0]
    assert cu_seqlens.tolist() == [0, 1000, 1025, 1153, 1280]


def test_captured_once_for_each_size(ids):
    engine = recorded(make())
    device = engine.graphs._device
    for b in (1, 2, 3, 4):
        assert torch.equal(engine(ids[:b]), engine(ids[:b]))
    assert device.replayed == 8
    # 6, 12, 18 and 24 tokens in 1, 2, 3, 4 sequences: 16 tokens in 2 or 3, 32 in 4 or 5
    assert device.captured == len(engine.graphs) == 4


def test_a_layout_is_made_anew_when_it_changes(ids):
    """The graph of 24 tokens remembers the shape that its positions came from, and nothing else."""
    model = make()
    engine, plain = recorded(model, "int8"), eager(model, "int8")
    flat = ids.reshape(-1)
    shifted = torch.arange(6).flip(0).expand(4, 6)
    for call in (
        dict(input_ids=flat.view(4, 6)),
        dict(input_ids=flat.flip(0).view(4, 6)),
        dict(input_ids=flat.view(4, 6), position_ids=shifted),
        dict(input_ids=flat.view(4, 6)),
        dict(input_ids=flat.view(3, 8)),
        dict(input_ids=flat.view(4, 6), token_type_ids=torch.ones(1, 6, dtype=torch.int64)),
        dict(input_ids=flat.view(4, 6), attention_mask=MASK),
        dict(input_ids=flat.view(4, 6)),
    ):
        assert torch.equal(engine(**call), plain(**call))


def test_positions_of_roberta_depend_on_ids(ids):
    model = make(padding_idx=1)
    engine, plain = recorded(model, "int8"), eager(model, "int8")
    for given in (ids, torch.where(ids % 2 == 0, 1, ids), ids):
        assert torch.equal(engine(given), plain(given))


def test_the_least_recently_used_go_first(ids):
    engine = recorded(make(), graphs=2)
    graphs, device = engine.graphs, engine.graphs._device
    wide = ids.repeat(3, 1)
    for given, captured in ((ids, 1), (ids[:1], 2), (ids, 2), (wide, 3), (ids, 3), (ids[:1], 4)):
        engine(given)
        assert device.captured == captured and len(graphs) <= 2


def test_bytes_are_bounded_and_one_graph_stays(ids, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_BYTES", 1)
    engine = recorded(make())
    for given in (ids, ids[:1], ids):
        engine(given)
        assert len(engine.graphs) == 1
    assert engine.graphs._device.captured == 3


def test_what_goes_round_the_graphs(ids, monkeypatch):
    model = make()
    engine = recorded(model)
    engine.encode(ids, hidden_states=True)
    engine(ids, head_mask=torch.tensor([1.0, 0.0, 1.0]))
    assert engine(ids[:0]).shape == (0, 6, 30) and engine(ids, torch.zeros_like(ids)).eq(0).all()
    monkeypatch.setattr(cuda_graphs, "MOST_TOKENS", 23)
    engine(ids)
    assert engine.graphs._device.replayed == 0
    engine(ids[:3])
    assert engine.graphs._device.replayed == 1


def test_a_forced_backend_has_graphs_of_its_own(ids):
    engine = recorded(make())
    engine(ids)
    with backend("torch"):
        engine(ids)
    assert engine.graphs._device.captured == 2


def test_outputs_are_the_callers(ids):
    engine = recorded(make())
    first = engine(ids)
    kept = first.clone()
    engine(ids.flip(0))
    assert torch.equal(first, kept)


def test_inference_mode_and_back(ids):
    engine = recorded(make(), "int8")
    with torch.inference_mode():
        inside = engine(ids)
        engine(ids[:2])
    outside = engine(ids)
    assert torch.equal(inside, outside) and not outside.is_inference()


def test_threads_take_turns(ids):
    model = make()
    engine, plain = recorded(model, "int8", graphs=2), eager(model, "int8")
    given = [ids[:1], ids[:2], ids, ids.flip(0)]
    want = [plain(x) for x in given]
    wrong = []

    def work(i):
        for _ in range(10):
            if not torch.equal(engine(given[i]), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_error_leaves_the_rest_alone(ids):
    engine = recorded(make())
    good = engine(ids)
    with pytest.raises(ValueError, match=r"^embedding: input_ids must be "):
        engine(torch.full_like(ids, V))
    assert torch.equal(engine(ids), good)


@pytest.mark.parametrize("graphs", [-1, 1.5, None])
def test_refuses(graphs):
    with pytest.raises(ValueError) as error:
        Engine.from_model(make(), graphs=graphs)
    assert str(error.value) == f"engine: graphs must be a number from 0 on, got {graphs}"
