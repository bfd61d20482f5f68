"""One engine in a process of its own (bench/harness/worker.py):

{"do": "load", "workload": NAME, "reference": FILE}   → {"seconds", "batches", "cosine", "max_abs"}
{"do": "run", "calls": N}                             → {"seconds", "cpu_seconds"}
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness.machine import versions
from bench.harness.worker import Message, serve
from bench.peers.engines import ENGINES, Job, Spec
from bench.peers.workloads import WORKLOADS, Batch, Workload

TRIAL_CALLS = 3
DISTRIBUTIONS = ("torch", "transformers", "torchao", "openvino", "nncf", "onnxruntime", "ctranslate2")


def build(given: Message) -> tuple[Message, Callable[[Message], Message]]:
    engine = Engine(ENGINES[given["engine"]], Path(given["model"]), Path(given["cache"]), given["threads"])
    imported = (name for name in DISTRIBUTIONS if sys.modules.get(name))
    return {"versions": versions(imported)}, engine.answer


class Engine:
    """A built engine and the job of the workload in hand."""

    def __init__(self, spec: Spec, model: Path, cache: Path, threads: int) -> None:
        self.spec = spec
        self.vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
        cache.mkdir(parents=True, exist_ok=True)
        self.engine = spec.engine(model, cache, threads)
        self.job: Job | None = None

    def answer(self, message: Message) -> Message:
        return self.load(message) if message["do"] == "load" else self.run(message["calls"])

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
    serve(build)
