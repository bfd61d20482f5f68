"""Drop-in classes for transformers' DistilBERT: same names, parameters and files; padding is never computed.

    from distilbert_fast import DistilBertForSequenceClassification   # instead of: from transformers import …

Each class is transformers' own, with the modules inside its encoder turned into the subclasses of this file. So
checkpoints, config, heads, losses and everything built on them stay as they are, and these are new:

- ``head_mask`` (transformers 5 ignores it): [H], [L, H] or the older [L, 1 or B, H, 1, 1], with a gradient.
- ``prune_heads({layer: [heads]})`` (transformers 5 removed it): shrinks the weights, and what is left stands in the
  config (docs/formats.md), so that ``from_pretrained`` here and of transformers reads it back.
- ``keep_padding=True``: compute padded positions too.

Padded positions: their hidden states are 0, unless something may read them; then all are computed exactly as
transformers does. That is so with ``keep_padding=True``, ``output_attentions=True``, for question answering (its
softmax runs over every position), where a label counts a padded position, where a sequence starts with padding
(heads read position 0), for masks of four dimensions, and while somebody looks (``may_unpad``): a hook, a patched
forward or a replaced module inside the encoder, and whatever traces or transforms the call (``traced``), whose graph
must not depend on the data. Called one by one, the modules are transformers'.

``attn_implementation`` is accepted and, unless it names somebody's own, changes nothing but how padding is computed
where it is: else attention is the ``attention`` op, by the backend that serves it.
"""

# Annotations are objects here, as in transformers: its tools and others look at those of **kwargs.
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import DistilBertConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.distilbert import modeling_distilbert
from transformers.processing_utils import Unpack  # type: ignore[attr-defined]
from transformers.utils.generic import TransformersKwargs, merge_with_config_defaults
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY, capture_outputs

from distilbert_fast.layers import NO_PADDING, Padding, Tokens, labels_padding, token_mask, traced
from distilbert_fast.modeling import distilbert_modules as modules
from distilbert_fast.modeling.encoder import heads_left
from distilbert_fast.modeling.quantizer import record_structure
from distilbert_fast.modeling.readers import is_own_head
from distilbert_fast.modeling.structure import MODEL_NAME, LayerStructure, prune_heads, restructure, whole_class
from distilbert_fast.ops import _check

hf: Any = modeling_distilbert

__all__ = [
    "DistilBertForMaskedLM",
    "DistilBertForMultipleChoice",
    "DistilBertForQuestionAnswering",
    "DistilBertForSequenceClassification",
    "DistilBertForTokenClassification",
    "DistilBertModel",
]


class _DropIn(nn.Module):
    """Code that all drop-in classes share."""

    always_keep_padding = False
    if TYPE_CHECKING:  # no annotations of attributes: torch.jit reads them

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__(config)
        _adopt(self)
        model: Any = self
        settings: Any = getattr(config, "quantization_config", None)
        structure = getattr(settings, "structure", None)
        if structure is not None and model.device.type != "meta":  # what is loaded is shaped by who loads it
            restructure(model.base_model, [LayerStructure(tuple(layer["heads"]), layer["ffn"]) for layer in structure])
            if settings.is_float:
                record_structure(model)

    def prune_heads(self, heads_to_prune: Mapping[int, Sequence[int]]) -> None:
        """Remove attention heads from the weights of q_lin, k_lin, v_lin and out_lin.

        Args:
            heads_to_prune: {layer: heads}, by the numbers they had in the unpruned model; a head that is gone
                already is skipped. Later head masks and prunings keep those numbers too.

        Parameters are replaced, so make optimizers afterwards.

        Raises:
            ValueError: a layer or head that the config does not have.
            TypeError: a projection that is not a plain nn.Linear (quantized, or wrapped by an adapter).
        """
        model: Any = self
        prune_heads(model.base_model, heads_to_prune)
        record_structure(model)


class DistilBertModel(_DropIn, hf.DistilBertModel):
    """transformers' DistilBertModel, see the module's docstring for what is new."""

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
        keep_padding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput | tuple[torch.Tensor, ...]:
        """
        Args:
            input_ids: [B, T], or inputs_embeds [B, T, C]: exactly one of them.
            attention_mask: [B, T], 0 at padding, of any dtype; or [B or 1, H or 1, T or 1, T] as transformers makes it
                and takes it: bool, True where a query may attend, or a number to be added to each score. None: no
                padding.
            position_ids: [T] or [B or 1, T]; None counts from 0.
            head_mask: factor of each head, [H], [L, H] or [L, 1 or B, H, 1, 1].
            keep_padding: compute hidden states at padded positions as transformers does, instead of 0.
            kwargs: output_hidden_states, output_attentions and return_dict as in transformers, from the config
                where not given. Others, such as token_type_ids, are ignored, as there.

        Raises:
            TypeError, ValueError: an argument of the wrong type, shape or range, by name; ``is_causal=True``.
        """
        given = inputs_embeds if input_ids is None else input_ids
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("DistilBertModel: exactly one of input_ids and inputs_embeds must be given")
        asked: dict[str, Any] = dict(kwargs)
        if asked.get("is_causal"):
            _check.refuse(MODEL_NAME, "is_causal", "False, this is an encoder", True)
        if asked.get("output_attentions", getattr(self.config, "output_attentions", False)):
            asked["output_attentions"] = True
        if head_mask is not None:
            asked["head_mask"] = head_mask

        tokens = None
        if not traced(given):
            self._check_inputs(given, input_ids is not None, position_ids)
            if attention_mask is not None and getattr(attention_mask, "ndim", 0) != 4:
                attention_mask = token_mask(MODEL_NAME, attention_mask, *given.shape[:2]).to(given.device)
            if not asked.get("output_attentions") and modules.may_unpad(self):
                tokens = _tokens(attention_mask, given, keep_padding or self.always_keep_padding)
        if tokens is None:
            x = self.embeddings(input_ids, inputs_embeds, position_ids)  # [B, T, C]
            mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=x,
                attention_mask=attention_mask,
                allow_is_bidirectional_skip=attention_mask is None or not traced(x),  # else it looks for padding
            )
            return self.transformer(hidden_states=x, attention_mask=mask, **asked)

        if position_ids is None:
            position_ids = self.embeddings.position_ids[:, : tokens.length]
        positions = tokens.rows(position_ids.expand(tokens.batch, tokens.length))[None]  # [1, N]
        rows = tokens.rows(given)[None]  # [1, N] or [1, N, C]
        x = self.embeddings(*((rows, None) if inputs_embeds is None else (None, rows)), positions)  # [1, N, C]
        if asked.get("output_hidden_states", getattr(self.config, "output_hidden_states", False)):
            return self.transformer(tokens.padded(x[0]), tokens, **asked)  # [B, T, C] between blocks too
        x = self.transformer(x, tokens, **asked).last_hidden_state
        return BaseModelOutput(last_hidden_state=tokens.padded(x[0]))  # [B, T, C]

    def _check_inputs(self, given: torch.Tensor, are_ids: bool, position_ids: torch.Tensor | None) -> None:
        """Refuse ids and positions outside their tables."""
        argument = "input_ids" if are_ids else "inputs_embeds"
        if are_ids:
            _check.tensor(MODEL_NAME, argument, given, ("B", "T"), _INTEGERS)
            _in_range(argument, given, self._table_size("word_embeddings"))
        else:
            _check.tensor(MODEL_NAME, argument, given, ("B", "T", self.config.dim))
        batch, length = given.shape[:2]
        positions = self._table_size("position_embeddings")
        if position_ids is not None:
            shape = getattr(position_ids, "shape", ())
            _check.tensor(MODEL_NAME, "position_ids", position_ids, shape, _INTEGERS)
            fits = all(size in (1, wanted) for size, wanted in zip(reversed(shape), (length, batch), strict=False))
            if len(shape) > 2 or not fits:
                _check.refuse(MODEL_NAME, "position_ids", f"of shape [{batch} or 1, {length}]", list(shape))
            _in_range("position_ids", position_ids, positions)
        elif positions is not None and length > positions:
            _check.refuse(MODEL_NAME, argument, f"of at most {positions} positions (max_position_embeddings)", length)

    def _table_size(self, name: str) -> int | None:
        """None if another module has taken its place, since that may read anything."""
        return getattr(getattr(self.embeddings, name, None), "num_embeddings", None)


def _tokens(mask: torch.Tensor | None, given: torch.Tensor, keep_padding: bool) -> Tokens | None:
    """The real tokens of given [B, T, ...], or None where padding must be computed with them."""
    if mask is not None and mask.dim() != 2:
        return None
    padding = NO_PADDING if mask is None else Padding.around(mask)
    if not padding.none and (padding.left or keep_padding):
        return None
    mask = None if padding.none else mask
    return Tokens.unpadded(mask, given.shape[0], given.shape[1], given.device, padding.num_tokens)


_INTEGERS = (torch.int64, torch.int32)


def _in_range(argument: str, ids: torch.Tensor, size: int | None) -> None:
    if size is not None and ids.numel():
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= size:
            _check.refuse(MODEL_NAME, argument, f"in 0…{size - 1}", low if low < 0 else high)


_MODULES: dict[type[nn.Module], type[nn.Module]] = {
    hf.DistilBertModel: DistilBertModel,
    hf.Embeddings: modules.Embeddings,
    hf.Transformer: modules.Transformer,
    hf.TransformerBlock: modules.TransformerBlock,
    hf.DistilBertSelfAttention: modules.DistilBertSelfAttention,
    hf.FFN: modules.FFN,
}


def adopt(model: Any) -> None:
    """Make a model of one of transformers' classes in ``DROP_INS`` the drop-in of the same name, in place."""
    model.__class__ = DROP_INS[type(model)]
    _adopt(model)


def _adopt(model: Any) -> None:
    """Turn transformers' encoder and its modules into ours, in place, and prune as its config says.

    They have the same attributes, so changing the class is all it takes: no parameter is made twice.
    """
    encoder = model.base_model
    for module in encoder.modules():
        module.__class__ = _MODULES.get(whole_class(type(module)), type(module))
    _CAN_RECORD_REGISTRY[encoder] = encoder._can_record_outputs  # as in __init__ of the class that it was not made by
    encoder.always_keep_padding = model.always_keep_padding
    for block in encoder.transformer.layer:
        block.attention.heads = heads_left(block.attention)
    if pruned := getattr(model.config, "pruned_heads", None):  # as earlier versions wrote it
        prune_heads(encoder, {int(layer): heads for layer, heads in pruned.items()})  # JSON has only string keys
        record_structure(model)


class _Task(_DropIn):
    # Their losses are means over the batch; with True, the answer that transformers' Trainer infers from
    # **kwargs, it would not divide them by the number of accumulated batches.
    accepts_loss_kwargs = False


class _LabelPerToken(_Task):
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Any:
        asked: dict[str, Any] = dict(kwargs)
        if attention_mask is not None and not traced(attention_mask, labels) and not asked.get("keep_padding", False):
            counted = labels is not None and labels_padding(labels, attention_mask)
            model: Any = self
            asked["keep_padding"] = counted or not is_own_head(model, model.base_model)
        return super().forward(input_ids, attention_mask, inputs_embeds, labels, position_ids, **asked)


class DistilBertForMaskedLM(_LabelPerToken, hf.DistilBertForMaskedLM):
    __doc__ = hf.DistilBertForMaskedLM.__doc__


class DistilBertForSequenceClassification(_Task, hf.DistilBertForSequenceClassification):
    __doc__ = hf.DistilBertForSequenceClassification.__doc__


class DistilBertForQuestionAnswering(_Task, hf.DistilBertForQuestionAnswering):
    __doc__ = hf.DistilBertForQuestionAnswering.__doc__
    always_keep_padding = True


class DistilBertForTokenClassification(_LabelPerToken, hf.DistilBertForTokenClassification):
    __doc__ = hf.DistilBertForTokenClassification.__doc__


class DistilBertForMultipleChoice(_Task, hf.DistilBertForMultipleChoice):
    __doc__ = hf.DistilBertForMultipleChoice.__doc__


# transformers' classes, and ours of the same names.
DROP_INS: dict[type, type] = {getattr(hf, name): globals()[name] for name in __all__}
