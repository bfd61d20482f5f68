"""Models whose modules, settings or readers are not as transformers made them: its numbers, whoever computes them.

Each edit is tried before ``optimize``, which may refuse it by name, and after, where its own forward must serve.
"""

from __future__ import annotations

import collections
import copy
import functools

import pytest
import torch
import transformers
from torch import nn
from transformers.models.bert import modeling_bert
from transformers.models.distilbert import modeling_distilbert as hf
from transformers.models.roberta import modeling_roberta

import distilbert_fast
from distilbert_fast import explain, optimize

S = dict(
    vocab_size=100,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=40,
    initializer_range=0.3,
)
CLOSE = dict(rtol=1e-4, atol=1e-4)
IDS = torch.randint(3, 100, (3, 12), generator=torch.Generator().manual_seed(1))
MASK = (torch.arange(12) < torch.tensor([12, 7, 4])[:, None]).long()


def make(kind="BertModel", seed=0, **changes):
    torch.manual_seed(seed)
    config = transformers.RobertaConfig if kind.startswith("Roberta") else transformers.BertConfig
    config = transformers.ElectraConfig if kind.startswith("Electra") else config
    extra = {"embedding_size": 32} if kind.startswith("Electra") else {}
    return getattr(transformers, kind)(config(**S, **extra, **changes)).eval()


@torch.no_grad()
def same(ours, theirs, *given, rows=None):
    a, b = (m(*given)[0] for m in (ours, theirs))
    assert a.shape == b.shape
    torch.testing.assert_close(*((a, b) if rows is None else (a[rows], b[rows])), **CLOSE)


# Modules and settings --------------------------------------------------------------------------------------------


class Sub(modeling_bert.BertLayer):
    def forward(self, *args, **kwargs):
        return 2 * super().forward(*args, **kwargs)


def of_all_layers(**values):
    def edit(m):
        for layer in m.encoder.layer:
            for name, value in values.items():
                setattr(layer.attention.self, name, value)

    return edit


def new_norm(**options):
    return lambda m: setattr(m.encoder.layer[0].output, "LayerNorm", nn.LayerNorm(32, **options))


def hook_in_a_new_dict(m):
    m.encoder.layer[0]._forward_hooks = collections.OrderedDict()
    m.encoder.layer[0].register_forward_hook(lambda module, args, output: 2 * output)


class Wrapped(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def eager_in_a_layer(m):
    attention = m.encoder.layer[0].attention.self
    attention.config = copy.deepcopy(m.config)
    attention.config._attn_implementation = "eager"


class LeftOut(nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


EDITS = {
    "scaling": of_all_layers(scaling=1.5),
    "causal": of_all_layers(is_causal=True),
    "heads": of_all_layers(num_attention_heads=2, attention_head_size=16),
    "eps": lambda m: setattr(m.embeddings.LayerNorm, "eps", 0.5),
    "max_norm": lambda m: setattr(m.embeddings.word_embeddings, "max_norm", 0.5),
    "activation": lambda m: setattr(m.encoder.layer[1].intermediate.intermediate_act_fn, "act", torch.relu),
    "another activation": lambda m: setattr(m.encoder.layer[1].intermediate, "intermediate_act_fn", nn.ReLU()),
    "dropout": lambda m: setattr(m.encoder.layer[0].output, "dropout", nn.Tanh()),
    "dropouts": lambda m: setattr(m.embeddings, "dropout", nn.Sequential(nn.Tanh())),
    "no bias": new_norm(bias=False),
    "not affine": new_norm(elementwise_affine=False),
    "identity": lambda m: setattr(m.embeddings, "LayerNorm", nn.Identity()),
    "RMSNorm": lambda m: setattr(m.embeddings, "LayerNorm", nn.RMSNorm(32)),
    "class": lambda m: setattr(m.encoder.layer[0], "__class__", Sub),
    "layer wrapped": lambda m: m.encoder.layer.__setitem__(0, Wrapped(m.encoder.layer[0])),
    "layer left out": lambda m: m.encoder.layer.__setitem__(0, LeftOut()),
    "attention wrapped": lambda m: setattr(m.encoder.layer[0], "attention", Wrapped(m.encoder.layer[0].attention)),
    "encoder wrapped": lambda m: setattr(m, "encoder", Wrapped(m.encoder)),
    "method": lambda m: setattr(m.encoder.layer[0], "feed_forward_chunk", lambda x: 2 * x),
    "decoder": lambda m: setattr(m.config, "is_decoder", True),
    "hook": hook_in_a_new_dict,
    "positions": lambda m: m.embeddings.position_ids.add_(3),
    "positions, uncounted": lambda m: m.embeddings.position_ids.numpy().__iadd__(3),
    "token types": lambda m: m.embeddings.token_type_ids.fill_(1),
    "cross attention": lambda m: setattr(m.encoder.layer[0].attention, "is_cross_attention", True),
    "forward of another layer": lambda m: setattr(m.encoder.layer[0], "forward", m.encoder.layer[1].forward),
    "method of another layer": lambda m: setattr(
        m.encoder.layer[0], "feed_forward_chunk", m.encoder.layer[1].feed_forward_chunk
    ),
    "function for a module": lambda m: [
        delattr(m.encoder.layer[0].output, "dropout"),
        setattr(m.encoder.layer[0].output, "dropout", lambda x: 2 * x),
    ],
    "eager attention in a layer": eager_in_a_layer,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("edit", EDITS)
def test_edits(edit):
    theirs = make()
    ours = optimize(make())
    same(ours, theirs, IDS)
    for model in (ours, theirs):
        torch.manual_seed(7)
        EDITS[edit](model)
    same(ours, theirs, IDS)
    for model in (ours, theirs):
        linear = next(module for module in model.modules() if isinstance(module, nn.Linear))
        linear.weight.data.mul_(1.1)  # packs again, if it can
    same(ours, theirs, IDS)
    try:
        before = optimize(copy.deepcopy(theirs))
    except (TypeError, ValueError) as error:
        assert str(error).startswith("optimize: ")
    else:
        same(before, theirs, IDS)


def test_roberta_counts_from_where_its_embeddings_say():
    theirs, ours = make("RobertaModel"), optimize(make("RobertaModel"))
    ids = IDS.clone()
    ids[0, 3], ids[1, :2] = 5, 1
    same(ours, theirs, ids)
    for model in (ours, theirs):
        model.embeddings.padding_idx = 5
    same(ours, theirs, ids)


def test_a_config_that_is_shared_and_changed():
    config = transformers.BertConfig(**S)
    torch.manual_seed(0)
    theirs = transformers.BertModel(config).eval()
    early = optimize(copy.deepcopy(theirs))
    config.num_attention_heads = early.config.num_attention_heads = 2
    same(optimize(copy.deepcopy(theirs)), theirs, IDS)
    with torch.no_grad():
        for model in (early, theirs):
            model.encoder.layer[0].output.dense.weight.mul_(1.1)
    same(early, theirs, IDS)


def test_dropouts_that_are_left_out_change_nothing():
    theirs, ours = make(), make()
    ours.encoder.layer[0].output.dropout = nn.Identity()
    same(optimize(ours), theirs, IDS)
    assert explain(ours).served == 1


def test_drop_in_settings():
    config = transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=100)
    for edit in (
        lambda m: [setattr(block.attention, "is_causal", True) for block in m.transformer.layer],
        lambda m: m.embeddings.position_ids.add_(3),
    ):
        torch.manual_seed(0)
        theirs = hf.DistilBertModel(config).eval()
        ours = distilbert_fast.DistilBertModel(config).eval()
        ours.load_state_dict(theirs.state_dict())
        for model in (ours, theirs):
            edit(model)
        same(ours, theirs, IDS)
        same(ours, theirs, IDS, MASK, rows=MASK.bool())


# Readers ---------------------------------------------------------------------------------------------------------


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(32, 2)

    def forward(self, x, **kwargs):
        return self.l(x.mean(1))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["RobertaForSequenceClassification", "ElectraForSequenceClassification"])
def test_a_head_of_ones_own_reads_all_tokens(kind, when):
    ours, theirs = make(kind), make(kind)
    if when == "after":
        same(optimize(ours), theirs, IDS)
    for model in (ours, theirs):
        torch.manual_seed(3)
        model.classifier = Mean()
    same(optimize(ours) if when == "before" else ours, theirs, IDS)


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.Conv1d(32, 2, 3, padding=1)

    def forward(self, x):
        return self.c(x.transpose(1, 2)).transpose(1, 2)


class MeanPooler(nn.Module):
    def forward(self, x):
        return x.mean(1)


def less_mean(module, args):
    return (args[0] - args[0].mean(1, keepdim=True),)


# What reads padded positions, where transformers' own head or pooler does not.
READERS = {
    "mean": ("RobertaForSequenceClassification", lambda m: setattr(m, "classifier", Mean())),
    "convolution": ("BertForTokenClassification", lambda m: setattr(m, "classifier", Convolution())),
    "forward": (
        "BertForTokenClassification",
        lambda m: setattr(m.classifier, "forward", lambda x: x[..., :2] - x[..., :2].mean(1, keepdim=True)),
    ),
    "pre-hook on the head": (
        "BertForTokenClassification",
        lambda m: m.classifier.register_forward_pre_hook(less_mean),
    ),
    "hook on a dropout": (
        "BertForTokenClassification",
        lambda m: m.dropout.register_forward_hook(lambda module, args, output: less_mean(module, [output])[0]),
    ),
    "hook on the encoder": (
        "BertForTokenClassification",
        lambda m: m.bert.register_forward_hook(
            lambda module, args, output: setattr(output, "last_hidden_state", less_mean(module, output)[0])
        ),
    ),
    "layer for a dropout": (
        "BertForTokenClassification",
        lambda m: setattr(m, "dropout", modeling_bert.BertLayer(transformers.BertConfig(**S)).eval()),
    ),
    "norm over positions": ("BertForTokenClassification", lambda m: setattr(m, "dropout", nn.LayerNorm((12, 32)))),
    "call": (
        "BertForTokenClassification",
        lambda m: setattr(m.dropout, "_call_impl", lambda x: x - x.mean(1, keepdim=True)),
    ),
    "pooler": ("BertModel", lambda m: setattr(m, "pooler", MeanPooler())),
    "pooler under a head": ("BertForSequenceClassification", lambda m: setattr(m.bert, "pooler", MeanPooler())),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("reader", READERS)
def test_readers_of_padding(reader, when):
    kind, edit = READERS[reader]
    ours, theirs = make(kind), make(kind)
    if when == "after":
        same(optimize(ours), theirs, IDS)
    for model in (ours, theirs):
        torch.manual_seed(3)
        edit(model)
    if when == "before":
        optimize(ours)
    with torch.no_grad():
        found, want = (m(IDS, MASK)[-1 if reader == "pooler" else 0] for m in (ours, theirs))
    rows = MASK.bool() if found.dim() == 3 else slice(None)
    torch.testing.assert_close(found[rows], want[rows], **CLOSE)
    assert explain(ours).served == (1 if when == "before" else 2)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("part", ["BertLayer", "BertPooler", "BertForSequenceClassification", "RobertaLMHead"])
def test_classes_that_were_patched_before(part, wrapped, monkeypatch):
    """Also by a function that says with functools.wraps that it is the one whose place it takes."""
    module = modeling_roberta if part.startswith("Roberta") else modeling_bert
    forward = getattr(module, part).forward

    def patched(self, *args, **given):
        if part == "BertLayer":
            return 2 * forward(self, *args, **given)
        if part == "BertForSequenceClassification":
            return (self.classifier(self.bert(*args, **given).last_hidden_state.mean(1)),)
        return forward(self, args[0] - args[0].mean(1, keepdim=True))

    monkeypatch.setattr(getattr(module, part), "forward", functools.wraps(forward)(patched) if wrapped else patched)
    kind = {"RobertaLMHead": "RobertaForMaskedLM"}.get(part, "BertForSequenceClassification")
    theirs = make(kind)
    if part == "BertLayer":
        with pytest.raises(TypeError, match=r"forward of .*BertLayer must be the one that its library gave it"):
            optimize(make(kind))
    else:
        rows = None if kind.endswith("SequenceClassification") else MASK.bool()
        same(optimize(make(kind)), theirs, IDS, MASK, rows=rows)


def test_a_drop_in_whose_head_reads_padding():
    config = transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=100)
    torch.manual_seed(0)
    theirs = hf.DistilBertForTokenClassification(config).eval()
    ours = distilbert_fast.DistilBertForTokenClassification(config).eval()
    ours.load_state_dict(theirs.state_dict())
    ours.classifier = theirs.classifier = Convolution()
    same(ours, theirs, IDS, MASK, rows=MASK.bool())


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "RobertaForSequenceClassification"])
def test_a_function_around_an_encoder_gets_what_transformers_gives_it(kind):
    theirs, ours = make(kind), optimize(make(kind))
    seen = []
    for model in (theirs, ours):
        encoder = model.base_model

        def recorded(input_ids=None, attention_mask=None, forward=encoder.forward, **given):
            output = forward(input_ids, attention_mask, **given)
            seen.append((output.last_hidden_state.shape, sorted(given)))
            return output

        encoder.forward = recorded
    same(ours, theirs, IDS, MASK)
    assert seen[0] == seen[1]
    assert explain(ours).served == 1


def test_masks_that_somebody_registered():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    theirs, ours = make(), optimize(make())
    own = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    try:
        ALL_MASK_ATTENTION_FUNCTIONS.register("sdpa", lambda *args, **kwargs: None)
        same(ours, theirs, IDS, MASK)
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS.register("sdpa", own)
    assert explain(ours).fallbacks == {"attention 'sdpa'": 1}


def test_a_pooler_of_ones_own_and_hooks_on_heads():
    ours, theirs = make("BertForSequenceClassification"), make("BertForSequenceClassification")
    optimize(ours)
    for model in (ours, theirs):
        model.bert.pooler = nn.Identity()
    same(ours, theirs, IDS)
    ours = optimize(make("RobertaForSequenceClassification"))
    seen = []
    ours.classifier.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    with torch.no_grad():
        ours(IDS)
    assert seen == [(3, 12, 32)]


def test_two_heads_on_one_encoder():
    base, qa = make(), make("BertForQuestionAnswering")
    sc = make("BertForSequenceClassification")
    plain = copy.deepcopy(qa)
    plain.bert = copy.deepcopy(base)
    qa.bert = sc.bert = base
    optimize(base)
    same(qa, plain, IDS, MASK)  # a head that nobody optimized
    optimize(qa)
    same(qa, plain, IDS, MASK)
    optimize(sc)
    same(qa, plain, IDS, MASK)
    real = MASK.bool()
    for packs in (False, True):
        if packs:
            optimize(qa, keep_padding=False)
        for asked in (None, False, True):
            given = {} if asked is None else {"keep_padding": asked}
            with torch.no_grad():
                found, want = (m(IDS, MASK, **given).start_logits for m in (qa, plain))
            torch.testing.assert_close(found[real], want[real], rtol=1e-4, atol=1e-5)
            left_out = packs if asked is None else not asked
            assert (found[1, 7:].unique().numel() == 1) is left_out  # of zeros


class Around(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, *given):
        return (self.encoder(*given).last_hidden_state.mean(1),)


class Predict(Around):
    def predict(me, *given):
        return (me.encoder(*given).last_hidden_state.mean(1),)

    forward = predict


class Lambda(Around):
    def __init__(self, encoder):
        super().__init__(encoder)
        self.forward = lambda *given: (encoder(*given).last_hidden_state.mean(1),)


class Step(Around):
    def embed(module, *given):
        return (module.encoder(*given).last_hidden_state.mean(1),)

    def __call__(module, *given):
        return module.embed(*given)


class Arguments(Around):
    def __call__(*given):
        return (given[0].encoder(*given[1:]).last_hidden_state.mean(1),)


@pytest.mark.parametrize("kind", [Predict, Lambda, Step, Arguments])
def test_whatever_the_forward_around_an_encoder_is_named(kind):
    theirs = make()
    same(kind(optimize(copy.deepcopy(theirs))), kind(theirs), IDS, MASK)


def test_a_module_around_an_optimized_encoder_may_read_padding():
    theirs = make()
    ours = optimize(copy.deepcopy(theirs))
    same(Around(ours), Around(theirs), IDS, MASK)
    with torch.no_grad():  # but whoever calls the encoder itself knows its mask
        assert ours(IDS, MASK).last_hidden_state[MASK == 0].eq(0).all()
        optimize(ours, keep_padding=False)
        assert not torch.allclose(Around(ours)(IDS, MASK)[0], Around(theirs)(IDS, MASK)[0])


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "RobertaForSequenceClassification"])
def test_a_row_without_any_token(kind):
    mask = MASK.clone()
    mask[1] = 0
    theirs = make(kind)
    same(optimize(copy.deepcopy(theirs)), theirs, IDS, mask)


def test_drop_in_row_without_any_token():
    mask = MASK.clone()
    mask[1] = 0
    config = transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=100)
    torch.manual_seed(0)
    theirs = hf.DistilBertForSequenceClassification(config).eval()
    ours = distilbert_fast.DistilBertForSequenceClassification(config).eval()
    ours.load_state_dict(theirs.state_dict())
    same(ours, theirs, IDS, mask)
