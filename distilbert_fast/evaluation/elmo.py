"""ELMo and a BiLSTM classifier, the first model of DistilBERT's tables: what comparisons measure it by.

ELMo is that of Peters et al., Deep contextualized word representations, arXiv:1802.05365, in the sizes of its original
release (93.6 M parameters): a character CNN with highway layers, and a language model of two LSTM layers with
projections for each direction. The classifier is that of GLUE's baselines (Wang et al., arXiv:1804.07461): a BiLSTM of
two layers of 1,500 units a direction, its maximum over time, and a hidden layer. Together they have the 180 M
parameters that DistilBERT's paper gives.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

CHARACTERS = 50  # of a word
_BEGIN, _END = 258, 259  # characters that stand for the ends of a sentence


@dataclass(frozen=True)
class ElmoConfig:
    """Sizes; by default those of ELMo's original release and of GLUE's baseline."""

    characters: int = 262
    character_size: int = 16
    filters: tuple[tuple[int, int], ...] = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))
    highways: int = 2
    hidden: int = 4096
    projection: int = 512
    classifier_hidden: int = 1500
    classifier_layer: int = 512

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, given: dict[str, Any]) -> ElmoConfig:
        """What ``to_dict`` gave, also after a way through JSON."""
        return cls(**{**given, "filters": tuple((width, count) for width, count in given["filters"])})


class CharacterCNN(nn.Module):
    """Words of characters [B, T, CHARACTERS] int64 → [B, T, projection]."""

    def __init__(self, config: ElmoConfig) -> None:
        super().__init__()
        size = sum(count for _, count in config.filters)
        self.embedding = nn.Embedding(config.characters, config.character_size)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(config.character_size, count, width) for width, count in config.filters
        )
        self.highways = nn.ModuleList(nn.Linear(size, 2 * size) for _ in range(config.highways))
        self.projection = nn.Linear(size, config.projection)

    def forward(self, characters: Tensor) -> Tensor:
        batch, words = characters.shape[:2]
        x = self.embedding(characters.flatten(0, 1)).transpose(1, 2)  # [B·T, character_size, CHARACTERS]
        x = torch.cat([convolution(x).amax(dim=-1).relu() for convolution in self.convolutions], dim=-1)
        for highway in self.highways:
            proposed, gate = highway(x).chunk(2, dim=-1)
            gate = gate.sigmoid()
            x = gate * x + (1 - gate) * proposed.relu()
        return self.projection(x).view(batch, words, -1)


class Elmo(nn.Module):
    """Three representations of each word, mixed: characters [B, T, CHARACTERS], lengths [B] → [B, T, 2 · projection].

    The LSTMs of the two directions do not read each other's outputs. torch's LSTM holds two biases where ELMo has one
    (0.07 % more parameters), and does not clip cells and projections, which changes no time that can be measured.
    """

    def __init__(self, config: ElmoConfig) -> None:
        super().__init__()
        self.words = CharacterCNN(config)

        def direction() -> nn.ModuleList:
            sizes = config.projection, config.hidden
            return nn.ModuleList(nn.LSTM(*sizes, batch_first=True, proj_size=config.projection) for _ in range(2))

        self.forwards, self.backwards = direction(), direction()
        self.mix, self.scale = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(()))

    def forward(self, characters: Tensor, lengths: Tensor) -> Tensor:
        batch, count = characters.shape[:2]
        ends = characters.new_zeros(batch, 1, CHARACTERS)
        with_ends = torch.cat([ends.clone(), characters, ends], dim=1)  # [B, T + 2, CHARACTERS]
        with_ends[:, 0, 0] = _BEGIN
        rows = torch.arange(batch)
        with_ends[rows, lengths + 1] = 0
        with_ends[rows, lengths + 1, 0] = _END
        x = self.words(with_ends)
        places = torch.arange(count + 2)
        back = lengths[:, None] + 1 - places  # of the words read from the end; padding stays where it is
        back = torch.where(back >= 0, back, places)[..., None].expand_as(x)
        forward, backward = x, x.gather(1, back)
        layers = [torch.cat([x, x], dim=-1)]
        for i, (ahead, back_to_front) in enumerate(zip(self.forwards, self.backwards, strict=True)):
            made, made_back = ahead(forward)[0], back_to_front(backward)[0]
            forward, backward = (made, made_back) if i == 0 else (made + forward, made_back + backward)
            layers.append(torch.cat([forward, backward.gather(1, back)], dim=-1))
        weights = self.mix.softmax(dim=0)
        mixed = self.scale * sum(weight * layer for weight, layer in zip(weights, layers, strict=True))
        return mixed[:, 1:-1]


class ElmoClassifier(nn.Module):
    """A score for each pair of sentences, each a tuple of characters [B, T, CHARACTERS] and lengths [B] → [B, 1]."""

    def __init__(self, config: ElmoConfig) -> None:
        super().__init__()
        self.config = config
        self.elmo = Elmo(config)
        hidden = config.classifier_hidden
        self.lstm = nn.LSTM(2 * config.projection, hidden, 2, batch_first=True, bidirectional=True)
        self.hidden = nn.Linear(4 * 2 * hidden, config.classifier_layer)
        self.out = nn.Linear(config.classifier_layer, 1)

    def forward(self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
        u, v = self.encode(*first), self.encode(*second)
        pair = torch.cat([u, v, (u - v).abs(), u * v], dim=-1)
        return self.out(self.hidden(pair).tanh())

    def encode(self, characters: Tensor, lengths: Tensor) -> Tensor:
        """A sentence's vector [B, 2 · classifier_hidden], which padding and the other rows do not change."""
        packed = nn.utils.rnn.pack_padded_sequence(
            self.elmo(characters, lengths), lengths, batch_first=True, enforce_sorted=False
        )
        made, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True, padding_value=float("-inf"))
        return made.amax(dim=1)
