"""What calibration changes, what each layer costs, and the layers that a budget leaves float."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from tiny_models import tiny

from distilbert_fast import Int8Config, optimize, quantize_model, sensitivity
from distilbert_fast.compression.activations import moments
from distilbert_fast.compression.agreement import Agreement, agreement_of, answers
from distilbert_fast.layers import Int8Linear
from distilbert_fast.modeling.quantizer import linear_names


def batch(seed=0, rows=6):
    torch.manual_seed(seed)
    mask = (torch.arange(9) < torch.randint(1, 10, (rows, 1))).long()
    return {"input_ids": torch.randint(2, 97, (rows, 9)) * mask, "attention_mask": mask}


GIVEN = [batch(seed) for seed in range(3)]


def sharp(kind=transformers.BertForSequenceClassification, **changes):
    """A tiny model whose answers differ between inputs."""
    model = tiny(kind, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return model


def float_names(model):
    linears = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    return sorted(name for name in linears if "layer." in name)


def kl(model, reference, given=GIVEN):
    with torch.no_grad():
        parts = [agreement_of(answers(model, b, "test"), answers(reference, b, "test")) for b in given]
    return sum(part.kl_sum for part in parts) / sum(part.answers for part in parts)


# Calibration ------------------------------------------------------------------------------------------------------


def test_moments_are_those_of_tokens():
    model = sharp().train()
    name = "bert.encoder.layer.1.intermediate.dense"
    seen = []
    linear = model.get_submodule(name)
    handle = linear.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    found = moments(model, [name, "bert.pooler.dense"], GIVEN, "test")
    handle.remove()
    assert model.training and not linear._forward_pre_hooks
    rows = torch.cat([x[b["attention_mask"].bool()] for x, b in zip(seen, GIVEN, strict=True)]).double()
    assert len(rows) == sum(int(b["attention_mask"].sum()) for b in GIVEN)
    torch.testing.assert_close(found[name].mean.double(), rows.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[name].mean_square.double(), rows.square().mean(0), rtol=1e-5, atol=1e-6)
    assert found["bert.pooler.dense"].mean.shape == (30,)  # of first tokens, whatever the mask


def test_corrected_biases_keep_the_mean_of_the_outputs():
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 9)
    x = torch.randn(500, 64) + torch.linspace(-3, 3, 64)
    mean, square = x.mean(0), x.square().mean(0)
    plain = Int8Linear.from_linear(linear)
    corrected = Int8Linear.from_linear(linear, mean, square)
    assert plain.bias is linear.bias and corrected.bias is not linear.bias
    for layer, close in ((plain, False), (corrected, True)):
        wrong = (x @ layer.dequantized().T + layer.bias - linear(x)).mean(0)
        assert (wrong.abs().max() < 1e-5) == close
    weighted = ((corrected.dequantized() - linear.weight).square() * square).sum()
    assert weighted < ((plain.dequantized() - linear.weight).square() * square).sum()


def test_calibrated_model_is_saved_and_read(tmp_path):
    model = sharp()
    reference = copy.deepcopy(model)
    assert quantize_model(model, calibration=GIVEN) is model
    assert not torch.equal(
        model.bert.encoder.layer[0].output.dense.bias, reference.bert.encoder.layer[0].output.dense.bias
    )
    model.save_pretrained(tmp_path)
    read = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(read(**GIVEN[0]).logits, model(**GIVEN[0]).logits)


def test_optimized_models_are_calibrated_too():
    model, plain = optimize(sharp()), sharp()
    quantize_model(model, calibration=GIVEN)
    quantize_model(plain, calibration=GIVEN)
    for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)


# Costs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("embeddings", [False, True])
def test_costs_are_those_of_layers_quantized_alone(embeddings):
    model = sharp()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = list(model.modules())
    found = sensitivity(model, GIVEN, Int8Config(embeddings=embeddings))
    assert list(model.modules()) == modules
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    assert found.count == 18 and [c.kl for c in found.costs] == sorted((c.kl for c in found.costs), reverse=True)
    names = [name for cost in found.costs for name in cost.names]
    tables = [f"bert.embeddings.{part}_embeddings" for part in ("word", "position", "token_type")]
    assert sorted(names) == sorted([*float_names(model), *(tables if embeddings else [])])
    assert len(found.costs) == 8 + embeddings
    everything = quantize_model(copy.deepcopy(model), Int8Config(embeddings=embeddings), GIVEN)
    assert found.kl == pytest.approx(kl(everything, model), rel=1e-6)
    for cost in found.costs[:3]:
        if cost.names[0] in tables:
            continue
        others = [name for name in float_names(model) if name not in cost.names]
        alone = quantize_model(copy.deepcopy(model), Int8Config(modules_to_not_convert=others), GIVEN)
        assert cost.kl == pytest.approx(kl(alone, model), rel=1e-6) and cost.kl > 0
        sizes = [
            sum(x.nbytes for x in m.get_submodule(n).state_dict().values()) for m in (model, alone) for n in cost.names
        ]
        half = len(sizes) // 2
        assert cost.saved == sum(sizes[:half]) - sum(sizes[half:])


def test_a_table_and_json_say_the_same():
    found = sensitivity(sharp(), GIVEN)
    read = json.loads(found.to_json())
    assert read["count"] == 18 and read["kl"] == found.kl
    assert [layer["kl"] for layer in read["layers"]] == [cost.kl for cost in found.costs]
    lines = str(found).splitlines()
    assert len(lines) == 10 and lines[0].endswith("what alone is int8 (of 18 answers)") and lines[-1].endswith("  all")
    assert f"{found.costs[0].kl:.2e}" in lines[1]
    assert sum("self.{query, key, value}" in line for line in lines) == 2


KINDS = {
    "ForSequenceClassification": 18,
    "ForTokenClassification": sum(int(b["attention_mask"].sum()) for b in GIVEN),
    "ForMaskedLM": sum(int(b["attention_mask"].sum()) for b in GIVEN),
    "ForQuestionAnswering": 36,
}


@pytest.mark.parametrize("head", KINDS)
def test_answers_of_each_head(head):
    model = sharp(getattr(transformers, f"DistilBert{head}"))
    found = sensitivity(model, GIVEN)
    assert found.count == KINDS[head] and found.kl > 0 and 0 <= found.agreement <= 1
    assert kl(model, model) == 0


def test_labels_that_do_not_exclude_each_other():
    model = sharp(num_labels=3, problem_type="multi_label_classification")
    with torch.no_grad():
        logits, found = model(**GIVEN[0]).logits, answers(model, GIVEN[0], "test")
    torch.testing.assert_close(found[:, 1].exp(), logits.double().sigmoid().flatten())


def test_agreement():
    a, b = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).double(), torch.tensor([[0.6, 0.4], [0.2, 0.8]]).double()
    found = agreement_of(a.log(), b.log()) + agreement_of(b.log(), b.log())
    expected = (b * (b / a).log()).sum()
    assert found.answers == 4 and found.same == 3 and found.kl == pytest.approx(float(expected) / 4)
    assert Agreement().kl == 0


# Budgets ----------------------------------------------------------------------------------------------------------


def test_a_budget_leaves_the_costliest_float():
    model = sharp()
    found = sensitivity(model, GIVEN)
    kept = quantize_model(copy.deepcopy(model), calibration=GIVEN, budget=found.kl * 1.01)
    assert not float_names(kept)
    some = quantize_model(copy.deepcopy(model), calibration=GIVEN, budget=found.kl / 3)
    assert set(found.costs[0].names) <= set(float_names(some)) and len(float_names(some)) < 12
    assert kl(some, model) <= found.kl / 3
    skipped = some.config.quantization_config.modules_to_not_convert
    assert set(skipped) == {name.removeprefix("bert.") for name in float_names(some)}
    none = quantize_model(copy.deepcopy(model), calibration=GIVEN, budget=1e-30)
    assert len(float_names(none)) == 12 and kl(none, model) == 0


def test_what_a_budget_left_float_is_read_back_with_and_without_the_head(tmp_path):
    model = sharp()
    cost = sensitivity(model, GIVEN).kl
    quantize_model(model, Int8Config(embeddings=False), GIVEN, budget=cost / 3).save_pretrained(tmp_path)
    with torch.no_grad():
        read = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert torch.equal(read(**GIVEN[0]).logits, model(**GIVEN[0]).logits)
        base = transformers.AutoModel.from_pretrained(tmp_path)
        assert torch.equal(base(**GIVEN[0])[0], model.bert(**GIVEN[0])[0])


# Refusals ---------------------------------------------------------------------------------------------------------

REFUSED = {
    "no head": (
        lambda: sensitivity(tiny(transformers.BertModel), GIVEN),
        "sensitivity: model must be one with a task head, whose answers are probabilities, got BertModel",
    ),
    "regression": (
        lambda: sensitivity(tiny(num_labels=1), GIVEN),
        "sensitivity: model must be one that chooses between 2 or more labels, got a regression",
    ),
    "int8 already": (
        lambda: sensitivity(quantize_model(tiny()), GIVEN),
        "sensitivity: model must be a float model, got one that is int8 already",
    ),
    "budget alone": (
        lambda: quantize_model(tiny(), budget=0.1),
        "quantize_model: budget must be None without calibration, and for shared values, got 0.1",
    ),
    "no budget": (
        lambda: quantize_model(tiny(), calibration=GIVEN, budget=0),
        "quantize_model: budget must be finite and above 0, got 0",
    ),
    "nothing": (
        lambda: quantize_model(tiny(), calibration=[]),
        "quantize_model: calibration must be at least one text or batch, got none",
    ),
    "no token": (
        lambda: quantize_model(tiny(), calibration=[{k: v * 0 for k, v in batch().items()}]),
        "quantize_model: calibration must be at least one token, got none",
    ),
    "a text": (
        lambda: quantize_model(tiny(), calibration="a text"),
        "quantize_model: calibration must be an iterable of texts or batches, got str",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_by_name(case):
    call, message = REFUSED[case]
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    assert str(error.value) == message


def test_refuses_what_embeddings_alone_cost():
    with pytest.raises(ValueError, match=r"budget must be .* or more, what int8 embeddings cost alone, got 1e-12"):
        quantize_model(sharp(), Int8Config(embeddings=True), GIVEN, budget=1e-12)


def test_refuses_activations_that_are_not_finite():
    model = tiny()
    with torch.no_grad():
        for linear in (model.bert.encoder.layer[0].intermediate.dense, model.bert.encoder.layer[0].output.dense):
            linear.weight.sign_().mul_(9e18)
    with pytest.raises(ValueError, match="calibration must be batches with finite activations, got others"):
        quantize_model(model, calibration=[{"input_ids": torch.full((1, 3), 5)}])
    assert len(linear_names(model, Int8Config(), "test")) == 12
