"""Our step, with the same losses, weights, clip and optimizer: the objective that DistillationTrainer trains for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.step.original import ADAMW, ALPHA_CE, ALPHA_COS, ALPHA_MLM, CLIP, TEMPERATURE
from distilbert_fast.distillation.masked_lm import MlmObjective
from distilbert_fast.distillation.teacher import ModelTeacher


class Ours:
    """Args: student: of our classes. teacher: a ForMaskedLM model. precision: of its encoder. autocast: or None."""

    def __init__(self, student: Any, teacher: Any, precision: str, autocast: torch.dtype | None) -> None:
        self.student, self.autocast = student.train(), autocast
        self.teacher = ModelTeacher(teacher, precision)
        self.teacher.prepare(next(student.parameters()).device)
        self.objective = MlmObjective(TEMPERATURE, ALPHA_CE, ALPHA_MLM, ALPHA_COS, kd_positions="masked")
        self.optimizer = torch.optim.AdamW(student.parameters(), **ADAMW, fused=True)
        self.part: Callable[[str], None] = lambda name: None
        student.base_model.register_forward_hook(lambda *_: self.part("student forward"))

    def step(self, batch: dict[str, torch.Tensor], part: Callable[[str], None]) -> None:
        """``part(name)`` is called when a part has ended."""
        self.part = part
        kind = batch["input_ids"].device.type
        counts = self.objective.counts(batch)
        weights = torch.tensor(self.objective.weights(0.0))
        with torch.autocast(kind, self.autocast, enabled=self.autocast is not None):
            sums, _ = self.objective(self.student, Timed(self.teacher, part), batch, 0.0)
            loss = (sums / counts.clamp(min=1) * weights.to(sums.device)).sum()
            part("losses")
        loss.backward()
        part("backward")
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        part("optimizer")


class Timed:
    """A teacher that says when its encoder has run."""

    def __init__(self, teacher: Any, part: Callable[[str], None]) -> None:
        self.teacher, self.part = teacher, part

    def answer(self, batch: Any, hidden_states: bool = False) -> Any:
        answer = self.teacher.answer(batch, hidden_states)
        answer.hidden(torch.zeros(1, dtype=torch.int64, device=batch["input_ids"].device))
        self.part("teacher")
        return answer
