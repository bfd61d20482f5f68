"""What can compute an op on this machine's CPU: torch, or the CPU kernels of one instruction set."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from cases import many

import distilbert_fast
from distilbert_fast import backends

TIERS: list[str] = backends.cpu().available_isas() if backends.availability("cpu").ok else []
PLACES = ["torch", *TIERS]
# What torch.compile, fake tensors and opcheck see of an op is the same on every tier.
on_any_tier = pytest.mark.parametrize("place", many(["torch", *TIERS[:1]], PLACES), indirect=True)


@contextlib.contextmanager
def on_tier(tier: str) -> Iterator[None]:
    before = backends.cpu().isa()
    backends.cpu().set_isa(tier)
    try:
        yield
    finally:
        backends.cpu().set_isa(before)


@contextlib.contextmanager
def forced(place: str) -> Iterator[None]:
    """Served by a backend of that name or by a tier of the CPU kernels, and by nothing else."""
    with contextlib.ExitStack() as stack:
        if place in TIERS:
            stack.enter_context(on_tier(place))
        stack.enter_context(distilbert_fast.backend("cpu" if place in TIERS else place))
        yield


def serves(op: str, place: str, dtypes: Any) -> bool:
    """Whether it has a kernel of this op for a dtype, or for several at once."""
    kernels = backends.KERNELS[op].get("cpu" if place in TIERS else place, ())
    return place == "torch" or set(names(dtypes)) <= set(kernels)


def served(op: str, dtypes: Sequence[Any]) -> list[Any]:
    """Parameters (place, dtype) or (place, dtypes) of all that there is a kernel for."""
    return [
        pytest.param(place, given, id="-".join([place, *names(given)]))
        for place, given in itertools.product(PLACES, dtypes)
        if serves(op, place, given)
    ]


def names(dtypes: Any) -> list[str]:
    return [str(dtype).removeprefix("torch.") for dtype in ([dtypes] if isinstance(dtypes, torch.dtype) else dtypes)]
