"""Build the native modules: write a ninja file, drive ninja, record what was built and why.

    distilbert_fast._cpu    csrc/bindings_cpu.cpp + csrc/cpu/*.cpp     always
    distilbert_fast._cuda   csrc/bindings_cuda.cpp + csrc/cuda/*.cu    by DISTILBERT_FAST_CUDA

Neither includes a torch header nor links a torch library, so torch is not needed here. Environment:

    DISTILBERT_FAST_CUDA        auto (default), 0 or 1. auto: when there is an nvcc and the environment's torch uses CUDA
    DISTILBERT_FAST_CUDA_ARCHS  such as "80;90a" (default: those of DEFAULT_ARCHS that nvcc knows); PTX is added
                                for the newest, so that later GPUs run it too
    CUDA_HOME                   nvcc is $CUDA_HOME/bin/nvcc, else the one on PATH
    CXX, CXXFLAGS, LDFLAGS      the C++ compiler (g++ >= 9 or clang >= 10) and flags for it
    MAX_JOBS                    how many compilers run at once (default: ninja's own choice)

Objects and the ninja file stay in build/native-<python>-<platform>, so a second build compiles only what changed.
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
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NATIVE = Path("build", f"native-{sys.implementation.cache_tag}-{sysconfig.get_platform()}")
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
IS_X86 = sysconfig.get_platform().endswith(("x86_64", "amd64"))

COMMON_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wall", "-Wextra"]
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
# A file of this stem is compiled with these flags. Every other file is baseline code, safe on any CPU.
TIER_FLAGS = {"tier_scalar": [], "tier_avx2": AVX2_FLAGS, "tier_avx512": AVX512_FLAGS}
DEFAULT_ARCHS = ["80", "86", "89", "90a", "100"]

# Compiled before anything else, so that an unsuitable compiler is named in one line instead of a screen of errors.
PROBE = """
#if defined(__clang__) ? __clang_major__ < 10 : __GNUC__ < 9
#error "this compiler is too old"
#endif
#include <Python.h>
#include <optional>
#include <string_view>
int main() {
  auto [a, b] = std::pair{std::optional<int>{1}, std::string_view{"x"}};
  if constexpr (sizeof(void*) == 8) return *a + int(b.size()) + PY_MAJOR_VERSION;
}
"""


def fail(message: str) -> NoReturn:
    raise SystemExit(f"\ndistilbert-fast: {message}\n")


def run(command: list[str], **kwargs) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)


@dataclass
class Compiler:
    command: list[str]
    flags: list[str]  # for every C++ file
    link_flags: list[str]
    version: str


def find_compiler() -> Compiler:
    """The C++ compiler of CXX, else the first of g++, c++, clang++; it must compile the probe."""
    needed = "a C++17 compiler (g++ >= 9 or clang++ >= 10) is needed to build the CPU kernels"
    command = shlex.split(os.environ.get("CXX", ""))
    if not command:
        command = [name for name in ("g++", "c++", "clang++") if shutil.which(name)][:1]
    if not command:
        fail(f"{needed}, and none of g++, c++, clang++ is on PATH. Install one (Debian: apt install g++) or set CXX.")
    if not shutil.which(command[0]):
        fail(f"{needed}, and CXX={os.environ['CXX']!r} names none: there is no {command[0]!r} on PATH.")
    includes = dict.fromkeys(sysconfig.get_path(name) for name in ("include", "platinclude"))
    if not any(Path(path, "Python.h").exists() for path in includes):
        fail(f"Python.h is not in {', '.join(includes)}. Install Python's headers (Debian: apt install python3-dev).")
    flags = shlex.split(os.environ.get("CXXFLAGS", "")) + COMMON_FLAGS + [f"-isystem{path}" for path in includes]
    every_tier = [flag for tier in TIER_FLAGS.values() for flag in tier] if IS_X86 else []
    probe = run([*command, *flags, *every_tier, "-fsyntax-only", "-x", "c++", "-"], input=PROBE)
    if probe.returncode:
        fail(f"{needed}; {shlex.join(command)} failed on a probe of C++17, OpenMP and AVX flags:\n{probe.stdout}")
    version = run([*command, "--version"]).stdout.splitlines()[0]
    return Compiler(command, flags, ["-shared", "-fopenmp", *shlex.split(os.environ.get("LDFLAGS", ""))], version)


@dataclass
class Cuda:
    """Whether `_cuda` is built, and the reason in words. The rest is filled in when it is."""

    reason: str
    nvcc: str = ""
    version: str = ""
    archs: tuple[str, ...] = ()


def torch_cuda_version() -> tuple[str, str | None]:
    """What the target environment's torch says of itself, read without importing it: (version, CUDA version)."""
    for scheme in ("purelib", "platlib"):
        path = Path(sysconfig.get_path(scheme), "torch", "version.py")
        if path.exists():
            values = {}
            for node in ast.parse(path.read_text()).body:
                target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
                if isinstance(target, ast.Name) and isinstance(node.value, ast.Constant):
                    values[target.id] = node.value.value
            return values.get("__version__", "unknown"), values.get("cuda")
    return "", None


def decide_cuda() -> Cuda:
    wanted = os.environ.get("DISTILBERT_FAST_CUDA", "auto") or "auto"
    if wanted not in ("auto", "0", "1"):
        fail(f"DISTILBERT_FAST_CUDA must be auto, 0 or 1, and is {wanted!r}.")
    if wanted == "0":
        return Cuda("not built: DISTILBERT_FAST_CUDA=0")

    home = os.environ.get("CUDA_HOME", "")
    nvcc = (home and shutil.which("nvcc", path=str(Path(home, "bin")))) or shutil.which("nvcc")
    if not nvcc:
        where = f"neither in CUDA_HOME ({home}) nor on PATH" if home else "not on PATH, and CUDA_HOME is not set"
        if wanted == "1":
            fail(f"DISTILBERT_FAST_CUDA=1 asks for the CUDA kernels, but nvcc is {where}.\n"
                 "Install the CUDA toolkit, or set DISTILBERT_FAST_CUDA=0 to build without them.")
        return Cuda(f"not built: nvcc is {where}")
    release = re.search(r"release (\d+\.\d+)", run([nvcc, "--version"]).stdout)
    known = re.findall(r"compute_(\d+)", run([nvcc, "--list-gpu-arch"]).stdout)
    if not release or not known:
        problem = f"{nvcc} does not run: `{nvcc} --version` and `--list-gpu-arch` print no version and no architecture"
        if wanted == "1":
            fail(f"DISTILBERT_FAST_CUDA=1 asks for the CUDA kernels, but {problem}.")
        return Cuda(f"not built: {problem}")
    version = release[1]

    if wanted == "auto":
        torch, torch_cuda = torch_cuda_version()
        if not torch:
            return Cuda("not built: the environment has no torch; DISTILBERT_FAST_CUDA=1 builds it all the same")
        if not torch_cuda:
            return Cuda(f"not built: torch {torch} is without CUDA; DISTILBERT_FAST_CUDA=1 builds it all the same")
        if int(version.split(".")[0]) > int(torch_cuda.split(".")[0]):
            return Cuda(f"not built: nvcc is {version} and torch {torch} uses CUDA {torch_cuda}, so the driver may be "
                        "too old for it; DISTILBERT_FAST_CUDA=1 builds it all the same")
        reason = f"built: nvcc {version}, torch {torch} uses CUDA {torch_cuda}"
    else:
        reason = f"built: DISTILBERT_FAST_CUDA=1, nvcc {version}"

    asked = os.environ.get("DISTILBERT_FAST_CUDA_ARCHS", "")
    archs = [arch for arch in re.split(r"[;, ]+", asked) if arch] or [a for a in DEFAULT_ARCHS if a.rstrip("a") in known]
    for arch in archs:
        if not re.fullmatch(r"\d+[af]?", arch) or arch.rstrip("af") not in known:
            fail(f"DISTILBERT_FAST_CUDA_ARCHS must name architectures of nvcc {version} ({';'.join(known)}, each "
                 f"perhaps with an a or f) as in 80;90a, and has {arch!r}.")
    return Cuda(reason, nvcc, version, tuple(archs))


def gencode(archs: tuple[str, ...]) -> list[str]:
    """Machine code for each architecture, and PTX of the newest that later GPUs can compile (90a's is 90's alone)."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    portable = [arch for arch in archs if arch.isdigit()]
    if portable:
        newest = max(portable, key=int)
        flags.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    return flags


def cpu_sources() -> list[Path]:
    sources = sorted(Path("csrc/cpu").glob("*.cpp"))
    if not IS_X86:
        sources = [path for path in sources if not path.stem.startswith("tier_") or path.stem == "tier_scalar"]
    for path in sources:
        if path.stem.startswith("tier_") and path.stem not in TIER_FLAGS:
            fail(f"{path} is an ISA tier that setup.py has no compiler flags for: add it to TIER_FLAGS.")
    return [Path("csrc/bindings_cpu.cpp"), *sources]


def cuda_sources() -> list[Path]:
    return [Path("csrc/bindings_cuda.cpp"), *sorted(Path("csrc/cuda").glob("*.cu"))]


def write_ninja(compiler: Compiler, cuda: Cuda) -> None:
    """Write NATIVE/build.ninja. Its paths are relative to ROOT, where ninja runs."""
    import pybind11
    from ninja import ninja_syntax

    flags = [*compiler.flags, f"-isystem{pybind11.get_include()}", *([] if IS_X86 else ["-DDISTILBERT_FAST_SCALAR_ONLY"])]
    hidden = "-fPIC,-fvisibility=hidden,-Wall,-Wextra"
    nvcc = [cuda.nvcc, f"-ccbin={compiler.command[0]}", *gencode(cuda.archs)]
    nvcc_flags = ["-std=c++17", "-O3", "--compiler-options", hidden]
    nvcc_link_flags = ["-shared", "--cudart=static", "-Xlinker", "--exclude-libs,ALL"]
    words = {
        "cxx": compiler.command, "cxx_flags": flags, "link_flags": compiler.link_flags,
        "nvcc": nvcc, "nvcc_flags": nvcc_flags, "nvcc_link_flags": nvcc_link_flags,
    }

    NATIVE.mkdir(parents=True, exist_ok=True)
    with open(NATIVE / "build.ninja", "w") as file:
        ninja = ninja_syntax.Writer(file, width=10_000)
        ninja.variable("builddir", str(NATIVE))
        for name, value in words.items():
            ninja.variable(name, ninja_syntax.escape(shlex.join(value)))
        for rule, command, dependencies in (
            ("cxx", "$cxx $cxx_flags $tier_flags -MD -MF $out.d -c $in -o $out", "$out.d"),
            ("link", "$cxx $link_flags $in -o $out", None),
            ("nvcc", "$nvcc $nvcc_flags -MD -MF $out.d -c $in -o $out", "$out.d"),
            ("nvcc_link", "$nvcc $nvcc_link_flags $in -o $out", None),
        ):
            ninja.rule(rule, command, f"{rule} $out", depfile=dependencies, deps="gcc" if dependencies else None)

        modules = [("_cpu", cpu_sources(), "link")]
        if cuda.nvcc:
            modules.append(("_cuda", cuda_sources(), "nvcc_link"))
        for module, sources, link in modules:
            objects = []
            for source in sources:
                rule = "nvcc" if source.suffix == ".cu" else "cxx"
                tier = TIER_FLAGS.get(source.stem)
                variables = {"tier_flags": shlex.join(tier)} if tier else None
                objects += ninja.build(f"{NATIVE / source}.o", rule, str(source), variables=variables)
            ninja.build(str(NATIVE / module) + SUFFIX, link, objects)


def run_ninja() -> None:
    import ninja

    command = [str(Path(ninja.BIN_DIR, "ninja")), "-f", str(NATIVE / "build.ninja")]
    jobs = os.environ.get("MAX_JOBS", "")
    if jobs:
        if not re.fullmatch(r"[1-9]\d*", jobs):
            fail(f"MAX_JOBS must be a positive whole number, and is {jobs!r}.")
        command += ["-j", jobs]
    if subprocess.run(command).returncode:
        fail("the native code did not compile; the compiler's own words are above.")


def build_info(compiler: Compiler, cuda: Cuda) -> str:
    """The text of distilbert_fast/_build_info.py, which `distilbert-fast env` reads."""
    tiers = [path.stem.removeprefix("tier_") for path in cpu_sources() if path.stem.startswith("tier_")]
    return f'''"""Written by setup.py: how this installation's native modules were built."""

compiler = {compiler.version!r}
compiler_flags = {shlex.join(flag for flag in compiler.flags if not flag.startswith("-isystem"))!r}
cpu_tiers = {tuple(tiers)!r}
cuda = {bool(cuda.nvcc)!r}
cuda_reason = {cuda.reason!r}
cuda_version = {cuda.version!r}
cuda_archs = {cuda.archs!r}
'''


class BuildNative(build_ext):
    """build_ext by ninja: the modules and _build_info.py go to build_lib, or beside the sources with --inplace."""

    def run(self) -> None:
        os.chdir(ROOT)
        cuda = decide_cuda()
        compiler = find_compiler()
        write_ninja(compiler, cuda)
        print(f"distilbert-fast: _cpu by {compiler.version}; _cuda {cuda.reason}", flush=True)
        run_ninja()

        if not cuda.nvcc:
            self.extensions = [extension for extension in self.extensions if extension.name != "distilbert_fast._cuda"]
            Path(self.get_ext_fullpath("distilbert_fast._cuda")).unlink(missing_ok=True)  # of an earlier build
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # Replaced, not overwritten: a process that has the old module mapped keeps it whole.
            fresh = target.with_suffix(".new")
            shutil.copyfile(NATIVE / (extension.name.rpartition(".")[2] + SUFFIX), fresh)
            fresh.replace(target)
        target.with_name("_build_info.py").write_text(build_info(compiler, cuda))


class CleanBuild(build):
    """A wheel of what the sources are now: build/lib may hold modules of an earlier state of the checkout."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(
    cmdclass={"build": CleanBuild, "build_ext": BuildNative},
    ext_modules=[Extension("distilbert_fast._cpu", []), Extension("distilbert_fast._cuda", [])],
)
