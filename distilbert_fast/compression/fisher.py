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
    training, generator = model.training, torch.Generator().manual_seed(seed)
    try:
        model.eval().requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        for given in _parts(batches):
            with torch.enable_grad():
                loss = _drawn(model, {name: x.to(model.device) for name, x in given.items()}, generator)
                gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for total, gradient in zip(found.values(), gradients, strict=True):
                if gradient is not None:
                    total.addcmul_(gradient.float(), gradient.float())
    finally:
        model.train(training)
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
    for name, total in found.items():
        if not bool(total.isfinite().all()):
            _check.refuse(OP, f"the gradient of {name}", "finite", "other numbers")
    return found


def smoothed(squared: torch.Tensor) -> torch.Tensor:
    """The mean of F [F, C] and of what its rows and columns alone make of it: Σ_c F · Σ_f F / Σ F.

    A few hundred draws leave each number of F noisy, and its sums not. Shared values that were found with the mean lost
    less than those found with either, where they differed (docs/results.md).
    """
    rows, columns = squared.sum(1, keepdim=True), squared.sum(0, keepdim=True)
    return (squared + rows * columns / squared.sum().clamp(min=torch.finfo(torch.float32).tiny)) / 2


_ROWS = 4  # inputs whose gradients are summed: more draws for as many rows


def _parts(batches: Iterable[Mapping[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """The same rows, a few at a time."""
    for batch in batches:
        for start in range(0, batch["input_ids"].shape[0], _ROWS):
            yield {name: x[start : start + _ROWS] for name, x in batch.items()}


def _drawn(model: Any, batch: Mapping[str, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
    """−log p of answers drawn for a batch, summed; for a model without a head, its hidden states along a random
    direction each."""
    outputs = model(**batch)
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) != 0  # [B, T]
    if hasattr(outputs, "start_logits"):
        spans = [outputs.start_logits, outputs.end_logits]
        start, end = (_categorical(x.masked_fill(~mask, -torch.inf), generator) for x in spans)
        return start + end
    if not hasattr(outputs, "logits"):
        return _gaussian(outputs.last_hidden_state[mask], generator)
    logits = outputs.logits
    if logits.dim() == 3:  # of each token
        return _categorical(logits[mask], generator)
    kind = getattr(model.config, "problem_type", None)
    if kind == "regression" or logits.shape[-1] == 1:
        return _gaussian(logits, generator)
    if kind == "multi_label_classification":
        logits = torch.stack([logits, torch.zeros_like(logits)], dim=-1).flatten(0, 1)
    return _categorical(logits, generator)


def _categorical(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Logits [N, classes]."""
    if bool(logits.isnan().any() | (logits == torch.inf).any()):
        _check.refuse(OP, "answers of the model", "finite", "other numbers")
    log_p = logits.float().log_softmax(dim=-1)
    drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
    return -log_p.gather(-1, drawn).sum()


def _gaussian(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Numbers with an error of variance 1, drawn likewise."""
    return (x.float() * torch.randn(x.shape, generator=generator).to(x.device)).sum()
