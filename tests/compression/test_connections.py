"""Connections that are removed: which, how many, and what is refused."""

from __future__ import annotations

import pytest
import torch
from tiny_models import answers, assert_same_bits, padded_batch, tiny
from torch import nn

from distilbert_fast import SparsityConfig, prune_connections, quantize_model
from distilbert_fast.sparse import SparseLinear


def layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseLinear)}


def share(masks):
    return float(torch.cat([mask.flatten() for mask in masks]).float().mean())


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("amount", [0.25, 0.8, 0.99])
def test_the_smallest_weights_go(amount, scope):
    before = tiny().state_dict()
    model = prune_connections(tiny(), SparsityConfig(amount=amount, scope=scope))
    found = layers(model)
    assert len(found) == 12 and type(model.classifier) is nn.Linear
    groups = [[name] for name in found] if scope == "layer" else [list(found)]
    for names in groups:
        weights = [before[f"{name}.weight"].abs() for name in names]
        masks = [found[name].mask for name in names]
        assert share(masks) == pytest.approx(1 - amount, abs=0.001)
        left = min(float(w[mask].min()) for w, mask in zip(weights, masks, strict=True) if mask.any())
        assert left >= max(float(w[~mask].max()) for w, mask in zip(weights, masks, strict=True) if not mask.all())
    for name, layer in found.items():
        assert torch.equal(layer.dequantized(), before[f"{name}.weight"] * layer.mask)


def test_equal_weights_go_in_order():
    model = tiny()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.fill_(0.5)
    layer = layers(prune_connections(model, SparsityConfig(amount=0.5)))["bert.encoder.layer.0.output.dense"]
    assert layer.mask.flatten().tolist() == [False] * 555 + [True] * 555


def test_two_of_four():
    model = tiny(hidden_size=36, intermediate_size=40)
    weights = {
        name: module.weight.detach().clone() for name, module in model.named_modules() if type(module) is nn.Linear
    }
    for name, layer in layers(prune_connections(model, SparsityConfig(amount=0.5, pattern="2:4"))).items():
        groups, kept = (x.unflatten(1, (-1, 4)) for x in (weights[name].abs(), layer.mask))
        assert bool((kept.sum(-1) == 2).all())
        least, most = (torch.where(kept, groups, torch.inf).amin(-1), torch.where(kept, 0, groups).amax(-1))
        assert bool((least >= most).all())


def test_more_may_go_later_and_nothing_comes_back():
    model = prune_connections(tiny(), SparsityConfig(amount=0.5, modules_to_not_convert=["layer.0"]))
    first = {name: layer.mask for name, layer in layers(model).items()}
    assert len(first) == 6 and model.config.quantization_config.linears.keys() >= {"encoder.layer.0.output.dense"}
    expected = answers(model, padded_batch())
    prune_connections(model, SparsityConfig(amount=0.1))
    assert len(layers(model)) == 12
    assert all(torch.equal(layers(model)[name].mask, mask) for name, mask in first.items())
    prune_connections(model, SparsityConfig(amount=0.8))
    for name, layer in layers(model).items():
        assert share([layer.mask]) == pytest.approx(0.2, abs=0.001)
        assert name not in first or not bool((layer.mask & ~first[name]).any())
    assert not torch.equal(answers(model, padded_batch())[0], expected[0])


def test_nothing_else_changes():
    model, other = tiny(), tiny()
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear and "layer." in name]
    prune_connections(model, SparsityConfig(amount=0.7))
    with torch.no_grad():
        for name in names:
            other.get_submodule(name).weight.mul_(model.get_submodule(name).mask)
    assert_same_bits(model, other, padded_batch())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"amount": 0}, ValueError, "amount must be above 0 and below 1, got 0"),
        ({"amount": 1.0}, ValueError, "amount must be above 0 and below 1, got 1.0"),
        ({"amount": float("nan")}, ValueError, "amount must be above 0 and below 1, got nan"),
        ({"amount": "0.5"}, TypeError, "amount must be a number, got str"),
        (
            {"amount": 0.8, "method": "random"},
            ValueError,
            "method must be one of 'magnitude', 'movement', got 'random'",
        ),
        ({"amount": 0.8, "scope": "row"}, ValueError, "scope must be one of 'layer', 'global', got 'row'"),
        ({"amount": 0.5, "pattern": "4:8"}, ValueError, "pattern must be one of None, '2:4', got '4:8'"),
        ({"amount": 0.8, "pattern": "2:4"}, ValueError, "amount must be 0.5 for the pattern 2:4, got 0.8"),
    ],
)
def test_configs_that_cannot_be(given, error, message):
    with pytest.raises(error) as caught:
        SparsityConfig(**given)
    assert str(caught.value) == f"SparsityConfig: {message}"


def test_models_that_cannot_be():
    half = SparsityConfig(amount=0.5)
    for model, config, message in (
        (quantize_model(tiny()), half, "model must be a float model, got one that is int8 already"),
        (
            tiny(),
            SparsityConfig(amount=0.5, pattern="2:4"),
            "in_features of bert.encoder.layer.0.attention.self.query must be a multiple of 4 for 2:4, got 30",
        ),
        (
            tiny(),
            SparsityConfig(amount=0.5, modules_to_not_convert=["layer"]),
            "modules_to_not_convert must be names of some layers, got those of all",
        ),
        (
            tiny(),
            SparsityConfig(0.5, modules_to_not_convert=["lin9"]),
            "modules_to_not_convert must be names of linear layers, got 'lin9'",
        ),
        (tiny(), SparsityConfig(0.5, "movement"), "method must be 'magnitude': others need training, got 'movement'"),
    ):
        with pytest.raises(ValueError) as caught:
            prune_connections(model, config)
        assert str(caught.value) == f"prune_connections: {message}"
    with pytest.raises(TypeError, match=r"^prune_connections: config must be a SparsityConfig, got float$"):
        prune_connections(tiny(), 0.5)
    model = tiny()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"bert.encoder.layer.1.output.dense.weight must be finite and .*, got nan$"):
        prune_connections(model, half)
    assert not layers(model)
