"""The plug-in behind save_pretrained and from_pretrained of int8 models: transformers' quantizer interface.

``config.json`` gets ``"quantization_config": {"quant_method": "distilbert_fast", …}``; the safetensors hold
int8 codes and float32 scales. transformers reads both back itself once ``register`` has run.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from distilbert_fast.backends import run_aside
from distilbert_fast.layers import Int8Linear
from distilbert_fast.ops import _check

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "distilbert_fast"


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
    quant_method: str = METHOD  # type: ignore[assignment]  # one of ours is in no enumeration of theirs

    def skips(self, name: str) -> bool:
        return any(_part_of(part, name) for part in self.modules_to_not_convert)


def _part_of(part: str, name: str) -> bool:
    return f".{part}." in f".{name}."


def quantize_linears(model: PreTrainedModel, config: Int8Config, caller: str) -> PreTrainedModel:
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
    marked: Any = model
    marked.is_quantized, marked.quantization_method, marked.hf_quantizer = True, METHOD, quantizer
    model.config.quantization_config = config
    return model


def _linears(model: PreTrainedModel, config: Int8Config, caller: str) -> Iterator[tuple[str, nn.Linear]]:
    """The float linear layers to quantize, with their dotted names in ``model``."""
    # Not above: ``register`` runs in the middle of transformers' own import, before any of its models can be.
    from distilbert_fast.modeling.encoder import check_weights, encoder_layers, find_encoder

    encoder = find_encoder(model, caller)
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        _check.refuse(caller, "model", "a float model", "one that is int8 already")
    check_weights(encoder, "int8", caller)
    inside = {id(module) for module in encoder_layers(encoder).modules()}
    words = encoder.get_input_embeddings().weight
    float_ones = (model.get_output_embeddings(), getattr(encoder, "embeddings_project", None))
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or config.skips(name) or module in float_ones or module.weight is words:
            continue
        if config.heads or id(module) in inside:
            yield name, module


class Int8Quantizer(HfQuantizer):
    """What transformers' from_pretrained and save_pretrained call for a model with an ``Int8Config``."""

    requires_calibration = False
    quantization_config: Int8Config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            return  # its floats are loaded first
        for name, linear in _linears(model, self.quantization_config, METHOD):
            bias, dtype = linear.bias is not None, linear.weight.dtype
            made = Int8Linear(linear.in_features, linear.out_features, bias, linear.weight.device, dtype)
            model.set_submodule(name, made)
        if checkpoint_files is not None:
            _check_files(model, checkpoint_files)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        return model if self.pre_quantized else quantize_linears(model, self.quantization_config, METHOD)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # biases, LayerNorms, embeddings and task head; the codes are fixed

    @property
    def is_qat_trainable(self) -> bool:
        return True  # what lets transformers' Trainer take the model, if only to evaluate it

    @property
    def is_compileable(self) -> bool:
        return True


def _check_files(model: PreTrainedModel, files: Sequence[str]) -> None:
    """Refuse pickles, damaged files, and a checkpoint without the codes and scales that ``model`` needs."""
    found = set()
    for file in files:
        if Path(file).suffix != ".safetensors":
            _check.refuse(METHOD, "weights", "in safetensors, pickle is never loaded", file)
        try:
            with safe_open(file, framework="pt") as tensors:
                found.update(tensors.keys())
        except SafetensorError as error:
            raise ValueError(f"{METHOD}: {file} is truncated or no safetensors file ({error})") from error
    prefix = f"{model.base_model_prefix}."  # of a task model: its checkpoint may be read without the head
    found = {name.removeprefix(prefix) for name in found}
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear):
            for tensor in module.state_dict():
                if f"{name}.{tensor}".removeprefix(prefix) not in found:
                    raise ValueError(f"{METHOD}: {', '.join(map(str, files))} lacks {name}.{tensor}")


@functools.cache
def register() -> None:
    """Make transformers know ``quant_method: distilbert_fast``."""
    register_quantization_config(METHOD)(Int8Config)
    register_quantizer(METHOD)(Int8Quantizer)


register()
