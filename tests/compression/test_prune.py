"""prune_model: what it removes, how well what is left answers, what it costs, and what it refuses."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
import transformers

import distilbert_fast
from distilbert_fast import PruningConfig, explain, optimize, prune_model, quantize_model
from distilbert_fast.compression.allocation import allocate
from distilbert_fast.compression.costs import Costs
from distilbert_fast.compression.importance import Scorer, drawn
from distilbert_fast.compression.least_squares import LeastSquares
from distilbert_fast.compression.sublayers import States, frozen, sublayers
from distilbert_fast.modeling.structure import LayerStructure, structure_of

SIZES = dict(vocab_size=97, max_position_embeddings=23, num_hidden_layers=3, num_attention_heads=4)
SIZES |= dict(hidden_size=32, intermediate_size=48, hidden_dim=48, pad_token_id=0)


def make(name, library=transformers):
    torch.manual_seed(0)
    kind = getattr(library, name)
    model = kind(kind.config_class(**SIZES)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def data(count=64, seed=1, labels=False):
    torch.manual_seed(seed)
    lengths = torch.randint(3, 13, (count, 1))
    mask = (torch.arange(12) < lengths).long()
    ids = torch.randint(2, 97, (count, 12)) * mask
    made = [{"input_ids": ids[i : i + 16], "attention_mask": mask[i : i + 16]} for i in range(0, count, 16)]
    return [batch | {"labels": torch.arange(16) % 2} for batch in made] if labels else made


def pruned(name="BertForSequenceClassification", library=transformers, labels=False, **settings):
    settings = {"amount": 0.4, "neurons": 8} | settings
    return prune_model(make(name, library), data(labels=labels), PruningConfig(**settings))


NAMES = ["DistilBertModel", "BertForSequenceClassification", "RobertaForQuestionAnswering"]
NAMES += ["DistilBertForMaskedLM", "BertForTokenClassification"]


@pytest.mark.parametrize("measure", ["parameters", "flops"])
@pytest.mark.parametrize("name", NAMES)
def test_the_budget_is_met_and_the_weights_are_gone(name, measure, tmp_path):
    model, report = pruned(name, measure=measure)
    assert 0.5 * report.cost_before < report.cost_after <= 0.6 * report.cost_before
    assert report.before == (LayerStructure((0, 1, 2, 3), 48),) * 3 and report.after == structure_of(model.base_model)
    assert all(layer.ffn % 8 == 0 for layer in report.after)
    assert not model.training and all(parameter.requires_grad for parameter in model.parameters())
    if measure == "parameters":
        gone = sum(p.numel() for p in make(name).parameters()) - sum(p.numel() for p in model.parameters())
        assert gone == report.cost_before - report.cost_after
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        batch = data()[0]
        assert torch.equal(again(**batch)[0], model(**batch)[0])
        optimize(again)(**batch)
    assert explain(again).fallbacks == {}


def test_the_same_model_comes_out_each_time():
    first, second = (pruned()[0].state_dict() for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def error(model, whole, batches):
    with torch.no_grad():
        pairs = [
            (model(**b).last_hidden_state, whole(**b).last_hidden_state, b["attention_mask"].bool()) for b in batches
        ]
    return sum(float((x - y)[real].square().sum()) for x, y, real in pairs)


@pytest.mark.parametrize("name, library", [("BertModel", transformers), ("DistilBertModel", distilbert_fast)])
def test_it_keeps_what_matters(name, library):
    """Better on held-out data than to keep what has the largest weights, without fitting."""
    whole, held_out = make(name, library), data(seed=2)
    model, report = prune_model(copy.deepcopy(whole), data(256), PruningConfig(amount=0.4, neurons=8))
    by_size = copy.deepcopy(whole)
    for sublayer in sublayers(by_size):
        left = report.after[sublayer.layer]
        count = len(left.heads) if sublayer.is_attention else left.ffn
        weights = sublayer.reader(by_size).weight.square().sum(0).unflatten(0, (-1, sublayer.unit_size(by_size))).sum(1)
        sublayer.cut(by_size, weights.topk(count).indices.sort().values)
    assert error(model, whole, held_out) < 0.6 * error(by_size, whole, held_out)


def test_units_that_do_nothing_go_first():
    model = make("BertForSequenceClassification")
    whole = copy.deepcopy(model)
    for layer in (*model.bert.encoder.layer, *whole.bert.encoder.layer):
        layer.attention.output.dense.weight.data[:, 8:16] = 0
        layer.output.dense.weight.data[:, 10:42] = 0
    model, report = prune_model(model, data(), PruningConfig(amount=0.3, neurons=8, mu=1e-3))
    assert all(1 not in layer.heads for layer in report.after) or all(layer.ffn <= 16 for layer in report.after)
    model, report = prune_model(copy.deepcopy(whole), data(), PruningConfig(amount=0.25, neurons=16, mu=1e6))
    batch = data(seed=3)[0]
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, whole(**batch).logits, rtol=1e-3, atol=1e-3)


def test_a_measured_time(monkeypatch):
    _, report = pruned("BertModel", measure="time", amount=0.1)
    assert report.cost_after <= 0.9 * report.cost_before and report.cost_after > 0
    before = structure_of(make("BertModel"))
    with pytest.raises(
        ValueError, match=r"^prune_model: amount must be below 0\.\d+, what heads and neurons take of the"
    ):
        pruned("BertModel", measure="time", amount=0.999)
    assert structure_of(make("BertModel")) == before


def test_labels_in_place_of_scores_again():
    _, report = pruned(method="fisher", labels=True)
    assert report.cost_after <= 0.6 * report.cost_before
    with pytest.raises(
        ValueError, match=r"^prune_model: calibration must be batches with labels, tensors, got one with inp"
    ):
        pruned(method="fisher")
    with pytest.raises(ValueError, match=r"^prune_model: calibration must be batches with labels, got texts$"):
        config = PruningConfig(amount=0.4, method="fisher")
        prune_model(make("BertForSequenceClassification"), ["a text"], config, tokenizer=object())


def test_a_pruned_model_is_pruned_further_and_quantized():
    model, first = pruned(amount=0.3)
    model, second = prune_model(model, data(), PruningConfig(amount=0.3, neurons=8))
    assert second.before == first.after
    for before, after in zip(second.before, second.after, strict=True):
        assert set(after.heads) <= set(before.heads) and after.ffn <= before.ffn
    quantize_model(model)
    assert model.config.quantization_config.linear == {"kind": "int8"}
    with pytest.raises(
        TypeError, match=r"^prune_model: query of layer 0 must be nn\.Linear to be pruned, got Int8Linear$"
    ):
        prune_model(model, data(), PruningConfig(amount=0.3))


# Its parts ----------------------------------------------------------------------------------------------------------


def test_scores_are_the_curvature_of_the_divergence():
    """Against the KL divergence itself, with the factor of one unit a little below 1."""
    model = make("BertForSequenceClassification").double()
    batches = data(32)
    with frozen(model), torch.no_grad():
        states = States(model, model.bert, batches)
        generator = torch.Generator().manual_seed(0)
        one = Scorer(model, model.bert, states, [0, 1] * 400, drawn(2.0, generator), 0.0)
        found = one.scores(sublayers(model.bert))
        layer, step = model.bert.encoder.layer[1], 0.05
        for place, weight, columns in (
            (2, layer.attention.output.dense.weight, slice(8, 16)),
            (3, layer.output.dense.weight, 5),
        ):
            kl, kept = 0.0, weight[:, columns].clone()
            for batch in batches:
                p = (model(**batch).logits / 2).softmax(-1)
                weight[:, columns] = kept * (1 - step)
                q = (model(**batch).logits / 2).log_softmax(-1)
                weight[:, columns] = kept
                kl += 4 * float((p * (p.log() - q)).sum())
            unit = 1 if place == 2 else 5
            assert float(found[place][unit]) == pytest.approx(kl / 32 / step**2, rel=0.1)


def test_allocation_is_the_best_of_all():
    draw = np.random.default_rng(0)
    for _ in range(20):
        costs = [np.sort(draw.integers(0, 8, 4)).astype(float) for _ in range(3)]
        losses = [np.sort(draw.random(4))[::-1] for _ in range(3)]
        budget = float(draw.integers(1, 20))
        fitting = [
            sum(loss[i] for loss, i in zip(losses, choice, strict=True))
            for choice in itertools.product(range(4), repeat=3)
            if sum(cost[i] for cost, i in zip(costs, choice, strict=True)) <= budget
        ]
        found = allocate(losses, costs, budget)
        if not fitting:
            assert found is None
            continue
        assert sum(cost[i] for cost, i in zip(costs, found, strict=True)) <= budget
        assert sum(loss[i] for loss, i in zip(losses, found, strict=True)) == pytest.approx(min(fitting))


def test_nothing_may_cost_nothing():
    assert allocate([np.array([1.0, 0.0])], [np.array([0.0, 2.0])], 0.0) == [0]
    assert allocate([np.array([1.0, 0.0])], [np.array([1.0, 2.0])], 0.5) is None


def test_least_squares_finds_the_layer():
    torch.manual_seed(0)
    z, wanted = torch.randn(500, 7) + 3, torch.nn.Linear(7, 5)
    with torch.no_grad():
        for columns in (7, 0):
            linear = torch.nn.Linear(7, 5)
            linear.weight = torch.nn.Parameter(linear.weight[:, :columns].clone())
            fit = LeastSquares(columns, 5, z.device)
            for rows in z.split(100):
                fit.add(rows[:, :columns], wanted(rows))
            left = fit.solve_into(linear, 1e-9)
            if columns:
                assert left < 1e-6
                torch.testing.assert_close(linear.weight, wanted.weight, rtol=1e-3, atol=1e-4)
                torch.testing.assert_close(linear.bias, wanted.bias, rtol=1e-3, atol=1e-3)
            else:
                torch.testing.assert_close(linear.bias, wanted(z).mean(0), rtol=1e-4, atol=1e-4)


def test_costs_of_parameters_and_flops():
    model, mask = make("BertModel"), [torch.ones(2, 10, dtype=torch.bool)]
    parameters = Costs.measured(model, mask, "parameters", None, 8)
    assert parameters.of(structure_of(model)) == sum(
        p.numel()
        for n, p in model.encoder.named_parameters()
        if "LayerNorm" not in n and not n.endswith("output.dense.bias")
    )
    flops = Costs.measured(model, mask, "flops", None, 8)
    linear = 2 * 10 * 3 * (4 * 32 * 32 + 2 * 32 * 48)
    assert flops.of(structure_of(model)) == linear + 3 * 4 * 10 * 10 * 32
    assert list(parameters.choices(False, 20)) == [0, 8, 16, 20] and list(parameters.choices(True, 2)) == [0, 1, 2]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_table_of_times_serves_models_of_other_depths(batch_size):
    """What is measured once prunes: of nothing but the table, the budget is met."""
    model = make("BertForSequenceClassification")
    table = Costs.measured(model.base_model, [torch.ones(4, 10).bool()], "time", None, 8, batch_size)
    assert len(table.heads) == 5 and len(table.widths) == 49
    assert (np.diff(table.heads) >= 0).all() and (np.diff(table.widths) >= 0).all() and table.layer >= 0
    assert table.deeper(-1).base == table.base - table.layer
    table = Costs(np.arange(5.0), np.arange(49) / 12, 3.0, 8, 1.0)
    _, report = prune_model(model, data(), PruningConfig(amount=0.5, measure="time"), costs=table)
    assert report.cost_before == 27 and report.cost_after <= 13.5
    structure = report.after
    assert report.cost_after == pytest.approx(3 + sum(len(heads) + ffn / 12 for heads, ffn in structure))


# What it refuses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"amount": 0.0}, ValueError, "amount must be finite and above 0, got 0.0"),
        ({"amount": 1.0}, ValueError, "amount must be a share above 0 and below 1, got 1.0"),
        ({"amount": 0.5, "batch_size": 0}, ValueError, "batch_size must be a number from 1 on, got 0"),
        ({"amount": 50}, ValueError, "amount must be a share above 0 and below 1, got 50"),
        ({"amount": float("nan")}, ValueError, "amount must be finite and above 0, got nan"),
        ({"amount": "half"}, TypeError, "amount must be a number, got str"),
        ({"measure": "bytes"}, ValueError, "measure must be one of 'parameters', 'flops', 'time', got 'bytes'"),
        ({"method": "random"}, ValueError, "method must be one of 'kprune', 'fisher', got 'random'"),
        ({"temperature": 0}, ValueError, "temperature must be finite and above 0, got 0"),
        ({"mu": -1.0}, ValueError, "mu must be finite and above 0, got -1.0"),
        ({"neurons": 0}, ValueError, "neurons must be a number from 1 on, got 0"),
        ({"score_sequences": 1.5}, ValueError, "score_sequences must be a number from 1 on, got 1.5"),
        ({"representation": -1}, ValueError, "representation must be 0 or more, and finite, got -1"),
        (
            {"precision": "int7"},
            ValueError,
            "precision must be one of None, 'fp32', 'bf16', 'fp16', 'int8', got 'int7'",
        ),
    ],
)
def test_settings_out_of_range(settings, error, message):
    with pytest.raises(error) as caught:
        PruningConfig(**{"amount": 0.5} | settings)
    assert str(caught.value) == f"prune_model: {message}"


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        ([], ValueError, "calibration must be at least one text or batch, got none"),
        (
            [torch.zeros(2, 0, dtype=torch.int64)],
            ValueError,
            "calibration must be at least one batch with a token, got none",
        ),
        ("a text", TypeError, "calibration must be an iterable of texts or batches, got str"),
        (
            [torch.zeros(2, 3, dtype=torch.int64), "text"],
            TypeError,
            "calibration must be of texts, of tensors of ids or",
        ),
    ],
)
def test_calibration_that_is_none(calibration, error, message):
    model = make("BertModel")
    with pytest.raises(error) as caught:
        prune_model(model, calibration, PruningConfig(amount=0.5))
    assert str(caught.value).startswith(f"prune_model: {message}")
    assert structure_of(model) == structure_of(make("BertModel"))


def test_half_precision_is_refused():
    with pytest.raises(TypeError, match=r"^prune_model: model\.dtype must be float32 or float64, got bfloat16$"):
        prune_model(make("BertModel").bfloat16(), data(), PruningConfig(amount=0.5))
