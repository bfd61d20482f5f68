"""Let save_pretrained and from_pretrained handle int8 models, by transformers' quantizer interface.

``config.json`` gets ``"quantization_config": {"quant_method": "distilbert_fast", …}``; the safetensors hold
int8 codes and float32 scales. transformers reads both back itself once this module has registered its classes.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from distilbert_fast.backends import run_aside
from distilbert_fast.files import schema
from distilbert_fast.files.durable import (
    CHECKSUM,
    UNSEALED,
    FileError,
    check_seal,
    filling,
    refuse_file,
    regular_size,
    seal,
)
from distilbert_fast.layers import Int8Linear
from distilbert_fast.modeling.architectures import PROJECTION
from distilbert_fast.modeling.loading import check_sizes
from distilbert_fast.modeling.training import Model
from distilbert_fast.ops import _check

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "distilbert_fast"
_CONFIG = schema.record(
    {"quant_method": schema.one_of(METHOD)},
    {"heads": schema.boolean, "modules_to_not_convert": schema.array(schema.text())},
    others=True,
)
_FLOATS = ("F64", "F32", "BF16", "F16")
_SAVED = "config"  # in the metadata of weights: what config.json said of _DECISIVE when they were written, as JSON
# What of a config decides the numbers that a model gives, in any architecture. Whatever a user may change for the same
# weights (names of labels, dropout, what is returned) is not here.
_DECISIVE = (
    *("model_type", "num_hidden_layers", "n_layers", "num_attention_heads", "n_heads", "hidden_size", "dim"),
    *("embedding_size", "intermediate_size", "hidden_dim", "vocab_size", "max_position_embeddings", "type_vocab_size"),
    *("task_type_vocab_size", "use_task_id", "hidden_act", "activation", "layer_norm_eps", "sinusoidal_pos_embds"),
    *("position_embedding_type", "pad_token_id", "relative_attention_num_buckets", "is_decoder", "add_cross_attention"),
    *("summary_type", "summary_activation", "summary_use_proj"),
)


@register_quantization_config(METHOD)
@dataclass(kw_only=True)
class Int8Config(QuantizationConfigMixin):
    """Which linear layers hold int8 weights. Activations are quantized as they come, a scale for each token.

    Also for quantizing while loading: ``from_pretrained(..., quantization_config=Int8Config())``.

    Args:
        heads: also those of pooler and task head.
        modules_to_not_convert: dotted names, or dotted parts of names, of layers that stay float.
    """

    heads: bool = False
    modules_to_not_convert: list[str] = field(default_factory=list)
    quant_method: str = METHOD  # type: ignore[assignment]  # transformers' enumeration does not have it

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in transformers. The settings of a config.json are checked where its path is known."""
        made = super().from_dict({}, return_unused_kwargs, **kwargs)
        vars(made[0] if return_unused_kwargs else made).update(config_dict)
        return made

    def skips(self, name: str) -> bool:
        return any(_part_of(part, name) for part in self.modules_to_not_convert)


def _part_of(part: str, name: str) -> bool:
    return f".{part}." in f".{name}."


def quantize_linears(model: Model, config: Int8Config, caller: str) -> Model:
    """Turn the layers that ``config`` means into ``Int8Linear``, in place, and mark the model as quantized."""
    linears = list(_linears(model, config, caller))
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    for part in config.modules_to_not_convert:
        if not any(_part_of(part, name) for name in names):
            _check.refuse(caller, "modules_to_not_convert", "names of linear layers", repr(part))
    made = run_aside(lambda: [(name, Int8Linear.from_linear(linear)) for name, linear in linears])
    for name, linear in made:
        model.set_submodule(name, linear)
    quantizer = Int8Quantizer(config, pre_quantized=True)
    marked: Any = _saved_whole(model)
    marked.is_quantized, marked.quantization_method, marked.hf_quantizer = True, METHOD, quantizer
    marked.config.quantization_config = config
    return model


def _linears(model: PreTrainedModel, config: Int8Config, caller: str) -> Iterator[tuple[str, nn.Linear]]:
    """The float linear layers to quantize, with their dotted names in ``model``."""
    # Not above: this module is imported in the middle of transformers' own import, before any of its models can be.
    from distilbert_fast.modeling.encoder import check_weights, encoder_layers, find_encoder

    encoder = find_encoder(model, caller)
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        _check.refuse(caller, "model", "a float model", "one that is int8 already")
    check_weights(encoder, "int8", caller)
    inside = {id(module) for module in encoder_layers(encoder).modules()}
    words = encoder.get_input_embeddings().weight
    float_ones = (model.get_output_embeddings(), getattr(encoder, PROJECTION, None))
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or config.skips(name) or module in float_ones or module.weight is words:
            continue
        if config.heads or id(module) in inside:
            yield name, module


def _saved_whole(model: Model) -> Model:
    """The model itself, with a ``save_pretrained`` that writes whole files with checksums."""
    marked: Any = model
    marked.save_pretrained = functools.partial(_save_pretrained, model)
    return model


def _save_pretrained(model: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    """As the class's own, but a file that is there is replaced only by a whole one, and has a checksum.

    Raises:
        OSError: the disk is full or cannot be written; it names the file, and the old ones are as they were.
    """
    save = type(model).save_pretrained
    given = inspect.signature(save).bind(model, save_directory, *args, **kwargs).arguments
    directory = Path(save_directory)
    elsewhere = given.get("push_to_hub") or given.get("distributed_checkpoint") or directory.is_file()
    if elsewhere or not given.get("is_main_process", True):
        return save(model, save_directory, *args, **kwargs)
    with filling(directory) as staging:
        save(model, staging, *args, **kwargs)
        for file in staging.glob("*.safetensors"):
            seal(file)


class _UnknownSettingError(FileError, TypeError):
    """A setting that Int8Config does not know, as of a later version."""


@register_quantizer(METHOD)
class Int8Quantizer(HfQuantizer):
    """What transformers' from_pretrained and save_pretrained call for a model with an ``Int8Config``."""

    requires_calibration = False
    is_trainable = True  # biases, LayerNorms, embeddings and task head; the codes are fixed
    is_qat_trainable = True  # what lets transformers' Trainer take the model, if only to evaluate it
    is_compileable = True
    quantization_config: Int8Config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            return  # its floats are loaded first
        files = checkpoint_files or ()
        config = Path(files[0]).with_name("config.json") if files else None
        if config:
            settings = self.quantization_config.to_dict()
            schema.validate(settings, config, _CONFIG, "quantization_config")
            if unknown := sorted(settings.keys() - {field.name for field in fields(Int8Config)}):
                given = f"unexpected keyword argument {unknown[0]!r}"
                raise _UnknownSettingError(f"{str(config)!r}: quantization_config: {given}", given)
            _check_sizes(model.config, config, [Path(file) for file in files])
        with contextlib.ExitStack() as opened:
            tensors = {file: opened.enter_context(_opened(file)) for file in files}
            if config:
                _check_config(model.config, config, tensors)
            for name, linear in _linears(model, self.quantization_config, METHOD):
                bias, dtype = linear.bias is not None, linear.weight.dtype
                made = Int8Linear(linear.in_features, linear.out_features, bias, linear.weight.device, dtype)
                model.set_submodule(name, made)
            if checkpoint_files is not None:
                _check_files(model, tensors)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.pre_quantized:
            return quantize_linears(model, self.quantization_config, METHOD)
        return _saved_whole(model)

    def update_attn_implementation(self, config: Any) -> Any:
        """What transformers calls before it makes the model: the place to refuse sizes that no file of it has.

        A class that is no Auto class has not said by then where the config is from.
        """
        if self.pre_quantized:
            directory = Path(config._name_or_path)
            known = config._name_or_path and directory.is_dir()
            _check_sizes(config, directory / "config.json", list(directory.glob("*.safetensors")) if known else [])
        return super().update_attn_implementation(config)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        return None, {CHECKSUM: UNSEALED, _SAVED: json.dumps(_decisive(model.config))}

    def is_serializable(self) -> bool:
        return True


def _check_sizes(config: Any, path: Path, weights: Sequence[Path]) -> None:
    """Refuse sizes that no model has, or that do not match ``weights``, if there are any. Raises FileError."""
    sizes = {name: value for name, value in config.to_dict().items() if isinstance(value, (int, float))}
    check_sizes(sizes, path, sum(map(regular_size, weights)) if weights else None)


def _decisive(config: Any) -> dict[str, Any]:
    given = config.to_dict()
    return json.loads(json.dumps({name: given[name] for name in _DECISIVE if name in given}, default=str))


def _check_config(config: Any, path: Path, files: Mapping[str, Any]) -> None:
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
    found = _decisive(type(config).from_dict(given)) | {"model_type": given.get("model_type")}
    for file, tensors in files.items():
        saved = (tensors.metadata() or {}).get(_SAVED, "{}")
        wanted = schema.parse_json(saved, file, schema.mapping(schema.anything), _SAVED)
        for name in wanted.keys() & found.keys():
            if found[name] != wanted[name]:
                refuse_file(path, f"{name} must be {wanted[name]!r}, as {file} was saved with, got {found[name]!r}")


def _check_files(model: PreTrainedModel, files: Mapping[str, Any]) -> None:
    """Refuse a checkpoint without the codes and scales that ``model`` needs, or with codes that it has no place for.

    Args:
        files: opened safetensors by path.

    Raises:
        FileError: a ValueError that names the file.
    """
    prefix = f"{model.base_model_prefix}."  # of a task model: its checkpoint may be read without the head
    places = {  # of a tensor: file, the same opened, its name in it
        name.removeprefix(prefix): (file, tensors, name)
        for file, tensors in files.items()
        for name in tensors.keys()  # noqa: SIM118, it is no dict
    }
    layers = [entry for entry in model.named_modules() if isinstance(entry[1], Int8Linear)]
    wanted = {f"{name}.{part}": (part, x) for name, layer in layers for part, x in layer.state_dict().items()}
    for name in wanted:
        if name.removeprefix(prefix) not in places:
            raise FileError(f"{METHOD}: {', '.join(map(str, files))} lacks {name}")
    for name, (part, tensor) in wanted.items():
        _check_tensor(*places[name.removeprefix(prefix)], part, tensor)
    _check_unused(model, {name.removeprefix(prefix) for name in wanted}, places, prefix)


def _check_unused(model: PreTrainedModel, taken: Set[str], places: Mapping[str, Any], prefix: str) -> None:
    """Refuse codes for a layer that the model does not have, or has as a float one; other heads' are left out."""
    from distilbert_fast.modeling.encoder import encoder_layers, find_encoder

    stack = encoder_layers(find_encoder(model, METHOD))
    inside = next(name for name, module in model.named_modules() if module is stack).removeprefix(prefix)
    floats = {name.removeprefix(prefix) for name in model.state_dict()} - taken
    for name, (file, tensors, full) in places.items():
        ours = name in floats or (name.startswith(f"{inside}.") and name not in taken)
        if ours and tensors.get_slice(full).get_dtype() == "I8":
            refuse_file(file, f"{full} is int8, but the model that config.json describes has no int8 layer there")


@contextlib.contextmanager
def _opened(file: str) -> Iterator[Any]:
    """A safetensors file that fits its checksum, if it has one."""
    if Path(file).suffix != ".safetensors":
        _check.refuse(METHOD, "weights", "in safetensors, pickle is never loaded", file, FileError)
    try:
        regular_size(file)
        with safe_open(file, framework="pt") as tensors:
            check_seal(file, (tensors.metadata() or {}).get(CHECKSUM))
            yield tensors
    except SafetensorError as error:
        raise FileError(f"{METHOD}: {file} is truncated or no safetensors file ({error})") from error


def _check_tensor(file: str, tensors: Any, name: str, part: str, wanted: torch.Tensor) -> None:
    """Codes must be int8, scales finite and not negative."""
    found = tensors.get_slice(name)
    dtypes = {"weight": ("I8",), "weight_scale": ("F32",)}.get(part, _FLOATS)
    if found.get_dtype() not in dtypes or found.get_shape() != list(wanted.shape):
        expected = f"{' or '.join(dtypes)} {list(wanted.shape)}"
        refuse_file(file, f"{name} must be {expected}, got {found.get_dtype()} {found.get_shape()}")
    if part == "weight_scale":
        scales = tensors.get_tensor(name)
        wrong = scales[~((scales >= 0) & (scales < math.inf))]
        if len(wrong):
            refuse_file(file, f"{name} must be finite and not negative, got {float(wrong[0])}")
