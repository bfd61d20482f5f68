"""The original distiller's step, as its public description has it, for transformers 5: what ours is measured against.

Both models make logits [B, T, V]; the rows of masked tokens are selected for the KL; three losses; AdamW; a clip at 5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

TEMPERATURE, ALPHA_CE, ALPHA_MLM, ALPHA_COS, CLIP = 2.0, 5.0, 2.0, 1.0, 5.0
ADAMW = dict(lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)


class Original:
    """Args: teacher, student: ForMaskedLM models. autocast: a dtype, or None for none."""

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
            loss = self.loss(of_student, of_teacher, labels, mask)
            part("losses")
        loss.backward()
        part("backward")
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        part("optimizer")

    def loss(self, of_student: Any, of_teacher: Any, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        s_logits, t_logits = of_student.logits, of_teacher.logits  # [B, T, V]
        vocabulary = s_logits.shape[-1]
        masked = (labels > -1).unsqueeze(-1).expand_as(s_logits)
        s = s_logits.masked_select(masked).view(-1, vocabulary)
        t = t_logits.masked_select(masked).view(-1, vocabulary)
        kl = F.kl_div(F.log_softmax(s / TEMPERATURE, -1), F.softmax(t / TEMPERATURE, -1), reduction="batchmean")
        mlm = F.cross_entropy(s_logits.view(-1, vocabulary), labels.view(-1))
        s_hidden, t_hidden = of_student.hidden_states[-1], of_teacher.hidden_states[-1]  # [B, T, C]
        width = s_hidden.shape[-1]
        real = mask.bool().unsqueeze(-1).expand_as(s_hidden)
        s, t = s_hidden.masked_select(real).view(-1, width), t_hidden.masked_select(real).view(-1, width)
        cos = F.cosine_embedding_loss(s, t, torch.ones(len(s), device=s.device))
        return ALPHA_CE * kl * TEMPERATURE**2 + ALPHA_MLM * mlm + ALPHA_COS * cos
