"""What a user may bring to the demo, small: a BERT directory with tokenizer, and sentences in a TSV file."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from distilbert_fast.modeling.loading import load_with_head, single_label

WORDS = {
    "animal": ["cat", "dog", "horse", "sparrow", "salmon", "otter", "goat", "heron", "beetle", "mouse"],
    "tool": ["hammer", "saw", "wrench", "chisel", "drill", "plane", "file", "clamp", "level", "pliers"],
}
FILLER = ["the", "a", "old", "small", "one", "near", "my", "your", "on", "under", "with", "and"]


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """Distinct sentences (text, label) whose label one or two of their words tell."""
    draw = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < count:
        label = draw.choice(sorted(WORDS))
        words = draw.choices(FILLER, k=draw.randint(2, 9)) + draw.choices(WORDS[label], k=draw.randint(1, 2))
        draw.shuffle(words)
        rows[" ".join(words)] = label
    return list(rows.items())


def tsv(path: Path, count: int = 64, seed: int = 0) -> Path:
    lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in sentences(count, seed))]
    path.write_text("\n".join(lines) + "\n")
    return path


def pairs_tsv(path: Path, count: int = 64, seed: int = 0) -> Path:
    """Premises and hypotheses; what the hypothesis names is the label, and the premise names anything."""
    drawn = sentences(2 * count, seed)
    rows = zip(drawn[:count], drawn[count:], strict=True)
    lines = ["premise\thypothesis\tlabel", *(f"{premise}\t{text}\t{label}" for (premise, _), (text, label) in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def conll(path: Path, count: int = 64, seed: int = 0) -> Path:
    """Sentences in which animals and tools are entities and "old" is part of an animal, whatever stands before it."""
    tags = {word: f"B-{kind}" for kind, words in WORDS.items() for word in words} | {"old": "I-animal"}
    lines = ["-DOCSTART- -X- O", ""]
    for text, _ in sentences(count, seed):
        lines += [*(f"{word} X {tags.get(word, 'O')}" for word in text.split()), ""]
    path.write_text("\n".join(lines))
    return path


def bert(path: Path, layers: int = 2, **config: object) -> Path:
    """A random BERT encoder of 2 layers, C=32, that knows the words above."""
    from transformers import BertConfig, BertModel, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLER, *WORDS["animal"], *WORDS["tool"]]
    path.mkdir(parents=True)
    (path / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    torch.manual_seed(0)
    settings = {
        "vocab_size": len(words),
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,  # so that it learns in a few steps
        **config,
    }
    BertModel(BertConfig(**settings)).save_pretrained(path)
    return path


def load_classifier(source, label_names=None, new_head: bool = False):
    """A sequence classifier with its tokenizer; with these classes, or those in its config."""
    classes = {} if label_names is None else single_label(label_names)
    return load_with_head(source, "SequenceClassification", new_head, **classes)[:2]
