"""A directory in which a long job runs as stages, each of which completes once and for all.

A stage is complete when its directory (or JSON file) stands under its final name: it is built beside it under a
hidden name, flushed to disk and renamed, so a job killed at any moment leaves a stage whole or not there at all.
The same job run again skips what is complete. Nothing that the job did not make is ever removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distilbert_fast.files import durable, schema
from distilbert_fast.files.durable import FileError, write_file
from distilbert_fast.files.schema import Check

STAGE_FILE = "stage.json"
_OBJECT = schema.mapping(schema.anything)


def _entry(value: Any, where: str) -> None:
    """Size and SHA-256 of a file; its size alone in stages of an earlier version."""
    (schema.integer(0) if isinstance(value, int) else schema.FILE)(value, where)


_STAGE = schema.record({"files": schema.mapping(_entry), "result": _OBJECT})
_PLACE = "stage"  # key of the stage and the run that a sealed file belongs to; files of an earlier version lack it


class StageError(FileError):
    """A directory that the job must not, or cannot, write to; the message says what to do."""


class RunDirectory:
    """The output directory of one job.

    Args:
        path: the directory; made when it is missing.
        job: name of the job, which the directory remembers.
        settings: what the result depends on; JSON values. A directory with other settings is refused.
        names: the entries that the job will write there.
        overwrite: where the directory holds something else under those names, move that to `previous-<n>/` in it
            instead of refusing. An unfinished run of the same settings is continued, not moved.
        shared: entries that serve a run of any settings, such as a cache: kept, and ignored by the conflict check.

    Use as a context manager: it holds a lock, so that a second run of the job is refused meanwhile.

    Raises:
        StageError: the path is no directory, is in use, or holds something else.
    """

    def __init__(
        self,
        path: str | Path,
        job: str,
        settings: Mapping[str, Any],
        names: Sequence[str],
        overwrite: bool = False,
        shared: Sequence[str] = (),
    ):
        self.path = Path(path)
        self.job = job
        self.settings = json.loads(json.dumps(settings))
        self.names = tuple(names)
        self.overwrite = overwrite
        self.shared = tuple(shared)
        self._marker = f".{job}.json"
        said = json.dumps([job, _as_compared(self.settings)], sort_keys=True)
        self._run = hashlib.sha256(said.encode()).hexdigest()

    def __enter__(self) -> RunDirectory:
        from filelock import Timeout

        if self.path.exists() and not self.path.is_dir():
            raise StageError(f"{self.job}: output: {str(self.path)!r} is a file, expected a directory")
        self._new = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = durable.lock(self.path / self.job)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise StageError(f"{self.job}: output: {str(self.path)!r} is in use by another run") from None
        try:
            self._claim()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._started():
            (self.path / self._marker).unlink(missing_ok=True)
        self._leave()

    def _leave(self) -> None:
        """Unlock; a directory that has not become this job's is left as it was found."""
        self._lock.release()
        if not (self.path / self._marker).is_file():
            Path(self._lock.lock_file).unlink(missing_ok=True)
            if self._new and not any(self.path.iterdir()):
                self.path.rmdir()

    def _started(self) -> bool:
        """Whether anything of the job's is there."""
        return any((self.path / name).exists() for name in self.names)

    def _claim(self) -> None:
        """Make the directory this job's, or refuse it."""
        marker = self.path / self._marker
        there = self._read(marker, _OBJECT) if marker.is_file() else None
        if there == self.settings:
            return
        begun = [durable.hidden(self.path / name).name for name in (self._marker, *self.names)]  # by a killed run
        ours = {self._marker, Path(self._lock.lock_file).name, *begun, *self.shared}
        others = sorted(entry.name for entry in self.path.iterdir() if entry.name not in ours)
        if there is not None:
            keys = [key for key in {**there, **self.settings} if there.get(key) != self.settings.get(key)]
            changes = ", ".join(f"{key}: {there.get(key)} there, {self.settings.get(key)} given" for key in keys)
            what = f"holds a {self.job} with other settings ({changes})"
        else:
            what = f"already holds {durable.few(list(map(repr, others)))}, which no {self.job} made"
        refused = others if there is None else self._started()  # what came to nothing is no conflict
        if refused and not self.overwrite:
            raise StageError(
                f"{self.job}: output: {str(self.path)!r} {what}; choose another directory, or give --overwrite to "
                "move what is in the way to previous-<n>/ in it"
            )
        if in_the_way := [name for name in self.names if (self.path / name).exists()]:
            previous = durable.numbered(self.path / "previous")
            previous.mkdir()
            for name in in_the_way:
                (self.path / name).rename(previous / name)
            if there is not None:
                marker.rename(previous / self._marker)
        write_json(marker, self.settings)

    def directory(
        self, name: str, build: Callable[[Path], Mapping[str, Any]], check: Check = _OBJECT
    ) -> dict[str, Any]:
        """The stage whose result is the directory `name`: `build(path)` fills it and returns what to remember.

        Returns what `build` returned, now or in an earlier run; what comes from there is checked by `check`.

        Raises StageError when the complete directory no longer holds what the stage put there, byte for byte, or is
        another stage's.
        """
        final = self.path / name
        record = final / STAGE_FILE
        if record.is_file():
            stage = self._read(record, _STAGE, name)
            with self._refusing():
                schema.validate(stage["result"], record, check, "result")
            for file, entry in stage["files"].items():
                self._check(final, file, entry)
            return stage["result"]
        if final.exists():
            raise StageError(f"{self.job}: {str(final)!r} is in the way: this job did not make it; move it away")
        with durable.building(final) as partial:
            result = build(partial)
            write_json(partial / STAGE_FILE, self._sealed({"files": durable.flush(partial), "result": result}, name))
        return json.loads(json.dumps(result))

    def _check(self, final: Path, name: str, entry: Any) -> None:
        """Refuse a file of a complete stage that is no longer what the stage put there."""
        file = final / name
        size, digest = (entry, None) if isinstance(entry, int) else (entry["size"], entry["sha256"])
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            fault = f"expected the {size} bytes that this job wrote, got {'no file' if found is None else found}"
        elif digest is not None and durable.sha256(file) != digest:
            fault = "its contents are not what this job wrote: they do not fit their checksum"
        else:
            return
        raise StageError(f"{self.job}: {str(file)!r}: {fault}; move {str(final)!r} away to have it made again")

    def _sealed(self, value: Mapping[str, Any], name: str) -> dict[str, Any]:
        return schema.sealed({**value, _PLACE: {"name": name, "run": self._run}})

    def _read(self, path: Path, check: Check, name: str | None = None) -> Any:
        """A JSON file of the job's, checked; without its checksum and, of the stage `name`, its place."""
        with self._refusing():
            value = schema.open_sealed(schema.read_json(path), path)
            if name is not None and isinstance(value, dict) and _PLACE in value:
                found = value.pop(_PLACE)
                given = found.get("name") if isinstance(found, dict) else found
                if found != {"name": name, "run": self._run}:
                    what = f"that of {given!r}" if given != name else "that of another run"
                    durable.refuse_file(path, f"expected the stage {name!r} of this run, got {what}")
            schema.validate(value, path, check)
        return value

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """Raise StageError for a file that is damaged."""
        try:
            yield
        except FileError as error:
            message = f"{self.job}: {error}; move it away to have it made again"
            raise StageError(message, error.reason) from error

    def result(self, name: str, compute: Callable[[], Mapping[str, Any]], check: Check = _OBJECT) -> dict[str, Any]:
        """The stage whose result is the JSON file `name`: what `compute` returns, now or in an earlier run.

        What was written is checked by `check`. Raises StageError when the file is damaged, or another stage's.
        """
        file = self.path / name
        if not file.is_file():
            write_json(file, self._sealed(compute(), name))
        return self._read(file, check, name)

    def discard(self, name: str) -> None:
        """Remove a directory that only the stages in the making needed, such as checkpoints."""
        if (self.path / name).is_dir():
            shutil.rmtree(self.path / name)

    def is_complete(self, name: str) -> bool:
        """Whether the stage `name` is complete."""
        return (self.path / name / STAGE_FILE).is_file() or (self.path / name).is_file()


def _as_compared(value: Any) -> Any:
    """The same for values that are equal, such as 1, 1.0 and True."""
    if isinstance(value, dict):
        return {key: _as_compared(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_as_compared(one) for one in value]
    return int(value) if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()) else value


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file at once: readers see the old file or the new one, also after a crash or on a full disk."""
    write_file(path, json.dumps(value, indent=2).encode() + b"\n")
