"""The engine on a GPU: captured graphs against eager, in streams and threads; and the host's waits."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch

import distilbert_fast
from distilbert_fast import backends, optimize
from distilbert_fast.engine.cuda_graphs import CudaDevice


@pytest.fixture(autouse=True)
def needs_kernels():
    if backends.select("attention", torch.device("cuda"), torch.bfloat16) == "torch":
        pytest.skip("torch serves attention here, which cannot be captured")


def make(head=False, dtype=torch.bfloat16, layers=3):
    from transformers import DistilBertConfig, DistilBertForSequenceClassification, DistilBertModel

    torch.manual_seed(0)
    kind = DistilBertForSequenceClassification if head else DistilBertModel
    config = DistilBertConfig(dim=128, n_heads=4, hidden_dim=512, n_layers=layers, vocab_size=1000)
    return kind(config).to("cuda", dtype).eval()


def batch(size, length, seed=0):
    torch.manual_seed(seed)
    mask = (torch.arange(length) < torch.randint(1, length + 1, (size, 1))).long()
    ids = torch.randint(1, 1000, (size, length)) * mask
    return {"input_ids": ids.cuda(), "attention_mask": mask.cuda()}


BATCHES = [(1, 7), (1, 128), (8, 128), (3, 300), (32, 64), (8, 128)]


@torch.no_grad()
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8"])
@pytest.mark.parametrize("head", [False, True], ids=["all rows", "first rows"])
def test_graphs_give_what_launches_give(precision, head):
    model = make(head)
    captured, launched = (optimize(copy.deepcopy(model), precision, cuda_graphs=graphs) for graphs in (64, 0))
    for seed, (size, length) in enumerate(BATCHES):
        given = batch(size, length, seed)
        for kwargs in (given, {"input_ids": given["input_ids"]}):
            found, again, want = (model(**kwargs)[0] for model in (captured, captured, launched))
            assert torch.equal(found, again), "other bits the second time"
            torch.testing.assert_close(found, want, rtol=2e-2, atol=2e-2)
    engine = captured.base_model._accelerator._packed[1]
    assert len(engine.graphs) >= 5 and launched.base_model._accelerator._packed[1].graphs is None


@torch.no_grad()
def test_what_else_is_in_a_bucket_changes_nothing():
    """Real tokens have the same bits whatever sequences stand behind them."""
    engine = optimize(make(), "int8")
    given = batch(3, 50)
    first = engine(**given)[0]
    engine(**batch(3, 50, seed=7))
    assert torch.equal(engine(**given)[0], first)


@torch.no_grad()
def test_streams_and_threads():
    model = optimize(make())
    given = [batch(size, length, seed) for seed, (size, length) in enumerate(BATCHES)]
    want = [model(**x)[0] for x in given]
    torch.cuda.synchronize()
    wrong = []

    def work(i):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(20):
                k = (i + turn) % len(given)
                if not torch.equal(model(**given[k])[0], want[k]):
                    wrong.append(k)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_eviction_while_others_run():
    model = optimize(make(), cuda_graphs=2)
    given = [batch(size, length, seed) for seed, (size, length) in enumerate(BATCHES)]
    want = [model(**x)[0] for x in given]
    for _ in range(3):
        for x, y in zip(given, want, strict=True):
            assert torch.equal(model(**x)[0], y)


@torch.no_grad()
def test_inside_the_callers_own_graph():
    """Nothing is captured within a capture: the kernels go into the caller's graph."""
    model = optimize(make())
    ids = batch(4, 64)["input_ids"]
    want = model(ids)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = model(ids)[0]
    graph.replay()
    torch.testing.assert_close(found, want, rtol=2e-2, atol=2e-2)


@torch.no_grad()
@pytest.mark.parametrize(("masked", "waits"), [(False, 0), (True, 1)])
def test_how_often_the_host_waits(masked, waits):
    model = optimize(make())
    given = batch(8, 64)
    if not masked:
        del given["attention_mask"]
    model(**given)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            model(**given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing" in str(warning.message) for warning in caught) == waits


def test_a_mask_on_the_cpu_is_not_waited_for():
    engine = optimize(make())._accelerator._packed[1]
    given = batch(8, 64)
    ids, mask = given["input_ids"], given["attention_mask"]
    want = engine.encode(ids, mask).last
    mask = mask.cpu()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = engine.encode(ids, mask).last
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, want)


@torch.no_grad()
def test_static_scales():
    model = make()
    given = [batch(8, 64, seed) for seed in range(3)]
    static = optimize(copy.deepcopy(model), "int8", calibration=given)
    dynamic = optimize(copy.deepcopy(model), "int8")
    for layer in static._accelerator._packed[1].layers:
        assert layer.context_scale is not None and layer.gelu_scale is not None
    mask = given[0]["attention_mask"].bool()
    cosine = torch.cosine_similarity(static(**given[0])[0][mask].float(), dynamic(**given[0])[0][mask].float(), dim=-1)
    assert cosine.min() > 0.99


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@torch.no_grad()
def test_second_device():
    model = make()
    there = optimize(copy.deepcopy(model).to("cuda:1"))
    given = batch(4, 64)
    found = there(**{name: x.to("cuda:1") for name, x in given.items()})[0]
    assert torch.cuda.current_device() == 0
    assert torch.equal(found.cpu(), optimize(model)(**given)[0].cpu())


def test_a_device_keeps_its_turn_after_an_error():
    device = CudaDevice(torch.device("cuda"))
    with pytest.raises(RuntimeError, match="mine"), device.in_turn():
        raise RuntimeError("mine")
    with device.in_turn():
        pass


def test_forced_backends():
    model, given = make(), batch(4, 64)
    with torch.no_grad():
        want = optimize(copy.deepcopy(model))(**given)[0]
        for name in backends.KERNELS["attention"]:
            with distilbert_fast.backend(name):
                try:
                    for op in ("attention", "layer_norm", "embedding"):
                        backends.select(op, torch.device("cuda"), torch.bfloat16)
                except distilbert_fast.BackendError:
                    continue
                found = optimize(copy.deepcopy(model))(**given)[0]
            torch.testing.assert_close(found, want, rtol=2e-2, atol=2e-2)
