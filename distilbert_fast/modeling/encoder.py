"""The encoders of transformers that this package knows: how to find one in a model, and what its parts are called."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.activations import GELUActivation
from transformers.models.bert import modeling_bert
from transformers.models.distilbert import modeling_distilbert
from transformers.models.roberta import modeling_roberta

from distilbert_fast.engine import EncoderModules, LayerModules
from distilbert_fast.layers import Int8Linear, LayerNorm
from distilbert_fast.ops import _check

DistilBertModel = modeling_distilbert.DistilBertModel
BertModel, RobertaModel = modeling_bert.BertModel, modeling_roberta.RobertaModel
_KINDS = (DistilBertModel, BertModel, RobertaModel)


def find_encoder(model: Any, caller: str) -> PreTrainedModel:
    """The DistilBERT, BERT or RoBERTa encoder inside a model with or without a task head.

    Raises:
        TypeError, ValueError: ``model`` holds none, or one that computes something else: a decoder, cross
            attention, relative positions, an activation other than erf-GELU. By name, as ``caller``.
    """
    encoder = model.base_model if isinstance(model, PreTrainedModel) else None
    if not isinstance(encoder, _KINDS):
        given = type(model).__name__
        _check.refuse(caller, "model", "a DistilBERT, BERT or RoBERTa encoder", given, TypeError)
    config = encoder.config
    for name, expected in (("is_decoder", False), ("add_cross_attention", False), ("is_causal", False)):
        if getattr(config, name, expected):
            _check.refuse(caller, f"model.config.{name}", str(expected), getattr(config, name))
    positions = getattr(config, "position_embedding_type", None) or "absolute"
    if positions != "absolute":
        _check.refuse(caller, "model.config.position_embedding_type", "'absolute'", repr(positions))
    key = "activation" if isinstance(encoder, DistilBertModel) else "hidden_act"
    for layer in encoder_layers(encoder):
        activation = layer.ffn.activation if key == "activation" else layer.intermediate.intermediate_act_fn
        if (
            not isinstance(activation, (GELUActivation, nn.GELU))
            or getattr(activation, "approximate", "none") != "none"
        ):
            _check.refuse(caller, f"model.config.{key}", "'gelu'", repr(getattr(config, key)))
    return encoder


_CLASSIFIERS = tuple(
    getattr(module, f"{name}ForSequenceClassification")
    for module, name in ((modeling_distilbert, "DistilBert"), (modeling_bert, "Bert"), (modeling_roberta, "Roberta"))
)


def reads_first_token(kind: type) -> bool:
    """Whether models of this class read the encoder's output at position 0 alone."""
    ours = kind.__module__.startswith("distilbert_fast.") and issubclass(kind, _CLASSIFIERS)
    return ours or kind in _CLASSIFIERS


def encoder_layers(encoder: Any) -> nn.ModuleList:
    return encoder.transformer.layer if isinstance(encoder, DistilBertModel) else encoder.encoder.layer


def encoder_modules(encoder: Any, caller: str) -> EncoderModules:
    """The parts of an encoder that ``find_encoder`` found, under the names that ``Engine`` gives them.

    Raises:
        TypeError: a module is not one of transformers, torch or this package, or a layer is wrapped by an adapter
            or parametrized, so it may compute something else.
    """
    for name, module in encoder.named_modules():
        if type(module).__module__.split(".")[0] not in ("torch", "transformers", "distilbert_fast"):
            _check.refuse(caller, name or "model", "a module of transformers", _class(module), TypeError)
    embeddings, config = encoder.embeddings, encoder.config
    if isinstance(encoder, DistilBertModel):
        layers = [_distilbert_layer(layer, config.n_heads) for layer in encoder.transformer.layer]
    else:
        layers = [_bert_layer(layer, config.num_attention_heads) for layer in encoder.encoder.layer]
    for i, layer in enumerate(layers):
        for name, module in layer._asdict().items():
            allowed = _NORMS if name.endswith("norm") else _LINEARS
            if isinstance(module, nn.Module) and type(module) not in allowed:
                names = " or ".join(sorted({kind.__name__ for kind in allowed}, reverse=True))
                _check.refuse(caller, f"{name} of layer {i}", names, _class(module), TypeError)
    return EncoderModules(
        embeddings.word_embeddings,
        embeddings.position_embeddings,
        getattr(embeddings, "token_type_embeddings", None),
        embeddings.LayerNorm,
        layers,
        config.num_attention_heads,
        config.hidden_size // config.num_attention_heads,
        embeddings.padding_idx if isinstance(encoder, RobertaModel) else None,
    )


_LINEARS = (nn.Linear, Int8Linear)
_NORMS = (nn.LayerNorm, LayerNorm)


def _class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _distilbert_layer(layer: Any, num_heads: int) -> LayerModules:
    attention = layer.attention
    return LayerModules(
        attention.q_lin,
        attention.k_lin,
        attention.v_lin,
        attention.out_lin,
        layer.sa_layer_norm,
        layer.ffn.lin1,
        layer.ffn.lin2,
        layer.output_layer_norm,
        getattr(attention, "heads", tuple(range(num_heads))),  # fewer where distilbert_fast's own class was pruned
    )


def _bert_layer(layer: Any, num_heads: int) -> LayerModules:
    attention = layer.attention
    return LayerModules(
        attention.self.query,
        attention.self.key,
        attention.self.value,
        attention.output.dense,
        attention.output.LayerNorm,
        layer.intermediate.dense,
        layer.output.dense,
        layer.output.LayerNorm,
        tuple(range(num_heads)),
    )
