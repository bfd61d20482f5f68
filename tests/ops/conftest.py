"""What serves an op in a test: torch, or the CPU kernels of one instruction set."""

from __future__ import annotations

import places
import pytest


@pytest.fixture(params=places.PLACES)
def place(request):
    """Torch by force, or a tier of the CPU kernels, which serve the dtypes that they take."""
    with places.forced("torch") if request.param == "torch" else places.on_tier(request.param):
        yield request.param


@pytest.fixture(params=places.PLACES)
def forced(request):
    """Torch or a tier of the CPU kernels, and nothing else: for dtypes that both take, or those of ``served``."""
    with places.forced(request.param):
        yield request.param


@pytest.fixture
def native_tier(place):
    """The ``place`` where that is a tier of the CPU kernels: for what only their native entries can do."""
    if place == "torch":
        pytest.skip("native only")
    return place
