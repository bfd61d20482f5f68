"""How fast and how large a model is: latency, throughput, parameters, bytes on disk.

Candidates take turns (A B C A B C ...) on the same inputs, so that a slow spell of the machine falls on all of them.
A turn's value is one number per candidate; the median over turns is reported with its range.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distilbert_fast.data.sentences import Text, tokenized

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Measured:
    """The median over turns, with the lowest and the highest turn."""

    median: float
    low: float
    high: float


def batches_of_texts(
    tokenizer: Any, texts: Sequence[Text], batch_size: int, max_length: int, device: Any
) -> list[Batch]:
    """The texts in their order, tokenized in batches and padded to the longest of each, on the device."""
    return [
        tokenized(tokenizer, texts[start : start + batch_size], max_length, padding=True, return_tensors="pt").to(
            device
        )
        for start in range(0, len(texts), batch_size)
    ]


def latency(models: Mapping[str, nn.Module], inputs: Sequence[Batch], turns: int = 7) -> dict[str, Measured]:
    """Milliseconds a call, each batch of `inputs` a call; a turn's value is the median over its calls."""
    return {
        name: _over_turns([1e3 * statistics.median(calls) for calls in by_turn])
        for name, by_turn in time_calls(models, inputs, turns).items()
    }


def throughput(models: Mapping[str, nn.Module], inputs: Sequence[Batch], turns: int = 7) -> dict[str, Measured]:
    """Sentences a second; a turn's value is all rows of `inputs` over the time that its calls took together."""
    sentences = sum(len(batch["input_ids"]) for batch in inputs)
    return {
        name: _over_turns([sentences / sum(calls) for calls in by_turn])
        for name, by_turn in time_calls(models, inputs, turns).items()
    }


@torch.inference_mode()
def time_calls(
    models: Mapping[str, Callable[..., Any]], inputs: Sequence[Batch], turns: int
) -> dict[str, list[list[float]]]:
    """Seconds of every call, as [turn][batch] for each model; one untimed turn comes first.

    Models are called as they are: put them in eval mode before. Raises ValueError without inputs or turns.
    """
    if not inputs or turns < 1:
        raise ValueError(f"time_calls: expected inputs and turns >= 1, got {len(inputs)} inputs, {turns} turns")
    seconds: dict[str, list[list[float]]] = {name: [] for name in models}
    collecting = gc.isenabled()
    gc.disable()  # a collection would fall on one candidate
    try:
        for turn in range(turns + 1):
            for name, model in models.items():
                calls = [_time(model, batch) for batch in inputs]
                if turn > 0:
                    seconds[name].append(calls)
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return seconds


@torch.inference_mode()
def call_seconds(model: Callable[..., Any], batch: Batch, calls: int = 2) -> float:
    """Seconds of a call, the mean of so many after one that is not timed."""
    _time(model, batch)
    return statistics.mean(_time(model, batch) for _ in range(calls))


def step_seconds(model: Any, batch: Batch, steps: int = 2) -> float:
    """Seconds of a training step with AdamW, the mean of so many after one that is not timed; it changes the model.

    ``batch`` holds labels. The default generators are left as they were found, and the model in eval mode.
    """
    optimizer = torch.optim.AdamW(model.parameters())

    def step(**batch: torch.Tensor) -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with torch.random.fork_rng():
        model.train()
        _time(step, batch)
        seconds = statistics.mean(_time(step, batch) for _ in range(steps))
        model.eval()
    return seconds


def parameters(model: nn.Module) -> int:
    """How many numbers the saved model holds: parameters and buffers, a tensor used twice counted once.

    Quantized weights are buffers or parameters by the module's choice, and count as one number a weight.
    """
    seen = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    return sum(seen.values())


def file_bytes(directory: str | Path) -> int:
    """Bytes of the weight files (.safetensors) of a saved model.

    Raises FileNotFoundError when the directory holds none.
    """
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"file_bytes: expected .safetensors files in {str(directory)!r}, got none")
    return sum(file.stat().st_size for file in files)


def _time(model: Callable[..., Any], batch: Batch) -> float:
    cuda = batch["input_ids"].is_cuda
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(**batch)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _over_turns(values: Sequence[float]) -> Measured:
    return Measured(statistics.median(values), min(values), max(values))
