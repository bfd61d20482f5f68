"""The ways to take a step that are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PARTS = ("teacher", "student forward", "losses", "backward", "optimizer")
SIZES: dict[str, dict[str, Any]] = {
    "base": dict(vocab_size=30522, hidden=768, heads=12, ffn=3072, teacher_layers=12, student_layers=6),
    "tiny": dict(vocab_size=2000, hidden=64, heads=2, ffn=128, teacher_layers=2, student_layers=1),
}


@dataclass(frozen=True)
class Way:
    build: Callable[[dict[str, Any]], Any]
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


def _original(autocast: str | None) -> Callable[[dict[str, Any]], Any]:
    def build(config: dict[str, Any]) -> Any:
        import torch

        from bench.step.original import Original

        return Original(*_models(config, ours=False), autocast and getattr(torch, autocast))

    return build


def _ours(autocast: str | None, teacher: str) -> Callable[[dict[str, Any]], Any]:
    def build(config: dict[str, Any]) -> Any:
        import torch

        from bench.step.ours import Ours

        return Ours(*_models(config, ours=True), teacher, autocast and getattr(torch, autocast))

    return build


WAYS = {
    "original-fp32": Way(_original(None)),
    "original-bf16": Way(_original("bfloat16")),
    "ours-fp32": Way(_ours(None, "fp32"), "original-fp32"),
    "ours-fp32-teacher-bf16": Way(_ours(None, "bf16"), "original-fp32"),
    "ours-fp32-teacher-int8": Way(_ours(None, "int8"), "original-fp32"),
    "ours-bf16": Way(_ours("bfloat16", "bf16"), "original-bf16"),
    "ours-bf16-teacher-int8": Way(_ours("bfloat16", "int8"), "original-bf16"),
}
