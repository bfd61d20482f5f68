"""Triton kernels on a machine without a GPU: Triton's interpreter runs them on CPU tensors, line by line.

Triton reads TRITON_INTERPRET=1 once, when it is first imported. So each module of kernel tests runs in a process of its
own. By hand: ``TRITON_INTERPRET=1 pytest tests/kernels/test_kl_div_triton.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).resolve().parent
MODULES = sorted(HERE.glob("test_*_triton.py"))


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES, ids=[path.stem for path in MODULES])
def test_in_the_interpreter(tmp_path, module):
    report = tmp_path / "report.xml"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", module],
        env={**environment, "TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    assert report.exists(), said
    ended = ("failure", "error", "skipped")
    cases = ElementTree.parse(report).iter("testcase")
    found = {next((child.tag for child in case if child.tag in ended), "passed") for case in cases}
    assert "passed" in found and not {"failure", "error"} & found, said
