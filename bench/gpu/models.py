"""DistilBERT-base (random weights) for inference: throughput, latency of one text, ragged batches.

Wall-clock seconds of a call whose result the device has finished, by turns: what launching costs is a part of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

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
            if where.gpu:
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
    held, missing = {}, dict(missing or {})
    for name, make in makers.items():
        try:
            held[name] = make()
        except Exception as error:  # whatever is wrong with a rival, the others go on
            missing[name] = reason(error)
    oracle = base(where)
    for workload in workloads:
        with records.attempt(f"{workload.name}{title}"), torch.inference_mode():
            batch = batch_of(workload, where.device, oracle.config.vocab_size)
            want = _tokens(oracle, batch)
            contenders: dict[str, dict[str, Any]] = {}
            for name in list(held):
                try:
                    cosine = float(torch.cosine_similarity(_tokens(held[name], batch), want, dim=-1).min())
                    agrees = cosine > (0.9 if "int8" in name else 0.99)
                    unit = "int8" if "int8" in name else "bf16"
                    contenders[name] = {"error": 1 - cosine, "agrees": agrees, "unit": unit}
                except torch.AcceleratorError:
                    raise
                except Exception as error:
                    missing[name] = reason(error)
                    del held[name]
            if where.gpu:
                for name, turns in time_calls({name: held[name] for name in contenders}, [batch], TURNS).items():
                    contenders[name] |= vars(spread([calls[0] for calls in turns]))
            records.add(
                "case",
                op="DistilBERT-base",
                case=f"{workload.name}{title}",
                work={"operations": operations(oracle, batch), "unit": "bf16", "moved_bytes": 0.0},
                rows=workload.batch,
                contenders=contenders,
                missing=missing,
            )


def _tokens(model: Any, batch: Batch) -> torch.Tensor:
    """The last state of real tokens, float32 [N, C]."""
    state = model(**batch).last_hidden_state
    mask = batch.get("attention_mask")
    return (state.flatten(0, 1) if mask is None else state[mask.bool()]).float()
