"""The machine that a record is of: its name, the memory of this process, the versions of what is installed."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cpu_flags() -> frozenset[str]:
    """What Linux calls the features of the processor; none where it does not say so (ARM)."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))


def machine() -> str:
    """What runs contests inside one process, in a line."""
    import torch

    from distilbert_fast import backends

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, torch {torch.__version__}"
    tier = backends.isa_report()["tier"]
    return f"{cpu_name()}, {torch.get_num_threads()} threads, ISA tier {tier}, torch {torch.__version__}"


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def status_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def restart_peak() -> None:
    """VmHWM starts again from VmRSS. Raises OSError where the kernel does not let it."""
    Path("/proc/self/clear_refs").write_text("5")
