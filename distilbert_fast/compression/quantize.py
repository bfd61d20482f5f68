"""quantize_model: post-training int8 of a transformers encoder, without data."""

from __future__ import annotations

from collections.abc import Sequence

from distilbert_fast.modeling.compression_config import Int8Config
from distilbert_fast.modeling.quantizer import quantize_linears
from distilbert_fast.modeling.training import Model


def quantize_model(model: Model, heads: bool = False, modules_to_not_convert: Sequence[str] = ()) -> Model:
    """Replace the linear layers of an encoder that ``optimize`` knows by int8 ones, in place.

    Each weight row gets its own symmetric scale, max|row| / 127; activations are quantized in each call, each
    token by its own scale. Embeddings, LayerNorms and attention stay as they are.

    Args:
        model: one that ``optimize`` takes, or any ELECTRA or ERNIE. ``copy.deepcopy`` it first to keep its floats.
        heads: also the linear layers of pooler and task head, except the one that computes vocabulary logits.
        modules_to_not_convert: dotted names, or dotted parts of names, of layers that stay float: "lin2",
            "layer.0", "transformer.layer.5.ffn.lin1".

    Returns:
        ``model``: its layers are now ``Int8Linear`` and its config says so. ``save_pretrained`` writes
        config.json and safetensors as usual, and ``from_pretrained`` of transformers and of this package read them
        back bit for bit, once ``distilbert_fast`` is imported. ``optimize`` runs such a model on the engine.

    Raises:
        TypeError, ValueError: an unsupported or already quantized model, by name; weights of several dtypes, or float64
            ones, which int8 layers do not compute in; a name in ``modules_to_not_convert`` that no layer has.
    """
    config = Int8Config(heads=heads, modules_to_not_convert=list(modules_to_not_convert))
    return quantize_linears(model, config, "quantize_model")
