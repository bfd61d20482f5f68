"""The encoders of transformers that this package knows, and the names of their parts. No other module holds such names.

An architecture is in the table if its encoder computes what DistilBERT's, BERT's or RoBERTa's does, by modules named as
below; tests/modeling/test_encoders.py compares every entry with transformers itself. Nothing of transformers is
imported here: classes are known by name and module, so a model of one imports no other.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
# What makes the embeddings of all, under the names of ``EncoderModules``.
EMBEDDINGS = {
    "word": "embeddings.word_embeddings",
    "position": "embeddings.position_embeddings",
    "token_type": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
}
_LIBRARIES = ("torch", "transformers", "distilbert_fast")
CALLS = ("__call__", "_call_impl", "forward")  # by which every module is called
# The methods by which an encoder and the modules inside compute. Somebody may put others in their places.
COMPUTING_METHODS = (
    *CALLS,
    "_create_attention_masks",
    "feed_forward_chunk",
    "ff_chunk",
    "create_position_ids_from_input_ids",
    "create_position_ids_from_inputs_embeds",
)
# The names by which modules inside an encoder read tensors. One may be no parameter and no buffer, but an attribute.
TENSORS = ("weight", "bias", "weight_scale", "values", "position_ids", "token_type_ids")
PROJECTION = "embeddings_project"  # of ELECTRA's, after the LayerNorm, to the width of the layers


def _heads(pooler: str | None, lm: Sequence[str], sequence: Sequence[str], choice: Sequence[str]) -> Heads:
    """For each head, by what follows the prefix in its class's name, its modules by what they do there.

    Args:
        pooler: of the encoder itself.
        lm: of masked LM: "transform", "norm" and "projection"; "bias" holds the projection's under another name.
        sequence, choice: of classification and of multiple choice: "pooler" and "classifier".
    """
    return {
        "Model": {} if pooler is None else {"pooler": pooler},
        "ForMaskedLM": dict(zip(("transform", "norm", "projection", "bias"), lm, strict=False)),
        "ForSequenceClassification": dict(zip(("pooler", "classifier"), sequence, strict=True)),
        "ForMultipleChoice": dict(zip(("pooler", "classifier"), choice, strict=True)),
        "ForTokenClassification": {"classifier": "classifier"},
        "ForQuestionAnswering": {"outputs": "qa_outputs"},
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class Architecture:
    """The names that one architecture of transformers uses. Module names are dotted, relative to what holds them.

    Attributes:
        model_type: in its config.
        name: what people call it.
        prefix: what the names of its classes begin with.
        package: where they are, in ``transformers.models``.
        heads: see ``_heads``.
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
    prefix: str
    package: str
    heads: Heads
    pools_by: str = "tanh"
    output: str = "BaseModelOutputWithPoolingAndCrossAttentions"
    vocabulary_activation: str | None = None
    vocabulary_transform: str | None = None
    after_padding: bool = False
    layers: str = "encoder.layer"
    layer: Mapping[str, str] = field(default_factory=lambda: _BERT_LAYER)
    activation: str = "hidden_act"
    inner_size: str = "intermediate_size"

    @property
    def linears_and_norms(self) -> dict[str, str]:
        """The modules of a layer that hold weights."""
        return {name: module for name, module in self.layer.items() if name != "activation"}

    @property
    def module(self) -> str:
        return f"transformers.models.{self.package}"

    def defines(self, kind: type) -> bool:
        """Whether a class is transformers' own of this architecture."""
        return kind.__module__ == self.module


def _bert(model_type: str, name: str, prefix: str) -> Architecture:
    pooled = (f"{model_type}.pooler.dense", "classifier")
    transform = "cls.predictions.transform"
    lm = (f"{transform}.dense", f"{transform}.LayerNorm", "cls.predictions.decoder", "cls.predictions")
    return Architecture(
        model_type=model_type,
        name=name,
        prefix=prefix,
        package=f"{model_type}.modeling_{model_type}",
        heads=_heads("pooler.dense", lm, pooled, pooled),
        vocabulary_activation=f"{transform}.transform_act_fn",
        vocabulary_transform=transform,
    )


def _roberta(model_type: str, name: str, prefix: str, package: str, base: str = "roberta") -> Architecture:
    lm = ("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head")
    return Architecture(
        model_type=model_type,
        name=name,
        prefix=prefix,
        package=package,
        heads=_heads("pooler.dense", lm, _OUT_PROJ, (f"{base}.pooler.dense", "classifier")),
        after_padding=True,
    )


_OUT_PROJ = ("classifier.dense", "classifier.out_proj")
_PRE_CLASSIFIER = ("pre_classifier", "classifier")
_PREDICTIONS = "generator_predictions"
DISTILBERT = Architecture(
    model_type="distilbert",
    name="DistilBERT",
    prefix="DistilBert",
    package="distilbert.modeling_distilbert",
    heads=_heads(None, ("vocab_transform", "vocab_layer_norm", "vocab_projector"), _PRE_CLASSIFIER, _PRE_CLASSIFIER),
    pools_by="relu",
    output="BaseModelOutput",
    vocabulary_activation="activation",
    layers="transformer.layer",
    layer=_DISTILBERT_LAYER,
    activation="activation",
    inner_size="hidden_dim",
)
BERT = _bert("bert", "BERT", "Bert")
ROBERTA = _roberta("roberta", "RoBERTa", "Roberta", "roberta.modeling_roberta")
ELECTRA = Architecture(
    model_type="electra",
    name="ELECTRA",
    prefix="Electra",
    package="electra.modeling_electra",
    heads=_heads(
        None,
        (f"{_PREDICTIONS}.dense", f"{_PREDICTIONS}.LayerNorm", "generator_lm_head", "generator_lm_head"),
        _OUT_PROJ,
        ("sequence_summary.summary", "classifier"),
    ),
    pools_by="gelu",
    output="BaseModelOutputWithPastAndCrossAttentions",
    vocabulary_transform=_PREDICTIONS,
)
# By the model_type of their configs.
ARCHITECTURES = {
    architecture.model_type: architecture
    for architecture in (
        BERT,
        ROBERTA,
        DISTILBERT,
        _roberta("xlm-roberta", "XLM-RoBERTa", "XLMRoberta", "xlm_roberta.modeling_xlm_roberta"),
        _roberta("camembert", "CamemBERT", "Camembert", "camembert.modeling_camembert"),
        _roberta("data2vec-text", "Data2VecText", "Data2VecText", "data2vec.modeling_data2vec_text", "data2vec_text"),
        ELECTRA,
        _bert("ernie", "ERNIE", "Ernie"),
    )
}


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


def is_of_library(function: Any) -> bool:
    """Whether a function is one of torch, transformers or this package, by the module whose globals it uses: what
    ``functools.wraps`` says of one is only what it stands for."""
    home: str = getattr(function, "__globals__", {}).get("__name__", function.__module__)
    return home.split(".")[0] in _LIBRARIES


@functools.cache
def first_token_reader(kind: type) -> tuple[Architecture | None, str | None]:
    """The architecture of a class for sequences, and the module of it that reads the encoder's output, None if it does
    so itself. None twice for other classes: also for someone else's subclass, which may read more."""
    known, head = head_of(kind) or (None, "")
    if known is None or head != "ForSequenceClassification":
        return None, None
    plain = known.defines(kind) and kind.__name__ == f"{known.prefix}{head}"
    if not (plain or kind.__module__.startswith("distilbert_fast.")):
        return None, None
    return known, known.heads[head]["pooler"].rpartition(".")[0] or None


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
