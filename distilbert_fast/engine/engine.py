"""A transformer encoder packed for inference: weights laid out once, one call per batch.

    ids [B, T] → unpad once → embedding → per layer: QKV → attention → out → LayerNorm(+x)
                                                     → FFN in, GELU → FFN out → LayerNorm(+x) → x [N, C]

Only the N real tokens are computed. On a CPU one call of the C++ encoder (native_encoder.py) does it all; elsewhere,
and for what that does not take, ops do it step by step (op_encoder.py), on a GPU captured as graphs (cuda_graphs.py).

Shapes: B batch, T sequence, N tokens, L layers, C hidden, H heads, D head size, F feed-forward, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from distilbert_fast import backends
from distilbert_fast.engine.cuda_graphs import GRAPHS, Graphs, Layout
from distilbert_fast.engine.native_encoder import PackedEncoder, Room, Shape, pack_linear, static_linear
from distilbert_fast.engine.op_encoder import OpEncoder
from distilbert_fast.engine.weights import OP, PRECISIONS, EncoderModules, Layer, LayerModules, pack_layer
from distilbert_fast.layers import Int8Linear, Tokens, token_mask
from distilbert_fast.ops import _check
from distilbert_fast.ops._rows import TINY, parameter

__all__ = ["GRAPHS", "PRECISIONS", "Encoded", "EncoderModules", "Engine", "LayerModules"]


class Encoded(NamedTuple):
    """Hidden states in the dtype of the embeddings, 0 at padded positions unless these were asked for."""

    last: torch.Tensor  # [B, T, C]; [B, 1, C] of the first tokens if only those were asked for
    hidden_states: tuple[torch.Tensor, ...]  # L + 1 times [B, T, C] if asked for, else empty


class Engine:
    """An encoder's packed weights. Immutable and thread-safe: a call changes nothing in it that can be seen.

    Args:
        packed: for the C++ encoder, if that takes the model.
        model, precision, masks: what ops need to pack it on their own.
        scales: for each layer, of what ops quantize for out and ffn_out; None: each token finds its own.
        graphs: how many CUDA graphs are kept.
    """

    def __init__(
        self,
        packed: PackedEncoder | None,
        model: EncoderModules | None = None,
        precision: str | None = None,
        masks: Sequence[torch.Tensor | None] = (),
        scales: Sequence[tuple[torch.Tensor | None, torch.Tensor | None]] = (),
        graphs: int = GRAPHS,
    ) -> None:
        self.packed = packed
        self._model, self._precision, self._masks, self._scales = model, precision, masks, scales
        self._ops: OpEncoder | None = None
        self._graph_count = graphs
        self.graphs: Graphs | None = None  # where it runs on a GPU
        self._lock = threading.Lock()
        if packed is not None:
            self.num_heads, self.padding_idx = packed.shape.num_heads, packed.shape.padding_idx
            self.word, self.position = packed.tensors["word"], packed.tensors["position"]
            self.token_type = packed.tensors.get("token_type")
            self.heads: tuple[tuple[int, ...], ...] = packed.shape.heads
        else:
            ops, modules = self._op_encoder(), self._modules()
            self.num_heads, self.padding_idx = modules.num_heads, modules.padding_idx
            self.word, self.position, self.token_type = ops.word, ops.position, ops.token_type
            self.heads = tuple(layer.heads for layer in ops.layers)

    @classmethod
    @torch.no_grad()
    def from_model(
        cls,
        model: EncoderModules,
        precision: str | None = None,
        head_mask: torch.Tensor | None = None,
        graphs: int = GRAPHS,
    ) -> Engine:
        """Pack a model.

        Args:
            model: its modules.
            precision: "fp32", "bf16" or "fp16": the dtype of the linear layers, attention and what flows
                between them; "int8": linear layers with int8 codes, one scale a weight row and a token, and
                between them the dtype of the model. None: as the model is. On a CPU, what flows between layers
                is float32 also for "bf16", unless the processor multiplies bfloat16 by itself (AMX).
            head_mask: a fixed factor for each head, [H] or [L, H]. A head with factor 0 is left out of the
                weights: its columns of QKV and its rows of the output projection.
            graphs: how many CUDA graphs are kept for calls on a GPU; 0 = none, every kernel is launched from the host.
                See cuda_graphs.py for what bounds their memory.

        Raises:
            TypeError, ValueError: an unknown precision; a number of graphs below 0; "fp32", "bf16" or "fp16" for a
                model that holds int8 codes; query, key and value of a layer partly int8; a head mask of another
                shape.
        """
        if precision is not None:
            _check.choice(OP, "precision", precision, tuple(PRECISIONS))
        if not isinstance(graphs, int) or graphs < 0:
            _check.refuse(OP, "graphs", "a number from 0 on", graphs)
        heads = [layer.heads for layer in model.layers]
        masks = _head_masks(head_mask, model.num_heads, heads, model.word.weight.device)
        return cls(_pack(model, precision, masks), model, precision, masks, graphs=graphs)

    @classmethod
    def load(cls, path: str | Path, verify: bool | None = None) -> Engine:
        """Map a file that ``save`` wrote into memory, ready to run on a CPU. Processes that map it share its memory.

        Do not shorten or overwrite the file while it is mapped: that changes what the engine computes, or ends the
        process with SIGBUS. ``save`` does neither: it puts a new file in the place of the old one, and engines that are
        already loaded keep the old one.

        Args:
            path: a regular file.
            verify: compare the tensors with the file's checksum, which reads all of it: 10 ms for DistilBERT-base in
                int8 (138 MB, EPYC, one core) if it is in the page cache, else what the disk takes. None: for files
                below 1 GB. The header is always compared. Files of earlier versions have no checksum: only their
                sizes, dtypes and settings are checked, and True refuses them.

        Raises:
            FileError: a ValueError that names the file: it is not such a file or one of another format, it is damaged,
                or its parts contradict each other.
            OSError: there is no such file, or it may not be read.
            ImportError: the native module is not built.
        """
        return cls(PackedEncoder.load(path, verify))

    def save(self, path: str | Path) -> None:
        """Write the packed weights, tables included, to a safetensors file with a checksum.

        It is written beside its place, flushed to disk and renamed: an old file stays whole until the new one
        is, and engines that have mapped it keep using it.

        Raises:
            ValueError: the model was packed for ops alone (on a GPU, or in a dtype that the C++ encoder lacks).
            OSError: the disk is full or cannot be written; it names the file, and an old one is as it was.
        """
        if self.packed is None:
            _check.refuse(OP, "model", "one that the C++ encoder takes, to be saved", "another")
        self.packed.save(path)

    def calibrated(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> Engine:
        """The same int8 weights with static scales for what attention and GELU put out, by the largest values seen.

        Args:
            batches: arguments of ``encode``: input_ids and, where there is padding, attention_mask.

        Raises:
            ValueError: no batch; an engine that is not int8, or that only ops can run.
        """
        packed, model = self.packed, self._model
        if packed is None:
            return self._calibrated_ops(batches)
        if model is None or packed.shape.precision != "int8":
            _check.refuse(OP, "model", "an int8 one, not from a file, to be calibrated", "another")
        dynamic = _pack(model, self._precision, self._masks) if any(map(any, packed.shape.scales)) else packed
        assert dynamic is not None
        largest = packed.largest()
        _feed(batches, lambda given: dynamic.run(**given, largest=largest), largest)
        scales: list[tuple[float, float]] = []
        tensors: dict[str, torch.Tensor] = {}
        for i, layer in enumerate(model.layers):
            seen = largest[i].split([largest.shape[1] - packed.shape.ffn, packed.shape.ffn])
            linear: Any = layer.ffn_out
            weight = linear.weight.detach()
            if weight.dtype == torch.int8:
                weight = weight[0] * linear.weight_scale[:, None]
            blob, scale, factors = static_linear(weight, linear.bias, seen[1])
            tensors |= {f"{i}.ffn_out": blob, f"{i}.ffn_factors": factors}
            scales.append((float(seen[0].amax()) / 127 if self.heads[i] else 0.0, scale))
        return Engine(packed.with_scales(scales, tensors), model, self._precision, self._masks)

    def _calibrated_ops(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> Engine:
        """The same for ops: int8 attention and GELU results of a layer get one scale for all channels."""
        dynamic = Engine(None, self._modules(), self._precision, self._masks, graphs=0)
        if not any(linear.scale is not None for layer in dynamic.layers for linear in (layer.out, layer.ffn_out)):
            _check.refuse(OP, "model", "an int8 one, not from a file, to be calibrated", "another")
        largest = torch.zeros(len(dynamic.layers), 2, device=self.word.device)
        _feed(batches, lambda given: dynamic._run_ops(**given, largest=largest), largest)
        scales = [
            (
                context if layer.out.scale is not None else None,
                gelu if layer.ffn_in.scale is not None and layer.ffn_out.scale is not None else None,
            )
            for layer, (context, gelu) in zip(dynamic.layers, (largest / 127).clamp(min=TINY), strict=True)
        ]
        return Engine(None, self._model, self._precision, self._masks, scales, self._graph_count)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers as ops read them."""
        return self._op_encoder().layers

    def _modules(self) -> EncoderModules:
        if self._model is None:
            raise backends.BackendError(f"{OP}: a loaded engine runs by backend 'cpu', {backends.forced()!r} is forced")
        return self._model

    @torch.no_grad()
    def _op_encoder(self) -> OpEncoder:
        """The encoder that computes op by op, packed when it is first needed."""
        with self._lock:
            if self._ops is None:
                model = self._modules()
                layers = [
                    pack_layer(layer, model.head_dim, self._precision, mask)
                    for layer, mask in zip(model.layers, self._masks, strict=True)
                ]
                for i, (context, gelu) in enumerate(self._scales):
                    layers[i] = layers[i]._replace(context_scale=context, gelu_scale=gelu)
                dtype = None if self._precision is None else PRECISIONS[self._precision]
                self._ops = OpEncoder(model, layers, dtype or model.word.weight.dtype)
                if model.word.weight.is_cuda and self._graph_count > 0:
                    self.graphs = Graphs(self._ops, self._graph_count)
            return self._ops

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The last hidden state [B, T, C] that ``encode`` finds."""
        return self.encode(input_ids, attention_mask, token_type_ids, position_ids, head_mask).last

    @torch.no_grad()
    def encode(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
        hidden_states: bool = False,
        rows: str = "all",
        num_tokens: int | None = None,
        padding: bool = False,
    ) -> Encoded:
        """Run the encoder on the real tokens of a batch.

        Args:
            input_ids: int64 or int32 [B, T].
            attention_mask: [B, T], 0 = padding, anywhere in its row. None: no padding. May be on the CPU for ids on a
                GPU: the host then need not wait to learn how many tokens there are.
            token_type_ids: [B or 1, T]; None is 0 everywhere. Only for a model that has token types.
            position_ids: [B or 1, T]; None counts from 0, or as RoBERTa counts.
            head_mask: factor of each head, [H] or [L, H], on top of the one the model was packed with.
            hidden_states: also return the embeddings and the output of each layer.
            rows: "all", or "first" for each sequence's first token alone, as classifiers read it: the last layer
                computes little else.
            num_tokens: how many positions attention_mask counts, if known: the host then need not wait either.
            padding: compute padded positions too, as transformers does: their queries meet the keys of the tokens. Not
                with rows "first".

        Raises:
            TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, by name.
        """
        device = self.word.device
        _check.tensor(OP, "input_ids", input_ids, ("B", "T"), (torch.int64, torch.int32), device)
        batch, length = input_ids.shape
        if attention_mask is not None:
            elsewhere = getattr(attention_mask, "is_cpu", False)
            _check.tensor(OP, "attention_mask", attention_mask, (batch, length), _MASKS, None if elsewhere else device)
        _check.choice(OP, "rows", rows, ("all", "first"))
        first = rows == "first"
        if first and hidden_states:
            _check.refuse(OP, "hidden_states", "False where only the first rows are wanted", hidden_states)
        if first and padding:
            _check.refuse(OP, "padding", "False where only the first rows are wanted", padding)
        padding = padding and attention_mask is not None
        for name, ids in (("position_ids", position_ids), ("token_type_ids", token_type_ids)):
            if ids is not None:
                _check_broadcast(name, ids, input_ids)
        if token_type_ids is not None and self.token_type is None:
            _check.refuse(OP, "token_type_ids", "None, this model has no token types", "a tensor")
        if position_ids is None and self.padding_idx is None and length > self.position.shape[0]:
            _check.refuse(OP, "input_ids", f"at most {self.position.shape[0]} tokens long", length)
        masks = _head_masks(head_mask, self.num_heads, self.heads, device)
        given = (input_ids, attention_mask, token_type_ids, position_ids)
        if self.packed is not None and backends.forced() in (None, "cpu"):
            states = self.packed.run(*given, masks, hidden_states, padding=padding)
            if first:
                states = [_first_rows(states[-1], attention_mask)]
        else:
            states = self._run_ops(*given, masks, hidden_states, first, num_tokens, padding=padding)
        return Encoded(states[-1], tuple(states) if hidden_states else ())

    def _run_ops(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        masks: Sequence[torch.Tensor | None] | None = None,
        hidden_states: bool = False,
        first: bool = False,
        num_tokens: int | None = None,
        largest: torch.Tensor | None = None,
        padding: bool = False,
    ) -> list[torch.Tensor]:
        ops = self._op_encoder()
        batch, length = input_ids.shape
        device = input_ids.device
        keys = (
            token_mask(OP, attention_mask, batch, length).to(device) if padding and attention_mask is not None else None
        )
        tokens = Tokens.unpadded(None if padding else attention_mask, batch, length, device, num_tokens)
        ids = tokens.rows(input_ids)  # [N]

        def layout() -> Layout:
            if position_ids is not None:
                positions = position_ids.expand(batch, length)
            elif self.padding_idx is not None:
                real = input_ids != self.padding_idx
                positions = real.cumsum(dim=1) * real + self.padding_idx
            else:
                positions = torch.arange(length, device=input_ids.device).expand_as(input_ids)
            types = None
            if self.token_type is not None:
                given = token_type_ids is not None
                types = tokens.rows(token_type_ids.expand(batch, length)) if given else torch.zeros_like(ids)
            assert tokens.cu_seqlens is not None
            return Layout(tokens.rows(positions), types, tokens.cu_seqlens)

        plain = not (hidden_states or padding) and largest is None and all(mask is None for mask in masks or ())
        if plain and self.graphs is not None and self.graphs.take(ids.shape[0]):
            by_shape = attention_mask is None and token_type_ids is None and position_ids is None
            by_shape = by_shape and self.padding_idx is None
            states = [self.graphs.run(ids, batch, layout, first, (batch, length) if by_shape else None)]
        else:
            states = ops.run(ids, *layout(), masks, hidden_states, first, largest, keys)
        return [state[:, None] if first else tokens.padded(state) for state in states]


_MASKS = (torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, *_check.FLOATS)


def _first_rows(x: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """[B, 1, C] of [B, T, C]: each sequence's first token, 0 where it has none."""
    batch, length, hidden = x.shape
    if attention_mask is None or length == 0:
        return x[:, :1] if length > 0 else x.new_zeros(batch, 1, hidden)
    place = (attention_mask != 0).to(torch.uint8).argmax(dim=1)  # [B]; of a sequence without tokens all rows are 0
    return x[torch.arange(batch, device=x.device), place][:, None]


def _feed(
    batches: Iterable[Mapping[str, torch.Tensor]], run: Callable[[dict[str, Any]], object], largest: torch.Tensor
) -> None:
    """Run the batches to calibrate on, and record the largest values."""
    count = 0
    for batch in batches:
        run({name: batch.get(name) for name in ("input_ids", "attention_mask", "token_type_ids")})
        count += batch["input_ids"].numel()
    if count == 0:
        _check.refuse(OP, "calibration", "at least one batch with a token", "none")
    if not bool(largest.isfinite().all()):
        _check.refuse(OP, "calibration", "batches with finite activations", "others")


def _check_broadcast(argument: str, ids: torch.Tensor, input_ids: torch.Tensor) -> None:
    """Ids of shape [B or 1, T]."""
    batch, length = input_ids.shape
    _check.tensor(OP, argument, ids, ("B", length), (torch.int64, torch.int32), input_ids.device)
    if ids.shape[0] not in (1, batch):
        _check.refuse(OP, argument, f"of shape [{batch} or 1, {length}]", list(ids.shape))


def _head_masks(
    head_mask: torch.Tensor | None, num_heads: int, heads: Sequence[Sequence[int]], device: torch.device
) -> list[torch.Tensor | None]:
    """For each layer the factors [H_l] of the heads that are left in it, or None."""
    if head_mask is None:
        return [None] * len(heads)
    if not isinstance(head_mask, torch.Tensor):
        _check.refuse(OP, "head_mask", "a tensor", type(head_mask).__name__, TypeError)
    if tuple(head_mask.shape) not in ((num_heads,), (len(heads), num_heads)):
        expected = f"of shape [{num_heads}] or [{len(heads)}, {num_heads}]"
        _check.refuse(OP, "head_mask", expected, list(head_mask.shape))
    mask = head_mask.to(device, head_mask.dtype if head_mask.is_floating_point() else torch.float32)
    rows = mask.expand(len(heads), num_heads).unbind()
    return [row if len(kept) == num_heads else row[list(kept)] for row, kept in zip(rows, heads, strict=True)]


def _pack(model: EncoderModules, precision: str | None, masks: Sequence[torch.Tensor | None]) -> PackedEncoder | None:
    """For the C++ encoder; None if that is not built, or not for this device, these dtypes or a mixture of them."""
    tables = {"word": model.word, "position": model.position, "token_type": model.token_type}
    tensors = {name: table.weight.detach() for name, table in tables.items() if table is not None}
    known = all(t.device.type == "cpu" and t.dtype in (torch.float32, torch.bfloat16) for t in tensors.values())
    if not known or precision == "fp16" or not backends.availability("cpu").ok:
        return None
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    tensors |= {"norm.weight": parameter(model.norm.weight.detach()), "norm.bias": parameter(model.norm.bias.detach())}
    hidden, size = model.word.weight.shape[1], model.head_dim
    first: Any = model.layers[0].ffn_in if model.layers else None
    ffn: int = first.weight.shape[-2] if first is not None else 1
    kinds = {_kind(linear, precision) for layer in model.layers for linear in layer if isinstance(linear, _LINEARS)}
    kind = kinds.pop() if kinds else "fp32"
    if kinds or kind is None:
        return None
    left = [
        len(layer.heads) if mask is None else int(mask.count_nonzero())
        for layer, mask in zip(model.layers, masks, strict=True)
    ]
    sizes = [((3 * n * size, hidden), (hidden, n * size), (ffn, hidden), (hidden, ffn)) for n in left]
    room = Room(kind, [size for layer in sizes for size in layer])
    heads, eps = [], [model.norm.eps]
    for i, (modules, mask) in enumerate(zip(model.layers, masks, strict=True)):
        layer = pack_layer(modules, size, precision, mask)
        for name in ("qkv", "out", "ffn_in", "ffn_out"):
            linear = getattr(layer, name)
            blob = room.blob(*linear.weight.shape)
            tensors[f"{i}.{name}"] = pack_linear(kind, linear.weight, linear.scale, linear.bias, blob)
        for name in ("attention_norm", "ffn_norm"):
            norm = getattr(layer, name)
            tensors |= {
                f"{i}.{name}.weight": parameter(norm.weight),
                f"{i}.{name}.bias": parameter(norm.bias),
            }
            eps.append(norm.eps)
        if layer.mask is not None:
            tensors[f"{i}.mask"] = parameter(layer.mask)
        heads.append(layer.heads)
    scales = ((0.0, 0.0),) * len(heads)
    shape = Shape(kind, hidden, size, model.num_heads, ffn, model.padding_idx, tuple(heads), tuple(eps), scales)
    return PackedEncoder(shape, tensors)


def _kind(linear: Any, precision: str | None) -> str | None:
    """The dtype in which the C++ encoder holds a layer's weights; None: it has none for them."""
    if linear.weight.dtype == torch.int8 or precision == "int8":
        return "int8" if precision in (None, "int8") else None
    return precision or _KINDS.get(linear.weight.dtype)


_KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_LINEARS = (nn.Linear, Int8Linear)
