"""Shared values: which weights count more, values and float weights that are trained, by both trainers."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import transformers
from distillation import tiny
from torch import nn

from distilbert_fast import CodebookConfig, optimize, prepare_qat, quantize_model
from distilbert_fast.compression import fisher
from distilbert_fast.compression.fisher import smoothed, squared_gradients
from distilbert_fast.compression.qat import SharingLinear
from distilbert_fast.distillation.trainer import DistillationTrainer
from distilbert_fast.layers import CodebookLinear

SIZES = dict(vocab_size=97, max_position_embeddings=23, num_hidden_layers=2, num_attention_heads=3)
SIZES |= dict(hidden_size=30, intermediate_size=37, pad_token_id=0, num_labels=3)


def make(kind=transformers.BertForSequenceClassification, **changes):
    torch.manual_seed(0)
    return kind(kind.config_class(**SIZES | changes)).eval()


def batches(count=4, rows=6):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        mask = (torch.arange(9) < torch.randint(1, 10, (rows, 1), generator=generator)).long()
        yield {"input_ids": torch.randint(2, 97, (rows, 9), generator=generator), "attention_mask": mask}


def weights(model):
    return {name: m.weight for name, m in model.named_modules() if type(m) is nn.Linear and "layer." in name}


# Which weights count more --------------------------------------------------------------------------------------------


def test_squared_gradients_are_the_fisher_information(monkeypatch):
    """Of a classifier it is Σ_rows Σ_classes p (∂ log p / ∂ w)², which many draws come near to."""
    model, name = make(), "bert.encoder.layer.1.output.dense"
    model.classifier.weight.data.mul_(30)
    weight, batch = weights(model)[name], next(batches(1, 3))
    exact = torch.zeros_like(weight)
    for row in range(3):
        log_p = model(**{key: x[row : row + 1] for key, x in batch.items()}).logits.log_softmax(-1)[0]
        for score in log_p:
            (gradient,) = torch.autograd.grad(score, weight, retain_graph=True)
            exact += score.exp().detach() * gradient**2
    monkeypatch.setattr(fisher, "_ROWS", 3)
    draws = 400
    found = squared_gradients(model, [batch] * draws, {name: weight})[name] / draws
    assert float(((found - exact) ** 2).sum() / (exact**2).sum()) < 0.03
    assert float(found.sum()) == pytest.approx(float(exact.sum()), rel=0.15)


HEADS = ["Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM"]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["DistilBert", "Bert", "Roberta"])
def test_every_head_has_squared_gradients_and_stays_as_it_was(family, head):
    model = make(getattr(transformers, family + head), num_labels=2).train()
    next(iter(model.parameters())).requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    given = weights(model)
    assert len(given) == 12
    found = squared_gradients(model, batches(), given)
    assert found.keys() == given.keys()
    for name, squared in found.items():
        assert squared.shape == given[name].shape and bool((squared >= 0).all())
        if not name.endswith(("query", "key", "q_lin", "k_lin")):  # attention to one token alone has no gradient
            assert float(squared.sum()) > 0
    assert model.training and [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    again = squared_gradients(model, batches(), given)
    assert all(torch.equal(again[name], squared) for name, squared in found.items())


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_heads_of_other_losses(kind):
    model = make(problem_type=kind, num_labels=1 if kind == "regression" else 3)
    assert all(float(x.sum()) > 0 for name, x in squared_gradients(model, batches(), weights(model)).items())


def test_padding_decides_nothing():
    model = make(transformers.BertForTokenClassification)
    batch = next(batches(1))
    other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 0, 5, batch["input_ids"])}
    for name, found in squared_gradients(model, [batch], weights(model)).items():
        torch.testing.assert_close(found, squared_gradients(model, [other], weights(model))[name])


def test_a_gradient_that_is_no_number_is_refused():
    model = make()
    model.classifier.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"^calibration: answers of the model must be finite, got other numbers$"):
        squared_gradients(model, batches(), weights(model))


def test_smoothing_keeps_sums_and_what_rows_and_columns_explain():
    squared = torch.rand(7, 5) ** 4
    for dim in (0, 1):
        torch.testing.assert_close(smoothed(squared).sum(dim), squared.sum(dim))
    product = squared[:, :1] * squared[:1]
    torch.testing.assert_close(smoothed(product), product)
    assert torch.equal(smoothed(squared * 0), squared * 0)


def test_calibration_changes_which_values_are_best():
    model, plain = make(), make()
    quantize_model(model, CodebookConfig(16, "row"), batches())
    quantize_model(plain, CodebookConfig(16, "row"))
    before = make()
    importance, before = squared_gradients(before, batches(), weights(before)), weights(before)
    for name, linear in model.named_modules():
        if isinstance(linear, CodebookLinear):
            errors = [((m.get_submodule(name).dequantized() - before[name]) ** 2).detach() for m in (model, plain)]
            errors = [float((smoothed(importance[name]) * error).sum()) for error in errors]
            assert errors[0] <= errors[1] * (1 + 1e-6)


# Values that are trained ----------------------------------------------------------------------------------------------


def rows():
    for batch in batches(8, 4):
        for i in range(4):
            yield {key: x[i] for key, x in batch.items()} | {"labels": int(batch["input_ids"][i, 0]) % 3}


def train(model, tmp_path, **more):
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path / "run", report_to=[], use_cpu=True, disable_tqdm=True, num_train_epochs=8,
        per_device_train_batch_size=8, learning_rate=5e-3, save_strategy="no", seed=0, **more,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=list(rows()), eval_dataset=list(rows()))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return before, trainer.evaluate()["eval_loss"]


def test_values_are_trained_by_the_trainer_and_saved(tmp_path):
    model = quantize_model(make(), CodebookConfig(16, "row"))
    layers = [module for module in model.modules() if isinstance(module, CodebookLinear)]
    codes, values = [x.weight.clone() for x in layers], [x.values.detach().clone() for x in layers]
    before, after = train(model, tmp_path)
    assert after < before - 0.1
    assert all(torch.equal(x.weight, code) for x, code in zip(layers, codes, strict=True))
    assert not any(torch.equal(x.values, value) for x, value in zip(layers, values, strict=True))
    model.save_pretrained(tmp_path / "saved")
    read = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    batch = next(batches())
    with torch.no_grad():
        assert torch.equal(read(**batch).logits, model.eval()(**batch).logits)


# Float weights that are trained --------------------------------------------------------------------------------------


CONFIG = CodebookConfig(16, "group", 16)


def test_it_computes_as_the_model_that_it_becomes():
    model, batch = make(), next(batches())
    expected = quantize_model(copy.deepcopy(model), CONFIG)
    names = list(model.state_dict())
    assert prepare_qat(model, CONFIG) is model and list(model.state_dict()) == names
    assert sum(type(m) is SharingLinear for m in model.modules()) == 12
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected(**batch).logits, rtol=1e-5, atol=1e-6)
        quantize_model(model, CONFIG)
        assert torch.equal(model(**batch).logits, expected(**batch).logits)


def test_gradients_go_straight_through():
    model, batch = make(), next(batches())
    dense = copy.deepcopy(model)
    quantized = quantize_model(copy.deepcopy(model), CONFIG)
    for name, m in quantized.named_modules():
        if isinstance(m, CodebookLinear):
            dense.get_submodule(name).weight.data.copy_(m.dequantized())
    prepare_qat(model, CONFIG)
    for one in (model, dense):
        one(**batch, labels=torch.tensor([0, 1, 2, 0, 1, 2])).loss.backward()
    for (name, a), b in zip(model.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_when_values_are_found_again():
    model, batch = prepare_qat(make(), CONFIG, every=3).train(), next(batches())
    linear = model.bert.encoder.layer[0].output.dense
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=1.0), []
    for _ in range(7):
        model(**batch, labels=torch.zeros(6, dtype=torch.int64)).loss.backward()
        optimizer.step()
        seen.append(linear.shared)
    assert [a is b for a, b in itertools.pairwise(seen)] == [True, True, False, True, True, False]
    model.eval()
    with torch.no_grad():
        model(**batch)
        now = CodebookLinear.from_linear(linear, 16, 16).dequantized()
        assert torch.equal(linear.shared, now)
        model.load_state_dict({name: x * 0.5 for name, x in model.state_dict().items()})
        model(**batch)
        torch.testing.assert_close(linear.shared, now * 0.5)


def test_float_weights_are_trained_by_the_trainer(tmp_path):
    model = prepare_qat(make(), CONFIG, every=5)
    before, after = train(model, tmp_path)
    assert after < before - 0.1
    batch = next(batches())
    with torch.no_grad():
        expected = model.eval()(**batch).logits
    quantize_model(model, CONFIG)
    assert not any(type(m) is SharingLinear for m in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-6)
        optimize(model, "fp32")
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", [quantize_model, prepare_qat])
def test_distillation_trains_both(change, tmp_path):
    teacher, rows = tiny.teacher(), tiny.rows(24)
    student = change(tiny.student(teacher, 0.0), CONFIG)
    args = tiny.arguments(
        tmp_path, num_train_epochs=6, per_device_train_batch_size=4, learning_rate=1e-2, save_strategy="no"
    )
    trainer = DistillationTrainer(student, teacher, args, rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * before
    if change is prepare_qat:
        quantize_model(student, CONFIG)
    layers = [module for module in student.modules() if isinstance(module, CodebookLinear)]
    assert len(layers) == 6 and all(len(layer.dequantized().unique()) <= 16 * len(layer.values) for layer in layers)


def test_what_prepare_qat_refuses():
    for arguments, error, message in (
        (("int8",), TypeError, "config must be an Int8Config or a CodebookConfig, got str"),
        ((CONFIG, 0), ValueError, "every must be an integer of 1 or more, got 0"),
    ):
        with pytest.raises(error) as caught:
            prepare_qat(make(), *arguments)
        assert str(caught.value) == f"prepare_qat: {message}"
    with pytest.raises(
        ValueError, match=r"^prepare_qat: model must be a float model, got one that is codebook already$"
    ):
        prepare_qat(quantize_model(make(), CONFIG), CONFIG)
    with pytest.raises(TypeError, match="SharingLinear"):
        optimize(prepare_qat(make(), CONFIG))
