"""How a teacher's answers change if an engine or a cache gives them instead of its own forward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from distilbert_fast.distillation.objectives.task import Objective
from distilbert_fast.distillation.teachers.model import Batch, ModelTeacher, Teacher, own_precision

_OF_LABELS = {"ce", "mlm", "label_mse"}


@torch.no_grad()
def teacher_effect(
    objective: Objective,
    student: Any,
    teacher: Teacher,
    reference: ModelTeacher,
    batches: Iterable[Batch],
    progress: float = 0.0,
) -> dict[str, float]:
    """Compare a teacher with the model that it replaces, by the losses of an objective.

    Args:
        objective: of the training; one without a loss that asks the teacher has nothing to compare.
        student: the student that both teach; it is not changed.
        teacher: the teacher to examine.
        reference: the model's own forward: ``ModelTeacher(model, "model")``.
        batches: to take the means over.
        progress: share of the run, 0 … 1, for settings that follow a schedule.

    Returns:
        The objective's first loss that asks the teacher, by its name (kl, with its τ²; teacher_mse; cos), of the
        reference as a student of this teacher: how far the two are apart, 0 if they agree. And "loss_change": by how
        much the student's weighted loss differs from that with the reference, relative to the latter.
    """
    soft = next((place for place, name in enumerate(objective.names) if name not in _OF_LABELS), None)
    if soft is None:
        return {}
    weights = objective.weights(progress)
    counted = torch.zeros(len(objective.names), dtype=torch.int64)
    sums = torch.zeros(3, len(objective.names), dtype=torch.float64)
    modes = [(module, module.training) for module in student.modules()]
    student.eval()
    try:
        for batch in batches:
            counted += objective.counts(batch).cpu()
            pairs = (reference.model, teacher), (student, teacher), (student, reference)
            for place, (of, by) in enumerate(pairs):
                with own_precision(of):
                    sums[place] += objective(of, by, batch, progress).sums.double().cpu()
    finally:
        for module, training in modes:
            module.training = training
    apart, *taught = sums / counted.clamp(min=1)
    loss, of_reference = (float(means @ means.new_tensor(weights)) for means in taught)
    return {
        objective.names[soft]: float(apart[soft]),
        "loss_change": loss / of_reference - 1 if of_reference else 0.0,
    }
