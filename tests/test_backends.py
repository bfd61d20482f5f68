"""Which backend serves an op, what is said when it cannot, and what ``distilbert-fast env`` is told."""

import json
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from distilbert_fast import BackendError, backend, backends, kl_div
from distilbert_fast.ops._attention_backends import backend_of

CPU = torch.device("cpu")


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )


def test_the_native_module_serves_kl_div():
    assert backends.select("kl_div", CPU, torch.float32, torch.bfloat16) == "cpu"


def test_an_op_without_kernels_is_served_by_torch_without_a_word(caplog):
    op = next(op for op, kernels in backends.KERNELS.items() if not kernels)
    with caplog.at_level(logging.WARNING, logger="distilbert_fast"):
        assert backends.select(op, CPU, torch.float32) == "torch"
    assert caplog.text == ""


def test_falling_back_says_why_once(caplog):
    backends._choose.cache_clear()
    backends._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="distilbert_fast"):
        for _ in range(3):
            assert backends.select("kl_div", CPU, torch.float16, torch.float32) == "torch"
        backends._choose.cache_clear()
        assert backends.select("kl_div", CPU, torch.float16, torch.float32) == "torch"
    assert [record.getMessage() for record in caplog.records] == [
        "kl_div on cpu falls back to torch: cpu: its kl_div takes float32, bfloat16, not float16"
    ]


def test_a_forced_backend_serves_and_is_undone():
    x = torch.randn(3, 5)
    with backend("torch"):
        assert backends.select("kl_div", CPU, torch.float32) == "torch"
        with backend("cpu"):
            assert backends.select("kl_div", CPU, torch.float32) == "cpu"
        assert backends.select("kl_div", CPU, torch.float32) == "torch"
        loss = kl_div(x, x.flip(0))
    assert backends.forced() is None
    torch.testing.assert_close(kl_div(x, x.flip(0)), loss)


def test_a_forced_backend_that_has_only_a_forward_leaves_backward_to_the_free_choice():
    free = backends.select_backward("layer_norm", CPU, torch.float32)
    assert "cuda" in backends.KERNELS["layer_norm"] and "cuda" not in backends.KERNELS["layer_norm_backward"]
    with backend("cuda"):
        assert backends.select_backward("layer_norm", CPU, torch.float32) == free == "cpu"
    with backend("torch"):
        assert backends.select_backward("layer_norm", CPU, torch.float32) == "torch"
    with backend("cpu"), pytest.raises(BackendError, match=r"^layer_norm_backward: backend 'cpu' was forced"):
        backends.select_backward("layer_norm", CPU, torch.float16)


def test_forcing_is_undone_after_an_error():
    with pytest.raises(ZeroDivisionError), backend("torch"):
        raise ZeroDivisionError
    assert backends.forced() is None


def test_a_forced_backend_that_cannot_serve_says_why():
    with backend("cpu"), pytest.raises(BackendError) as error:
        kl_div(torch.randn(2, 3).half(), torch.randn(2, 3).half())
    assert str(error.value) == (
        "kl_div: backend 'cpu' was forced but cannot serve: its kl_div takes float32, bfloat16, not float16"
    )
    with backend("cpu"), pytest.raises(BackendError) as error:
        backends.select("codebook_linear_backward", CPU, torch.float32)
    assert str(error.value) == (
        "codebook_linear_backward: backend 'cpu' was forced but cannot serve: "
        "codebook_linear_backward has no cpu kernel"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can run them")
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_forced_gpu_backend_without_a_gpu_says_why(name):
    if backends.interpreted():
        pytest.skip("Triton's interpreter takes CPU tensors")
    reason = backends.availability(name).reason
    assert "no CUDA device" in reason or "not built" in reason or "not installed" in reason
    with backend(name), pytest.raises(BackendError) as error:
        kl_div(torch.randn(2, 3), torch.randn(2, 3))
    assert str(error.value) == f"kl_div: backend {name!r} was forced but cannot serve: {reason}"


@pytest.fixture
def gpu(monkeypatch):
    """Choices as on a machine where every backend can run."""
    backends._choose.cache_clear()
    backends._warn_once.cache_clear()
    monkeypatch.setattr(backends, "availability", lambda name: backends.Availability(True, ""))
    monkeypatch.setattr(backends, "interpreted", lambda: False)
    yield torch.device("cuda")
    backends._choose.cache_clear()


def test_a_backend_unfit_for_a_call_is_passed_over(gpu, monkeypatch, caplog):
    """Attention in CUDA C++ takes heads of up to 128 columns."""
    monkeypatch.setitem(backends.KERNELS, "attention", {"cuda": ("bfloat16", "float16")})  # no Triton

    def served(size):
        return backend_of(SimpleNamespace(shape=(5, 2, size), device=gpu, dtype=torch.bfloat16))

    with caplog.at_level(logging.WARNING, logger="distilbert_fast"):
        assert [served(size) for size in (64, 128, 129)] == ["cuda", "cuda", "torch"]
    reason = "its attention takes heads of up to 128, not 129"
    assert [x.getMessage() for x in caplog.records] == [f"attention on cuda falls back to torch: cuda: {reason}"]
    with backend("cuda"), pytest.raises(BackendError) as error:
        served(129)
    assert str(error.value) == f"attention: backend 'cuda' was forced but cannot serve: {reason}"


def test_attention_in_triton_is_preferred(gpu):
    assert backends.select("attention", gpu, torch.bfloat16) == "triton"
    with backend("cuda"):
        assert backends.select("attention", gpu, torch.bfloat16) == "cuda"
        with pytest.raises(BackendError, match="its attention takes bfloat16, float16, not float32"):
            backends.select("attention", gpu, torch.float32)


def test_an_unknown_backend_is_refused():
    with pytest.raises(BackendError) as error, backend("opencl"):
        pass
    assert str(error.value) == "backend must be one of cuda, triton, cpu, torch, got 'opencl'"


def test_environment_variables_force_and_refuse():
    code = "import torch, distilbert_fast as d; d.kl_div(torch.ones(2, 3), torch.ones(2, 3)); "
    code += "from distilbert_fast import backends; print(backends.select('kl_div', torch.device('cpu')))"
    assert run(code, DISTILBERT_FAST_BACKEND="torch").stdout == "torch\n"
    refused = run(code, DISTILBERT_FAST_BACKEND="opencl").stderr.splitlines()[-1]
    assert refused.endswith("DISTILBERT_FAST_BACKEND must be one of cuda, triton, cpu, torch, got 'opencl'")
    refused = run(code, DISTILBERT_FAST_ISA="sse9").stderr.splitlines()[-1]
    assert refused.endswith(
        "DISTILBERT_FAST_ISA must be one of amx, avx512_bf16, avx512_vnni, avx_vnni, avx2, scalar, got 'sse9'"
    )
    code = "from distilbert_fast import backends; print(backends.isa_report()['tier'])"
    assert run(code, DISTILBERT_FAST_ISA="scalar").stdout == "scalar\n"


def test_report_is_json_and_true():
    report = json.loads(json.dumps(backends.report()))
    assert report["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(report["ops"]) == set(backends.KERNELS)
    assert report["ops"]["kl_div"]["cpu"] == (backends.forced() or "cpu")
    assert report["backends"]["torch"]["ok"] is True
    assert report["cpu"]["tier"] == backends.cpu().isa()
    assert set(report["cpu"]["available"]) | set(report["cpu"]["missing"]) == set(backends.ISA_TIERS)
