"""What serves an op in a test: torch, or the CPU kernels of one instruction set."""

from __future__ import annotations

import pytest

import distilbert_fast
from distilbert_fast import backends

ISAS = backends.cpu().available_isas() if backends.availability("cpu").ok else []


@pytest.fixture(params=["torch", *ISAS])
def place(request):
    """Torch by force, or a tier of the CPU kernels, which serve the dtypes that they take."""
    if request.param == "torch":
        with distilbert_fast.backend("torch"):
            yield "torch"
        return
    before = backends.cpu().isa()
    backends.cpu().set_isa(request.param)
    yield request.param
    backends.cpu().set_isa(before)


@pytest.fixture
def tier(place):
    """A tier of the CPU kernels: for what only their native entries can do."""
    if place == "torch":
        pytest.skip("native only")
    return place
