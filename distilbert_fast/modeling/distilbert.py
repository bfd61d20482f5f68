"""Drop-in classes for transformers' DistilBERT: same names, parameters and files; padding is never computed.

    from distilbert_fast import DistilBertForSequenceClassification   # instead of: from transformers import …

Each class is transformers' own, with the modules inside its encoder turned into the subclasses of this file. So
checkpoints, config, heads, losses and everything built on them stay as they are, and these are new:

- ``head_mask`` (transformers 5 ignores it): [H], [L, H] or the older [L, 1 or B, H, 1, 1], with a gradient.
- ``prune_heads({layer: [heads]})`` (transformers 5 removed it): shrinks the weights and records itself in
  ``config.pruned_heads``, which ``from_pretrained`` here reads back.
- ``keep_padding=True``: compute padded positions too.

Padded positions: their hidden states are 0, unless something may read them; then all are computed exactly as
transformers does. That is so with ``keep_padding=True``, ``output_attentions=True``, for question answering (its
softmax runs over every position), where a label counts a padded position, where a sequence starts with padding
(heads read position 0), and under torch.compile, whose graph must not depend on the data.

``attn_implementation`` is accepted and changes nothing: attention is the ``attention`` op, by the backend that
serves it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import DistilBertConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.distilbert import modeling_distilbert

from distilbert_fast.layers import LayerNorm, Tokens, attend, token_mask
from distilbert_fast.modeling.heads import head_masks, prune
from distilbert_fast.ops import _check
from distilbert_fast.ops.embedding import embedding
from distilbert_fast.ops.linear import linear

hf: Any = modeling_distilbert  # whose annotations are for padded batches

__all__ = [
    "DistilBertForMaskedLM",
    "DistilBertForMultipleChoice",
    "DistilBertForQuestionAnswering",
    "DistilBertForSequenceClassification",
    "DistilBertForTokenClassification",
    "DistilBertModel",
]


class Embeddings(hf.Embeddings):
    def forward(self, words: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """ids [M], or vectors in their place [M, C], and positions [M] -> [M, C]."""
        word, position, norm = self.word_embeddings, self.position_embeddings, self.LayerNorm
        if not words.is_floating_point():
            tables = (word, position)
            if all(_plain(t, nn.Embedding) and _looks_up(t) for t in tables) and _plain(norm, LayerNorm):
                table = _WithoutRow.apply(word.weight, word.padding_idx)
                y = embedding(words, position_ids, table, position.weight, norm.weight, norm.bias, eps=norm.eps)
                return self.dropout(y)
            words = word(words)  # [M, C]
        return self.dropout(norm(words, position(position_ids)))


class _WithoutRow(torch.autograd.Function):
    """A table whose row ``padding_idx`` gets no gradient, as in nn.Embedding."""

    @staticmethod
    def forward(ctx: Any, table: torch.Tensor, padding_idx: int | None) -> torch.Tensor:
        ctx.padding_idx = padding_idx
        return table.view_as(table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.padding_idx is not None:
            gradient[ctx.padding_idx] = 0  # it is the op's own, made for this
        return gradient, None


class DistilBertSelfAttention(hf.DistilBertSelfAttention):
    heads: tuple[int, ...]  # the original numbers of the heads that are left

    def forward(
        self, x: torch.Tensor, tokens: Tokens, head_mask: torch.Tensor | None, probabilities: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = (x.shape[0], len(self.heads), self.attention_head_size)
        q, k, v = (_linear(module, x).view(shape) for module in (self.q_lin, self.k_lin, self.v_lin))  # [M, H, D]
        dropout_p = self.dropout.p if self.training else 0.0
        context, weights = attend(q, k, v, tokens, head_mask, dropout_p, probabilities)
        return _linear(self.out_lin, context.flatten(1)), weights


class TransformerBlock(hf.TransformerBlock):
    def forward(
        self, x: torch.Tensor, tokens: Tokens, head_mask: torch.Tensor | None, probabilities: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended, weights = self.attention(x, tokens, head_mask, probabilities)
        x = self.sa_layer_norm(attended, x)
        return self.output_layer_norm(self.ffn(x), x), weights


class FFN(hf.FFN):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [M, C] -> [M, C]
        rows = self.chunk_size_feed_forward
        if rows == 0 or x.shape[0] <= rows:
            return self.ff_chunk(x)
        return torch.cat([self.ff_chunk(chunk) for chunk in x.split(rows)])

    def ff_chunk(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(_linear(self.lin2, self.activation(_linear(self.lin1, x))))


def _linear(module: Any, x: torch.Tensor) -> torch.Tensor:
    """module(x), by the ``linear`` op if it may."""
    return linear(x, module.weight, module.bias) if _plain(module, nn.Linear) else module(x)


def _plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether calling it would run the forward of that class and nothing else, so that an op may take its place."""
    if torch.compiler.is_compiling() or type(module) is not kind:
        return False
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _looks_up(table: nn.Embedding) -> bool:
    """Whether that is all it does."""
    return table.max_norm is None and not table.scale_grad_by_freq and not table.sparse


class Transformer(hf.Transformer):
    def forward(
        self, x: torch.Tensor, tokens: Tokens, masks: Sequence[torch.Tensor | None], probabilities: bool
    ) -> tuple[list[torch.Tensor], tuple[torch.Tensor | None, ...]]:
        """Hidden states [M, C] before the first layer and after each; attention probabilities of each layer."""
        hidden_states, attentions = [x], []
        for block, head_mask in zip(self.layer, masks, strict=True):
            x, weights = block(x, tokens, head_mask, probabilities)
            hidden_states.append(x)
            attentions.append(weights)
        return hidden_states, tuple(attentions)


class DistilBertModel(hf.DistilBertModel):
    """transformers' DistilBertModel, see the module's docstring for what is new."""

    always_keep_padding = False

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__(config)
        _adopt(self)

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
        prune(self, heads_to_prune)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
        keep_padding: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutput | tuple[torch.Tensor, ...]:
        """
        Args:
            input_ids: [B, T], or inputs_embeds [B, T, C]: exactly one of them.
            attention_mask: [B, T], 0 at padding. None: no padding.
            position_ids: [B or 1, T]; None counts from 0.
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
        if kwargs.get("is_causal"):
            _check.refuse(_NAME, "is_causal", "False, this is an encoder", True)

        def flag(name: str) -> Any:
            value = kwargs.get(name)
            return getattr(self.config, name, False) if value is None else value

        static = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
        batch, length = self._check_inputs(given, input_ids is not None, position_ids, static)
        device = given.device
        mask = None if attention_mask is None else token_mask(_NAME, attention_mask, batch, length).to(device)
        kept_heads = [block.attention.heads for block in self.transformer.layer]
        masks = head_masks(head_mask, self.config.n_heads, kept_heads, batch, device)

        probabilities = bool(flag("output_attentions"))
        keep_padding = keep_padding or self.always_keep_padding
        if mask is not None and not static:
            no_padding, left_padding = torch.stack([mask.all(), (mask.any(1) & ~mask[:, :1].any(1)).any()]).tolist()
            mask = None if no_padding else mask
            keep_padding = keep_padding or left_padding
        if probabilities or static or (keep_padding and mask is not None):
            tokens = Tokens(batch, length, mask=mask)
        else:
            tokens = Tokens.packed(mask, batch, length, device)

        if position_ids is None:
            position_ids = torch.arange(length, device=device)[None]
        positions = tokens.rows(position_ids.expand(batch, length))  # [M]
        words = self.embeddings.word_embeddings
        if input_ids is not None and (words._forward_hooks or words._forward_pre_hooks):
            given = words(given)  # [B, T, C]: a hook, such as NEFTune's, finds what it finds in transformers
        x = self.embeddings(tokens.rows(given), positions)
        hidden_states, attentions = self.transformer(x, tokens, masks, probabilities)

        last = tokens.padded(hidden_states[-1])  # [B, T, C]
        states, selection = None, flag("output_hidden_states")
        if selection is not None and selection is not False:
            states = _select([*map(tokens.padded, hidden_states[:-1]), last], selection)
        output = BaseModelOutput(last, states, attentions if probabilities else None)
        return output if flag("return_dict") else output.to_tuple()

    def _check_inputs(
        self, given: torch.Tensor, are_ids: bool, position_ids: torch.Tensor | None, static: bool
    ) -> tuple[int, int]:
        """Refuse what would read outside a table; B and T."""
        positions = self.embeddings.position_embeddings.num_embeddings
        argument = "input_ids" if are_ids else "inputs_embeds"
        if are_ids:
            _check.tensor(_NAME, argument, given, ("B", "T"), _INTEGERS)
            if not static:
                _in_range(argument, given, self.embeddings.word_embeddings.num_embeddings)
        else:
            _check.tensor(_NAME, argument, given, ("B", "T", self.config.dim))
        batch, length = given.shape[:2]
        if position_ids is not None:
            _check.tensor(_NAME, "position_ids", position_ids, ("B", length), _INTEGERS)
            if position_ids.shape[0] not in (1, batch):
                _check.refuse(_NAME, "position_ids", f"of shape [{batch} or 1, {length}]", list(position_ids.shape))
            if not static:
                _in_range("position_ids", position_ids, positions)
        elif length > positions:
            _check.refuse(_NAME, argument, f"of at most {positions} positions (max_position_embeddings)", length)
        return batch, length


_NAME = "DistilBertModel"
_INTEGERS = (torch.int64, torch.int32)


def _in_range(argument: str, ids: torch.Tensor, size: int) -> None:
    if ids.numel():
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= size:
            _check.refuse(_NAME, argument, f"in 0…{size - 1}", low if low < 0 else high)


def _select(states: list[torch.Tensor], selection: Any) -> tuple[Any, ...]:
    """All states for True; for an index or a list of them (as transformers 5.23 takes) the others are None."""
    if selection is True:
        return tuple(states)
    wanted = {selection} if isinstance(selection, int) else set(selection)
    return tuple(x if i in wanted or i - len(states) in wanted else None for i, x in enumerate(states))


_MODULES: dict[type[nn.Module], type[nn.Module]] = {
    hf.DistilBertModel: DistilBertModel,
    hf.Embeddings: Embeddings,
    hf.Transformer: Transformer,
    hf.TransformerBlock: TransformerBlock,
    hf.DistilBertSelfAttention: DistilBertSelfAttention,
    hf.FFN: FFN,
    nn.LayerNorm: LayerNorm,
}


def adopt(model: Any) -> None:
    """Make a model of one of transformers' classes in ``DROP_INS`` the drop-in of the same name, in place."""
    model.__class__ = DROP_INS[type(model)]
    _adopt(model)


def _adopt(model: Any) -> None:
    """Turn the modules of transformers' encoder into those of this file, in place, and prune as its config says.

    They have the same attributes, so changing the class is all it takes: no parameter is made twice.
    """
    encoder = model.base_model
    for module in encoder.modules():
        module.__class__ = _MODULES.get(type(module), type(module))
    encoder.always_keep_padding = model.always_keep_padding
    for block in encoder.transformer.layer:
        block.attention.heads = tuple(range(model.config.n_heads))
    pruned = getattr(model.config, "pruned_heads", None) or {}
    if pruned:
        prune(encoder, {int(layer): heads for layer, heads in pruned.items()})  # JSON has only string keys


class _Task(nn.Module):
    """What the classes with a task head share."""

    distilbert: Any
    # Their losses are means over the batch; with True, the answer that transformers' Trainer infers from
    # **kwargs, it would not divide them by the number of accumulated batches.
    accepts_loss_kwargs = False

    always_keep_padding = False

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__(config)
        _adopt(self)

    def prune_heads(self, heads_to_prune: Mapping[int, Sequence[int]]) -> None:
        self.distilbert.prune_heads(heads_to_prune)

    prune_heads.__doc__ = DistilBertModel.prune_heads.__doc__


def _counts_padding(labels: torch.Tensor, attention_mask: torch.Tensor) -> bool:
    if labels.shape != attention_mask.shape:
        return False  # the model or its loss will refuse
    return bool((labels.ne(-100) & attention_mask.eq(0).to(labels.device)).any())


class _LabelPerToken(_Task):
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if labels is not None and attention_mask is not None and not torch.compiler.is_compiling():
            kwargs["keep_padding"] = kwargs.get("keep_padding", False) or _counts_padding(labels, attention_mask)
        return super().forward(input_ids, attention_mask, inputs_embeds, labels, position_ids, **kwargs)


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
