"""What the contests of the losses over a vocabulary share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch

from bench.harness.contest import DEVICE

TEMPERATURE = 2.0
Losses = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def some_labels(n: int, v: int, generator: torch.Generator) -> torch.Tensor:
    """Labels [N] below V, 15% of them; the others are ignored."""
    labels = torch.randint(0, v, (n,), generator=generator)
    return labels.masked_fill(torch.rand(n, generator=generator) > 0.15, -100).to(DEVICE)


def steps(
    losses: Mapping[str, Losses], arguments: Sequence[torch.Tensor], labels: torch.Tensor, dtype: torch.dtype
) -> dict[str, Callable[[], tuple[float, float]]]:
    """Both losses with the gradients of the student, a call each; refuses functions that do not agree."""

    def step(function: Losses) -> Callable[[], tuple[float, float]]:
        def call() -> tuple[float, float]:
            kl, ce = function(*arguments, TEMPERATURE, None, labels)
            (5 * kl + 2 * ce).backward()
            return kl.item(), ce.item()

        return call

    made, agreed = {name: step(function) for name, function in losses.items()}, None
    for name, call in made.items():  # right before fast
        found = call()
        agreed = agreed or found
        assert found == pytest.approx(agreed, rel=1e-3 if dtype == torch.float32 else 5e-2), name
    return made
