"""Make the directory that a ``CachedTeacher`` reads: a teacher runs once over the examples that will be trained on.

It is built beside its place, a shard at a time. A shard is flushed and renamed when it is whole, so that a build that
was killed continues after the last whole shard. When all shards and the manifest are written, the directory is renamed.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from distilbert_fast.data.masking import MaskedDataset, pad_rows
from distilbert_fast.distillation.objectives.mlm import MlmObjective
from distilbert_fast.distillation.teachers.cache import (
    FORMAT,
    INDEX,
    SHARD,
    CachedTeacher,
    counted_places,
    describe_masked,
    example_keys,
    key_of,
    refuse_other_key,
    teacher_fingerprint,
)
from distilbert_fast.distillation.teachers.effect import teacher_effect
from distilbert_fast.distillation.teachers.model import Batch, ModelTeacher, Projection, full
from distilbert_fast.files import durable
from distilbert_fast.files.schema import anything, mapping, read_json
from distilbert_fast.modeling.vocabulary import vocabulary_head
from distilbert_fast.ops import _check
from distilbert_fast.runs import manifest

logger = logging.getLogger(__name__)

OP = "build_cache"
_KEY_FILE = "key.json"
_EXAMPLES = 4096  # in a shard


def build_cache(
    teacher: PreTrainedModel | ModelTeacher,
    dataset: MaskedDataset,
    directory: str | os.PathLike[str],
    *,
    k: int = 64,
    temperature: float = 2.0,
    positions: str = "real",
    hidden: bool = False,
    epochs: int = 1,
    held_out: MaskedDataset | None = None,
    batch_size: int = 64,
    device: torch.device | str | None = None,
) -> Path:
    """Run a teacher over a dataset and keep its answers.

    A row takes 4 k + 4 bytes (6 k + 4 if the vocabulary has more than 65,536 tokens), and 2 C more for its hidden
    state. The size in bytes is logged first; if the disk has less space, the build is refused.

    Args:
        teacher: a model for masked LM that ``optimize`` knows; a ModelTeacher chooses the precision, which is part of
            the key.
        dataset: what will be trained on.
        directory: of the cache. A complete one with the same key is left as it is; an unfinished one is
            continued.
        k: tokens kept of each row. ``cache_report`` tells what the others are worth.
        temperature: τ of the training.
        positions: "real" keeps a row for every token, "masked" for the masked ones, about a seventh.
        hidden: keep last hidden states too, for the cosine loss.
        epochs: masks of how many epochs, from 0 on. To train for more of them, give the dataset that ``cycle``.
        held_out: what to evaluate on, masked alike every time: ``MaskedDataset(…, cycle=1)``.
        batch_size: examples that the teacher sees at once.
        device: where it runs; by default CUDA if there is one.

    Returns:
        The directory.

    Raises:
        ValueError, TypeError: an argument out of range; a directory that holds something else, by name.
        OSError: the disk is too small or full; the shards that are whole are kept.
    """
    if isinstance(teacher, PreTrainedModel):
        teacher = ModelTeacher(teacher)
    projection = vocabulary_head(teacher.model, OP).projection
    if not 1 <= k <= projection.out_features:
        _check.refuse(OP, "k", f"from 1 to the {projection.out_features} tokens of the vocabulary", k)
    _check.positive(OP, "temperature", temperature)
    _check.choice(OP, "positions", positions, ("real", "masked"))
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            _check.refuse(OP, name, "1 or more", value)
    for name, given in (("dataset", dataset), ("held_out", held_out)):
        if not isinstance(given, MaskedDataset) and (name == "dataset" or given is not None):
            _check.refuse(OP, name, "a MaskedDataset", type(given).__name__, TypeError)
    if held_out is not None and held_out.cycle != 1:
        _check.refuse(OP, "held_out", "masked alike every time, with cycle=1", f"cycle={held_out.cycle}")
    if not len(dataset):
        _check.refuse(OP, "dataset", "of one example at least", "none")
    teacher.prepare(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    key = {
        "format": FORMAT,
        "teacher": teacher_fingerprint(teacher.model),
        "precision": teacher.precision,
        **describe_masked(dataset),
        "epochs": epochs,
        "held_out": None if held_out is None else held_out.fingerprint,
        "temperature": float(temperature),
        "k": k,
        "positions": positions,
        "hidden": teacher.model.config.hidden_size if hidden else 0,
        "vocabulary": projection.out_features,
    }
    datasets = [*map(dataset.at_epoch, range(epochs)), *([] if held_out is None else [held_out])]
    path = Path(directory).resolve()
    with durable.lock(path):
        if manifest.fault(path, contents=False) is None:
            refuse_other_key(OP, path, key_of(manifest.settings_of(path)), key)
            return path
        if path.exists():
            _check.refuse(OP, "directory", "a new one, or a complete cache", path)
        with durable.building(path, resume=True) as partial:
            _begin(partial, key)
            parts = _plan(partial, key, datasets)
            _check_disk(partial, key, parts)
            try:
                _write_shards(key, teacher, parts, batch_size)
                rows = _write_index(parts)
                manifest.complete(partial, {"key": key, "rows": rows})
            except Exception as error:
                kept = "the next build continues from its whole shards"
                durable.raise_disk_error(error, f"{OP}: could not write {partial}", kept)
                raise
    return path


def cache_report(
    cache: CachedTeacher, student: Any, teacher: PreTrainedModel, batches: Iterable[Batch]
) -> dict[str, float]:
    """Measure the size of a cache and the error that it makes.

    Args:
        cache: the cache to measure.
        student: to be taught, for a masked LM.
        teacher: the model that the cache was made of.
        batches: a sample of what the cache holds.

    Returns:
        "bytes_per_token" on the disk, over the tokens that it has a row for; "tail_mass", the mean probability of all
        but the k most likely tokens; "kl", from the cache's soft targets to the teacher's, which half precision alone
        causes; and "loss_change", by how much the student's KL differs from the full one, relative to that.
    """
    batches = list(batches)
    objective = MlmObjective(cache.key["temperature"], mlm=0.0, cos=0.0, kd_positions=cache.key["positions"])
    masses = []
    for batch in batches:
        places = torch.from_numpy(counted_places(batch, cache.key["positions"])).flatten().nonzero().flatten()
        masses.append(cache.answer(batch).soft_targets(places).log_tail.exp())
    size = sum(file.stat().st_size for file in cache.directory.iterdir())
    return {
        "bytes_per_token": size / cache.rows,
        "tail_mass": float(torch.cat(masses).mean()),
        **teacher_effect(objective, student, cache, ModelTeacher(teacher, "model"), batches),
    }


def _begin(partial: Path, key: dict[str, Any]) -> None:
    """Begin with an empty directory, or continue an unfinished one with the same key."""
    begun = partial / _KEY_FILE
    if begun.exists():
        refuse_other_key(f"{OP} (delete it to start again)", partial, read_json(begun, mapping(anything)), key)
        for file in (*partial.glob(".*.partial"), *partial.glob("*.new")):  # files that were being written
            file.unlink()
    else:
        shutil.rmtree(partial)
        manifest.begin(partial)
        durable.write_file(begun, json.dumps(key).encode())


class _Part(NamedTuple):
    """What a shard will hold."""

    file: Path
    dataset: MaskedDataset
    examples: range
    rows: int  # at most


def _plan(partial: Path, key: dict[str, Any], datasets: Sequence[MaskedDataset]) -> list[_Part]:
    parts: list[_Part] = []
    for dataset in datasets:
        share = dataset.masking.probability if key["positions"] == "masked" else 1.0
        rows = np.ceil(share * np.array(dataset.lengths)).astype(np.int64)
        for first in range(0, len(dataset), _EXAMPLES):
            examples = range(first, min(first + _EXAMPLES, len(dataset)))
            file = partial / SHARD.format(len(parts))
            parts.append(_Part(file, dataset, examples, int(rows[examples.start : examples.stop].sum())))
    return parts


def _check_disk(partial: Path, key: dict[str, Any], parts: Sequence[_Part]) -> None:
    left = [part.rows for part in parts if not part.file.exists()]
    needed, free = sum(left) * _row_bytes(key), shutil.disk_usage(partial).free
    logger.info("%s: %s: %.3f GB in %d of %d shards to be made", OP, partial, needed / 1e9, len(left), len(parts))
    if needed > free:
        raise OSError(
            errno.ENOSPC, f"{OP}: {partial} needs {needed / 1e9:.3f} GB on a disk that has {free / 1e9:.3f} GB left"
        )


def _write_shards(key: dict[str, Any], teacher: ModelTeacher, parts: Sequence[_Part], batch_size: int) -> None:
    with tqdm(total=sum(len(part.examples) for part in parts), desc="Teacher", unit="example", disable=None) as bar:
        for part in parts:
            if not part.file.exists():
                made = _shard(key, teacher, part, batch_size)
                with durable.replacing(part.file) as new:
                    save_file(made, str(new), {durable.XXH3_KEY: durable.UNSEALED})
                    durable.seal(new)
            bar.update(len(part.examples))


def _shard(key: dict[str, Any], teacher: ModelTeacher, part: _Part, batch_size: int) -> dict[str, torch.Tensor]:
    rows = sorted(part.dataset.__getitems__(part.examples), key=lambda row: row["length"])
    pad_id = teacher.model.config.pad_token_id or 0
    kept: dict[str, list[torch.Tensor]] = {}
    for first in range(0, len(rows), batch_size):
        batch = pad_rows(rows[first : first + batch_size], pad_id)
        counted = torch.from_numpy(counted_places(batch, key["positions"]))  # [B, T]
        answer = teacher.answer({name: x.to(teacher.model.device) for name, x in batch.items()})
        places = counted.flatten().nonzero().flatten().to(teacher.model.device)
        ids, log_p, log_tail = top_k(answer.soft_targets(places), key["k"], key["temperature"])
        fields = {
            "key": torch.from_numpy(example_keys(batch, key["positions"]).view(np.uint8).reshape(-1, 16).copy()),
            "rows": counted.sum(dim=1),
            "ids": ids.to(torch.uint16 if key["vocabulary"] <= 2**16 else torch.int32),
            "log_p": log_p.clamp(min=torch.finfo(torch.float16).min).half(),
            "log_tail": log_tail.float(),
        }
        if key["hidden"]:
            fields["hidden"] = answer.hidden(places).half()
        for name, x in fields.items():
            kept.setdefault(name, []).append(x.cpu())
    return {name: torch.cat(pieces) for name, pieces in kept.items()}


@torch.no_grad()
def top_k(targets: Projection, k: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids int64 [R, k], their log-probabilities [R, k] and the log of all others' mass [R]; -inf for k = V."""
    pieces = []
    for h in targets.h.split(max(1, 2**24 // len(targets.W))):  # 64 MB of logits at a time
        logits = full(torch.nn.functional.linear(h, targets.W, targets.b))
        log_p = torch.log_softmax(logits / temperature, dim=1)  # [R, V]
        top, ids = log_p.topk(k, dim=1)
        pieces.append((ids, top, log_p.scatter_(1, ids, -torch.inf).logsumexp(dim=1)))
    ids, top, tail = (torch.cat(part) for part in zip(*pieces, strict=True))
    return ids, top, tail


def _write_index(parts: Sequence[_Part]) -> int:
    """Write where each example is, by its key (the first place, if it comes twice). Return the number of all rows."""
    columns: list[tuple[np.ndarray, ...]] = []
    total = 0
    for number, part in enumerate(parts):
        keys, rows = _read_shard(part.file)
        total += int(rows.sum())
        columns.append((keys, np.full(len(keys), number, np.int32), np.cumsum(rows) - rows))
    keys, shards, begins = (np.concatenate(column) for column in zip(*columns, strict=True))
    _, first = np.unique(keys.view("S16")[:, 0], return_index=True)
    index = {"key": keys[first], "shard": shards[first], "begin": begins[first]}
    save_file({name: torch.from_numpy(column) for name, column in index.items()}, str(parts[0].file.with_name(INDEX)))
    return total


def _read_shard(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Keys and rows of a shard's examples. A killed build may have left the shard, so its checksum is compared.

    Raises:
        FileError: it is damaged.
    """
    durable.regular_size(file)
    try:
        with safe_open(str(file), framework="pt") as shard:
            durable.check_seal(file, (shard.metadata() or {}).get(durable.XXH3_KEY))
            return shard.get_tensor("key").numpy(), shard.get_tensor("rows").numpy()
    except (durable.FileError, SafetensorError) as error:
        reason = error.reason if isinstance(error, durable.FileError) else error
        durable.refuse_file(file, f"{reason}; delete it to have it made again")


def _row_bytes(key: dict[str, Any]) -> int:
    return key["k"] * (4 if key["vocabulary"] <= 2**16 else 6) + 4 + 2 * key["hidden"]
