"""What a part of the suite is given: where to work, and where to write what it finds, line by line, so that nothing
found is lost with its process.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from bench.harness.errors import reason

Size = TypeVar("Size")


RIVALS = ("all", "ready", "none")


class Where(NamedTuple):
    """A GPU and real sizes; or no GPU, and everything but launching, on tiny tensors on the CPU."""

    device: torch.device
    seconds: float = 60.0  # until the part is ended
    rivals: str = "all"  # of RIVALS: which take part; "ready": all but those that torch.compile makes
    compiling: bool = False  # ours are called once, so that their kernels are compiled and cached; nothing is measured

    @classmethod
    def here(cls, seconds: float = 60.0, rivals: str = "all", compiling: bool = False) -> Where:
        return cls(torch.device("cuda" if torch.cuda.is_available() else "cpu"), seconds, rivals, compiling)

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def size(self, real: Size, tiny: Size) -> Size:
        return real if self.gpu else tiny


class Records:
    """A file of JSON lines.

    Every line has a "kind": "case" (see measure.py; written again with each contender, the last one counts), "failure"
    (what, reason), "note" (text), and those of single parts: "peaks", "tuned", "tests".
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, kind: str, **fields: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, **fields}) + "\n")

    def note(self, text: str) -> None:
        self.add("note", text=text)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """A failure inside is recorded, and the rest goes on; but not after a CUDA error, which no process survives."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.add("failure", what=what, reason=reason(error))
            if isinstance(error, torch.AcceleratorError):
                raise SystemExit(f"{what}: {reason(error)}") from error

    def read(self) -> list[dict[str, Any]]:
        """Every whole line."""
        lines = self.path.read_text().split("\n") if self.path.exists() else []
        return [json.loads(line) for line in lines[:-1]]
