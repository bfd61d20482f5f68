"""optimize(): a sequence classifier asks the engine for first tokens alone, everybody else for all of them."""

from __future__ import annotations

import copy

import pytest
import torch
from modeling.test_optimize import inputs, make

import distilbert_fast
from distilbert_fast import optimize
from distilbert_fast.engine.engine import Engine

CLASSIFIERS = [f"{family}ForSequenceClassification" for family in ("DistilBert", "Bert", "Roberta")]


@pytest.fixture
def rows(monkeypatch):
    """The shape of what each call of the engine gave."""
    seen, encode = [], Engine.encode

    def spy(self, *args, **kwargs):
        encoded = encode(self, *args, **kwargs)
        seen.append(tuple(encoded.last.shape[:2]))
        return encoded

    monkeypatch.setattr(Engine, "encode", spy)
    return seen


@pytest.fixture(params=[(name, None) for name in CLASSIFIERS] + [(CLASSIFIERS[0], distilbert_fast)], ids=str)
def model(request):
    name, module = request.param
    return make(name, module=module) if module else make(name)


@torch.no_grad()
@pytest.mark.parametrize("masked", [True, False])
def test_classifiers_ask_for_first_tokens(model, masked, rows):
    batch = inputs(type(model).__name__)
    if not masked:
        del batch["attention_mask"]
    expected = copy.deepcopy(model)(**batch)
    optimize(model)
    torch.testing.assert_close(model(**batch).logits, expected.logits)
    torch.testing.assert_close(model(**batch, return_dict=False)[0], expected.logits)
    assert rows == [(4, 1), (4, 1)]


@torch.no_grad()
def test_whoever_sees_the_encoder_sees_all_tokens(model, rows):
    batch = inputs(type(model).__name__)
    plain = copy.deepcopy(model)
    optimize(model)
    assert model.base_model(**batch).last_hidden_state.shape == (4, 9, 30)
    states = model(**batch, output_hidden_states=True).hidden_states
    for ours, theirs in zip(states, plain(**batch, output_hidden_states=True).hidden_states, strict=True):
        torch.testing.assert_close(ours[0], theirs[0])
    seen = []
    handle = model.base_model.register_forward_hook(lambda module, args, output: seen.append(output[0].shape))
    model(**batch)
    handle.remove()
    assert seen == [(4, 9, 30)]
    model(**batch)
    assert rows == [(4, 9), (4, 9), (4, 9), (4, 1)]


@torch.no_grad()
def test_a_class_of_somebody_else_may_read_anything(rows):
    kind = type(make(CLASSIFIERS[0]))
    mine = type("MineForSequenceClassification", (kind,), {"__module__": "elsewhere"})
    model = make(CLASSIFIERS[0])
    model.__class__ = mine
    optimize(model)(**inputs(CLASSIFIERS[0]))
    assert rows == [(4, 9)]


@torch.no_grad()
def test_padding_on_the_left_is_computed(model, rows):
    """Heads read position 0, where no token is."""
    batch = inputs(type(model).__name__)
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    expected = copy.deepcopy(model)(**batch).logits
    torch.testing.assert_close(optimize(model)(**batch).logits, expected)
    assert rows == [(4, 9)]
