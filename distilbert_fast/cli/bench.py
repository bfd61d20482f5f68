"""`distilbert-fast bench`: the benchmarks of a checkout, see bench/ there."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import typer

import distilbert_fast

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
_NEEDED = ("pytest", "pytest_benchmark")


def bench(context: typer.Context) -> None:
    """Time ops, models and training steps beside others, or beside a revision (--base REV). In a checkout only."""
    root = Path(distilbert_fast.__file__).resolve().parents[1]
    if not (root / "bench" / "__main__.py").is_file():
        _refuse(f"expected a checkout of the repository, got an install without bench/: {root}")
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        _refuse(f"{', '.join(missing)} is not installed: pip install -e '.[bench]' in {root}")
    os.chdir(root)
    os.execv(sys.executable, [sys.executable, "-m", "bench", *context.args])


def _refuse(problem: str) -> None:
    print(f"error: bench: {problem}", file=sys.stderr)
    raise typer.Exit(2)
