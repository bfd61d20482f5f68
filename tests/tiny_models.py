"""Small models of transformers with odd sizes, and sentences for the real one."""

from __future__ import annotations

import torch
import transformers

SENTENCES = [
    "It's a charming and often affecting journey.",
    "Unflinchingly bleak and desperate.",
    "Return the number of items in a container.",
    "The year's best and most unpredictable comedy, or so the poster claims; the audience, which had paid for its"
    " seats, sat through two hours of it without laughing once and went home in the rain.",
    "No.",
    "What is the airspeed velocity of an unladen swallow?",
    "Water boils at 100 °C at sea level, but at about 93 °C in Denver.",
    "def f(x): return x + 1",
    "The committee adjourned until Thursday, having decided nothing.",
    "Ein deutscher Satz zwischen lauter englischen.",
    "He opened the letter, read it twice, and put it back without a word.",
    "The new bridge will carry two lanes of traffic and a cycle path across the river.",
    "Prices rose by three per cent in March, the fastest pace in four years.",
    "My grandmother kept bees, and every autumn we ate bread with honey on her porch.",
    "Please restart the server before you install the update.",
    "Nobody could say for certain when the painting had been stolen, or by whom.",
    "The recipe calls for two eggs, a cup of flour and a pinch of salt.",
    "After a slow first half, the visitors scored three times in ten minutes.",
]


def tiny(kind=transformers.BertForSequenceClassification, **changes):
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, max_position_embeddings=23, num_hidden_layers=2, num_attention_heads=3)
    config = kind.config_class(**sizes | dict(hidden_size=30, intermediate_size=37, pad_token_id=0) | changes)
    return kind(config).eval()


def padded_batch():
    """Ids of ``tiny`` models and a mask, of 9, 4, 1 and 6 tokens."""
    torch.manual_seed(1)
    mask = (torch.arange(9) < torch.tensor([9, 4, 1, 6])[:, None]).long()
    return {"input_ids": torch.randint(2, 97, (4, 9)), "attention_mask": mask}


def answers(model, batch):
    with torch.no_grad():
        return [x for x in model(**batch).to_tuple() if isinstance(x, torch.Tensor)]


def assert_same_bits(a, b, batch):
    for x, y in zip(answers(a, batch), answers(b, batch), strict=True):
        assert torch.equal(x, y)
