"""What `distilbert-fast serve` reaches on loopback: python -m bench.serve speed|overload|mixed|malformed

speed      requests a second, and milliseconds that half and 99 % of them take, of 1, 8 and 64 clients: the server with
           the engine, the same server with transformers' own forward (plain), and Infinity, if it is asked for
overload   what is answered in time at 0.5 to 4 times the rate that 16 waiting clients get; the clients have a core of
           their own
mixed      10,000 requests of all routes and of five models at once: what is lost, and what is not what the engine alone
           answers
malformed  1,000 requests that are no such

A request is a passage of the documentation that Python carries, of 5 to 60 words. The classifier is a BERT of that
many layers and that width with random weights. Clients share the cores with the server.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import transformers
from rich.console import Console
from rich.table import Table

from bench.harness.http_load import closed_loop, open_loop, percentile, request
from bench.harness.machine import machine
from bench.harness.mixed_requests import MixedRequests, count_told_apart, differs, with_heads
from bench.predict import model
from distilbert_fast.data.stdlib_docs import passages

PLAIN = """
import sys
from distilbert_fast.serving import predictor
predictor.optimize = lambda model, precision: model
if sys.argv.pop(1) == "bf16":
    load = predictor.load_with_head
    def in_bfloat16(*given, **how):
        model, *rest = load(*given, **how)
        return model.bfloat16(), *rest
    predictor.load_with_head = in_bfloat16
from distilbert_fast.cli import main
main()
"""
# Infinity 0.0.78 asks tokenizers for a method that transformers 5 has not; its command line is otherwise as it is.
INFINITY = """
from transformers import PreTrainedTokenizerBase
PreTrainedTokenizerBase.batch_encode_plus = PreTrainedTokenizerBase.__call__
from infinity_emb.cli import cli
cli()
"""
READY = re.compile(r"ready at http://127\.0\.0\.1:(\d+)")


def sentences() -> list[str]:
    found = {" ".join(passage.text.split()[:60]) for passage in passages()}
    return sorted(text for text in found if len(text.split()) >= 5)


@contextlib.contextmanager
def server(
    models: list[str], *options: str, plain: str | None = None, threads: int = 2, cores: Sequence[int] = ()
) -> Iterator[tuple[int, int]]:
    """The port and the process of a server.

    Args:
        plain: "fp32" or "bf16", by transformers' own forward.
        threads: of torch.
        cores: where it runs, with a thread each; none: everywhere.
    """
    program = ["-m", "distilbert_fast"] if plain is None else ["-c", PLAIN, plain]
    given = [part for name in models for part in ("--model", name)]
    command = [sys.executable, *program, "serve", *given, "--port", "0", "--no-access-log", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores) or threads)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    if cores:
        os.sched_setaffinity(process.pid, cores)  # before it has threads
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if found := READY.search(line):
                yield int(found[1]), process.pid
                break
        else:
            raise RuntimeError("".join(said))
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


@contextlib.contextmanager
def infinity(place: Path) -> Iterator[int]:
    """The port of a server of infinity-emb, with its engine "torch"."""
    if importlib.util.find_spec("infinity_emb") is None:
        raise SystemExit("bench.serve: infinity_emb is not installed; docs/log.md says how it can be")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", INFINITY, "v2", "--model-id", place, "--engine", "torch", "--device", "cpu"]
    quiet = {"INFINITY_MODEL_WARMUP": "false", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    given = {"env": {**os.environ, **quiet}, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*map(str, command), "--port", str(port), "--log-level", "error"], **given)
    try:
        end = time.monotonic() + 120
        while time.monotonic() < end and process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            time.sleep(0.5)
        else:
            raise RuntimeError("infinity did not start")
        yield port
    finally:
        process.terminate()
        process.wait(60)


def classify(texts: list[str]) -> list[bytes]:
    return [request("/predict", {"inputs": text, "truncate": True}) for text in texts]


def speed(place: Path, given: argparse.Namespace) -> Table:
    table = Table("server", "clients", "requests/s", "p50, ms", "p99, ms")

    def measure(name: str, port: int, asked: list[bytes]) -> None:
        closed_loop(port, lambda number: asked[number % len(asked)], 8, seconds=1)
        for clients in map(int, given.clients.split(",")):
            found, took = closed_loop(port, lambda number: asked[number % len(asked)], clients, given.seconds)
            if wrong := [one for one in found if one.status != 200]:
                raise RuntimeError(f"{len(wrong)} of {len(found)} failed: {wrong[0]}")
            rate = len(found) / took
            row = (name, clients, f"{rate:,.0f}", f"{percentile(found, 0.5):.1f}", f"{percentile(found, 0.99):.1f}")
            table.add_row(*map(str, row))
            print(*row, flush=True)

    for name in given.servers.split(","):
        who, _, precision = name.partition("-")
        if who == "infinity":
            with infinity(place) as port:
                asked = [request("/classify", {"model": place.name, "input": [text]}) for text in sentences()]
                measure(name, port, asked)
            continue
        options = ["--precision", precision] if who == "engine" else []
        with server([f"cls={place}"], *options, plain=precision if who == "plain" else None) as (port, _):
            measure(name, port, classify(sentences()))
    return table


def overload(place: Path, given: argparse.Namespace) -> Table:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("bench.serve overload: expected two cores or more, one of them for the clients, got 1")
    asked = classify(sentences())
    table = Table("offered/s", "in time/s", "429", "504", "p50, ms", "p99 of the answered, ms")
    options = ["--precision", "int8", "--deadline", str(given.deadline)]
    with server([f"cls={place}"], *options, cores=cores[:-1]) as (port, _):
        os.sched_setaffinity(0, cores[-1:])
        closed_loop(port, lambda number: asked[number % len(asked)], 8, seconds=1)
        found, took = closed_loop(port, lambda number: asked[number % len(asked)], 16, 3)
        peak = sum(one.status == 200 for one in found) / took
        print(f"16 clients that wait: {peak:.0f} requests/s", flush=True)
        for times in map(float, given.times.split(",")):
            found, sent = open_loop(port, lambda number: asked[number % len(asked)], times * peak, given.seconds)
            served = [one for one in found if one.status == 200]
            count = Counter(one.status for one in found)
            good = sum(one.seconds <= given.deadline for one in served)
            assert set(count) <= {200, 429, 504}, count
            middle, most = percentile(served, 0.5), percentile(served, 0.99)
            row = (len(found) / sent, good / sent, count[429], count[504], middle, most)
            table.add_row(*(f"{value:,.0f}" for value in row))
            print(*(f"{value:.0f}" for value in row), flush=True)
    return table


def mixed(place: Path, given: argparse.Namespace) -> str:
    body = place.with_name("embed")
    transformers.AutoModel.from_pretrained(place).save_pretrained(body)
    transformers.AutoTokenizer.from_pretrained(place).save_pretrained(body)
    places = with_heads(body)
    requests = MixedRequests(places, random.Random(0).sample(sentences(), 200), given.precision)
    numbers = range(given.count)
    asked = [requests(number) for number in numbers]
    apart, pairs = count_told_apart(requests, numbers)
    sent = [request(one.path, one.body) for one in asked]
    models = [f"{name}={directory}" for name, directory in places.items()]
    options = ["--precision", given.precision, "--deadline", "3600", "--queue-tokens", str(10**9)]
    with server(models, *options) as (port, _):
        found, took = closed_loop(port, sent.__getitem__, clients=given.count, count=given.count)
    count = Counter(one.status for one in found)
    lost = given.count - len({one.number for one in found})
    served = [one for one in found if one.status == 200]
    wrong = sum(differs(json.loads(one.body), asked[one.number].answer) for one in served)
    return (
        f"{given.count} requests at once, answered in {took:.1f} s: {dict(count)}; lost: {lost}; "
        f"not what the engine alone answers: {wrong}; of {pairs} pairs of requests of a route {apart} differ in answers"
    )


def malformed(place: Path, given: argparse.Namespace) -> str:
    """Bodies that are cut, nested, of other types, of other encodings, or bytes at random."""
    draw = random.Random(0)
    right = json.dumps({"inputs": ["a charming journey", "bleak"], "truncate": False}).encode()
    wrong = [None, 1.5, True, {}, [], {"a": 1}, [None], ["a", 3], [["a", "b", "c"]], [["a"], "b"], "", " ", "a\0b"]

    def body() -> bytes:
        kind = draw.randrange(7)
        if kind == 0:
            return right[: draw.randrange(len(right))]
        if kind == 1:
            return json.dumps({"inputs": draw.choice(wrong)}).encode()
        if kind == 2:
            return json.dumps({"inputs": "a", draw.choice(("input", "raw", "Truncate")): draw.choice(wrong)}).encode()
        if kind == 3:
            return draw.randbytes(draw.randrange(1, 300))
        if kind == 4:
            return right.decode().encode(draw.choice(("utf-16", "utf-32")))
        if kind == 5:
            return b'{"inputs": ' + b"[" * draw.randrange(2, 5000)
        return json.dumps({"inputs": "a", "model": draw.choice(("nope", "", "../x"))}).encode()

    paths = ("/predict", "/embed", "/tag", "/v1/embeddings", "/nope")
    asked = [request(draw.choice(paths), body()) for _ in range(given.count)]
    with server([f"cls={place}"]) as (port, _):
        found, _ = closed_loop(port, lambda number: asked[number], 8, count=given.count)
        after, _ = closed_loop(port, lambda number: classify(["a charming journey"])[0], 1, count=1)
    count = Counter(one.status for one in found)
    told = all(re.search(rb'"(error|message)":\s*("[^"]|\{)', one.body) for one in found)
    return f"{len(found)} requests: {dict(sorted(count.items()))}; each with a reason: {told}; then {after[0].status}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = {"speed": speed, "overload": overload, "mixed": mixed, "malformed": malformed}
    parser.add_argument("what", choices=what)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument(
        "--servers", default="engine-int8,engine-bf16,engine-fp32,plain-fp32,plain-bf16", help="of speed; also infinity"
    )
    parser.add_argument("--clients", default="1,8,64", help="of speed")
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement")
    parser.add_argument("--deadline", type=float, default=0.5, help="of overload, in seconds")
    parser.add_argument("--times", default="0.5,0.9,1,1.5,2,3,4", help="the rate, of overload")
    parser.add_argument("--count", type=int, help="requests of mixed (10,000) and malformed (1,000)")
    parser.add_argument("--precision", default="int8", help="of mixed")
    given = parser.parse_args()
    given.count = given.count or {"mixed": 10_000}.get(given.what, 1000)
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as name:
        found = what[given.what](model(Path(name), given.layers, given.hidden), given)
    console = Console()
    console.print(machine(), highlight=False)
    console.print(found)


if __name__ == "__main__":
    main()
