"""The drop-in DistilBERT classes against transformers' own."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers

import distilbert_fast
from distilbert_fast.modeling import distilbert as ours

NAMES = ours.__all__
TASKS = [name for name in NAMES if name != "DistilBertModel"]


def pair(name, config, seed=0):
    """Our model and transformers' of that class with the same random weights, LayerNorms and biases included."""
    torch.manual_seed(seed)
    theirs = getattr(transformers, name)(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model = getattr(distilbert_fast, name)(copy.deepcopy(config)).eval()
    model.load_state_dict(theirs.state_dict())
    return model, theirs


def inputs(name, lengths=(9, 4, 1, 6), length=9, vocabulary=97, seed=1):
    """Right-padded ids and mask; for multiple choice two choices each."""
    torch.manual_seed(seed)
    ids = torch.randint(1, vocabulary, (len(lengths), length))
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    if name.endswith("MultipleChoice"):
        ids, mask = ids.view(-1, 2, length), mask.view(-1, 2, length)
    return {"input_ids": ids * mask, "attention_mask": mask}


def labels(name, batch):
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if name.endswith("QuestionAnswering"):
        return {"start_positions": torch.tensor([1, 0, 0, 2]), "end_positions": torch.tensor([7, 3, 0, 4])}
    if name.endswith(("MaskedLM", "TokenClassification")):
        return {"labels": torch.where(mask == 1, ids % 2, -100)}
    return {"labels": torch.tensor([0, 1, 1, 0][: len(ids)])}


def real(tensor, mask):
    """Per-token values at tokens, everything else as it is."""
    mask = mask.flatten(0, -2)
    return tensor[mask.bool()] if tensor.shape[:2] == mask.shape else tensor


def assert_same(ours, theirs, mask, **tolerance):
    assert type(ours) is type(theirs)
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(real(ours, mask), real(theirs, mask), **tolerance)
    elif theirs is None:
        return
    elif isinstance(theirs, (tuple, list)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b, mask, **tolerance)
    else:
        assert list(ours.keys()) == list(theirs.keys())
        for key in theirs:
            assert_same(ours[key], theirs[key], mask, **tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_is_transformers_class_in_name_parameters_and_modules(name, tiny_config):
    model, theirs = pair(name, tiny_config)
    assert isinstance(model, type(theirs)) and type(model).__name__ == name
    assert list(model.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert [type(m).__name__ for m in model.modules()] == [type(m).__name__ for m in theirs.modules()]
    assert model.base_model_prefix == "distilbert" and model.config_class is transformers.DistilBertConfig


def test_auto_classes_still_give_transformers_own(distilbert_dir):
    assert type(transformers.AutoModel.from_pretrained(distilbert_dir)) is transformers.DistilBertModel


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("output_hidden_states", [True, False])
@pytest.mark.parametrize("output_attentions", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_every_output_flag(name, output_attentions, output_hidden_states, return_dict, tiny_config):
    tiny_config._attn_implementation = "eager"  # transformers gives attentions only there
    model, theirs = pair(name, tiny_config)
    batch = inputs(name)
    flags = {
        "output_attentions": output_attentions,
        "output_hidden_states": output_hidden_states,
        "return_dict": return_dict,
    }
    for given in ({}, labels(name, batch)) if name in TASKS else ({},):
        with torch.no_grad():
            a, b = model(**batch, **given, **flags), theirs(**batch, **given, **flags)
        assert_same(a, b, batch["attention_mask"], atol=2e-5, rtol=1e-4)


def test_flags_from_the_config(tiny_config):
    tiny_config._attn_implementation = "eager"
    tiny_config.output_hidden_states = tiny_config.output_attentions = True
    tiny_config.return_dict = False
    model, theirs = pair("DistilBertModel", tiny_config)
    batch = inputs("")
    assert_same(model(**batch), theirs(**batch), batch["attention_mask"], atol=2e-5, rtol=1e-4)


def test_hidden_states_by_index(tiny_config):
    model, _ = pair("DistilBertModel", tiny_config)
    everything = model(**inputs(""), output_hidden_states=True).hidden_states
    for selection, kept in ((1, {1}), (-1, {3}), ([0, -2], {0, 2})):
        chosen = model(**inputs(""), output_hidden_states=selection).hidden_states
        assert [i for i, x in enumerate(chosen) if x is not None] == sorted(kept)
        assert all(torch.equal(chosen[i], everything[i]) for i in kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_real_weights_and_real_text(dtype, distilbert_dir, batch):
    exact = transformers.DistilBertModel.from_pretrained(distilbert_dir).double().eval()
    theirs = transformers.DistilBertModel.from_pretrained(distilbert_dir, dtype=dtype).eval()
    model = distilbert_fast.DistilBertModel.from_pretrained(distilbert_dir, dtype=dtype).eval()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        truth = exact(**batch).last_hidden_state[real]
        mine, hf = (m(**batch).last_hidden_state for m in (model, theirs))
    assert mine.dtype == dtype and mine[~real].eq(0).all()
    assert (mine[real] - truth).abs().max() <= 2 * (hf[real] - truth).abs().max() + 1e-12


def test_is_the_bert_it_was_made_from(bert, distilbert_dir, batch):
    model = distilbert_fast.DistilBertModel.from_pretrained(distilbert_dir).eval()
    with torch.no_grad():
        a, b = (m(**batch).last_hidden_state for m in (model, bert))
    assert_same(a, b, batch["attention_mask"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "mask",
    [
        [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]],  # a row of padding only
        [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]],  # padding first
        [[1, 0, 1, 0], [1, 0, 0, 1], [1, 1, 1, 1]],  # padding between
        [[1, 1, 1, 1]] * 3,
        [[1, 0, 0, 0]] * 3,
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_masks(mask, dtype, tiny_config):
    model, theirs = pair("DistilBertModel", tiny_config)
    ids, mask = torch.randint(0, 97, (3, 4)), torch.tensor(mask)
    result = model(ids, mask.to(dtype)).last_hidden_state
    assert result.isfinite().all()
    assert_same(result, theirs(ids, mask).last_hidden_state, mask, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(3, 1), (1, 1), (2, 23)])
def test_sizes(shape, tiny_config):
    ids = torch.randint(1, 97, shape)
    for name in ("DistilBertForSequenceClassification", "DistilBertForQuestionAnswering", "DistilBertModel"):
        model, theirs = pair(name, tiny_config)
        for mask in (None, torch.ones_like(ids)):
            a, b = model(ids, mask)[0], theirs(ids, mask)[0]
            assert a.shape == b.shape
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_nothing_to_do(tiny_config):  # transformers itself stops at B = 0
    model, _ = pair("DistilBertForSequenceClassification", tiny_config)
    none = torch.empty(0, 5, dtype=torch.int64)
    assert model(none, none).logits.shape == (0, 2)
    model, theirs = pair("DistilBertModel", tiny_config)
    flags = {"output_attentions": True, "output_hidden_states": True}
    output = model(none, none, **flags)
    assert [x.shape for x in output.attentions] == [(0, 3, 5, 5)] * 3
    assert [x.shape for x in output.hidden_states] == [(0, 5, 30)] * 4
    assert model(torch.empty(2, 0, dtype=torch.int64)).last_hidden_state.shape == (2, 0, 30)
    empty = torch.zeros(2, 4, dtype=torch.int64)
    found, expected = (m(empty, empty).last_hidden_state for m in (model, theirs))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_inputs_embeds_and_position_ids(tiny_config):
    model, theirs = pair("DistilBertModel", tiny_config)
    batch = inputs("")
    mask = batch["attention_mask"]
    embeds = torch.randn(4, 9, 30)
    for position_ids in (None, torch.arange(9).flip(0)[None], torch.randint(0, 23, (4, 9))):
        for given in ({"inputs_embeds": embeds}, {"input_ids": batch["input_ids"]}):
            given = {**given, "attention_mask": mask, "position_ids": position_ids}
            assert_same(model(**given), theirs(**given), mask, atol=2e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("mode", ["plain", "checkpointed"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients(name, mode, tiny_config):
    for dropout in ("dropout", "attention_dropout", "qa_dropout", "seq_classif_dropout"):
        setattr(tiny_config, dropout, 0.0)
    model, theirs = pair(name, tiny_config)
    model.train()
    theirs.train()
    if mode == "checkpointed":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = inputs(name)
    batch["input_ids"].view(-1)[2] = 0  # the padding id as a token: its embedding must get no gradient
    for m in (model, theirs):
        output = m(**batch, **(labels(name, batch) if name in TASKS else {}))
        loss = output.loss if name in TASKS else real(output[0], batch["attention_mask"]).square().mean()
        loss.backward()
    expected = dict(theirs.named_parameters())
    for key, parameter in model.named_parameters():
        assert (parameter.grad is None) == (expected[key].grad is None), key
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[key].grad, atol=2e-5, rtol=1e-3, msg=key)
    if name != "DistilBertForMaskedLM":  # there the output layer is the same matrix
        assert model.get_input_embeddings().weight.grad[0].eq(0).all()


def test_real_gradients(distilbert_dir, batch):
    config = {"dropout": 0.0, "attention_dropout": 0.0}
    theirs = transformers.DistilBertModel.from_pretrained(distilbert_dir, **config).train()
    model = distilbert_fast.DistilBertModel.from_pretrained(distilbert_dir, **config).train()
    for m in (model, theirs):
        m(**batch).last_hidden_state[:, 0].square().mean().backward()
    for (key, a), (_, b) in zip(model.named_parameters(), theirs.named_parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-4 * b.grad.abs().max() + 1e-9, key


@pytest.mark.parametrize("name", ["DistilBertForMaskedLM", "DistilBertForTokenClassification"])
def test_labels_at_padding_count_as_in_transformers(name, tiny_config):
    model, theirs = pair(name, tiny_config)
    batch = inputs(name)
    everywhere = batch["input_ids"] % 2  # no -100 at padding
    torch.testing.assert_close(
        model(**batch, labels=everywhere).loss, theirs(**batch, labels=everywhere).loss, atol=2e-5, rtol=1e-4
    )


def test_what_reads_padding_gets_it(tiny_config):
    model, theirs = pair("DistilBertForQuestionAnswering", tiny_config)
    batch = inputs("")
    torch.testing.assert_close(model(**batch).start_logits, theirs(**batch).start_logits, atol=2e-5, rtol=1e-4)
    model, theirs = pair("DistilBertForSequenceClassification", tiny_config)
    batch = {"input_ids": batch["input_ids"].flip(1), "attention_mask": batch["attention_mask"].flip(1)}
    torch.testing.assert_close(model(**batch).logits, theirs(**batch).logits, atol=2e-5, rtol=1e-4)
    model, theirs = pair("DistilBertModel", tiny_config)
    batch = inputs("")
    kept = model(**batch, keep_padding=True).last_hidden_state
    torch.testing.assert_close(kept, theirs(**batch).last_hidden_state, atol=2e-5, rtol=1e-4)
    assert model(**batch).last_hidden_state[batch["attention_mask"] == 0].eq(0).all()


def test_chunked_feed_forward(tiny_config):
    model, _ = pair("DistilBertModel", tiny_config)
    tiny_config.chunk_size_feed_forward = 7
    chunked, _ = pair("DistilBertModel", tiny_config)
    batch = inputs("")
    torch.testing.assert_close(chunked(**batch)[0], model(**batch)[0], atol=1e-6, rtol=1e-5)
    assert chunked(**{k: v[:0] for k, v in batch.items()})[0].shape == (0, 9, 30)


def test_dropout_is_drawn_from_torchs_generator(tiny_config):
    model, _ = pair("DistilBertModel", tiny_config)
    batch = inputs("")
    calm = model(**batch)[0]
    model.train()
    torch.manual_seed(3)
    first, second = model(**batch)[0], model(**batch)[0]
    torch.manual_seed(3)
    assert torch.equal(model(**batch)[0], first)
    assert not torch.equal(first, second) and not torch.equal(first, calm)


@pytest.mark.parametrize("where", ["dropout", "attention_dropout"])
def test_each_dropout_acts_in_training_only(where, tiny_config):
    tiny_config.dropout = tiny_config.attention_dropout = 0.0
    setattr(tiny_config, where, 0.3)
    model, _ = pair("DistilBertModel", tiny_config)
    batch = inputs("")
    calm = model(**batch)[0]
    assert torch.equal(model(**batch)[0], calm)
    assert not torch.equal(model.train()(**batch)[0], calm)


@pytest.mark.parametrize("name", NAMES)
def test_files_go_both_ways(name, tiny_config, tmp_path):
    model, theirs = pair(name, tiny_config)
    model.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == [name]
    batch = inputs(name)
    for cls, directory in ((getattr(distilbert_fast, name), "theirs"), (getattr(transformers, name), "ours")):
        again, info = cls.from_pretrained(tmp_path / directory, output_loading_info=True)
        assert not any(info.values())
        assert_same(again.eval()(**batch)[0], theirs(**batch)[0], batch["attention_mask"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("choice", ["eager", "sdpa"])
def test_attn_implementation_changes_no_number(choice, tiny_config, tmp_path):
    model, _ = pair("DistilBertModel", tiny_config)
    model.save_pretrained(tmp_path)
    other = distilbert_fast.DistilBertModel.from_pretrained(tmp_path, attn_implementation=choice).eval()
    assert other.config._attn_implementation == choice
    assert torch.equal(other(**inputs(""))[0], model(**inputs(""))[0])


def test_copies_and_resized_embeddings(tiny_config):
    model, theirs = pair("DistilBertForMaskedLM", tiny_config)
    batch = inputs("")
    assert torch.equal(copy.deepcopy(model)(**batch).logits, model(**batch).logits)
    for m in (model, theirs):
        m.resize_token_embeddings(101)
        m.resize_position_embeddings(11)
    assert model(**batch).logits.shape == (4, 9, 101)
    with pytest.raises(ValueError, match="at most 11 positions"):
        model(torch.ones(1, 12, dtype=torch.int64))


def test_embeddings_that_do_more_than_look_up_are_called_as_modules(tiny_config):
    batch = inputs("")
    model, theirs = pair("DistilBertModel", tiny_config)
    model.embeddings.word_embeddings.sparse = True
    loss = real(model(**batch)[0], batch["attention_mask"]).square().mean()
    torch.testing.assert_close(loss, real(theirs(**batch)[0], batch["attention_mask"]).square().mean())
    loss.backward()
    assert model.embeddings.word_embeddings.weight.grad.is_sparse


def test_inputs_are_unchanged_and_results_repeat(tiny_config):
    model, _ = pair("DistilBertForSequenceClassification", tiny_config)
    batch = inputs("")
    before = copy.deepcopy(batch)
    first, second = model(**batch).logits, model(**batch).logits
    assert torch.equal(first, second) and all(torch.equal(batch[k], before[k]) for k in batch)
    strided = {k: torch.stack([v, v], dim=-1)[..., 0] for k, v in batch.items()}
    assert torch.equal(model(**strided).logits, first)


BAD = {
    "no ids": (
        {},
        ValueError,
        r"exactly one of input_ids and inputs_embeds must be given",
    ),
    "both": (
        {"input_ids": torch.ones(1, 2, dtype=torch.int64), "inputs_embeds": torch.ones(1, 2, 30)},
        ValueError,
        r"exactly one of input_ids and inputs_embeds must be given",
    ),
    "1-D ids": ({"input_ids": torch.tensor([1])}, ValueError, r"input_ids must be of shape \[B, T\], got \[1\]"),
    "float ids": ({"input_ids": torch.ones(1, 2)}, TypeError, r"input_ids must be int64 or int32, got float32"),
    "high id": ({"input_ids": torch.tensor([[1, 97]])}, ValueError, r"input_ids must be in 0…96, got 97"),
    "negative id": ({"input_ids": torch.tensor([[1, -1]])}, ValueError, r"input_ids must be in 0…96, got -1"),
    "long": (
        {"input_ids": torch.ones(1, 24, dtype=torch.int64)},
        ValueError,
        r"input_ids must be of at most 23 positions \(max_position_embeddings\), got 24",
    ),
    "width": (
        {"inputs_embeds": torch.ones(1, 2, 31)},
        ValueError,
        r"inputs_embeds must be of shape \[B, T, 30\], got \[1, 2, 31\]",
    ),
    "long embeds": (
        {"inputs_embeds": torch.ones(1, 24, 30)},
        ValueError,
        r"inputs_embeds must be of at most 23 positions \(max_position_embeddings\), got 24",
    ),
    "position": (
        {"input_ids": torch.ones(1, 2, dtype=torch.int64), "position_ids": torch.tensor([[0, 23]])},
        ValueError,
        r"position_ids must be in 0…22, got 23",
    ),
    "positions": (
        {"input_ids": torch.ones(3, 2, dtype=torch.int64), "position_ids": torch.tensor([[0, 1]] * 2)},
        ValueError,
        r"position_ids must be of shape \[3 or 1, 2\], got \[2, 2\]",
    ),
    "short mask": (
        {"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.ones(2, 2)},
        ValueError,
        r"attention_mask must be of shape \[2, 3\], got \[2, 2\]",
    ),
    "3-D mask": (
        {"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.ones(2, 1, 3)},
        ValueError,
        r"attention_mask must be of shape \[2, 3\], got \[2, 1, 3\]",
    ),
    "mask of lists": (
        {"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": [[1, 1, 0]] * 2},
        TypeError,
        r"attention_mask must be a tensor, got list",
    ),
    "causal": (
        {"input_ids": torch.ones(2, 3, dtype=torch.int64), "is_causal": True},
        ValueError,
        r"is_causal must be False, this is an encoder, got True",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, tiny_config):
    given, error, message = BAD[case]
    model, _ = pair("DistilBertModel", tiny_config)
    with pytest.raises(error, match=f"^DistilBertModel: {message}$"):
        model(**given)
