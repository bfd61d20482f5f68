"""What `distilbert-fast serve` reaches on loopback: python -m bench.serve speed|overload|malformed

speed      requests a second, and milliseconds that half and 99 % of them take, of 1, 8 and 64 clients: the server with
           the engine, and the same server with transformers' own forward (plain)
overload   what is answered in time at 0.5 to 4 times the rate that the server reaches
malformed  1,000 requests that are no such

A request is a passage of the documentation that Python carries, of 5 to 60 words. The classifier is a BERT of that
many layers and that width with random weights. Clients share the cores with the server.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.harness.http_load import closed_loop, open_loop, percentile, request
from bench.harness.machine import machine
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
READY = re.compile(r"ready at http://127\.0\.0\.1:(\d+)")


def sentences() -> list[str]:
    found = {" ".join(passage.text.split()[:60]) for passage in passages()}
    return sorted(text for text in found if len(text.split()) >= 5)


@contextlib.contextmanager
def server(models: list[str], *options: str, plain: str | None = None, threads: int = 2) -> Iterator[tuple[int, int]]:
    """The port and the process of a server; ``plain``: "fp32" or "bf16", by transformers' own forward."""
    program = ["-m", "distilbert_fast"] if plain is None else ["-c", PLAIN, plain]
    given = [part for name in models for part in ("--model", name)]
    command = [sys.executable, *program, "serve", *given, "--port", "0", "--no-access-log", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
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


def classify(texts: list[str]) -> list[bytes]:
    return [request("/predict", {"inputs": text, "truncate": True}) for text in texts]


def speed(place: Path, given: argparse.Namespace) -> Table:
    asked = classify(sentences())
    table = Table("server", "clients", "requests/s", "p50, ms", "p99, ms")
    for name in given.servers.split(","):
        who, _, precision = name.partition("-")
        options = ["--precision", precision] if who == "engine" else []
        with server([f"cls={place}"], *options, plain=precision if who == "plain" else None) as (port, _):
            closed_loop(port, lambda number: asked[number % len(asked)], 8, seconds=1)
            for clients in map(int, given.clients.split(",")):
                found, took = closed_loop(port, lambda number: asked[number % len(asked)], clients, given.seconds)
                if wrong := [one for one in found if one.status != 200]:
                    raise RuntimeError(f"{len(wrong)} of {len(found)} failed: {wrong[0]}")
                rate = len(found) / took
                row = (name, clients, f"{rate:,.0f}", f"{percentile(found, 0.5):.1f}", f"{percentile(found, 0.99):.1f}")
                table.add_row(*map(str, row))
                print(*row, flush=True)
    return table


def overload(place: Path, given: argparse.Namespace) -> Table:
    asked = classify(sentences())
    table = Table("offered/s", "in time/s", "429", "504", "p99 of the answered, ms")
    with server([f"cls={place}"], "--precision", "int8", "--deadline", str(given.deadline)) as (port, _):
        closed_loop(port, lambda number: asked[number % len(asked)], 8, seconds=1)
        found, took = closed_loop(port, lambda number: asked[number % len(asked)], 64, 3)
        peak = sum(one.status == 200 for one in found) / took
        print(f"64 clients that wait: {peak:.0f} requests/s", flush=True)
        for times in (0.5, 1.0, 1.5, 2.0, 4.0):
            found, sent = open_loop(port, lambda number: asked[number % len(asked)], times * peak, given.seconds)
            served = [one for one in found if one.status == 200]
            count = Counter(one.status for one in found)
            good = sum(one.seconds <= given.deadline for one in served)
            assert set(count) <= {200, 429, 504}, count
            row = (len(found) / sent, good / sent, count[429], count[504], percentile(served, 0.99))
            table.add_row(*(f"{value:,.0f}" for value in row))
            print(*(f"{value:.0f}" for value in row), flush=True)
    return table


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
    what = {"speed": speed, "overload": overload, "malformed": malformed}
    parser.add_argument("what", choices=what)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument(
        "--servers", default="engine-int8,engine-bf16,engine-fp32,plain-fp32,plain-bf16", help="of speed"
    )
    parser.add_argument("--clients", default="1,8,64", help="of speed")
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement")
    parser.add_argument("--deadline", type=float, default=0.5, help="of overload, in seconds")
    parser.add_argument("--count", type=int, default=1000, help="of the requests of malformed")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as name:
        found = what[given.what](model(Path(name), given.layers, given.hidden), given)
    console = Console()
    console.print(machine(), highlight=False)
    console.print(found)


if __name__ == "__main__":
    main()
