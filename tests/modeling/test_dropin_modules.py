"""The modules inside the drop-in classes, called or watched one by one, against transformers' own."""

from __future__ import annotations

import copy
import inspect
import types

import pytest
import torch
import transformers
from modeling.test_distilbert import NAMES, TASKS, assert_same, inputs, labels, pair, real
from torch import nn
from torch.nn.modules import module as hooks
from torch.nn.utils import prune
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.distilbert import modeling_distilbert as hf

from distilbert_fast.modeling import distilbert_modules

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture
def models(tiny_config):
    return pair("DistilBertModel", tiny_config)


@pytest.fixture
def rows(monkeypatch):
    """How many rows each attention computed, where it was packed."""
    seen, op = [], distilbert_modules.attention

    def spy(q, *args):
        seen.append(q.shape[0])
        return op(q, *args)

    monkeypatch.setattr(distilbert_modules, "attention", spy)
    return seen


def submodules(model):
    return [name for name, _ in model.named_modules() if name]


# Called one by one ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_transformers(name, tiny_config):
    model, theirs = pair(name, tiny_config)
    ours, expected = (inspect.signature(type(m).forward) for m in (model, theirs))
    shared = [p for p in ours.parameters.values() if p.name not in ("head_mask", "keep_padding")]
    if name in ("DistilBertForMaskedLM", "DistilBertForTokenClassification", "DistilBertModel"):
        assert [str(p) for p in shared] == [str(p) for p in expected.parameters.values()]
    assert shared[-1] == list(expected.parameters.values())[-1]
    inner = (m.base_model.named_modules() for m in (model, theirs))
    for (path, a), (_, b) in zip(*inner, strict=True):
        if path:
            assert inspect.signature(a.forward) == inspect.signature(b.forward), path


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "distilbert_fast"])
@pytest.mark.parametrize("training", [False, True])
def test_every_submodule_gives_what_transformers_gives(implementation, training, tiny_config):
    """On the inputs that transformers' own gets in a call of the model, recorded there."""
    tiny_config.dropout = tiny_config.attention_dropout = 0.0
    model, theirs = pair("DistilBertModel", tiny_config)
    theirs.set_attn_implementation("eager" if implementation == "eager" else "sdpa")
    model.set_attn_implementation(implementation)
    model.train(training), theirs.train(training)
    calls = {}
    for path, module in theirs.named_modules():
        if path:
            record = lambda m, args, kwargs, output, path=path: calls.update({path: (args, kwargs, output)})  # noqa: E731
            module.register_forward_hook(record, with_kwargs=True)
    theirs(**inputs(""))
    uncalled = set(submodules(theirs)) - set(calls)
    assert all(path.endswith(("transformer.layer", "attention.dropout")) for path in uncalled)
    for path, (args, kwargs, expected) in calls.items():
        assert_same(model.get_submodule(path)(*args, **kwargs), expected, torch.ones(1, 1), **CLOSE)


def test_embeddings_called_as_transformers(models):
    model, theirs = models
    ids, mask = inputs("").values()
    vectors = torch.randn(4, 9, 30)
    for args, kwargs in (
        ((ids,), {}),
        ((), {"input_ids": ids}),
        ((ids.int(),), {}),
        ((ids, None, torch.arange(9).flip(0)[None]), {}),
        ((ids,), {"position_ids": torch.arange(9)}),
        ((None, vectors), {}),
        ((), {"input_ids": None, "inputs_embeds": vectors, "position_ids": torch.randint(0, 23, (4, 9))}),
        ((ids, vectors), {}),  # ids win
    ):
        a, b = (m.embeddings(*args, **kwargs) for m in (model, theirs))
        torch.testing.assert_close(a, b, **CLOSE)
    x = model.embeddings(ids)
    expected = theirs(**inputs("")).last_hidden_state
    by_hand = create_bidirectional_mask(config=model.config, inputs_embeds=x, attention_mask=mask)
    output = model.transformer(x, by_hand)
    assert type(output) is transformers.modeling_outputs.BaseModelOutput
    torch.testing.assert_close(output.last_hidden_state, expected, **CLOSE)
    torch.testing.assert_close(model.transformer(x)[0], theirs.transformer(x)[0], **CLOSE)
    for layer in model.transformer.layer:
        x = layer(x, by_hand)
    torch.testing.assert_close(x, expected, **CLOSE)


# Watched ----------------------------------------------------------------------------------------------------


def seen_by(model, paths, batch, register):
    """Name and shapes of what each hook saw, in order."""
    calls = []

    def shapes(value):
        if isinstance(value, torch.Tensor):
            return type(value).__name__, tuple(value.shape)
        if isinstance(value, (tuple, list)):
            return type(value).__name__, [shapes(part) for part in value]
        return type(value).__name__

    handles = []
    for path in paths:
        hook = lambda module, *seen, path=path: calls.append((path, shapes(seen)))  # noqa: E731
        handles.append(getattr(model.get_submodule(path), register)(hook))
    output = model(**batch).last_hidden_state
    if "backward" in register:
        output.square().sum().backward()
    for handle in handles:
        handle.remove()
    return calls, output


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
@pytest.mark.parametrize("masked", [True, False])
def test_hooks_on_each_module_see_what_they_see_in_transformers(register, masked, models, rows):
    batch = inputs("") if masked else {"input_ids": inputs("")["input_ids"]}
    every = [path for path in submodules(models[0]) if not path.endswith("transformer.layer")]
    for paths in ([path] for path in every if "layer.1" in path or "layer" not in path):
        (ours, a), (theirs, b) = (seen_by(m, paths, batch, register) for m in models)
        assert ours == theirs and (ours or paths[0].endswith("attention.dropout") or "backward" in register), paths
        torch.testing.assert_close(a, b, **CLOSE)
    (ours, a), (theirs, b) = (seen_by(m, every, batch, register) for m in models)
    assert ours == theirs and len(ours) >= len(every) - 5
    torch.testing.assert_close(a, b, **CLOSE)
    assert not rows
    models[0](**batch)
    assert rows == [20 if masked else 36] * 3  # nobody looks any more


def test_hooks_may_change_what_passes(models):
    """What a forward hook returns is used, on embeddings as captum does it and inside a layer."""
    for path in ("embeddings", "embeddings.word_embeddings", "transformer.layer.0", "transformer.layer.1.ffn.lin1"):
        outputs = []
        for model in models:
            handle = model.get_submodule(path).register_forward_hook(lambda module, args, output: output * 0.5)
            outputs.append(model(**inputs("")).last_hidden_state)
            handle.remove()
        torch.testing.assert_close(*outputs, **CLOSE)


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_hooks_on_all_modules_of_the_process(kind, models, rows):
    counts = []
    for model in models:
        calls = []
        register = getattr(hooks, f"register_module_{kind}")
        handle = register(lambda module, *seen, calls=calls: calls.append(type(module).__name__))
        try:
            model(**inputs("")).last_hidden_state.sum().backward()
        finally:
            handle.remove()
        counts.append(calls)
    assert counts[0] == counts[1] and len(counts[0]) > 30 and not rows


def test_layer_attribution(tiny_config):
    """What captum's LayerIntegratedGradients does: embeddings of inputs and baselines, interpolated, put back by a
    hook on the module, and the gradient of the answer for them."""
    attributions = []
    for model in pair("DistilBertForSequenceClassification", tiny_config):
        ids, mask = inputs("").values()
        layer = model.base_model.embeddings
        with torch.no_grad():
            inside, baseline = layer(ids), layer(torch.zeros_like(ids))
        assert inside.shape == (4, 9, 30)
        total = 0.0
        for alpha in (0.25, 0.5, 1.0):
            x = (baseline + alpha * (inside - baseline)).requires_grad_()
            handle = layer.register_forward_hook(lambda module, args, output, x=x: x)
            logits = model(ids, mask).logits
            handle.remove()
            total = total + torch.autograd.grad(logits[:, 1].sum(), x)[0]
        attributions.append(total * (inside - baseline))
    torch.testing.assert_close(*attributions, **CLOSE)


@pytest.mark.parametrize(
    "path",
    ["embeddings", "transformer", "transformer.layer.0", "transformer.layer.1.attention", "transformer.layer.2.ffn"],
)
def test_a_patched_forward_is_called_as_in_transformers(path, models, rows):
    """As accelerate's add_hook_to_module does it, and undone as it undoes it."""
    outputs = []
    for model in models:
        module, calls = model.get_submodule(path), []
        original = module.forward

        def patched(self, *args, original=original, calls=calls, **kwargs):
            calls.append([tuple(x.shape) for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)])
            return original(*args, **kwargs)

        module.forward = types.MethodType(patched, module)
        outputs.append((calls, model(**inputs("")).last_hidden_state))
        module.forward = original
    assert outputs[0][0] == outputs[1][0] and len(outputs[0][0]) == 1 and not rows
    torch.testing.assert_close(outputs[0][1], outputs[1][1], **CLOSE)
    models[0](**inputs(""))
    assert rows == [20] * 3


@pytest.mark.parametrize("kind", [nn.Linear, distilbert_modules.FFN])
def test_a_class_patched_for_the_whole_process(kind, models, rows, monkeypatch):
    forward, calls = kind.forward, []

    def patched(self, x):
        calls.append(tuple(x.shape))
        return forward(self, x)

    monkeypatch.setattr(kind, "forward", patched)
    torch.testing.assert_close(*(m(**inputs("")).last_hidden_state for m in models), **CLOSE)
    assert calls and all(shape[:2] == (4, 9) for shape in calls) and not rows


class Scaled(nn.Module):
    """Wraps a module and mixes tokens of a sequence, so that it needs them in place."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        output = self.inner(*args, **kwargs)
        first = output[0] if isinstance(output, tuple) else output
        assert first.dim() == 3 and first.shape[:2] == (4, 9)
        mixed = first + 0.1 * first.mean(dim=1, keepdim=True)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed


@pytest.mark.parametrize(
    "path",
    [
        "embeddings",
        "embeddings.LayerNorm",
        "embeddings.word_embeddings",
        "transformer.layer.1",
        "transformer.layer.1.attention",
        "transformer.layer.1.attention.q_lin",
        "transformer.layer.1.attention.out_lin",
        "transformer.layer.1.sa_layer_norm",
        "transformer.layer.1.ffn",
        "transformer.layer.1.ffn.activation",
        "transformer.layer.1.ffn.dropout",
        "transformer.layer.1.output_layer_norm",
    ],
)
def test_replaced_modules_are_called_as_in_transformers(path, models):
    for model in models:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Scaled(model.get_submodule(path)))
    torch.testing.assert_close(*(m(**inputs("")).last_hidden_state for m in models), **CLOSE)


def test_transformers_own_modules_in_our_model(models):
    model, theirs = models
    for part in ("attention", "ffn"):
        setattr(model.transformer.layer[1], part, copy.deepcopy(getattr(theirs.transformer.layer[1], part)))
    model.transformer.layer[2] = copy.deepcopy(theirs.transformer.layer[2])
    torch.testing.assert_close(*(m(**inputs("")).last_hidden_state for m in models), **CLOSE)
    message = r"head_mask must be None, since DistilBertSelfAttention in layer 1 may ignore it"
    with pytest.raises(ValueError, match=message):
        model(**inputs(""), head_mask=torch.ones(3))


def test_subclasses_of_linear_and_parametrized_ones(models):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    for model in models:
        nn.utils.parametrize.register_parametrization(model.transformer.layer[0].ffn.lin1, "weight", Doubled())
        nn.utils.parametrizations.weight_norm(model.transformer.layer[1].attention.q_lin)
        prune.l1_unstructured(model.transformer.layer[2].attention.v_lin, "weight", 0.5)
    torch.testing.assert_close(*(m(**inputs("")).last_hidden_state for m in models), **CLOSE)


def test_weights_of_another_kind(models):
    """A tensor subclass as weight, as quantizers put it into a plain nn.Linear."""

    class Halved(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.linear:
                return func(args[0], args[1].as_subclass(torch.Tensor) * 0.5, *args[2:], **(kwargs or {}))
            return super().__torch_function__(func, types, args, kwargs or {})

    for model in models:
        linear = model.transformer.layer[1].ffn.lin2
        linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Halved), requires_grad=False)
    with torch.no_grad():
        torch.testing.assert_close(*(m(**inputs("")).last_hidden_state for m in models), **CLOSE)


def test_somebodys_own_attention_is_used(models):
    calls = []

    def quartered(module, query, key, value, mask, scaling=None, **kwargs):
        calls.append(query.shape)
        return hf.eager_attention_forward(module, query, key, value, mask, scaling / 4, **kwargs)

    transformers.AttentionInterface.register("quartered", quartered)
    transformers.AttentionMaskInterface.register(
        "quartered", transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["eager"]
    )
    for model in models:
        model.set_attn_implementation("quartered")
    torch.testing.assert_close(*(m(**inputs("")).last_hidden_state for m in models), **CLOSE)
    assert calls == [(4, 3, 9, 10)] * 6


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_of_peft(dora, tiny_config, rows):
    """Trained on linear layers alone, LoRA computes rows and is packed."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_lin", "v_lin", "lin1"], lora_dropout=0.0, use_dora=dora)
    results = []
    for model in pair("DistilBertForSequenceClassification", tiny_config):
        torch.manual_seed(0)
        model = peft.get_peft_model(model, lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        output = model(**inputs(""), labels=torch.tensor([0, 1, 1, 0]))
        output.loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        merged = model.merge_and_unload().eval()
        results.append([output.logits, *gradients, merged(**inputs("")).logits])
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-3)
    assert rows == ([20] * 3 if dora else [20] * 6)


def test_accelerates_hooks(models, rows):
    hooks = pytest.importorskip("accelerate.hooks")

    class Watching(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            assert args[0].shape == (4, 9, 30)
            return args, kwargs

    model, theirs = models
    expected = theirs(**inputs("")).last_hidden_state
    hooks.add_hook_to_module(model.transformer.layer[1], Watching())
    torch.testing.assert_close(model(**inputs("")).last_hidden_state, expected, **CLOSE)
    assert not rows
    hooks.remove_hook_from_module(model.transformer.layer[1])
    model(**inputs(""))
    assert rows == [20] * 3
    for module in model.modules():  # as it does where weights live elsewhere
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu"))
    mask = inputs("")["attention_mask"]
    torch.testing.assert_close(real(model(**inputs(""))[0], mask), real(expected, mask), **CLOSE)
    assert rows == [20] * 6


def test_a_compiled_submodule(models, rows):
    torch.compiler.reset()
    models[0].transformer.layer[1].compile(backend="eager")
    models[0].transformer.layer[2] = torch.compile(models[0].transformer.layer[2], backend="eager")
    torch.testing.assert_close(*(m(**inputs("")).last_hidden_state for m in models), **CLOSE)
    assert not rows


# Nobody looks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("QuestionAnswering")])
def test_the_ordinary_call_is_packed(name, training, tiny_config, rows):
    model, _ = pair(name, tiny_config)
    batch = inputs(name)
    given = labels(name, batch) if name in TASKS else {}
    model.train(training)
    model(**batch, **given)
    model(**batch, output_hidden_states=True, return_dict=False)
    model(**batch)  # transformers' hooks, which collected those, stay
    model.gradient_checkpointing_enable()
    model(**batch, **given)
    copy.deepcopy(model)(**batch)
    model.register_forward_hook(lambda *seen: None)
    model(**batch)
    assert rows == [20] * 3 * 6


def test_packed_with_any_softmax_attention_of_transformers(models, rows):
    for implementation in ("sdpa", "eager", "distilbert_fast"):
        models[0].set_attn_implementation(implementation)
        models[0](**inputs(""))
    assert rows == [20] * 9


# Checkpointed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("states", [False, True])
def test_gradient_checkpointing(use_reentrant, watched, states, tiny_config):
    tiny_config.dropout = tiny_config.attention_dropout = 0.0
    model, theirs = pair("DistilBertModel", tiny_config)
    calls = []
    if watched:
        model.transformer.layer[1].ffn.register_forward_hook(lambda *seen: calls.append(seen[2].shape))
    gradients = []
    head_mask = torch.tensor([1.0, 0.5, 0.25], requires_grad=True)
    for m in (model, theirs):
        m.train()
        m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        batch = inputs("")
        output = m(**batch, output_hidden_states=states)
        loss = real(output[0], batch["attention_mask"]).square().mean()
        if states:
            loss = loss + sum(real(x, batch["attention_mask"]).mean() for x in output.hidden_states)
        loss.backward()
        gradients.append({name: p.grad for name, p in m.named_parameters()})
    torch.testing.assert_close(*gradients, atol=2e-5, rtol=1e-3)
    assert calls == [(4, 9, 30)] * (2 * watched)  # once more for backward
    gradients = []
    for checkpointed in (False, True):
        (model.gradient_checkpointing_enable if checkpointed else model.gradient_checkpointing_disable)()
        head_mask.grad = None
        model(**inputs(""), head_mask=head_mask)[0].square().mean().backward()
        gradients.append(head_mask.grad)
    torch.testing.assert_close(*gradients)


# What is returned lies on the path --------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["packed", "keep_padding", "no mask", "watched", "training"])
def test_gradients_of_returned_hidden_states(how, tiny_config):
    tiny_config.dropout = tiny_config.attention_dropout = 0.0
    grads = []
    for model in pair("DistilBertModel", tiny_config):
        batch = inputs("")
        mask = batch["attention_mask"]
        flags = {"output_hidden_states": True}
        if how == "no mask":
            del batch["attention_mask"]
        elif how == "keep_padding" and "distilbert_fast" in type(model).__module__:
            flags["keep_padding"] = True
        elif how == "watched":
            model.transformer.layer[0].ffn.register_forward_hook(lambda *seen: None)
        elif how == "training":
            model.train()
        output = model(**batch, **flags)
        assert output.hidden_states[-1] is output.last_hidden_state
        loss = real(output.last_hidden_state, mask)[:, 0].square().sum()
        by_call = torch.autograd.grad(loss, output.hidden_states, retain_graph=True)
        for x in output.hidden_states:
            x.retain_grad()
        loss.backward()
        for x, grad in zip(output.hidden_states, by_call, strict=True):
            torch.testing.assert_close(x.grad, grad)
        grads.append(by_call)
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-3)
    assert all(grad.abs().sum() > 0 for grad in grads[0])


@pytest.mark.parametrize("head_mask", [None, torch.tensor([1.0, 0.5, 2.0])])
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "distilbert_fast"])
def test_gradients_of_returned_attentions(implementation, head_mask, tiny_config):
    model, theirs = pair("DistilBertModel", tiny_config)
    theirs.set_attn_implementation("eager")
    model.set_attn_implementation(implementation)
    grads = []
    for m in (model, theirs):
        given = {"head_mask": head_mask} if m is model and head_mask is not None else {}
        output = m(**inputs(""), output_attentions=True, **given)
        assert [x.shape for x in output.attentions] == [(4, 3, 9, 9)] * 3
        grads.append(torch.autograd.grad(output.last_hidden_state[:, 0].square().sum(), output.attentions))
    if head_mask is None:
        torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-3)
    assert all(grad.abs().sum() > 0 for grad in grads[0])


def test_token_saliency_of_a_classifier(tiny_config):
    grads = []
    for model in pair("DistilBertForSequenceClassification", tiny_config):
        output = model(**inputs(""), output_hidden_states=True)
        output.hidden_states[0].retain_grad()
        output.logits[:, 1].sum().backward()
        grads.append(output.hidden_states[0].grad)
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-3)


# Masks of four dimensions -----------------------------------------------------------------------------------

CAUSAL = torch.ones(9, 9, dtype=torch.bool).tril()
LOWEST = torch.finfo(torch.float32).min
MASKS = {
    "bool [B, 1, T, T]": CAUSAL.expand(4, 1, 9, 9),
    "bool [1, 1, T, T]": CAUSAL[None, None],
    "bool [B, H, T, T]": CAUSAL.expand(4, 3, 9, 9) | torch.eye(9, dtype=torch.bool),
    "bool [B, 1, 1, T]": inputs("")["attention_mask"].bool()[:, None, None],
    "added [B, 1, T, T]": torch.zeros(4, 1, 9, 9).masked_fill(~CAUSAL, LOWEST),
    "added -inf": torch.zeros(4, 1, 9, 9).masked_fill(~CAUSAL, float("-inf")),
    "added [B, 1, 1, T]": (1.0 - inputs("")["attention_mask"][:, None, None].float()) * LOWEST,
    "a bias for each head": torch.randn(1, 3, 9, 9, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "distilbert_fast"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_four_dimensions(kind, name, implementation, tiny_config):
    if implementation == "eager" and kind.startswith("bool"):
        pytest.skip("transformers adds True and False to the scores there")
    if name.endswith("MultipleChoice"):
        pytest.skip("transformers flattens masks there")
    model, theirs = pair(name, tiny_config)
    model.set_attn_implementation(implementation)
    theirs.set_attn_implementation("eager" if implementation == "eager" else "sdpa")
    batch = {"input_ids": inputs("")["input_ids"], "attention_mask": MASKS[kind]}
    given = labels(name, inputs("")) if name in TASKS else {}
    a, b = (m(**batch, **given, return_dict=False) for m in (model, theirs))
    torch.testing.assert_close(a, b, **CLOSE)
    with_weights = model(**batch, output_attentions=True)
    torch.testing.assert_close(with_weights[0], b[1] if given else b[0], **CLOSE)
    if kind.endswith("T, T]") and name == "DistilBertModel":
        assert all(weights.triu(1).eq(0).all() for weights in with_weights.attentions)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.float16])
def test_masks_of_any_dtype(dtype, models):
    batch = inputs("")
    mask = batch["attention_mask"]
    ours, theirs = (m(batch["input_ids"], mask.to(dtype)).last_hidden_state for m in models)
    torch.testing.assert_close(real(ours, mask), real(theirs, mask), **CLOSE)


@pytest.mark.parametrize("position_ids", [torch.arange(9), torch.arange(9).flip(0)[None], torch.full((4, 1), 3)])
def test_positions_of_any_shape_that_transformers_takes(position_ids, models):
    batch = inputs("")
    outputs = [m(**batch, position_ids=position_ids).last_hidden_state for m in models]
    torch.testing.assert_close(*(real(x, batch["attention_mask"]) for x in outputs), **CLOSE)


# Flags ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["output_hidden_states", "output_attentions", "return_dict"])
@pytest.mark.parametrize("value", [True, False, None])
@pytest.mark.parametrize("where", ["call", "config"])
@pytest.mark.parametrize("name", ["DistilBertModel", "DistilBertForMaskedLM"])
def test_flags_by_call_and_by_config(name, where, value, flag, tiny_config):
    tiny_config._attn_implementation = "eager"
    results = []
    for model in pair(name, tiny_config):
        if where == "config":
            setattr(model.config, flag, value)
        results.append(model(**inputs(""), **({flag: value} if where == "call" else {})))
    assert_same(*results, inputs("")["attention_mask"], **CLOSE)


@pytest.mark.parametrize("selection", [1, -1, [0, 2], [-4, 3], [], 17])
def test_hidden_states_by_index_as_in_transformers(selection, models):
    results = [m(**inputs(""), output_hidden_states=selection).hidden_states for m in models]
    assert type(results[0]) is type(results[1])
    if results[1] is not None:
        assert [x is None for x in results[0]] == [x is None for x in results[1]]
