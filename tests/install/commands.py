"""Commands run as a user would: another process, without the variables that steer a build or an import."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command with these variables set; `output` holds what it wrote to stdout and stderr."""
    steering = ("DISTILBERT_FAST", "CUDA_HOME", "CXX", "LDFLAGS", "MAX_JOBS", "NVCC", "PYTHONPATH")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(steering)}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=inherited | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def succeed(*command: object, cwd: Path, **environment: str) -> str:
    """Output of a command that must not fail."""
    done = run(*command, cwd=cwd, **environment)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


def copy_checkout(target: Path) -> Path:
    """The sources as git would hand them out, links included."""
    target.mkdir(parents=True)
    leave = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.py")
    for name in ("distilbert_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=leave)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    return target
