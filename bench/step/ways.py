"""The ways to take a step that are compared."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PARTS = ("teacher", "student forward", "losses", "backward", "optimizer")
SIZES: dict[str, dict[str, Any]] = {
    "base": dict(vocab_size=30522, hidden=768, heads=12, ffn=3072, teacher_layers=12, student_layers=6),
    "tiny": dict(vocab_size=2000, hidden=64, heads=2, ffn=128, teacher_layers=2, student_layers=1),
}


Build = Callable[[dict[str, Any], dict[str, Any]], Any]  # of one of SIZES, and the batch that every step is given


@dataclass(frozen=True)
class Way:
    build: Build
    rival: str | None = None  # what it is measured against


def _models(config: dict[str, Any], ours: bool) -> tuple[Any, Any]:
    """A student and a teacher with random weights, the same for every way."""
    import transformers

    import distilbert_fast

    teacher = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden"],
            num_attention_heads=config["heads"],
            intermediate_size=config["ffn"],
            num_hidden_layers=config["teacher_layers"],
        )
    )
    settings = transformers.DistilBertConfig(
        vocab_size=config["vocab_size"],
        dim=config["hidden"],
        n_heads=config["heads"],
        hidden_dim=config["ffn"],
        n_layers=config["student_layers"],
    )
    kind = distilbert_fast.DistilBertForMaskedLM if ours else transformers.DistilBertForMaskedLM
    return kind(settings), teacher


def _original(autocast: str | None) -> Build:
    def build(config: dict[str, Any], batch: dict[str, Any]) -> Any:
        import torch

        from bench.step.original import Original

        return Original(*_models(config, ours=False), autocast and getattr(torch, autocast))

    return build


def _ours(autocast: str | None, teacher_precision: str) -> Build:
    def build(config: dict[str, Any], batch: dict[str, Any]) -> Any:
        import torch

        from bench.step.ours import Ours
        from distilbert_fast.distillation.teachers.model import ModelTeacher

        student, teacher = _models(config, ours=True)
        return Ours(student, ModelTeacher(teacher, teacher_precision), autocast and getattr(torch, autocast))

    return build


def _ours_cached(autocast: str | None) -> Build:
    def build(config: dict[str, Any], batch: dict[str, Any]) -> Any:
        import torch

        from bench.step.ours import Ours

        student, teacher = _models(config, ours=True)
        return Ours(student, _cached(teacher, batch), autocast and getattr(torch, autocast))

    return build


def _cached(teacher: Any, batch: dict[str, Any]) -> Any:
    """A CachedTeacher of the batch: of each row 64 tokens, and the hidden state, which the cosine wants."""
    import datasets

    from bench.step.original import TEMPERATURE
    from distilbert_fast.data.masking import MaskedDataset, Masking
    from distilbert_fast.distillation.teachers.build_cache import build_cache
    from distilbert_fast.distillation.teachers.cache import CachedTeacher

    ids = batch["input_ids"]
    rows = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "length": [ids.shape[1]] * len(ids)})
    already = Masking(_Vocabulary(teacher.config.vocab_size), None, mask=0, keep=1, random=0)  # tokens drawn stay
    with tempfile.TemporaryDirectory(prefix="bench-step-") as folder:
        directory = build_cache(
            teacher, MaskedDataset(rows, already), f"{folder}/cache", k=64, temperature=TEMPERATURE, hidden=True
        )
        cached = CachedTeacher(directory)
        cached.answer(batch).hidden(batch["labels"].new_zeros(1))  # its files, mapped now, outlive their names
    return cached


class _Vocabulary:
    """What Masking asks of a tokenizer."""

    mask_token_id, all_special_ids = 103, (103,)

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


WAYS = {
    "original-fp32": Way(_original(None)),
    "original-bf16": Way(_original("bfloat16")),
    "ours-fp32": Way(_ours(None, "fp32"), "original-fp32"),
    "ours-fp32-teacher-bf16": Way(_ours(None, "bf16"), "original-fp32"),
    "ours-fp32-teacher-int8": Way(_ours(None, "int8"), "original-fp32"),
    "ours-fp32-teacher-cached": Way(_ours_cached(None), "original-fp32"),
    "ours-bf16": Way(_ours("bfloat16", "bf16"), "original-bf16"),
    "ours-bf16-teacher-int8": Way(_ours("bfloat16", "int8"), "original-bf16"),
    "ours-bf16-teacher-cached": Way(_ours_cached("bfloat16"), "original-bf16"),
}
