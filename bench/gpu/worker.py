"""A part, in a process of its own: forked from one that has imported what all parts import (runner.py)."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection, wait
from pathlib import Path

from bench.gpu.records import Records, Where


def main(work: str, path: str, log: str, seconds: float, rivals: str) -> None:
    """``module:function`` with what it needs; what is printed goes to the log."""
    os.setsid()  # so that what it starts ends with it
    end_with_parent()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout.reconfigure(line_buffering=True)
    module, name = work.split(":")
    getattr(importlib.import_module(module), name)(Where.here(seconds, rivals), Records(Path(path)))


def end_with_parent() -> None:
    """Who asked for this process may be killed, and the server that forked it lives as long as any of its children."""
    asked = multiprocessing.parent_process()

    def watch() -> None:
        wait([asked.sentinel])
        leads = os.getpgid(0) == os.getpid()
        (os.killpg if leads else os.kill)(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def describe(to: Connection) -> None:
    """The GPU's name, empty without one: asked for here, since a process that knows it cannot be forked any more."""
    import torch

    to.send(torch.cuda.get_device_name() if torch.cuda.is_available() else "")
