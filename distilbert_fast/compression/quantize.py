"""quantize_model: a transformers encoder in int8 or with shared values, after training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from distilbert_fast.compression.fisher import smoothed, squared_gradients
from distilbert_fast.compression.qat import finish_qat
from distilbert_fast.modeling.calibration import batches
from distilbert_fast.modeling.compression_config import CodebookConfig, Int8Config
from distilbert_fast.modeling.quantizer import linears_of, quantize_linears
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
    heads: bool = False,
    modules_to_not_convert: Sequence[str] = (),
) -> Model:
    """Replace the linear layers of an encoder that ``optimize`` knows by int8 ones, or by ones with shared values, in
    place.

    int8: each weight row gets its own symmetric scale, max|row| / 127; activations are quantized in each call, each
    token by its own scale. Shared values: those with the least squared error, exactly (see ``kmeans``); the engine runs
    them as int8, each row by its own scale, unless a float precision is asked for. Embeddings, LayerNorms and attention
    stay as they are.

    Args:
        model: one that ``optimize`` takes, or any ELECTRA or ERNIE. ``copy.deepcopy`` it first to keep its floats.
        config: an ``Int8Config`` or a ``CodebookConfig``; None: int8, with the two settings below.
        calibration: for shared values, an iterable of texts or of batches, as for ``optimize``; some hundred sentences
            of the task, no labels. A squared error of a weight then counts as much as the squared gradients of the
            model's answers say. None: all weights count the same.
        tokenizer: for ``calibration`` by texts; None takes the one beside the model's checkpoint.
        heads: also the linear layers of pooler and task head, except the one that computes vocabulary logits.
        modules_to_not_convert: dotted names, or dotted parts of names, of layers that stay float: "lin2",
            "layer.0", "transformer.layer.5.ffn.lin1".

    Returns:
        ``model``: its layers are now ``Int8Linear`` or ``CodebookLinear``, as its config says. ``save_pretrained``
        writes config.json and safetensors as usual, and ``from_pretrained`` of transformers and of this package read
        them back bit for bit, once ``distilbert_fast`` is imported. ``optimize`` runs such a model on the engine.

    Raises:
        TypeError, ValueError: an unsupported or already quantized model, by name; weights of several dtypes, or float64
            ones, which int8 layers do not compute in; a name in ``modules_to_not_convert`` that no layer has.
    """
    if config is None:
        config = Int8Config(heads=heads, modules_to_not_convert=list(modules_to_not_convert))
    elif heads or modules_to_not_convert:
        _check.refuse(OP, "heads and modules_to_not_convert", "settings of config where one is given", "both")
    if not isinstance(config, (Int8Config, CodebookConfig)):
        given = type(config).__name__
        _check.refuse(OP, "config", "an Int8Config or a CodebookConfig", given, TypeError)
    finish_qat(model)
    if calibration is None:
        return quantize_linears(model, config, OP)
    if isinstance(config, Int8Config):
        _check.refuse(OP, "calibration", "None for int8, which optimize calibrates", type(calibration).__name__)
    weights = {name: linear.weight for name, linear, _ in linears_of(model, config, OP)}
    importance = squared_gradients(model, batches(calibration, model, tokenizer, OP), weights)
    return quantize_linears(model, config, OP, {name: smoothed(squared) for name, squared in importance.items()})
