"""Embeddings of texts from the hidden states of their tokens.

mean: Σ h_t / T over the T tokens of a text; max: the largest of each dimension; cls: h_0 (Reimers, Gurevych:
Sentence-BERT, arXiv:1908.10084, section 3).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distilbert_fast.ops.quantize import quantize

POOLINGS = ("mean", "cls", "max")
EMBEDDING_DTYPES = ("float32", "float16", "int8", "binary", "ubinary")


class CodedEmbedding(NamedTuple):
    """An embedding in int8: ``values`` · ``scale`` is near it. The cosine of two does not depend on their scales."""

    values: np.ndarray  # int8 [D]
    scale: float


def pool(hidden: Tensor, mask: Tensor, how: str) -> Tensor:
    """float32 [B, C] of hidden states [B, T, C], or [B, 1, C] for "cls"; mask [B, T], true on tokens."""
    hidden = hidden.float()
    if how == "cls":
        return hidden[:, 0]
    inside = mask.unsqueeze(-1)
    if how == "max":
        return hidden.masked_fill(~inside, -1e9).amax(1)
    return (hidden * inside).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def cut_dimensions(embeddings: Tensor, dimensions: int | None, normalize: bool) -> Tensor:
    """Keep the first dimensions [B, D], then divide each by its length."""
    kept = embeddings[:, :dimensions]
    return torch.nn.functional.normalize(kept, dim=-1) if normalize else kept


def as_dtype(embeddings: Tensor, dtype: str) -> list[np.ndarray | CodedEmbedding]:
    """A row each of float32 [B, D] in one of DTYPES.

    int8: x ≈ code · scale, whose largest |code| is 127. binary: a bit a dimension, 1 where x > 0, the first dimension
    the highest bit of the first byte; ubinary as uint8, binary less 128 as int8, as sentence-transformers has them.
    """
    if dtype == "int8":
        codes, scales = (x.cpu().numpy() for x in quantize(embeddings.contiguous()))
        return [CodedEmbedding(row, float(scale)) for row, scale in zip(codes, scales, strict=True)]
    rows = embeddings.cpu().numpy()
    if dtype.endswith("binary"):
        bits = np.packbits(rows > 0, axis=-1)
        return list(bits if dtype == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8))
    return list(rows.astype(dtype))


def width(hidden: int, dimensions: int | None, dtype: str) -> int:
    """Numbers of an embedding."""
    kept = min(hidden, dimensions or hidden)
    return (kept + 7) // 8 if dtype.endswith("binary") else kept
