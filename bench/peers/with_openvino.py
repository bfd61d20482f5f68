"""OpenVINO: static shapes, one request at a time with all threads, or two requests in flight; int8 by NNCF."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from bench.peers.engines import Job, apart
from bench.peers.workloads import Batch, calibration


class OpenVino:
    def __init__(self, model: Path, cache: Path, threads: int, int8: bool, hint: str, in_flight: int) -> None:
        kind = "int8" if int8 else "fp32"
        self.files = {masked: cache / f"{'masked' if masked else 'plain'}-{kind}.xml" for masked in (False, True)}
        for masked, file in self.files.items():
            if not file.exists():
                apart(convert, model, file, masked, int8)
        self.core = openvino.Core()
        self.in_flight = in_flight
        self.properties = {
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY" if in_flight == 1 else "THROUGHPUT",
            "NUM_STREAMS": in_flight,
        }

    def prepare(self, batches: list[Batch]) -> Job:
        compiled: dict[Any, openvino.CompiledModel] = {}
        given = []
        for batch in batches:
            mask = batch.attention_mask
            feed = [batch.input_ids] if mask is None else [batch.input_ids, mask]
            shape = (len(feed), *batch.input_ids.shape)
            if shape not in compiled:
                read = self.core.read_model(self.files[mask is not None])
                read.reshape({port: batch.input_ids.shape for port in read.inputs})
                compiled[shape] = self.core.compile_model(read, "CPU", self.properties)
            given.append((compiled[shape], feed))
        if self.in_flight > 1:
            return InFlight(given, self.in_flight)
        requests = [(model.create_infer_request(), feed) for model, feed in given]
        return Job(lambda: [request.infer(feed)[0] for request, feed in requests])


def convert(model: Path, path: Path, masked: bool, int8: bool) -> None:
    """The model of dynamic shape, quantized where int8 is wanted."""
    import torch

    from bench.peers.with_torch import LastHidden, load

    module = LastHidden(load(model, torch.float32)).eval()
    config = module.model.config
    example = torch.full((2, 16), 7)
    mask = torch.ones_like(example)
    mask[0, 10:] = 0
    with torch.no_grad():
        converted = openvino.convert_model(module, example_input=(example, mask)[: 1 + masked])
    converted.reshape({port: openvino.PartialShape([-1, -1]) for port in converted.inputs})
    if int8:
        import nncf

        drawn = calibration(config.vocab_size, config.max_position_embeddings)
        batches = [[ids, np.ones_like(ids)][: 1 + masked] for ids in drawn]
        converted = nncf.quantize(
            converted, nncf.Dataset(batches), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches)
        )
    made = path.with_name(f"making-{path.name}")
    openvino.save_model(converted, made, compress_to_fp16=False)
    made.with_suffix(".bin").rename(path.with_suffix(".bin"))
    made.rename(path)


class InFlight(Job):
    """Requests under way side by side; seconds are those of all of them over their number."""

    def __init__(self, given: list[tuple[openvino.CompiledModel, list[np.ndarray]]], in_flight: int) -> None:
        self.given = given
        self.lanes = [
            [(model.create_infer_request(), feed) for model, feed in given] for _ in range(in_flight)
        ]  # one request of every batch for each of those in flight
        super().__init__(lambda: [request.infer(feed)[0] for request, feed in self.lanes[0]])

    def seconds(self, calls: int) -> float:
        calls += calls % len(self.lanes)
        pending: list[openvino.InferRequest] = []
        start = time.perf_counter()
        for call in range(calls):
            for request, feed in self.lanes[call % len(self.lanes)]:
                if len(pending) == len(self.lanes):
                    pending.pop(0).wait()
                request.start_async(feed)
                pending.append(request)
        for request in pending:
            request.wait()
        return (time.perf_counter() - start) / calls
