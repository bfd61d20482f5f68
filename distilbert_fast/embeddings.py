"""Int8Embedding: a table of vectors in int8, a scale each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from distilbert_fast.ops.fit_scale import fit_scale
from distilbert_fast.ops.quantize import quantize


class Int8Embedding(nn.Module):
    """A table of int8 rows: row i is weight_scale[i] · weight[0, i].

    ids of any shape give vectors [..., C] of the ``dtype`` that the module was made with or cast to since.

    Parameters and buffers:
        weight: codes int8 [1, V, C], fixed. The leading 1 makes loaders that take them for weights of an nn.Embedding
            fail on the shape instead of computing with codes.
        weight_scale: [V]. It stays float32 whatever the rest of the model is cast to.
    """

    weight_scale: torch.Tensor
    _cast: torch.Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        codes = torch.empty(1, num_embeddings, embedding_dim, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("weight_scale", torch.empty(num_embeddings, dtype=torch.float32, device=device))
        self.register_buffer("_cast", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @classmethod
    def like(cls, table: nn.Embedding) -> Int8Embedding:
        """One of the sizes, device and dtype of ``table``, for codes that are loaded afterwards."""
        rows = table.weight
        return cls(table.num_embeddings, table.embedding_dim, table.padding_idx, rows.device, rows.dtype)

    @classmethod
    @torch.no_grad()
    def from_embedding(cls, table: nn.Embedding) -> Int8Embedding:
        """The nearest codes for the rows of ``table``, see ``fit_scale``."""
        rows = table.weight
        made = cls.like(table)
        made.weight_scale = fit_scale(rows)
        made.weight = nn.Parameter(quantize(rows, made.weight_scale)[0][None], requires_grad=False)
        return made.train(table.training)

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors."""
        return self._cast.dtype

    @property
    def codes(self) -> torch.Tensor:
        """int8 [V, C]."""
        return self.weight[0]

    def dequantized(self) -> torch.Tensor:
        """The whole table, float32 [V, C]."""
        return self.codes * self.weight_scale[:, None]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        ids = input.flatten()
        rows = self.codes.index_select(0, ids) * self.weight_scale.index_select(0, ids)[:, None]
        return rows.to(self.dtype).view(*input.shape, self.embedding_dim)

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> Int8Embedding:
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, dtype={self.dtype}"
