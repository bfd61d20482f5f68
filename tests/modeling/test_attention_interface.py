"""attn_implementation="distilbert_fast" in transformers' own classes, against their own "sdpa" and "eager"."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import transformers

from distilbert_fast.modeling import attention_interface
from distilbert_fast.modeling.attention_interface import ENCODERS, IMPLEMENTATION, number_layers

LAYERS, HEADS, SIZE = 3, 3, 10
SIZES = {
    "vocab_size": 97,
    "hidden_size": 30,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "intermediate_size": 37,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}


def build(cls, config, implementation):
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config._attn_implementation = implementation
    return cls(config).eval()


def encoder(model_type, implementation, **changes):
    special = {"albert": {"embedding_size": 16}, "distilbert": {}}.get(model_type, {})
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **special, **changes})
    if model_type == "distilbert":
        config.hidden_dim = 37
    return build(transformers.MODEL_MAPPING[type(config)], config, implementation)


@pytest.fixture
def ragged():
    torch.manual_seed(1)
    mask = (torch.arange(9) < torch.tensor([9, 4, 1, 6])[:, None]).long()
    return {"input_ids": torch.randint(3, 97, (4, 9)) * mask, "attention_mask": mask}


def tokens(output, batch):
    return output.last_hidden_state[batch["attention_mask"].bool()]


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", sorted(ENCODERS))
def test_encoders_give_the_numbers_of_sdpa(model_type, ragged):
    ours, sdpa = encoder(model_type, IMPLEMENTATION), encoder(model_type, "sdpa")
    close(tokens(ours(**ragged), ragged), tokens(sdpa(**ragged), ragged))
    whole = {**ragged, "attention_mask": torch.ones_like(ragged["attention_mask"])}
    close(ours(**whole).last_hidden_state, sdpa(**whole).last_hidden_state)
    close(ours(ragged["input_ids"][:, :1]).last_hidden_state, sdpa(ragged["input_ids"][:, :1]).last_hidden_state)


@pytest.mark.parametrize("model_type", sorted(ENCODERS))
def test_encoders_call_the_op(model_type, ragged, monkeypatch):
    calls = []
    real = attention_interface.padded_attention
    monkeypatch.setattr(attention_interface, "padded_attention", lambda *a: calls.append(a) or real(*a))
    encoder(model_type, IMPLEMENTATION)(**ragged)
    assert len(calls) == LAYERS and all(call[3].shape == (4, 9) for call in calls)


@pytest.mark.parametrize(
    "mask", [[[0, 1, 1, 1], [0, 0, 0, 1]], [[1, 0, 1, 0], [1, 1, 1, 1]], [[1, 1, 0, 0], [0, 0, 0, 0]]]
)
def test_padding_anywhere(mask, ragged):
    batch = {"input_ids": ragged["input_ids"][:2, :4].clamp(3), "attention_mask": torch.tensor(mask)}
    ours = encoder("bert", IMPLEMENTATION)(**batch)
    assert ours.last_hidden_state.isfinite().all()
    close(tokens(ours, batch), tokens(encoder("bert", "sdpa")(**batch), batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_weights_and_real_text(dtype, bert_dir, bert, tokenizer, texts):
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    load = transformers.BertModel.from_pretrained
    ours, sdpa = (load(bert_dir, attn_implementation=how, dtype=dtype).eval() for how in (IMPLEMENTATION, "sdpa"))
    with torch.no_grad():
        exact = tokens(copy.deepcopy(bert).double()(**batch), batch)
        a, b = tokens(ours(**batch), batch), tokens(sdpa(**batch), batch)
    assert ours.config._attn_implementation == IMPLEMENTATION and a.dtype == dtype
    assert (a - exact).abs().max() <= 2 * (b - exact).abs().max() + 1e-6


@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_gradients(model_type, ragged):
    ours, sdpa = encoder(model_type, IMPLEMENTATION), encoder(model_type, "sdpa")
    for model in (ours, sdpa):
        tokens(model(**ragged), ragged).square().mean().backward()
    for (key, a), (_, b) in zip(ours.named_parameters(), sdpa.named_parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-3, msg=key)


def test_attention_dropout_acts_in_training(ragged):
    model = encoder("bert", IMPLEMENTATION, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5)
    calm = tokens(model(**ragged), ragged)
    assert torch.equal(tokens(model(**ragged), ragged), calm)
    model.train()
    torch.manual_seed(5)
    first = tokens(model(**ragged), ragged)
    torch.manual_seed(5)
    assert torch.equal(tokens(model(**ragged), ragged), first) and not torch.equal(first, calm)


def folded(model, head_mask):
    """The model with head_mask [L, H] multiplied into the columns of its attention output projections."""
    model = copy.deepcopy(model)
    names = [n for n, _ in model.named_parameters() if n.endswith(("output.dense.weight", "out_lin.weight"))]
    names = [n for n in names if ".attention." in n]
    assert len(names) == LAYERS
    with torch.no_grad():
        for name, m in zip(names, head_mask, strict=True):
            model.get_parameter(name).mul_(m.repeat_interleave(SIZE))
    return model


@pytest.mark.parametrize("shape", [(HEADS,), (LAYERS, HEADS), (LAYERS, 1, HEADS, 1, 1)])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "distilbert"])
def test_head_mask(model_type, shape, ragged):
    model, sdpa = encoder(model_type, IMPLEMENTATION), encoder(model_type, "sdpa")
    number_layers(model)
    torch.manual_seed(2)
    head_mask = torch.rand(shape)
    head_mask.view(-1, HEADS)[0, 1] = 0
    head_mask.requires_grad_()
    result = tokens(model(**ragged, head_mask=head_mask), ragged)
    each = head_mask.detach().reshape(-1, HEADS).expand(LAYERS, HEADS)
    close(result, tokens(folded(sdpa, each)(**ragged), ragged))
    result.square().sum().backward()
    assert head_mask.grad.shape == shape and head_mask.grad.abs().sum() > 0


def test_head_mask_per_sequence(ragged):
    model = encoder("bert", IMPLEMENTATION)
    head_mask = torch.rand(LAYERS, 4, HEADS, 1, 1)
    result = model(**ragged, head_mask=head_mask).last_hidden_state
    for b in range(4):
        one = {key: value[b : b + 1] for key, value in ragged.items()}
        alone = model(**one, head_mask=head_mask[:, b : b + 1]).last_hidden_state
        close(tokens_of(result, ragged, b), tokens_of(alone, one, 0))


def tokens_of(hidden, batch, b):
    return hidden[b][batch["attention_mask"][b].bool()]


def test_head_mask_reaches_task_heads(ragged):
    config = transformers.RobertaConfig(**SIZES)
    model = build(transformers.RobertaForSequenceClassification, config, IMPLEMENTATION)
    assert not torch.equal(model(**ragged).logits, model(**ragged, head_mask=torch.zeros(HEADS)).logits)


def test_layers_without_a_number(ragged):
    """DistilBERT does not number its layers, ALBERT runs one layer many times."""
    model = encoder("distilbert", IMPLEMENTATION)
    message = (
        r"^distilbert_fast: head_mask must be of shape \[3\], since DistilBertSelfAttention does not know its layer "
        r"\(distilbert_fast\.modeling\.attention_interface\.number_layers\(model\) tells it\), got \[3, 3\]$"
    )
    with pytest.raises(ValueError, match=message):
        model(**ragged, head_mask=torch.ones(LAYERS, HEADS))
    number_layers(model)
    assert [block.attention.layer_idx for block in model.transformer.layer] == [0, 1, 2]
    close(model(**ragged, head_mask=torch.ones(LAYERS, HEADS))[0], model(**ragged)[0])
    albert = encoder("albert", IMPLEMENTATION)
    with pytest.raises(ValueError, match=r"^number_layers: model must be made of a list of 3 layers, got AlbertModel$"):
        number_layers(albert)
    with pytest.raises(ValueError, match=r"AlbertAttention does not know its layer"):
        albert(**ragged, head_mask=torch.ones(LAYERS, HEADS))
    assert albert(**ragged, head_mask=torch.ones(HEADS)).last_hidden_state.isfinite().all()


@pytest.mark.parametrize(
    ("head_mask", "error", "given"),
    [
        (torch.ones(4), ValueError, r"of shape \[3\], \[3, 3\] or \[3, 1 or 4, 3, 1, 1\], got \[4\]"),
        (torch.ones(6, 3), ValueError, r"of shape \[3\], \[3, 3\] or \[3, 1 or 4, 3, 1, 1\], got \[6, 3\]"),
        ([1.0] * 3, TypeError, "a tensor, got list"),
    ],
)
def test_bad_head_masks(head_mask, error, given, ragged):
    with pytest.raises(error, match=f"^distilbert_fast: head_mask must be {given}$"):
        encoder("bert", IMPLEMENTATION)(**ragged, head_mask=head_mask)


def test_output_attentions(ragged):
    ours, eager = encoder("bert", IMPLEMENTATION), encoder("bert", "eager")
    a, b = ours(**ragged, output_attentions=True), eager(**ragged, output_attentions=True)
    assert len(a.attentions) == LAYERS
    close(a.attentions, b.attentions)
    close(tokens(a, ragged), tokens(b, ragged))
    head_mask = torch.tensor([1.0, 0.5, 0.0])
    masked = ours(**ragged, output_attentions=True, head_mask=head_mask)
    close(masked.attentions[0], a.attentions[0] * head_mask[:, None, None])
    close(tokens(masked, ragged), tokens(ours(**ragged, head_mask=head_mask), ragged))


# What is no plain encoder self-attention is sdpa's.


def test_decoder_is_causal(ragged):
    config = transformers.BertConfig(**SIZES, is_decoder=True)
    ours, sdpa = (build(transformers.BertLMHeadModel, config, how) for how in (IMPLEMENTATION, "sdpa"))
    for given in (ragged, {"input_ids": ragged["input_ids"].clamp(3)}):
        close(ours(**given).logits, sdpa(**given).logits)
    with torch.no_grad():
        step = {"max_new_tokens": 5, "do_sample": False, "input_ids": ragged["input_ids"][:1].clamp(3)}
        assert torch.equal(ours.generate(**step), sdpa.generate(**step))


@pytest.mark.parametrize("length", [9, 5])
def test_cross_attention_with_padding(length, ragged):
    """As long as the decoder or not: its queries are all real, the padding is that of the encoder."""
    config = transformers.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)
    ours, sdpa = (build(transformers.BertModel, config, how) for how in (IMPLEMENTATION, "sdpa"))
    given = {
        "input_ids": torch.randint(3, 97, (4, length)),
        "encoder_hidden_states": torch.randn(4, 9, 30),
        "encoder_attention_mask": ragged["attention_mask"],
    }
    close(ours(**given).last_hidden_state, sdpa(**given).last_hidden_state)


def test_encoder_decoder(ragged):
    config = transformers.BartConfig(
        vocab_size=97,
        d_model=30,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=37,
        decoder_ffn_dim=37,
        max_position_embeddings=40,
    )
    ours, sdpa = (build(transformers.BartModel, config, how) for how in (IMPLEMENTATION, "sdpa"))
    close(ours(**ragged).last_hidden_state, sdpa(**ragged).last_hidden_state)
    module, x = ours.encoder.layers[0].self_attn, torch.randn(1, HEADS, 4, SIZE)
    with pytest.raises(ValueError, match=r"^distilbert_fast: head_mask must be None for an encoder-decoder model, got"):
        attention_interface.attention_forward(module, x, x, x, None, head_mask=torch.ones(HEADS))


def test_sliding_window(ragged):
    from transformers.models.modernbert import modeling_modernbert

    if not hasattr(modeling_modernbert, "ALL_ATTENTION_FUNCTIONS"):
        pytest.skip(f"ModernBERT of transformers {transformers.__version__} has attentions of its own")
    config = transformers.ModernBertConfig(
        **{**SIZES, "num_hidden_layers": 4},
        local_attention=4,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )
    ours, sdpa = (build(transformers.ModernBertModel, config, how) for how in (IMPLEMENTATION, "sdpa"))
    close(tokens(ours(**ragged), ragged), tokens(sdpa(**ragged), ragged))


def test_grouped_heads(ragged):
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=1)
    ours, sdpa = (build(transformers.LlamaModel, config, how) for how in (IMPLEMENTATION, "sdpa"))
    close(tokens(ours(**ragged), ragged), tokens(sdpa(**ragged), ragged))
    with pytest.raises(ValueError, match="output_attentions must be False for this attention"):
        ours(**ragged, output_attentions=True)


def test_image_encoder():
    config = transformers.ViTConfig(
        hidden_size=30, num_hidden_layers=2, num_attention_heads=3, intermediate_size=37, image_size=8, patch_size=4
    )
    ours, sdpa = (build(transformers.ViTModel, config, how) for how in (IMPLEMENTATION, "sdpa"))
    pixels = torch.randn(2, 3, 8, 8)
    close(ours(pixels).last_hidden_state, sdpa(pixels).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_ones_own(dtype, ragged):
    """4-D masks pass through transformers untouched."""
    ours, sdpa = encoder("bert", IMPLEMENTATION), encoder("bert", "sdpa")
    allowed = torch.rand(4, 1, 9, 9) < 0.6
    allowed |= torch.eye(9, dtype=torch.bool)
    mask = allowed if dtype == torch.bool else torch.where(allowed, 0.0, torch.finfo(dtype).min)
    given = {"input_ids": ragged["input_ids"].clamp(3), "attention_mask": mask}
    close(ours(**given).last_hidden_state, sdpa(**given).last_hidden_state)
    head_mask = torch.rand(LAYERS, HEADS)
    close(ours(**given, head_mask=head_mask)[0], folded(sdpa, head_mask)(**given)[0])


def test_compiles_once_for_all_lengths(ragged):
    model, sdpa = encoder("bert", IMPLEMENTATION), encoder("bert", "sdpa")
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=count)
    with torch.no_grad():
        for length in range(2, 40):
            mask = (torch.arange(length) < torch.tensor([length, 1, length // 2])[:, None]).long()
            batch = {"input_ids": torch.randint(3, 97, (3, length)), "attention_mask": mask}
            close(tokens(compiled(**batch), batch), tokens(sdpa(**batch), batch))
    assert len(graphs) <= 2  # the first length, then any


def test_switching_an_existing_model(ragged):
    model = encoder("bert", "sdpa")
    before = tokens(model(**ragged), ragged)
    model.set_attn_implementation(IMPLEMENTATION)
    assert model.config._attn_implementation == IMPLEMENTATION
    close(tokens(model(**ragged), ragged), before)


@pytest.mark.slow
def test_registered_whichever_import_comes_first():
    """In forks of one process, which has paid for torch already."""
    code = """
import os, sys, torch

for first in (
    "import transformers.modeling_utils, distilbert_fast",
    "import distilbert_fast, transformers.models.distilbert.modeling_distilbert",
    "import distilbert_fast, importlib.util; importlib.util.find_spec('transformers.modeling_utils')",
    "import distilbert_fast.modeling.attention_interface",
    "import distilbert_fast.modeling.quantizer",
):
    child = os.fork()
    if child == 0:
        exec(first)
        from transformers.masking_utils import AttentionMaskInterface
        from transformers.modeling_utils import AttentionInterface
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

        known = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping, AUTO_QUANTIZER_MAPPING
        assert all("distilbert_fast" in registry for registry in known)
        assert not [finder for finder in sys.meta_path if "distilbert" in type(finder).__module__]
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, first
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_is_enough_and_imports_nothing():
    code = """
import distilbert_fast, sys
assert not {"torch", "transformers"} & set(sys.modules)
from transformers import BertConfig, BertModel
sizes = dict(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4)
BertModel._from_config(BertConfig(**sizes), attn_implementation="distilbert_fast")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
