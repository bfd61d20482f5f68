"""quantize_model: a transformers encoder in int8 or with shared values, after training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from distilbert_fast.compression.activations import moments
from distilbert_fast.compression.fisher import smoothed, squared_gradients
from distilbert_fast.compression.qat import finish_qat, learned_scales
from distilbert_fast.compression.sensitivity import exceptions
from distilbert_fast.modeling.calibration import batches
from distilbert_fast.modeling.compression_config import INT8, CodebookConfig, Int8Config
from distilbert_fast.modeling.encoder import encoder_layers, find_encoder
from distilbert_fast.modeling.quantizer import check_finite, linear_names, linears_of, quantize_linears
from distilbert_fast.modeling.training import Model
from distilbert_fast.ops import _check

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OP = "quantize_model"


def quantize_model(
    model: Model,
    config: Int8Config | CodebookConfig | None = None,
    calibration: Iterable[Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    budget: float | None = None,
    heads: bool = False,
    modules_to_not_convert: Sequence[str] = (),
) -> Model:
    """Replace the linear layers of an encoder that ``optimize`` knows by int8 ones, or by ones with shared values, in
    place.

    int8: each weight row gets its own symmetric scale; activations are quantized in each call, each token by its own
    scale. Shared values: those with the least squared error, exactly (see ``kmeans``); the engine runs them as int8,
    with a scale for each row, or for each four that share 16 values, unless a float precision is asked for. LayerNorms
    and attention stay as they are, and so do embeddings, unless an ``Int8Config`` says so.

    Args:
        model: one that ``optimize`` takes, or any ELECTRA or ERNIE. ``copy.deepcopy`` it first to keep its floats.
        config: an ``Int8Config`` or a ``CodebookConfig``; None: int8, with the two settings below.
        calibration: an iterable of texts or of batches, as for ``optimize``; some hundred sentences of the task, no
            labels. For int8, an error of a weight then counts by how large what it is multiplied with is, and biases
            are corrected by the mean that is left; None: the scale of a row is max|row| / 127. For shared values, a
            squared error counts as much as the squared gradients of the model's answers say; None: all the same.
        tokenizer: for ``calibration`` by texts; None takes the one beside the model's checkpoint.
        budget: for int8, the most that the answers to the calibration may differ from those of the float model, as a
            mean KL in nats; the layers that cost most stay float until that is so, see ``sensitivity``.
        heads: also the linear layers of pooler and task head, except the one that computes vocabulary logits.
        modules_to_not_convert: dotted names, or dotted parts of names, of layers that stay float: "lin2",
            "layer.0", "transformer.layer.5.ffn.lin1".

    Returns:
        ``model``: its layers are now ``Int8Linear`` or ``CodebookLinear``, as its config says. ``save_pretrained``
        writes config.json and safetensors as usual, and ``from_pretrained`` of transformers and of this package read
        them back bit for bit, once ``distilbert_fast`` is imported. ``optimize`` runs such a model on the engine.

    Raises:
        TypeError, ValueError: an unsupported or already quantized model, by name; weights of several dtypes, or float64
            ones, which int8 layers do not compute in; weights that are not finite or that float32 cannot square; a name
            in ``modules_to_not_convert`` that no layer has; int8 embeddings for a model whose vocabulary logits share
            their table; a budget without a calibration, for shared values, or one that cannot be kept.
    """
    if config is None:
        config = Int8Config(heads=heads, modules_to_not_convert=list(modules_to_not_convert))
    elif heads or modules_to_not_convert:
        _check.refuse(OP, "heads and modules_to_not_convert", "settings of config where one is given", "both")
    if not isinstance(config, (Int8Config, CodebookConfig)):
        given = type(config).__name__
        _check.refuse(OP, "config", "an Int8Config or a CodebookConfig", given, TypeError)
    if budget is not None:
        _check.positive(OP, "budget", budget)
        if calibration is None or not isinstance(config, Int8Config):
            _check.refuse(OP, "budget", "None without calibration, and for shared values", budget)
    check_finite(model, OP)
    scales = learned_scales(model)
    _check_trained(model, config, scales, calibration is None)
    finish_qat(model)
    if calibration is None:
        return quantize_linears(model, config, OP, scales=scales)
    if isinstance(config, CodebookConfig):
        weights = {name: linear.weight for name, linear, _ in linears_of(model, config, OP)}
        importance = squared_gradients(model, batches(calibration, model, tokenizer, OP), weights)
        return quantize_linears(model, config, OP, {name: smoothed(squared) for name, squared in importance.items()})
    names = linear_names(model, config, OP)
    given = list(batches(calibration, model, tokenizer, OP))
    seen = moments(model, names, given, OP)
    if budget is not None:
        left = exceptions(model, config, given, seen, budget, OP)
        left = [name.removeprefix(f"{model.base_model_prefix}.") for name in left]  # as read without the task head
        config = replace(config, modules_to_not_convert=[*config.modules_to_not_convert, *left])
    return quantize_linears(model, config, OP, seen=seen)


def _check_trained(
    model: Model, config: Int8Config | CodebookConfig, scales: Mapping[str, torch.Tensor], uncalibrated: bool
) -> None:
    """Refuse to make of layers that were trained as int8 anything else than what they compute as."""
    if not scales:
        return
    if not uncalibrated:
        _check.refuse(OP, "calibration", "None after prepare_qat, which trained the scales", "one")
    inside = set(encoder_layers(find_encoder(model, OP)).modules())
    for name in scales:
        kind = config.kind_of(name, model.base_model_prefix, model.get_submodule(name) in inside)
        if kind != INT8:
            _check.refuse(OP, f"config of {name}", "int8, as which it was trained", kind["kind"])
