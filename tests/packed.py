"""Files of packed encoders, rewritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distilbert_fast.engine.packed_files import FORMAT


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def rewrite(path: Path, tensors: dict[str, torch.Tensor | None] | None = None, **fields: Any) -> None:
    """As an earlier version wrote it: no checksum, other tensors (None: without), other fields of the shape."""
    held, shape = load_file(path), json.loads(metadata_of(path)["shape"])
    held = {name: tensor for name, tensor in (held | (tensors or {})).items() if tensor is not None}
    shape = {name: value for name, value in (shape | fields).items() if value is not ...}
    path.unlink()
    save_file(held, path, {"format": FORMAT, "shape": json.dumps(shape)})
