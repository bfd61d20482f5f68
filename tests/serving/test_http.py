"""The server on loopback: what real clients get, what malformed requests get, and that no answer is lost or crossed."""

from __future__ import annotations

import gc
import json
import logging
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import http_server
import numpy as np
import pytest
import torch
import transformers
from demo_input import sentences
from http_server import Client, running

from bench.harness import http_load
from bench.harness.mixed_requests import MixedRequests, count_told_apart, differs
from distilbert_fast import Predictor
from distilbert_fast.jobs import serve as job
from distilbert_fast.serving.http import connection as protocol
from distilbert_fast.serving.http.service import Limits, Service

TEXTS = [text for text, _ in sentences(40, 3)]
LIMITS = Limits(body_bytes=20_000, inputs=16, batch_tokens=128)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return http_server.models(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def client(places):
    given = [f"{name}={place}" for name, place in places.items()]
    with running(given, limits=LIMITS, access_log=False) as made:
        yield made


@pytest.fixture(scope="module")
def openai_client(client):
    from openai import OpenAI

    return OpenAI(base_url=f"{client.address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def embedder(places):
    return Predictor.load(places["embed"], "embedding", normalize=True)


def near(found, wanted, tolerance=2e-5):
    np.testing.assert_allclose(np.array(found, dtype=np.float64), np.array(wanted), atol=tolerance)


# What clients get ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_the_openai_client_gets_embeddings(openai_client, embedder, encoding):
    found = openai_client.embeddings.create(model="embed", input=TEXTS[:9], encoding_format=encoding)
    assert found.model == "embed" and [one.index for one in found.data] == [*range(9)]
    vectors = [one.embedding for one in found.data]
    if encoding == "base64":
        import base64

        vectors = [np.frombuffer(base64.b64decode(one), dtype="<f4") for one in vectors]
    near(vectors, embedder(TEXTS[:9]))
    assert found.usage.total_tokens == sum(row.tokens for row in embedder.encode(TEXTS[:9]))


def test_the_openai_client_gets_fewer_dimensions_and_sends_ids(openai_client, embedder, places):
    short = openai_client.embeddings.create(model="embed", input=TEXTS[0], dimensions=5).data[0].embedding
    kept = embedder(TEXTS[0])[:5]
    near(short, kept / np.linalg.norm(kept))
    tokenizer = transformers.AutoTokenizer.from_pretrained(places["embed"])
    ids = [tokenizer(text)["input_ids"] for text in TEXTS[:2]]
    for given in (ids, [one[1:-1] for one in ids]):
        near(
            [one.embedding for one in openai_client.embeddings.create(model="embed", input=given).data],
            embedder(TEXTS[:2]),
        )
    assert [model.id for model in openai_client.models.list()] == ["embed", "labels", "cross", "ner", "qa"]


def test_the_openai_client_is_told_what_is_wrong(openai_client):
    import openai

    with pytest.raises(openai.NotFoundError) as raised:
        openai_client.embeddings.create(model="ada", input="the old cat")
    assert raised.value.body == {
        "message": "model: expected one of 'embed', 'labels', 'cross', 'ner', 'qa', got 'ada'",
        "type": "not_found_error",
        "param": "model",
        "code": "model_not_found",
    }
    for given, words in (
        ({"model": "ner"}, "model: expected a model that can embed, got 'ner', which can tag"),
        ({"input": ["the cat", ""]}, "input[1]: an empty text"),
        ({"input": [5, 99]}, "input: expected ids of tokens from 0 to 36, got 99"),
        ({"dimensions": 33}, "dimensions: expected 1 to 32, which 'embed' has, got 33"),
        ({"dimensions": 0}, "dimensions: Input should be greater than or equal to 1, got 0"),
    ):
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            openai_client.embeddings.create(**{"model": "embed", "input": "the cat"} | given)
        assert refused.value.body["message"] == words


def test_payloads_of_text_embeddings_inference(client, places, embedder):
    near(client.ask("/embed", {"inputs": TEXTS[:3]}).json, embedder(TEXTS[:3]))
    raw = Predictor.load(places["embed"], "embedding")
    one = client.ask("/embed", {"inputs": TEXTS[0], "normalize": False, "truncate": True}).json
    near(one, [raw(TEXTS[0])])
    near(client.ask("/", {"inputs": TEXTS[0]}).json, [embedder(TEXTS[0])])
    tokens = client.ask("/embed_all", {"inputs": TEXTS[:2]}).json
    features = transformers.pipeline("feature-extraction", model=str(places["embed"]), device="cpu")(TEXTS[:2])
    for found, wanted in zip(tokens, features, strict=True):
        near(found, wanted[0])
    asked = {"source_sentence": TEXTS[0], "sentences": TEXTS[1:4]}
    near(client.ask("/similarity", {"inputs": asked}).json, np.stack(embedder(TEXTS[1:4])) @ embedder(TEXTS[0]))


def test_ranking_is_that_of_a_cross_encoder(client, places):
    from sentence_transformers import CrossEncoder

    query, texts = TEXTS[0], TEXTS[1:7]
    scores = CrossEncoder(str(places["cross"]), device="cpu").predict([(query, text) for text in texts])
    found = client.ask("/rerank", {"query": query, "texts": texts, "return_text": True}).json
    assert [one["index"] for one in found] == np.argsort(-scores, kind="stable").tolist()
    assert all(one["text"] == texts[one["index"]] for one in found)
    near([one["score"] for one in found], np.sort(scores)[::-1])
    raw = client.ask("/rerank", {"query": query, "texts": texts, "raw_scores": True}).json
    near([1 / (1 + np.exp(-one["score"])) for one in raw], np.sort(scores)[::-1])
    assert [*raw[0]] == ["index", "score"]


def test_labels_are_the_pipelines(client, places):
    theirs = transformers.pipeline("text-classification", model=str(places["labels"]), device="cpu", top_k=None)
    wanted = [*theirs(TEXTS[:2]), *theirs([{"text": TEXTS[2], "text_pair": TEXTS[3]}])]
    found = client.ask("/predict", {"inputs": [[TEXTS[0]], [TEXTS[1]], [TEXTS[2], TEXTS[3]]]}).json
    for ours, those in zip(found, wanted, strict=True):
        assert [one["label"] for one in ours] == [one["label"] for one in those]
        near([one["score"] for one in ours], [one["score"] for one in those])
    for given, ours in ((TEXTS[0], found[0]), ([TEXTS[0]], found[0]), ([TEXTS[2], TEXTS[3]], found[2])):  # a pair
        alone = client.ask("/predict", {"inputs": given}).json
        near([one["score"] for one in alone], [one["score"] for one in ours])
    raw = client.ask("/predict", {"inputs": TEXTS[0], "raw_scores": True}).json
    (logits,) = theirs([TEXTS[0]], function_to_apply="none")
    near([one["score"] for one in raw], [one["score"] for one in logits])


@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
def test_entities_are_the_pipelines(client, places, strategy):
    theirs = transformers.pipeline("token-classification", model=str(places["ner"]), device="cpu")
    wanted = theirs(TEXTS[:6], aggregation_strategy=strategy)
    asked = {"inputs": TEXTS[:6], "parameters": {"aggregation_strategy": strategy}}
    found = client.ask("/tag", asked).json
    assert sum(map(len, wanted)) > 6
    for ours, those in zip(found, wanted, strict=True):
        assert [[*one] for one in ours] == [[*one] for one in those]
        for one, other in zip(ours, those, strict=True):
            near(one.pop("score"), float(other.pop("score")))
            assert one == other
    alone = client.ask("/tag", asked | {"inputs": TEXTS[0]}).json
    assert [one["word"] for one in alone] == [one["word"] for one in found[0]]
    kept = client.ask("/tag", {"inputs": TEXTS[0], "parameters": {"ignore_labels": ["PER", "LOC"]}}).json
    assert {one["entity_group"] for one in kept} <= {"O"}


def test_answers_are_those_of_the_predictor(client, places):
    pairs = [(TEXTS[0], " ".join(TEXTS[1:20])), (TEXTS[2], TEXTS[3])]  # the first is of several windows
    asked = [{"question": question, "context": context} for question, context in pairs]
    for options in ({}, {"top_k": 3, "max_answer_len": 4, "handle_impossible_answer": True, "align_to_words": False}):
        wanted = Predictor.load(places["qa"], **options)(pairs)
        found = client.ask("/qa", {"inputs": asked, "parameters": options}).json
        for ours, those in zip(found, wanted, strict=True):
            ours, those = ([one] if isinstance(one, dict) else one for one in (ours, those))
            near([one.pop("score") for one in ours], [one.pop("score") for one in those])
            assert ours == those
    alone = client.ask("/qa", {"inputs": asked[1]}).json
    assert alone["answer"] == pairs[1][1][alone["start"] : alone["end"]]


def test_tokens_are_the_tokenizers(client, places):
    tokenizer = transformers.AutoTokenizer.from_pretrained(places["embed"])
    found = client.ask("/tokenize", {"inputs": "the  Cat, near"}).json[0]
    assert [one["id"] for one in found] == tokenizer("the  Cat, near")["input_ids"]
    assert [(one["text"], one["start"], one["stop"]) for one in found[1:-1]] == [
        ("the", 0, 3),
        ("Cat", 5, 8),
        (",", 8, 9),
        ("near", 10, 14),
    ]
    assert found[0] == {"id": 2, "text": "[CLS]", "special": True, "start": None, "stop": None}
    bare = client.ask("/tokenize", {"inputs": ["the cat"], "add_special_tokens": False}).json
    assert [one["text"] for one in bare[0]] == ["the", "cat"]


def test_hugging_faces_client(client, embedder, monkeypatch):
    from huggingface_hub import InferenceClient, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    theirs = InferenceClient(base_url=f"{client.address}/embed")
    near(theirs.feature_extraction(TEXTS[0]), [embedder(TEXTS[0])])


def test_what_a_server_says_of_itself(client):
    assert client.ask("/health").status == 200
    info = client.ask("/info").json
    assert info["model_type"] == {"embedding": {"pooling": "mean"}} and info["max_client_batch_size"] == 16
    assert info["models"]["cross"]["can"] == ["classify", "rerank"]
    assert info["models"]["qa"]["engine"] == "fp32 by the C++ encoder on cpu" and not info["models"]["qa"]["fallbacks"]
    assert client.ask("/docs").status == 200
    described = client.ask("/openapi.json").json["paths"]
    assert {"/embed", "/embed_all", "/rerank", "/predict", "/similarity", "/tokenize", "/tag", "/qa"} <= {*described}
    client.ask("/predict", {"inputs": TEXTS[0]})
    metrics = client.ask("/metrics").body.decode()
    for line in (
        'distilbert_fast_requests_total{route="/predict",status="200"}',
        'distilbert_fast_request_seconds_bucket{le="0.1",route="/predict"}',
        "distilbert_fast_queue_seconds_bucket",
        "distilbert_fast_batch_tokens_sum",
        "distilbert_fast_compute_seconds_count",
        'distilbert_fast_model_calls_total{by="engine",model="labels"}',
        "distilbert_fast_waiting_tokens 0.0",
    ):
        assert line in metrics
    assert 'by="own forward' not in metrics and 'route="other"' in metrics  # /docs is no route of clients


# What malformed requests get ----------------------------------------------------------------------------------------

DEEP = b'{"inputs": ' + b"[" * 3000 + b"]" * 3000 + b"}"
MALFORMED = [
    ("/embed", b"", 400, "body: expected JSON in UTF-8: EOF while parsing a value at line 1 column 0"),
    ("/embed", b'{"inputs": "x"', 400, "body: expected JSON in UTF-8: EOF while parsing an object at line 1 column 14"),
    (
        "/embed",
        b'{"inputs": "\xff\xfe"}',
        400,
        "body: expected JSON in UTF-8: invalid unicode code point at line 1 column 13",
    ),
    (
        "/embed",
        '{"inputs": "x"}'.encode("utf-16"),
        400,
        "body: expected JSON in UTF-8: expected value at line 1 column 1",
    ),
    (
        "/embed",
        b'{"inputs": "\\ud83d"}',
        400,
        "body: expected JSON in UTF-8: unexpected end of hex escape at line 1 column 19",
    ),
    ("/embed", DEEP, 400, "body: expected JSON in UTF-8: recursion limit exceeded at line 1 column 212"),
    ("/embed", b"x" * 20_001, 413, "body: expected 20000 bytes at most, got more"),
    ("/embed", [], 422, "body: Input should be an object, got []"),
    ("/embed", {}, 422, "inputs: expected, and not there"),
    ("/embed", {"inputs": None}, 422, "inputs: expected a text, or a list of one or more, got None"),
    ("/embed", {"inputs": []}, 422, "inputs: expected a text, or a list of one or more, got []"),
    ("/embed", {"inputs": ["a", {"b": 1}]}, 422, "inputs[1]: expected a text, got {'b': 1}"),
    ("/embed", {"inputs": ["a", 1.5]}, 422, "inputs[1]: expected a text, got 1.5"),
    ("/embed", {"inputs": ["a", [1, "b"]]}, 422, "inputs[1]: expected a text, got [1, 'b']"),
    ("/embed", {"inputs": ["a", ""]}, 422, "inputs[1]: an empty text"),
    ("/embed", {"inputs": " \n"}, 422, "inputs: an empty text"),
    ("/embed", {"inputs": "a\0b"}, 422, "inputs: a text holds a NUL byte"),
    ("/embed", {"inputs": [7, -1]}, 422, "inputs: expected ids of tokens from 0 to 36, got -1"),
    ("/embed", {"inputs": ["a"] * 17}, 413, "inputs: expected 16 at most in a request, got 17"),
    (
        "/embed",
        {"inputs": "the " * 63},
        413,
        "inputs: expected 64 tokens at most, which 'embed' reads, got more; \"truncate\": true cuts texts",
    ),
    (
        "/embed",
        {"inputs": "a", "normalise": True},
        422,
        "normalise: expected none of that name; the body has truncate, truncation_direction, "
        "prompt_name, model, inputs, normalize, dimensions",
    ),
    ("/embed", {"inputs": "a", "normalize": "yes"}, 422, "normalize: Input should be a valid boolean, got 'yes'"),
    ("/embed", {"inputs": "a", "prompt_name": "query"}, 422, "prompt_name: Input should be null, got 'query'"),
    (
        "/embed",
        {"inputs": "a", "truncation_direction": "Left"},
        422,
        "truncation_direction: Input should be 'right' or 'Right', got 'Left'",
    ),
    (
        "/embed",
        {"inputs": "a", "model": "qa"},
        422,
        "model: expected a model that can embed, got 'qa', which can answer",
    ),
    (
        "/embed",
        {"inputs": "a", "model": "x" * 99},
        404,
        f"model: expected one of 'embed', 'labels', 'cross', 'ner', 'qa', got '{'x' * 80}'",
    ),
    (
        "/predict",
        {"inputs": ["a", "b", "c"]},
        422,
        "inputs: expected a text, [text] or a pair [text, text], or a list with such lists, got ['a', 'b', 'c']",
    ),
    (
        "/predict",
        {"inputs": [["a"], ["b", None]]},
        422,
        "inputs[1]: expected [text] or a pair [text, text], got ['b', None]",
    ),
    ("/predict", {"inputs": [["a", ""]]}, 422, "inputs[0]: the second text: an empty text"),
    (
        "/rerank",
        {"query": "a", "texts": []},
        422,
        "texts: List should have at least 1 item after validation, not 0, got []",
    ),
    ("/rerank", {"query": "a", "texts": ["b", 3]}, 422, "texts[1]: Input should be a valid string, got 3"),
    ("/rerank", {"query": "a", "texts": ["b"] * 17}, 413, "texts: expected 16 at most in a request, got 17"),
    ("/rerank", {"query": " ", "texts": ["b"]}, 422, "texts[0]: the first text: an empty text"),
    ("/similarity", {"inputs": "a"}, 422, "inputs: Input should be an object, got 'a'"),
    (
        "/similarity",
        {"inputs": {"source_sentence": "a", "sentences": ["b", ""]}},
        422,
        "inputs.sentences[1]: an empty text",
    ),
    ("/tokenize", {"inputs": ["a", ""]}, 422, "inputs[1]: an empty text"),
    (
        "/tag",
        {"inputs": "a", "parameters": {"aggregation_strategy": "best"}},
        422,
        "parameters.aggregation_strategy: Input should be 'none', 'simple', 'first', 'average' or 'max', got 'best'",
    ),
    (
        "/qa",
        {"inputs": {"question": "a"}},
        422,
        "inputs: expected {\"question\": a text, \"context\": a text}, got {'question': 'a'}",
    ),
    (
        "/qa",
        {"inputs": [{"question": "a", "context": 3}]},
        422,
        "inputs[0]: expected {\"question\": a text, \"context\": a text}, got {'question': 'a', 'context': 3}",
    ),
    (
        "/qa",
        {"inputs": {"question": "a", "context": "b"}, "parameters": {"top_k": 0}},
        422,
        "parameters.top_k: Input should be greater than or equal to 1, got 0",
    ),
    ("/nowhere", {"inputs": "a"}, 404, "no such route; /docs lists them"),
    ("/health", {"inputs": "a"}, 405, "POST is not what this route takes"),
]


@pytest.mark.parametrize(("path", "body", "status", "words"), MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_requests_are_told_what_was_expected(client, path, body, status, words):
    reply = client.ask(path, body)
    assert (reply.status, reply.json["error"]) == (status, words)
    assert set(reply.json) == {"error", "error_type"}
    assert client.ask("/health").status == 200


def test_what_is_no_http_crashes_nothing(client):
    for sent in (b"\0\0\0\0\r\n\r\n", b"POST /embed HTTP/1.1\r\ncontent-length: -3\r\n\r\n", b"GET " + b"x" * 100_000):
        with socket.create_connection((client.host, client.port)) as connection:
            connection.sendall(sent)
            connection.settimeout(5)
            assert connection.recv(100)[:12] in (b"HTTP/1.1 400", b"")
    assert client.ask("/health").status == 200


def raw(client, sent: bytes) -> bytes:
    """All that comes back until the server closes the connection."""
    with socket.create_connection((client.host, client.port)) as connection:
        connection.settimeout(http_server.PATIENCE)
        connection.sendall(sent)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_what_checks_a_server_asks(client):
    """HEAD where GET is answered; 405 with Allow; no redirect to a host that the client names."""
    reply = client.ask("/health", method="HEAD")
    assert (reply.status, reply.body) == (200, b"")
    assert client.ask("/metrics", method="HEAD").status == 200 and client.ask("/v1/models", method="HEAD").status == 200
    reply = client.ask("/embed", method="HEAD")
    assert (reply.status, reply.headers["allow"], reply.body) == (405, "POST", b"")
    assert client.ask("/embed", method="OPTIONS").headers["allow"] == "POST"
    reply = client.ask("/embed/", {"inputs": "a"})
    assert (reply.status, reply.json["error"]) == (404, "no such route; /docs lists them")


def test_old_and_hasty_clients(client):
    """HTTP/1.0, requests in chunks, and several requests before the first answer, of which one is malformed."""
    body = b'{"inputs": "the cat"}'
    head = b"POST /tokenize HTTP/1.%d\r\nhost: x\r\n%bcontent-length: %d\r\n\r\n"
    wanted = client.ask("/tokenize", body).body
    assert raw(client, head % (0, b"", len(body)) + body).endswith(wanted)
    last = head % (1, b"connection: close\r\n", len(body)) + body
    found = raw(client, (head % (1, b"", len(body)) + body) * 2 + head % (1, b"", 1) + b"{" + last)
    assert found.count(wanted) == 3 and re.findall(rb"HTTP/1.1 (\d+)", found) == [b"200", b"200", b"400", b"200"]
    chunks = b"POST /tokenize HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    parts = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    assert raw(client, chunks + parts + b"0\r\n\r\n").endswith(wanted)


def test_clients_that_leave_with_requests_unanswered_are_no_fault(client):
    said: list[logging.LogRecord] = []
    listener = logging.Handler()
    listener.emit = said.append
    loggers = [logging.getLogger(name) for name in ("distilbert_fast.serve", "uvicorn.error")]
    for logger in loggers:
        logger.addHandler(listener)
    body = json.dumps({"inputs": TEXTS[:16]}).encode()
    asked = b"POST /embed_all HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    for _ in range(30):
        with socket.create_connection((client.host, client.port)) as gone:
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # leaves by a reset
            gone.sendall(asked * 20)
            gone.recv(1)
    wait_for(client, lambda waiting: waiting == 0)
    assert client.ask("/embed", {"inputs": TEXTS[0]}).status == 200
    for logger in loggers:
        logger.removeHandler(listener)
    assert not [record.getMessage() for record in said]


def test_clients_that_do_not_read_are_cut_off(client, monkeypatch):
    """The answers to 100 requests are more than the buffers of a connection hold, and the client takes none."""
    cut = threading.Event()
    look = protocol.Connection._look

    def looking(self, before):
        look(self, before)
        if self.transport.is_closing():
            cut.set()

    monkeypatch.setattr(protocol, "READ_SECONDS", 0.2)
    monkeypatch.setattr(protocol.Connection, "_look", looking)
    body = json.dumps({"inputs": ["the cat " * 31] * 16}).encode()
    asked = b"POST /embed_all HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect((client.host, client.port))
        lazy.sendall(asked * 100)
        assert cut.wait(http_server.PATIENCE)
    assert client.ask("/embed", {"inputs": TEXTS[0]}).status == 200


def test_texts_that_are_too_long_are_cut_where_that_is_asked(client, embedder):
    found = client.ask("/embed", {"inputs": "the cat " * 60, "truncate": True})
    near(found.json, [embedder(" ".join(["the cat"] * 31))])
    assert "distilbert_fast_truncated_texts_total 1.0" in client.ask("/metrics").body.decode()


# Many at once -------------------------------------------------------------------------------------------------------


def test_no_answer_is_lost_or_crossed(client, places):
    """450 requests of all routes and models at once, each compared with what the engine alone says."""
    mixed = MixedRequests(places, TEXTS)
    asked = [mixed(number) for number in range(450)]
    apart, pairs = count_told_apart(mixed, range(450))
    assert apart == pairs > 430  # an answer to another request would be seen
    sent = [http_load.request(one.path, one.body) for one in asked]
    found, _ = http_load.closed_loop(client.port, sent.__getitem__, clients=450, count=450)
    assert sorted(one.number for one in found) == [*range(450)] and {one.status for one in found} == {200}
    assert not [one for one in found if differs(json.loads(one.body), asked[one.number].answer)]


def test_of_many_that_come_together_those_after_the_first_are_refused(places, monkeypatch):
    """Forty requests at once while the thread that tokenizes is held up; as far as is known each takes a second, and
    21 seconds may pass."""
    made = []

    class Known(Service):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(job, "Service", Known)
    with running([str(places["embed"])], limits=Limits(deadline=30.0)) as client, ThreadPoolExecutor(1) as pool:
        (service,) = made
        opened = threading.Event()
        service._tokenizing.submit(opened.wait)
        service._usual, service.batcher._tokens, service.batcher._seconds = 100.0, 100.0, float(torch.get_num_threads())
        asked = http_load.request("/embed", {"inputs": ["the cat " * 40] * 16, "truncate": True})
        asking = pool.submit(http_load.closed_loop, client.port, lambda number: asked, clients=40, count=40)
        end = time.monotonic() + http_server.PATIENCE
        while service._coming + service.metrics.count < 40 and time.monotonic() < end:
            time.sleep(0.01)
        opened.set()
        found, _ = asking.result()
        refused = [json.loads(one.body)["error"] for one in found if one.status == 429]
        assert len(refused) == 19 and all("overloaded: the queue takes 21.0 s" in words for words in refused)
        assert service._coming == 0


def test_no_refusal_needs_a_thread_and_none_waits_for_the_garbage_collector(places):
    with running([str(places["embed"])]) as client:
        assert gc.get_freeze_count() > 0
        for body in (b"{", {"inputs": None}, {"inputs": "a", "model": "x"}):
            assert client.ask("/embed", body).status in (400, 404, 422)
        assert client.ask("/nowhere").status == 404
        assert not [one.name for one in threading.enumerate() if "AnyIO" in one.name]
    assert gc.get_freeze_count() == 0


class Gate:
    """Makes a model's batches wait."""

    def __init__(self, monkeypatch):
        self.opened, self.asked = threading.Event(), threading.Semaphore(0)
        self.computed = 0
        inner = Predictor.outputs

        def outputs(predictor, windows):
            self.asked.release()
            assert self.opened.wait(http_server.PATIENCE)
            self.computed += len(windows)
            return inner(predictor, windows)

        self.install = lambda: monkeypatch.setattr(Predictor, "outputs", outputs)


@pytest.fixture
def gate(monkeypatch):
    return Gate(monkeypatch)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_overload_deadlines_and_clients_that_left(places, gate, one_thread, embedder):
    first = embedder(TEXTS[0])
    with running([str(places["embed"])], limits=Limits(queue_tokens=20, deadline=30.0)) as client:
        gate.install()
        with ThreadPoolExecutor(4) as pool:
            held = pool.submit(client.ask, "/embed", {"inputs": TEXTS[0]})
            assert gate.asked.acquire(timeout=http_server.PATIENCE)
            late = client.ask("/embed", {"inputs": TEXTS[1]}, x_request_timeout="0.05")
            assert late.status == 504 and "not computed within the deadline" in late.json["error"]

            with socket.create_connection((client.host, client.port)) as gone:
                body = json.dumps({"inputs": TEXTS[2]}).encode()
                gone.sendall(b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
                wait_for(client, lambda waiting: waiting > 0)
            wait_for(client, lambda waiting: waiting == 0)

            waiting = pool.submit(client.ask, "/embed", {"inputs": ["the " * 30]})
            wait_for(client, lambda waiting: waiting > 0)
            full = client.ask("/embed", {"inputs": TEXTS[3]})
            assert full.status == 429 and int(full.headers["retry-after"]) >= 1
            assert full.json == {"error": "overloaded: 32 tokens wait, and 20 may", "error_type": "overloaded"}
            assert client.ask("/health").status == 200
            gate.opened.set()
            near(held.result().json, [first])
            assert waiting.result().status == 200
        assert gate.computed == 2  # neither the late one nor the one that left
        for given in ("soon", "-1", "nan", "inf"):
            reply = client.ask("/embed", {"inputs": "a"}, x_request_timeout=given)
            words = f"x-request-timeout: expected seconds above 0, got {given!r}"
            assert (reply.status, reply.json["error"]) == (422, words)
        assert 'route="/embed",status="499"' in client.ask("/metrics").body.decode()


def wait_for(client: Client, fits) -> None:
    end = time.monotonic() + http_server.PATIENCE
    while time.monotonic() < end:
        line = next(
            x for x in client.ask("/metrics").body.decode().splitlines() if "waiting_tokens " in x and x[0] != "#"
        )
        if fits(float(line.rpartition(" ")[2])):
            return
        time.sleep(0.01)
    raise AssertionError("it did not come")


def test_a_body_that_does_not_come(places):
    with (
        running([str(places["embed"])], limits=Limits(deadline=0.2)) as client,
        socket.create_connection((client.host, client.port)) as slow,
    ):
        slow.sendall(b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{")
        slow.settimeout(http_server.PATIENCE)
        told = b"".join(iter(lambda: slow.recv(200), b""))  # and the connection is closed
        assert told.startswith(b"HTTP/1.1 408") and b"connection: close" in told


def test_stopping_answers_what_was_taken(places, gate, one_thread, embedder):
    with ThreadPoolExecutor(6) as pool:
        with running([str(places["embed"])]) as client:
            gate.install()
            asked = [pool.submit(client.ask, "/embed", {"inputs": text}) for text in TEXTS[:6]]
            assert gate.asked.acquire(timeout=http_server.PATIENCE)
            wait_for(client, lambda waiting: waiting > 0)
            opener = threading.Timer(0.5, gate.opened.set)
            opener.start()
        near([future.result().json[0] for future in asked], embedder(TEXTS[:6]))


def test_a_fault_is_one_requests_alone(places, monkeypatch):
    with running([str(places["embed"])]) as client:
        inner = Predictor.outputs
        poison = client.ask("/tokenize", {"inputs": "hammer", "add_special_tokens": False}).json[0][0]["id"]

        def outputs(predictor, windows):
            if any(poison in window.ids for window in windows):
                raise MemoryError("too much")
            return inner(predictor, windows)

        monkeypatch.setattr(Predictor, "outputs", outputs)
        reply = client.ask("/embed", {"inputs": "hammer"})
        assert (reply.status, reply.json["error"]) == (500, "the server failed; its log says why")
        assert client.ask("/embed", {"inputs": "the cat"}).status == 200


def test_a_token_is_asked_for(places, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILBERT_FAST_API_KEY", "s3cret")
    with running([str(places["embed"])]) as client:
        assert client.ask("/health").status == 200
        for headers in ({}, {"authorization": "Bearer s3cre"}, {"authorization": "Basic s3cret"}):
            reply = client.ask("/embed", {"inputs": "a"}, **headers)
            assert reply.status == 401 and reply.headers["www-authenticate"] == "Bearer"
            assert client.ask("/metrics", **headers).status == 401
        assert client.ask("/embed", {"inputs": "a"}, authorization="Bearer s3cret").status == 200
        body = {"model": "embed", "input": "a"}
        assert client.ask("/v1/embeddings", body).json["error"]["type"] == "authentication_error"
    key = tmp_path / "key"
    key.write_text("from-a-file\nand no more\n")
    key.chmod(0o600)
    with running([str(places["embed"])], key_file=key) as client:
        assert client.ask("/info", authorization="bearer from-a-file").status == 200
        assert client.ask("/info", authorization="bearer s3cret").status == 401


def test_answers_that_are_not_finite_are_refused(places, tmp_path):
    model = transformers.BertForSequenceClassification.from_pretrained(places["labels"])
    with torch.no_grad():
        model.classifier.bias[2] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    transformers.AutoTokenizer.from_pretrained(places["labels"]).save_pretrained(tmp_path / "nan")
    with running([str(tmp_path / "nan")]) as client:
        reply = client.ask("/predict", {"inputs": "the cat"})
        assert (reply.status, reply.json["error"]) == (500, "row 0: the model's answer holds NaN or infinity")


def test_the_access_log_has_no_texts(places, capfd):
    with running([str(places["embed"])]) as client:
        client.ask("/embed?text=salmon", {"inputs": "the salmon"})
        client.ask("/salmon", {"inputs": "the salmon"})
        client.ask("/embed", {"inputs": {"salmon": 1}})
    said = capfd.readouterr().err
    assert "127.0.0.1 POST /embed 200" in said and "POST other 404" in said and "salmon" not in said
    assert "4 tokens" in said and "stopped; 3 requests were answered" in said
