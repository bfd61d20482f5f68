"""Triton kernels on a machine without a GPU: Triton's interpreter runs them on CPU tensors, line by line.

Triton reads TRITON_INTERPRET=1 once, when it is first imported. So the modules of kernel tests run in a process of
their own. By hand: ``TRITON_INTERPRET=1 pytest tests/kernels/test_kl_div_triton.py``.
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


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """What the process said, and the outcomes ("failure", "error", "skipped", "passed") of each module's tests."""
    report = tmp_path_factory.mktemp("interpreted") / "report.xml"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *MODULES],
        env={**environment, "TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    said, outcomes = done.stdout + done.stderr, {}
    assert report.exists(), said
    for case in ElementTree.parse(report).iter("testcase"):
        found = outcomes.setdefault(case.get("classname").rpartition(".")[2] or case.get("name"), [])
        found.append(next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed"))
    return said, outcomes


@pytest.mark.slow
@pytest.mark.parametrize("module", [path.stem for path in MODULES])
def test_in_the_interpreter(interpreted, module):
    said, outcomes = interpreted
    found = outcomes.get(module, [])
    assert "passed" in found and not {"failure", "error"} & set(found), said
