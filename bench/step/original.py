"""The original distiller's step, as its public description has it, for transformers 5: what ours is measured against.

Both models make logits [B, T, V]; the rows that count are selected; three losses; AdamW; a clip at 5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

TEMPERATURE, ALPHA_CE, ALPHA_MLM, ALPHA_COS, CLIP = 2.0, 5.0, 2.0, 1.0, 5.0
ADAMW = dict(lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)


class Original:
    """The KL counts masked tokens only. Args: student, teacher: ForMaskedLM models. autocast: a dtype, or None."""

    def __init__(self, student: Any, teacher: Any, autocast: torch.dtype | None) -> None:
        self.student, self.teacher, self.autocast = student.train(), teacher.eval(), autocast
        self.optimizer = torch.optim.AdamW(student.parameters(), **ADAMW)

    def step(self, batch: dict[str, torch.Tensor], part: Callable[[str], None]) -> None:
        """``part(name)`` is called when a part has ended."""
        labels, mask = batch["labels"], batch["attention_mask"]
        inputs = {"input_ids": batch["input_ids"], "attention_mask": mask, "output_hidden_states": True}
        kind = batch["input_ids"].device.type
        with torch.autocast(kind, self.autocast, enabled=self.autocast is not None):
            with torch.no_grad():
                of_teacher = self.teacher(**inputs)
            part("teacher")
            of_student = self.student(**inputs)
            part("student forward")
            loss = original_loss(of_student, of_teacher, labels, mask, masked_only=True)
            part("losses")
        loss.backward()
        part("backward")
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        part("optimizer")


def original_loss(
    of_student: Any,
    of_teacher: Any,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    masked_only: bool = False,
) -> torch.Tensor:
    """Its three losses of two models' outputs, which hold logits [B, T, V] and hidden states [B, T, C].

    The KL counts the masked tokens (labels > -1), or as the cosine does those of the attention mask [B, T]. What counts
    is selected out of the whole; without a mask everything counts and nothing is selected.
    """
    real = None if attention_mask is None else attention_mask.bool()
    taught = labels > -1 if masked_only else real
    s, t = (_selected(output.logits, taught) for output in (of_student, of_teacher))  # [R, V]
    kl = F.kl_div(F.log_softmax(s / TEMPERATURE, -1), F.softmax(t / TEMPERATURE, -1), reduction="batchmean")
    mlm = F.cross_entropy(of_student.logits.flatten(0, 1), labels.flatten())
    s, t = (_selected(output.hidden_states[-1], real) for output in (of_student, of_teacher))  # [R, C]
    cos = F.cosine_embedding_loss(s, t, torch.ones(len(s), device=s.device))
    return ALPHA_CE * kl * TEMPERATURE**2 + ALPHA_MLM * mlm + ALPHA_COS * cos


def _selected(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The rows of x [B, T, D] that a mask [B, T] counts: [R, D]."""
    if mask is None:
        return x.flatten(0, 1)
    return x.masked_select(mask.unsqueeze(-1).expand_as(x)).view(-1, x.shape[-1])
