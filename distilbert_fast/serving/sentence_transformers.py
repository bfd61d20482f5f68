"""What a directory of sentence-transformers says of how its model makes embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distilbert_fast.files import schema
from distilbert_fast.files.durable import FileError, refuse_file

_MODULES = schema.array(schema.record({"type": schema.text(), "path": schema.text()}, others=True))
_ANY = schema.mapping(schema.anything)
_PREFIX = "pooling_mode_"
_POOLINGS = {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "max"}


def embedding_options(directory: Path) -> dict[str, Any]:
    """Options of the task embedding: those that the directory gives; none if it is no such directory.

    Raises:
        FileError: it names a module, a pooling or a prompt that is not computed here.
    """
    modules = directory / "modules.json"
    if not modules.is_file():
        return {}
    options: dict[str, Any] = {"normalize": False}
    for module in schema.read_json(modules, _MODULES):
        kind = module["type"].rpartition(".")[2]
        if kind == "Pooling":
            options["pooling"] = _pooling(directory / module["path"] / "config.json")
        elif kind == "Normalize":
            options["normalize"] = True
        elif kind != "Transformer":
            refuse_file(modules, f"expected Transformer, Pooling and Normalize, got {kind}; use sentence-transformers")
    for name, key, option in (
        ("sentence_bert_config.json", "max_seq_length", "max_length"),
        ("config_sentence_transformers.json", "default_prompt_name", ""),
    ):
        found = schema.read_json(directory / name, _ANY).get(key) if (directory / name).is_file() else None
        if found is not None and not option:
            refuse_file(directory / name, f"expected no {key}, got {found!r}; put the prompt before the texts")
        if isinstance(found, int) and option:
            options[option] = found
    return options


def _pooling(path: Path) -> str:
    config = schema.read_json(path, _ANY)
    named = [name.removeprefix(_PREFIX) for name, on in config.items() if name.startswith(_PREFIX) and on is True]
    named = [str(config["pooling_mode"])] if "pooling_mode" in config else [_POOLINGS.get(name, name) for name in named]
    if len(named) != 1 or named[0] not in _POOLINGS.values():
        raise FileError(f"{str(path)!r}: expected pooling by mean, cls or max, got {', '.join(named) or 'none'}")
    return named[0]
