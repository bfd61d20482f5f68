"""Build the native modules: write a ninja file, drive ninja, record what was built and why.

    distilbert_fast._cpu    csrc/bindings_cpu.cpp + csrc/cpu/**/*.cpp  always
    distilbert_fast._cuda   csrc/bindings_cuda.cpp + csrc/cuda/*.cu    by DISTILBERT_FAST_CUDA

Neither includes a torch header nor links a torch library, so torch is not needed here. Environment:

    DISTILBERT_FAST_CUDA        auto (default), 0 or 1. auto: if there is an nvcc and the environment's torch
                                has CUDA
    DISTILBERT_FAST_CUDA_ARCHS  such as 80;90a (default: those of DEFAULT_ARCHS that nvcc knows); PTX of the
                                newest is added, for later GPUs
    CUDA_HOME                   nvcc is $CUDA_HOME/bin/nvcc, else the one on PATH
    CXX, CXXFLAGS, LDFLAGS      the C++ compiler (g++ >= 11 or clang++ >= 12) and flags put before ours
    MAX_JOBS                    how many compilers run at once (default: ninja's choice)

Objects and the ninja file stay in build/native-<python>-<platform>, so that the next build compiles only what
changed.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NATIVE = Path("build", f"native-{sys.implementation.cache_tag}-{sysconfig.get_platform()}")
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
IS_X86 = sysconfig.get_platform().endswith("x86_64")

CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
NVCC_FLAGS = ["-std=c++17", "-O3", "--compiler-options=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
NVCC_LINK_FLAGS = ["-shared", "--cudart=static", "-Xlinker=--exclude-libs,ALL"]
DEFAULT_ARCHS = ["80", "86", "89", "90a", "100"]

# An ISA tier is one file of csrc/cpu/isa, compiled with flags of its own. Every other file is baseline code,
# which any CPU can run; it picks the tier at import.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX_VNNI = [*AVX2, "-mavxvnni"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
AVX512 += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # gcc 12 suspects its own intrinsics
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
AMX = [*AVX512, "-mamx-tile", "-mamx-int8", "-mamx-bf16"]
TIER_FLAGS = {"tier_scalar": [], "tier_avx2": AVX2, "tier_avx512": AVX512, "tier_avx512_bf16": AVX512_BF16}
TIER_FLAGS |= {"tier_avx_vnni": AVX_VNNI, "tier_amx": AMX}
if not IS_X86:
    TIER_FLAGS = {"tier_scalar": []}

# Compiled first, so that an unsuitable compiler gets one message instead of a screen of errors.
PROBE = """
#ifdef __clang__
static_assert(__clang_major__ >= 12, "this clang is too old");
#else
static_assert(__GNUC__ >= 11, "this gcc is too old");
#endif
#include <optional>
#include <string_view>
#include <utility>
int probe() {
  auto [a, b] = std::pair{std::optional<int>{1}, std::string_view{"x"}};
  if constexpr (sizeof(void*) == 8) return *a + int(b.size());
  return 0;
}
"""
# Instructions of each tier, compiled after PROBE: the compiler must know its flags, and the assembler what it emits.
TIER_PROBES = {
    "tier_avx2": "__m256 widen(__m128i x) { return _mm256_cvtph_ps(x); }",
    "tier_avx_vnni": "__m256i dot(__m256i sum, __m256i a, __m256i b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }",
    "tier_avx512": "__m512i dot(__m512i sum, __m512i a, __m512i b) { return _mm512_dpbusd_epi32(sum, a, b); }",
    "tier_avx512_bf16": "__m512 dot(__m512 sum, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(sum, a, b); }",
    "tier_amx": "void dot() { _tile_dpbssd(0, 1, 2); _tile_dpbf16ps(0, 1, 2); }",
}


def fail(message: str) -> NoReturn:
    raise SystemExit(f"\ndistilbert-fast: {message}\n")


def output_of(command: list[str], text: str = "") -> tuple[int, str]:
    """Exit status and output (stdout and stderr together) of a command that reads `text`."""
    done = subprocess.run(command, input=text, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout


@dataclass
class Compiler:
    command: list[str]
    flags: list[str]
    link_flags: list[str]
    version: str
    tiers: list[str]  # those of TIER_FLAGS that it can compile


def compiles(command: list[str], tiers: Iterable[str]) -> tuple[bool, str]:
    """Whether the command, with the flags of these tiers, compiles PROBE and their instructions; its messages."""
    flags = [flag for tier in tiers for flag in TIER_FLAGS[tier]]
    probes = [TIER_PROBES[tier] for tier in tiers if tier in TIER_PROBES]
    text = "\n".join([PROBE, *(["#include <immintrin.h>"] if probes else []), *probes, ""])
    status, messages = output_of([*command, *flags, "-c", "-o", os.devnull, "-x", "c++", "-"], text)
    return status == 0, messages


def find_compiler() -> Compiler:
    """The C++ compiler of CXX, else the first of g++, c++ and clang++; it must compile PROBE.

    ISA tiers that it cannot compile are left out, with a message.
    """
    needed = "a C++17 compiler, g++ >= 11 or clang++ >= 12, is needed"
    command = shlex.split(os.environ.get("CXX", ""))
    command = command or [name for name in ("g++", "c++", "clang++") if shutil.which(name)][:1]
    if not command:
        fail(f"{needed}, and there is none on PATH. Install one (Debian: apt install g++) or name it in CXX.")
    if not shutil.which(command[0]):
        fail(f"{needed}, and there is no {command[0]!r} on PATH, which CXX names.")

    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").exists():
        fail(f"{headers} has no Python.h. Install Python's headers (Debian: apt install python3-dev).")

    version = output_of([*command, "--version"])[1].partition("\n")[0]
    openmp = "-fopenmp"
    if "clang" in version:
        openmp = "-fopenmp=libgomp"  # torch's runtime; a second one beside it, clang's own, is not safe
        version += " (kernels use one thread: clang makes no parallel code for libgomp)"

    flags = [*shlex.split(os.environ.get("CXXFLAGS", "")), *CXX_FLAGS, openmp]
    tiers = list(TIER_FLAGS)
    if not compiles([*command, *flags], tiers)[0]:
        able, messages = compiles([*command, *flags], [])
        if not able:
            fail(f"{needed}, and {shlex.join(command)} failed on a few lines of C++17:\n{messages}")
        for tier in TIER_FLAGS:
            able, messages = compiles([*command, *flags], [tier])
            if not able:
                tiers.remove(tier)
                print(f"distilbert-fast: without {tier}, which {shlex.join(command)} cannot compile:\n{messages}")

    if not IS_X86:
        flags.append("-DDISTILBERT_FAST_SCALAR_ONLY")
    flags.append(f"-isystem{headers}")
    link_flags = ["-shared", openmp, *shlex.split(os.environ.get("LDFLAGS", ""))]
    return Compiler(command, flags, link_flags, version, tiers)


@dataclass
class Cuda:
    """Whether `_cuda` is built and why; without nvcc it is not."""

    reason: str
    nvcc: str = ""
    version: str = ""
    archs: tuple[str, ...] = ()

    def gencode(self) -> list[str]:
        """Machine code for each architecture, and the newest one's PTX (never 90a's: it is for 90 alone).

        Launchers are told whether there is 90a's, as kernels that need it are empty in any other.
        """
        targets = [(f"compute_{arch}", f"sm_{arch}") for arch in self.archs]
        portable = [int(arch) for arch in self.archs if arch.isdigit()]
        if portable:
            targets.append((f"compute_{max(portable)}",) * 2)
        features = ["-DDISTILBERT_FAST_SM90A"] if "90a" in self.archs else []
        return [*(f"-gencode=arch={virtual},code={real}" for virtual, real in targets), *features]


def torch_versions() -> tuple[str, str]:
    """The version of the environment's torch and of its CUDA, "" for none, read without importing it."""
    values: dict[str, str] = {}
    for scheme in ("platlib", "purelib"):
        path = Path(sysconfig.get_path(scheme), "torch", "version.py")
        for node in ast.parse(path.read_text()).body if path.exists() else []:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if isinstance(target, ast.Name) and isinstance(node.value, ast.Constant):
                values[target.id] = node.value.value or ""
    return values.get("__version__", ""), values.get("cuda", "")


def decide_cuda() -> Cuda:
    wanted = os.environ.get("DISTILBERT_FAST_CUDA") or "auto"
    if wanted not in ("auto", "0", "1"):
        fail(f"DISTILBERT_FAST_CUDA must be auto, 0 or 1, and is {wanted!r}.")
    if wanted == "0":
        return Cuda("DISTILBERT_FAST_CUDA=0")

    home = os.environ.get("CUDA_HOME")
    nvcc = (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")
    if not nvcc:
        problem = f"nvcc is not on PATH and {f'not in CUDA_HOME={home}' if home else 'CUDA_HOME is not set'}"
    else:
        release = re.search(r"release (\d+\.\d+)", output_of([nvcc, "--version"])[1])
        known = re.findall(r"compute_(\d+)", output_of([nvcc, "--list-gpu-arch"])[1])
        problem = "" if release and known else f"{nvcc} tells no version and no architectures"
    if problem and wanted == "1":
        fail(
            f"DISTILBERT_FAST_CUDA=1 asks for the CUDA kernels, but {problem}. Install the CUDA toolkit, or "
            "set DISTILBERT_FAST_CUDA=0 to build without them."
        )
    if problem:
        return Cuda(problem)
    version = release[1]

    if wanted == "1":
        reason = f"DISTILBERT_FAST_CUDA=1, nvcc {version}"
    else:
        torch, torch_cuda = torch_versions()
        if not torch_cuda:
            found = f"torch {torch} is without CUDA" if torch else "the environment has no torch"
            return Cuda(f"{found}; DISTILBERT_FAST_CUDA=1 builds it all the same")
        if int(version.split(".")[0]) > int(torch_cuda.split(".")[0]):
            found = f"nvcc {version} may need a newer driver than torch {torch} with CUDA {torch_cuda}"
            return Cuda(f"{found}; DISTILBERT_FAST_CUDA=1 builds it all the same")
        reason = f"nvcc {version}, and torch {torch} has CUDA {torch_cuda}"

    asked = os.environ.get("DISTILBERT_FAST_CUDA_ARCHS", "").replace(";", " ").split()
    for arch in asked:
        if not re.fullmatch(r"\d+[af]?", arch) or arch.rstrip("af") not in known:
            fail(
                f"DISTILBERT_FAST_CUDA_ARCHS must be like 80;90a, of those of nvcc {version} "
                f"({';'.join(known)}), and has {arch!r}."
            )
    return Cuda(reason, nvcc, version, tuple(asked or [a for a in DEFAULT_ARCHS if a.rstrip("a") in known]))


def cpu_sources(tiers: list[str]) -> list[Path]:
    sources = sorted(Path("csrc/cpu").rglob("*.cpp"))
    foreign = [path for path in sources if path.stem.startswith("tier_") and path.stem not in TIER_FLAGS]
    if foreign and IS_X86:
        fail(f"{foreign[0]} is an ISA tier, and TIER_FLAGS in setup.py has no flags for it.")
    built = [path for path in sources if path.stem in tiers or not path.stem.startswith("tier_")]
    return [Path("csrc/bindings_cpu.cpp"), *built]


def cuda_sources() -> list[Path]:
    return [Path("csrc/bindings_cuda.cpp"), *sorted(Path("csrc/cuda").glob("*.cu"))]


def write_ninja(compiler: Compiler, cuda: Cuda) -> None:
    """Write NATIVE/build.ninja, whose paths are relative to ROOT."""
    import pybind11
    from ninja import ninja_syntax

    host = [f"-ccbin={word}" for word in compiler.command if "++" in word]  # the g++ of CXX="ccache g++"
    NATIVE.mkdir(parents=True, exist_ok=True)
    with open(NATIVE / "build.ninja", "w") as file:
        ninja = ninja_syntax.Writer(file, width=10_000)
        ninja.variable("builddir", str(NATIVE))
        for name, words in (
            ("cxx", [*compiler.command, *compiler.flags, "-Icsrc", f"-isystem{pybind11.get_include()}"]),
            ("link", [*compiler.command, *compiler.link_flags]),
            ("nvcc", [cuda.nvcc, *host, *cuda.gencode(), *NVCC_FLAGS]),
            ("nvcc_link", [cuda.nvcc, *host, *NVCC_LINK_FLAGS]),
        ):
            ninja.variable(name, ninja_syntax.escape(shlex.join(words)))
        for name in ("cxx", "nvcc"):
            command = f"${name} $tier_flags -MD -MF $out.d -c $in -o $out"
            ninja.rule(name, command, f"{name} $in", depfile="$out.d", deps="gcc")
        for name in ("link", "nvcc_link"):
            ninja.rule(name, f"${name} $in -o $out", f"{name} $out")

        modules = [("_cpu", "link", cpu_sources(compiler.tiers))]
        if cuda.nvcc:
            modules.append(("_cuda", "nvcc_link", cuda_sources()))
        for module, link, sources in modules:
            objects = []
            for source in sources:
                rule = "nvcc" if source.suffix == ".cu" else "cxx"
                flags = {"tier_flags": TIER_FLAGS.get(source.stem) or None}
                objects += ninja.build(f"{NATIVE / source}.o", rule, str(source), variables=flags)
            ninja.build(f"{NATIVE / module}{SUFFIX}", link, objects)


def run_ninja() -> None:
    import ninja

    command = [str(Path(ninja.BIN_DIR, "ninja")), "-f", str(NATIVE / "build.ninja")]
    jobs = os.environ.get("MAX_JOBS", "")
    if jobs:
        if not re.fullmatch("[1-9][0-9]*", jobs):
            fail(f"MAX_JOBS must be a whole number of compilers, at least 1, and is {jobs!r}.")
        command += ["-j", jobs]
    if subprocess.run(command).returncode:
        fail("the native code did not build; the compiler's own words are above.")


def build_info(compiler: Compiler, cuda: Cuda) -> str:
    """The text of distilbert_fast/_build_info.py, from which `distilbert-fast env` tells how it was built."""
    return f'''"""How the native modules of this installation were built; written by setup.py."""

compiler = {compiler.version!r}
compiler_flags = {shlex.join(flag for flag in compiler.flags if not flag.startswith("-isystem"))!r}
cpu_tiers = {tuple(sorted(tier.removeprefix("tier_") for tier in compiler.tiers))!r}
cuda_built = {bool(cuda.nvcc)!r}
cuda_reason = {cuda.reason!r}
cuda_version = {cuda.version!r}
cuda_archs = {cuda.archs!r}
'''


class BuildNative(build_ext):
    """build_ext by ninja: the modules and _build_info.py go to build_lib, or in place beside the sources."""

    def run(self) -> None:
        os.chdir(ROOT)
        compiler, cuda = find_compiler(), decide_cuda()
        cuda_too = "and" if cuda.nvcc else "but not"
        print(f"distilbert-fast: _cpu ({compiler.version}) {cuda_too} _cuda ({cuda.reason})", flush=True)
        write_ninja(compiler, cuda)
        run_ninja()

        for extension in list(self.extensions):
            target = Path(self.get_ext_fullpath(extension.name))
            target.unlink(missing_ok=True)  # never overwritten: a running process may have it mapped
            if extension.name.endswith("_cuda") and not cuda.nvcc:
                self.extensions.remove(extension)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(NATIVE / target.name, target)
        target.with_name("_build_info.py").write_text(build_info(compiler, cuda))


class CleanBuild(build):
    """A wheel holds what the sources are now; an old build_lib may hold modules that are gone from them."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(
    cmdclass={"build": CleanBuild, "build_ext": BuildNative},
    ext_modules=[Extension("distilbert_fast._cpu", []), Extension("distilbert_fast._cuda", [])],
)
