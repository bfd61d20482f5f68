"""A teacher that answers from the disk: its k most likely tokens and the mass of all others, for every row that counts.

    directory/    shard-00000.safetensors …    index.safetensors    checkpoint_manifest.json

A shard holds the rows of some thousand examples one after another: ids uint16 (int32 if the vocabulary needs it) and
log_p float16, [R, k], their log-probabilities at the cache's temperature; log_tail float32 [R], the log of the others'
mass at that temperature; and hidden float16 [R, C], the last hidden state, if it was to be kept. At another temperature
the tail has another mass, which these numbers do not tell: a cache is made for one. Logarithms, because half precision
is then most exact where the mass is; the k + 1 masses of a row are scaled to the sum of 1 when they are read.

An example is found by the hash of the ids that the teacher saw, so what is found is its answer, whatever the epoch, the
order, the process or the dataset; one that is masked otherwise is not found. The manifest holds the key: what the cache
was made of, and refuses to be used for anything else. ``build_cache`` makes it.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from distilbert_fast.data import IGNORED
from distilbert_fast.data.masking import MaskedDataset
from distilbert_fast.distillation.objectives.mlm import MlmObjective
from distilbert_fast.distillation.objectives.task import need, tokens
from distilbert_fast.distillation.schedule import bounds, is_zero
from distilbert_fast.distillation.teachers.model import Batch
from distilbert_fast.files import schema
from distilbert_fast.files.durable import FileError
from distilbert_fast.ops._check import refuse
from distilbert_fast.ops.linear_topk_kl_div import linear_topk_kl_div
from distilbert_fast.runs import manifest
from distilbert_fast.runs.resume_settings import describe_model

OP = "CachedTeacher"
FORMAT = 1
INDEX = "index.safetensors"
SHARD = "shard-{:05d}.safetensors"
_KEY = schema.record(  # refuse_other_key says which of these differ
    {
        "format": schema.one_of(FORMAT),
        "epochs": schema.integer(1),
        "temperature": schema.number(0),
        "k": schema.integer(1),
        "positions": schema.one_of("real", "masked"),
        "hidden": schema.integer(0),
        "vocabulary": schema.integer(1),
        **dict.fromkeys(("teacher", "precision", "corpus", "masking", "seed", "held_out"), schema.anything),
    }
)
_SETTINGS = schema.record({"key": _KEY, "rows": schema.integer(0)})


class TopK(NamedTuple):
    """Soft targets of R rows: ids int64 [R, k], log_p [R, k] and log_tail [R] float32, at a temperature."""

    ids: Tensor
    log_p: Tensor
    log_tail: Tensor
    temperature: float
    vocabulary: int

    def losses(
        self, h: Tensor, projection: torch.nn.Linear, temperature: float, kd_mask: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See SoftTargets; the KL is that of ``linear_topk_kl_div``."""
        if temperature != self.temperature:
            refuse(OP, "temperature", f"{self.temperature}, that of the cache", temperature)
        if projection.out_features != self.vocabulary:
            refuse(OP, "model", f"one with the {self.vocabulary} tokens of the cache", projection.out_features)
        targets = self.ids, self.log_p, self.log_tail
        of_student = h, projection.weight, projection.bias
        return linear_topk_kl_div(*of_student, *targets, temperature, kd_mask, labels, IGNORED, "sum")

    def squared_error(self, h: Tensor, projection: torch.nn.Linear) -> Tensor:
        raise ValueError(f"{OP}: mse needs all logits, which a cache does not hold")


class CachedTeacher:
    """A ``Teacher`` for ``MlmObjective``, of a directory that ``build_cache`` wrote.

    It answers for the examples that the cache was made of: those of a MaskedDataset in its first epochs (longer runs go
    through them again by its ``cycle``), and of a held-out one if there was one. Batches need not say which they are,
    nor in which epoch.

    Args:
        directory: of the cache.
        dataset: what will be trained on; a MaskedDataset is compared with that of the cache. None: examples are still
            found by their ids or not at all.
        teacher: the model whose answers the cache must hold; None accepts any.

    Raises:
        ValueError: no complete cache, or one of another corpus, masking or teacher, by name. Later: an objective that
            asks for more than the cache holds, or for another temperature; an example that is not in it; a file whose
            checksum, taken when it is first needed, is not that of its manifest.
    """

    columns = ("input_ids", "attention_mask", "labels")
    model = None

    def __init__(self, directory: str | Path, dataset: Any = None, teacher: PreTrainedModel | None = None) -> None:
        self.directory = Path(directory)
        if (reason := manifest.fault(self.directory, contents=False)) is not None:
            refuse(OP, "directory", "a cache that build_cache wrote", f"{directory}: {reason}", FileError)
        settings = manifest.settings_of(self.directory)
        self.key: dict[str, Any] = key_of(settings)
        if self.key.get("format") != FORMAT:
            given = f"{directory} of {self.key.get('format')}"
            refuse(OP, "directory", f"a cache of format {FORMAT}", given, FileError)
        schema.validate(settings, self.directory / manifest.MANIFEST, _SETTINGS, "settings")
        wanted = describe_masked(dataset) if isinstance(dataset, MaskedDataset) else {}
        if teacher is not None:
            wanted["teacher"] = teacher_fingerprint(teacher)
        refuse_other_key(OP, self.directory, self.key, wanted)
        self.rows: int = settings["rows"]
        self._files = manifest.files_of(self.directory)
        self.device = torch.device("cpu")
        self._shards: dict[int, dict[str, np.ndarray]] = {}

    def check(self, objective: Any) -> None:
        """See Teacher."""
        if not isinstance(objective, MlmObjective):
            refuse(OP, "objective", "mlm", type(objective).__name__)
        temperature = self.key["temperature"]
        if bounds(objective.temperature) != (temperature, temperature):
            refuse(OP, "temperature", f"{temperature}, that of the cache", objective.temperature)
        for name in ("mse", "hidden", "relation"):
            if not is_zero(getattr(objective, name)):
                refuse(OP, f"the weight of {name}", "0: a cache does not hold what it needs", getattr(objective, name))
        of_masked = self.key["positions"] == "masked"
        if not is_zero(objective.cos) and (of_masked or not self.key["hidden"]):
            refuse(OP, "the weight of cos", "0 for a cache without the hidden states of all tokens", objective.cos)
        if not is_zero(objective.kl) and of_masked and objective.kd_positions != "masked":
            refuse(OP, "kd_positions", "masked, the rows of the cache", objective.kd_positions)

    def prepare(self, device: torch.device) -> None:
        self.device = device

    def describe(self) -> Any:
        return {"cache": self.key}

    def answer(self, batch: Batch, hidden_states: bool = False) -> CachedAnswer:
        return CachedAnswer(self, batch)

    @cached_property
    def _index(self) -> dict[str, np.ndarray]:
        return self._map(INDEX)

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find keys S16 [B]: their shards [B], and the first row [B] of each in its shard."""
        known = self._index["key"].view("S16")[:, 0]  # [E], sorted
        at = np.searchsorted(known, keys).clip(max=len(known) - 1)
        missing = int((known[at] != keys).sum())
        if missing:
            raise ValueError(
                f"{OP}: {missing} of {len(keys)} examples are not in {self.directory}, which holds epochs 0 to "
                f"{self.key['epochs'] - 1} masked with seed {self.key['seed']}"
                f"{' and a held-out set' if self.key['held_out'] else ''}: their tokens or masks are others"
            )
        return self._index["shard"][at], self._index["begin"][at]

    def shard(self, number: int) -> dict[str, np.ndarray]:
        """The arrays of a shard."""
        if number not in self._shards:
            self._shards[number] = self._map(SHARD.format(number))
        return self._shards[number]

    def _map(self, name: str) -> dict[str, np.ndarray]:
        """The tensors of a file: read through once for its checksum, then mapped."""
        entry = self._files.get(name)
        reason = f"its manifest lacks {name}" if entry is None else manifest.file_fault(self.directory, name, entry)
        if reason is not None:
            refuse(OP, "directory", "a cache as build_cache wrote it", f"{self.directory}: {reason}", FileError)
        with safe_open(str(self.directory / name), framework="pt") as file:
            return {field: file.get_tensor(field).numpy() for field in file.keys()}  # noqa: SIM118


class CachedAnswer:
    def __init__(self, cache: CachedTeacher, batch: Batch) -> None:
        self.cache = cache
        counted = counted_places(batch, cache.key["positions"])  # [B, T]
        self._shard, begin = cache.find(example_keys(batch, cache.key["positions"]))  # [B]
        self._row = np.where(counted, begin[:, None] + counted.cumsum(axis=1) - 1, -1)  # [B, T], in its shard

    def logits(self) -> NoReturn:
        raise ValueError(f"{OP}: a cache holds no output of a task head")

    def attention_inputs(self) -> NoReturn:
        raise ValueError(f"{OP}: a cache holds no inputs of attention")

    def hidden(self, rows: Tensor, layer: int = -1) -> Tensor:
        if layer != -1 or not self.cache.key["hidden"]:
            raise ValueError(f"{OP}: {self.cache.directory} holds no hidden states of layer {layer}")
        (hidden,) = self._read(rows, "hidden")
        return hidden.float()

    def soft_targets(self, rows: Tensor) -> TopK:
        ids, log_p, log_tail = self._read(rows, "ids", "log_p", "log_tail")
        masses = torch.cat([log_p.float(), log_tail[:, None]], dim=1).log_softmax(dim=1)  # [R, k + 1] of sum 1
        return TopK(ids, masses[:, :-1], masses[:, -1], self.cache.key["temperature"], self.cache.key["vocabulary"])

    def _read(self, rows: Tensor, *fields: str) -> list[Tensor]:
        """The fields of places [R] in the flattened [B·T]."""
        places = rows.cpu().numpy()
        row, shard = self._row.flatten()[places], self._shard[places // max(self._row.shape[1], 1)]
        if (row < 0).any():
            raise ValueError(
                f"{OP}: {self.cache.directory} holds {self.cache.key['positions']} tokens, others are asked for"
            )
        out = []
        for name in fields:
            like = self.cache.shard(0)[name]
            wide = np.int64 if like.dtype.kind in "iu" else like.dtype
            out.append(np.empty((len(row), *like.shape[1:]), wide))
        for number in np.unique(shard):
            here = shard == number
            for name, array in zip(fields, out, strict=True):
                array[here] = self.cache.shard(int(number))[name][row[here]]
        return [torch.from_numpy(array).to(self.cache.device) for array in out]


# The key of a cache and the keys of its examples ---------------------------------------------------------------------


def teacher_fingerprint(teacher: PreTrainedModel) -> str:
    """A hash of a teacher's class, settings and weights."""
    described = json.dumps(describe_model(teacher, weights=True), sort_keys=True, default=str)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def describe_masked(dataset: MaskedDataset) -> dict[str, Any]:
    """The settings that decide which ids a teacher sees."""
    masking = dataset.masking
    return {"corpus": dataset.rows_fingerprint, "masking": masking.fingerprint, "seed": masking.seed}


def key_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings in the manifest of a cache; empty if it is no manifest of a cache."""
    key = settings.get("key")
    return key if isinstance(key, dict) else {}


def refuse_other_key(op: str, directory: Path, key: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ValueError if the settings of a cache are not the wanted ones; it names those that differ."""
    others = [f"{name} {key.get(name)}, not {value}" for name, value in wanted.items() if key.get(name) != value]
    if others:
        raise ValueError(f"{op}: {directory} was made of {'; '.join(others)}")


def counted_places(batch: Batch, positions: str) -> np.ndarray:
    """bool [B, T]: the places whose rows a cache holds."""
    real = tokens(batch).cpu()
    return (real & (need(batch, "labels").cpu() != IGNORED) if positions == "masked" else real).numpy()


def example_keys(batch: Batch, positions: str) -> np.ndarray:
    """S16 [B]: hashes of the ids without padding and, where only masked rows are held, of where those are.

    (A token that was drawn and stays does not show in the ids.)
    """
    ids, real = need(batch, "input_ids").cpu().numpy().astype("<i4"), tokens(batch).cpu().numpy()
    counted = counted_places(batch, positions)
    digests = bytearray()
    for of_row, inside, places in zip(ids, real, counted, strict=True):
        digest = hashlib.blake2b(of_row[inside].tobytes(), digest_size=16)
        if positions == "masked":
            digest.update(places[inside].tobytes())
        digests += digest.digest()
    return np.frombuffer(bytes(digests), "S16")
