"""Masking: what it draws against exact expectation, and that nothing but (seed, epoch, example) decides it."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from distilbert_fast.data import IGNORED
from distilbert_fast.data.masking import MaskedDataset, MaskedStream, Masking, pad_collator

V, SPECIAL, MASK = 50, (0, 1, 2, 3), 3


class Tokenizer:
    """The four things that masking and padding ask of a tokenizer."""

    pad_token_id, mask_token_id, all_special_ids = 0, MASK, SPECIAL

    def __len__(self):
        return V


def masking(counts=None, **settings):
    return Masking(Tokenizer(), np.arange(V) ** 2 if counts is None else counts, **settings)


def draw(length, seed=0):
    ids = np.random.default_rng(seed).integers(len(SPECIAL), V, length)
    ids[:1], ids[-1:] = 1, 2
    return ids


def plainly(ids, epoch, example, seed=0, probability=0.15, smoothing=0.7, shares=(0.8, 0.1)):
    """The definition, token by token."""
    words = np.random.Philox(key=seed, counter=[0, epoch, example, 0]).random_raw(2 * len(ids)).tolist()
    place = {}
    for i, id in enumerate(ids.tolist()):
        if id not in SPECIAL:
            place[i] = -math.log(((words[2 * i] >> 12) + 0.5) / 2**52) * max(id**2, 1) ** smoothing
    drawn = sorted(place, key=place.get)[: math.ceil(round(probability * len(ids), 9))]
    corrupted, labels = ids.copy(), np.full(len(ids), IGNORED)
    for i in drawn:
        labels[i] = ids[i]
        share, token = (words[2 * i + 1] & 0xFFFFFFFF) / 2**32, (words[2 * i + 1] >> 32) * V >> 32
        corrupted[i] = MASK if share < shares[0] else token if share < sum(shares) else ids[i]
    return corrupted, labels


@pytest.mark.parametrize("length", [0, 1, 2, 3, 20, 100, 511])
@pytest.mark.parametrize("probability", [0.07, 0.15, 1.0])
def test_it_is_its_definition(length, probability):
    for example in range(5):
        ids = draw(length, example)
        before = ids.copy()
        got = masking(probability=probability, seed=9)(ids, 4, example)
        wanted = plainly(ids, 4, example, 9, probability)
        assert np.array_equal(got, wanted) and np.array_equal(ids, before)
        assert all(array.dtype == np.int64 for array in got)


def test_it_never_changes():
    """A run that is resumed by a later version, and a cache of teacher outputs, rely on these very draws."""
    ids = np.arange(4, V)
    corrupted, labels = masking(probability=0.3, mask=0.4, keep=0.2, random=0.4, seed=2**64 - 1)(ids, 2**40, 2**41)
    drawn = np.flatnonzero(labels != IGNORED)
    assert ids[drawn].tolist() == [4, 5, 6, 7, 8, 9, 10, 11, 18, 21, 22, 24, 32, 44]
    assert corrupted[drawn].tolist() == [3, 22, 6, 29, 14, 9, 3, 21, 18, 21, 22, 3, 4, 27]


def test_properties():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=100, deadline=None)
    @hypothesis.given(
        rows=st.lists(st.lists(st.integers(0, V - 1), max_size=40), max_size=6),
        epoch=st.integers(0, 2**63),
        probability=st.floats(0.01, 1),
        order=st.randoms(use_true_random=False),
    )
    def holds(rows, epoch, probability, order):
        mask = masking(probability=probability)
        numbers = [order.randrange(2**63) for _ in rows]
        flat = np.array([id for row in rows for id in row], np.uint16)
        lengths = np.array([len(row) for row in rows], np.int64)
        together = mask.batch(flat, lengths, epoch, numbers)
        at = 0
        for row, number in zip(rows, numbers, strict=True):
            corrupted, labels = (part[at : at + len(row)] for part in together)
            at += len(row)
            assert np.array_equal((corrupted, labels), mask(row, epoch, number))  # as if it were alone
            row = np.array(row, np.int64)
            drawn = labels != IGNORED
            maskable = ~np.isin(row, SPECIAL)
            assert drawn.sum() == min(math.ceil(probability * len(row) - 1e-9), maskable.sum())
            assert maskable[drawn].all()
            assert np.array_equal(labels[drawn], row[drawn]) and np.array_equal(corrupted[~drawn], row[~drawn])
            assert corrupted.min(initial=0) >= 0 and corrupted.max(initial=0) < V

    holds()


def test_each_of_seed_epoch_and_example_counts():
    ids = draw(200)
    drawn = [masking(seed=s)(ids, e, x)[1].tobytes() for s in (0, 1, 2) for e in (0, 1, 2) for x in (0, 1, 2)]
    assert len(set(drawn)) == 27


def test_tokens_are_drawn_by_weight():
    """Two of five without replacement: P(i) = p_i + Σ_j p_j·p_i / (1 − p_j), p the weights' shares."""
    ids = np.array([1, 5, 6, 7, 8, 9, 2, 2, 2, 2])
    counts = np.zeros(V)
    counts[5:10] = 0, 1, 10, 1000, 100
    weights = np.maximum(counts[5:10], 1) ** -0.7
    p = weights / weights.sum()
    expected = p * (1 + (p / (1 - p)).sum() - p / (1 - p))
    examples = 40_000
    lengths = np.full(examples, len(ids))
    _, labels = masking(counts, probability=0.2).batch(np.tile(ids, examples), lengths, 0, range(examples))
    share = (labels.reshape(examples, -1) != IGNORED).mean(0)[1:6]
    assert expected.sum() == pytest.approx(2)
    assert (np.abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / examples)).all(), (share, expected)


@pytest.mark.parametrize("counts", ["none", "smoothing 0"])
def test_without_smoothing_all_are_alike(counts):
    mask = Masking(Tokenizer(), None) if counts == "none" else masking(smoothing=0)
    ids, examples = draw(20), 20_000
    _, labels = mask.batch(np.tile(ids, examples), np.full(examples, 20), 0, range(examples))
    share = (labels.reshape(examples, 20) != IGNORED).mean(0)[1:-1]
    assert np.abs(share - 3 / 18).max() < 5 * math.sqrt(3 / 18 * 15 / 18 / examples)


def test_what_becomes_of_the_drawn():
    """80 % the mask token, 10 % a token drawn evenly from the vocabulary, 10 % as they were."""
    examples, length = 4000, 100
    ids = np.tile(draw(length), examples)
    corrupted, labels = masking().batch(ids, np.full(examples, length), 0, range(examples))
    drawn = labels != IGNORED
    n = drawn.sum()
    became, was = corrupted[drawn], labels[drawn]
    others = became[(became != MASK) & (became != was)]
    for share, expected in (
        ((became == MASK).mean(), 0.8 + 0.1 / V),
        ((became == was).mean(), 0.1 + 0.1 / V),
        (len(others) / n, 0.1 * (V - 2) / V),
    ):
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / n)
    found = np.bincount(others, minlength=V)
    even = np.array([(was != token).sum() * 0.1 / V * (token != MASK) for token in range(V)])  # expectation
    tokens = even > 0
    chi2 = ((found - even)[tokens] ** 2 / even[tokens]).sum()
    assert found[MASK] == 0 and chi2 < tokens.sum() + 5 * math.sqrt(2 * tokens.sum())


def test_draws_of_neighbours_are_unrelated():
    """Examples, epochs and seeds one apart share no more draws than chance gives."""
    ids = np.full(400, 7)
    sets = [masking(seed=s)(ids, e, x)[1] != IGNORED for s in (0, 1) for e in range(4) for x in range(20)]
    both = [(a & b).mean() for i, a in enumerate(sets) for b in sets[:i]]
    assert np.mean(both) == pytest.approx(0.15**2, abs=3e-4) and max(both) < 0.06


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probability": 0}, "Masking: probability must be above 0 and at most 1, got 0"),
        ({"probability": 1.5}, "Masking: probability must be above 0 and at most 1, got 1.5"),
        ({"mask": 0.9}, "Masking: mask, keep and random must be shares that sum to 1, got (0.9, 0.1, 0.1)"),
        ({"smoothing": -1}, "Masking: smoothing must be 0 or above, got -1"),
        ({"seed": -1}, "Masking: seed must be from 0 to 2^64 - 1, got -1"),
        ({"counts": [1, 2]}, "Masking: token_counts must be 50 counts of 0 or above, got shape [2]"),
        ({"counts": -np.ones(V)}, "Masking: token_counts must be 50 counts of 0 or above, got shape [50]"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        masking(**settings)


def test_a_tokenizer_without_mask_or_padding():
    bare = type("Bare", (), {"mask_token_id": None, "pad_token_id": None, "__len__": lambda self: V})()
    with pytest.raises(ValueError, match=r"^Masking: tokenizer must be one with a mask token, got Bare$"):
        Masking(bare, None)
    with pytest.raises(ValueError, match=r"^pad_collator: tokenizer must be one with a pad token, got Bare$"):
        pad_collator(bare)


def test_counts_from_a_file(tmp_path):
    np.save(tmp_path / "token_counts.npy", np.arange(V) ** 2)
    assert masking(tmp_path / "token_counts.npy").fingerprint == masking().fingerprint
    others = [masking(seed=1), masking(keep=0.2, random=0), masking(smoothing=0.5), masking(probability=0.2)]
    assert len({mask.fingerprint for mask in [masking(), *others]}) == 5


@pytest.fixture
def rows():
    datasets = pytest.importorskip("datasets")
    ids = [draw(length, length).tolist() for length in (12, 30, 7, 3, 25, 16, 9, 40, 5, 11)]
    features = datasets.Features(
        {"input_ids": datasets.Sequence(datasets.Value("uint16")), "length": datasets.Value("int32")}
    )
    return datasets.Dataset.from_dict({"input_ids": ids, "length": list(map(len, ids))}, features=features)


def masked(rows, mask, epoch):
    """(ids, labels) of every row, as of Masking alone."""
    return [mask(row, epoch, example) for example, row in enumerate(rows["input_ids"])]


def equal(item, wanted):
    return [item["input_ids"].tolist(), item["labels"].tolist()] == [part.tolist() for part in wanted]


def test_dataset(rows):
    mask = masking(seed=3)
    dataset = MaskedDataset(rows, mask)
    assert len(dataset) == 10 and dataset.lengths == rows["length"][:]
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        wanted = masked(rows, mask, epoch)
        assert all(equal(dataset[i], wanted[i]) for i in range(10))
        assert all(equal(dataset[i - 10], wanted[i]) and dataset[i - 10]["example"] == i for i in range(10))
        picked = dataset.__getitems__([7, 2, 2])
        assert [(item["example"], item["length"]) for item in picked] == [(7, 40), (2, 7), (2, 7)]
        assert all(equal(item, wanted[item["example"]]) for item in picked)
    with pytest.raises(IndexError):
        dataset[10]
    part = MaskedDataset(rows.select([4, 9]), mask)
    assert part.lengths == [25, 11] and part.fingerprint != dataset.fingerprint


def test_an_epoch_reaches_workers_that_run(rows):
    mask = masking()
    dataset = MaskedDataset(rows, mask)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=3, num_workers=2, persistent_workers=True, collate_fn=list, multiprocessing_context="fork"
    )
    for epoch in (5, 0, 6):
        dataset.set_epoch(epoch)
        wanted = masked(rows, mask, epoch)
        items = [item for batch in loader for item in batch]
        assert [item["example"] for item in items] == list(range(10))
        assert all(equal(item, wanted[item["example"]]) for item in items)


def test_stream(rows):
    mask = masking()
    stream = MaskedStream(rows.to_iterable_dataset(), mask, epoch=2)
    for epoch in (2, 3):
        stream.set_epoch(epoch)
        items = list(stream)
        assert [item["example"] for item in items] == list(range(10))
        assert all(equal(*pair) for pair in zip(items, masked(rows, mask, epoch), strict=True))


def test_a_stream_is_masked_and_shuffled_anew_in_every_epoch(rows):
    shuffled = MaskedStream(rows.to_iterable_dataset().shuffle(seed=1, buffer_size=10), masking())
    passes = []
    for epoch in (0, 1, 0):
        shuffled.set_epoch(epoch)
        passes.append(list(shuffled))
        assert [item["example"] for item in passes[-1]] == list(range(10))
    first, second, again = passes
    assert all(torch.equal(one[name], other[name]) for one, other in zip(first, again, strict=True) for name in PARTS)
    orders = [[unmasked(item) for item in items] for items in (first, second)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


PARTS = ("input_ids", "labels")


def unmasked(item):
    return torch.where(item["labels"] == IGNORED, item["input_ids"], item["labels"]).tolist()


def test_batches(rows):
    dataset = MaskedDataset(rows, masking())
    items = dataset.__getitems__([3, 0, 6])  # 3, 12 and 9 tokens
    batch = pad_collator(Tokenizer())(items)
    assert {name: (tuple(t.shape), t.dtype) for name, t in batch.items()} == {
        "input_ids": ((3, 16), torch.int64),
        "labels": ((3, 16), torch.int64),
        "attention_mask": ((3, 16), torch.bool),
        "example": ((3,), torch.int64),
    }
    assert batch["attention_mask"].sum(1).tolist() == [3, 12, 9] and batch["example"].tolist() == [3, 0, 6]
    for row, item in enumerate(items):
        length = item["length"]
        assert torch.equal(batch["input_ids"][row, :length], item["input_ids"])
        assert torch.equal(batch["labels"][row, :length], item["labels"])
    padding = ~batch["attention_mask"]
    assert (batch["input_ids"][padding] == 0).all() and (batch["labels"][padding] == IGNORED).all()
    assert "example" not in pad_collator(Tokenizer())(
        [{"input_ids": item["input_ids"], "labels": item["labels"]} for item in items]
    )


def test_training(rows, tmp_path):
    """Batches of rows of a length, without reading a row to learn it; what a resumed run must find unchanged."""
    import transformers
    from distillation import tiny

    from distilbert_fast.runs.resumable_trainer import ResumableTrainer

    class Unread(MaskedDataset):
        def __getitems__(self, indices):
            raise AssertionError("a row was read")

    def trainer(kind, seed=0):
        model = tiny.teacher("MaskedLM", vocab_size=V, max_position_embeddings=40)
        args = tiny.arguments(
            tmp_path, train_sampling_strategy="group_by_length", per_device_train_batch_size=3, max_steps=6
        )
        dataset = kind(rows, masking(seed=seed))
        return ResumableTrainer(model, args, pad_collator(Tokenizer()), train_dataset=dataset)

    of_nothing = trainer(Unread)
    grouped = of_nothing._get_train_sampler().sampler
    assert isinstance(grouped, transformers.trainer_pt_utils.LengthGroupedSampler)
    assert grouped.lengths == rows["length"][:] and sorted(grouped) == list(range(10))
    output = trainer(MaskedDataset).train()
    assert output.global_step == 6 and np.isfinite(output.training_loss)
    described = [trainer(MaskedDataset, seed).resume_settings()["train_dataset"] for seed in (0, 0, 1)]
    assert described[0] == described[1] != described[2]


def test_what_is_evaluated_on_is_masked_alike_every_time():
    datasets = pytest.importorskip("datasets")
    ids = [draw(20, seed).tolist() for seed in range(4)]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "length": [20] * 4})
    dataset = MaskedDataset(rows, masking())
    still = dataset.at_epoch(3)
    dataset.set_epoch(3)
    wanted = dataset[2]["input_ids"]
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        still.set_epoch(epoch)
        assert torch.equal(still[2]["input_ids"], wanted)
    assert not torch.equal(dataset[2]["input_ids"], wanted)
    assert still.rows_fingerprint == dataset.rows_fingerprint and still.fingerprint != dataset.fingerprint


def test_masks_come_round():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"input_ids": [draw(50).tolist()], "length": [50]})
    plain, cycling = MaskedDataset(rows, masking()), MaskedDataset(rows, masking(), epoch=2, cycle=3)
    for epoch in range(7):
        cycling.set_epoch(epoch)
        plain.set_epoch(2 + epoch % 3)
        assert torch.equal(cycling[0]["labels"], plain[0]["labels"])
    with pytest.raises(ValueError, match=r"^MaskedDataset: cycle must be 1 or more, or None, got 0$"):
        MaskedDataset(rows, masking(), cycle=0)
