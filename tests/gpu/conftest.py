"""What needs a CUDA device: skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import distilbert_fast
from distilbert_fast import backends

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items):
    absent = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(absent)


@pytest.fixture
def serve():
    """Force a backend for the test, or skip it where that cannot serve."""
    forced = []

    def force(op, name, *dtypes):
        context = distilbert_fast.backend(name)
        context.__enter__()
        forced.append(context)
        try:
            backends.select(op, torch.device("cuda"), *dtypes)
        except distilbert_fast.BackendError as error:
            pytest.skip(str(error))

    yield force
    for context in reversed(forced):
        context.__exit__(None, None, None)
