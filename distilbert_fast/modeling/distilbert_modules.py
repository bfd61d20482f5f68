"""The modules inside the drop-in classes' encoder, and when it may leave padding out.

Each is transformers' own with its signature, shapes and types: hidden states [B, T, C], a mask as transformers makes
it. Ops of ours serve where they compute the same. The encoder also calls its modules in an unpadded form, which nobody
else may see: hidden states [1, N, C] of the real tokens alone, and ``Tokens`` in place of the mask.

Shapes: B batch, T sequence, N tokens, C hidden, H heads, D head size.
"""

# Annotations are objects here, as in transformers: its tools and others look at those of **kwargs.
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2CLS
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.distilbert import modeling_distilbert
from transformers.processing_utils import Unpack  # type: ignore[attr-defined]
from transformers.utils.generic import TransformersKwargs

from distilbert_fast.embeddings import Int8Embedding
from distilbert_fast.layers import Tokens, head_masks, is_token, traced
from distilbert_fast.modeling.attention_interface import FUSED, attention_forward, eager_attention, is_known
from distilbert_fast.modeling.snapshot import is_patched
from distilbert_fast.modeling.structure import MODEL_NAME
from distilbert_fast.ops import _check
from distilbert_fast.ops.attention import attention
from distilbert_fast.ops.embedding import embedding
from distilbert_fast.ops.layer_norm import layer_norm
from distilbert_fast.ops.linear import linear
from distilbert_fast.sparse import LINEARS

hf: Any = modeling_distilbert


class Embeddings(hf.Embeddings):
    def forward(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        """ids [B, T], or vectors in their place [B, T, C], and positions broadcast to [B, T] -> [B, T, C]."""
        word, position, norm = self.word_embeddings, self.position_embeddings, self.LayerNorm
        tables = (word, position)
        plain = all(_plain(table, nn.Embedding) and _looks_up(table) for table in tables) and _affine(norm)
        if input_ids is None or traced(input_ids) or not plain:
            return super().forward(input_ids, inputs_embeds, position_ids)
        if position_ids is None:
            position_ids = self.position_ids[:, : input_ids.shape[1]]
        positions = position_ids.expand(input_ids.shape).flatten()  # [B·T]
        table = _WithoutRow.apply(word.weight, word.padding_idx)
        rows = embedding(input_ids.flatten(), positions, table, position.weight, norm.weight, norm.bias, eps=norm.eps)
        return self.dropout(rows.unflatten(0, input_ids.shape))


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
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor]:  # as transformers says
        """[B, T, C] -> [B, T, C], and probabilities [B, H, T, T] or None.

        ``head_mask``, [H] or [B, H], multiplies the probabilities of each head.
        """
        given: dict[str, Any] = dict(kwargs)
        head_mask = given.pop("head_mask", None)
        shape = (*hidden_states.shape[:-1], len(self.heads), self.attention_head_size)
        q, k, v = (_linear(lin, hidden_states).view(shape) for lin in (self.q_lin, self.k_lin, self.v_lin))
        dropout_p = self.dropout.p if self.training else 0.0
        if isinstance(attention_mask, Tokens):
            q, k, v = q[0], k[0], v[0]  # [N, H, D]
            where = attention_mask.cu_seqlens, head_mask, dropout_p, self.scaling, attention_mask.length or None
            context = attention(q, k, v, *where)[None]
            probabilities = None
        else:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
            attend, attention_mask = self._interface(attention_mask, given)
            context, probabilities = attend(
                self, q, k, v, attention_mask, dropout=dropout_p, scaling=self.scaling, **given
            )  # [B, T, H, D]
            if head_mask is not None:
                m = head_mask.to(context.dtype)[..., None, None]  # [H, 1, 1] or [B, H, 1, 1]
                context = context * m.movedim(-3, -2)
                if probabilities is not None:  # what is returned must be what was used: its gradient may be wanted
                    probabilities = probabilities * m
                    context = (probabilities @ v).transpose(1, 2)
        return _linear(self.out_lin, context.flatten(-2)), probabilities  # type: ignore[return-value]

    def _interface(self, mask: Any, given: dict[str, Any]) -> tuple[Any, Any]:
        """transformers' function for the attention of the config, and the mask in the form that it takes.

        Another one where probabilities are wanted and it has none; sdpa's for ours, which leaves padding out.
        """
        implementation, is_tensor = self.config._attn_implementation, isinstance(mask, torch.Tensor)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, hf.eager_attention_forward)
        if given.get("output_attentions") and function in FUSED and (is_tensor or mask is None):
            return eager_attention, mask
        if function is not attention_forward:
            return function, mask
        return sdpa_attention_forward, is_token(mask)[:, None, None, :] if is_tensor and mask.dim() == 2 else mask


class TransformerBlock(hf.TransformerBlock):
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """[B, T, C] -> [B, T, C]."""
        tokens: Any = attention_mask if isinstance(attention_mask, Tokens) else None
        # Hidden states that the caller wants are [B, T, C] between blocks, and so lie on the gradient's path.
        between = tokens is not None and hidden_states.shape[:2] == (tokens.batch, tokens.length)
        x = tokens.rows(hidden_states)[None] if between else hidden_states
        attended, _ = self.attention(x, attention_mask=attention_mask, **kwargs)
        x = _add_and_norm(self.sa_layer_norm, attended, x)
        x = _add_and_norm(self.output_layer_norm, self.ffn(x), x)
        return tokens.padded(x[0]) if between else x


class FFN(hf.FFN):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[B, T, C] -> [B, T, C]."""
        rows, dim = self.chunk_size_feed_forward, self.seq_len_dim
        if rows == 0 or input.shape[dim] <= rows:
            return self.ff_chunk(input)
        return torch.cat([self.ff_chunk(chunk) for chunk in input.split(rows, dim)], dim)

    def ff_chunk(self, input: torch.Tensor) -> torch.Tensor:
        return self.dropout(_linear(self.lin2, self.activation(_linear(self.lin1, input))))


class Transformer(hf.Transformer):
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """[B, T, C] -> the last layer's output [B, T, C]. ``head_mask``: as for the model."""
        given: dict[str, Any] = dict(kwargs)
        head_mask = given.pop("head_mask", None)
        masks: Any = [None] * len(self.layer)
        if head_mask is not None:
            batch = attention_mask.batch if isinstance(attention_mask, Tokens) else hidden_states.shape[0]
            masks = self._masks(head_mask, batch, hidden_states.device)
        for block, mask in zip(self.layer, masks, strict=True):
            masked = given if mask is None else {**given, "head_mask": mask}
            hidden_states = block(hidden_states, attention_mask, **masked)
        return BaseModelOutput(last_hidden_state=hidden_states)

    def _masks(self, head_mask: Any, batch: int, device: torch.device) -> list[torch.Tensor | None]:
        for index, block in enumerate(self.layer):
            attention = getattr(block, "attention", None)
            for module, kind in ((block, TransformerBlock), (attention, DistilBertSelfAttention)):
                if not isinstance(module, kind):
                    expected = f"None, since {type(module).__name__} in layer {index} may ignore it"
                    _check.refuse(MODEL_NAME, "head_mask", expected, type(head_mask).__name__)
        kept = [block.attention.heads for block in self.layer]
        heads = self.layer[0].attention.config.n_heads if kept else 0
        return head_masks(MODEL_NAME, head_mask, heads, kept, device, batch)


def _linear(module: Any, x: torch.Tensor) -> torch.Tensor:
    """module(x), by the ``linear`` op if it may."""
    return linear(x, module.weight, module.bias) if _plain(module, nn.Linear) and not traced(x) else module(x)


def _add_and_norm(norm: Any, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """norm(x + residual), by the ``layer_norm`` op if it may."""
    if traced(x) or not _affine(norm):
        return norm(x + residual)
    rows, residual_rows = (part.reshape(-1, part.shape[-1]) for part in (x, residual))
    return layer_norm(rows, norm.weight, norm.bias, residual_rows, norm.eps).view(x.shape)


# When padding may be left out ------------------------------------------------------------------------------


def may_unpad(encoder: Any) -> bool:
    """Whether nothing of the user's reads or changes the values that the modules of an encoder pass on.

    That is so where each computes row by row in a forward known here, none is compiled or has a hook that looks, and
    attention is one of transformers' or ours.
    """
    return (
        not any(_GLOBAL_HOOKS)
        and is_known(encoder.config._attn_implementation)
        and all(_unobserved(module) for module in encoder.modules() if module is not encoder)
        and not any(block.attention.is_causal for block in encoder.transformer.layer)
    )


_HOOKS = ("forward", "forward_pre", "backward", "backward_pre")
_GLOBAL_HOOKS = tuple(getattr(nn.modules.module, f"_global_{kind}_hooks") for kind in _HOOKS)
_ACTIVATIONS: list[Any] = [entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()]
# Classes that compute each row on its own, or know what unpadded rows are, and their forward as it is meant.
_FORWARDS: dict[type, Any] = {
    kind: kind.forward
    for kind in (
        Embeddings,
        Transformer,
        TransformerBlock,
        DistilBertSelfAttention,
        FFN,
        *LINEARS,
        Int8Embedding,
        nn.Dropout,
        nn.Embedding,
        nn.Identity,
        nn.LayerNorm,
        nn.ModuleDict,
        nn.ModuleList,
        nn.ParameterDict,
        *_ACTIVATIONS,
    )
}
# What others put in, which computes each row on its own too or looks at none.
_BLIND = {
    ("peft.tuners.lora.layer", "Linear"),
    ("distilbert_fast.compression.lsq", "LsqLinear"),
    ("distilbert_fast.compression.qat", "SharingLinear"),
    ("transformers.utils.output_capturing", "output_capturing_hook"),
    ("transformers.modeling_utils", "make_inputs_require_grads"),
    ("accelerate.hooks", "AlignDevicesHook"),
}


def is_blind(thing: Any) -> bool:
    """Whether a class or hook is one of others that computes each row on its own too, or looks at none."""
    return (getattr(thing, "__module__", None), getattr(thing, "__name__", None)) in _BLIND


def _unobserved(module: nn.Module) -> bool:
    """Whether calling it computes rows as its class does, known here, and shows them to nobody."""
    kind = type(module)
    known = is_blind(kind) if kind not in _FORWARDS else _FORWARDS[kind] is kind.forward
    return (
        known
        and module._compiled_call_impl is None
        and not (module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
        and all(map(is_blind, module._forward_hooks.values()))
        and (not is_patched(module) or is_blind(type(getattr(module, "_hf_hook", None))))
        and all(parameter is None or type(parameter) is nn.Parameter for parameter in module._parameters.values())
    )


def _plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling it would run the forward of that class and nothing else, so that an op may take its place."""
    hooked = module._forward_hooks or any(_GLOBAL_HOOKS)
    return type(module) is kind and not hooked and not is_patched(module) and _unobserved(module)


def _affine(norm: Any) -> bool:
    """Whether it is a LayerNorm over the last dimension as the op knows it."""
    plain = _plain(norm, nn.LayerNorm) and len(norm.normalized_shape) == 1
    return plain and norm.weight is not None and norm.bias is not None


def _looks_up(table: nn.Embedding) -> bool:
    """Whether the module does nothing else."""
    return table.max_norm is None and not table.scale_grad_by_freq and not table.sparse
