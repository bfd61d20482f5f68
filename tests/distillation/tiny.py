"""Models of some thousand weights, and rows to train them on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from distilbert_fast.distillation.student import student_from_teacher
from distilbert_fast.distillation.trainer import DistillationArguments

VOCABULARY, LENGTH, CLASSES = 64, 12, 3


def teacher(head: str = "SequenceClassification", seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(
        **{"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "num_labels": CLASSES, **sizes, **settings}
    )
    model = getattr(transformers, f"BertFor{head}")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def student(of: Any, dropout: float = 0.1) -> Any:
    model, _ = student_from_teacher(of, num_layers=1)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return model


def rows(count: int, head: str = "SequenceClassification", seed: int = 0, pairs: bool = False) -> list[dict[str, list]]:
    """Sentences of 3 to 12 tokens, padded; for tokens, between none and all of them have a label."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, size: int) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    out = []
    for index in range(count):
        (length,) = draw(3, LENGTH + 1, 1)
        pad = [0] * (LENGTH - length)
        row: dict[str, Any] = {
            "input_ids": draw(1, VOCABULARY, length) + pad,
            "attention_mask": [1] * length + pad,
            "token_type_ids": [int(pairs and place >= 2) for place in range(length)] + pad,
        }
        if head == "TokenClassification":
            labelled = 0 if index == 1 else draw(0, length + 1, 1)[0]
            row["labels"] = draw(0, CLASSES, labelled) + [-100] * (LENGTH - labelled)
        else:
            row["labels"] = draw(0, CLASSES, 1)[0]
        out.append(row)
    return out


def masked_rows(count: int, seed: int = 0, masked: float = 0.3) -> list[dict[str, list]]:
    """Sentences in which each token is masked by chance: in some none, so that batches differ in what they count."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for row in rows(count, seed=seed):
        ids, real = torch.tensor(row["input_ids"]), torch.tensor(row["attention_mask"]).bool()
        chance = torch.rand(2, generator=generator) * 2 * masked  # differs by sentence
        hidden = (torch.rand(LENGTH, generator=generator) < chance[0] * (chance[1] > 0.2 * masked)) & real
        labels = ids.masked_fill(~hidden, -100)
        out.append({**row, "input_ids": ids.masked_fill(hidden, 2).tolist(), "labels": labels.tolist()})
    return out


def drop_in(model: Any) -> Any:
    """The same model by this package's class of the same name."""
    import distilbert_fast

    made = getattr(distilbert_fast, type(model).__name__)(model.config)
    made.load_state_dict(model.state_dict())
    for old, new in zip(model.modules(), made.modules(), strict=True):
        if isinstance(new, torch.nn.Dropout):
            new.p = old.p
    return made


def arguments(output_dir: Path, **settings: Any) -> DistillationArguments:
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    return DistillationArguments(output_dir=str(output_dir), **{**quiet, **settings})
