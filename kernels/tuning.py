"""Which configuration a kernel is launched with: tables found by measurement, one a GPU architecture.

A launcher lists its candidates, the default first, and a key that says what they depend on (dtype, head size, a
bucket of lengths …, never a batch size that changes with every call). ``tuned/sm_<arch>.json`` may name another
candidate as the fastest for that key. Nothing is searched at a user's first call, unless DISTILBERT_FAST_AUTOTUNE=1
asks for what the table does not know, or =all for everything.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import triton.testing

Config = dict[str, int]
FOLDER = Path(__file__).resolve().parent / "tuned"

_override: Callable[[str, str, Sequence[Config]], Config] | None = None
_searched: dict[tuple[str, str, int], Config] = {}


@functools.cache
def table(arch: int) -> dict[str, dict[str, Config]]:
    """{kernel: {key: configuration}} measured on GPUs of this architecture (90 = compute capability 9.0)."""
    path = FOLDER / f"sm_{arch}.json"
    return json.loads(path.read_text()) if path.exists() else {}


@functools.cache
def architecture(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def pick(
    kernel: str, key: str, candidates: Sequence[Config], device: torch.device, run: Callable[[Config], None]
) -> Config:
    """The configuration to launch ``kernel`` with.

    Args:
        kernel: its name in the tables, such as "attention_fwd".
        key: what the choice depends on, such as "bf16,D=64,S<=128".
        candidates: keyword arguments of a launch: tile constants, num_warps, num_stages. The first is the default.
        device: where it will run; anything but CUDA (the interpreter) takes the default.
        run: launches it with a configuration, writing the same outputs every time. Only a search calls it.
    """
    if _override is not None:
        return _override(kernel, key, candidates)
    if device.type != "cuda":
        return candidates[0]
    arch = architecture(torch.cuda.current_device() if device.index is None else device.index)
    search = os.environ.get("DISTILBERT_FAST_AUTOTUNE")
    known = _searched.get((kernel, key, arch))
    if known is None and search != "all":
        known = table(arch).get(kernel, {}).get(key)
    if known is None and search in ("1", "all") and not _capturing():
        known = _searched[kernel, key, arch] = fastest(candidates, run)
    return known or candidates[0]


def searched(arch: int) -> dict[str, dict[str, Config]]:
    """What searches of this process found for an architecture, as a table."""
    found: dict[str, dict[str, Config]] = {}
    for (kernel, key, measured), config in _searched.items():
        if measured == arch:
            found.setdefault(kernel, {})[key] = config
    return found


def write_table(arch: int, found: dict[str, dict[str, Config]]) -> Path:
    """Put what was found into the table of an architecture, for processes to come; what else is in it stays."""
    path = FOLDER / f"sm_{arch}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    merged = {kernel: known.get(kernel, {}) | found.get(kernel, {}) for kernel in {*known, *found}}
    FOLDER.mkdir(exist_ok=True)
    made = path.with_name(f".{path.name}")
    made.write_text(json.dumps(merged, indent=1, sort_keys=True) + "\n")
    made.replace(path)
    return path


def fastest(candidates: Sequence[Config], run: Callable[[Config], None]) -> Config:
    """The candidate whose median time is least; those that the GPU has too little of something for are passed over.

    Launches are captured as CUDA graphs and replayed: launched one by one, the short kernels would be timed by what
    Python takes to launch them.
    """
    times = []
    torch.cuda.synchronize()  # what is timed runs in another stream, and must find its inputs
    for config in candidates:
        try:
            median = triton.testing.do_bench_cudagraph(lambda config=config: run(config), return_mode="median")
            times.append((median, config))
        except triton.runtime.errors.OutOfResources:
            continue
    if not times:
        return candidates[0]
    return min(times, key=lambda timed: timed[0])[1]


@contextlib.contextmanager
def choosing(choose: Callable[[str, str, Sequence[Config]], Config]) -> Iterator[None]:
    """Let ``choose(kernel, key, candidates)`` pick, for tests and for the suite that fills the tables."""
    global _override
    previous, _override = _override, choose
    try:
        yield
    finally:
        _override = previous


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()
