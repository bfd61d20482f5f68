"""Read a model with a task head from a checkpoint, and say plainly why a checkpoint cannot be used.

Only safetensors files are read: a pickle can run any code when it is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from distilbert_fast.files import schema
from distilbert_fast.files.durable import FileError, regular_size
from distilbert_fast.modeling import register
from distilbert_fast.modeling.architectures import ARCHITECTURES
from distilbert_fast.modeling.compression_config import METHOD, check_settings, check_structure

FAMILIES = {model_type: known.name for model_type, known in ARCHITECTURES.items()}  # the names that messages use
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json")
_READ = (".json", ".txt", ".safetensors", ".model", ".jinja")  # suffixes of what transformers opens unasked
# Sizes that a config gives, by their names in BERT's and in DistilBERT's: far above any model, and no loop is endless.
_NAMES = (
    ("num_hidden_layers", "n_layers"),
    ("num_attention_heads", "n_heads"),
    ("hidden_size", "dim"),
    ("intermediate_size", "hidden_dim"),
)
_SIZES: dict[str, schema.Check] = {
    **dict.fromkeys(_NAMES[0], schema.integer(0, 2**12)),
    **dict.fromkeys(_NAMES[1], schema.integer(1, 2**12)),
    **dict.fromkeys((*_NAMES[2], "embedding_size"), schema.integer(1, 2**18)),
    **dict.fromkeys(_NAMES[3], schema.integer(1, 2**20)),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "type_vocab_size"), schema.integer(0, 2**26)),
    "layer_norm_eps": schema.number(2.0**-126),  # float32's smallest: above 0
    "num_labels": schema.nullable(schema.integer(0, 2**20)),
    "id2label": schema.nullable(schema.mapping(schema.anything, schema.text("[0-9]{1,9}", "the number of a class"))),
    "label2id": schema.nullable(schema.mapping(schema.anything)),
}
_CONFIG = schema.record({}, _SIZES, others=True)
_FEW = 2**28  # weights, which a file that is too short may lack: that is said when it is read
_SHARDS = schema.record({"weight_map": schema.mapping(schema.text(r"[^/\0]+", "the name of a file"))}, others=True)


class CheckpointError(FileError):
    """A checkpoint that cannot be used; the message names it, what was expected and what was found."""

    @classmethod
    def of(cls, place: str | Path, problem: str) -> CheckpointError:
        return cls(f"checkpoint: {str(place)!r}{problem}")


def locate(source: str | Path) -> Path:
    """The local directory of a checkpoint: a directory as it is, a hub id downloaded.

    Raises CheckpointError when it is neither, or holds no model of `FAMILIES` in whole safetensors files.
    """
    directory = Path(source)
    if not directory.is_dir():
        directory = _download(str(source))
    config = directory / "config.json"
    with _as_checkpoint_error():
        for file in directory.iterdir():  # a FIFO, a device or a socket is one that transformers would wait for
            if file.suffix in _READ and os.path.exists(file) and not os.path.isdir(file):
                regular_size(file)
    if not config.is_file():
        raise CheckpointError.of(source, " holds no config.json")
    try:
        settings = schema.read_json(config)
        model_type = settings.get("model_type")
    except (FileError, AttributeError) as error:
        reason = error.reason if isinstance(error, FileError) else error
        raise CheckpointError.of(config, f" is not a model's config: {reason}") from error
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError.of(source, f": expected a BERT, RoBERTa, DistilBERT model, got model_type {model_type!r}")
    weights = _weight_files(directory, source)
    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError.of(file, f" is truncated or no safetensors file: {error}") from error
    with _as_checkpoint_error():
        check_sizes(settings, config, sum(map(regular_size, weights)))
    return directory


def check_sizes(config: Mapping[str, Any], path: Path, weight_bytes: int | None) -> None:
    """Refuse sizes that no model has, or that need far more weights than the files hold, before memory is allocated.

    Args:
        config: of a BERT, RoBERTa or DistilBERT; what its ``quantization_config`` says of a pruned one counts.
        path: where it was read, for messages.
        weight_bytes: size of its weights, at least one byte each; None: not known yet.

    Raises:
        FileError: one of the sizes, by name.
    """
    schema.validate(config, path, _CONFIG)
    layers, heads, hidden, inner = (config.get(bert, config.get(distilbert, 0)) for bert, distilbert in _NAMES)
    if heads and hidden % heads:
        raise FileError(f"{str(path)!r}: hidden_size must be a multiple of {heads} heads, got {hidden}")
    rows = sum(config.get(name, 0) for name in ("vocab_size", "max_position_embeddings", "type_vocab_size"))
    left = _structure(config, path, layers, heads, inner)
    share = hidden // heads if heads else 0  # of a head
    columns = layers * (2 * hidden + inner) if left is None else sum(2 * share * len(h) + f for h, f in left)
    weights = rows * hidden + 2 * hidden * columns
    if weight_bytes is not None and weights > max(2 * weight_bytes, _FEW):
        raise FileError(
            f"{str(path)!r}: its sizes must be those of the {weight_bytes} bytes of weights beside it, got sizes of "
            f"{weights} weights"
        )


def _structure(
    config: Mapping[str, Any], path: Path, depth: int, heads: int, ffn: int
) -> list[tuple[list[int], int]] | None:
    """Heads and width of each layer of a pruned model; None for another. Raises FileError."""
    settings = config.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != METHOD:
        return None
    check_settings(settings, path)
    if (structure := settings.get("structure")) is None:
        return None
    check_structure(structure, depth, heads, ffn, path)
    return [(layer["heads"], layer["ffn"]) for layer in structure]


@contextlib.contextmanager
def _as_checkpoint_error() -> Iterator[None]:
    try:
        yield
    except FileError as error:
        raise CheckpointError(f"checkpoint: {error}", error.reason) from error


def checkpoint_digest(directory: Path) -> str:
    """SHA-256 of a checkpoint's config, vocabulary and weights, by content and not by place."""
    digest = hashlib.sha256()
    for file in sorted([*directory.glob("*.json"), *directory.glob("*.txt"), *directory.glob("*.safetensors")]):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def classes_of_head(names: Sequence[str]) -> dict[str, Any]:
    """The config of a head for classes of these names."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "ignore_mismatched_sizes": True,  # a head for other classes counts as missing, in load_with_head
    }


def single_label(names: Sequence[str]) -> dict[str, Any]:
    """That of a classifier whose rows are of one class each."""
    return {**classes_of_head(names), "problem_type": "single_label_classification"}


def multi_label(names: Sequence[str]) -> dict[str, Any]:
    """That of a classifier whose rows may have any number of labels."""
    return {**classes_of_head(names), "problem_type": "multi_label_classification"}


def load_with_head(
    source: str | Path, head: str, new_head: bool = False, **config: Any
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase, tuple[str, ...]]:
    """A model with a head and its tokenizer, in float32 and eval mode, on the GPU where there is one; and the tensors
    of the head that started at random.

    Args:
        source: directory or hub id.
        head: "SequenceClassification", "TokenClassification", "MaskedLM", "QuestionAnswering" or "MultipleChoice"; ""
            for the encoder alone.
        new_head: whether tensors of the head that are missing, or for another number of classes, may start at random.
        **config: for `from_pretrained`.

    Raises CheckpointError when the checkpoint cannot be used, lacks tensors or has no usable tokenizer.
    """
    register()  # so that an int8 checkpoint is understood
    directory = locate(source)
    with _without_report(), without_bars(), _reading(source, f"a model for {head}" if head else "an encoder"):
        model, loaded = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel").from_pretrained(
            directory, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **config
        )
    absent = sorted([*loaded["missing_keys"], *(entry[0] for entry in loaded["mismatched_keys"])])
    parts = ARCHITECTURES[model.config.model_type].heads[f"For{head}" if head else "Model"].values()
    random = tuple(name for name in absent if new_head and name.startswith(tuple(f"{part}." for part in parts)))
    absent = [name for name in absent if name not in random]
    if absent:
        names = f"{', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}"
        needed = f"{len(absent)} tensors that {type(model).__name__} needs"
        raise CheckpointError.of(source, f" lacks {needed}, or has them in other shapes: {names}")
    if not any((directory / name).is_file() for name in _VOCABULARIES):  # transformers would make up an empty one
        raise CheckpointError.of(source, f" holds no tokenizer: expected one of {', '.join(_VOCABULARIES)}")
    with _reading(source, "a tokenizer"):
        tokenizer = load_tokenizer(directory, head)
    if not 0 < len(tokenizer) <= model.config.vocab_size:
        expected = f"a tokenizer of 1 to {model.config.vocab_size} tokens, as many as the model has embeddings"
        raise CheckpointError.of(source, f": expected {expected}, got {len(tokenizer)}")
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, random


def load_tokenizer(directory: Path, head: str) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer for a head. For "TokenClassification" it reads words as if a space stood before each, as in a text;
    RoBERTa's tokenizer needs a flag for that."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    if head == "TokenClassification" and _leaves_out_spaces(tokenizer):
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, add_prefix_space=True)
    return tokenizer


def _leaves_out_spaces(tokenizer: Any) -> bool:
    """Whether words tell apart whether a space is before them, and a text's first one is read as if it had none."""
    splitter = getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", None)
    state = {} if splitter is None else json.loads(splitter.__getstate__())
    parts = [state, *state.get("pretokenizers", ())]
    return any(part.get("add_prefix_space") is False or part.get("prepend_scheme") == "never" for part in parts)


def _download(name: str) -> Path:
    try:
        patterns = ["*.json", "*.txt", "*.safetensors"]
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except HFValidationError:
        raise CheckpointError(f"checkpoint: no such directory: {name!r}") from None
    except OSError as error:  # the hub's own errors are OSErrors too
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        problem = f" is no directory, and the Hugging Face hub did not give it: {reason}"
        raise CheckpointError.of(name, problem) from error


@contextlib.contextmanager
def _reading(source: str | Path, what: str) -> Iterator[None]:
    """Turn whatever transformers and tokenizers raise for a damaged file into a CheckpointError that names it."""
    try:
        yield
    except (CheckpointError, ImportError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise CheckpointError.of(source, f" cannot be read as {what}: {reason}") from error


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Without transformers' progress bars of reading and writing weights; a Trainer's own bar stays."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Without transformers' table of missing tensors, which `load_with_head` judges."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _weight_files(directory: Path, source: str | Path) -> list[Path]:
    if (directory / _WEIGHTS).is_file():
        return [directory / _WEIGHTS]
    if (directory / _INDEX).is_file():
        with _as_checkpoint_error():
            names = sorted(set(schema.read_json(directory / _INDEX, _SHARDS)["weight_map"].values()))
        absent = [name for name in names if not (directory / name).is_file()]
        if absent:
            raise CheckpointError.of(source, f" lacks {absent[0]}, which its {_INDEX} names")
        return [directory / name for name in names]
    pickle = next((name for name in _PICKLES if (directory / name).is_file()), None)
    if pickle:
        reason = f"which is never loaded because it can run any code; convert it to {_WEIGHTS} first"
        raise CheckpointError.of(source, f" holds its weights as a pickle ({pickle}), {reason}")
    raise CheckpointError.of(source, f" holds no {_WEIGHTS}")
