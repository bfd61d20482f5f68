"""The encoders of transformers that this package knows, and the names of their parts. No other module holds such names.

An architecture is in the table if its encoder computes what DistilBERT's, BERT's or RoBERTa's does by modules of one
of the three shapes below; tests/modeling/test_encoders.py compares every entry with transformers itself. Nothing of
transformers is imported here: classes are known by name and module, so a model of one imports no other.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

Heads = Mapping[str, Mapping[str, str]]

# What makes a layer, under the names of ``LayerModules``, and the function between the two halves of its feed-forward.
_DISTILBERT_LAYER = {
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "out": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "ffn_in": "ffn.lin1",
    "activation": "ffn.activation",
    "ffn_out": "ffn.lin2",
    "ffn_norm": "output_layer_norm",
}
_BERT_LAYER = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "ffn_in": "intermediate.dense",
    "activation": "intermediate.intermediate_act_fn",
    "ffn_out": "output.dense",
    "ffn_norm": "output.LayerNorm",
}
_WITHOUT_WEIGHTS = ("activation",)  # of the parts of a layer
# What makes the embeddings of all three shapes, under the names of ``EncoderModules``.
EMBEDDINGS = {
    "word": "embeddings.word_embeddings",
    "position": "embeddings.position_embeddings",
    "token_type": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
}
PROJECTION = "embeddings_project"  # of ELECTRA's, after the LayerNorm, to the width of the layers

# The modules of each head, by what they do there. "bias": holds the projection's bias under another name.
_COMMON = {"ForTokenClassification": {"classifier": "classifier"}, "ForQuestionAnswering": {"outputs": "qa_outputs"}}
_PRE_CLASSIFIER = {"pooler": "pre_classifier", "classifier": "classifier"}
_OUT_PROJ = {"pooler": "classifier.dense", "classifier": "classifier.out_proj"}
_DISTILBERT_HEADS: Heads = {
    "Model": {},
    "ForMaskedLM": {"transform": "vocab_transform", "norm": "vocab_layer_norm", "projection": "vocab_projector"},
    "ForSequenceClassification": _PRE_CLASSIFIER,
    "ForMultipleChoice": _PRE_CLASSIFIER,
    **_COMMON,
}
_ELECTRA_HEADS: Heads = {
    "Model": {},
    "ForMaskedLM": {
        "transform": "generator_predictions.dense",
        "norm": "generator_predictions.LayerNorm",
        "projection": "generator_lm_head",
        "bias": "generator_lm_head",
    },
    "ForSequenceClassification": _OUT_PROJ,
    "ForMultipleChoice": {"pooler": "sequence_summary.summary", "classifier": "classifier"},
    **_COMMON,
}


def _bert_heads(base: str) -> Heads:
    pooled = {"pooler": f"{base}.pooler.dense", "classifier": "classifier"}
    return {
        "Model": {"pooler": "pooler.dense"},
        "ForMaskedLM": {
            "transform": "cls.predictions.transform.dense",
            "norm": "cls.predictions.transform.LayerNorm",
            "projection": "cls.predictions.decoder",
            "bias": "cls.predictions",
        },
        "ForSequenceClassification": pooled,
        "ForMultipleChoice": pooled,
        **_COMMON,
    }


def _roberta_heads(base: str) -> Heads:
    return {
        "Model": {"pooler": "pooler.dense"},
        "ForMaskedLM": {
            "transform": "lm_head.dense",
            "norm": "lm_head.layer_norm",
            "projection": "lm_head.decoder",
            "bias": "lm_head",
        },
        "ForSequenceClassification": _OUT_PROJ,
        "ForMultipleChoice": {"pooler": f"{base}.pooler.dense", "classifier": "classifier"},
        **_COMMON,
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class Architecture:
    """The names that one architecture of transformers uses. Module names are dotted, relative to what holds them.

    Attributes:
        model_type: in its config.
        name: what people call it.
        shape: whose modules its layers and embeddings are: "DistilBERT", "BERT" or "RoBERTa".
        prefix: what the names of its classes begin with.
        module: where they are.
        heads: for each head, by what follows ``prefix`` in its class's name, its modules by what they do.
        pools_by: between the pooler and the classifier of a sequence: "relu", "tanh" or "gelu".
        output: what the encoder returns, of ``transformers.modeling_outputs``.
        vocabulary_activation: the module of the masked-LM head after "transform"; None: erf-GELU, whatever the config.
        vocabulary_transform: the module that makes "transform", activation and "norm" in one; None: there is none.
        after_padding: positions count from pad_token_id + 1, and only of other ids.
        layers: the encoder's list of layers.
        layer: the modules of a layer, under the names of ``LayerModules``, and "activation".
        activation: what the config calls that.
        inner_size: what the config calls the width of the feed-forward layer.
    """

    model_type: str
    name: str
    shape: str
    prefix: str
    module: str
    heads: Heads
    pools_by: str
    output: str = "BaseModelOutputWithPoolingAndCrossAttentions"
    vocabulary_activation: str | None = None
    vocabulary_transform: str | None = None
    after_padding: bool = False
    layers: str = "encoder.layer"
    layer: Mapping[str, str]
    activation: str = "hidden_act"
    inner_size: str = "intermediate_size"

    @property
    def linears_and_norms(self) -> dict[str, str]:
        """The modules of a layer that hold weights."""
        return {name: module for name, module in self.layer.items() if name not in _WITHOUT_WEIGHTS}

    def defines(self, kind: type) -> bool:
        """Whether a class is transformers' own of this architecture."""
        return kind.__module__ == self.module


def _module(package: str) -> str:
    return f"transformers.models.{package}.modeling_{package.rpartition('.')[2]}"


def _bert(model_type: str, name: str, prefix: str) -> Architecture:
    return Architecture(
        model_type=model_type,
        name=name,
        shape="BERT",
        prefix=prefix,
        module=_module(model_type),
        heads=_bert_heads(model_type),
        pools_by="tanh",
        vocabulary_activation="cls.predictions.transform.transform_act_fn",
        vocabulary_transform="cls.predictions.transform",
        layer=_BERT_LAYER,
    )


def _roberta(model_type: str, name: str, prefix: str, module: str, base: str = "roberta") -> Architecture:
    return Architecture(
        model_type=model_type,
        name=name,
        shape="RoBERTa",
        prefix=prefix,
        module=module,
        heads=_roberta_heads(base),
        pools_by="tanh",
        after_padding=True,
        layer=_BERT_LAYER,
    )


DISTILBERT = Architecture(
    model_type="distilbert",
    name="DistilBERT",
    shape="DistilBERT",
    prefix="DistilBert",
    module=_module("distilbert"),
    heads=_DISTILBERT_HEADS,
    pools_by="relu",
    output="BaseModelOutput",
    vocabulary_activation="activation",
    layers="transformer.layer",
    layer=_DISTILBERT_LAYER,
    activation="activation",
    inner_size="hidden_dim",
)
BERT = _bert("bert", "BERT", "Bert")
ROBERTA = _roberta("roberta", "RoBERTa", "Roberta", _module("roberta"))
ELECTRA = Architecture(
    model_type="electra",
    name="ELECTRA",
    shape="BERT",
    prefix="Electra",
    module=_module("electra"),
    heads=_ELECTRA_HEADS,
    pools_by="gelu",
    output="BaseModelOutputWithPastAndCrossAttentions",
    vocabulary_transform="generator_predictions",
    layer=_BERT_LAYER,
)
# By the model_type of their configs.
ARCHITECTURES = {
    architecture.model_type: architecture
    for architecture in (
        BERT,
        ROBERTA,
        DISTILBERT,
        _roberta("xlm-roberta", "XLM-RoBERTa", "XLMRoberta", _module("xlm_roberta")),
        _roberta("camembert", "CamemBERT", "Camembert", _module("camembert")),
        _roberta(
            "data2vec-text",
            "Data2VecText",
            "Data2VecText",
            "transformers.models.data2vec.modeling_data2vec_text",
            "data2vec_text",
        ),
        ELECTRA,
        _bert("ernie", "ERNIE", "Ernie"),
    )
}
SHAPES = tuple(dict.fromkeys(architecture.shape for architecture in ARCHITECTURES.values()))


def architecture_of(model: Any) -> Architecture | None:
    """That of a model, with any head or none, by the classes of transformers that it is or derives from."""
    kind: Any = type(model)
    return _of_class(kind)


@functools.cache
def _of_class(kind: Any) -> Architecture | None:
    return next((found for base in kind.__mro__ for found in ARCHITECTURES.values() if found.defines(base)), None)


def head_of(kind: type) -> tuple[Architecture, str] | None:
    """Architecture and head, as ``Architecture.heads`` names it, of a class that is or derives from one with such a
    head; "Model": the encoder itself."""
    for base in kind.__mro__:
        for found in ARCHITECTURES.values():
            head = base.__name__.removeprefix(found.prefix)
            if found.defines(base) and head in found.heads:
                return found, head
    return None


_CLASSIFIERS = {(known.module, f"{known.prefix}ForSequenceClassification") for known in ARCHITECTURES.values()}


def reads_first_token(model: Any, kind: type) -> bool:
    """Whether a model reads the encoder's output at position 0 alone.

    Args:
        kind: its class, before ``optimize``.
    """
    known, path = _reader(kind)
    if known is None or path is None:
        return known is not None
    reader = attrgetter(path)(model)  # its pooler or head, if that is transformers' own and nobody looks at it
    forward: Any = type(reader).forward
    hooks = reader._forward_hooks or reader._forward_pre_hooks
    return (
        known.defines(type(reader))
        and forward.__module__ == known.module
        and not hooks
        and "forward" not in vars(reader)
    )


@functools.cache
def _reader(kind: type) -> tuple[Architecture | None, str | None]:
    """The architecture of a class for sequences, and the module of it that reads the encoder's output, None if it does
    so itself. None twice for other classes: also for someone else's subclass, which may read more."""
    ours = kind.__module__.startswith("distilbert_fast.")
    if not any((base.__module__, base.__name__) in _CLASSIFIERS for base in (kind.__mro__ if ours else (kind,))):
        return None, None
    known, head = head_of(kind) or (None, "")
    return known, (known and known.heads[head]["pooler"].rpartition(".")[0]) or None


def reads_padding(model: Any) -> bool:
    """Whether the head of a model reads the encoder's output at padded positions too."""
    known, head = head_of(type(model)) or (None, "")
    if known is ELECTRA and head == "ForMultipleChoice":
        return bool(model.config.summary_type != "first")
    return head == "ForQuestionAnswering" or type(model).__name__.endswith("ForQuestionAnswering")


def first_position(config: Any) -> int:
    """The row of the position table that a sequence's first token reads."""
    known = ARCHITECTURES.get(getattr(config, "model_type", ""))
    return config.pad_token_id + 1 if known is not None and known.after_padding else 0


def longest_sequence(config: Any) -> int:
    """How many tokens a model has positions for."""
    return int(config.max_position_embeddings) - first_position(config)
