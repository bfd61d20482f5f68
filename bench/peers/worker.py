"""One engine in a process of its own, on cores of its own choice of threads: JSON lines in, JSON lines out.

    {"do": "load", "workload": NAME, "reference": FILE}   → {"seconds", "batches", "cosine", "max_abs"}
    {"do": "run", "calls": N}                             → {"seconds", "cpu_seconds"}

The first line out is {"ready": true, "versions": {...}}. What goes wrong is {"error": reason}; a process that cannot
build its engine ends after saying so. Whatever libraries print goes to the process's log.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from bench.peers.engines import ENGINES, Job, NotAvailableError, Spec
from bench.peers.workloads import WORKLOADS, Batch, Workload

PR_SET_PDEATHSIG = 1
TRIAL_CALLS = 3
DISTRIBUTIONS = ("torch", "transformers", "torchao", "openvino", "nncf", "onnxruntime", "ctranslate2")


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # stopped between turns, it would outlive its parent
    given = json.loads(sys.argv[1])
    os.sched_setaffinity(0, given["cores"])
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        if given["engine"] == "machine-peaks":
            from bench.peers.peaks import machine_peaks

            say(replies, {"ready": True, **machine_peaks(given["threads"])})
            return
        engine = Engine(ENGINES[given["engine"]], Path(given["model"]), Path(given["cache"]), given["threads"])
    except Exception as error:
        say(replies, {"error": reason(error)})
        raise
    say(replies, {"ready": True, "versions": versions()})
    for line in sys.stdin:
        message = json.loads(line)
        try:
            answer = engine.load(message) if message["do"] == "load" else engine.run(message["calls"])
        except Exception as error:
            answer = {"error": reason(error)}
            print(answer, file=sys.stderr)
        say(replies, answer)


def say(replies: TextIO, message: Mapping[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = (lines or ["no message"])[0][:300]
    return first if isinstance(error, NotAvailableError) else f"{type(error).__name__}: {first}"


def versions() -> dict[str, str]:
    """Of what is imported here."""
    return {name: metadata.version(name) for name in DISTRIBUTIONS if name in sys.modules}


class Engine:
    """A built engine and the job of the workload in hand."""

    def __init__(self, spec: Spec, model: Path, cache: Path, threads: int) -> None:
        self.spec = spec
        self.vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
        cache.mkdir(parents=True, exist_ok=True)
        self.engine = spec.engine(model, cache, threads)
        self.job: Job | None = None

    def load(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Prepare a workload, warm, compare with the reference (or write it, where there is none yet).

        A ragged batch is tried whole and in length buckets; what is faster stays.
        """
        self.job = None
        gc.collect()
        workload = WORKLOADS[message["workload"]]
        ways = [workload.whole(self.vocabulary)]
        if workload.ragged and self.spec.pads:
            ways.append(workload.buckets(self.vocabulary))
        tried = []
        for batches in ways:
            job = self.engine.prepare(batches)
            outputs = rows(workload, batches, job.outputs())
            job.seconds(1)
            tried.append((job.seconds(TRIAL_CALLS), len(batches), job, outputs))
        seconds, count, self.job, outputs = min(tried, key=lambda way: way[0])
        del tried
        gc.collect()
        gc.freeze()
        gc.disable()
        reference = Path(message["reference"])
        if not reference.exists():
            made = reference.with_suffix(".making.npy")
            np.save(made, outputs)
            made.rename(reference)
        return {"seconds": seconds, "batches": count, **error(outputs, np.load(reference))}

    def run(self, calls: int) -> dict[str, float]:
        if self.job is None:
            raise RuntimeError("no workload is loaded")
        before = time.process_time()
        self.job.seconds(1)  # the caches are another engine's
        seconds = self.job.seconds(calls)
        return {"seconds": seconds, "cpu_seconds": time.process_time() - before}


def rows(workload: Workload, batches: list[Batch], outputs: list[np.ndarray]) -> np.ndarray:
    """fp32 [N, C]: the real tokens' last hidden states, in the order of the workload."""
    found: dict[int, np.ndarray] = {}
    for batch, output in zip(batches, outputs, strict=True):
        if output.shape[:2] != batch.input_ids.shape:
            raise ValueError(f"output of shape {output.shape} for input of shape {batch.input_ids.shape}")
        for row, length, hidden in zip(batch.rows, batch.lengths, output, strict=True):
            found[row] = hidden[:length]
    return np.concatenate([found[row] for row in range(len(workload.lengths))])


def error(found: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Mean cosine over tokens and the largest difference; not finite where the output is not."""
    x, y = found.astype(np.float64), reference.astype(np.float64)
    cosine = (x * y).sum(1) / np.maximum(np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1), 1e-300)
    return {"cosine": float(cosine.mean()), "max_abs": float(np.abs(x - y).max())}


if __name__ == "__main__":
    main()
