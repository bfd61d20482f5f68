"""Read the safetensors of a compressed model, and refuse what does not fit its config.json before it is loaded."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from distilbert_fast.files import schema
from distilbert_fast.files.durable import XXH3_KEY, FileError, check_seal, refuse_file, regular_size
from distilbert_fast.layers import CodebookLinear
from distilbert_fast.modeling.compression_config import METHOD
from distilbert_fast.modeling.linear_kinds import STORED_OTHERWISE, stored_dtypes
from distilbert_fast.modeling.loading import check_sizes
from distilbert_fast.ops import _check
from distilbert_fast.sparse import PackedSparseLinear, SparseLinear, mask_fault, unpack_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LARGEST = sys.float_info.max
SAVED = "config"  # in the metadata of weights: what config.json said of _DECISIVE when they were written, as JSON
# What of a config decides the numbers that a model gives, in any architecture. Whatever a user may change for the same
# weights (names of labels, dropout, what is returned) is not here.
_DECISIVE = (
    *("model_type", "num_hidden_layers", "n_layers", "num_attention_heads", "n_heads", "hidden_size", "dim"),
    *("embedding_size", "intermediate_size", "hidden_dim", "vocab_size", "max_position_embeddings", "type_vocab_size"),
    *("task_type_vocab_size", "use_task_id", "hidden_act", "activation", "layer_norm_eps", "sinusoidal_pos_embds"),
    *("position_embedding_type", "pad_token_id", "relative_attention_num_buckets", "is_decoder", "add_cross_attention"),
    *("summary_type", "summary_activation", "summary_use_proj"),
)
_SETTINGS = "quantization_config"  # too, from format 2 on


def check_config_sizes(config: Any, settings: dict[str, Any], path: Path, weights: Sequence[Path]) -> None:
    """Refuse sizes that no model has, or that do not match ``weights``, if there are any. Raises FileError.

    Args:
        config: of the model.
        settings: its ``quantization_config``.
        path: of config.json.
    """
    sizes = {name: value for name, value in config.to_dict().items() if isinstance(value, (int, float))}
    total = sum(map(regular_size, weights)) if weights else None
    check_sizes(sizes | {_SETTINGS: settings}, path, total)


def decisive(config: Any) -> dict[str, Any]:
    given = config.to_dict()
    names = [name for name in _DECISIVE if name in given]
    if "format" in (given.get(_SETTINGS) or {}):
        names.append(_SETTINGS)
    return json.loads(json.dumps({name: given[name] for name in names}, default=str))


def check_config(config: Any, path: Path, files: Mapping[str, Any]) -> None:
    """Refuse a config.json whose numbers do not match the weights beside it.

    It is the file that is compared, not the config in use: what a caller asks for in its place is up to the caller.

    Args:
        config: of the class in use, which knows the defaults.
        path: of config.json; nothing is compared if there is none.
        files: the weights by path; those of an earlier version do not say what they were saved with.
    """
    if not path.is_file():
        return
    given = schema.read_json(path, schema.mapping(schema.anything))
    found = decisive(type(config).from_dict(given)) | {"model_type": given.get("model_type")}
    for file, tensors in files.items():
        saved = (tensors.metadata() or {}).get(SAVED, "{}")
        wanted = schema.parse_json(saved, file, schema.mapping(schema.anything), SAVED)
        for name in wanted.keys() & found.keys():
            if found[name] != wanted[name]:
                refuse_file(path, f"{name} must be {wanted[name]!r}, as {file} was saved with, got {found[name]!r}")


def check_writable(model: PreTrainedModel) -> None:
    """Refuse to write a compressed model that could not be read: of float64 beside codes or of several dtypes, which
    casting makes, or with shared values or sparse weights that training made NaN. Raises TypeError or ValueError."""
    from distilbert_fast.modeling.encoder import check_weights, find_encoder

    caller = "save_pretrained"
    check_weights(find_encoder(model, caller), "int8" if getattr(model, "is_quantized", False) else None, caller)
    for name, module in model.named_modules():
        if isinstance(module, CodebookLinear):
            name, numbers = f"{name}.values", module.values.detach()
        elif isinstance(module, SparseLinear):
            name, numbers = f"{name}.weight", module.weight.detach()[module.mask]
        else:
            continue
        if not bool((finite := numbers.isfinite()).all()):
            _check.refuse(caller, name, "finite", f"{float(numbers[~finite][0]):g}")


def check_files(model: PreTrainedModel, files: Mapping[str, Any], pruned: bool) -> None:
    """Refuse a checkpoint without the compressed tensors that ``model`` needs, or with codes that it has no place for.

    Args:
        files: opened safetensors by path.
        pruned: whether the shapes of its float layers are not what its config alone says.

    Raises:
        FileError: a ValueError that names the file.
    """
    prefix, places = _places(model, files)
    wanted = {  # of a tensor that compression has changed: the dtypes that it may have, and its like
        f"{name}.{part}": (stored_dtypes(layer, part), x)
        for name, layer in _compressed(model, pruned)
        for part, x in layer.state_dict().items()
    }
    for name in wanted:
        if name.removeprefix(prefix) not in places:
            raise FileError(f"{METHOD}: {', '.join(map(str, files))} lacks {name}")
    for name, (dtypes, tensor) in wanted.items():
        _check_tensor(*places[name.removeprefix(prefix)], dtypes, tensor)
    for name, layer in model.named_modules():
        if isinstance(layer, PackedSparseLinear):
            file, tensors, full = places[f"{name}.weight".removeprefix(prefix)]
            packed = tensors.get_tensor(full)
            if (why := mask_fault(packed, layer.values.shape, layer.out_features, layer.in_features)) is not None:
                refuse_file(file, f"{full.removesuffix('weight')}{why}")
    _check_unused(model, {name.removeprefix(prefix) for name in wanted}, places, prefix)


def values_left(model: PreTrainedModel, name: str, linear: nn.Linear, files: Mapping[str, Any]) -> int:
    """How many weights of a sparse layer the mask in the files says are left; 0 where there is none that fits."""
    prefix, places = _places(model, files)
    if (place := places.get(f"{name}.weight".removeprefix(prefix))) is None:
        return 0
    packed = place[1].get_tensor(place[2])
    fits = packed.dtype == torch.uint8 and list(packed.shape) == [1, linear.out_features, -(-linear.in_features // 8)]
    return int(unpack_mask(packed[0], linear.in_features).sum()) if fits else 0


def _places(model: PreTrainedModel, files: Mapping[str, Any]) -> tuple[str, dict[str, tuple[str, Any, str]]]:
    """What names of the encoder's tensors begin with, and by the rest: file, the same opened, the name in it.

    The checkpoint of a task model may be read without its head, whose names then lack that beginning.
    """
    prefix = f"{model.base_model_prefix}."
    return prefix, {
        name.removeprefix(prefix): (file, tensors, name)
        for file, tensors in files.items()
        for name in tensors.keys()  # noqa: SIM118, it is no dict
    }


def _compressed(model: PreTrainedModel, pruned: bool) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers and tables that hold no floats and, of a pruned model, all in the encoder's layers."""
    from distilbert_fast.modeling.encoder import encoder_layers, find_encoder

    inside = {id(module) for module in encoder_layers(find_encoder(model, METHOD)).modules()} if pruned else set()
    for name, module in model.named_modules():
        known = isinstance(module, STORED_OTHERWISE)
        if known or (type(module) is nn.Linear and id(module) in inside):
            yield name, module


def _check_unused(model: PreTrainedModel, taken: Set[str], places: Mapping[str, Any], prefix: str) -> None:
    """Refuse codes for a layer that the model does not have, or has as a float one; other heads' are left out."""
    from distilbert_fast.modeling.encoder import encoder_layers, find_encoder

    stack = encoder_layers(find_encoder(model, METHOD))
    inside = next(name for name, module in model.named_modules() if module is stack).removeprefix(prefix)
    floats = {name.removeprefix(prefix) for name in model.state_dict()} - taken
    for name, (file, tensors, full) in places.items():
        ours = name in floats or (name.startswith(f"{inside}.") and name not in taken)
        dtype, kind = {"I8": ("int8", "int8"), "U8": ("uint8", "codebook or sparse")}.get(
            tensors.get_slice(full).get_dtype(), ("", "")
        )
        if ours and kind:
            refuse_file(file, f"{full} is {dtype}, but the model that config.json describes has no {kind} layer there")


@contextlib.contextmanager
def opened(file: str) -> Iterator[Any]:
    """A safetensors file that fits its checksum, if it has one."""
    if Path(file).suffix != ".safetensors":
        _check.refuse(METHOD, "weights", "in safetensors, pickle is never loaded", file, FileError)
    try:
        regular_size(file)
        with safe_open(file, framework="pt") as tensors:
            check_seal(file, (tensors.metadata() or {}).get(XXH3_KEY))
            yield tensors
    except SafetensorError as error:
        raise FileError(f"{METHOD}: {file} is truncated or no safetensors file ({error})") from error


def _check_tensor(file: str, tensors: Any, name: str, dtypes: tuple[str, ...], wanted: torch.Tensor) -> None:
    """Scales must be finite and not negative, shared values finite."""
    found = tensors.get_slice(name)
    if found.get_dtype() not in dtypes or found.get_shape() != list(wanted.shape):
        expected = f"{' or '.join(dtypes)} {list(wanted.shape)}"
        refuse_file(file, f"{name} must be {expected}, got {found.get_dtype()} {found.get_shape()}")
    for part, least, expected in (("weight_scale", 0.0, "finite and not negative"), ("values", -_LARGEST, "finite")):
        if name.endswith(f".{part}"):
            numbers = tensors.get_tensor(name).double()
            wrong = numbers[~((numbers >= least) & (numbers < math.inf))]
            if len(wrong):
                refuse_file(file, f"{name} must be {expected}, got {float(wrong[0])}")
