"""The CUDA module without a GPU: csrc/cuda compiled for the CPU by cuda_on_cpu/, behind the real bindings."""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from distilbert_fast import backends

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = ROOT / "tests/kernels/cuda_on_cpu"
BUILD = ROOT / "build" / f"cuda_on_cpu-{sys.implementation.cache_tag}"
LAUNCH = re.compile(r"(\w+(?:<[^;]*?>)?)\s*<<<(.*?)>>>\(", re.DOTALL)  # kernel<types><<<shape>>>(
FLAGS = ["-std=c++17", "-O1", "-mf16c", "-fPIC", "-fvisibility=hidden"]
FLAGS += ["-DDISTILBERT_FAST_SM90A", "-D__CUDA_ARCH_FEAT_SM90_ALL"]


def sources() -> list[Path]:
    """What is compiled: the bindings, and copies of csrc/cuda in which launches are calls of the emulator.

    Headers are copied too, but for those that the emulator has in their place.
    """
    found = [ROOT / "csrc/bindings_cuda.cpp"]
    for source in sorted((ROOT / "csrc/cuda").iterdir()):
        if (EMULATOR / source.name).exists():
            (BUILD / source.name).unlink(missing_ok=True)
            continue
        copy = BUILD / (f"{source.stem}.cpp" if source.suffix == ".cu" else source.name)
        text = LAUNCH.sub(r"emulated::launch(\1, \2, ", source.read_text())
        if not copy.exists() or copy.read_text() != text:
            copy.write_text(text)
        if copy.suffix == ".cpp":
            found.append(copy)
    return found


def build() -> Path:
    """The module, of which only what changed since the last time is compiled."""
    import ninja
    import pybind11
    from ninja import ninja_syntax

    includes = [BUILD, EMULATOR, ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    target = BUILD / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    with open(BUILD / "build.ninja", "w") as file:
        writer = ninja_syntax.Writer(file, width=10_000)
        writer.variable("builddir", str(BUILD))
        writer.variable("flags", ninja_syntax.escape(shlex.join([*FLAGS, *(f"-I{path}" for path in includes)])))
        writer.rule("compile", "g++ $flags -MD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
        writer.rule("link", "g++ -shared $in -o $out")
        objects = [writer.build(str(BUILD / f"{path.stem}.o"), "compile", str(path))[0] for path in sources()]
        writer.build(str(target), "link", objects)
    built = subprocess.run([Path(ninja.BIN_DIR, "ninja"), "-C", BUILD], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return target


def pytest_collection_modifyitems(items):
    """Tests in an emulator, or of machine code for a GPU, are slow: ``make test`` runs each with every value only."""
    if not torch.cuda.is_available():
        for item in items:
            if item.path.stem.endswith(("_triton", "_cuda", "_cubin")) and item.path.parent == Path(__file__).parent:
                item.add_marker(pytest.mark.covering)


@pytest.fixture(scope="session")
def cuda_module():
    """_cuda as it is on a machine without a GPU: its kernels run on the CPU, on CPU memory."""
    if platform.machine() != "x86_64" or not shutil.which("g++"):
        pytest.skip("cuda_on_cpu needs g++ on x86-64")
    from filelock import FileLock

    BUILD.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILD / "lock"):
        target = build()
        spec = importlib.util.spec_from_file_location("_cuda", target)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def cuda_on_cpu(cuda_module, monkeypatch):
    """The ops' CUDA paths, with CPU tensors in the place of a GPU's. Returns the emulator's own functions."""
    monkeypatch.setattr(backends, "cuda", lambda: cuda_module)
    monkeypatch.setattr(backends, "device_and_stream", lambda device: (0, 0))
    emulator = ctypes.CDLL(cuda_module.__file__)
    emulator.emulated_launch_stream.restype = ctypes.c_void_p
    emulator.emulated_bank_conflicts.restype = ctypes.c_int64
    emulator.emulated_bank_conflicts()
    yield emulator
    emulator.emulated_set_capability(80)
    emulator.emulated_set_max_blocks(0xFFFFFFFF)


@pytest.fixture
def fenced():
    """A function that copies a matrix or a vector to where the next byte is on a page that must not be touched.

    Who touches it ends the process: a crash is how this fails.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def copy(x: torch.Tensor) -> torch.Tensor:
        size = x.numel() * x.element_size()
        room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = mmap.mmap(-1, room + mmap.PAGESIZE)
        fence = ctypes.addressof(ctypes.c_char.from_buffer(pages)) + room
        assert libc.mprotect(ctypes.c_void_p(fence), mmap.PAGESIZE, 0) == 0, ctypes.get_errno()
        return torch.frombuffer(pages, dtype=x.dtype, count=x.numel(), offset=room - size).view(x.shape).copy_(x)

    return copy
