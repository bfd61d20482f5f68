"""This package: a transformers model after distilbert_fast.optimize, called as users call it."""

from __future__ import annotations

from pathlib import Path

import torch

import distilbert_fast
from bench.peers.engines import Job
from bench.peers.with_torch import caller, load
from bench.peers.workloads import Batch, calibration


class Optimized:
    def __init__(self, model: Path, cache: Path, threads: int, precision: str, static: bool = False) -> None:
        torch.set_num_threads(threads)
        self.model = load(model, torch.float32)
        options = {}
        if static:
            config = self.model.config
            options["calibration"] = [
                {"input_ids": torch.from_numpy(ids), "attention_mask": torch.ones(ids.shape, dtype=torch.int64)}
                for ids in calibration(config.vocab_size, config.max_position_embeddings)
            ]
        distilbert_fast.optimize(self.model, precision=precision, **options)

    def prepare(self, batches: list[Batch]) -> Job:
        return Job(caller(self.model, batches))
