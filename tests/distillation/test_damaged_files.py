"""Checkpoints, corpus caches and teacher caches with bits flipped, ends cut off and JSON edited: as ever, made again,
passed over, or an error that names the file."""

from __future__ import annotations

import json
import logging
import os

import numpy as np
import pytest
import torch
from distillation import corpora, tiny
from mutations import ODD, assert_refused_or_same, cut, edited, flipped
from safetensors import safe_open
from safetensors.torch import save_file

datasets = pytest.importorskip("datasets")

from distilbert_fast.data.corpus import load_corpus  # noqa: E402
from distilbert_fast.data.masking import MaskedDataset, Masking, pad_rows  # noqa: E402
from distilbert_fast.distillation.teachers import build_cache as building  # noqa: E402
from distilbert_fast.distillation.teachers.build_cache import build_cache  # noqa: E402
from distilbert_fast.distillation.teachers.cache import INDEX, SHARD, CachedTeacher  # noqa: E402
from distilbert_fast.files.durable import FileError  # noqa: E402
from distilbert_fast.runs import manifest  # noqa: E402
from distilbert_fast.runs.resumable_trainer import newest_complete_checkpoint  # noqa: E402
from distilbert_fast.runs.training_state import load_state, save_state  # noqa: E402

datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def legacy(path):
    """A manifest's contents, and the same as earlier versions wrote it: without a checksum of itself."""
    whole = json.loads(path.read_text())
    del whole["checksum"]
    path.write_text(json.dumps(whole))
    return whole


# Checkpoints ------------------------------------------------------------------------------------------------------


def checkpoint(path):
    manifest.begin(path)
    (path / "model.safetensors").write_bytes(bytes(range(200)))
    manifest.complete(path, {"seed": 1, "model": {"class": "X", "sizes": [1, 2]}})
    return path


@pytest.fixture
def both(tmp_path):
    return checkpoint(tmp_path / "checkpoint-9"), checkpoint(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("name", [manifest.MANIFEST, "model.safetensors"])
def test_a_damaged_checkpoint_is_passed_over(name, both, tmp_path):
    old, new = both
    content = (new / name).read_bytes()
    edits = edited(json.loads(content), 2, 150) if name == manifest.MANIFEST else ()
    taken = []

    def newest():
        taken.append(newest_complete_checkpoint(tmp_path))
        return manifest.settings_of(new) if taken[-1] == str(new) else None

    settings = manifest.settings_of(new)
    damages = [*flipped(content, 0, 150), *cut(content, 1, 10), *edits]
    assert_refused_or_same(new / name, iter(damages), newest, lambda found: found is None or found == settings)
    assert set(taken) <= {str(old), str(new)} and taken.count(str(old)) > 0.9 * len(damages)


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("field", ["files", "settings", "complete", "format"])
def test_a_manifest_of_an_earlier_version_is_checked_too(field, value, both, tmp_path):
    old, new = both
    whole = legacy(new / manifest.MANIFEST)
    assert newest_complete_checkpoint(tmp_path) == str(new)
    (new / manifest.MANIFEST).write_text(json.dumps(whole | {field: value}))
    fits = (field in ("files", "settings") and value == {}) or (field, value) in (("settings", {"x": 1}),)
    assert newest_complete_checkpoint(tmp_path) == str(new if fits or (field, value) == ("complete", True) else old)


@pytest.mark.parametrize(
    "entry",
    [
        {"../x": {"size": 1, "sha256": "0" * 64}},
        {"/etc/hostname": {"size": 1, "sha256": "0" * 64}},
        {"a\0b": {"size": 1, "sha256": "0" * 64}},
        {"a" * 5000: {"size": 1, "sha256": "0" * 64}},
        {"model.safetensors": {"size": 200}},
        {"model.safetensors": {"size": "200", "sha256": "0" * 64}},
        {"model.safetensors": {"size": 200, "sha256": "0" * 63}},
        {"model.safetensors": None},
    ],
)
def test_files_that_no_manifest_lists(entry, both, tmp_path):
    whole = legacy(both[1] / manifest.MANIFEST)
    (both[1] / manifest.MANIFEST).write_text(json.dumps(whole | {"files": entry}))
    assert newest_complete_checkpoint(tmp_path) == str(both[0])


def test_no_regular_files_in_a_checkpoint(both, tmp_path):
    for name in ("model.safetensors", manifest.MANIFEST):
        (both[1] / name).unlink()
        os.mkfifo(both[1] / name)
        assert newest_complete_checkpoint(tmp_path) == str(both[0])


# Corpora ----------------------------------------------------------------------------------------------------------


def test_a_damaged_corpus_is_made_again(tokenizer, tmp_path):
    text = corpora.write(tmp_path / "corpus.txt", corpora.documents())

    def load():
        return load_corpus(text, tokenizer, max_length=32, holdout=0.2, cache_dir=tmp_path / "cache")

    def plain(corpus):
        rows = [part["input_ids"][:] for part in (corpus.train, corpus.holdout)]
        return rows, corpus.token_counts.tolist(), corpus.report

    first = load()
    want = plain(first)
    for name, count in {"train.arrow": 5, "holdout.arrow": 1, "token_counts.npy": 1, manifest.MANIFEST: 4}.items():
        file = first.path / name
        content = file.read_bytes()
        damages = [*flipped(content, 0, count), next(cut(content, 1, 0))]
        assert_refused_or_same(file, iter(damages), load, lambda found: plain(found) == want)
    whole = legacy(first.path / manifest.MANIFEST)
    for report in (None, {}, {"kept": 1}, whole["settings"]["report"] | {"kept": -1}):
        (first.path / manifest.MANIFEST).write_text(json.dumps(whole | {"settings": {"report": report}}))
        with pytest.raises(FileError, match=manifest.MANIFEST):
            load()


def test_a_fifo_for_a_corpus(tokenizer, tmp_path):
    os.mkfifo(tmp_path / "corpus.txt")
    for source in (tmp_path / "corpus.txt", str(tmp_path / "*.txt")):
        with pytest.raises(FileError, match=r"corpus\.txt': expected a regular file, got a FIFO"):
            load_corpus(source, tokenizer, cache_dir=tmp_path / "cache")


# Teacher caches ---------------------------------------------------------------------------------------------------


class Tokenizer:
    pad_token_id, mask_token_id, all_special_ids = 0, 3, (0, 1, 2, 3)

    def __len__(self):
        return tiny.VOCABULARY


@pytest.fixture
def dataset(monkeypatch):
    monkeypatch.setattr(building, "_EXAMPLES", 4)
    generator = np.random.default_rng(0)
    ids = [generator.integers(4, tiny.VOCABULARY, length).tolist() for length in generator.integers(2, tiny.LENGTH, 7)]
    features = {"input_ids": datasets.Sequence(datasets.Value("uint16")), "length": datasets.Value("int32")}
    rows = datasets.Dataset.from_dict({"input_ids": ids, "length": list(map(len, ids))}, datasets.Features(features))
    return MaskedDataset(rows, Masking(Tokenizer(), None, probability=0.4, seed=0))


@pytest.fixture
def model():
    return tiny.teacher("MaskedLM", max_position_embeddings=16)


@pytest.mark.parametrize("name", [INDEX, SHARD.format(0), manifest.MANIFEST])
def test_a_damaged_teacher_cache(name, model, dataset, tmp_path):
    path = build_cache(model, dataset, tmp_path / "cache", k=3)
    batch = pad_rows(dataset.__getitems__(list(range(7))), 0)
    places = batch["attention_mask"].flatten().nonzero().flatten()

    def answers():
        try:
            return CachedTeacher(path, dataset).answer(batch).soft_targets(places)
        except FileError as error:  # the cache's directory is named, and the file in it
            known = name in str(error) or "manifest" in str(error)
            raise (FileError(f"{path / name}: {error}") if known else error) from None

    want, content = answers(), (path / name).read_bytes()
    edits = edited(json.loads(content), 2, 60) if name == manifest.MANIFEST else ()
    damages = [*flipped(content, 0, 40), *cut(content, 1, 4), *edits]

    def same(found):
        return all(torch.equal(a, b) for a, b in zip(found[:3], want[:3], strict=True))

    assert assert_refused_or_same(path / name, iter(damages), answers, same) > 0.95 * len(damages)


@pytest.mark.parametrize("field", ["format", "epochs", "temperature", "k", "positions", "hidden", "vocabulary"])
def test_a_key_of_an_earlier_version_is_checked(field, model, dataset, tmp_path):
    path = build_cache(model, dataset, tmp_path / "cache", k=3)
    whole = legacy(path / manifest.MANIFEST)
    CachedTeacher(path)
    for value in (None, "x", -1, [], 1e400):
        changed = whole | {"settings": whole["settings"] | {"key": whole["settings"]["key"] | {field: value}}}
        (path / manifest.MANIFEST).write_text(json.dumps(changed))
        with pytest.raises(FileError, match=str(path)):
            CachedTeacher(path)


def test_shards_and_key_of_a_build_that_was_killed(model, dataset, tmp_path, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(building, "_write_index", fail)
    with pytest.raises(KeyboardInterrupt):
        build_cache(model, dataset, tmp_path / "cache", k=3)
    monkeypatch.undo()
    monkeypatch.setattr(building, "_EXAMPLES", 4)
    partial = tmp_path / ".cache.partial"
    shard, key = partial / SHARD.format(1), partial / "key.json"

    def build():
        return build_cache(model, dataset, tmp_path / "cache", k=3)

    content = shard.read_bytes()
    damages = [*flipped(content, 0, 20), *cut(content, 1, 3)]
    assert assert_refused_or_same(shard, iter(damages), build, lambda found: False) == len(damages)
    content = key.read_bytes()
    for damaged in (b"", b"[]", content[:-1], b"[" * 100_000):
        key.write_bytes(damaged)
        with pytest.raises(FileError, match=str(key)):
            build()
    key.write_bytes(content)
    CachedTeacher(build(), dataset)


# States of a training ---------------------------------------------------------------------------------------------


def test_a_damaged_state_of_an_optimizer(tmp_path):
    """It is compared with the manifest's checksum first: what is left is to fail by name."""
    path = tmp_path / "optimizer.safetensors"
    save_state(path, {"state": {0: {"step": torch.tensor(3.0), "betas": (0.9, 0.99)}}, "names": ["a", None]})
    header = json.loads(load_metadata(path)["structure"])
    content = path.read_bytes()
    damages = list(cut(content, 1, 10))
    for label, text in edited(header, 2, 40):
        save_file({"0": torch.tensor(3.0)}, path, {"structure": text.decode(errors="replace")})
        damages.append((label, path.read_bytes()))
    assert assert_refused_or_same(path, iter(damages), lambda: load_state(path), lambda found: True) > 20


def load_metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()
