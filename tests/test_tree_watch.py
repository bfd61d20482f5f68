"""TreeWatch (csrc/cpu/watch/tree_watch.h): what a model may exchange between two calls is seen at the next one."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref

import pytest
import torch
import transformers
from torch import nn

from distilbert_fast import backends, optimize
from distilbert_fast.modeling.snapshot import Snapshot, own_tensors

CONFIG = dict(n_layers=1, n_heads=2, dim=8, hidden_dim=16, vocab_size=20, max_position_embeddings=8)
if not backends.availability("cpu").ok:
    pytest.skip(backends.availability("cpu").reason, allow_module_level=True)


def make():
    torch.manual_seed(0)
    model = transformers.DistilBertModel(transformers.DistilBertConfig(**CONFIG)).eval()
    layer(model).ffn.lin2.bias = None
    return model


def seen(model):
    """A snapshot that has looked once, so that its watch is set."""
    snapshot = Snapshot(model)
    assert snapshot.look(model) == (True, None)
    return snapshot


def layer(model):
    return model.transformer.layer[0]


def swap(model):
    weight = layer(model).ffn.lin1.weight
    torch.utils.swap_tensors(weight, nn.Parameter(weight.detach() + 1))


def set_memory(model):
    with torch.no_grad():
        layer(model).ffn.lin1.bias.set_(torch.ones(16))


def hook_all(model):
    model.handle = nn.modules.module.register_module_forward_hook(lambda *_: None)


def attention_of_a_layer(model):
    layer(model).attention.config = copy.deepcopy(model.config)
    layer(model).attention.config._attn_implementation = "eager"


# What is another tree, and what is the same one that must not be computed as a whole.
OTHERS = {
    "in place": lambda m: layer(m).ffn.lin1.weight.detach().mul_(2),
    "one number": lambda m: layer(m).attention.q_lin.bias.detach().__setitem__(3, 1.0),
    "data": lambda m: setattr(layer(m).ffn.lin1.weight, "data", layer(m).ffn.lin1.weight + 1),
    "transposed": lambda m: setattr(layer(m).attention.q_lin.weight, "data", layer(m).attention.q_lin.weight.data.t()),
    "cut": lambda m: setattr(m.embeddings.word_embeddings.weight, "data", m.embeddings.word_embeddings.weight.data[:9]),
    "expanded": lambda m: setattr(layer(m).ffn.lin1.bias, "data", layer(m).ffn.lin1.bias.data.as_strided((16,), (0,))),
    "set_": set_memory,
    "swap_tensors": swap,
    "dtype": lambda m: m.half(),
    "parameter": lambda m: setattr(layer(m).ffn.lin1, "bias", nn.Parameter(torch.ones(16))),
    "parameter removed": lambda m: setattr(layer(m).ffn.lin1, "bias", None),
    "parameter that was None": lambda m: setattr(layer(m).ffn.lin2, "bias", nn.Parameter(torch.ones(8))),
    "buffer added": lambda m: layer(m).register_buffer("more", torch.zeros(1)),
    "buffer": lambda m: setattr(m.embeddings, "position_ids", torch.zeros(1, 8, dtype=torch.long)),
    "module": lambda m: setattr(layer(m).ffn, "lin1", nn.Linear(8, 16)),
    "module added": lambda m: layer(m).add_module("more", nn.Identity()),
    "module of the root": lambda m: setattr(m, "embeddings", copy.deepcopy(m.embeddings)),
    "modules of the root": lambda m: setattr(m, "_modules", dict(m._modules)),
    "dictionary of parameters": lambda m: setattr(
        layer(m).ffn.lin1, "_parameters", dict(layer(m).ffn.lin1._parameters)
    ),
    "dictionary of modules": lambda m: setattr(layer(m), "_modules", dict(layer(m)._modules)),
    "all attributes": lambda m: vars(layer(m).ffn.lin1).update(vars(nn.Linear(8, 16))),
    "swap in inference mode": lambda m: torch.inference_mode()(lambda: swap(m))(),
    "class": lambda m: setattr(layer(m).ffn.lin1, "__class__", type("Mine", (nn.Linear,), {})),
    "class of a tensor": lambda m: setattr(layer(m).ffn.lin1.weight, "__class__", type("Mine", (nn.Parameter,), {})),
}
OBSTACLES = {
    "hook": lambda m: layer(m).register_forward_hook(lambda *_: None),
    "pre-hook": lambda m: layer(m).ffn.lin2.register_forward_pre_hook(lambda *_: None),
    "hook on all": hook_all,
    "dropout": lambda m: m.embeddings.dropout.train(),
    "forward": lambda m: setattr(layer(m).ffn.lin1, "forward", lambda x: x),
    "method": lambda m: setattr(layer(m).ffn, "ff_chunk", lambda x: x),
    "call": lambda m: setattr(layer(m).ffn, "_call_impl", lambda x: x),
    "compiled call": lambda m: setattr(layer(m).ffn, "_compiled_call_impl", lambda x: x),
    "forward of another": lambda m: setattr(layer(m).ffn.lin1, "forward", nn.Linear(8, 16).forward),
    "built-in hook": lambda m: layer(m).register_forward_pre_hook({}.setdefault),
    "masks": lambda m: setattr(m, "_create_attention_masks", lambda **_: (None, None)),
    "attention of a layer": attention_of_a_layer,
    "dictionary of hooks": lambda m: setattr(layer(m), "_forward_hooks", {1: lambda *_: None}),
    "dictionary of attributes": lambda m: setattr(layer(m), "__dict__", {**vars(layer(m)), "forward": lambda x: x}),
}
HARMLESS = {
    "attribute": lambda m: setattr(layer(m), "note", "mine"),
    "mode": lambda m: m.eval(),
    "gradient": lambda m: setattr(layer(m).ffn.lin1.weight, "grad", torch.zeros(16, 8)),
    "hook on a tensor": lambda m: layer(m).ffn.lin1.weight.register_hook(lambda g: g),
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_another_tree(change):
    model = make()
    snapshot = seen(model)
    change(model)
    assert not snapshot._seen.watch.holds()
    assert snapshot.look(model) == (False, None)


@pytest.mark.parametrize("change", OBSTACLES.values(), ids=OBSTACLES)
def test_obstacles(change):
    model = make()
    snapshot = seen(model)
    change(model)
    try:
        for _ in range(2):  # the second one is remembered
            holds, obstacle = snapshot.look(model)
            assert holds and obstacle is not None
    finally:
        if "handle" in vars(model):
            model.handle.remove()


def test_an_obstacle_that_goes():
    model = make()
    snapshot = seen(model)
    handle = layer(model).register_forward_hook(lambda *_: None)
    assert snapshot.look(model) == (True, "a hook inside the encoder")
    handle.remove()
    assert snapshot.look(model) == (True, None)


@pytest.mark.parametrize("name", ["forward", "ff_chunk", "__call__", "_call_impl"])
@pytest.mark.parametrize("of", ["part", "model", "torch"])
def test_a_class_whose_method_is_replaced(name, of, monkeypatch):
    model = optimize(make())
    snapshot = seen(model)
    kind = {"part": type(layer(model).ffn), "model": transformers.DistilBertModel, "torch": nn.Module}[of]
    if not hasattr(kind, name):
        pytest.skip("no such method")
    monkeypatch.setattr(kind, name, lambda self, x: x)
    if name == "forward" and of == "torch":
        return  # each module has its own
    assert snapshot.look(model) == (True, "another forward inside the encoder")


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_what_changes_nothing_is_judged_once(change, monkeypatch):
    model = make()
    snapshot = seen(model)
    change(model)
    assert snapshot.look(model) == (True, None)
    monkeypatch.setattr(Snapshot, "_holds", lambda *_: pytest.fail("looked at in full again"))
    assert all(snapshot.look(model) == (True, None) for _ in range(3))


def test_shallow_copies():
    model = optimize(make())
    ids = torch.ones(1, 3, dtype=torch.long)
    other = copy.copy(model)
    with torch.no_grad():
        answer = model(ids)[0]
        other._modules = copy.deepcopy(model._modules)
        other.embeddings.word_embeddings.weight.mul_(3)
        assert not torch.allclose(other(ids)[0], answer)
        torch.testing.assert_close(other(ids)[0], type(make()).forward(copy.deepcopy(other), ids)[0])
        torch.testing.assert_close(model(ids)[0], answer)


def test_buffers_made_in_inference_mode():
    model = make()
    with torch.inference_mode():
        model.embeddings.register_buffer("position_ids", torch.arange(8)[None], persistent=False)
    with pytest.raises(ValueError, match=r"must be made outside torch.inference_mode\(\)"):
        optimize(model)


def test_a_write_while_it_is_judged():
    """What another thread changes between two steps of a look is seen by the next look."""
    model = make()
    snapshot = seen(model)
    layer(model).note = "so that the whole tree is looked at"
    obstacle = snapshot._obstacle

    def meanwhile(root):
        layer(model).ffn.lin1.weight.detach().mul_(2)
        return obstacle(root)

    snapshot._obstacle = meanwhile
    assert snapshot.look(model) == (True, None)
    assert snapshot.look(model) == (False, None)


def test_a_hook_that_torch_does_not_count():
    """Some libraries write into the dictionary themselves; a hook may go again too."""
    model = make()
    snapshot = seen(model)
    hooks = layer(model).ffn.lin1._forward_hooks
    for _ in range(2):
        assert snapshot.look(model) == (True, None)
    hooks[12345] = lambda module, args, output: output * 2
    for _ in range(2):
        assert snapshot.look(model) == (True, "a hook inside the encoder")
    del hooks[12345]
    assert snapshot.look(model) == (True, None)


def test_models_are_freed():
    model = optimize(make())
    with torch.no_grad():
        model(torch.ones(1, 3, dtype=torch.long))
    alive = [weakref.ref(model), weakref.ref(layer(model).ffn.lin1.weight)]
    del model
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


def test_the_tree_and_its_bytes():
    model = make()
    snapshot = Snapshot(model)
    assert snapshot.sampled(16) is None
    snapshot.watch(own_tensors(layer(model).ffn.lin1), [])
    assert [snapshot.sampled(tokens).samples for tokens in (0, 16, 31, 160)] == [1, 1, 1, 10]
    bias = layer(model).ffn.lin1.bias.detach().numpy()
    for change, holds in ((0, True), (1, False), (-1, True)):
        bias[3] += change  # torch counts no such write; small tensors are compared whole
        assert snapshot.look(model) == (True, None)
        assert snapshot.sampled(16).holds() is holds
    layer(model).ffn.lin2.weight.data = torch.zeros(8, 16)
    assert snapshot.look(model) == (False, None)


def test_tensors_without_torchs_functions():
    """Where torch's library is not found by its name, Python's attributes tell the same."""
    code = """
import distilbert_fast._cpu as cpu
class Tensor:
    _version = 3
    shape = (2, 2)
    strides = (2, 1)
    def data_ptr(self): return self.address
    def stride(self): return self.strides
    def __init__(self): self.address = 64
tensor, other = Tensor(), Tensor()
watch = cpu.TreeWatch([], [], [], [tensor, other])
assert watch.holds()
other.address = 128
assert not watch.holds()
other.address = 64
assert watch.holds()
for name, value in (("_version", 4), ("shape", (4,)), ("strides", (1, 2)), ("shape", None)):
    before = getattr(other, name)
    setattr(other, name, value)
    assert not watch.holds(), name
    setattr(other, name, before)
    assert watch.holds(), name
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_no_tree():
    watch = backends.cpu().TreeWatch
    with pytest.raises(ValueError, match=r"^TreeWatch: dictionaries must be dicts, got list$"):
        watch([({}, [])], [], [], [])
    with pytest.raises(ValueError, match=r"^TorchTensor: tensor must have a version, memory and a layout, got object$"):
        watch([], [], [], [object()])
    assert watch([], [], [], []).holds()
