"""A DistilBERT with real weights: the real BERT without its token types."""

from __future__ import annotations

import pytest
import torch

# Real sentences of very different lengths.
TEXTS = [
    "DistilBERT is a small, fast, cheap and light Transformer model trained by distilling BERT base.",
    "Paris.",
    "The quick brown fox jumps over the lazy dog, and the dog, being lazy, does nothing whatever about it; "
    "whereupon the fox, who had hoped for a chase, goes home and writes a long letter of complaint.",
    "Is it raining?",
    "",
]


@pytest.fixture(scope="session")
def distilbert_dir(bert, tokenizer, tmp_path_factory):
    """The layers of the real BERT in transformers' own DistilBertModel, saved with the tokenizer."""
    from transformers import DistilBertConfig, DistilBertModel

    source = bert.config
    config = DistilBertConfig(
        vocab_size=source.vocab_size,
        max_position_embeddings=source.max_position_embeddings,
        n_layers=source.num_hidden_layers,
        n_heads=source.num_attention_heads,
        dim=source.hidden_size,
        hidden_dim=source.intermediate_size,
    )
    renamed = {
        "attention.self.query": "attention.q_lin",
        "attention.self.key": "attention.k_lin",
        "attention.self.value": "attention.v_lin",
        "attention.output.dense": "attention.out_lin",
        "attention.output.LayerNorm": "sa_layer_norm",
        "intermediate.dense": "ffn.lin1",
        "output.dense": "ffn.lin2",
        "output.LayerNorm": "output_layer_norm",
        "encoder.layer": "transformer.layer",
    }
    weights = {}
    for name, weight in bert.state_dict().items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        weights[name] = weight.clone()
    token_type = weights.pop("embeddings.token_type_embeddings.weight")[0]
    weights["embeddings.position_embeddings.weight"] += token_type
    weights = {name: weight for name, weight in weights.items() if not name.startswith("pooler.")}
    model = DistilBertModel(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not missing and not [n for n in unexpected if not n.endswith(("position_ids", "token_type_ids"))]
    directory = tmp_path_factory.mktemp("distilbert")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def texts():
    return TEXTS


@pytest.fixture
def batch(tokenizer):
    """The texts as a ragged batch, without token types; a fresh copy for each test."""
    encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


@pytest.fixture
def tiny_config():
    """Odd sizes: 3 heads of 10, a feed-forward of 37."""
    from transformers import DistilBertConfig

    torch.manual_seed(0)
    return DistilBertConfig(
        vocab_size=97, max_position_embeddings=23, n_layers=3, n_heads=3, dim=30, hidden_dim=37, pad_token_id=0
    )
