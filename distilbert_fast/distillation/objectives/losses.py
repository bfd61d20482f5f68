"""The losses of distillation."""

from __future__ import annotations

from typing import NamedTuple

import torch

from distilbert_fast.data import IGNORED
from distilbert_fast.ops._check import refuse
from distilbert_fast.ops.kl_div import kl_div


class TaskLoss(NamedTuple):
    """Scalars; ``kl`` holds its τ² and is None where there was no teacher."""

    loss: torch.Tensor
    kl: torch.Tensor | None
    ce: torch.Tensor


def task_loss(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor,
    temperature: float = 2.0,
    alpha: float = 0.5,
    num_items: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> TaskLoss:
    """α · τ² KL(teacher ‖ student) + (1 − α) · CE(student, labels), over the rows that have a label.

        kl = 1/n Σ τ² KL(softmax(t/τ) ‖ softmax(s/τ))        ce = 1/n Σ −log softmax(s)[label]

    Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, arXiv:1503.02531.

    Args:
        student: logits [..., K]; the gradient is for these.
        teacher: logits [..., K], or None with alpha 0.
        labels: int64 [...], in 0 … K−1; -100 keeps a row out of both sums.
        temperature: τ > 0, for the KL alone.
        alpha: weight of the KL, 0 … 1.
        num_items: n. By default the labelled rows here. A batch that is worked through in parts, by
            accumulation or in several processes, gives each part the count of the whole, and the parts'
            losses and gradients add up to the whole's, however unevenly the labels lie.
        label_smoothing: of the cross-entropy.

    Raises:
        ValueError: shapes that do not fit, no teacher for alpha above 0, a label out of range (looked for on the
            CPU only: on a GPU it would make the host wait).
        TypeError: labels are not int64.
    """
    classes = student.shape[-1]
    if labels.shape != student.shape[:-1]:
        raise ValueError(
            f"task_loss: labels must be of shape {list(student.shape[:-1])}, one for each row of logits, "
            f"got {list(labels.shape)}"
        )
    if labels.dtype != torch.int64:
        refuse("task_loss", "labels", "int64", str(labels.dtype)[6:], TypeError)
    if labels.device.type == "cpu":
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
        if len(wrong):
            refuse("task_loss", "labels", f"0 to {classes - 1}, or {IGNORED} for none", int(wrong[0]))
    if teacher is None and alpha > 0:
        refuse("task_loss", "teacher", "given for alpha above 0", f"None for alpha {alpha}")
    if teacher is not None and teacher.shape != student.shape:
        refuse("task_loss", "teacher", f"of the student's shape {list(student.shape)}", list(teacher.shape))
    rows, labels = student.reshape(-1, classes), labels.reshape(-1)  # [N, K], [N]
    counted = labels != IGNORED
    # at least 1: without a label the loss is 0, not 0/0
    n = (counted.sum() if num_items is None else torch.as_tensor(num_items, device=rows.device)).clamp(min=1)
    quiet = torch.where(counted[:, None], rows.float(), 0.0)  # a NaN in a row without label has no gradient
    ce = torch.nn.functional.cross_entropy(
        quiet, labels, ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing
    )
    ce = ce / n
    if teacher is None:
        return TaskLoss(ce, None, ce)
    kl = kl_div(rows, teacher.reshape(-1, classes), temperature, mask=counted, reduction="sum") / n
    return TaskLoss(alpha * kl + (1 - alpha) * ce, kl, ce)
