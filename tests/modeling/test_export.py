"""Models that are exported, traced or transformed: right for other batches than those seen, or refused.

transformers' own class, run eagerly, is the oracle.
"""

from __future__ import annotations

import copy

import pytest
import torch
from modeling.test_distilbert import NAMES, inputs, labels, pair
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import distilbert_fast

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of the exporters, about what transformers does
    pytest.mark.covering,  # an export takes seconds
]
LENGTHS = {"ragged": (9, 4, 1, 6), "longer": (12, 5), "one token each": (1,) * 4, "no padding": (7, 7)}


def batches(name):
    for lengths in LENGTHS.values():
        yield inputs(name, lengths, max(lengths))
    left = inputs(name)
    left["attention_mask"] = left["attention_mask"].flip(-1)
    yield left


def drop_in(name, config):
    return pair(name, config)[0]


def drop_in_by_our_attention(name, config):
    model = drop_in(name, config)
    model.set_attn_implementation("distilbert_fast")
    return model


def optimized(name, config):
    return distilbert_fast.optimize(pair(name, config)[1])


def optimized_drop_in(name, config):
    return distilbert_fast.optimize(drop_in(name, config))


def by_our_attention(name, config):
    model = pair(name, config)[1]
    model.set_attn_implementation("distilbert_fast")
    return model


@pytest.fixture(autouse=True)
def two_layers(tiny_config):
    tiny_config.n_layers = 2


@torch.no_grad()
def check(call, name, config, **flags):
    """``call`` gives transformers' numbers on batches of other sizes and masks than it was made with."""
    theirs = pair(name, config)[1]
    for batch in batches(name):
        expected = theirs(**batch, **flags, return_dict=False)
        found = call(batch)
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


# ONNX -------------------------------------------------------------------------------------------------------


def to_onnx(model, name, file, dynamo):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model.config.return_dict = False
    batch = inputs(name)
    axes = ("batch", "choices", "length") if name.endswith("MultipleChoice") else ("batch", "length")
    dynamic = {key: dict(enumerate(axes)) for key in batch}
    outputs = ["start", "end"] if name.endswith("QuestionAnswering") else ["first"]
    given = {"dynamo": dynamo, "input_names": list(batch), "output_names": outputs}
    if dynamo:
        torch.onnx.export(model, (), file, kwargs=batch, dynamic_shapes=dynamic, verbose=False, **given)
    else:
        torch.onnx.export(model, (batch,), file, dynamic_axes=dynamic, **given)
    session = onnxruntime.InferenceSession(file)
    assert [x.name for x in session.get_inputs()] == list(batch)
    return lambda batch: list(map(torch.from_numpy, session.run(None, {k: v.numpy() for k, v in batch.items()})))


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("name", NAMES)
def test_onnx_of_each_class(name, dynamo, tiny_config, tmp_path):
    run = to_onnx(drop_in(name, tiny_config), name, tmp_path / "model.onnx", dynamo)
    check(run, name, tiny_config)


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("make", [optimized, optimized_drop_in, by_our_attention, drop_in_by_our_attention])
def test_onnx_however_it_is_accelerated(make, dynamo, tiny_config, tmp_path):
    name = "DistilBertForTokenClassification"
    run = to_onnx(make(name, tiny_config), name, tmp_path / "model.onnx", dynamo)
    check(run, name, tiny_config)


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_onnx_of_a_pruned_model(dynamo, tiny_config, tmp_path):
    name = "DistilBertForSequenceClassification"
    model = drop_in(name, tiny_config)
    model.prune_heads({0: [1], 1: [0, 2]})
    eager = copy.deepcopy(model)
    run = to_onnx(model, name, tmp_path / "model.onnx", dynamo)
    with torch.no_grad():
        for batch in batches(name):
            torch.testing.assert_close(run(batch)[0], eager(**batch).logits, **CLOSE)


# torch's own tracers and exporters --------------------------------------------------------------------------


@pytest.mark.parametrize("make", [drop_in, drop_in_by_our_attention, optimized, optimized_drop_in, by_our_attention])
@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("MultipleChoice")])
def test_jit_trace(make, name, tiny_config):
    model = make(name, tiny_config)
    model.config.return_dict = False
    with torch.no_grad():
        traced = torch.jit.trace(model, tuple(inputs(name).values()))
    check(lambda batch: traced(*batch.values()), name, tiny_config)


def test_jit_trace_of_more_outputs(tiny_config):
    model = drop_in("DistilBertModel", tiny_config)
    model.set_attn_implementation("eager")
    model.config.return_dict, model.config.output_hidden_states, model.config.output_attentions = False, True, True
    traced = torch.jit.trace(model, tuple(inputs("").values()))
    theirs = pair("DistilBertModel", tiny_config)[1]
    theirs.set_attn_implementation("eager")
    for batch in batches(""):
        expected = theirs(**batch, output_hidden_states=True, output_attentions=True, return_dict=False)
        torch.testing.assert_close(traced(*batch.values()), expected, **CLOSE)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("make", [drop_in, drop_in_by_our_attention, by_our_attention])
def test_torch_export(make, strict, tiny_config):
    name = "DistilBertForSequenceClassification"
    dynamic = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=23)}
    args = tuple(inputs(name).values())
    program = torch.export.export(make(name, tiny_config), args, dynamic_shapes=(dynamic, dynamic), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("distilbert_fast" in target for target in targets)
    check(lambda batch: [program.module()(*batch.values())["logits"]], name, tiny_config)


def test_torch_compile_holds_torchs_ops_alone(tiny_config):
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    name = "DistilBertForQuestionAnswering"
    compiled = torch.compile(drop_in(name, tiny_config), fullgraph=True, backend=keep)
    check(lambda batch: compiled(**batch).to_tuple(), name, tiny_config)
    torch.compiler.reset()
    assert not any("distilbert_fast." in str(node.target) for graph in graphs for node in graph.graph.nodes)


def test_torch_fx_is_refused_as_by_transformers(tiny_config):
    for model in pair("DistilBertModel", tiny_config):
        with pytest.raises(Exception, match=r".") as error:
            torch.fx.symbolic_trace(model)
        assert isinstance(error.value, (torch.fx.proxy.TraceError, TypeError))


def test_jit_script_is_refused(tiny_config):
    with pytest.raises((RuntimeError, TypeError, torch.jit.frontend.NotSupportedError)):
        torch.jit.script(drop_in("DistilBertModel", tiny_config))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("make", [drop_in, drop_in_by_our_attention, by_our_attention])
def test_make_fx(make, mode, tiny_config):
    model = make("DistilBertModel", tiny_config)
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def last(weights, ids, mask):
        return torch.func.functional_call(model, weights, (ids, mask)).last_hidden_state

    with torch.no_grad():
        graph = make_fx(last, tracing_mode=mode)(weights, *inputs("").values())
        assert not any("distilbert_fast" in str(node.target) for node in graph.graph.nodes)
        for batch in batches("") if mode == "symbolic" else [inputs("")]:
            expected = pair("DistilBertModel", tiny_config)[1](**batch).last_hidden_state
            torch.testing.assert_close(graph(weights, *batch.values()), expected, **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors(name, tiny_config):
    with FakeTensorMode() as mode, torch.no_grad():
        model = getattr(distilbert_fast, name)(tiny_config).eval()
        batch = {key: mode.from_tensor(value) for key, value in inputs(name).items()}
        given = {} if name == "DistilBertModel" else labels(name, inputs(name))
        given = {key: mode.from_tensor(value) for key, value in given.items()}
        output = model(**batch, **given, output_hidden_states=True)
    expected = pair(name, tiny_config)[1](**inputs(name), output_hidden_states=True)
    assert output[1 if given else 0].shape == expected[0].shape
    assert [x.shape for x in output.hidden_states] == [x.shape for x in expected.hidden_states]


def test_meta_tensors(tiny_config):
    with torch.device("meta"):
        model = distilbert_fast.DistilBertModel(tiny_config).eval()
    batch = {key: value.to("meta") for key, value in inputs("").items()}
    assert model(**batch).last_hidden_state.shape == (4, 9, 30)


@pytest.mark.parametrize("make", [drop_in, drop_in_by_our_attention, by_our_attention])
def test_vmap_over_ensembles_and_gradients_for_each_example(make, tiny_config):
    name = "DistilBertForSequenceClassification"
    model, theirs = make(name, tiny_config), pair(name, tiny_config)[1]
    ids, target = inputs("")["input_ids"], torch.tensor([0, 1, 1, 0])

    def loss(weights, ids, target):
        logits = torch.func.functional_call(model, weights, (ids[None],)).logits
        return torch.nn.functional.cross_entropy(logits, target[None])

    weights = {key: value.detach() for key, value in model.named_parameters()}
    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, ids, target)
    for index in range(4):
        theirs.zero_grad()
        theirs(ids[index : index + 1], labels=target[index : index + 1]).loss.backward()
        for key, parameter in theirs.named_parameters():
            torch.testing.assert_close(found[key][index], parameter.grad, atol=1e-5, rtol=1e-3)
    stacked = {key: torch.stack([value, value * 1.1]) for key, value in weights.items()}
    both = torch.vmap(lambda w: torch.func.functional_call(model, w, (ids,)).logits)(stacked)
    for logits, factor in zip(both, (1.0, 1.1), strict=True):
        scaled = {key: value * factor for key, value in weights.items()}
        torch.testing.assert_close(logits, torch.func.functional_call(theirs, scaled, (ids,)).logits, **CLOSE)


def test_functional_call_takes_the_weights_it_is_given(tiny_config):
    for name in NAMES:
        model, theirs = pair(name, tiny_config)
        weights = {key: value.detach() * 1.1 for key, value in model.named_parameters()}
        batch = inputs(name)
        found, expected = (
            torch.func.functional_call(m, weights, kwargs={**batch, "return_dict": False, **keep})
            for m, keep in ((model, {"keep_padding": True}), (theirs, {}))
        )
        torch.testing.assert_close(found, expected, **CLOSE)


def test_forward_mode_gradients(tiny_config):
    """Through vectors in place of ids, with the attention that has them."""
    results = []
    x, tangent = torch.randn(2, 4, 9, 30, generator=torch.Generator().manual_seed(0)).unbind()
    for model in pair("DistilBertModel", tiny_config):
        model.set_attn_implementation("eager")
        mask = inputs("")["attention_mask"]
        results.append(
            torch.func.jvp(
                lambda x, model=model, mask=mask: model(inputs_embeds=x, attention_mask=mask).last_hidden_state,
                (x,),
                (tangent,),
            )
        )
    torch.testing.assert_close(*results, **CLOSE)


def test_flops_are_counted(tiny_config):
    counts = []
    for model in pair("DistilBertModel", tiny_config):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**inputs(""))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
