"""`predict --engine ray`: the output of the single process, also when a worker is killed. Needs the extra `ray`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import transformers
from demo_input import bert, sentences
from typer.testing import CliRunner

from distilbert_fast.cli import app
from distilbert_fast.jobs import predict_input
from distilbert_fast.jobs.predict import predict
from distilbert_fast.jobs.settings import RecipeError

TEXTS = [text for text, _ in sentences(300, 3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    body = bert(tmp_path_factory.mktemp("models") / "body")
    path = body.with_name("classifier")
    transformers.BertForSequenceClassification.from_pretrained(body).save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(body).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def cluster():
    """Of two cores, on this machine."""
    ray = pytest.importorskip("ray")
    root = str(Path(__file__).resolve().parents[2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", root)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
        yield ray
        ray.shutdown()


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(predict_input, "WINDOW_ROWS", 16)


def written(path: Path) -> Path:
    lines = [f'{{"id": {number}, "text": "{text}"}}' for number, text in enumerate(TEXTS)]
    lines[7], lines[50], lines[90] = '{"id": 7, "text": null}', "no JSON", '{"id": 90, "text": " "}'
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_output_is_that_of_one_process(cluster, model, tmp_path):
    source = written(tmp_path / "in.jsonl")
    for suffix in (".jsonl", ".parquet"):
        here, there = tmp_path / f"here{suffix}", tmp_path / f"there{suffix}"
        wanted = predict(model, source, here, precision="int8", shard_rows=100)
        found = predict(
            model, source, there, precision="int8", shard_rows=100, engine="ray", packed=tmp_path / "packed.safetensors"
        )
        assert there.read_bytes() == here.read_bytes()
        rejected = (path.with_name(f"{path.name}.rejected.jsonl") for path in (here, there))
        assert len({path.read_bytes() for path in rejected}) == 1
        counts = ("rows", "written", "rejected", "truncated", "tokens")
        assert [found[name] for name in counts] == [wanted[name] for name in counts] and found["rejected"] == 3


def test_a_worker_that_is_killed_loses_nothing(cluster, model, tmp_path):
    source = written(tmp_path / "in.jsonl")
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    predict(model, source, here)
    killed = []

    def kill(totals):
        if not killed:
            killed.append(worker_pid())
            os.kill(killed[0], signal.SIGKILL)

    predict(model, source, there, shard_rows=32, engine="ray", workers=2, each_shard=kill)
    assert killed and there.read_bytes() == here.read_bytes()


def worker_pid() -> int:
    """The process of a worker."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if path.read_bytes().startswith(b"ray::_Worker"):
                    return int(path.parent.name)
            except OSError:
                continue
        time.sleep(0.05)
    raise AssertionError("no worker runs")


def test_what_ray_cannot_do_is_said_in_one_line(cluster, model, tmp_path):
    source = written(tmp_path / "in.jsonl")
    expected = "predict: workers: expected 1 to 2, for 1 threads each of the cluster's 2 cores, got 3"
    with pytest.raises(RecipeError) as raised:
        predict(model, source, tmp_path / "out.jsonl", engine="ray", workers=3)
    assert str(raised.value) == expected


def test_engines_that_are_not_there(model, tmp_path, monkeypatch):
    source = written(tmp_path / "in.jsonl")
    given = ["predict", "--model", str(model), "--input", str(source), "--output", str(tmp_path / "out.jsonl")]
    done = CliRunner().invoke(app, [*given, "--engine", "spark"])
    assert done.stderr.strip() == "error: predict: engine: expected here or ray, got 'spark'"
    monkeypatch.setitem(sys.modules, "ray", None)
    done = CliRunner().invoke(app, [*given, "--engine", "ray"])
    assert done.stderr.strip() == "error: predict: engine: ray is not installed; pip install 'distilbert-fast[ray]'"
