"""Head masks and pruning. The oracle is transformers' model with the columns of out_lin scaled: m·O·W = O·(m·W)."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

import distilbert_fast
from distilbert_fast import DistilBertForSequenceClassification, DistilBertModel

LAYERS, HEADS, SIZE = 3, 3, 10  # of tiny_config


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(1)
    model = DistilBertModel(tiny_config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def ragged():
    torch.manual_seed(2)
    mask = (torch.arange(7) < torch.tensor([7, 2, 5])[:, None]).long()
    return {"input_ids": torch.randint(1, 97, (3, 7)) * mask, "attention_mask": mask}


def oracle(model, head_mask, **batch):
    """transformers' DistilBertModel with head_mask [L, H] or [L, B, H] folded into the weights; real rows."""
    theirs = transformers.DistilBertModel(copy.deepcopy(model.config)).eval()
    theirs.load_state_dict(model.state_dict())
    weights = dict(theirs.named_parameters())
    rows = []
    for b in range(len(batch["input_ids"])):
        for i in range(LAYERS):
            name = f"transformer.layer.{i}.attention.out_lin.weight"
            m = head_mask[i] if head_mask.dim() == 2 else head_mask[i, b]
            weights[name] = model.state_dict()[name] * m.repeat_interleave(SIZE)
        one = {key: value[b : b + 1] for key, value in batch.items()}
        output = torch.func.functional_call(theirs, weights, kwargs=one)
        rows.append(output.last_hidden_state[0][one["attention_mask"][0].bool()])
    return torch.cat(rows)


def tokens(output, batch):
    return output.last_hidden_state[batch["attention_mask"].bool()]


def expand(head_mask):
    """Any accepted form as [L, H] or [L, B, H]."""
    if head_mask.dim() == 1:
        return head_mask.expand(LAYERS, HEADS)
    return head_mask if head_mask.dim() == 2 else head_mask[..., 0, 0]


SHAPES = [(HEADS,), (LAYERS, HEADS), (LAYERS, 1, HEADS, 1, 1), (LAYERS, 3, HEADS, 1, 1)]


@pytest.mark.parametrize("how", ["packed", "keep_padding", "output_attentions"])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_and_its_gradient(shape, zeros, how, model, ragged):
    torch.manual_seed(3)
    head_mask = torch.rand(shape) * (torch.rand(shape) < 0.5 if zeros else 1)
    a, b = head_mask.clone().requires_grad_(), head_mask.clone().requires_grad_()
    mine = tokens(model(**ragged, head_mask=a, **({} if how == "packed" else {how: True})), ragged)
    expected = oracle(model, expand(b).expand(LAYERS, 3, HEADS) if b.dim() == 5 else expand(b), **ragged)
    torch.testing.assert_close(mine, expected, atol=2e-5, rtol=1e-4)
    mine.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64, torch.bfloat16])
def test_any_dtype_of_mask(dtype, model, ragged):
    head_mask = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]])
    expected = oracle(model, head_mask, **ragged)
    mine = tokens(model(**ragged, head_mask=head_mask.to(dtype)), ragged)
    torch.testing.assert_close(mine, expected, atol=2e-5, rtol=1e-4)


def test_importance_of_heads_on_real_weights(distilbert_dir, batch):
    """Michel et al.: |d loss / d m| of each head, against the change that masking it makes."""
    model = DistilBertModel.from_pretrained(distilbert_dir).eval()
    layers, heads = model.config.n_layers, model.config.n_heads

    def loss(head_mask):
        return tokens(model(**batch, head_mask=head_mask), batch).double().square().mean()

    head_mask = torch.ones(layers, heads, requires_grad=True)
    loss(head_mask).backward()
    for layer, head in ((0, 0), (2, 7), (5, 11)):
        with torch.no_grad():
            step = torch.zeros(layers, heads)
            step[layer, head] = 1e-2
            slope = (loss(1 + step) - loss(1 - step)) / 2e-2
        assert math.isclose(head_mask.grad[layer, head], slope, rel_tol=0.05, abs_tol=1e-6)


def test_attentions_are_masked_as_in_transformers_4(model, ragged):
    head_mask = torch.rand(LAYERS, HEADS)
    plain = model(**ragged, output_attentions=True).attentions[0]
    masked = model(**ragged, output_attentions=True, head_mask=head_mask).attentions[0]
    torch.testing.assert_close(masked, plain * head_mask[0][:, None, None])


def test_heads_pass_the_mask_on(tiny_config, ragged):
    model = DistilBertForSequenceClassification(tiny_config).eval()
    head_mask = torch.zeros(HEADS)
    assert not torch.equal(model(**ragged, head_mask=head_mask).logits, model(**ragged).logits)


@pytest.mark.parametrize(
    ("head_mask", "error", "message"),
    [
        (torch.ones(4), ValueError, r"of shape \[3\], \[3, 3\] or \[3, 1 or 2, 3, 1, 1\], got \[4\]"),
        (torch.ones(2, 3), ValueError, r"of shape \[3\], \[3, 3\] or \[3, 1 or 2, 3, 1, 1\], got \[2, 3\]"),
        (
            torch.ones(3, 4, 3, 1, 1),
            ValueError,
            r"of shape \[3\], \[3, 3\] or \[3, 1 or 2, 3, 1, 1\], got \[3, 4, 3, 1, 1\]",
        ),
        ([None] * 3, TypeError, "a tensor, got list"),
    ],
)
def test_bad_masks(head_mask, error, message, model):
    with pytest.raises(error, match=f"^DistilBertModel: head_mask must be {message}$"):
        model(torch.ones(2, 4, dtype=torch.int64), head_mask=head_mask)


PRUNED = {0: [1], 2: [2, 0]}


def left(pruned):
    return [[head for head in range(HEADS) if head not in pruned.get(i, [])] for i in range(LAYERS)]


def mask_of(pruned):
    head_mask = torch.ones(LAYERS, HEADS)
    for layer, heads in pruned.items():
        head_mask[layer, heads] = 0
    return head_mask


@pytest.mark.parametrize("pruned", [PRUNED, {1: [0, 1, 2]}, {}, {0: []}])
def test_pruning_is_masking_with_fewer_weights(pruned, model, ragged):
    expected = model(**ragged, head_mask=mask_of(pruned), output_hidden_states=True)
    before = sum(p.numel() for p in model.parameters())
    model.prune_heads(pruned)
    result = model(**ragged, output_hidden_states=True)
    torch.testing.assert_close(result.hidden_states, expected.hidden_states, atol=2e-5, rtol=1e-4)
    gone = sum(map(len, pruned.values()))
    assert before - sum(p.numel() for p in model.parameters()) == gone * (4 * 30 * SIZE + 3 * SIZE)
    assert [layer["heads"] for layer in model.config.quantization_config.structure] == left(pruned)
    attentions = model(**ragged, output_attentions=True).attentions
    assert [x.shape[1] for x in attentions] == [HEADS - len(pruned.get(i, [])) for i in range(LAYERS)]


def test_pruning_twice_and_masking_keep_the_original_numbers(model, ragged):
    both = {0: [0, 2], 1: [1]}
    mask = mask_of(both)
    mask[2] = torch.tensor([0.5, 0.0, 2.0])
    mask[0, 1] = 0.25
    expected = tokens(model(**ragged, head_mask=mask), ragged)
    model.prune_heads({0: [2]})
    model.prune_heads({0: [0, 2], 1: [1]})
    assert [layer["heads"] for layer in model.config.quantization_config.structure] == left(both)
    torch.testing.assert_close(tokens(model(**ragged, head_mask=mask), ragged), expected, atol=2e-5, rtol=1e-4)


def test_pruned_weights_train(model, ragged):
    model.prune_heads(PRUNED)
    model.train()
    model(**ragged).last_hidden_state.square().mean().backward()
    attention = model.transformer.layer[2].attention
    assert attention.q_lin.weight.shape == (SIZE, 30) and attention.out_lin.weight.shape == (30, SIZE)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("name", ["DistilBertModel", "DistilBertForSequenceClassification", "DistilBertForMaskedLM"])
@pytest.mark.parametrize("pruned", [PRUNED, {1: [0, 1, 2]}])
def test_pruned_files_round_trip(name, pruned, tiny_config, ragged, tmp_path):
    model = getattr(distilbert_fast, name)(tiny_config).eval()
    model.prune_heads(pruned)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    structure = [{"heads": heads, "ffn": 37} for heads in left(pruned)]
    assert stored["quantization_config"] == {"quant_method": "distilbert_fast", "format": 2, "structure": structure}
    assert "pruned_heads" not in stored
    again, info = getattr(distilbert_fast, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(again.eval()(**ragged)[0], model(**ragged)[0])
    again.prune_heads({0: [0]})
    assert 0 not in again.config.quantization_config.structure[0]["heads"]
    theirs = getattr(transformers, name).from_pretrained(tmp_path).eval()
    full = {"input_ids": ragged["input_ids"]}
    torch.testing.assert_close(theirs(**full)[0], model(**full)[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["DistilBertModel", "DistilBertForSequenceClassification"])
def test_directories_of_earlier_versions_keep_loading(name, tiny_config, ragged, tmp_path):
    """They have the heads that are gone in ``pruned_heads``, and nothing else says that they were pruned."""
    model = getattr(distilbert_fast, name)(tiny_config).eval()
    model.prune_heads(PRUNED)
    tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    config = transformers.DistilBertConfig.from_dict(tiny_config.to_dict() | {"pruned_heads": PRUNED})
    vars(config).pop("quantization_config", None)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["pruned_heads"] == {"0": [1], "2": [2, 0]}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    again, info = getattr(distilbert_fast, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(again.eval()(**ragged)[0], model(**ragged)[0])
    again.save_pretrained(tmp_path)
    assert "pruned_heads" not in json.loads((tmp_path / "config.json").read_text())
    again = getattr(distilbert_fast, name).from_pretrained(tmp_path)
    assert torch.equal(again.eval()(**ragged)[0], model(**ragged)[0])


def test_pruning_keeps_dtype_mode_and_frozen_weights(model):
    model = model.to(torch.bfloat16).eval()
    model.transformer.layer[0].attention.q_lin.requires_grad_(False)
    model.prune_heads({0: [1]})
    attention = model.transformer.layer[0].attention
    assert {p.dtype for p in attention.parameters()} == {torch.bfloat16}
    assert not attention.q_lin.training
    assert [p.requires_grad for p in attention.parameters()] == [False, False] + [True] * 6


@pytest.mark.parametrize(
    ("pruned", "message"),
    [
        ({3: [0]}, "of layers in 0…2, got 3"),
        ({"0": [0]}, "of layers in 0…2, got 0"),
        ({0: [3]}, "of heads in 0…2, got 3"),
        ({0: [1], 1: [-1]}, "of heads in 0…2, got -1"),
    ],
)
def test_bad_pruning_changes_nothing(pruned, message, model):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"^DistilBertModel: heads_to_prune must be {message}$"):
        model.prune_heads(pruned)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_only_plain_linear_layers_are_pruned(model):
    class Other(nn.Linear):
        pass

    model.transformer.layer[1].attention.k_lin = Other(30, 30)
    message = r"^DistilBertModel: k_lin of layer 1 must be nn\.Linear to be pruned, got Other$"
    with pytest.raises(TypeError, match=message):
        model.prune_heads({1: [0]})
