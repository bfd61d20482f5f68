"""What setup.py decides, and how it says that it cannot go on. The compilers are stand-ins that compile nothing."""

from __future__ import annotations

import platform
import re
import runpy
import shutil
import sys
import sysconfig
import venv
from pathlib import Path
from typing import NamedTuple

import pytest
from install.commands import ROOT, copy_checkout, run, succeed

# Writes what it is asked to write, and when it started and ended.
COMPILER = """#!/bin/sh
out=; dep=
while [ $# -gt 0 ]; do
  case $1 in
    --version) echo "{version}"; exit ;;
    --list-gpu-arch) echo "{archs}"; exit ;;
    -o) out=$2; shift ;;
    -MF) dep=$2; shift ;;
  esac
  shift
done
echo start >> "{log}"
[ -z "$dep" ] || echo "$out:" > "$dep"
[ "$out" = /dev/null ] || echo > "$out"
{sleep} 0.05
echo end >> "{log}"
"""


class Machine(NamedTuple):
    """A checkout, an environment of its own and a PATH on which nothing lies but stand-ins."""

    checkout: Path
    python: Path
    path: Path
    log: Path

    def tool(self, name: str, version: str = "", archs: str = "", folder: Path | None = None) -> None:
        folder = folder or self.path
        folder.mkdir(parents=True, exist_ok=True)
        sleep = next(path for path in ("/bin/sleep", "/usr/bin/sleep") if Path(path).exists())
        script = COMPILER.format(version=version, archs=archs, log=self.log, sleep=sleep)
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)

    def nvcc(self, version: str = "12.8", folder: Path | None = None) -> None:
        archs = "compute_80 compute_86 compute_89 compute_90"
        self.tool("nvcc", f"Cuda compilation tools, release {version}, V{version}.1", archs, folder)

    def torch(self, cuda: str | None) -> None:
        folder = next(self.python.parents[1].glob("lib/python*/site-packages")) / "torch"
        folder.mkdir()
        lines = ("from typing import Optional", "__version__ = '2.99.0'", f"cuda: Optional[str] = {cuda!r}")
        (folder / "version.py").write_text("\n".join(lines))

    def build(self, **environment: str):
        command = (self.python, "setup.py", "-q", "build_ext", "--build-lib", "out")
        return run(*command, cwd=self.checkout, **{"PATH": str(self.path)} | environment)

    def built(self, **environment: str) -> dict:
        """What _build_info.py says after a build that must not fail."""
        done = self.build(**environment)
        assert done.returncode == 0, done.stdout
        return runpy.run_path(str(self.checkout / "out/distilbert_fast/_build_info.py"))

    def refusal(self, **environment: str) -> str:
        """The message of a build that must fail, which is all that it says after pip's own words."""
        done = self.build(**environment)
        assert done.returncode != 0 and "Traceback" not in done.stdout, done.stdout
        return done.stdout[done.stdout.index("distilbert-fast: ") :].strip()

    def modules(self) -> list[str]:
        return sorted(path.name.partition(".")[0] for path in (self.checkout / "out/distilbert_fast").glob("*.so"))


@pytest.fixture
def machine(build_tools, tmp_path) -> Machine:
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True, with_pip=False)
    site = next(environment.glob("lib/python*/site-packages"))
    (site / "tools.pth").write_text(sysconfig.get_path("purelib"))
    import ninja

    (environment / "bin/ninja").symlink_to(Path(ninja.BIN_DIR, "ninja"))
    machine = Machine(
        copy_checkout(tmp_path / "checkout"), environment / "bin/python", tmp_path / "bin", tmp_path / "log"
    )
    machine.tool("g++", "g++ (stand-in) 13.1")
    return machine


def test_without_nvcc(machine):
    machine.torch(cuda="12.9")
    info = machine.built()
    assert info["cuda_built"] is False
    assert info["cuda_reason"] == "nvcc is not on PATH and CUDA_HOME is not set"
    assert info["compiler"] == "g++ (stand-in) 13.1"
    assert machine.modules() == ["_cpu"]


def test_auto_with_nvcc_and_a_torch_with_cuda(machine):
    machine.nvcc()
    machine.torch(cuda="12.9")
    info = machine.built()
    assert info["cuda_reason"] == "nvcc 12.8, and torch 2.99.0 has CUDA 12.9"
    assert info["cuda_archs"] == ("80", "86", "89", "90a")  # of the default ones, those that this nvcc knows
    assert (info["cuda_built"], info["cuda_version"]) == (True, "12.8")
    assert machine.modules() == ["_cpu", "_cuda"]


@pytest.mark.parametrize(
    ("cuda", "reason"),
    [
        (None, "torch 2.99.0 is without CUDA; DISTILBERT_FAST_CUDA=1 builds it all the same"),
        (
            "11.8",
            "nvcc 12.8 may need a newer driver than torch 2.99.0 with CUDA 11.8; DISTILBERT_FAST_CUDA=1 builds it "
            "all the same",
        ),
    ],
)
def test_auto_with_a_torch_that_cannot_use_it(machine, cuda, reason):
    machine.nvcc()
    machine.torch(cuda)
    assert machine.built()["cuda_reason"] == reason
    assert machine.modules() == ["_cpu"]
    assert machine.built(DISTILBERT_FAST_CUDA="1")["cuda_reason"] == "DISTILBERT_FAST_CUDA=1, nvcc 12.8"
    assert machine.modules() == ["_cpu", "_cuda"]
    assert machine.built(DISTILBERT_FAST_CUDA="0")["cuda_reason"] == "DISTILBERT_FAST_CUDA=0"
    assert machine.modules() == ["_cpu"]  # that of the build before is gone


def test_cuda_home_comes_before_path(machine, tmp_path):
    machine.nvcc("12.8")
    machine.nvcc("13.1", folder=tmp_path / "cuda/bin")
    info = machine.built(DISTILBERT_FAST_CUDA="1", CUDA_HOME=str(tmp_path / "cuda"))
    assert info["cuda_version"] == "13.1"
    assert machine.built(DISTILBERT_FAST_CUDA="1", CUDA_HOME="/nowhere")["cuda_version"] == "12.8"


def test_cuda_without_nvcc_names_the_variable(machine):
    assert machine.refusal(DISTILBERT_FAST_CUDA="1") == (
        "distilbert-fast: DISTILBERT_FAST_CUDA=1 asks for the CUDA kernels, but nvcc is not on PATH and CUDA_HOME is "
        "not set. Install the CUDA toolkit, or set DISTILBERT_FAST_CUDA=0 to build without them."
    )
    assert "nvcc is not on PATH and not in CUDA_HOME=/nowhere." in machine.refusal(
        DISTILBERT_FAST_CUDA="1", CUDA_HOME="/nowhere"
    )


def test_cuda_with_a_broken_nvcc(machine):
    machine.tool("nvcc")
    problem = f"{machine.path}/nvcc tells no version and no architectures"
    assert f"but {problem}." in machine.refusal(DISTILBERT_FAST_CUDA="1")
    assert machine.built()["cuda_reason"] == problem


def test_values_that_make_no_sense(machine):
    machine.nvcc()
    assert machine.refusal(DISTILBERT_FAST_CUDA="yes") == (
        "distilbert-fast: DISTILBERT_FAST_CUDA must be auto, 0 or 1, and is 'yes'."
    )
    for archs, bad in (("80;75", "75"), ("9.0", "9.0"), ("80 sm_90", "sm_90")):
        assert machine.refusal(DISTILBERT_FAST_CUDA="1", DISTILBERT_FAST_CUDA_ARCHS=archs) == (
            "distilbert-fast: DISTILBERT_FAST_CUDA_ARCHS must be like 80;90a, of those of nvcc 12.8 (80;86;89;90), "
            f"and has {bad!r}."
        )
    for jobs in ("0", "-1", "many"):
        assert machine.refusal(MAX_JOBS=jobs).endswith(
            f"MAX_JOBS must be a whole number of compilers, at least 1, and is {jobs!r}."
        )


def test_architectures(machine):
    machine.nvcc()
    info = machine.built(DISTILBERT_FAST_CUDA="1", DISTILBERT_FAST_CUDA_ARCHS="86; 90a")
    assert info["cuda_archs"] == ("86", "90a")
    (ninja,) = machine.checkout.glob("build/native-*/build.ninja")
    flags = [word for word in ninja.read_text().split() if word.startswith("-gencode")]
    wanted = ["arch=compute_86,code=sm_86", "arch=compute_90a,code=sm_90a", "arch=compute_86,code=compute_86"]
    assert flags == [f"-gencode={each}" for each in wanted]  # PTX of 86: that of 90a runs on nothing else


def test_no_compiler(machine):
    (machine.path / "g++").unlink()
    assert machine.refusal() == (
        "distilbert-fast: a C++17 compiler, g++ >= 11 or clang++ >= 12, is needed, and there is none on PATH. Install "
        "one (Debian: apt install g++) or name it in CXX."
    )
    assert machine.refusal(CXX="icpc -fast") == (
        "distilbert-fast: a C++17 compiler, g++ >= 11 or clang++ >= 12, is needed, and there is no 'icpc' on PATH, "
        "which CXX names."
    )


def test_a_compiler_that_is_too_old(machine):
    (machine.path / "old").write_text("#!/bin/sh\necho \"error: unrecognized option '-std=c++17'\"; exit 1\n")
    (machine.path / "old").chmod(0o755)
    assert machine.refusal(CXX="old") == (
        "distilbert-fast: a C++17 compiler, g++ >= 11 or clang++ >= 12, is needed, and old failed on a few lines of "
        "C++17:\nerror: unrecognized option '-std=c++17'"
    )


@pytest.mark.parametrize("version", ["-U__GNUC__ -D__GNUC__=8", "-D__clang__ -D__clang_major__=9"])
def test_the_probe_knows_old_versions(machine, version):
    message = machine.refusal(CXX=f"{shutil.which('g++')} {version}", PATH="/usr/bin:/bin")
    assert "this gcc is too old" in message or "this clang is too old" in message


def test_a_source_that_does_not_compile(machine):
    script = (machine.path / "g++").read_text()
    failing = 'case "$out" in *isa.cpp.o) echo "no such thing"; exit 1 ;; esac\necho start'
    (machine.path / "g++").write_text(script.replace("echo start", failing))
    message = machine.refusal()
    assert "\nno such thing\n" in message
    assert message.endswith("distilbert-fast: the native code did not build; the compiler's own words are above.")


def test_max_jobs(machine):
    def most_at_once() -> int:
        running, most = 0, 0
        for line in machine.log.read_text().split()[2:]:  # after the probe
            running += 1 if line == "start" else -1
            most = max(most, running)
        machine.log.unlink()
        return most

    machine.built(MAX_JOBS="1")
    assert most_at_once() == 1
    machine.built(MAX_JOBS="3", CXXFLAGS="-DOTHER")  # another command line: everything is compiled again
    assert 1 < most_at_once() <= 3


def test_only_what_changed_is_compiled(machine):
    machine.built()
    compiled = machine.log.read_text().count("start") - 1  # one is the probe
    sources = ["bindings_cpu.cpp", *(machine.checkout / "csrc/cpu").rglob("*.cpp")]
    assert compiled == len(sources) + 1  # and the link
    machine.log.unlink()
    machine.built()
    assert machine.log.read_text().count("start") == 1
    machine.log.unlink()
    source = machine.checkout / "csrc/cpu/isa/isa.cpp"
    source.write_text(source.read_text() + "\n")
    machine.built()
    assert machine.log.read_text().count("start") == 3  # probe, compile, link


def test_flags(machine):
    machine.built(CXX="g++ -pipe", CXXFLAGS="-g", LDFLAGS="-Wl,-O1")
    (ninja,) = machine.checkout.glob("build/native-*/build.ninja")
    text = ninja.read_text()
    assert "cxx = g++ -pipe -g -std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -fopenmp " in text
    assert "link = g++ -pipe -shared -fopenmp -Wl,-O1" in text
    assert "march" not in text and "fast-math" not in text


def test_clang_gets_torchs_openmp_runtime(machine):
    machine.tool("clang++", "clang version 17.0.1")
    assert machine.built(CXX="clang++")["compiler"] == (
        "clang version 17.0.1 (kernels use one thread: clang makes no parallel code for libgomp)"
    )
    (ninja,) = machine.checkout.glob("build/native-*/build.ninja")
    assert "link = clang++ -shared -fopenmp=libgomp" in ninja.read_text()


def test_another_processor_gets_the_scalar_tier_alone(machine):
    info = machine.built(_PYTHON_HOST_PLATFORM="linux-aarch64")
    assert info["cpu_tiers"] == ("scalar",) and "-DDISTILBERT_FAST_SCALAR_ONLY" in info["compiler_flags"]
    (ninja,) = machine.checkout.glob("build/native-*aarch64/build.ninja")
    assert "avx" not in ninja.read_text()


REFUSED = {
    "-mamx-tile": {"amx"},
    "-mavx512bf16": {"avx512_bf16"},
    "-mavxvnni": {"avx_vnni"},
    "-mavx512vnni": {"avx512", "avx512_bf16", "amx"},
    "-mf16c": {"avx2", "avx_vnni", "avx512", "avx512_bf16", "amx"},
}


@pytest.mark.parametrize("flag", REFUSED)
def test_tiers_that_the_compiler_cannot_compile_are_left_out(machine, flag):
    refusal = f'case " $* " in *" {flag} "*) echo "error: unrecognized option {flag}"; exit 1 ;; esac\nout='
    script = (machine.path / "g++").read_text().replace("out=", refusal, 1)
    (machine.path / "g++").write_text(script)
    done = machine.build()
    assert done.returncode == 0, done.stdout
    for tier in REFUSED[flag]:
        said = f"distilbert-fast: without tier_{tier}, which g++ cannot compile:\nerror: unrecognized option {flag}\n"
        assert said in done.stdout
    assert done.stdout.count("distilbert-fast: without") == len(REFUSED[flag])
    kept = {"amx", "avx512_bf16", "avx512", "avx_vnni", "avx2", "scalar"} - REFUSED[flag]
    assert machine.built()["cpu_tiers"] == tuple(sorted(kept))
    (ninja,) = machine.checkout.glob("build/native-*/build.ninja")
    compiled = set(re.findall(r"/tier_(\w+)\.cpp\.o: ", ninja.read_text()))
    assert compiled == kept and flag not in ninja.read_text()


def test_an_assembler_that_is_too_old_for_a_tier(machine):
    """The compiler knows every flag, the program that it hands its output to not every instruction."""
    script = (machine.path / "g++").read_text()
    refusal = 'if [ "$out" = /dev/null ] && grep -q _tile_dpbssd; then echo "no such instruction"; exit 1; fi\n'
    (machine.path / "g++").write_text(script.replace("echo start", f"{refusal}echo start"))
    (machine.path / "grep").symlink_to(shutil.which("grep"))
    assert machine.built()["cpu_tiers"] == ("avx2", "avx512", "avx512_bf16", "avx_vnni", "scalar")


WITHOUT_AMX = """
#include <cstdio>

#include "isa.h"

namespace distilbert_fast {
const Kernels kernels_scalar{}, kernels_avx2{}, kernels_avx512{}, kernels_avx512_bf16{};
}

int main() {
  for (const auto& [name, lacks] : distilbert_fast::missing_isas()) std::printf("%s: %s\\n", name.data(), lacks.data());
  for (const auto& name : distilbert_fast::available_isas()) std::printf("%s runs\\n", name.data());
}
"""


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("g++"), reason="needs g++ on x86-64")
def test_a_module_without_a_tier_says_so(tmp_path):
    """isa.cpp linked without the AMX tier, on a processor that is taken to have all of it."""
    (source,) = (ROOT / "csrc/cpu").rglob("isa.cpp")
    text = re.sub(r"\{\"amx\", &kernels_amx, amx\}", '{"amx", &kernels_amx, ""}', source.read_text())
    (tmp_path / "isa.cpp").write_text(text)
    (tmp_path / "main.cpp").write_text(WITHOUT_AMX)
    headers = {path.parent for path in (ROOT / "csrc").rglob("*.h")}
    words = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-Werror", "-Wall", *(f"-I{path}" for path in headers))
    succeed("g++", *words, "isa.cpp", "main.cpp", "-o", "without-amx", cwd=tmp_path)
    said = succeed(tmp_path / "without-amx", cwd=tmp_path)
    assert "amx: the compiler of this build could not compile it\n" in said
    assert "amx runs" not in said and "scalar runs\n" in said


def test_an_isa_tier_without_flags(machine):
    (machine.checkout / "csrc/cpu/isa/tier_sse9.cpp").touch()
    assert machine.refusal().endswith(
        "distilbert-fast: csrc/cpu/isa/tier_sse9.cpp is an ISA tier, and TIER_FLAGS in setup.py has no flags for it."
    )


def test_through_pip(machine):
    """The same one message at the end of pip's output, and no trace of ours."""
    pip = (sys.executable, "-m", "pip", "--python", machine.python, "install", "--no-build-isolation", "--no-deps")
    done = run(*pip, "--no-index", ".", cwd=machine.checkout, PATH=str(machine.path), DISTILBERT_FAST_CUDA="1")
    assert done.returncode == 1 and "Traceback" not in done.stdout
    assert "distilbert-fast: DISTILBERT_FAST_CUDA=1 asks for the CUDA kernels, but nvcc is not on PATH" in done.stdout
