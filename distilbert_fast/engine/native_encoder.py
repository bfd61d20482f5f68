"""The weights of an encoder as the whole-model C++ encoder reads them, and one call of it a batch.

Shapes: B batch, T sequence, L layers, C hidden, H heads, D head size, F feed-forward, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from distilbert_fast import backends
from distilbert_fast.engine.weights import OP
from distilbert_fast.layers import is_token
from distilbert_fast.ops import _check
from distilbert_fast.ops._rows import address

WEIGHTS = {"int8": 0, "bf16": 1, "fp32": 2, "codebook16": 3}  # enum Weights of csrc/cpu/gemm/gemm.h
CODED = frozenset({"int8", "codebook16"})  # those that read activations as int8 codes
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NORMS = ("attention_norm", "ffn_norm")


class Watched(NamedTuple):
    """Memory that others may write, and how many samples of it a call compares (csrc/cpu/watch/fingerprint.h)."""

    fingerprint: Any
    samples: int
    tree: Any = None  # what the next call looks at before it runs (tree_watch.h), or None

    def holds(self) -> bool:
        """Whether they are what they were."""
        return bool(self.fingerprint.matches_samples(self.samples, torch.get_num_threads()))


class MemoryChanged(Exception):
    """Watched memory is not what it was: what was computed may be of weights that are no more."""


class EncoderShape(NamedTuple):
    """The numbers that describe an encoder."""

    kinds: tuple[tuple[str, ...], ...]  # for each layer, of qkv, out, ffn_in and ffn_out: a key of WEIGHTS
    dtype: str  # of hidden states: "fp32" or "bf16"
    hidden: int
    head_size: int
    num_heads: int
    padding_idx: int | None  # RoBERTa counts positions from padding_idx + 1, and only of other ids
    heads: tuple[tuple[int, ...], ...]  # for each layer the numbers of the heads that are left
    ffn: tuple[int, ...]  # for each layer the width of its feed-forward
    eps: tuple[float, ...]  # of the embedding's norm, then of both norms of each layer
    scales: tuple[tuple[float, float], ...]  # for each layer, of what out and ffn_out read; 0: each token finds its own

    @property
    def precision(self) -> str:
        """The kinds in words: that of all linear layers, or those that there are."""
        kinds = {kind for layer in self.kinds for kind in layer}
        return " and ".join(name for name in WEIGHTS if name in kinds) or self.dtype

    @property
    def widest(self) -> tuple[int, int]:
        """The most heads, and the most feed-forward channels, that a layer has."""
        return max(map(len, self.heads), default=0), max(self.ffn, default=0)

    def linears(self, layer: int) -> dict[str, tuple[int, int]]:
        """[F, K] of the linear layers of a layer. Without heads, or where its F is 0, some have no columns or no depth:
        what is left of that block is the bias of its last one."""
        size, ffn = len(self.heads[layer]) * self.head_size, self.ffn[layer]
        inner = {"ffn_in": (ffn, self.hidden), "ffn_out": (self.hidden, ffn)}
        return {"qkv": (3 * size, self.hidden), "out": (self.hidden, size), **inner}


class PackedEncoder:
    """Packed weights. Immutable and thread-safe: concurrent calls give the bits of one after another.

    Args:
        shape: what the tensors are.
        tensors: "word", "position" and, if there is one, "token_type" [rows, C], float32 or bfloat16, or all of them
            int8 with "word.scale", … float32 [rows]; "norm.weight" and "norm.bias" [C]; for each layer i "i.qkv",
            "i.out", "i.ffn_in", "i.ffn_out", uint8 blobs of blobs.py, and "i.attention_norm.weight", … float32 [C];
            "i.mask" [H_i] where the model was packed with a head mask that is not only 0 and 1; "i.ffn_factors" where a
            scale is given for what ffn_out reads: what makes GELU's results codes, float32 [F in whole panels]. On the
            CPU, contiguous.

    Raises:
        ValueError: a blob of another size than its layer takes.
    """

    def __init__(self, shape: EncoderShape, tensors: dict[str, torch.Tensor]) -> None:
        self.shape, self.tensors = shape, tensors
        self.word, self.position, self.token_type = tensors["word"], tensors["position"], tensors.get("token_type")
        self.num_heads, self.heads, self.padding_idx = shape.num_heads, shape.heads, shape.padding_idx
        self._widest, self._widest_ffn = shape.widest
        self._dtype = DTYPES[shape.dtype]
        layers = []
        for i, heads in enumerate(shape.heads):
            sizes = shape.linears(i)
            linears = []
            for kind, (name, size) in zip(shape.kinds[i], sizes.items(), strict=True):
                blob = tensors[f"{i}.{name}"]
                linears.append((WEIGHTS[kind], blob.data_ptr(), blob.numel(), *size))
            norms = [self._norm(f"{i}.{name}", shape.eps[1 + 2 * i + j]) for j, name in enumerate(NORMS)]
            factors = tensors.get(f"{i}.ffn_factors")
            if factors is not None:
                _check.tensor(OP, "ffn_factors", factors, (whole_panels(shape.ffn[i]),), (torch.float32,))
            layers.append((*linears, *norms, len(heads), shape.ffn[i], *shape.scales[i], address(factors)))
        self._encoder = backends.cpu().Encoder(
            shape.hidden,
            shape.head_size,
            [self._table(name) for name in ("word", "position", "token_type")],
            self._norm("norm", shape.eps[0]),
            -1 if shape.padding_idx is None else shape.padding_idx,
            layers,
        )
        self._mask: torch.Tensor | None = None  # what the model was packed with
        self._mask = self._factors([tensors.get(f"{i}.mask") for i in range(len(layers))])

    def _norm(self, name: str, eps: float) -> tuple[int, int, float]:
        for part in ("weight", "bias"):
            tensor = self.tensors[f"{name}.{part}"]
            _check.tensor(OP, f"{name}.{part}", tensor, (self.shape.hidden,), (torch.float32,))
        return self.tensors[f"{name}.weight"].data_ptr(), self.tensors[f"{name}.bias"].data_ptr(), eps

    def _table(self, name: str) -> tuple[int, int, int, int]:
        table, scale = self.tensors.get(name), self.tensors.get(f"{name}.scale")
        if table is None:
            return 0, 0, 0, 0
        if scale is None:
            _check.tensor(OP, name, table, ("rows", self.shape.hidden), backends.CPU_FLOATS)
            return table.data_ptr(), table.shape[0], backends.CPU_DTYPE[table.dtype], 0
        _check.tensor(OP, name, table, ("rows", self.shape.hidden), (torch.int8,))
        _check.tensor(OP, f"{name}.scale", scale, (table.shape[0],), (torch.float32,))
        return table.data_ptr(), table.shape[0], 0, scale.data_ptr()

    def run(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        head_masks: Sequence[torch.Tensor | None] = (),
        hidden_states: bool = False,
        largest: torch.Tensor | None = None,
        padding: bool = False,
        watched: Watched | None = None,
    ) -> list[torch.Tensor]:
        """Hidden states [B, T, C] in the shape's dtype: the last, or with ``hidden_states`` the embeddings
        and the output of each layer. They are 0 at padding, or, with ``padding``, what its queries find at the tokens.

        Args:
            input_ids: int64 or int32 [B, T].
            attention_mask: [B, T], 0 = padding, anywhere in its row.
            token_type_ids, position_ids: [B or 1, T].
            head_masks: for each layer None or a factor for each of its heads [H_i].
            watched: memory to look at meanwhile.
            largest: float32 ``largest()``, raised to the magnitudes of what out and ffn_out read, by channel.

        Raises:
            ValueError: an id, position or token type outside its table, by name.
            MemoryChanged: what is watched is not what it was.
        """
        batch, length = input_ids.shape
        ids = input_ids.contiguous()
        mask = None if attention_mask is None else attention_mask.contiguous()
        if mask is not None and mask.is_floating_point():
            mask = is_token(mask)  # −0 has a bit set
        types = None if token_type_ids is None else token_type_ids.to(torch.int64).contiguous()
        positions = None if position_ids is None else position_ids.to(torch.int64).contiguous()
        factors = self._factors(head_masks)
        count = len(self.shape.heads) + 1 if hidden_states else 1
        size = batch, length, self.shape.hidden
        outputs = [torch.empty(size, dtype=self._dtype, device="cpu") for _ in range(count)]
        unchanged = self._encoder.run(
            ids.data_ptr(),
            ids.dtype == torch.int64,
            batch,
            length,
            address(mask),
            0 if mask is None else mask.element_size(),
            address(positions),
            length if positions is not None and positions.shape[0] == batch else 0,
            address(types),
            length if types is not None and types.shape[0] == batch else 0,
            padding,
            address(factors),
            self._widest,
            outputs[-1].data_ptr(),
            backends.CPU_DTYPE[self._dtype],
            [output.data_ptr() for output in outputs] if hidden_states else [],
            address(largest),
            torch.get_num_threads(),
            *(watched or (None, 0, None)),
        )
        if not unchanged:
            raise MemoryChanged
        return outputs

    def _factors(self, head_masks: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        """The factors [L, widest H_i] of a call, times those that the model was packed with; None: all are 1."""
        if all(mask is None for mask in head_masks):
            return self._mask
        factors = torch.ones(len(self.shape.heads), self._widest, device="cpu")
        for row, mask in zip(factors, head_masks, strict=True):
            if mask is not None:
                row[: mask.shape[0]] = mask
        return factors if self._mask is None else factors * self._mask

    def largest(self) -> torch.Tensor:
        """Zeros for ``run`` to raise: for each layer the channels of attention [widest H_i·D] and those of GELU [widest
        F_i].
        """
        columns = self._widest * self.shape.head_size + self._widest_ffn
        return torch.zeros(len(self.shape.heads), columns, device="cpu")


def packed_bytes(precision: str, columns: int, depth: int) -> int:
    """Bytes of the blob of a linear layer [columns, depth]."""
    return backends.cpu().packed_bytes(WEIGHTS[precision], columns, depth)


def whole_panels(columns: int) -> int:
    """Columns, those that fill the last panel counted."""
    return -(-columns // 32) * 32
