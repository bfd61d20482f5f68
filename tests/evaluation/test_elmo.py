"""ELMo with its classifier: the published sizes, and what padding must not change."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distilbert_fast.evaluation.elmo import CHARACTERS, Elmo, ElmoClassifier, ElmoConfig

TINY = ElmoConfig(filters=((1, 4), (3, 8)), hidden=16, projection=6, classifier_hidden=5, classifier_layer=7)


def sentences(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    characters = torch.randint(1, 256, (len(lengths), max(lengths), CHARACTERS), generator=g)
    return characters, torch.tensor(lengths)


def test_the_parameters_are_those_that_were_published():
    with torch.device("meta"):
        model = ElmoClassifier(ElmoConfig())
    counted = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    second_biases = 4 * 4 * 4096  # which torch's LSTM has
    mix = 4
    assert counted["elmo"] - second_biases - mix == 93_600_864  # "93.6 M": allennlp.org/elmo, Original
    # GLUE's baseline reads one sentence by [u] and two by [u; v; |u - v|; u * v], four times as wide
    single = 512 * 3000 + 512 + 513
    total = counted["elmo"] + counted["lstm"] + single
    assert total == pytest.approx(180e6, rel=0.01)  # DistilBERT's table 3


def test_padding_and_other_rows_change_nothing():
    torch.manual_seed(0)
    model = ElmoClassifier(TINY).eval().double()
    characters, lengths = sentences([5, 2, 9])
    with torch.no_grad():
        together = model((characters, lengths), sentences([3, 4, 1], 1))
        for i, length in enumerate(lengths):
            other, others = sentences([3, 4, 1], 1)
            alone = model(
                (characters[i : i + 1, :length], lengths[i : i + 1]), (other[i : i + 1, : others[i]], others[i : i + 1])
            )
            torch.testing.assert_close(together[i : i + 1], alone)


def test_each_direction_reads_its_own_words():
    """A word's representation by the second direction depends on the words after it alone."""
    torch.manual_seed(0)
    model, size = Elmo(TINY).eval(), TINY.projection
    characters, lengths = sentences([6])
    changed = characters.clone()
    changed[0, 3] = changed[0, 3].flip(0)
    with torch.no_grad():
        before, after = model(characters, lengths)[0], model(changed, lengths)[0]
    differs = ((before - after).abs() > 1e-6).view(6, 2, size).any(dim=-1)
    assert differs[:, 0].tolist() == [False] * 3 + [True] * 3
    assert differs[:, 1].tolist() == [True] * 4 + [False] * 2


def test_flops_are_counted_of_every_part():
    """2 for each weight a word is multiplied with, the sentence's ends included in ELMo."""
    model = ElmoClassifier(TINY).eval()
    characters, lengths = sentences([4])
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter, torch.no_grad():
        model((characters, lengths), (characters, lengths))
    weights = {name: p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "embedding" not in name}

    def of(*parts):
        return sum(count for name, count in weights.items() if any(part in name for part in parts))

    convolved = sum((CHARACTERS - width + 1) * width * count * TINY.character_size for width, count in TINY.filters)
    ends = 2 * (convolved + of("words.highways", "words.projection", "elmo.forwards", "elmo.backwards"))
    expected = 2 * (6 * ends + 4 * 2 * of("lstm.weight")) + 2 * of("hidden.weight", "out.weight")
    assert counter.get_total_flops() == expected
