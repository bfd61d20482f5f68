"""Every kind of compressed model, family and head, read in a fresh process: the same bits on every CPU tier."""

from __future__ import annotations

import subprocess
import sys

import places
import pytest
import torch
from cases import WHOLE, covering
from compressed_models import BATCH, FAMILIES, FORMATS, made, pruned
from safetensors.torch import load_file, save_file
from tiny_models import answers

from distilbert_fast import optimize, pack_encoder

HEADS = ["Model", "ForSequenceClassification", "ForQuestionAnswering", "ForMaskedLM", "ForTokenClassification"]


CASES = [
    {"name": name, "family": family, "head": head}
    for name in FORMATS
    for family in FAMILIES
    for head in HEADS
    if not (head == "ForMaskedLM" and name in ("int8 and tables", "pruned and int8"))  # whose logits share the table
]
CHOSEN = CASES if WHOLE else [CASES[i] for i in covering(CASES)]
STATIC = {"static": lambda model: model, "pruned and static": pruned}

# Only the documented import. Names of directories are "format/family/head"; argv: where they are, and the tiers.
FRESH = """
import pathlib, sys, torch, transformers
import distilbert_fast
from safetensors.torch import load_file, save_file
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
root, tiers = pathlib.Path(sys.argv[1]), sys.argv[2:]
batch, found = load_file(root / "batch.safetensors"), {}
for config in sorted(root.glob("*/*/*/config.json")):
    name = str(config.parent.relative_to(root))
    auto = getattr(transformers, "Auto" + name.rpartition("/")[2].replace("For", "ModelFor"))
    model = auto.from_pretrained(config.parent)
    with torch.no_grad():
        for served in (False, True):
            if served:
                distilbert_fast.optimize(model)
            for tier in tiers:
                distilbert_fast.backends.cpu().set_isa(tier)
                found |= {f"{name}/{tier}/{served}/{i}": x.clone() for i, x in enumerate(model(**batch).to_tuple())}
for file in sorted(root.glob("*/*/engine.safetensors")):
    for tier in tiers:
        distilbert_fast.backends.cpu().set_isa(tier)
        found[f"{file.parent.relative_to(root)}/{tier}"] = distilbert_fast.Engine.load(file)(**batch)
save_file(found, root / "found.safetensors")
"""


@pytest.fixture(scope="module")
def round_trips(tmp_path_factory):
    """(expected, found) tensors by name."""
    root, expected = tmp_path_factory.mktemp("round-trips"), {}
    save_file(BATCH, root / "batch.safetensors")
    for case in CHOSEN:
        model, place = FORMATS[case["name"]](made(case["family"], case["head"])), "/".join(case.values())
        model.save_pretrained(root / place)
        for served in (False, True):
            if served:
                optimize(model)
            for tier in places.TIERS:
                with places.on_tier(tier):
                    found = answers(model, BATCH)
                expected |= {f"{place}/{tier}/{served}/{i}": x for i, x in enumerate(found)}
    for name, change in STATIC.items():
        for family in FAMILIES:
            engine = pack_encoder(change(made(family, "Model")), "int8", calibration=[BATCH])
            (root / name / family).mkdir(parents=True)
            engine.save(root / name / family / "engine.safetensors")
            for tier in places.TIERS:
                with places.on_tier(tier):
                    expected[f"{name}/{family}/{tier}"] = engine(**BATCH)
    command = [sys.executable, "-c", FRESH, str(root), *places.TIERS]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    return expected, load_file(root / "found.safetensors")


@pytest.mark.parametrize(
    "place",
    ["/".join(case.values()) for case in CHOSEN] + [f"{name}/{family}" for name in STATIC for family in FAMILIES],
)
def test_the_same_bits_in_a_fresh_process(place, round_trips):
    want, found = ({k: x for k, x in all.items() if k.startswith(f"{place}/")} for all in round_trips)
    assert want and want.keys() == found.keys()
    assert all(x.isfinite().all() for x in want.values())
    assert not [key for key, x in want.items() if not torch.equal(x, found[key])]
