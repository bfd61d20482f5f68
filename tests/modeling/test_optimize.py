"""optimize() against the same model before it: every family and head, and everything that may happen to it later."""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle
import threading

import pytest
import torch
import transformers
from torch import nn

import distilbert_fast
from distilbert_fast import optimize
from distilbert_fast.engine.engine import Engine

ODD = dict(vocab_size=97, max_position_embeddings=23, num_labels=2)
BERT = dict(num_hidden_layers=3, num_attention_heads=3, hidden_size=30, intermediate_size=37, **ODD)
CONFIGS = {
    "DistilBert": dict(n_layers=3, n_heads=3, dim=30, hidden_dim=37, pad_token_id=0, **ODD),
    "Bert": BERT | dict(type_vocab_size=3, pad_token_id=0),
    "Roberta": BERT | dict(type_vocab_size=2, pad_token_id=1),
}
HEADS = ["Model", *(f"For{x}" for x in ("MaskedLM", "SequenceClassification", "TokenClassification"))]
NAMES = [
    *(family + head for family in CONFIGS for head in [*HEADS, "ForMultipleChoice", "ForQuestionAnswering"]),
    "BertForPreTraining",
    "BertForNextSentencePrediction",
]


def family(name):
    return (
        "DistilBert" if name.startswith("DistilBert") else name[: name.index("t") + 1] if "Bert" in name else "Roberta"
    )


def make(name, seed=0, module=transformers, **changes):
    """A model with random weights of odd sizes, LayerNorms and biases included."""
    torch.manual_seed(seed)
    kind = family(name)
    config = getattr(transformers, f"{kind}Config")(**CONFIGS[kind] | changes)
    model = getattr(module, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def inputs(name, lengths=(9, 4, 1, 6), length=9, seed=1):
    """Right-padded ids and mask, token types where the family has them; two choices each for multiple choice."""
    torch.manual_seed(seed)
    kind = family(name)
    pad = CONFIGS[kind]["pad_token_id"]
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    ids = torch.where(mask == 1, torch.randint(2, 97, (len(lengths), length)), pad)
    batch = {"input_ids": ids, "attention_mask": mask}
    if kind != "DistilBert":
        batch["token_type_ids"] = torch.randint(0, 2, ids.shape)
    if name.endswith("MultipleChoice"):
        batch = {key: value.view(-1, 2, length) for key, value in batch.items()}
    return batch


def assert_same(ours, theirs, mask=None, **tolerance):
    """Equal at tokens, where a tensor has a row for each position; equal everywhere else."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, torch.Tensor):
        rows = None if mask is None else mask.flatten(0, -2).bool()  # [B, T], also of two choices each
        if rows is not None and theirs.shape[:2] == rows.shape:
            ours, theirs = ours[rows], theirs[rows]
        torch.testing.assert_close(ours, theirs, **tolerance)
    elif isinstance(theirs, tuple):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b, mask, **tolerance)
    elif theirs is not None:
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert_same(ours[key], theirs[key], mask, **tolerance)


@pytest.fixture
def calls(monkeypatch):
    """How often the engine ran: appended to by each call of it."""
    seen = []
    encode = Engine.encode

    def spy(self, input_ids, *args, **kwargs):
        seen.append(tuple(input_ids.shape))
        return encode(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(Engine, "encode", spy)
    return seen


@contextlib.contextmanager
def expect(calls, count):
    before = len(calls)
    yield
    assert len(calls) - before == count, f"the engine ran {len(calls) - before} times, expected {count}"


def both(name, **changes):
    model = make(name, **changes)
    return optimize(copy.deepcopy(model)), model


# What stays the same -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_outputs_of_every_head(name, calls):
    ours, theirs = both(name)
    batch = inputs(name)
    tokens = None if name.endswith("QuestionAnswering") else batch["attention_mask"]  # whose padding is computed too
    with torch.no_grad():
        for flags in ({}, {"output_hidden_states": True}, {"return_dict": False}):
            with expect(calls, 1):
                assert_same(ours(**batch, **flags), theirs(**batch, **flags), tokens)
        full = {key: value for key, value in batch.items() if key != "attention_mask"}
        with expect(calls, 1):
            assert_same(ours(**full), theirs(**full))
        with expect(calls, 0):
            ours.set_attn_implementation("eager"), theirs.set_attn_implementation("eager")
            a, b = (m(**batch, output_attentions=True) for m in (ours, theirs))
            assert_same(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("DistilBert")])
def test_our_own_classes(name, calls):
    ours, theirs = both(name, module=distilbert_fast)
    batch = inputs(name)
    mask = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    with torch.no_grad(), expect(calls, 2):
        assert_same(ours(**batch), theirs(**batch), batch["attention_mask"])
        a, b = (m(**batch, head_mask=mask) for m in (ours, theirs))
        assert_same(a, b, batch["attention_mask"])
    if not name.endswith("Model"):
        ours.prune_heads({0: [1], 2: [0, 1, 2]}), theirs.prune_heads({0: [1], 2: [0, 1, 2]})
        with torch.no_grad():
            a, b = (m(**batch, head_mask=mask) for m in (ours, theirs))
            assert_same(a, b, batch["attention_mask"])


def test_real_bert_on_real_text(bert, tokenizer, texts, calls):
    ours = optimize(copy.deepcopy(bert))
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad(), expect(calls, 1):
        a, b = ours(**batch), bert(**batch)
    assert_same(a, b, batch["attention_mask"], rtol=1e-4, atol=1e-5)
    assert a.last_hidden_state[batch["attention_mask"] == 0].abs().max() == 0


@pytest.mark.parametrize("precision, cosine", [("fp32", 0.999999), ("bf16", 0.9995), ("fp16", 0.9999), ("int8", 0.99)])
def test_precisions_on_real_text(precision, cosine, bert, tokenizer, texts):
    ours = optimize(copy.deepcopy(bert), precision)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        a, b = (m(**batch).last_hidden_state[batch["attention_mask"] == 1] for m in (ours, bert))
    assert a.dtype == torch.float32
    assert torch.cosine_similarity(a, b, dim=-1).mean() > cosine


def test_model_is_otherwise_untouched(tmp_path, calls):
    model = make("BertForSequenceClassification")
    model.save_pretrained(tmp_path / "before")
    names, kinds, signatures, tensors, config = observe(model)
    assert optimize(model) is model
    assert observe(model)[:3] == (names, kinds, signatures)
    assert observe(model)[4] == config
    assert all(a is b for a, b in zip(observe(model)[3], tensors, strict=True))
    assert isinstance(model, transformers.BertForSequenceClassification)
    assert isinstance(model.bert, transformers.BertModel)
    model(**inputs("Bert"))
    model.save_pretrained(tmp_path / "after")
    assert sorted(p.name for p in (tmp_path / "after").iterdir()) == ["config.json", "model.safetensors"]
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes()


def observe(model):
    modules = dict(model.named_modules())
    return (
        list(model.state_dict()),
        {name: (type(m).__name__, type(m).__module__) for name, m in modules.items()},
        [inspect.signature(m.forward) for m in modules.values()],
        [*model.parameters(), *model.buffers()],
        model.config.to_dict(),
    )


def test_twice_is_once(calls):
    model = optimize(make("BertModel"))
    kind = type(model)
    assert optimize(model, "bf16") is model and type(model) is kind
    with torch.no_grad(), expect(calls, 1):
        model(**inputs("Bert"))


# Padding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DistilBertModel", "BertModel", "RobertaModel"])
def test_small_batches(name, calls):
    ours, theirs = both(name)
    with torch.no_grad(), expect(calls, 6):
        for shape in ((1, 1), (3, 1)):
            ids = torch.full(shape, 5)
            assert_same(ours(ids), theirs(ids))
            assert_same(ours(ids, torch.ones(shape)), theirs(ids, torch.ones(shape)))
        ids = torch.empty(0, 5, dtype=torch.int64)  # transformers' own forward cannot take an empty batch
        for output in (ours(ids), ours(ids, torch.empty(0, 5))):
            assert output.last_hidden_state.shape == (0, 5, 30)


@pytest.mark.parametrize("name", ["DistilBertModel", "BertModel", "RobertaModel"])
def test_padding_anywhere(name, calls):
    ours, theirs = both(name)
    batch = inputs(name)
    holes = torch.tensor([[1, 1, 0, 1, 1, 0, 0, 1, 0], [1] * 9, [1, 0, 0, 0, 0, 0, 0, 0, 1], [1] + [0] * 8])
    with torch.no_grad():
        with expect(calls, 1):
            a, b = (m(**batch | {"attention_mask": holes}) for m in (ours, theirs))
            assert_same(a, b, holes)
        with expect(calls, 1):  # position 0 is padding, and heads read it
            a, b = (m(**batch | {"attention_mask": holes.flip(1)}) for m in (ours, theirs))
            assert_same(a, b)


@pytest.mark.parametrize("precision", [None, "bf16", "int8"])
def test_rows_of_padding_alone(precision, calls):
    """Heads read position 0 there too, so that is computed: without a key attention gives 0, as sdpa does."""
    theirs = make("BertModel")
    ours = optimize(copy.deepcopy(theirs), precision)
    tolerance = dict(rtol=0, atol={None: 1e-5, "bf16": 0.05, "int8": 0.1}[precision])
    for lengths in ((0, 4, 0, 6), (0, 0, 0, 0)):
        batch = inputs("Bert", lengths=lengths)
        with torch.no_grad(), expect(calls, 1):
            assert_same(ours(**batch), theirs(**batch), **tolerance)
    ours.set_attn_implementation("eager"), theirs.set_attn_implementation("eager")
    with torch.no_grad(), expect(calls, 0):  # which attends to padding where there is nothing else
        assert_same(ours(**batch), theirs(**batch), rtol=0, atol=0)


def test_labels_on_padding_count_as_they_did(calls):
    ours, theirs = both("BertForTokenClassification")
    batch = inputs("Bert")
    labels = batch["input_ids"] % 2
    with torch.no_grad():
        with expect(calls, 1):
            assert_same(ours(**batch, labels=labels), theirs(**batch, labels=labels))
        labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
        with expect(calls, 1):
            assert_same(ours(**batch, labels=labels), theirs(**batch, labels=labels), batch["attention_mask"])


def test_roberta_counts_positions_from_its_padding_id(calls):
    ours, theirs = both("RobertaModel", pad_token_id=3)
    ids = torch.randint(4, 97, (2, 9))
    ids[0, 6:] = 3
    ids[1, 4] = 3  # the padding id inside the text: not a position, but a token
    with torch.no_grad(), expect(calls, 2):
        assert_same(ours(ids), theirs(ids))
        assert_same(ours(ids, position_ids=torch.arange(9)[None]), theirs(ids, position_ids=torch.arange(9)[None]))


# Where transformers' own forward runs --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DistilBertForMaskedLM", "BertForMaskedLM", "RobertaForMaskedLM"])
def test_training_is_bit_for_bit_transformers_own(name, calls):
    ours, theirs = both(name)
    batch = inputs(name)
    losses = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        loss = model.train()(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        losses.append(loss)
    assert torch.equal(*losses) and not calls
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)


def test_gradients_in_eval_mode(calls, caplog):
    ours, theirs = both("DistilBertModel")
    batch = inputs("DistilBert")
    with expect(calls, 0):
        for model in (ours, theirs):
            model(**batch).last_hidden_state.sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    ours.requires_grad_(False)
    with expect(calls, 1):
        assert not ours(**batch).last_hidden_state.requires_grad


def test_frozen_encoder_under_a_head_that_learns(calls):
    ours, theirs = both("DistilBertForSequenceClassification")
    batch = inputs("DistilBert")
    for model in (ours, theirs):
        model.distilbert.requires_grad_(False)
        model(**batch, labels=torch.tensor([0, 1, 1, 0])).loss.backward()
    assert len(calls) == 1
    for a, b in zip(ours.classifier.parameters(), theirs.classifier.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("name", ["DistilBertModel", "BertModel", "RobertaModel"])
def test_what_the_engine_does_not_know(name, calls):
    ours, theirs = both(name)
    batch = inputs(name)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    embedded = theirs.get_input_embeddings()(ids)
    block = torch.zeros(4, 1, 9, 9).masked_fill(mask[:, None, None, :] == 0, torch.finfo(torch.float32).min)
    with torch.no_grad(), expect(calls, 0):
        for given in (
            {"inputs_embeds": embedded, "attention_mask": mask},
            {"input_ids": ids, "attention_mask": block},
            {"input_ids": ids, "output_hidden_states": True, "output_attentions": True},
        ):
            assert_same(ours(**given), theirs(**given), rtol=0, atol=0)
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(ours(ids, mask), theirs(ids, mask), rtol=0, atol=0)
        for model in (ours, theirs):
            with pytest.raises(ValueError, match="You must specify exactly one of input_ids or inputs_embeds"):
                model()


def test_hooks_inside_the_encoder_still_fire(calls):
    ours, theirs = both("BertModel")
    batch = inputs("Bert")
    seen = []
    handle = ours.encoder.layer[1].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        with expect(calls, 0):
            assert_same(ours(**batch), theirs(**batch), rtol=0, atol=0)
        assert len(seen) == 1
        handle.remove()
        with expect(calls, 1):
            ours(**batch)
        ours.encoder.layer[0].forward = lambda x, *args, **kwargs: x
        with expect(calls, 0):
            assert not torch.equal(ours(**batch)[0], theirs(**batch)[0])
        del ours.encoder.layer[0].forward
        ours(**batch, output_attentions=True)  # leaves transformers' own hooks in place
        with expect(calls, 1):
            assert_same(ours(**batch), theirs(**batch), batch["attention_mask"])


# Head masks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DistilBertModel", "BertModel", "RobertaModel"])
def test_head_mask(name, calls):
    ours, theirs = both(name)
    batch = inputs(name)
    mask = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 0.0], [1.0, 1.0, 2.0]])
    for head_mask in (mask, mask[0], mask[0] != 0):
        expected = copy.deepcopy(theirs)
        for i in range(3):  # the same factors on the columns of the output projection
            layer = expected.transformer.layer[i].attention if name[0] == "D" else expected.encoder.layer[i].attention
            out = layer.out_lin if name[0] == "D" else layer.output.dense
            factors = head_mask.float().expand(3, 3)[i].repeat_interleave(10)
            out.weight = nn.Parameter(out.weight * factors)
        with torch.no_grad(), expect(calls, 1):
            a = ours(**batch, head_mask=head_mask)
            assert_same(a, expected(**batch), batch["attention_mask"])


def test_head_mask_is_never_ignored():
    ours = optimize(make("BertForSequenceClassification"))
    batch = inputs("Bert")
    message = (
        "optimize: head_mask must be None where transformers' own forward runs, which ignores it (training,"
        " gradients, autocast, output_attentions, …), got a tensor; with"
        " attn_implementation='distilbert_fast' it is honoured"
    )
    with pytest.raises(ValueError) as error:
        ours.train()(**batch, head_mask=torch.ones(3))
    assert str(error.value) == message
    ours.eval()
    with pytest.raises(ValueError) as error, torch.no_grad():
        ours(**batch, head_mask=torch.ones(3), output_attentions=True)
    assert str(error.value) == message
    with pytest.raises(ValueError) as error, torch.no_grad():
        ours(**batch, head_mask=torch.ones(2, 3))
    assert str(error.value) == "engine: head_mask must be of shape [3] or [3, 3], got [2, 3]"


def test_head_mask_with_a_gradient(calls):
    mask = torch.tensor([1.0, 0.0, 0.5], requires_grad=True)
    ours = optimize(make("BertModel").requires_grad_(False))
    with pytest.raises(ValueError, match=r"^optimize: head_mask must be None where transformers' own forward runs"):
        ours(**inputs("Bert"), head_mask=mask)
    ours = optimize(make("DistilBertModel", module=distilbert_fast).requires_grad_(False))
    batch = inputs("DistilBert")
    with expect(calls, 0):
        ours(**batch, head_mask=mask).last_hidden_state.sum().backward()
        assert mask.grad.shape == (3,) and mask.grad.ne(0).any()
    with torch.no_grad():
        with expect(calls, 1):
            expected = ours(**batch, head_mask=mask)
        with expect(calls, 0):  # the older shape, which our own classes take
            found = ours(**batch, head_mask=mask.expand(3, 3)[:, None, :, None, None])
    assert_same(found, expected, batch["attention_mask"])


# Weights that change -------------------------------------------------------------------------------------------


def step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    batch = inputs("Bert")
    torch.manual_seed(5)
    model.train()(**batch).last_hidden_state.square().mean().backward()
    optimizer.step()
    model.eval()


def load(model):
    model.load_state_dict(make("BertModel", seed=9).state_dict())


def write(model):
    with torch.no_grad():
        model.encoder.layer[1].attention.self.key.weight[3, 4] += 3
        model.encoder.layer[1].attention.output.LayerNorm.bias.mul_(2)


def exchange(model):
    torch.manual_seed(6)
    model.encoder.layer[2].intermediate.dense = nn.Linear(30, 37)


def exchange_parameter(model):
    torch.manual_seed(6)
    model.encoder.layer[0].attention.self.value.weight = nn.Parameter(torch.randn(30, 30))


def shorten(model):
    model.encoder.layer = model.encoder.layer[:2]


CHANGES = {
    "optimizer step": step,
    "load_state_dict": load,
    "write in place": write,
    "another layer": exchange,
    "another parameter": exchange_parameter,
    "fewer layers": shorten,
    "more words": lambda model: model.resize_token_embeddings(120, mean_resizing=False),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "float64": lambda model: model.double(),
}


@pytest.mark.parametrize("precision", [None, "int8"])
@pytest.mark.parametrize("change", CHANGES)
def test_weights_are_never_stale(change, precision, calls):
    if precision == "int8" and change == "float64":
        pytest.skip("int8_linear has no float64")
    batch = inputs("Bert")
    ours = optimize(make("BertModel"), precision)
    with torch.no_grad():
        before = ours(**batch)[0]
        with torch.enable_grad():
            CHANGES[change](ours)
        theirs = make("BertModel")
        with torch.enable_grad():
            CHANGES[change](theirs)
        fresh = optimize(theirs, precision)
        with expect(calls, 2):
            a, b = ours(**batch)[0], fresh(**batch)[0]
    assert torch.equal(a, b)
    assert change == "more words" or not torch.equal(a, before.to(a.dtype))


def test_meta_device(calls):
    ours = optimize(make("BertModel")).to("meta")
    with torch.no_grad(), expect(calls, 0):
        assert ours(torch.ones(2, 5, dtype=torch.int64, device="meta"))[0].shape == (2, 5, 30)


def test_writes_through_data_need_another_call():
    batch = inputs("Bert")
    ours = optimize(make("BertModel"), "int8")
    with torch.no_grad():
        before = ours(**batch)[0]
        ours.encoder.layer[0].attention.self.query.weight.data.mul_(3)
        optimize(ours, "int8")
        assert not torch.equal(ours(**batch)[0], before)


def test_a_model_that_can_no_longer_be_packed(calls, caplog):
    ours, theirs = both("BertModel")
    batch = inputs("Bert")

    class Adapter(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    for model in (ours, theirs):
        torch.manual_seed(0)
        model.encoder.layer[1].output.dense = Adapter(37, 30)
    with torch.no_grad(), expect(calls, 0):
        assert_same(ours(**batch), theirs(**batch), rtol=0, atol=0)
    assert (
        "the model has changed, transformers' own forward runs: optimize: encoder.layer.1.output.dense" in caplog.text
    )
    with pytest.raises(
        TypeError, match=r"^optimize: encoder\.layer\.1\.output\.dense must be a module of transformers, got "
    ):
        optimize(theirs)


@pytest.mark.parametrize("name", ["DistilBertForSequenceClassification", "BertModel"])
def test_copies_have_weights_of_their_own(name, calls):
    ours, theirs = both(name)
    batch = inputs(name)
    with torch.no_grad():
        ours(**batch)
        for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert type(clone) is type(ours)
            with expect(calls, 1):
                assert_same(clone(**batch), theirs(**batch), batch["attention_mask"])
            for parameter in clone.parameters():
                parameter.zero_()
            with expect(calls, 2):
                assert clone(**batch)[0].eq(0).all()
                assert_same(ours(**batch), theirs(**batch), batch["attention_mask"])


def test_new_instances_of_its_class_are_plain(calls, tmp_path):
    ours, theirs = both("BertForTokenClassification")
    theirs.save_pretrained(tmp_path)
    batch = inputs("Bert")
    with torch.no_grad(), expect(calls, 0):
        fresh = type(ours).from_pretrained(tmp_path)
        for given in (batch, batch | {"labels": batch["input_ids"] % 2}):
            assert_same(fresh(**given), theirs(**given), rtol=0, atol=0)
        bare = type(ours.bert)(ours.config).eval()
        bare.load_state_dict(theirs.bert.state_dict(), strict=False)
        assert_same(bare(**batch)[0], theirs.bert(**batch)[0], rtol=0, atol=0)
    with torch.no_grad(), expect(calls, 1):
        assert_same(optimize(fresh)(**batch), theirs(**batch), batch["attention_mask"])


# Threads, compilers, pipelines ---------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [None, "int8"])
def test_threads_give_the_same_bits(precision, bert, tokenizer, texts):
    model = optimize(copy.deepcopy(bert), precision)
    batches = [tokenizer(texts[i:] + texts[:i], padding=True, return_tensors="pt") for i in range(4)]
    with torch.no_grad():
        expected = [model(**batch)[0] for batch in batches]
        model.encoder.layer[0].attention.self.query.weight.add_(0)  # so that the threads race to pack it, too
    wrong, ready = [], threading.Barrier(4)

    def work(i):
        ready.wait()
        with torch.no_grad():  # the mode is a thread's own
            for _ in range(3):
                if not torch.equal(model(**batches[i])[0], expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert not wrong


def test_torch_compile(calls):
    name = "BertForTokenClassification"
    ours, theirs = both(name)
    batch = inputs(name)
    compiled = torch.compile(ours, backend="eager")
    with torch.no_grad(), expect(calls, 2):
        for given in (batch, inputs(name, (3, 5), 5)):
            assert_same(compiled(**given), theirs(**given), given["attention_mask"])
    loss, expected = (m(**batch).logits.sum() for m in (compiled, theirs))
    loss.backward(), expected.backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.allclose(a.grad, b.grad, atol=1e-5, rtol=1e-4)


def test_torch_export_sees_transformers_own(calls):
    ours, theirs = both("DistilBertModel")
    batch = inputs("DistilBert")
    with torch.no_grad():
        program = torch.export.export(ours, (), batch)
        assert_same(program.module()(**batch), theirs(**batch))
    assert not calls


def test_pipeline(calls, bert, tokenizer):
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(copy.deepcopy(bert.config)).eval()
    texts = ["What a fine day.", "No.", "It rains, and it will go on raining until the cows come home."]
    pipe = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    before = pipe(texts, batch_size=3)
    optimize(model)
    with expect(calls, 1):
        after = pipe(texts, batch_size=3)
    for a, b in zip(before, after, strict=True):
        assert a["label"] == b["label"] and a["score"] == pytest.approx(b["score"], abs=1e-5)


def test_sentence_transformers(calls, bert_dir, texts):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(bert_dir), device="cpu")
    before = model.encode(texts)
    optimize(model[0].auto_model)
    with expect(calls, 1):
        after = model.encode(texts)
    assert abs(before - after).max() < 1e-5


# Refusals ------------------------------------------------------------------------------------------------------


def gpt2():
    config = transformers.GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1)
    return transformers.GPT2Model(config)


class MyBert(transformers.BertModel):
    pass


REFUSED = {
    "another family": (gpt2, "model must be a DistilBERT, BERT or RoBERTa encoder, got GPT2Model"),
    "no model": (lambda: nn.Linear(1, 1), "model must be a DistilBERT, BERT or RoBERTa encoder, got Linear"),
    "decoder": (lambda: make("BertModel", is_decoder=True), "model.config.is_decoder must be False, got True"),
    "activation": (lambda: make("BertModel", hidden_act="relu"), "model.config.hidden_act must be 'gelu', got 'relu'"),
    "tanh": (
        lambda: make("DistilBertModel", activation="gelu_new"),
        "model.config.activation must be 'gelu', got 'gelu_new'",
    ),
    "positions": (
        lambda: make("BertModel", position_embedding_type="relative_key"),
        "model.config.position_embedding_type must be 'absolute', got 'relative_key'",
    ),
    "own class": (
        lambda: MyBert(make("BertModel").config),
        f"model must be a module of transformers, got {MyBert.__module__}.MyBert",
    ),
    "meta": (lambda: make("BertModel").to("meta"), "model weights must be on one device, got meta"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_by_name(case):
    maker, message = REFUSED[case]
    model = maker()
    kind = type(model)
    with pytest.raises((TypeError, ValueError)) as error:
        optimize(model)
    assert str(error.value) == f"optimize: {message}"
    assert type(model) is kind


def test_refuses_an_unknown_precision():
    with pytest.raises(ValueError) as error:
        optimize(make("BertModel"), "fp8")
    assert str(error.value) == "optimize: precision must be one of 'fp32', 'bf16', 'fp16', 'int8', got 'fp8'"


def test_refuses_bad_ids_by_name():
    ours = optimize(make("BertModel"))
    with torch.no_grad():
        for ids, message in (
            (torch.full((2, 3), 97), "engine: input_ids must be in [0, 97), got 97"),
            (torch.full((2, 24), 3), "engine: input_ids must be at most 23 tokens long, got 24"),
            (torch.full((2, 3), 3.0), "engine: input_ids must be int64 or int32, got float32"),
        ):
            with pytest.raises((TypeError, ValueError)) as error:
                ours(ids)
            assert str(error.value).startswith(message)
