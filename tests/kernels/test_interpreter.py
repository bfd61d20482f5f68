"""Triton kernels on a machine without a GPU: Triton's interpreter runs them on CPU tensors, line by line.

Triton reads TRITON_INTERPRET=1 once, when it is first imported. So modules of kernel tests run in processes of their
own, few of them: each imports torch and Triton again. By hand:
``TRITON_INTERPRET=1 pytest tests/kernels/test_kl_div_triton.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from cases import many

pytest.importorskip("triton")
HERE = Path(__file__).resolve().parent
MODULES = sorted(HERE.glob("test_*_triton.py"))
TOGETHER = many([MODULES[start::3] for start in range(3)], [[module] for module in MODULES])


@pytest.mark.slow
@pytest.mark.parametrize(
    "modules", TOGETHER, ids=["-".join(path.stem.removeprefix("test_") for path in of) for of in TOGETHER]
)
def test_in_the_interpreter(tmp_path, modules):
    report = tmp_path / "report.xml"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *modules],
        env={**environment, "TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    assert report.exists(), said
    ended = ("failure", "error", "skipped")
    found: dict[str, set[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        module = case.get("classname").rpartition(".")[2]
        found.setdefault(module, set()).add(next((child.tag for child in case if child.tag in ended), "passed"))
    assert set(found) == {path.stem for path in modules}, said
    assert all("passed" in of and not {"failure", "error"} & of for of in found.values()), said
