"""Weights that processes share: the same answers, and the same memory."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from demo_input import bert, sentences

from distilbert_fast import Predictor, explain, optimize
from distilbert_fast.engine.engine import Engine
from distilbert_fast.modeling.mapped import map_engine, map_parameters

TEXTS = [text for text, _ in sentences(8, 1)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return bert(tmp_path_factory.mktemp("mapped") / "bert")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_answers_stay_and_the_file_is_used_again(place, tmp_path, precision):
    plain = Predictor.load(place, precision=precision)
    file = tmp_path / "sub" / "packed.safetensors"
    first = Predictor.load(place, precision=precision, packed=file)
    made = file.stat()
    second = Predictor.load(place, precision=precision, packed=file)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns)
    for one in (first, second):
        for found, wanted in zip(one(TEXTS), plain(TEXTS), strict=True):
            assert torch.equal(torch.from_numpy(found), torch.from_numpy(wanted))
        assert explain(one.model).served == 1 and not explain(one.model).fallbacks


def test_of_many_that_start_together_one_writes(place, tmp_path, monkeypatch):
    models = [optimize(transformers.BertModel.from_pretrained(place), "int8") for _ in range(4)]
    written, save = [], Engine.save

    def slowly(engine, path):
        time.sleep(0.05)
        written.append(path)
        save(engine, path)

    monkeypatch.setattr(Engine, "save", slowly)
    file = tmp_path / "sub" / "packed.safetensors"
    with ThreadPoolExecutor(len(models)) as threads:
        assert [*threads.map(lambda model: map_engine(model, file), models)] == [None] * len(models)
    assert written == [file]


def test_a_file_of_other_weights_is_replaced(place, tmp_path):
    file = tmp_path / "packed.safetensors"
    for content in (b"", b"damaged"):
        file.write_bytes(content)
        Predictor.load(place, precision="fp32", packed=file)
        assert file.stat().st_size > 10_000
    other = bert(tmp_path / "other", initializer_range=0.2)
    before = Predictor.load(place, precision="fp32", packed=file)
    answer = before(TEXTS[0])
    changed = Predictor.load(other, precision="fp32", packed=file)
    assert not torch.equal(torch.from_numpy(changed(TEXTS[0])), torch.from_numpy(answer))
    assert torch.equal(torch.from_numpy(before(TEXTS[0])), torch.from_numpy(answer))  # keeps the file that it mapped


def test_weights_that_change_later_are_packed_again(place, tmp_path):
    predictor = Predictor.load(place, packed=tmp_path / "packed.safetensors")
    before = predictor(TEXTS[0])
    content = (place / "model.safetensors").read_bytes()
    with torch.no_grad():
        predictor.model.encoder.layer[0].output.dense.weight.mul_(2)
    assert abs(predictor(TEXTS[0]) - before).max() > 1e-3
    assert (place / "model.safetensors").read_bytes() == content  # a page of its own was written


def test_parameters_are_mapped_bit_for_bit(place):
    model = transformers.BertForSequenceClassification.from_pretrained(place)
    kept = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        model.bert.pooler.dense.bias.add_(1)  # is not what the file holds
    changed = model.bert.pooler.dense.bias.data_ptr()
    wanted = sum(parameter.nbytes for name, parameter in kept.items() if name.startswith("bert."))
    assert map_parameters(model, place) == wanted - model.bert.pooler.dense.bias.nbytes
    assert model.bert.pooler.dense.bias.data_ptr() == changed
    for name, parameter in model.named_parameters():
        if name != "bert.pooler.dense.bias":
            assert torch.equal(parameter, kept[name])


def test_models_that_cannot_be_mapped(place, tmp_path):
    model = transformers.BertModel.from_pretrained(place)
    with pytest.raises(TypeError, match="map_engine: model must be optimized, got BertModel"):
        map_engine(model, tmp_path / "x.safetensors")


MEMORY = """
import sys
from distilbert_fast import Predictor
predictor = Predictor.load(sys.argv[1], precision="int8", packed=sys.argv[2])
predictor(["the old cat"])
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.mark.slow
def test_two_processes_hold_the_weights_once(tmp_path):
    """Of what a process maps of the two files, its share is half."""
    place = bert(tmp_path / "wide", hidden_size=512, intermediate_size=2048, num_attention_heads=8, layers=4)
    file = tmp_path / "packed.safetensors"
    command = [sys.executable, "-c", MEMORY, str(place), str(file)]
    started = [subprocess.Popen(command, stdin=-1, stdout=-1, text=True) for _ in range(2)]
    try:
        assert [process.stdout.readline() for process in started] == ["ready\n"] * 2
        for process in started:
            resident, share = shared(process.pid, {file, place / "model.safetensors"})
            assert resident > 20_000_000 and share < 0.55 * resident
    finally:
        for process in started:
            process.communicate("end\n")


def shared(pid: int, files: set[Path]) -> tuple[int, int]:
    """Bytes of files that are in a process's memory, and its share of those."""
    resident = share = 0
    for part in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text()):
        if any(str(file) in part.splitlines()[0] for file in files):
            resident += 1024 * int(re.search(r"^Rss: +(\d+)", part, re.MULTILINE)[1])
            share += 1024 * int(re.search(r"^Pss: +(\d+)", part, re.MULTILINE)[1])
    return resident, share
