"""How much each weight of a model decides its answers: squared gradients.

    F_i = Σ over answers of (∂ log p(answer) / ∂ w_i)²,    each answer drawn from what the model itself says

This is the diagonal of the Fisher information, of the model and not of labels: none are needed, and as gradients of
drawn answers are 0 on average, those of a few inputs may be summed before they are squared. Kunstner, Balles, Hennig:
Limitations of the empirical Fisher approximation, arXiv:1905.12558.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from distilbert_fast.compression.importance import drawn
from distilbert_fast.layers import is_token
from distilbert_fast.ops import _check

OP = "squared_gradients"


def squared_gradients(
    model: Any, batches: Iterable[Mapping[str, torch.Tensor]], weights: Mapping[str, torch.Tensor], seed: int = 0
) -> dict[str, torch.Tensor]:
    """F of each of ``weights``, by name, in float32.

    Args:
        model: of transformers, with a task head or none. It computes as in evaluation, and is left as it was.
        batches: of token ids, without labels, as ``modeling.calibration.batches`` gives them.
        weights: parameters of ``model``.
        seed: of the draws.

    Raises:
        ValueError: answers that are not finite; a gradient that is not, by the name of its weight.
    """
    found = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    training = {module: module.training for module in model.modules()}
    multi_label = getattr(model.config, "problem_type", None) == "multi_label_classification"
    log_likelihood = drawn(1.0, torch.Generator().manual_seed(seed), multi_label)
    try:
        model.eval().requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        for given in _parts(batches):
            with torch.enable_grad():
                batch = {name: x.to(model.device) for name, x in given.items()}
                mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
                answers = log_likelihood(model(**batch), batch, is_token(mask))
                gradients = torch.autograd.grad(answers, list(weights.values()), allow_unused=True)
            for total, gradient in zip(found.values(), gradients, strict=True):
                if gradient is not None:
                    total.addcmul_(gradient.float(), gradient.float())
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
    for name, total in found.items():
        if not bool(total.isfinite().all()):
            _check.refuse(OP, f"the gradient of {name}", "finite", "other numbers")
    return found


def smoothed(squared: torch.Tensor) -> torch.Tensor:
    """The mean of F [F, C] and of what its rows and columns alone make of it: Σ_c F · Σ_f F / Σ F.

    A few hundred draws leave each number of F noisy, and its sums not.
    """
    rows, columns = squared.sum(1, keepdim=True), squared.sum(0, keepdim=True)
    total = squared.sum().clamp(min=torch.finfo(torch.float32).tiny)
    return (squared + rows / total * columns) / 2


_ROWS = 4  # inputs whose gradients are summed: more draws for as many rows


def _parts(batches: Iterable[Mapping[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """The same rows, a few at a time."""
    for batch in batches:
        for start in range(0, batch["input_ids"].shape[0], _ROWS):
            yield {name: x[start : start + _ROWS] for name, x in batch.items()}
