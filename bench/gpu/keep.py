"""The directory of a run: all that it found until now, at any moment.

record.json     the machine, parts, cases, tests and failures; written again every second
logs.tar.gz     what the parts said, and their records line by line
tuned/          the tables of kernels/tuned
"""

from __future__ import annotations

import copy
import os
import shutil
import tarfile
from pathlib import Path

from bench.gpu import report
from bench.gpu.runner import Outcome
from bench.harness.command import ROOT

TABLES = ROOT / "kernels" / "tuned"


class Keeper:
    """Args: folder: where; made. logs: what goes into the archive. tables: of configurations, copied."""

    def __init__(self, folder: Path, made: report.Report, logs: Path, tables: Path = TABLES) -> None:
        self.folder, self.made, self.logs, self.tables = folder, made, logs, tables
        folder.mkdir(parents=True, exist_ok=True)
        self._seen: list[tuple[str, int, int]] = []

    def add(self, outcome: Outcome) -> None:
        """A part that has ended."""
        self.made.add(outcome)
        self._write(self.made)

    def watch(self, outcome: Outcome) -> None:
        """A part that runs."""
        made = copy.deepcopy(self.made)
        made.add(outcome)
        self._write(made)

    def _write(self, made: report.Report) -> None:
        report.write_json(made, self.folder / "record.json")
        files = sorted(self.logs.glob("*.*")) if self.logs.exists() else []
        seen = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        if seen != self._seen:
            hidden = self.folder / ".logs.tar.gz"
            with tarfile.open(hidden, "w:gz", compresslevel=1) as archive:
                for path in files:
                    archive.add(path, path.name)
            os.replace(hidden, self.folder / "logs.tar.gz")
            self._seen = seen
        for path in self.tables.glob("*.json"):
            target = self.folder / "tuned" / path.name
            if not target.exists() or target.read_bytes() != path.read_bytes():
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
