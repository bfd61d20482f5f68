"""DistilBERT-base (random weights) for inference: throughput, latency of one text, ragged batches.

Wall-clock seconds of a call whose result the device has finished: what launching costs is a part of it. Ours come
first, in turns; others one by one, each made when its turn has come.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from bench.gpu.measure import OURS
from bench.gpu.records import Records, Where
from bench.harness.errors import reason
from bench.harness.turns import spread
from distilbert_fast import optimize
from distilbert_fast.evaluation.speed import time_calls

TURNS = 15
Batch = dict[str, torch.Tensor]


class Workload(NamedTuple):
    name: str
    batch: int
    length: int
    ragged: bool = False  # 16 to `length` tokens


WORKLOADS = (
    Workload("256 x 128", 256, 128),
    Workload("1 x 128", 1, 128),
    Workload("8 x 128", 8, 128),
    Workload("64 x 16 to 128", 64, 128, ragged=True),
    Workload("32 x 512", 32, 512),
)


def batch_of(workload: Workload, device: torch.device, vocabulary: int) -> Batch:
    torch.manual_seed(0)
    ids = torch.randint(1000 % vocabulary, vocabulary, (workload.batch, workload.length))
    if not workload.ragged:
        return {"input_ids": ids.to(device)}
    lengths = torch.randint(min(16, workload.length), workload.length + 1, (workload.batch, 1))
    mask = (torch.arange(workload.length) < lengths).long()
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}


def base(where: Where, attention: str = "sdpa", head: bool = False) -> Any:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification, DistilBertModel

    torch.manual_seed(0)
    tiny = dict(vocab_size=97, dim=24, n_heads=3, n_layers=2, hidden_dim=40)
    config = DistilBertConfig(**where.size({}, tiny), attn_implementation=attention)
    model = (DistilBertForSequenceClassification if head else DistilBertModel)(config)
    return model.to(where.device, torch.bfloat16).eval()


def operations(model: Any, batch: Batch) -> float:
    """Of the products of real tokens."""
    config = model.config
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    lengths = mask.sum(dim=1).double()
    a_token = 2 * (4 * config.dim**2 + 2 * config.dim * config.hidden_dim)
    return config.n_layers * float((lengths * a_token + 4 * lengths**2 * config.dim).sum())


def models(where: Where, records: Records) -> None:
    makers: dict[str, Callable[[], Any]] = {
        "ours, int8": lambda: _ours(where, "int8"),
        "ours, int8, static scales": lambda: _ours(where, "int8", calibrated=True),
        "ours, bf16": lambda: _ours(where, "bf16"),
        "ours, bf16, no graphs": lambda: _ours(where, "bf16", cuda_graphs=0),
        "transformers sdpa, bf16": lambda: base(where),
        "transformers flash, bf16": lambda: base(where, "flash_attention_2"),
    }
    _compete(where, records, makers, _workloads(where), "")


def compiled(where: Where, records: Records) -> None:
    """Fixed shapes, so that each gets CUDA graphs and, by max-autotune, its own tiles; which takes long, so is last."""
    chosen = _workloads(where)[:2]
    for mode in ("reduce-overhead", "max-autotune"):
        for workload in chosen:
            torch.compiler.reset()
            name = f"torch.compile {mode}, bf16"
            makers: dict[str, Callable[[], Any]] = {
                "ours, int8": lambda: _ours(where, "int8"),
                "ours, bf16": lambda: _ours(where, "bf16"),
            }
            if where.gpu and where.rivals == "all":
                makers[name] = lambda mode=mode: torch.compile(base(where), mode=mode)
            missing = {} if where.gpu else {name: "needs a CUDA device"}
            _compete(where, records, makers, [workload], f", beside {mode}", missing)


def _workloads(where: Where) -> list[Workload]:
    if where.gpu:
        return list(WORKLOADS)
    return [Workload("2 x 7", 2, 7), Workload("3 x 1 to 5", 3, 5, ragged=True)]


def _ours(where: Where, precision: str, calibrated: bool = False, **options: Any) -> Any:
    model = base(where)
    calibration = None
    if calibrated:
        workload = _workloads(where)[0]._replace(batch=2)
        calibration = [batch_of(workload, where.device, model.config.vocab_size)]
    return optimize(copy.deepcopy(model), precision, calibration=calibration, **options)


def _compete(
    where: Where,
    records: Records,
    makers: dict[str, Callable[[], Any]],
    workloads: list[Workload],
    title: str,
    missing: dict[str, str] | None = None,
) -> None:
    missing = dict(missing or {})
    ours, rivals = (
        {name: make for name, make in makers.items() if name.startswith(OURS) == mine} for mine in (True, False)
    )
    held: dict[str, Any] = {}
    cases: dict[str, _Workload] = {}

    def take_part(name: str, make: Callable[[], Any]) -> None:
        try:
            held[name] = make()
        except Exception as error:  # whatever is wrong with a rival, the others go on
            missing[name] = reason(error)

    for name, make in ours.items():
        take_part(name, make)
    oracle = base(where)
    for workload in workloads:
        with records.attempt(f"{workload.name}{title}"), torch.inference_mode():
            batch = batch_of(workload, where.device, oracle.config.vocab_size)
            cases[workload.name] = _Workload(where, records, workload, title, batch, oracle, missing)
            cases[workload.name].add(held)
    if where.rivals == "none" or where.compiling:
        return
    for name, make in rivals.items():
        take_part(name, make)
        if name not in held:
            continue
        for workload in workloads:
            with records.attempt(f"{workload.name}{title}, {name}"), torch.inference_mode():
                cases[workload.name].add({name: held[name]})
        del held[name]


class _Workload:
    """One workload's case, which grows by contenders and is recorded each time."""

    def __init__(
        self,
        where: Where,
        records: Records,
        workload: Workload,
        title: str,
        batch: Batch,
        oracle: Any,
        missing: dict[str, str],
    ) -> None:
        self.where, self.records, self.workload, self.title = where, records, workload, title
        self.batch, self.missing = batch, missing
        self.contenders: dict[str, dict[str, Any]] = {}
        self.want = None if where.compiling else _tokens(oracle, batch)
        self.operations = operations(oracle, batch)

    def add(self, models: dict[str, Any]) -> None:
        """Models that take turns."""
        able = {}
        for name, model in models.items():
            try:
                found = _tokens(model, self.batch)
            except torch.AcceleratorError:
                raise
            except Exception as error:
                self.missing[name] = reason(error)
                continue
            able[name] = model
            if self.want is not None:
                cosine = float(torch.cosine_similarity(found, self.want, dim=-1).min())
                unit = "int8" if "int8" in name else "bf16"
                agrees = cosine > (0.9 if unit == "int8" else 0.99)
                self.contenders[name] = {"error": 1 - cosine, "agrees": agrees, "unit": unit}
        if self.where.compiling:
            return
        if self.where.gpu:
            for name, turns in time_calls(able, [self.batch], TURNS).items():
                self.contenders[name] |= vars(spread([calls[0] for calls in turns]))
        self.records.add(
            "case",
            op="DistilBERT-base",
            case=f"{self.workload.name}{self.title}",
            work={"operations": self.operations, "unit": "bf16", "moved_bytes": 0.0},
            rows=self.workload.batch,
            contenders=self.contenders,
            missing=self.missing,
        )


def _tokens(model: Any, batch: Batch) -> torch.Tensor:
    """The last state of real tokens, float32 [N, C]."""
    state = model(**batch).last_hidden_state
    mask = batch.get("attention_mask")
    return (state.flatten(0, 1) if mask is None else state[mask.bool()]).float()
