"""What a user installs: one sdist, and the wheel built from it, shared by every test process of a run."""

from __future__ import annotations

import fcntl
import importlib.util
import shutil
import sys
import sysconfig
import tarfile
from pathlib import Path
from typing import NamedTuple

import pytest
from cases import WHOLE
from install.commands import ROOT, copy_checkout, succeed


class Built(NamedTuple):
    sdist: Path
    tree: Path  # the unpacked sdist, with the objects of the build
    wheel: Path
    site: Path  # where the wheel is installed, without its dependencies


@pytest.fixture(scope="session")
def build_tools():
    missing = [name for name in ("build", "ninja", "pybind11", "setuptools") if not importlib.util.find_spec(name)]
    if missing or not shutil.which("g++"):
        pytest.skip(f"not here: {', '.join(missing) or 'g++'}")


def share_objects(tree: Path) -> None:
    """Let a build compile only what is not as the checkout's own build found it."""
    name = f"native-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
    if (ROOT / "build" / name).is_dir():
        shutil.copytree(ROOT / "build" / name, tree / "build" / name)
    for path in (tree / "build" / name).rglob("*.o"):
        if not (tree / path.relative_to(tree / "build" / name).with_suffix("")).exists():
            path.unlink()  # of a source that is no more


@pytest.fixture(scope="session")
def built(build_tools, tmp_path_factory, worker_id) -> Built:
    base = tmp_path_factory.getbasetemp()
    base = base if worker_id == "master" else base.parent  # the parent is common to the workers of one run
    with open(base / "install.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first process builds, the others wait for it
        folder = base / "install"
        if not (folder / "site").exists():
            checkout = copy_checkout(folder / "checkout")
            tuned = checkout / "kernels" / "tuned"
            tuned.mkdir(exist_ok=True)
            (tuned / "sm_0.json").write_text("{}\n")  # a table of kernel configurations travels, whichever there are
            python = (sys.executable, "-m")
            succeed(*python, "build", "--no-isolation", "--sdist", "-o", folder, cwd=checkout)
            with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
                archive.extractall(folder / "sdist", filter="data")
            tree = next((folder / "sdist").iterdir())
            if not WHOLE:
                share_objects(tree)
            succeed(*python, "build", "--no-isolation", "--wheel", "-o", folder, cwd=tree, DISTILBERT_FAST_CUDA="0")
            pip = (*python, "pip", "install", "--no-deps", "--no-index", "--target", folder / "site.new")
            succeed(*pip, next(folder.glob("*.whl")), cwd=folder)
            (folder / "site.new").rename(folder / "site")
    tree = next((folder / "sdist").iterdir())
    return Built(next(folder.glob("*.tar.gz")), tree, next(folder.glob("*.whl")), folder / "site")
