"""Tracers on an optimized model see what transformers' own forward does, for other shapes and data too."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from distilbert_fast import explain, optimize

SIZES = dict(vocab_size=97, max_position_embeddings=23)
CONFIGS = {
    "Bert": lambda: transformers.BertConfig(
        num_hidden_layers=2, num_attention_heads=3, hidden_size=30, intermediate_size=37, **SIZES
    ),
    "DistilBert": lambda: transformers.DistilBertConfig(n_layers=2, n_heads=3, dim=30, hidden_dim=37, **SIZES),
}
CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(params=CONFIGS)
def pair(request):
    torch.manual_seed(0)
    kind = getattr(transformers, f"{request.param}ForSequenceClassification")
    plain = kind(CONFIGS[request.param]()).eval().requires_grad_(False)
    return optimize(copy.deepcopy(plain)), plain


def batch(*lengths):
    length = max(lengths)
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(1, 97, mask.shape) * mask, mask


FIRST, OTHER = batch(7, 3), batch(5, 9, 1)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_jit_trace(pair):
    ours, plain = pair
    traced, expected = (torch.jit.trace(m, FIRST, strict=False) for m in pair)
    for given in (FIRST, OTHER):
        torch.testing.assert_close(traced(*given)["logits"], expected(*given)["logits"], **CLOSE)
        torch.testing.assert_close(traced(*given)["logits"], plain(*given).logits, **CLOSE)
    assert explain(ours).fallbacks["a tracer runs"] > 0


def test_export(pair):
    ours, plain = pair
    dynamic = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=23)}
    program = torch.export.export(ours, FIRST, dynamic_shapes=(dynamic, dynamic)).module()
    for given in (FIRST, OTHER):
        torch.testing.assert_close(program(*given)["logits"], plain(*given).logits, **CLOSE)


@pytest.mark.parametrize("mode", ["fake", "symbolic"])  # in "real" one transformers' own forward raises
def test_make_fx(pair, mode):
    ours, plain = pair
    traced = make_fx(lambda *given: ours(*given).logits, tracing_mode=mode, _allow_non_fake_inputs=True)(*FIRST)
    other = batch(2, 7)  # as long: fake tracing keeps the shapes
    for given in (FIRST, other):
        torch.testing.assert_close(traced(*given), plain(*given).logits, **CLOSE)
    assert explain(ours).served == 0


def test_fake_tensors(pair):
    ours, _ = pair
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        ids, mask = (fake.from_tensor(x) for x in FIRST)
        logits = ours(ids, mask).logits
    assert logits.shape == (2, 2) and type(logits).__name__ == "FakeTensor"
    with torch.no_grad():
        torch.testing.assert_close(ours(*OTHER).logits, pair[1](*OTHER).logits, **CLOSE)


def test_func(pair):
    """Batched inputs, gradients of parameters given, other parameters."""
    ours, plain = pair
    ids = torch.randint(1, 97, (3, 2, 5))
    found = torch.vmap(lambda x: ours(x).logits)(ids)
    torch.testing.assert_close(found, torch.stack([plain(x).logits for x in ids]), **CLOSE)
    parameters = {name: p.detach() * 1.1 for name, p in plain.named_parameters()}

    def loss(given, model):
        return torch.func.functional_call(model, given, FIRST).logits.square().sum()

    gradients, expected = (torch.func.grad(loss)(parameters, model) for model in pair)
    for name in parameters:
        torch.testing.assert_close(gradients[name], expected[name], msg=name, **CLOSE)
    with torch.no_grad():
        a, b = (torch.func.functional_call(m, parameters, OTHER).logits for m in pair)
        torch.testing.assert_close(a, b, **CLOSE)
        torch.testing.assert_close(ours(*OTHER).logits, plain(*OTHER).logits, **CLOSE)
    assert explain(ours).served > 0


def test_ensemble(pair):
    """torch.func's own recipe: states of several models stacked, vmap over them."""
    ours, plain = pair
    models = [ours, optimize(copy.deepcopy(plain))]
    with torch.no_grad():
        models[1].base_model.get_input_embeddings().weight.mul_(1.3)
        state = torch.func.stack_module_state(models)
        base = copy.deepcopy(plain).to("meta")
        found = torch.vmap(lambda p, b, x: torch.func.functional_call(base, (p, b), (x,)).logits, in_dims=(0, 0, None))(
            *state, FIRST[0]
        )
        expected = torch.stack([model(FIRST[0]).logits for model in models])
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_default_device_elsewhere(pair, precision):
    """It says where new tensors lie, and the engine's lie where the model does."""
    ours, plain = pair
    calibration = [FIRST[0]]
    with torch.no_grad(), torch.device("meta"):
        optimize(ours, precision, calibration=calibration if precision == "int8" else None)
        logits = ours(*OTHER).logits
        head_mask = torch.ones(3, device="cpu")
        masked = ours(*OTHER, head_mask=head_mask).logits
    with torch.no_grad():
        torch.testing.assert_close(logits, plain(*OTHER).logits, rtol=0, atol=1e-4 if precision == "fp32" else 0.02)
    assert torch.equal(logits, masked)
    assert explain(ours).served == 2 and explain(ours).fallbacks == {}
