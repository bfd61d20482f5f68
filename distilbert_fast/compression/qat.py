"""Train the weights of layers that will share values: float ones, which compute as the shared ones that they become.

    y = x · Ŵᵀ + b,    Ŵ = shared values of W        ∂W = ∂Ŵ (straight through)

Bengio, Léonard, Courville: Estimating or propagating gradients through stochastic neurons, arXiv:1308.3432.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from distilbert_fast.layers import CodebookLinear
from distilbert_fast.modeling.compression_config import CodebookConfig
from distilbert_fast.modeling.quantizer import linears_of
from distilbert_fast.modeling.training import Model
from distilbert_fast.ops import _check


class SharingLinear(nn.Linear):
    """A linear layer of floats that computes with the values that its weights would share.

    They are found again in the first call, after each ``every`` calls in training, and when evaluation begins. It saves
    what an nn.Linear saves.
    """

    num_values: int
    group_size: int | None
    every: int
    calls: int  # in training, since the values were found
    shared: torch.Tensor | None
    seen: Any  # the weight that they were found for

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        learns, weight = self.training and torch.is_grad_enabled(), (self.weight, self.weight._version)
        current = (
            self.calls < self.every
            if learns
            else self.calls == 0 and self.seen[0] is weight[0] and self.seen[1] == weight[1]
        )
        if self.shared is None or not current:
            self.shared, self.seen, self.calls = self._find(), weight, 0
        self.calls += learns
        shared = self.shared.to(self.weight.device, self.weight.dtype)
        return F.linear(x, self.weight + (shared - self.weight).detach(), self.bias)

    @torch.no_grad()
    def _find(self) -> torch.Tensor:
        return CodebookLinear.from_linear(self, self.num_values, self.group_size).dequantized()


def prepare_qat(model: Model, config: CodebookConfig, every: int = 100) -> Model:
    """Let the layers that ``config`` means compute with shared values while their float weights are trained; in place.

    Train the model as any other, with transformers' Trainer or ``DistillationTrainer``: its parameters, state and files
    are those of the float model. ``quantize_model(model, config)`` then makes the layers what they computed as.

    Args:
        every: forward passes in training after which the values, and which weight has which, are found again. Between
            them they stay while the weights move.

    Raises:
        TypeError, ValueError: as ``quantize_model`` does; an ``every`` below 1.
    """
    if not isinstance(config, CodebookConfig):
        _check.refuse("prepare_qat", "config", "a CodebookConfig", type(config).__name__, TypeError)
    if not isinstance(every, int) or every < 1:
        _check.refuse("prepare_qat", "every", "an integer of 1 or more", repr(every))
    for _, linear, kind in linears_of(model, config, "prepare_qat"):
        sharing: Any = linear
        sharing.__class__ = SharingLinear
        sharing.num_values, sharing.group_size = kind["values"], kind["group_size"]
        sharing.every, sharing.calls, sharing.shared, sharing.seen = every, 0, None, (None, 0)
    return model


def finish_qat(model: Model) -> Model:
    """Make the layers of ``prepare_qat`` plain ones again, in place."""
    for module in model.modules():
        if type(module) is SharingLinear:
            for name in ("num_values", "group_size", "every", "calls", "shared", "seen"):
                delattr(module, name)
            plain: Any = module
            plain.__class__ = nn.Linear
    return model
