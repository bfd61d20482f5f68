"""An optimized model answers with the weights that it has now, whatever changed them."""

from __future__ import annotations

import concurrent.futures
import copy
import ctypes
import inspect
import subprocess

import pytest
import torch
import transformers
from torch.nn.utils import parametrizations, prune, stateless
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import distilbert_fast
from distilbert_fast import backends, explain, optimize, quantize_model
from distilbert_fast.engine.native_encoder import PackedEncoder
from distilbert_fast.modeling import accelerator
from distilbert_fast.modeling.snapshot import own_tensors

# Wide enough that some weights are sampled and others, such as biases, compared whole.
SIZES = dict(num_hidden_layers=2, num_attention_heads=2, hidden_size=128, intermediate_size=256, vocab_size=90)
IDS = torch.randint(2, 90, (2, 7), generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1])


def make(kind="BertForSequenceClassification", seed=0):
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(transformers.BertConfig(**SIZES, max_position_embeddings=16)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def assert_current(model):
    """The engine's answer is that of plain modules with the same state."""
    model.eval()
    before = explain(model).served
    plain = make()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-5)
    assert explain(model).served == before + 1


def ask(model):
    with torch.no_grad():
        return model(IDS).logits


# Optimizers ------------------------------------------------------------------------------------------------------

OPTIMIZERS = [
    (name, flags)
    for name, kind in sorted(vars(torch.optim).items())
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    for flags in ({}, {"foreach": True}, {"fused": True})
    if set(flags) <= set(inspect.signature(kind).parameters)
]


@pytest.mark.parametrize("name, flags", OPTIMIZERS, ids=[f"{name}-{'-'.join(flags)}" for name, flags in OPTIMIZERS])
def test_a_step_of_every_optimizer(name, flags):
    model = optimize(make())
    ask(model)
    parameters = list(model.parameters())
    if name == "Muon":  # of matrices alone
        parameters = [p for p in parameters if p.dim() == 2]
    if name == "SparseAdam":  # of sparse gradients alone
        parameters = [model.bert.encoder.layer[0].output.dense.weight]
    try:
        optimizer = getattr(torch.optim, name)(parameters, lr=0.05, **flags)
    except RuntimeError as error:
        pytest.skip(str(error))  # no fused form of it on a CPU

    def loss():
        optimizer.zero_grad()
        value = model.train()(IDS, labels=LABELS).loss
        value.backward()
        if name == "SparseAdam":
            parameters[0].grad = parameters[0].grad.to_sparse()
        return value

    for _ in range(2):
        before = ask(model.eval())
        if name == "LBFGS":
            optimizer.step(loss)
        else:
            loss()
            optimizer.step()
        model.eval()
        assert not torch.equal(ask(model), before)
        assert_current(model)


def test_a_step_without_a_forward_through_the_encoder():
    """Gradients from elsewhere, as a parameter server gives them."""
    model = optimize(make())
    ask(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=0.05, fused=True).step()
    assert_current(model)


def test_prediction_between_backward_and_step():
    model = optimize(make())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    model.train()(IDS, labels=LABELS).loss.backward()
    assert_current(model)
    optimizer.step()  # while in eval mode
    assert_current(model)


def test_training_one_number_in_eval_mode():
    """What a sample of the bytes would not find: after gradients were wanted, all are compared."""
    model = optimize(make())
    ask(model)
    weight = model.bert.encoder.layer[1].intermediate.dense.weight
    model(IDS, labels=LABELS).loss.backward()
    weight.data[200, 77] += 5
    assert_current(model)


def test_training_one_number_and_a_call_that_is_refused():
    model = optimize(make())
    ask(model)
    layer = model.bert.encoder.layer[1]
    model(IDS, labels=LABELS).loss.backward()
    layer.intermediate.dense.weight.data[200, 77] += 5
    query = layer.attention.self.query
    layer.attention.self.query = torch.nn.Sequential(query)
    ask(model)
    layer.attention.self.query = query
    assert_current(model)


def test_pruning_that_is_not_made_permanent_packs_once(monkeypatch):
    """Its hook makes the weights in each call."""
    model, plain = optimize(make()), make()
    for m in (model, plain):
        prune.l1_unstructured(m.bert.encoder.layer[0].output.dense, "weight", 0.5)
    packs = []
    monkeypatch.setattr(accelerator.Accelerator, "pack", lambda *_: packs.append(1))
    for _ in range(3):
        torch.testing.assert_close(ask(model), ask(plain))
    assert not packs and set(explain(model).fallbacks) == {"a hook inside the encoder"}


def test_trainer_evaluates_what_it_has_trained(tmp_path):
    rows = [{"input_ids": IDS[i], "labels": LABELS[i]} for i in range(2)] * 4
    losses = []
    for fast in (True, False):
        model = optimize(make()) if fast else make()
        arguments = transformers.TrainingArguments(
            tmp_path, num_train_epochs=3, learning_rate=5e-3, eval_strategy="epoch", report_to=[], save_strategy="no"
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        losses.append([entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry])
        if fast:
            assert explain(model).served == 3 and set(explain(model).fallbacks) == {"training mode"}
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=1e-5)


# Writes that torch does not count --------------------------------------------------------------------------------


def address_write(weight):
    memory = (ctypes.c_float * weight.numel()).from_address(weight.data_ptr())
    for i in range(weight.numel()):
        memory[i] *= 1.5


WRITES = {
    "data_add": lambda w: w.data.add_(0.1),
    "data_mul": lambda w: w.data.mul_(1.5),
    "data_copy": lambda w: w.data.copy_(torch.randn(w.shape)),
    "data_replaced": lambda w: setattr(w, "data", w.data * 1.5),
    "data_row": lambda w: w.data[3:40].zero_(),
    "detached": lambda w: w.detach().mul_(1.5),
    "no_grad": lambda w: torch.no_grad()(lambda: w.mul_(1.5))(),
    "numpy": lambda w: w.detach().numpy().__imul__(1.5),
    "dlpack": lambda w: torch.from_dlpack(w.detach()).mul_(1.5),
    "foreach": lambda w: torch._foreach_mul_([w.data], 1.5),
    "foreach_copy": lambda w: torch._foreach_copy_([w.data], [torch.randn(w.shape)]),
    "set": lambda w: torch.no_grad()(lambda: w.set_(w * 1.5))(),
    "storage": lambda w: w.untyped_storage().copy_((w.data * 1.5).untyped_storage()),
    "address": address_write,
    "inference_mode": lambda w: torch.inference_mode()(lambda: w.data.mul_(1.5))(),
}
TENSORS = [
    "intermediate.dense.weight",
    "intermediate.dense.bias",
    "attention.self.value.weight",
    "output.LayerNorm.bias",
]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("write", WRITES)
def test_writes(write, precision):
    model = optimize(make(), precision)
    with torch.no_grad():
        for name in TENSORS:
            before = ask(model)
            parameter = model.bert.encoder.layer[0].get_parameter(name)
            WRITES[write](parameter)
            fresh = copy.deepcopy(model)
            after = ask(model)
            torch.testing.assert_close(after, ask(optimize(fresh, precision)), rtol=0, atol=0)
            assert not torch.equal(after, before)


def test_writes_to_tables_are_read_as_they_are():
    model = optimize(make())
    ask(model)
    for table in ("word", "position", "token_type"):
        getattr(model.bert.embeddings, f"{table}_embeddings").weight.data[:] *= 1.5
        assert_current(model)
    model.bert.embeddings.LayerNorm.weight.data[5] += 1
    assert_current(model)


def test_a_few_numbers_are_seen_within_the_calls_that_look_at_all_bytes(monkeypatch, caplog):
    monkeypatch.setattr(accelerator, "warn_once", accelerator.warn_once.__wrapped__)
    model = optimize(make())
    ask(model)
    weight = model.bert.encoder.layer[1].intermediate.dense.weight
    samples = model.bert._accelerator._packed[0].fingerprint.samples()
    assert 1 < samples < 100
    weight.data[200, 77] += 5
    for _ in range(samples):
        last = ask(model)
    assert "through parameter.data" in caplog.text and "call optimize(model) again" in caplog.text
    assert_current(model)
    for row in range(20):  # from now on every call compares all
        weight.data[row, 3] += 5
        assert not torch.equal(ask(model), last)
        assert_current(model)
    weight.data[9, 9] += 5
    optimize(model)
    assert_current(model)


def test_another_process_writes_to_shared_memory(tmp_path):
    model, file = make(), tmp_path / "weight"
    weight = model.bert.encoder.layer[0].output.dense.weight
    weight.detach().numpy().tofile(file)
    weight.data = torch.from_file(str(file), shared=True, size=weight.numel()).view_as(weight)
    before = ask(optimize(model))
    subprocess.run(["dd", "if=/dev/zero", f"of={file}", "bs=1024", "count=100", "conv=notrunc"], check=True)
    assert weight[0, 0] == 0
    assert not torch.equal(ask(model), before)
    assert_current(model)


def test_unchanged_weights_are_packed_once(monkeypatch):
    model = optimize(make())
    engine = model.bert._accelerator.engine
    for _ in range(40):
        ask(model)
    model.train()(IDS, labels=LABELS).loss.backward()
    ask(model.eval())
    model(IDS)
    for _ in range(3):
        ask(model)
    assert model.bert._accelerator.engine is engine


# Whole flows -----------------------------------------------------------------------------------------------------


def test_moving_averages():
    model = optimize(make())
    averages = [AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))]
    for average in averages:
        ask(average.module)
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
        for average in averages:
            average.update_parameters(model)
            assert_current(average.module)
        assert_current(model)


def test_loading_states():
    model, other = optimize(make()), make(seed=1)
    ask(model)
    model.load_state_dict(other.state_dict())
    assert_current(model)
    model.load_state_dict(make(seed=2).state_dict(), assign=True)
    assert_current(model)
    model.bert.load_state_dict({n: t.clone() for n, t in other.bert.state_dict().items()}, assign=True)
    assert_current(model)
    for parameter, new in zip(model.parameters(), make(seed=3).parameters(), strict=True):
        parameter.data = new.data
    assert_current(model)


def test_adapters():
    peft = pytest.importorskip("peft")
    model = optimize(make())
    config = peft.LoraConfig(target_modules=["query", "value", "dense"], init_lora_weights=False, r=4)
    plain = make()
    adapted, oracle = peft.get_peft_model(model, config), peft.get_peft_model(plain, config)
    oracle.load_state_dict(adapted.state_dict())
    adapted.eval(), oracle.eval()

    def same():
        torch.testing.assert_close(ask(adapted), ask(oracle), rtol=1e-4, atol=1e-5)
        return ask(adapted)

    first = same()
    for m in (adapted, oracle):
        torch.manual_seed(5)
        m.add_adapter("second", config), m.set_adapter("second")
    assert not torch.equal(same(), first)
    for change in ("merge_adapter", "unmerge_adapter", "disable_adapter_layers", "enable_adapter_layers"):
        for m in (adapted, oracle):
            getattr(m.base_model if "layers" in change else m, change)()
        same()
    served = explain(model).served
    merged, expected = adapted.merge_and_unload(), oracle.merge_and_unload()
    torch.testing.assert_close(ask(merged), ask(expected), rtol=1e-4, atol=1e-5)
    assert explain(model).served == served + 1  # by the engine again
    assert_current(merged)


def test_merging_at_once_after_adapting():
    """No call between, so the tree looks as it did when it was packed, but for the bytes."""
    peft = pytest.importorskip("peft")
    model = optimize(make())
    before = ask(model)
    config = peft.LoraConfig(target_modules=["query", "value"], init_lora_weights=False, r=4)
    merged = peft.get_peft_model(model, config).merge_and_unload()
    assert not torch.equal(ask(merged), before)
    assert_current(merged)


def test_quantized_in_place():
    model = optimize(make())
    ask(model)
    plain = quantize_model(make())
    quantize_model(model)
    torch.testing.assert_close(ask(model), ask(plain), rtol=0, atol=0.02)
    linear = model.bert.encoder.layer[0].output.dense
    linear.weight.data.neg_()
    plain.bert.encoder.layer[0].output.dense.weight.data.neg_()
    torch.testing.assert_close(ask(model), ask(plain), rtol=0, atol=0.02)
    linear.weight_scale.numpy().__imul__(2)
    plain.bert.encoder.layer[0].output.dense.weight_scale.numpy().__imul__(2)
    torch.testing.assert_close(ask(model), ask(plain), rtol=0, atol=0.02)


def test_changes_of_the_tree():
    model = optimize(make())
    layer = model.bert.encoder.layer[0]
    ask(model)
    plain = make()
    for m in (model, plain):
        prune.l1_unstructured(m.bert.encoder.layer[0].output.dense, "weight", 0.5)
    torch.testing.assert_close(ask(model), ask(plain))
    prune.remove(layer.output.dense, "weight")
    assert_current(model)
    parametrizations.orthogonal(layer.attention.self.query)
    before = ask(model)
    torch.nn.utils.parametrize.remove_parametrizations(layer.attention.self.query, "weight")
    torch.testing.assert_close(ask(model), before, rtol=1e-4, atol=1e-5)
    assert_current(model)
    state = {name: tensor * 1.1 for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        called = stateless.functional_call(model, state, (IDS,)).logits
    plain = make()
    plain.load_state_dict(state)
    torch.testing.assert_close(called, ask(plain), rtol=1e-4, atol=1e-5)
    assert_current(model)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_tensors_in_the_places_of_parameters(precision):
    """As hypernetworks and meta-learning put them there: neither parameters nor buffers."""
    model = optimize(make(), precision)
    bert = model.bert
    changes = (
        lambda module, name, tensor: setattr(module, name, tensor * 1.5),
        lambda module, name, tensor: setattr(module, name, tensor * 2),
        lambda module, name, tensor: getattr(module, name).mul_(1.5),
        lambda module, name, tensor: getattr(module, name).numpy().__imul__(1.5),
    )
    for module, name in (
        (bert.encoder.layer[0].attention.self.query, "weight"),
        (bert.encoder.layer[1].output.LayerNorm, "bias"),
        (bert.embeddings.word_embeddings, "weight"),
    ):
        tensor = getattr(module, name).detach().clone()
        delattr(module, name)
        setattr(module, name, tensor.clone())
        for change in changes:
            before, served = ask(model), explain(model).served
            change(module, name, tensor)
            assert not torch.equal(ask(model), before)
            torch.testing.assert_close(ask(model), ask(optimize(copy.deepcopy(model), precision)), rtol=0, atol=0)
            assert explain(model).served == served + 2
    module, served = bert.embeddings.word_embeddings, explain(model).served
    with torch.inference_mode():
        module.weight = tensor * 3
    fallen_back = ask(model)
    assert explain(model).served == served
    module.weight = tensor * 3
    torch.testing.assert_close(ask(model), fallen_back, rtol=0, atol=0.02 if precision == "int8" else 1e-4)
    assert explain(model).served == served + 1
    module.weight = tensor.to_sparse()
    with pytest.raises(RuntimeError):  # torch's own
        ask(model)
    bert.encoder.layer[0].attention.self.query.weight = torch.zeros(128, 128, dtype=torch.float64)
    module.weight = tensor
    with pytest.raises(RuntimeError, match="dtype"):
        ask(model)


def test_weights_laid_out_anew():
    model = optimize(make())
    ask(model)
    for path, change in (
        ("encoder.layer.0.attention.self.query.weight", lambda w: w.t()),
        ("encoder.layer.1.output.dense.bias", lambda b: b[:1].expand(128)),
        ("embeddings.position_embeddings.weight", lambda w: w[:1].expand(16, 128)),
    ):
        parameter = model.bert.get_parameter(path)
        before, address = ask(model), parameter.data_ptr()
        parameter.data = change(parameter.data)
        assert parameter.data_ptr() == address and not torch.equal(ask(model), before)
        assert_current(model)
    table = model.bert.embeddings.word_embeddings.weight
    table.data = table.data[:3]
    with pytest.raises(ValueError, match=r"input_ids must be in \[0, 3\)"):
        ask(model)


@pytest.mark.parametrize("step", ["find_encoder", "encoder_modules", "settings"])
def test_a_module_exchanged_while_weights_are_packed(step, monkeypatch):
    """By another thread: it shows at the next call."""
    model = optimize(make())
    run, new = getattr(accelerator, step), torch.nn.Linear(128, 128)

    def meanwhile(*args):
        found = run(*args)
        model.bert.encoder.layer[0].attention.self.query = new
        return found

    model.bert.encoder.layer[0].attention.self.key.bias.data.add_(1)
    with monkeypatch.context() as patch:
        patch.setattr(accelerator, step, meanwhile)
        ask(model)
    assert_current(model)


def test_drop_in_classes_too():
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(n_layers=2, n_heads=2, dim=128, hidden_dim=256, vocab_size=90)
    model = optimize(distilbert_fast.DistilBertForSequenceClassification(config).eval())
    ask(model)
    model.distilbert.transformer.layer[0].ffn.lin1.weight.data.mul_(1.5)
    model.prune_heads({1: [0]})
    plain = distilbert_fast.DistilBertForSequenceClassification(model.config).eval()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(ask(model), ask(plain), rtol=1e-4, atol=1e-5)


def test_a_writer_that_never_stops(monkeypatch):
    """What is written while a call computes shows at the next one: a call computes twice at most."""
    model = optimize(make())
    ask(model)
    weight, runs, run = model.bert.encoder.layer[0].output.dense.weight, [], PackedEncoder.run

    def disturbed(self, *args, **kwargs):
        runs.append(kwargs["watched"] is not None)
        weight.data += 1
        return run(self, *args, **kwargs)

    monkeypatch.setattr(PackedEncoder, "run", disturbed)
    for _ in range(3):
        ask(model)
    assert runs == [True, False] * 3


# The fingerprint -------------------------------------------------------------------------------------------------


def test_every_byte_is_seen():
    torch.manual_seed(0)
    for shape, samples in (((5,), 1), ((300, 301), 17), ((1000, 1001), 127)):
        linear = torch.nn.Linear(shape[-1], shape[0]) if len(shape) == 2 else torch.nn.LayerNorm(shape)
        fingerprint = backends.fingerprint(own_tensors(linear), 128)
        count = fingerprint.samples()
        assert count <= samples and fingerprint.matches()
        raw = linear.weight.data.view(-1).view(torch.uint8)
        for place in [0, raw.numel() - 1, *torch.randint(raw.numel(), (30,)).tolist()]:
            assert all(fingerprint.matches_samples(1, 1 + i % 2) for i in range(count))
            raw[place] ^= 1 << (place % 8)
            assert not fingerprint.matches()
            assert not all(fingerprint.matches_samples(1, 1 + i % 2) for i in range(count))
            raw[place] ^= 1 << (place % 8)
        assert fingerprint.matches()


def test_a_quarter_of_any_tensor_is_seen_at_once():
    small, large = torch.zeros(300, 100), torch.zeros(1 << 22)
    fingerprint = backends.fingerprint([small, large], 64)
    assert fingerprint.samples() == 2039  # of the large one; most samples would have no line of the small one
    for tensor in (small, large):
        for quarter in tensor.view(4, -1):
            quarter += 1
            assert not any(fingerprint.matches_samples(1, 1 + i % 2) for i in range(50))
            quarter -= 1
            assert all(fingerprint.matches_samples(1, 1 + i % 2) for i in range(50))


def test_as_many_samples_as_were_asked_for():
    weight = torch.zeros(1000, 1000)
    fingerprint = backends.fingerprint([weight], 128)
    weight[500, 500] = 1
    assert fingerprint.samples() == 127
    assert [fingerprint.matches_samples(32, 2) for _ in range(8)].count(False) in (2, 3)
    assert not any(fingerprint.matches_samples(count, 1) for count in (127, 128, 1 << 40))


def test_strided_and_empty_weights():
    linear = torch.nn.Linear(40, 30)
    wide = torch.randn(30, 100)
    linear.weight = torch.nn.Parameter(wide[:, 7:47])
    linear.empty = torch.nn.Parameter(torch.empty(0, 3))
    fingerprint = backends.fingerprint(own_tensors(linear), 128)
    assert fingerprint.matches() and fingerprint.matches_samples(1, 2)
    wide[29, 46] += 1
    assert not fingerprint.matches()
    native = backends.cpu().Fingerprint
    with pytest.raises(ValueError, match="Fingerprint: bytes must be 0 or more, got -1"):
        native([(wide.data_ptr(), -1)], 1)
    with pytest.raises(ValueError, match="Fingerprint: data must point to memory, got null"):
        native([(0, 8)], 1)
    assert native([], 1).matches()


# What is no weight -----------------------------------------------------------------------------------------------


def ask_both(ours, plain):
    """Whether the engine served; the answers are the same either way."""
    before = explain(ours).served
    a, b = ask(ours), ask(plain)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return explain(ours).served > before


def test_a_dropout_that_is_on_in_eval_mode():
    """Monte-Carlo dropout."""
    ours, plain = optimize(make()), make()
    for model in (ours, plain):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.train()
    answers = []
    for model in (ours, plain):
        torch.manual_seed(3)
        answers.append(ask(model))
    assert torch.equal(*answers) and not torch.equal(ask(ours), answers[0])
    assert explain(ours).fallbacks == {"a module inside the encoder in training mode": 2}


def test_another_eps():
    ours, plain = optimize(make()), make()
    ask(ours)
    for model in (ours, plain):
        model.bert.encoder.layer[1].output.LayerNorm.eps = 0.5
    assert ask_both(ours, plain)


def test_attention_of_ones_own():
    def twice(module, query, key, value, attention_mask, **kwargs):
        return 2 * torch.ones_like(query).transpose(1, 2).contiguous(), None

    ours, plain = optimize(make()), make()
    transformers.AttentionInterface.register("twice", twice)
    for model in (ours, plain):
        model.config._attn_implementation = "twice"
    assert not ask_both(ours, plain)
    assert explain(ours).fallbacks == {"attention 'twice'": 1}


def test_forwards_of_ones_own(monkeypatch):
    ours, plain = optimize(make()), make()
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 2 if isinstance(module, torch.nn.LayerNorm) else None
    )
    assert not ask_both(ours, plain)
    handle.remove()
    assert ask_both(ours, plain)
    kind = type(plain.bert.encoder.layer[0].output)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", lambda self, hidden_states, input_tensor: input_tensor)
        assert not ask_both(ours, plain)
        with pytest.raises(TypeError, match=r"optimize: forward of .*BertOutput must be the one that its library gave"):
            optimize(make())
    assert ask_both(ours, plain)


def test_tables_that_count_in_another_way():
    for change, message in (
        (lambda e: e.position_ids.add_(1), r"embeddings\.position_ids must be 0, 1, 2, … in each row"),
        (lambda e: e.token_type_ids.add_(1), r"embeddings\.token_type_ids must be 0, got other numbers"),
        (lambda e: setattr(e.word_embeddings, "max_norm", 1.0), "max_norm of word_embeddings must be None, got 1.0"),
    ):
        ours, plain = optimize(make()), make()
        ask(ours)
        for model in (ours, plain):
            change(model.bert.embeddings)
        with pytest.raises(ValueError, match=f"optimize: {message}"):
            optimize(plain)
        if "max_norm" not in message:
            assert not ask_both(ours, plain)


# Signs and threads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_signs_that_change(dtype):
    """The signs of every other float are the highest bits of the words that a hash reads."""
    rows = torch.randn(64, 64).to(dtype)
    fingerprint = backends.fingerprint([rows], 10)
    for part in (rows, rows[:, 1], rows[:, 1::2], rows[:, 3::4], rows[5, 1:4:2], rows[7:9, 3]):
        part.neg_()
        assert not fingerprint.matches() and not fingerprint.matches_samples(1, 1)
        part.neg_()
        assert fingerprint.matches() and fingerprint.matches_samples(1, 1)


def test_a_step_after_modules_were_called_one_by_one():
    model = optimize(make())
    ask(model)
    encoder = model.bert
    encoder.encoder(encoder.embeddings(IDS)).last_hidden_state.sum().backward()
    weight = encoder.encoder.layer[1].intermediate.dense.weight
    weight.grad[1:] = 0
    torch.optim.SGD([weight], lr=0.1, fused=True).step()
    assert_current(model)


@pytest.mark.parametrize("call", ["autocast", "inputs_embeds", "hook"])
def test_a_step_after_a_call_that_the_engine_refused(call):
    model = optimize(make())
    ask(model)
    hook = model.bert.encoder.layer[0].register_forward_hook(lambda *_: None) if call == "hook" else None
    with torch.autocast("cpu", torch.bfloat16, enabled=call == "autocast"):
        given = (
            {"inputs_embeds": model.bert.embeddings.word_embeddings(IDS)}
            if call == "inputs_embeds"
            else {"input_ids": IDS}
        )
        model(**given, labels=LABELS).loss.backward()
    if hook is not None:
        hook.remove()
    weight = model.bert.encoder.layer[1].intermediate.dense.weight
    with torch.no_grad():
        weight.data[200, 77] += 50
    assert_current(model)


def test_a_suspicion_outlives_a_call_that_packs_nothing():
    model = optimize(make())
    ask(model)
    model.train()(IDS, labels=LABELS).loss.backward()
    model.eval()
    model.bert.encoder.layer[1].intermediate.dense.weight.data[200, 77] += 50
    hook = model.bert.encoder.layer[0].register_forward_hook(lambda *_: None)
    ask(model)
    hook.remove()
    assert_current(model)


def test_no_thread_passes_while_another_compares(monkeypatch):
    """After training, all calls wait for the comparison of all bytes, not the first alone."""
    model = optimize(make())
    ask(model)
    model.train()(IDS, labels=LABELS).loss.backward()
    model.eval()
    model.bert.encoder.layer[1].intermediate.dense.weight.data[200, 77] += 50
    plain = make()
    plain.load_state_dict(model.state_dict())
    want, compare = ask(plain), accelerator.Accelerator._all_bytes_hold

    def slowly(self, *given):
        monkeypatch.undo()
        others = [threads.submit(ask, model) for _ in range(3)]
        assert not concurrent.futures.wait(others, 0.2).done
        held.extend(others)
        return compare(self, *given)

    held = []
    monkeypatch.setattr(accelerator.Accelerator, "_all_bytes_hold", slowly)
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        answers = [threads.submit(ask, model).result(), *(other.result() for other in held)]
    assert len(answers) == 4
    for answer in answers:
        torch.testing.assert_close(answer, want, rtol=1e-4, atol=1e-5)


def test_each_late_discovery_is_said(caplog):
    model = optimize(make())
    weight = model.bert.encoder.layer[1].intermediate.dense.weight
    for times in (1, 2):
        ask(model)
        weight.data.mul_(1.5)
        ask(model)
        assert len([r for r in caplog.records if "are packed again" in r.getMessage()]) == times
        for _ in range(accelerator._WARY + 1):
            ask(model)
