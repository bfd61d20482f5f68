"""Train float weights that compute as what they become: int8 ones (see lsq.py), or ones that share values,

    y = x · Ŵᵀ + b,    Ŵ = shared values of W        ∂W = ∂Ŵ (straight through)

Bengio, Léonard, Courville: Estimating or propagating gradients through stochastic neurons, arXiv:1308.3432.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from distilbert_fast.compression.lsq import LsqLinear
from distilbert_fast.layers import CodebookLinear
from distilbert_fast.modeling.compression_config import CodebookConfig, Int8Config
from distilbert_fast.modeling.quantizer import check_finite, linears_of, with_whole_projections
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


def prepare_qat(model: Model, config: Int8Config | CodebookConfig, every: int = 100) -> Model:
    """Let the layers that ``config`` means compute as int8 ones, or with shared values, while their float weights are
    trained; in place.

    Train the model as any other, with transformers' Trainer or ``DistillationTrainer``: its parameters, state and files
    are those of the float model, and for int8 the scales of rows, which are trained too (see ``LsqLinear``).
    Activations are quantized as in ``quantize_model``, each token by its own scale. ``quantize_model(model, config)``
    then makes the layers what they computed as: the same codes and scales, the same answers.

    Args:
        every: for shared values, forward passes in training after which they, and which weight has which, are found
            again. Between them they stay while the weights move.

    Raises:
        TypeError, ValueError: as ``quantize_model`` does; layers that are sparse; int8 embeddings, which are not
            trained so; an ``every`` below 1.
    """
    if not isinstance(config, (Int8Config, CodebookConfig)):
        expected = "an Int8Config or a CodebookConfig"
        _check.refuse("prepare_qat", "config", expected, type(config).__name__, TypeError)
    if not isinstance(every, int) or every < 1:
        _check.refuse("prepare_qat", "every", "an integer of 1 or more", repr(every))
    if any(isinstance(module, (LsqLinear, SharingLinear)) for module in model.modules()):
        _check.refuse("prepare_qat", "model", "one that is not prepared yet", "one that is")
    if config.int8_embeddings:
        _check.refuse("prepare_qat", "config.embeddings", "False: tables are quantized after training", True)
    check_finite(model, "prepare_qat")
    layers = list(linears_of(model, with_whole_projections(model, config, "prepare_qat"), "prepare_qat"))
    for name, linear, _ in layers:
        if type(linear) is not nn.Linear:
            _check.refuse("prepare_qat", name, "an nn.Linear", type(linear).__name__, TypeError)
    for _, linear, kind in layers:
        if isinstance(config, Int8Config):
            LsqLinear.adopt(linear)
            continue
        sharing: Any = linear
        sharing.__class__ = SharingLinear
        sharing.num_values, sharing.group_size = kind["values"], kind["group_size"]
        sharing.every, sharing.calls, sharing.shared, sharing.seen = every, 0, None, (None, 0)
    return model


def learned_scales(model: Any) -> dict[str, torch.Tensor]:
    """The scales of rows of the layers that ``prepare_qat`` made compute as int8, float32 [F], by dotted names."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LsqLinear)]
    return {name: layer.weight_scale.detach() for name, layer in layers}


def finish_qat(model: Model) -> Model:
    """Make the layers of ``prepare_qat`` plain ones again, in place."""
    for module in list(model.modules()):
        if isinstance(module, LsqLinear):
            module.release()
        if type(module) is SharingLinear:
            for name in ("num_values", "group_size", "every", "calls", "shared", "seen"):
                delattr(module, name)
            plain: Any = module
            plain.__class__ = nn.Linear
    return model
