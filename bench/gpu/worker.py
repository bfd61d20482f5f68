"""python -m bench.gpu.worker MODULE:FUNCTION RECORDS SECONDS: one part, in a process of its own."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from bench.gpu.records import Records, Where


def main(work: str, path: str, seconds: str) -> None:
    module, name = work.split(":")
    getattr(importlib.import_module(module), name)(Where.here(float(seconds)), Records(Path(path)))


if __name__ == "__main__":
    main(*sys.argv[1:])
