"""Optimizer, scheduler and random-number states as safetensors files: a checkpoint without pickle.

The tensors of a nested state become the file's tensors; its structure becomes JSON in the file's metadata.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from distilbert_fast.files.durable import FileError, regular_size
from distilbert_fast.files.schema import parse_json


def save_state(path: Path, state: Any) -> None:
    """Write nested dicts, lists and tuples of tensors, numbers, strings and None.

    Raises:
        TypeError: anything else is in there.
    """
    tensors: dict[str, torch.Tensor] = {}
    structure = json.dumps(_pack(state, tensors))
    save_file(tensors, str(path), metadata={"structure": structure})


def load_state(path: Path) -> Any:
    """Read what ``save_state`` wrote: the same types, floats to the last bit, tensors on the CPU.

    Raises:
        FileError: it is another file, or damaged.
    """
    regular_size(path)
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            structure = parse_json((file.metadata() or {}).get("structure", ""), path, called="structure")
            # cloned: an optimizer updates its state in place, which must not reach the mapped file
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return _unpack(structure, tensors)
    except FileError:
        raise
    except (SafetensorError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise FileError(f"{str(path)!r} is damaged or no state: {type(error).__name__}: {error}") from error


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[_pack(key, tensors), _pack(entry, tensors)] for key, entry in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_pack(entry, tensors) for entry in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"save_state: state must hold tensors, numbers, strings and None, got {type(value).__name__}")


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_unpack(key, tensors): _unpack(entry, tensors) for key, entry in content}
    entries = [_unpack(entry, tensors) for entry in content]
    return tuple(entries) if kind == "tuple" else entries


def random_state(device: torch.device) -> dict[str, Any]:
    """States of the generators of Python, NumPy and torch, on the CPU and on ``device``."""
    name, keys, *rest = cast(tuple, np.random.get_state())
    state = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what ``random_state`` gave."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"], device)
