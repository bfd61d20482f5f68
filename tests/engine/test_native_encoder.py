"""The C++ encoder: every tier against float32, the same bits however it is run, files, calibration, threads, forks."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_encoder import CLOSE, MASK, PRECISIONS, C, H, V, make, ragged, reference

import distilbert_fast
from distilbert_fast import backends
from distilbert_fast.engine.engine import Engine
from distilbert_fast.engine.native_encoder import MemoryChanged, PackedEncoder, Watched
from distilbert_fast.engine.packed_files import FORMAT


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randint(0, V, MASK.shape)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_tier_against_plain_modules(tier, precision, ids):
    for model in (make(), make(types=0), make(bias=False), make(padding_idx=1)):
        ids[ids == 1] = 2
        positions = (torch.arange(6) + 2) if model.padding_idx == 1 else None
        want = reference(model, ids, MASK, positions=positions).detach()
        found = Engine.from_model(model, precision)(ids, MASK)
        torch.testing.assert_close(found, want, rtol=0, atol=CLOSE[precision])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_sequence_has_the_same_bits_alone_and_in_any_batch(tier, precision, threads):
    engine = Engine.from_model(make(), precision)
    ids, mask = ragged(40)
    threads(1)
    want = engine(ids, mask)
    assert not want[mask == 0].any()
    for count in (2, 3):
        threads(count)
        for _ in range(5):
            assert torch.equal(engine(ids, mask), want)
    for b in range(40):
        assert torch.equal(engine(ids[b : b + 1], mask[b : b + 1])[0], want[b])
    assert torch.equal(engine(ids.flip(0), mask.flip(0)).flip(0), want)
    hidden = engine.encode(ids, mask, hidden_states=True).hidden_states
    assert torch.equal(hidden[-1], want) and not any(state[mask == 0].any() for state in hidden)


def test_the_first_calls_have_the_bits_of_later_ones(tier, ids):
    """AVX2 looks at int8 weights for a faster order only after calls of 128 tokens in all."""
    engine = Engine.from_model(make(), "int8")
    want = engine(ids, MASK)
    engine(*ragged(40))
    assert torch.equal(engine(ids, MASK), want)


def test_calls_at_the_same_time_as_the_first_have_its_bits(tier, ids):
    for _ in range(5):
        engine = Engine.from_model(make(), "int8")
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(engine, [ids] * 40, [MASK] * 40))
        assert all(torch.equal(y, found[0]) for y in found)


@pytest.mark.covering
@pytest.mark.parametrize("sequences", [1, 2, 40])  # by all threads together, and dealt out to them
@pytest.mark.parametrize("by", ["the C++ encoder", "ops"])
def test_memory_that_is_watched_meanwhile(tier, sequences, by, threads, monkeypatch):
    engine = Engine.from_model(make(), "int8")
    if by == "ops":
        monkeypatch.setattr(Engine, "is_native", False)
    ids, mask = (x[:sequences] for x in ragged(40))
    want = engine(ids, mask)
    tensors = [torch.zeros(7 + 13 * i) for i in range(30)] + [torch.zeros(30_000 * (1 + i)) for i in range(7)]
    fingerprint = backends.fingerprint(tensors, 40)
    tree = backends.cpu().TreeWatch([], [], [], tensors)
    assert fingerprint.samples() > 7
    for count in (1, 2, 5):
        threads(count)
        for samples in (1, 3, 1000):
            assert torch.equal(engine.encode(ids, mask, watched=Watched(fingerprint, samples, tree)).last, want)
        for tensor in tensors:  # of the large ones all of it, else a sample may have another part
            tensor += 1
            with pytest.raises(MemoryChanged):
                engine.encode(ids, mask, watched=Watched(fingerprint, 1))
            tensor -= 1
        tensors[-1][9_999] = 1
        with pytest.raises(MemoryChanged):
            engine.encode(ids, mask, watched=Watched(fingerprint, fingerprint.samples()))
        tensors[-1][9_999] = 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_padding_is_computed_on_demand(tier, precision, threads):
    ids, mask = ragged(40)
    ids[ids == 1] = 2
    ids[mask == 0] = 1
    factors = torch.tensor([[0.5, 0.0, 1.0], [0.0, 0.0, 0.0]])  # of both layers' heads
    for padding_idx, head_mask in ((None, None), (None, factors), (1, None)):
        model = make(padding_idx=padding_idx)
        if padding_idx is not None:
            model = model._replace(position=torch.nn.Embedding(30, C))
        positions = None if padding_idx is None else (ids != 1).cumsum(1) * (ids != 1) + 1
        want = reference(model, ids, mask, positions=positions, head_mask=head_mask, padding=True).detach()
        engine = Engine.from_model(model, precision)
        threads(1)
        found = engine.encode(ids, mask, head_mask=head_mask, hidden_states=True, padding=True).hidden_states
        torch.testing.assert_close(found[-1], want, rtol=0, atol=CLOSE[precision])
        tokens = engine.encode(ids, mask, head_mask=head_mask, hidden_states=True).hidden_states
        for padded, packed in zip(found, tokens, strict=True):  # nothing changes for the tokens
            assert torch.equal(padded[mask == 1], packed[mask == 1])
            assert padded[mask == 0].any(-1).all()
        for count in (2, 3):
            threads(count)
            for part in (slice(0, 40), slice(3, 4), slice(7, 9)):
                again = engine.encode(ids[part], mask[part], head_mask=head_mask, padding=True).last
                assert torch.equal(again, found[-1][part])


def test_padding_on_demand_by_ops(ids):
    model = make()
    want = reference(model, ids, MASK, padding=True).detach()
    engine = Engine.from_model(model)
    with distilbert_fast.backend("torch"):
        found = engine.encode(ids, MASK, padding=True, hidden_states=True).hidden_states
    torch.testing.assert_close(found[-1], want, rtol=0, atol=1e-4)
    torch.testing.assert_close(found[-1], engine.encode(ids, MASK, padding=True).last, rtol=0, atol=1e-4)
    full = engine.encode(ids, padding=True)
    assert torch.equal(full.last, engine(ids))
    with pytest.raises(
        ValueError, match=r"engine: padding must be False where only the first rows are wanted, got True"
    ):
        engine.encode(ids, MASK, rows="first", padding=True)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_threads_of_python_at_the_same_time(precision):
    engine = Engine.from_model(make(), precision)
    batches = [ragged(9, seed) for seed in range(24)]
    want = [engine(*batch) for batch in batches]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            found = list(pool.map(lambda batch: engine(*batch), batches))
            assert all(map(torch.equal, found, want))


def test_any_mask_and_any_ids(ids):
    engine = Engine.from_model(make())
    want = engine(ids, MASK)
    minus_zero = torch.where(MASK == 0, -0.0, 1.0)
    for mask in (
        MASK.bool(),
        MASK.int(),
        MASK.to(torch.uint8),
        MASK.float(),
        minus_zero,
        MASK * 7,
        MASK.t().contiguous().t(),
    ):
        assert torch.equal(engine(ids, mask), want)
    assert torch.equal(engine(ids.int(), MASK), want)
    assert torch.equal(engine(torch.stack([ids, ids], 2)[..., 0], MASK), want)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_masked_heads_are_skipped_and_change_nothing_else(tier, precision, ids):
    masks = [torch.tensor(m) for m in ([0.0, 1.0, 1.0], [1.0, 0.0, 0.5], [0.0, 0.0, 0.0])]
    masks.append(torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 2.0]]))
    model = make()
    engine = Engine.from_model(model, precision)
    for mask in masks:
        want = reference(model, ids, MASK, head_mask=mask).detach()
        torch.testing.assert_close(engine(ids, MASK, head_mask=mask), want, rtol=0, atol=CLOSE[precision])
        fixed = Engine.from_model(model, precision, mask)(ids, MASK)
        torch.testing.assert_close(fixed, want, rtol=0, atol=CLOSE[precision])
    assert torch.equal(engine(ids, MASK, head_mask=torch.ones(H)), engine(ids, MASK))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_comes_out_has_the_dtype_of_the_model(dtype, ids):
    model = make(dtype=dtype)
    for precision in (None, *PRECISIONS):
        engine = Engine.from_model(model, precision)
        assert engine.packed is not None and engine(ids, MASK).dtype == dtype
        torch.testing.assert_close(engine(ids, MASK), reference(model, ids, MASK).detach(), rtol=0, atol=0.1)


def test_the_encoder_leaves_to_ops_what_it_cannot_run(ids):
    for dtype in (torch.float16, torch.float64):
        assert Engine.from_model(make(dtype=dtype)).packed is None
    assert Engine.from_model(make(), "fp16").packed is None
    engine = Engine.from_model(make())
    with distilbert_fast.backend("torch"):
        by_ops = engine(ids, MASK)
    torch.testing.assert_close(by_ops, engine(ids, MASK), rtol=1e-5, atol=1e-5)


# Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_saved_engine_gives_the_same_bits(precision, ids, tmp_path):
    head_mask = torch.tensor([[0.0, 1.0, 0.5], [1.0, 1.0, 1.0]])
    engine = Engine.from_model(make(padding_idx=1), precision, head_mask)
    engine.save(tmp_path / "engine.safetensors")
    loaded = Engine.load(tmp_path / "engine.safetensors")
    assert torch.equal(loaded(ids, MASK), engine(ids, MASK))
    mask = torch.rand(H)
    assert torch.equal(loaded(ids, MASK, head_mask=mask), engine(ids, MASK, head_mask=mask))
    with distilbert_fast.backend("torch"), pytest.raises(distilbert_fast.BackendError) as error:
        loaded(ids, MASK)
    assert str(error.value) == "engine: a loaded engine runs by backend 'cpu', 'torch' is forced"


def test_refuses_files_that_are_not_one(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "engine.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError) as error:
        Engine.load(path)
    assert str(error.value) == f"engine: path must be a file of format {FORMAT}, got '{path}' of None"
    Engine.from_model(make()).save(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="is truncated or no safetensors file"):
        Engine.load(path)


def test_refuses_blobs_of_another_size():
    packed = Engine.from_model(make()).packed
    with pytest.raises(ValueError) as error:
        PackedEncoder(packed.shape, packed.tensors | {"0.out": packed.tensors["0.out"][:-4]})
    size = packed.tensors["0.out"].numel()
    assert str(error.value) == f"pack: the blob must be of {size} bytes, got {size - 4}"
    with pytest.raises(ValueError, match=r"^engine: norm.weight must be of shape \[30\], got \[29\]"):
        PackedEncoder(packed.shape, packed.tensors | {"norm.weight": torch.ones(C - 1)})


@pytest.mark.parametrize("count", [1, 2, 4])
def test_refuses_another_number_of_hidden_states(count):
    packed = Engine.from_model(make()).packed
    states = [torch.empty(1, 2, C) for _ in range(count)]
    ids = torch.ones(1, 2, dtype=torch.int64)
    call = [ids.data_ptr(), True, 1, 2, 0, 0, 0, 0, 0, 0, False, 0, 0, states[-1].data_ptr(), 0]
    with pytest.raises(ValueError) as error:
        packed._encoder.run(*call, [state.data_ptr() for state in states], 0, 1, None, 0, None)
    assert str(error.value) == f"engine: hidden_states must be 3, got {count}"


# Calibration ------------------------------------------------------------------------------------------------------


def test_static_scales_stay_close(tier):
    model = make()
    engine = Engine.from_model(model, "int8")
    batches = [dict(zip(("input_ids", "attention_mask"), ragged(8, seed), strict=True)) for seed in range(4)]
    static = engine.calibrated(batches)
    assert all(context > 0 and ffn > 0 for context, ffn in static.packed.shape.scales)
    ids, mask = ragged(12, 9)
    want = reference(model, ids, mask).detach()
    torch.testing.assert_close(static(ids, mask), want, rtol=0, atol=CLOSE["int8"])
    assert not torch.equal(static(ids, mask), engine(ids, mask))
    again = static.calibrated(batches)
    assert again.packed.shape == static.packed.shape and torch.equal(again(ids, mask), static(ids, mask))


def test_calibration_of_int8_modules_and_files(tmp_path):
    batches = [dict(zip(("input_ids", "attention_mask"), ragged(8), strict=True))]
    engine = Engine.from_model(make(int8=True)).calibrated(batches)
    engine.save(tmp_path / "static.safetensors")
    loaded = Engine.load(tmp_path / "static.safetensors")
    assert torch.equal(loaded(*ragged(5)), engine(*ragged(5)))
    with pytest.raises(ValueError) as error:
        loaded.calibrated(batches)
    assert str(error.value) == "engine: model must be an int8 one, not from a file, to be calibrated, got another"


def test_calibration_refuses_what_is_not_finite_wherever_it_stands():
    model = make()
    with torch.no_grad():
        model.word.weight[3] = float("nan")
    engine = Engine.from_model(model, "int8")
    batches = [{"input_ids": torch.full((2, 4), token)} for token in (4, 3, 5)]
    with pytest.raises(ValueError, match="engine: calibration must be batches with finite activations, got others"):
        engine.calibrated(batches)


@pytest.mark.parametrize(
    ("precision", "batches", "message"),
    [
        ("fp32", [], "engine: model must be an int8 one, not from a file, to be calibrated, got another"),
        ("int8", [], "engine: calibration must be at least one batch with a token, got none"),
        (
            "int8",
            [{"input_ids": torch.zeros(2, 0, dtype=torch.long)}],
            "engine: calibration must be at least one batch with a token, got none",
        ),
    ],
)
def test_calibration_refuses(precision, batches, message):
    with pytest.raises(ValueError) as error:
        Engine.from_model(make(), precision).calibrated(batches)
    assert str(error.value) == message


# Processes --------------------------------------------------------------------------------------------------------


def test_a_forked_child_computes_the_same_bits():
    """Its parent's OpenMP threads do not exist in it: a region there would hang."""
    code = """
        import os, sys
        import torch
        sys.path.insert(0, "tests")
        from tiny_encoder import V, make
        from distilbert_fast.engine.engine import Engine
        torch.set_num_threads(2)
        engine = Engine.from_model(make(), "int8")
        ids = torch.arange(40 * 20).view(40, 20) % V
        want = engine(ids)
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(engine(ids), want) else 1)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=600, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_workers_of_a_data_loader():
    from torch.utils.data import DataLoader

    engine = Engine.from_model(make())
    ids, mask = ragged(8)
    want = engine(ids, mask)

    class Encoded(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            return engine(ids[i : i + 1], mask[i : i + 1])[0]

    found = next(iter(DataLoader(Encoded(), batch_size=8, num_workers=1, multiprocessing_context="fork", timeout=60)))
    assert torch.equal(found, want)
