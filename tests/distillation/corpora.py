"""Small corpora of real text, and a RoBERTa tokenizer trained on them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def documents() -> tuple[tuple[str, ...], ...]:
    """The paragraphs of the repository's own pages, each a document of some lines."""
    text = "\n\n".join((ROOT / name).read_text() for name in ("LICENSE", "docs/design.md", "README.md"))
    lines = [[line.strip() for line in paragraph.split("\n") if line.strip()] for paragraph in text.split("\n\n")]
    return tuple(tuple(document) for document in lines if document)


def write(path: Path, documents: Any) -> Path:
    """A text file: a line a sentence, a blank line after each document but the last."""
    path.write_text("\n\n".join("\n".join(document) for document in documents))
    return path


@functools.cache
def roberta() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of RoBERTa's kind with 600 tokens."""
    import tokenizers

    special = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
    model = tokenizers.ByteLevelBPETokenizer()
    lines = [line for document in documents() for line in document]
    model.train_from_iterator(lines, vocab_size=600, special_tokens=list(special.values()), show_progress=False)
    names = {f"{name}_token": token for name, token in special.items()} | {"cls_token": "<s>", "sep_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=model._tokenizer, **names)
