"""Weights that all processes of a machine share: mapped from files, so that the page cache holds them once.

transformers copies what it reads, or maps it, by its version and the dtype; an engine packs that. `map_parameters` puts
the checkpoint's own file in the place of the first, `map_engine` a file of packed weights in that of the second. Both
compare every byte with what is replaced. `own_parameters` is for processes that share nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from distilbert_fast.backends import run_aside
from distilbert_fast.engine.engine import Engine
from distilbert_fast.files.durable import FileError, lock
from distilbert_fast.modeling.accelerator import Accelerator
from distilbert_fast.ops import _check

OP = "map_engine"


def map_parameters(model: nn.Module, directory: Path) -> int:
    """Let parameters on the CPU that a checkpoint's safetensors hold, bit for bit, be read from there.

    Call it before ``optimize``. A process that writes to one gets pages of its own; the file never changes by that.

    Returns:
        The bytes that are mapped.
    """
    mapped = run_aside(lambda: _map_parameters(model, directory))
    _give_back()
    return mapped


def own_parameters(model: nn.Module) -> None:
    """Copy parameters and buffers on the CPU, which may be a mapped checkpoint: a file that is written over meanwhile
    would change them, and one that is cut end the process. Call it before ``optimize``."""
    with torch.no_grad():
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            if tensor.is_cpu:
                tensor.data = tensor.data.clone()


def _map_parameters(model: nn.Module, directory: Path) -> int:
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.is_cpu}
    mapped = 0
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = {*file.keys()}
            for name, parameter in parameters.items():
                found = next((key for key in _keys(model, name) if key in names), None)
                if found is None:
                    continue
                tensor = file.get_tensor(found)
                if tensor.dtype == parameter.dtype and torch.equal(tensor, parameter.data):
                    parameter.data = tensor
                    mapped += tensor.nbytes
    return mapped


def _keys(model: Any, name: str) -> tuple[str, ...]:
    """What a checkpoint may call a parameter: with or without the name of the encoder before it."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return name, prefix + name, name.removeprefix(prefix)


def map_engine(model: Any, path: str | Path) -> None:
    """Let the engine of an optimized model read its packed weights from a file, which is made if it is not there.

    A file with other weights is replaced; processes that have mapped it keep those. After the model's weights have
    changed, this process packs them for itself until it is called again.

    Args:
        model: of transformers, optimized, on a CPU.
        path: of the file; its directory is made.

    Raises:
        TypeError, ValueError: a model that is not optimized, or that only ops can run.
        OSError: the file cannot be written.
    """
    accelerator: Accelerator | None = vars(model.base_model).get("_accelerator")
    engine = None if accelerator is None else accelerator.engine
    if accelerator is None or engine is None:
        _check.refuse(OP, "model", "optimized", type(model).__name__, TypeError)
    if engine.packed is None:
        _check.refuse(OP, "model", "one that the C++ encoder takes", "another")
    path = Path(path)
    with lock(path):  # of processes that start together one writes it, or each would map a file of its own
        found = None
        with contextlib.suppress(FileError, FileNotFoundError):
            found = Engine.load(path)
        if found is None or not run_aside(functools.partial(_equal, found, engine)):
            engine.save(path)
            found = Engine.load(path)
    accelerator.replace(found)
    del engine
    _give_back()


def _equal(found: Engine, made: Engine) -> bool:
    assert found.packed is not None and made.packed is not None
    theirs, ours = found.packed.tensors, made.packed.tensors
    if found.packed.shape != made.packed.shape or theirs.keys() != ours.keys():
        return False
    return all(torch.equal(_bytes(theirs[name]), _bytes(ours[name])) for name in ours)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _give_back() -> None:
    """Give freed memory back to the system, where the C library knows how to."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
