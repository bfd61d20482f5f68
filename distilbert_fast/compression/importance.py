"""How much a model loses without a head or a neuron, on average over calibration data.

With a factor m_u, now 1, at each unit u of the sub-layers that are to be pruned, taking one away moves the answers p of
the model, to second order, by

    τ² KL(p ‖ p without u) ≈ ½ E (∂ log p(y) / ∂m_u)²,      y drawn from p, p = softmax(logits / τ),

the curvature of the KL divergence at its minimum: its own gradient is 0 there. Answers that are no logits, such as
hidden states, count as Gaussian: y = answer + noise. To this comes how large the unit's own contribution is,

    score_u = λ_pred · ½ τ² E (∂ log p(y) / ∂m_u)² + λ_rep · E[x_u²] · mean(w_u²).

Park, Choi, Kang: Accurate Retraining-free Pruning for Pretrained Encoder-based Language Models (K-prune),
arXiv:2308.03449. With the true labels in place of y, the first term is the Fisher information of Kwon, Kim, Mahoney,
Hassoun, Keutzer, Gholami: A Fast Post-Training Pruning Framework for Transformers, arXiv:2204.09656.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distilbert_fast.compression.sublayers import Batch, States, Sublayer, from_layer, inputs_read
from distilbert_fast.ops import _check

LogLikelihood = Callable[[Any, Batch, torch.Tensor], torch.Tensor]  # of a model's answers, summed over a batch


def drawn(temperature: float, generator: torch.Generator, multi_label: bool = False) -> LogLikelihood:
    """τ log p(y), with y drawn from the model's own answers. It raises ValueError where these are not finite.

    Args:
        multi_label: whether the logits of a sequence are of labels that do not exclude each other.
    """

    def categorical(logits: torch.Tensor) -> torch.Tensor:
        if bool(logits.isnan().any() | (logits == torch.inf).any()):
            _check.refuse("calibration", "answers of the model", "finite", "other numbers")
        log_p = (logits.float() / temperature).log_softmax(-1)
        y = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(logits.device)
        return temperature * log_p.gather(-1, y).sum()

    def gaussian(x: torch.Tensor) -> torch.Tensor:
        return (x * torch.randn(x.shape, generator=generator, device="cpu").to(x.device, x.dtype)).sum()

    def log_likelihood(outputs: Any, batch: Batch, real: torch.Tensor) -> torch.Tensor:
        if "start_logits" in outputs:  # [B, T], of tokens
            starts, ends = (outputs[name].masked_fill(~real, float("-inf")) for name in ("start_logits", "end_logits"))
            return categorical(starts) + categorical(ends)
        if "logits" in outputs:  # [B, K], or of each token [B, T, K]
            logits = outputs.logits if outputs.logits.dim() == 2 else outputs.logits[real]
            if multi_label:
                logits = torch.stack([logits, torch.zeros_like(logits)], dim=-1).flatten(0, 1)  # yes or no
            return gaussian(logits) if logits.shape[-1] == 1 else categorical(logits)
        x = outputs.last_hidden_state[real]  # [N, C]
        return gaussian(x / x.detach().square().mean().sqrt())

    return log_likelihood


def labelled(outputs: Any, batch: Batch, real: torch.Tensor) -> torch.Tensor:
    """The loss of a batch with labels, as a sum."""
    return -outputs.loss * len(real)


@dataclass(frozen=True)
class Scorer:
    """What scores are made of.

    Args:
        states: those before the lowest layer that is not finished.
        which: of its batches, those that count.
        log_likelihood: whose slopes are squared.
        representation: λ_rep; λ_pred is 1.
        labels: of each batch, where ``log_likelihood`` needs them.
    """

    model: Any
    encoder: Any
    states: States
    which: Sequence[int]
    log_likelihood: LogLikelihood
    representation: float
    labels: Sequence[torch.Tensor] | None = None

    def scores(self, rest: Sequence[Sublayer]) -> list[torch.Tensor]:
        """The score [U] of each unit in each sub-layer of ``rest``, the current one and those above it."""
        encoder, states = self.encoder, self.states
        readers = [sublayer.reader(encoder) for sublayer in rest]
        sizes = [sublayer.unit_size(encoder) for sublayer in rest]
        curvature = [torch.zeros(sublayer.units(encoder), device=encoder.device) for sublayer in rest]
        squares = [torch.zeros(reader.in_features, device=encoder.device) for reader in readers]
        sequences = tokens = 0
        with from_layer(encoder, states.layer) as given, torch.enable_grad():
            for i in self.which:
                batch, real = states.batches[i], states.masks[i]
                given[:] = [states.hidden[i].detach().requires_grad_()]
                with inputs_read(readers) as inputs:
                    outputs = self.model(**batch, **({} if self.labels is None else {"labels": self.labels[i]}))
                places = [k for k, x in enumerate(inputs) if x.numel()]
                loss = self.log_likelihood(outputs, batch, real)
                gradients = torch.autograd.grad(loss, [inputs[k] for k in places])
                for k, gradient in zip(places, gradients, strict=True):
                    x = inputs[k].detach()
                    slope = (x * gradient).sum(1).unflatten(-1, (-1, sizes[k])).sum(-1)  # [B, U]
                    curvature[k] += slope.float().square().sum(0)
                    squares[k] += states.rows(x, i).float().square().sum(0)
                sequences, tokens = sequences + len(real), tokens + int(real.sum())
        found = []
        for k, reader in enumerate(readers):
            weights = reader.weight.detach().float().square().mean(0)  # [K]
            own = (squares[k] / max(tokens, 1) * weights).unflatten(0, (-1, sizes[k])).sum(-1)
            found.append(0.5 * curvature[k] / max(sequences, 1) + self.representation * own)
        return found
