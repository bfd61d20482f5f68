"""When a directory, a checkpoint's or a corpus', is complete.

A manifest lies in every one. A checkpoint, whose place transformers names, is not built under a hidden name: its
manifest is written twice, first to say that saving began and, once every other file is on the disk, to list them with
size and SHA-256. The second writing is one atomic step: a run killed or a machine stopped before it leaves a checkpoint
that is known to be half-written, after it one that can be trusted. The manifest holds a checksum of itself; those of
before it did are still read.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from distilbert_fast.files import schema
from distilbert_fast.files.durable import FileError, flush, numbered, refuse_file, sha256, sync, write_file

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint_manifest.json"
_PICKLES = {".bin", ".pt", ".pth", ".pkl"}
_FORMAT = 1
_BEGUN = schema.record({"format": schema.one_of(_FORMAT), "complete": schema.one_of(False)})
_INSIDE = schema.text(r"(?!/)(?!(.*/)?\.\.(/|$))[^\0]+", "a path in the directory")  # no ".." and not from the root
_COMPLETE = schema.record(
    {
        "format": schema.one_of(_FORMAT),
        "complete": schema.boolean,
        "settings": schema.mapping(schema.anything),
        "files": schema.mapping(schema.FILE, _INSIDE),
    }
)


def begin(checkpoint: Path) -> None:
    """Make the directory and mark it as being written."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    # not atomic, and need not be: a torn manifest says the same
    (checkpoint / MANIFEST).write_text(json.dumps({"format": _FORMAT, "complete": False}))
    sync(checkpoint / MANIFEST)


def complete(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Bring every file to the disk, then mark the checkpoint as complete.

    Raises:
        RuntimeError: a pickle file is among them.
    """
    if pickles := _pickles(checkpoint):
        raise RuntimeError(f"{checkpoint}: a checkpoint must hold no pickle file, got {pickles}")
    files = flush(checkpoint)
    files.pop(MANIFEST, None)
    sync(checkpoint.parent)
    whole = schema.sealed({"format": _FORMAT, "complete": True, "settings": settings, "files": files})
    write_file(checkpoint / MANIFEST, json.dumps(whole, indent=1).encode())


def fault(checkpoint: Path, contents: bool = True) -> str | None:
    """Why a checkpoint cannot be trusted; None if it can.

    Args:
        checkpoint: the directory.
        contents: True compares checksums and so reads every file; False compares names and sizes.
    """
    try:
        files = files_of(checkpoint)
    except FileError as error:
        return error.reason
    faults = (file_fault(checkpoint, name, entry, contents) for name, entry in files.items())
    return next((reason for reason in faults if reason is not None), None)


def file_fault(checkpoint: Path, name: str, entry: dict[str, Any], contents: bool = True) -> str | None:
    """Return why a file fails verification against its entry among ``files_of``, or None."""
    file = checkpoint / name
    try:
        if not file.is_file():
            return f"{name} is no regular file" if os.path.lexists(file) else f"{name} is missing"
        if file.stat().st_size != entry["size"]:
            return f"{name} has {file.stat().st_size} bytes, its manifest says {entry['size']}"
        if contents and sha256(file) != entry["sha256"]:
            return f"the contents of {name} do not fit their checksum"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None


def settings_of(checkpoint: Path) -> dict[str, Any]:
    """The settings that a complete checkpoint was written with. Raises FileError where it is not complete."""
    return _read(checkpoint)["settings"]


def files_of(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Size and checksum of each file of a complete checkpoint, by its path in it. Raises FileError."""
    return _read(checkpoint)["files"]


def checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """Every ``checkpoint-<step>`` directory, complete or not, by ascending step."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        step = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if step and path.is_dir():
            found.append((int(step[1]), path))
    return [path for _, path in sorted(found)]


def newest_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Path of the complete checkpoint of the highest step in a training output directory; None if there is none.

    A directory without manifest, half-written, truncated or altered is passed over, with a warning that says
    why.
    """
    for path in reversed(checkpoints(output_dir)):
        reason = fault(path)
        if reason is None:
            return str(path)
        logger.warning("passing over %s: %s", path, reason)
    return None


def make_room(checkpoint: Path) -> None:
    """Clear the place where a checkpoint is about to be written.

    What saving left there half-done is deleted. What this module did not write is kept under another name.
    """
    if not checkpoint.exists():
        return
    if _written_here(checkpoint):
        remove(checkpoint)
    else:
        aside = checkpoint.rename(numbered(checkpoint.with_name(f"{checkpoint.name}.replaced")))
        logger.warning("%s was not written here; it is now %s", checkpoint, aside)


def rotate(output_dir: Path, limit: int | None, keep: Path | None) -> None:
    """Delete the oldest complete checkpoints beyond ``limit``, and what saving left half-done before the newest.

    The newest complete one and ``keep`` always stay; directories that this module did not write are not touched.
    """
    found = checkpoints(output_dir)
    whole = [path for path in found if fault(path, contents=False) is None]
    if not whole:
        return
    stay = {whole[-1], keep} & set(whole)
    for path in reversed(whole):
        if limit is None or len(stay) < limit:
            stay.add(path)
    for path in found[: found.index(whole[-1])]:
        if path not in stay and _written_here(path):
            remove(path)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint so that, interrupted anywhere, it counts as half-written and not as damaged."""
    begin(checkpoint)
    for path in checkpoint.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != MANIFEST:
            path.unlink()
    shutil.rmtree(checkpoint)


def _written_here(checkpoint: Path) -> bool:
    """Whether this module made the directory: it holds a manifest, or nothing yet."""
    return (checkpoint / MANIFEST).is_file() or not any(checkpoint.iterdir())


def _read(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint. Raises FileError whose reason is what is wrong with it."""
    if not checkpoint.is_dir():
        refuse_file(checkpoint, "it is not a directory")
    path = checkpoint / MANIFEST
    if not path.is_file():
        pickles = _pickles(checkpoint)
        held = f"; it holds pickle files, which are never loaded: {pickles}" if pickles else ""
        refuse_file(checkpoint, f"it has no {MANIFEST}{held}")
    try:
        found = schema.read_json(path)
        if not isinstance(found, dict):
            refuse_file(path, "not an object")
        if found.get("format", _FORMAT) != _FORMAT:
            refuse_file(checkpoint, f"its manifest has format {found['format']!r}, this version reads {_FORMAT}")
        found = schema.open_sealed(found, path)
        schema.validate(found, path, _BEGUN if found.get("complete") is False else _COMPLETE)
    except FileError as error:
        if str(path) not in str(error):
            raise
        refuse_file(checkpoint, f"its {MANIFEST} is damaged: {error.reason}")
    except OSError as error:
        refuse_file(checkpoint, f"its {MANIFEST} cannot be read: {error.strerror}")
    if not found["complete"]:
        refuse_file(checkpoint, "half-written: saving began and did not end")
    return found


def _pickles(checkpoint: Path) -> str:
    return ", ".join(sorted(path.name for path in checkpoint.rglob("*") if path.suffix in _PICKLES and path.is_file()))
