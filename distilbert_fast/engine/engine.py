"""A transformer encoder packed for inference: weights laid out once, one call per batch.

    ids [B, T] → unpad once → embedding → per layer: QKV → attention → out → LayerNorm(+x)
                                                     → FFN in, GELU → FFN out → LayerNorm(+x) → x [N, C]

Only the N real tokens are computed. On a CPU one call of the C++ encoder (native_encoder.py) does it all; elsewhere,
and for what that does not take, ops do it step by step (op_encoder.py), on a GPU captured as graphs (cuda_graphs.py).

Shapes: B batch, T sequence, N tokens, L layers, C hidden, H heads, D head size, F feed-forward, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distilbert_fast import backends
from distilbert_fast.engine import packed_files
from distilbert_fast.engine.blobs import pack_model, with_static_scales
from distilbert_fast.engine.cuda_graphs import GRAPHS, Graphs
from distilbert_fast.engine.native_encoder import CODED, MemoryChanged, PackedEncoder, Watched
from distilbert_fast.engine.op_encoder import OpEncoder, TokenLayout
from distilbert_fast.engine.weights import OP, PRECISIONS, EncoderModules, Layer, LayerModules
from distilbert_fast.layers import Tokens, head_masks, is_token, token_mask
from distilbert_fast.ops import _check
from distilbert_fast.ops._rows import TINY

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
        self._lock = backends.fork_safe_lock()
        encoder = packed or self._op_encoder()
        self.num_heads, self.heads, self.padding_idx = encoder.num_heads, encoder.heads, encoder.padding_idx
        self.word, self.position, self.token_type = encoder.word, encoder.position, encoder.token_type

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
                between them the dtype of the model. None: as the model is, shared values as int8. On a CPU, what
                flows between layers is float32 also for "bf16", unless the processor multiplies bfloat16 by itself
                (AMX).
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
        masks = head_masks(OP, head_mask, model.num_heads, heads, model.device)
        return cls(pack_model(model, precision, masks), model, precision, masks, graphs=graphs)

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
        return cls(packed_files.read(path, verify))

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
        packed_files.write(self.packed, path)

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
        if model is None or not any(CODED & {*kinds} for kinds in packed.shape.kinds):
            _check.refuse(OP, "model", "an int8 one, not from a file, to be calibrated", "another")
        dynamic = pack_model(model, self._precision, self._masks) if any(map(any, packed.shape.scales)) else packed
        assert dynamic is not None
        largest = packed.largest()
        _feed(batches, lambda given: dynamic.run(**given, largest=largest), largest)
        return Engine(with_static_scales(packed, model, largest), model, self._precision, self._masks)

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
    def is_native(self) -> bool:
        """Whether the C++ encoder serves calls now: not where another backend is forced, nor, if ops can, where it has
        no vectors.
        """
        if self.packed is None or backends.forced() not in (None, "cpu"):
            return False
        return self._model is None or backends.without_vectors() is None

    @property
    def layers(self) -> Sequence[Layer]:
        """The layers as ops read them."""
        return self._op_encoder().layers

    def _modules(self) -> EncoderModules:
        if self._model is None:
            raise backends.BackendError(f"{OP}: a loaded engine runs by backend 'cpu', {backends.forced()!r} is forced")
        return self._model

    def _op_encoder(self) -> OpEncoder:
        """The encoder that computes op by op, packed when it is first needed."""
        with self._lock:
            if self._ops is None:
                self._ops = OpEncoder(self._modules(), self._precision, self._masks, self._scales)
                if self._ops.word.is_cuda and self._graph_count > 0:
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
        watched: Watched | None = None,
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
            watched: memory to look at meanwhile, where threads would wait.

        Raises:
            TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, by name.
            MemoryChanged: what is watched is not what it was.
        """
        given = (input_ids, attention_mask, token_type_ids, position_ids)
        self._check_inputs(*given)
        _check.choice(OP, "rows", rows, ("all", "first"))
        first = rows == "first"
        for name, wanted in (("hidden_states", hidden_states), ("padding", padding)):
            if first and wanted:
                _check.refuse(OP, name, "False where only the first rows are wanted", wanted)
        padding = padding and attention_mask is not None
        masks = head_masks(OP, head_mask, self.num_heads, self.heads, self.word.device)
        if self.packed is not None and self.is_native:
            states = self.packed.run(*given, masks, hidden_states, padding=padding, watched=watched)
            if first:
                states = [_first_rows(states[-1], attention_mask)]
        else:
            if watched is not None and not watched.holds():
                raise MemoryChanged
            states = self._run_ops(*given, masks, hidden_states, first, num_tokens, padding=padding)
        return Encoded(states[-1], tuple(states) if hidden_states else ())

    def _check_inputs(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> None:
        device = self.word.device
        _check.tensor(OP, "input_ids", input_ids, ("B", "T"), _INTEGERS, device)
        batch, length = input_ids.shape
        if attention_mask is not None:
            elsewhere = getattr(attention_mask, "is_cpu", False)
            _check.tensor(OP, "attention_mask", attention_mask, (batch, length), _MASKS, None if elsewhere else device)
        for name, ids in (("position_ids", position_ids), ("token_type_ids", token_type_ids)):
            if ids is not None:
                _check.tensor(OP, name, ids, ("B", length), _INTEGERS, device)
                if ids.shape[0] not in (1, batch):
                    _check.refuse(OP, name, f"of shape [{batch} or 1, {length}]", list(ids.shape))
        if token_type_ids is not None and self.token_type is None:
            _check.refuse(OP, "token_type_ids", "None, this model has no token types", "a tensor")
        if position_ids is None and self.padding_idx is None and length > self.position.shape[0]:
            _check.refuse(OP, "input_ids", f"at most {self.position.shape[0]} tokens long", length)

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
        keys = None
        if padding and attention_mask is not None:
            keys = token_mask(OP, attention_mask, batch, length).to(input_ids.device)
            attention_mask = None
        tokens = Tokens.unpadded(attention_mask, batch, length, input_ids.device, num_tokens)
        ids = tokens.rows(input_ids)  # [N]

        def layout() -> TokenLayout:
            return ops.layout(tokens, input_ids, token_type_ids, position_ids)

        plain = not (hidden_states or padding) and largest is None and all(mask is None for mask in masks or ())
        if plain and self.graphs is not None and self.graphs.take(ids.shape[0]):
            by_shape = attention_mask is None and token_type_ids is None and position_ids is None
            by_shape = by_shape and self.padding_idx is None
            states = [self.graphs.run(ids, batch, layout, first, (batch, length) if by_shape else None, length)]
        else:
            states = ops.run(ids, *layout(), masks, hidden_states, first, largest, keys, length or None)
        return [state[:, None] if first else tokens.padded(state) for state in states]


_INTEGERS = (torch.int64, torch.int32)
_MASKS = (torch.bool, *_INTEGERS, torch.int16, torch.int8, torch.uint8, *_check.FLOATS)


def _first_rows(x: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """[B, 1, C] of [B, T, C]: each sequence's first token, 0 where it has none."""
    batch, length, hidden = x.shape
    if attention_mask is None or length == 0:
        return x[:, :1] if length > 0 else x.new_zeros(batch, 1, hidden)
    place = is_token(attention_mask).to(torch.uint8).argmax(dim=1)  # [B]; of a sequence without tokens all rows are 0
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
