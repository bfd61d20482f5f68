"""What the sdist and the wheel hold, and that the installed wheel is whole."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile

import pytest
from install.commands import ROOT, succeed

VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]


@pytest.fixture(scope="module")
def names(built) -> set[str]:
    return set(zipfile.ZipFile(built.wheel).namelist())


def test_wheel_holds_one_package_and_all_of_it(names):
    assert {name.split("/")[0] for name in names} == {"distilbert_fast", f"distilbert_fast-{VERSION}.dist-info"}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "distilbert_fast").rglob("*.py")}
    sources |= {f"distilbert_fast/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").glob("*.py")}
    packaged = {name for name in names if name.startswith("distilbert_fast/")}
    assert {name for name in packaged if name.endswith(".py")} == sources | {"distilbert_fast/_build_info.py"}
    others = {re.sub(r"\..*\.so$", ".so", name) for name in packaged if not name.endswith(".py")}
    tables = {path.name for path in (ROOT / "kernels" / "tuned").glob("*.json")} | {"sm_0.json"}
    tables = {f"distilbert_fast/kernels/tuned/{name}" for name in tables}
    assert others == {"distilbert_fast/py.typed", "distilbert_fast/_cpu.so"} | tables


def test_wheel_metadata(built, names):
    wheel, info = zipfile.ZipFile(built.wheel), f"distilbert_fast-{VERSION}.dist-info"
    assert wheel.read(f"{info}/top_level.txt").decode().split() == ["distilbert_fast"]
    assert f"{info}/licenses/LICENSE" in names
    assert "distilbert-fast = distilbert_fast.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert f"\nVersion: {VERSION}\n" in metadata
    extras = set(re.findall(r"^Provides-Extra: (.+)$", metadata, re.MULTILINE))
    assert extras == {"demo", "serve", "ray", "test", "docs", "bench", "peers"}


def test_no_package_is_named_kernels(built, names):
    with tarfile.open(built.sdist) as archive:
        held = names | set(archive.getnames())
    assert not [name for name in held if re.search(r"(^|/)kernels(/__init__)?\.py$", name)]
    assert not list(ROOT.glob("kernels*/__init__.py")) + list(ROOT.glob("kernels.py"))


def test_sdist_holds_what_builds_the_wheel(built):
    with tarfile.open(built.sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
        assert not [member.name for member in archive.getmembers() if member.issym() or member.islnk()]
    native = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert native | {"setup.py", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"} <= held
    assert not [name for name in held if name.endswith(".so") or name.startswith(("tests", "bench"))]
    assert "distilbert_fast/_build_info.py" not in held


def test_the_installed_wheel_computes(built, tmp_path):
    program = (
        "import torch, distilbert_fast as df, distilbert_fast._cpu, distilbert_fast._build_info as info\n"
        "import distilbert_fast.kernels\n"
        "print(df.__file__, distilbert_fast._cpu.__file__, *distilbert_fast.kernels.__path__, sep='\\n')\n"
        "print(df.__version__, info.cuda_built, info.cuda_reason)\n"
        "x = torch.zeros(2, 3, requires_grad=True)\n"
        "with df.backend('cpu'):\n"
        "    loss = df.kl_div(x, torch.tensor([[0.0, 1.0, 2.0]] * 2), temperature=2.0)\n"
        "loss.backward()\n"
        "print(loss.item() > 0, bool(x.grad.isfinite().all()))\n"
    )
    lines = succeed(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(built.site)).splitlines()
    assert all(line.startswith(f"{built.site}/distilbert_fast/") for line in lines[:3]), lines
    assert lines[3:] == [f"{VERSION} False DISTILBERT_FAST_CUDA=0", "True True"]


def objects(built) -> dict[str, str]:
    return {path.name.partition(".")[0]: str(path) for path in built.tree.glob("build/native-*/csrc/**/*.cpp.o")}


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF objects")
def test_only_the_tiers_hold_vector_extensions(built):
    """Code outside the tiers runs on any x86-64: no ymm or zmm register, no VEX or EVEX instruction (all named v…)."""
    extended = re.compile(r"%[yz]mm\d|\t(?!verr|verw)v[a-z0-9]+ ")
    held = objects(built)
    wide = {"tier_avx512", "tier_avx512_bf16", "tier_amx"}
    narrow = {"tier_avx2", "tier_avx_vnni"}
    assert {"bindings_cpu", "isa", "kl_div", "tier_scalar"} | narrow | wide <= set(held)
    for name, path in held.items():
        code = subprocess.run(["objdump", "-d", "--no-show-raw-insn", path], text=True, capture_output=True).stdout
        assert len(code.splitlines()) > 10, name
        assert bool(extended.search(code)) == (name in narrow | wide), name
        assert ("%zmm" in code) == (name in wide), name
        assert ("%tmm" in code) == (name == "tier_amx"), name
        assert ("vpdpbusd" in code) == (name in wide - {"tier_amx"} | {"tier_avx_vnni"}), name


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF objects")
def test_tiers_share_no_function_with_baseline_code(built):
    """Of a weak symbol that two objects define the linker keeps one: an AVX-512 one would crash other machines."""
    for name, path in objects(built).items():
        if name.startswith("tier_"):
            symbols = subprocess.run(["nm", "--defined-only", path], text=True, capture_output=True).stdout
            kinds = {line.split()[1] for line in symbols.splitlines()}
            assert kinds and not kinds & set("WwVvu"), name
