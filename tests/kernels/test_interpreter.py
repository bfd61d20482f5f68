"""Triton kernels on a machine without a GPU: Triton's interpreter runs them on CPU tensors, line by line.

Triton reads TRITON_INTERPRET=1 once, when it is first imported. So each module of kernel tests runs in a process of
its own. By hand: ``TRITON_INTERPRET=1 pytest tests/kernels/test_kl_div_triton.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).resolve().parent


@pytest.mark.slow
@pytest.mark.parametrize("module", sorted(path.name for path in HERE.glob("test_*_triton.py")))
def test_in_the_interpreter(module):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / module],
        env={**environment, "TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
