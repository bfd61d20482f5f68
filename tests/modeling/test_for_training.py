"""Models of transformers, made to train on this package's kernels, stay the models they are."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers import BertConfig, DistilBertConfig, GPT2Config, RobertaConfig

import distilbert_fast
from distilbert_fast.modeling.training import for_training

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "num_labels": 2}
HEADS = ["Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]
CONFIGS = {
    "DistilBert": DistilBertConfig(**SIZES, hidden_dim=64, dropout=0.0, attention_dropout=0.0),
    "Bert": BertConfig(**SIZES, intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "Roberta": RobertaConfig(**SIZES, intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
}


def make(family, head):
    torch.manual_seed(0)
    return getattr(transformers, f"{family}{head}")(copy.deepcopy(CONFIGS[family])).train()


def batch():
    torch.manual_seed(1)
    real = torch.arange(9) < torch.tensor([9, 4, 1])[:, None]
    ids = torch.randint(3, 50, (3, 9)).where(real, torch.tensor(1))  # RoBERTa's padding id
    return {"input_ids": ids, "attention_mask": real.long()}


def outputs(model, inputs):
    """What a model answers at real tokens, and the gradients of its sum of squares."""
    found = model(**inputs)
    answers = [found.last_hidden_state] if "last_hidden_state" in found else [found[key] for key in found]
    real = inputs["attention_mask"].bool()
    answers = [y[real] if y.shape[:2] == real.shape else y for y in answers]
    model.zero_grad()
    sum(y.square().sum() for y in answers).backward()
    return answers, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", CONFIGS)
def test_answers_and_gradients_stay(family, head):
    theirs, ours = make(family, head), for_training(make(family, head))
    expected, found = outputs(theirs, batch()), outputs(ours, batch())
    for y, reference in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(y, reference, atol=1e-5, rtol=1e-4)
    # a pooler that nobody reads has no gradient in either
    assert found[1].keys() == expected[1].keys()
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, expected[1][name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_kernels_are_in_it_but_not_in_its_files(family, tmp_path):
    theirs = make(family, "ForSequenceClassification")
    kept = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    ours = for_training(theirs)
    assert ours is theirs and for_training(ours) is ours  # in place, once
    if family == "DistilBert":
        assert type(ours) is distilbert_fast.DistilBertForSequenceClassification
    else:
        assert ours.config._attn_implementation == "distilbert_fast"
    ours.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded).__module__.startswith("transformers.") and loaded.config._attn_implementation == "sdpa"
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, kept[name])


def test_question_answering_keeps_padding():
    """Its softmax runs over every position: those of padding must be computed, as transformers does."""
    theirs, ours = make("DistilBert", "ForQuestionAnswering"), for_training(make("DistilBert", "ForQuestionAnswering"))
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch()).start_logits, theirs(**batch()).start_logits, atol=1e-5, rtol=1e-4)


def test_a_model_that_the_kernels_do_not_know_is_left_alone():
    model = transformers.GPT2Model(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=10))
    assert type(for_training(model)) is transformers.GPT2Model and model.config._attn_implementation == "sdpa"
