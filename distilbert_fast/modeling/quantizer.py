"""Let save_pretrained and from_pretrained handle compressed models, by transformers' quantizer interface.

``config.json`` gets ``"quantization_config": {"quant_method": "distilbert_fast", …}``, see docs/formats.md; the
safetensors hold pruned weights, int8 codes and float32 scales. transformers reads both back itself once this module has
registered its classes.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import nn
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from distilbert_fast.backends import run_aside
from distilbert_fast.embeddings import Int8Embedding
from distilbert_fast.files.durable import UNSEALED, XXH3_KEY, filling, refuse_file, seal
from distilbert_fast.layers import QUANTIZED_LINEARS
from distilbert_fast.modeling.architectures import EMBEDDINGS, PROJECTION
from distilbert_fast.modeling.compression_config import (
    FLOAT,
    INT8,
    METHOD,
    SPARSE,
    CodebookConfig,
    CompressionConfig,
    Int8Config,
    Kind,
    check_settings,
    part_of,
)
from distilbert_fast.modeling.linear_kinds import converted, empty, kind_of
from distilbert_fast.modeling.stored_weights import (
    SAVED,
    check_config,
    check_config_sizes,
    check_files,
    check_writable,
    decisive,
    opened,
    values_left,
)
from distilbert_fast.modeling.training import Model
from distilbert_fast.ops import _check
from distilbert_fast.sparse import LINEARS, PackedSparseLinear, SparseLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AnyConfig: TypeAlias = CompressionConfig | Int8Config | CodebookConfig


class Chooser(Protocol):
    """What says how each linear layer is to hold its weights, as these configs do."""

    def kind_of(self, name: str, prefix: str, inside: bool) -> Kind: ...

    @property
    def is_float(self) -> bool: ...


# Compressing ---------------------------------------------------------------------------------------------------------


QKV = ("query", "key", "value")
_FLOATS = (nn.Linear, SparseLinear)
_LARGEST_WEIGHT = 2.0**63
SomeConfig = TypeVar("SomeConfig", bound=Int8Config | CodebookConfig)


class Moments(NamedTuple):
    """What a linear layer was seen to read: E[x] and E[x²], float32 [C]."""

    mean: torch.Tensor
    mean_square: torch.Tensor


def quantize_linears(
    model: Model,
    config: Int8Config | CodebookConfig,
    caller: str,
    importance: Mapping[str, torch.Tensor] | None = None,
    seen: Mapping[str, Moments] | None = None,
    scales: Mapping[str, torch.Tensor] | None = None,
) -> Model:
    """Turn the layers that ``config`` means into what it says, in place, and mark the model as quantized.

    Args:
        importance: of the weights of layers, by their dotted names: what a squared error of each counts, for codebooks.
        seen: what layers read, by the same names, for int8; see ``Int8Linear.from_linear``.
        scales: of rows, float32 [F], where they are known, by the same names, for int8.
    """
    config = with_whole_projections(model, config, caller)
    made = run_aside(lambda: compressed_modules(model, config, caller, importance or {}, seen or {}, scales))
    for modules in made.values():
        for name, module in modules:
            model.set_submodule(name, module)
    earlier: Any = getattr(model.config, "quantization_config", None)
    structure = getattr(earlier, "structure", None)
    sparse = any(isinstance(module, SparseLinear) for module in model.modules())
    if isinstance(config, Int8Config) and structure is None and not (config.embeddings or sparse):
        return _mark(model, config)
    usual = INT8 if isinstance(config, Int8Config) else config.kind
    return _mark(model, _of_format_2(model, structure, usual, config.int8_embeddings))


def compressed_modules(
    model: PreTrainedModel,
    config: Int8Config | CodebookConfig,
    caller: str,
    importance: Mapping[str, torch.Tensor],
    seen: Mapping[str, Moments],
    scales: Mapping[str, torch.Tensor] | None = None,
) -> dict[tuple[str, ...], list[tuple[str, nn.Module]]]:
    """The modules that ``quantize_linears`` puts in place, each with its dotted name, by the names of those that go
    together: query, key and value of a layer, and the tables."""
    from distilbert_fast.modeling.encoder import encoder_layers, find_encoder, part

    encoder, config = find_encoder(model, caller), with_whole_projections(model, config, caller)
    linears = list(linears_of(model, config, caller))
    tables = list(_tables(model, config, caller))
    groups: dict[nn.Module, tuple[str, ...]] = {linear: (name,) for name, linear, _ in linears}
    for layer in encoder_layers(encoder):
        projections = [part(encoder, layer, which) for which in QKV]
        groups |= dict.fromkeys(projections, tuple(name for name, linear, _ in linears if linear in projections))

    def convert(one: tuple[str, Any, Kind]) -> nn.Module:
        name, linear, kind = one
        given = seen[name]._asdict() if name in seen else {}
        if scales is not None and name in scales:
            given = {"scale": scales[name]}
        return converted(linear, kind, importance.get(name), 1, given)

    threads = 1 if isinstance(config, Int8Config) else torch.get_num_threads()  # shared by layers, not within one
    with ThreadPoolExecutor(threads, "distilbert_fast") if threads > 1 else contextlib.nullcontext() as pool:
        modules = list((map if pool is None else pool.map)(convert, linears))
    made: dict[tuple[str, ...], list[tuple[str, nn.Module]]] = {}
    for (name, linear, _), module in zip(linears, modules, strict=True):
        made.setdefault(groups[linear], []).append((name, module))
    if tables:
        made[tuple(name for name, _ in tables)] = [
            (name, Int8Embedding.from_embedding(table)) for name, table in tables
        ]
    return made


def linear_names(model: PreTrainedModel, config: Int8Config, caller: str) -> list[str]:
    """The dotted names of the linear layers that ``quantize_linears`` would turn into others. Raises as it does."""
    return [name for name, _, _ in linears_of(model, with_whole_projections(model, config, caller), caller)]


def with_whole_projections(model: PreTrainedModel, config: SomeConfig, caller: str) -> SomeConfig:
    """The same where query, key and value of a layer are of one kind: the engine multiplies them at once."""
    from distilbert_fast.modeling.encoder import encoder_layers, find_encoder, part

    encoder = find_encoder(model, caller)
    check_float(model, caller)
    named = {module: name for name, module in model.named_modules() if type(module) in _FLOATS}
    left = list(config.modules_to_not_convert)
    for skipped in left:
        if not any(part_of(skipped, name) for name in named.values()):
            _check.refuse(caller, "modules_to_not_convert", "names of linear layers", repr(skipped))
    for layer in encoder_layers(encoder):
        names = [named.get(part(encoder, layer, which)) for which in QKV]
        known = [name for name in names if name is not None]
        split = {config.kind_of(name, model.base_model_prefix, True) == FLOAT for name in known}
        left += [name.removeprefix(f"{model.base_model_prefix}.") for name in known if len(split) > 1]
    return replace(config, modules_to_not_convert=left)


def _of_format_2(
    model: PreTrainedModel, structure: list[dict[str, Any]] | None, usual: Kind, int8_embeddings: bool
) -> CompressionConfig:
    """What a model is whose encoder's linear layers are usually of one kind."""
    from distilbert_fast.modeling.encoder import encoder_layers

    inside = {id(module) for module in encoder_layers(model.base_model).modules()}
    linears = {}
    for name, module in model.named_modules():
        if isinstance(module, LINEARS):
            kind = kind_of(module)
            if kind != (usual if id(module) in inside else FLOAT):
                linears[name.removeprefix(f"{model.base_model_prefix}.")] = dict(kind)
    embeddings = dict(INT8 if int8_embeddings else FLOAT)
    return CompressionConfig(structure=structure, linear=dict(usual), linears=linears, embeddings=embeddings)


def record_structure(model: Model) -> Model:
    """Say in the config of a float model what is left of its layers, so that it is saved and read back; in place."""
    from distilbert_fast.modeling.structure import structure_of

    model.config.__dict__.pop("pruned_heads", None)  # where earlier versions kept it
    left = structure_of(model.base_model)
    return _mark(model, CompressionConfig(structure=[{"heads": list(heads), "ffn": ffn} for heads, ffn in left]))


def hold_sparse(model: Model, masks: Mapping[str, torch.Tensor], caller: str) -> Model:
    """Leave float linear layers only the weights in their masks, bool [F, C] by dotted names; in place."""
    check_float(model, caller)
    for name, mask in masks.items():
        model.set_submodule(name, SparseLinear.from_linear(model.get_submodule(name), mask))
    structure = getattr(getattr(model.config, "quantization_config", None), "structure", None)
    return _mark(model, _of_format_2(model, structure, SPARSE, False))


def _mark(model: Model, config: CompressionConfig | Int8Config) -> Model:
    """The model itself, which transformers now saves as what ``config`` says."""
    marked: Any = _saved_whole(model)
    marked.hf_quantizer = Int8Quantizer(config, pre_quantized=True)
    marked.config.quantization_config = config
    return _as_quantized(model, config)


def _as_quantized(model: Model, config: AnyConfig) -> Model:
    """The model itself: one that holds floats alone may be cast and trained as any other."""
    marked: Any = model
    marked.is_quantized, marked.quantization_method = not config.is_float, METHOD
    return model


def linears_of(model: PreTrainedModel, config: Chooser, caller: str) -> Iterator[tuple[str, Any, Kind]]:
    """The float linear layers, dense or sparse, that ``config`` means, with their dotted names in ``model``."""
    # Not above: this module is imported in the middle of transformers' own import, before any of its models can be.
    from distilbert_fast.modeling.encoder import check_weights, encoder_layers, find_encoder

    encoder = find_encoder(model, caller)
    check_float(model, caller)
    check_weights(encoder, None if config.is_float else "int8", caller)
    inside = {id(module) for module in encoder_layers(encoder).modules()}
    words = encoder.get_input_embeddings().weight
    float_ones = (model.get_output_embeddings(), getattr(encoder, PROJECTION, None))
    for name, module in list(model.named_modules()):
        if type(module) not in _FLOATS or module in float_ones or module.weight is words:
            continue
        kind = config.kind_of(name, model.base_model_prefix, id(module) in inside)
        if type(module) is SparseLinear and kind not in (FLOAT, INT8, SPARSE):
            _check.refuse(caller, name, f"dense to be made {kind['kind']}", "a layer that is sparse")
        if kind != FLOAT:
            yield name, module, kind


def check_float(model: PreTrainedModel, caller: str) -> None:
    """Refuse a model that holds codes in place of weights. Raises ValueError."""
    for module in model.modules():
        if isinstance(module, (*QUANTIZED_LINEARS, Int8Embedding)):
            _check.refuse(caller, "model", "a float model", f"one that is {kind_of(module)['kind']} already")


def check_finite(model: nn.Module, caller: str) -> None:
    """Refuse weights that are NaN, or that float32 cannot square: scales and errors would not be finite, or answers
    would be where those of the float model are not. Raises ValueError, by name."""

    def check() -> None:
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point() or parameter.is_meta or not parameter.numel():
                continue
            ends = [float(end) for end in torch.aminmax(parameter.detach())]
            if wrong := [end for end in ends if not abs(end) <= _LARGEST_WEIGHT]:
                _check.refuse(caller, name, f"finite and at most {_LARGEST_WEIGHT:.1e}", f"{wrong[0]:g}")

    run_aside(check)


def _tables(model: PreTrainedModel, config: AnyConfig, caller: str) -> Iterator[tuple[str, nn.Embedding]]:
    """The tables to hold in int8, if ``config`` says so, with their dotted names in ``model``."""
    from distilbert_fast.modeling.encoder import find_encoder

    if not config.int8_embeddings:
        return
    encoder = find_encoder(model, caller)
    if (why := _tied(model)) is not None:
        _check.refuse(caller, "embeddings", f"float for {why}", "int8")
    for path in (EMBEDDINGS[name] for name in ("word", "position", "token_type")):
        holder, _, name = path.rpartition(".")
        table = getattr(encoder.get_submodule(holder), name, None)
        if table is None:
            continue
        if type(table) is not nn.Embedding or table.max_norm is not None:
            given = type(table).__name__
            _check.refuse(caller, path, "an nn.Embedding without max_norm to be held in int8", given, TypeError)
        yield _name_of(model, table), table


def _tied(model: PreTrainedModel) -> str | None:
    """Whose vocabulary logits are computed with the table of words, in words; None if there are no such."""
    projection, words = model.get_output_embeddings(), model.get_input_embeddings().weight
    if projection is None or not (projection.weight is words or model.config.tie_word_embeddings):
        return None
    return f"{type(model).__name__}, whose {_name_of(model, projection)} shares the table of words"


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


# Saving and loading ---------------------------------------------------------------------------------------------------


def _saved_whole(model: Model) -> Model:
    """The model itself, with a ``save_pretrained`` that writes whole files with checksums."""
    marked: Any = model
    marked.save_pretrained = functools.partial(_save_pretrained, model)
    return model


def _save_pretrained(model: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    """As the class's own, but a file that is there is replaced only by a whole one, and has a checksum.

    Raises:
        OSError: the disk is full or cannot be written; it names the file, and the old ones are as they were.
        TypeError, ValueError: a model that could not be read again, see ``check_writable``.
    """
    check_writable(model)
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


@register_quantizer(METHOD)
class Int8Quantizer(HfQuantizer):
    """What transformers' from_pretrained and save_pretrained call for a compressed model."""

    requires_calibration = False
    is_trainable = True  # biases, LayerNorms, embeddings, shared values and task head; the codes are fixed
    is_qat_trainable = True  # what lets transformers' Trainer take the model, if only to evaluate it
    is_compileable = True
    quantization_config: AnyConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            return  # its floats are loaded first
        files, settings = checkpoint_files or (), self.quantization_config.to_dict()
        config = Path(files[0]).with_name("config.json") if files else None
        if config:
            check_settings(settings, config)
            check_config_sizes(model.config, settings, config, [Path(file) for file in files])
        with contextlib.ExitStack() as stack:
            tensors = {file: stack.enter_context(opened(file)) for file in files}
            if config:
                check_config(model.config, config, tensors)
            self._make_places(model, config, tensors)
            if checkpoint_files is not None:
                check_files(model, tensors, settings.get("structure") is not None)

    def _make_places(self, model: PreTrainedModel, path: Path | None, files: Mapping[str, Any]) -> None:
        """Give a model the layers that its tensors fit."""
        from distilbert_fast.modeling.encoder import encoder_layers, find_encoder
        from distilbert_fast.modeling.structure import LayerStructure, restructure

        encoder, given = find_encoder(model, METHOD), self.quantization_config
        if (structure := getattr(given, "structure", None)) is not None:
            restructure(encoder, [LayerStructure(tuple(layer["heads"]), layer["ffn"]) for layer in structure])
        stack, named = encoder_layers(encoder), dict(model.named_modules())
        place = next(name for name, module in named.items() if module is stack)
        prefix = f"{model.base_model_prefix}."
        known = {name.removeprefix(prefix) for name, module in named.items() if type(module) is nn.Linear}
        for name in list(getattr(given, "linears", {})):
            if name in known:
                continue
            if name.startswith(f"{place.removeprefix(prefix)}.") and path is not None:
                refuse_file(path, f"quantization_config: linears must name linear layers, got {name!r}")
            del given.linears[name]  # of a head that this model does not have
        for name, linear, kind in linears_of(model, given, METHOD):
            left = values_left(model, name, linear, files) if kind == SPARSE else 0
            model.set_submodule(name, empty(linear, kind, left))
        if given.int8_embeddings and path is not None and (why := _tied(model)) is not None:
            refuse_file(path, f"quantization_config: embeddings must be float for {why}, got int8")
        for name, table in list(_tables(model, given, METHOD)):
            model.set_submodule(name, Int8Embedding.like(table))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.pre_quantized:
            return self._quantize(model)
        for module in list(model.modules()):
            if isinstance(module, PackedSparseLinear):
                module.unpack()
        return _as_quantized(_saved_whole(model), self.quantization_config)

    def _quantize(self, model: PreTrainedModel) -> PreTrainedModel:
        config = self.quantization_config
        if not isinstance(config, (Int8Config, CodebookConfig)):
            given = type(config).__name__
            _check.refuse(METHOD, "quantization_config", "an Int8Config or CodebookConfig", given, TypeError)
        check_finite(model, METHOD)
        return quantize_linears(model, config, METHOD)

    def update_attn_implementation(self, config: Any) -> Any:
        """What transformers calls before it makes the model: the place to refuse sizes that no file of it has.

        A class that is no Auto class has not said by then where the config is from.
        """
        if self.pre_quantized:
            directory = Path(config._name_or_path)
            known = config._name_or_path and directory.is_dir()
            settings = self.quantization_config.to_dict() if known else {}
            weights = list(directory.glob("*.safetensors")) if known else []
            check_config_sizes(config, settings, directory / "config.json", weights)
        return super().update_attn_implementation(config)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        return None, {XXH3_KEY: UNSEALED, SAVED: json.dumps(decisive(model.config), sort_keys=True)}

    def is_serializable(self) -> bool:
        return True
