"""A CPU for which there is no vector ISA tier: torch serves what it is faster at than the scalar tier."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import places
import pytest
import torch
from install.commands import ROOT, succeed
from transformers import BertConfig, BertForSequenceClassification, BertModel, DistilBertConfig, DistilBertModel
from typer.testing import CliRunner

import distilbert_fast
from distilbert_fast import backends
from distilbert_fast.cli import app
from distilbert_fast.engine.engine import Engine
from distilbert_fast.engine.native_encoder import PackedEncoder
from distilbert_fast.modeling import attention_interface

CPU = torch.device("cpu")
SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=50)


@pytest.fixture
def native_calls(monkeypatch) -> list[PackedEncoder]:
    """The native module says that it has no vectors, and lists who runs the C++ encoder all the same."""
    calls: list[PackedEncoder] = []
    run = PackedEncoder.run
    monkeypatch.setattr(backends.cpu(), "scalar_by_default", lambda: True)
    monkeypatch.setattr(
        PackedEncoder, "run", lambda self, *args, **kwargs: calls.append(self) or run(self, *args, **kwargs)
    )
    return calls


@pytest.fixture
def bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES, attn_implementation="sdpa")).eval()


IDS = torch.arange(24).view(2, 12) % 50
MASK = torch.ones(2, 12, dtype=torch.int64)
MASK[1, 7:] = 0


def test_products_and_attention_are_torchs_and_losses_are_not(native_calls):
    served = {op: by["cpu"] for op, by in backends.report()["ops"].items() if "cpu" in backends.KERNELS[op]}
    by_torch = {"linear", "int8_linear", "codebook_linear", "attention", "layer_norm", "embedding"}
    assert {op for op, name in served.items() if name == "torch"} == by_torch
    assert set(served.values()) == {"torch", "cpu"}


def test_who_forces_the_cpu_gets_it(native_calls):
    with distilbert_fast.backend("cpu"):
        assert {backends.select(op, CPU, torch.float32) for op in backends.FASTER_BY_TORCH_THAN_SCALAR} == {"cpu"}


@pytest.mark.parametrize("tier", places.TIERS)
def test_a_tier_that_was_asked_for_serves(tier):
    with places.on_tier(tier):
        assert {backends.select(op, CPU, torch.float32) for op in backends.FASTER_BY_TORCH_THAN_SCALAR} == {"cpu"}
        assert backends.without_vectors() is None


def test_env_says_so(native_calls):
    assert backends.report()["cpu"]["left_to_torch"] == backends.NO_VECTORS
    shown = " ".join(CliRunner().invoke(app, ["env"]).stdout.split())
    assert f"left to torch products, attention and the encoder: {backends.NO_VECTORS}" in shown


def test_env_of_a_machine_with_vectors_does_not():
    if backends.cpu().scalar_by_default():
        pytest.skip("no vectors here")
    assert backends.report()["cpu"]["left_to_torch"] is None
    assert "left to torch" not in CliRunner().invoke(app, ["env"]).stdout


@pytest.mark.parametrize("precision", [None, "int8", "bf16"])
def test_an_optimized_model_runs_its_own_forward(bert, native_calls, precision):
    with torch.no_grad():
        want = bert(IDS, MASK).last_hidden_state
        distilbert_fast.optimize(bert, precision)
        found = bert(IDS, MASK).last_hidden_state
    explanation = distilbert_fast.explain(bert)
    assert torch.equal(found, want) and native_calls == []
    assert explanation.served == 0 and explanation.fallbacks == {backends.NO_VECTORS: 1}
    assert backends.NO_VECTORS in str(explanation) and "by ops on cpu" in explanation.engine


def test_a_classifier_runs_its_own_forward(native_calls):
    model = BertForSequenceClassification(BertConfig(**SIZES)).eval()
    with torch.no_grad():
        want = model(IDS, MASK).logits
        assert torch.equal(distilbert_fast.optimize(model)(IDS, MASK).logits, want)
    assert native_calls == []


def test_calibration_is_taken_and_costs_no_scalar_run(bert, native_calls):
    distilbert_fast.optimize(bert, "int8", calibration=[{"input_ids": IDS, "attention_mask": MASK}])
    assert native_calls == []
    with pytest.raises(ValueError, match="calibration"):
        distilbert_fast.optimize(bert, "int8", calibration=[])


def test_a_head_mask_is_honoured_still(bert, native_calls):
    """transformers' own forward ignores it."""
    mask = torch.tensor([1.0, 0.0, 0.5, 1.0])
    with torch.no_grad():
        with distilbert_fast.backend("torch"):
            want = distilbert_fast.pack_encoder(bert)(IDS, MASK, head_mask=mask)
        found = distilbert_fast.optimize(bert, keep_padding=False)(IDS, MASK, head_mask=mask).last_hidden_state
    assert torch.allclose(found, want, atol=1e-5) and native_calls == []
    assert distilbert_fast.explain(bert).served == 1


def test_the_attention_interface_is_sdpa(bert, native_calls, monkeypatch):
    with torch.no_grad():
        want = bert(IDS, MASK).last_hidden_state
        bert.set_attn_implementation("distilbert_fast")
        monkeypatch.setattr(attention_interface, "padded_attention", None)  # not called
        found = bert(IDS, MASK).last_hidden_state
    assert torch.allclose(found[MASK.bool()], want[MASK.bool()], atol=1e-6)


def test_the_drop_in_classes_run_on_torch(native_calls):
    torch.manual_seed(0)
    config = DistilBertConfig(dim=64, n_layers=2, n_heads=4, hidden_dim=96, vocab_size=50)
    theirs = DistilBertModel(config).eval()
    ours = distilbert_fast.DistilBertModel(config).eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        want, found = (model(IDS, MASK).last_hidden_state for model in (theirs, ours))
    assert torch.allclose(found[MASK.bool()], want[MASK.bool()], atol=1e-5) and native_calls == []


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_engine_runs_on_ops_and_is_saved_and_read_still(bert, native_calls, precision, tmp_path):
    engine = distilbert_fast.pack_encoder(bert, precision)
    with distilbert_fast.backend("torch"):
        want = engine(IDS, MASK)
    assert torch.allclose(engine(IDS, MASK), want, atol=1e-6) and native_calls == []
    engine.save(tmp_path / "encoder.safetensors")
    loaded = Engine.load(tmp_path / "encoder.safetensors")
    assert torch.nn.functional.cosine_similarity(loaded(IDS, MASK)[0], want[0], dim=-1).min() > 0.999
    assert len(native_calls) == 1, "there are no modules for ops to pack"
    with distilbert_fast.backend("cpu"):
        engine(IDS, MASK)
    assert len(native_calls) == 2


PROGRAM = """
#include <cstdio>

#include "isa.h"

namespace distilbert_fast {
const Kernels kernels_scalar{};
}

int main() {
  std::printf("%s %d", distilbert_fast::isa().data(), distilbert_fast::scalar_by_default());
  distilbert_fast::set_isa("scalar");
  std::printf(" %d\\n", distilbert_fast::scalar_by_default());
}
"""


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++")
def test_the_native_module_tells_the_scalar_tier_that_is_asked_for_from_the_one_that_is_left(tmp_path):
    (tmp_path / "main.cpp").write_text(PROGRAM)
    isa = ROOT / "csrc/cpu/isa"
    flags = ("-std=c++17", "-DDISTILBERT_FAST_SCALAR_ONLY", f"-I{ROOT / 'csrc'}", f"-I{isa}", "-Wall", "-Werror")
    succeed("g++", *flags, isa / "isa.cpp", "main.cpp", "-o", "isas", cwd=tmp_path)
    assert succeed(tmp_path / "isas", cwd=tmp_path) == "scalar 1 0\n"


def contract(header: str) -> set[str]:
    """Names of the functions that a vec_*.h gives."""
    text = (ROOT / "csrc/cpu/isa" / header).read_text()
    return set(re.findall(r"^(?:inline )?(?:Vec|void|float) (\w+)\(", text, re.MULTILINE))


def test_every_vector_header_gives_what_the_design_lists():
    """And needs no more than vec_scalar.h gives, over which everything compiles."""
    section = (ROOT / "docs/design.md").read_text().split("### What a vec_neon.h would have to give")[1]
    listed = set(re.findall(r"`(\w+)\(", section.split("\n## ")[0]))
    assert listed and listed == contract("vec_scalar.h")
    for header in ("vec_avx2.h", "vec_avx512.h"):
        assert contract(header) >= listed


def test_nothing_above_the_vectors_names_an_instruction_set():
    """What tier.h includes, and what follows from there, is for any processor: a vec_neon.h can stand under it."""
    seen: set[Path] = set()
    waiting = [ROOT / "csrc/cpu/isa/tier.h", ROOT / "csrc/cpu/isa/vec_scalar.h", ROOT / "csrc/cpu/isa/tier_scalar.cpp"]
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        text = path.read_text()
        for word in ("immintrin", "x86intrin", "_mm", "__m128", "__m256", "__m512", "__asm__"):
            assert word not in text, f"{word} in {path}"
        includes = [line.split('"')[1] for line in text.splitlines() if line.startswith('#include "')]
        waiting += [ROOT / "csrc" / name for name in includes]
    assert len(seen) > 20
