"""`serve --ray`: replicas of a Ray cluster answer as `serve` does. Needs the extra `ray`."""

from __future__ import annotations

import sys
import threading

import http_server
import pytest
from demo_input import bert, sentences
from http_server import Client, running
from typer.testing import CliRunner

from distilbert_fast.cli import app

TEXTS = [text for text, _ in sentences(12, 3)]
ASKED = (
    ("/embed", {"inputs": TEXTS[:5]}),
    ("/v1/embeddings", {"model": "embed", "input": TEXTS, "encoding_format": "base64"}),
    ("/predict", {"inputs": [[text] for text in TEXTS]}),
    ("/rerank", {"query": TEXTS[0], "texts": TEXTS[1:], "return_text": True}),
    ("/tag", {"inputs": TEXTS}),
    ("/qa", {"inputs": {"question": TEXTS[0], "context": " ".join(TEXTS)}}),
    ("/tokenize", {"inputs": TEXTS}),
    ("/embed", {"inputs": None}),
    ("/embed", b"{"),
    ("/embed", {"inputs": "a", "model": "nope"}),
    ("/nowhere", {"inputs": "a"}),
)


@pytest.mark.slow
def test_replicas_answer_as_the_server_does(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.serve")
    from distilbert_fast.jobs.serve_ray import serve_on_ray

    monkeypatch.setenv("DISTILBERT_FAST_API_KEY", "s3cret")
    models = [f"{name}={place}" for name, place in http_server.models(tmp_path).items()]
    shown = {"authorization": "Bearer s3cret"}
    with running(models, access_log=False) as client:
        wanted = [client.ask(path, body, **shown) for path, body in ASKED]
    found = []
    monkeypatch.setenv("PYTHONPATH", ":".join([str(http_server.ROOT), *sys.path]))
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    try:
        is_served = threading.Event()

        def ready(address, stop):
            client = Client(address)
            found.extend(client.ask(path, body, **shown) for path, body in ASKED)
            found.append(client.ask("/embed", {"inputs": "a"}))
            is_served.set()
            stop.set()

        serve_on_ray(models, port=0, replicas=1, ready=ready)
        assert is_served.is_set()
    finally:
        ray.shutdown()
    assert found.pop().status == 401
    assert [(one.status, one.body) for one in found] == [(one.status, one.body) for one in wanted]
    assert [one.status for one in found] == [200] * 7 + [422, 400, 404, 404]


def test_what_ray_serve_cannot_do_is_said_in_one_line(tmp_path, monkeypatch):
    model = bert(tmp_path / "body")

    def refusal(*given):
        done = CliRunner().invoke(app, ["serve", "--model", str(model), "--port", "0", *given], env={"COLUMNS": "100"})
        assert done.exit_code == 2, done.output
        return done.stderr.strip()

    assert refusal("--replicas", "2") == "error: serve: replicas: expected with --ray, got without"
    monkeypatch.setitem(sys.modules, "ray", None)
    assert refusal("--ray") == "error: serve: ray: ray is not installed; pip install 'distilbert-fast[ray]'"
