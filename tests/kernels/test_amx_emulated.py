"""The tiers amx and avx_vnni on a machine without their instructions, and every tier under the address and undefined
behaviour sanitizers.

A copy of the checkout is built with amx_emulated/tiles.h and avx_vnni_emulated/vpdpbusd.h in the place of the
instructions, and with both among the tiers that can run, if the rest of them can; then tests of the GEMM kernels and of
ops run inside it. Speed, and what the compiler makes of the real instructions, are not seen here.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import cases
import pytest

from distilbert_fast import backends

ROOT = Path(__file__).resolve().parents[2]
EMULATED = (Path("tests/kernels/amx_emulated"), Path("tests/kernels/avx_vnni_emulated"))
TIERS = {  # in isa.cpp -> what needs no more than that
    '{"amx", &kernels_amx, amx}': '{"amx", &kernels_amx, avx512}',
    '{"avx_vnni", kernels_avx_vnni(), avx_vnni}': '{"avx_vnni", kernels_avx_vnni(), avx2}',
}
NEEDED = ("setup.py", "pyproject.toml", "csrc", "distilbert_fast", "kernels", "tests")
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all -g1"

MISSING = backends.cpu().missing_isas()
HELD = {"amx": "avx512_vnni", "avx_vnni": "avx2"}  # what a tier consists of but for the emulated instructions

pytestmark = [
    pytest.mark.skipif(not cases.WHOLE, reason="run by make test-all, and by CI where csrc/cpu changed"),
    pytest.mark.skipif(
        platform.machine() != "x86_64" or not shutil.which("g++"), reason="the emulation needs g++ on x86-64"
    ),
    pytest.mark.skipif("avx2" in MISSING, reason=f"the emulated tiers hold AVX2: {MISSING.get('avx2')}"),
]


def make_checkout(folder: Path, **environment: str) -> None:
    """A copy of the checkout with emulated instructions, built in place; with what ROOT has built, if it may."""
    for name in (*NEEDED, "build") if not environment else NEEDED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "lib.*", "bdist.*")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
        elif (ROOT / name).exists():
            shutil.copy2(ROOT / name, folder / name)
    for path in (path for emulated in EMULATED for path in (ROOT / emulated).iterdir()):
        shutil.copyfile(path, folder / "csrc/cpu/gemm" / path.name)
    isa = folder / "csrc/cpu/isa/isa.cpp"
    text = isa.read_text()
    for real, emulated in TIERS.items():
        assert text.count(real) == 1
        text = text.replace(real, emulated)
    isa.write_text(text)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    built = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "MAX_JOBS": "2", "DISTILBERT_FAST_CUDA": "0", **environment},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr


def run_tests(folder: Path, *arguments: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    assert " passed" in done.stdout


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulated")
    make_checkout(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("tier", HELD)
def test_the_tier_on_emulated_instructions(tier, emulated):
    if HELD[tier] in MISSING:
        pytest.skip(f"{tier} holds {HELD[tier]}: {MISSING[HELD[tier]]}")
    tests = ["tests/kernels/test_gemm.py", "tests/ops/test_int8_linear.py", "tests/engine/test_native_encoder.py"]
    if tier == "amx":  # the other tier's floats are those of AVX2
        tests += ["tests/ops/test_attention.py", "tests/ops/test_linear.py"]
    run_tests(emulated, *tests, "-k", tier)


@pytest.mark.slow
def test_every_tier_under_sanitizers(tmp_path):
    """The tests that go to the edges of memory: hostile layouts, canaries, empty calls, refusals."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")  # the latter for exceptions to be known from the start
    ]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip("g++ has no libasan")
    compiler = tmp_path / "g++-O0"  # setup.py's own -O3 would make the build last minutes
    compiler.write_text('#!/bin/bash\nexec g++ "${@/#-O3/-O0}"\n')
    compiler.chmod(0o755)
    make_checkout(tmp_path, CXX=str(compiler), CXXFLAGS=SANITIZE, LDFLAGS=SANITIZE)
    run_tests(
        tmp_path,
        "tests/kernels/test_gemm.py",
        "tests/engine/test_native_encoder.py",
        *sorted(f"tests/ops/{path.name}" for path in (ROOT / "tests/ops").glob("test_*.py")),
        "-k",
        "(test_gemm or native or touch or layout or no_rows or no_columns) and not billion and not losses and not fork",
        LD_PRELOAD=" ".join(libraries),
        ASAN_OPTIONS="detect_leaks=0",
    )
