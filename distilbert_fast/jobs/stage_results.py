"""Schemas of the results that stages leave on the disk, for the reports of `demo`, `distill` and `compress`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distilbert_fast.files.schema import Check, anything, array, boolean, integer, mapping, nullable, real, record, text
from distilbert_fast.jobs import planning

_COUNT = integer(0)
_MEASURED = record({"median": real, "low": real, "high": real}, others=True)
_MACHINE = {
    "date": text(),
    "machine": record({"cpu": text(), "cores": anything, "system": text()}, others=True),
    "environment": record(
        {"python": text(), "versions": mapping(nullable(text())), "cpu": record({"tier": anything}, others=True)},
        others=True,
    ),
}


def _inputs(rows: str) -> Check:
    counts = {f"latency_{rows}": _COUNT, f"throughput_{rows}": _COUNT, "threads": _COUNT}
    return record({**counts, "mean_tokens": real, "device": text()}, others=True)


# demo -----------------------------------------------------------------------------------------------------------------

DEMO_STAGE = record(
    {
        "seconds": real,
        "read_back": record({"sentences": _COUNT, "same_class": _COUNT, "largest_difference": real}, others=True),
    },
    {"resumed": boolean, "steps": _COUNT, "layers": array(_COUNT)},
    others=True,
)


def demo_measured(models: Sequence[str]) -> Check:
    """What `demo` measured of the models of these names."""
    shares = ("accuracy", "macro_f1", "agreement", "kl_from_teacher", "optimized_agreement")
    timed = record(dict.fromkeys(("transformers", "distilbert_fast"), _MEASURED), others=True)
    row = record(
        {
            **{"architecture": text(), "layers": _COUNT, "parameters": _COUNT, "file_bytes": _COUNT},
            **dict.fromkeys(shares, real),
            **dict.fromkeys(("latency_ms", "throughput"), timed),
        },
        others=True,
    )
    return record(
        {**_MACHINE, "inputs": _inputs("sentences"), "models": record(dict.fromkeys(models, row))}, others=True
    )


# distill --------------------------------------------------------------------------------------------------------------

_MODEL = record(
    {
        **{"title": text(), "seconds": real, "losses": array(mapping(real)), "architecture": text()},
        **dict.fromkeys(("layers", "parameters", "file_bytes"), _COUNT),
        **dict.fromkeys(("quality", "int8"), mapping(real)),
    },
    {"start": text(), "made_of": text()},
    others=True,
)
_TRAINED = record(
    {"steps": _COUNT, "resumed": boolean, "objective": mapping(anything)},
    {"teacher_effect": mapping(real), "cache": mapping(real)},
    others=True,
)
_STEP, _EFFECT = record({"step": real}, others=True), record({"loss_change": real}, others=True)
_CACHE = record({"bytes_per_token": real, "tail_mass": real, "loss_change": real}, others=True)
_SPEED = record(
    {
        **_MACHINE,
        "inputs": _inputs("rows"),
        "speed": record({"latency_ms": mapping(_MEASURED), "throughput": mapping(_MEASURED)}),
    },
    others=True,
)


def distilled(value: Any, where: str) -> None:
    """Teacher or student of `distill`: how it was trained, and how good it is."""
    _MODEL(value, where)
    if value["losses"]:
        _TRAINED(value, where)
    array(_STEP)(value["losses"], f"{where}.losses")
    for name, check in (("teacher_effect", _EFFECT), ("cache", _CACHE)):
        if value.get(name):
            check(value[name], f"{where}.{name}")


def speed(value: Any, where: str) -> None:
    """What `distill` measured: the same models by both clocks."""
    _SPEED(value, where)
    record(dict.fromkeys(value["speed"]["latency_ms"], anything))(value["speed"]["throughput"], "speed.throughput")


# compress -------------------------------------------------------------------------------------------------------------

_COSTS = record({"heads": array(real), "widths": array(real), "base": real, "layer": real, "layers": _COUNT})
compressed = record(
    {
        **{"architecture": text(), "source": text(), "quality": mapping(real)},
        **dict.fromkeys(("layers", "parameters", "file_bytes"), _COUNT),
    },
    {"seconds": real, "pruning": mapping(anything), "losses": array(mapping(real))},
    others=True,
)
copied = record({"of": text()})


def plan(value: Any, where: str) -> None:
    """What `compress` measured of the teacher and some students."""
    record({"costs": _COSTS}, others=True)(value, where)
    speed(value, where)
    students = map(planning.student, planning.depths(value["costs"]["layers"], None))
    timed = dict.fromkeys(("transformers", "engine", "int8", *students), anything)
    record(timed, others=True)(value["speed"]["latency_ms"], f"{where}.speed.latency_ms")
