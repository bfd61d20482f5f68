"""transformers' own tests of DistilBERT with our code, where TRANSFORMERS_TESTS names a checkout of transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers_suite

TESTS = Path(__file__).resolve().parents[1]
CHECKOUT = os.environ.get("TRANSFORMERS_TESTS", "")


@pytest.mark.skipif(not CHECKOUT, reason="TRANSFORMERS_TESTS names no checkout of transformers")
@pytest.mark.parametrize("suite", transformers_suite.SUITES)
def test_transformers_own_tests_pass(suite):
    pytest.importorskip("parameterized")
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "transformers_suite", "tests/models/distilbert"],
        cwd=CHECKOUT,
        env={**os.environ, "SUITE": suite, "PYTHONPATH": path},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
