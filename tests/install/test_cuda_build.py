"""The CUDA module on a machine that has nvcc and, as a rule, no GPU: it builds, links and imports."""

from __future__ import annotations

import collections
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from cases import many
from install.commands import copy_checkout, succeed

pytestmark = [pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc"), pytest.mark.slow]

ARCHS = many(("80", "90a"), ("80", "86", "89", "90a", "100"))


@pytest.fixture(scope="module")
def build(build_tools, tmp_path_factory) -> tuple[str, Path]:
    """What the build printed, with ptxas's report on every kernel, and where it put the package."""
    checkout = copy_checkout(tmp_path_factory.mktemp("cuda") / "checkout")
    for source in [checkout / "csrc/bindings_cpu.cpp", *(checkout / "csrc/cpu").rglob("*.cpp")]:
        source.write_text("")  # the CPU module is for other tests
    output = succeed(
        *(sys.executable, "setup.py", "build_ext", "--build-lib", "out"),
        cwd=checkout,
        DISTILBERT_FAST_CUDA="1",
        DISTILBERT_FAST_CUDA_ARCHS=";".join(ARCHS),
        NVCC_APPEND_FLAGS="-Xptxas=-v",
    )
    return output, checkout / "out/distilbert_fast"


@pytest.fixture(scope="module")
def module(build) -> Path:
    (path,) = build[1].glob("_cuda*.so")
    return path


def in_a_process(module: Path, code: str) -> str:
    """Output of code that has _cuda. The emulated one has the same name, and a process can hold one of them."""
    return succeed(sys.executable, "-c", f"import _cuda\n{code}", cwd=module.parent)


def test_it_is_recorded(build):
    info = runpy.run_path(str(build[1] / "_build_info.py"))
    assert info["cuda_built"] is True and info["cuda_archs"] == ARCHS
    assert info["cuda_reason"] == f"DISTILBERT_FAST_CUDA=1, nvcc {info['cuda_version']}"


def test_imports_without_a_gpu(module):
    nothing = (
        "_cuda.kl_div_forward(0, 0, 0, 0, 0, 0, 0, 0, 5, 1.0, 0, 0, 0, 0, 0, 0)"  # no rows: nothing asks for a GPU
    )
    assert in_a_process(module, f"{nothing}\nprint('imported')") == "imported\n"


def test_a_gpu_that_is_not_there_is_an_error(module):
    """Of any number where there is none, of too high a one where there are some; no address is followed."""
    call = "_cuda.kl_div_forward(64, 64, 5, 5, 0, 0, 0, 1, 5, 1.0, 64, 64, 0, 64, 99, 0)"
    said = in_a_process(module, f"try:\n    {call}\nexcept RuntimeError as error:\n    print(error)")
    assert re.match(r"kl_div: cuda(Get|Set)Device: ", said)


def test_needs_no_library_of_the_toolkit(module):
    headers = succeed("objdump", "-p", module, cwd=Path.cwd())
    needed = re.findall(r"NEEDED +(\S+)", headers)
    assert needed and not [name for name in needed if "cuda" in name]  # the runtime is inside


# File -> its kernels for each architecture, and the registers with which as many blocks fit as it counts on.
KERNELS = {
    "attention": (2 * 3, 255),  # two dtypes, three head sizes; two blocks of 128 threads, here and in backward
    "attention_backward": (2 * 2 * 3 + 1, 255),  # by queries and by keys, and for the mask
    "kl_div": (2 * 9, 64),  # forward and backward, three dtypes on either side; two blocks of 512 threads
    "int8_linear": (2, 255),  # large and small tiles; two blocks of 128
    "int8_linear_sm90": (1, 128),  # two blocks of 256
    "layer_norm": (2 * 5, 168),  # by warps and by blocks, five pairs of dtypes; three blocks of 128 threads
}


def test_no_kernel_spills(build):
    """ptxas on every kernel for every architecture: no stack, no spilled register, and room for its blocks."""
    kernels = re.findall(
        r"Compiling entry function '_ZN\w+?_\d+_([a-z]\w+)_cu_\w+' for 'sm_(\w+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        build[0],
        re.DOTALL,
    )
    found = collections.Counter((file, arch) for file, arch, *_ in kernels)
    assert found == {(file, arch): count for file, (count, _) in KERNELS.items() for arch in ARCHS}
    for file, arch, stack, stores, loads, registers in kernels:
        assert (stack, stores, loads) == ("0", "0", "0"), (file, arch)
        assert int(registers) <= KERNELS[file][1], (file, arch)


@pytest.mark.parametrize(
    ("file", "arch", "instructions"),
    [
        *(
            (file, arch, ["HMMA.16816.F32.BF16", "LDSM.16.M88.4", "LDSM.16.MT88.4", "LDGSTS.E.BYPASS.128", "STG.E.128"])
            for file in ("attention", "attention_backward")
            for arch in ("80", "90a", "100")
            if arch in ARCHS
        ),
        *(("int8_linear", arch, ["IMMA.16832.S8.S8", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128.ZFILL"]) for arch in ARCHS),
        ("int8_linear_sm90", "90a", ["IGMMA.64x128x32.S8.S8", "LDGSTS.E.BYPASS.128.ZFILL", "FENCE.VIEW.ASYNC"]),
        ("layer_norm", "80", ["LDG.E.128", "STG.E.128"]),
    ],
)
def test_instructions(build, file, arch, instructions):
    """Tensor cores, fragments 4 matrices at a time, 16-byte copies that pass registers by: in the machine code."""
    triton = pytest.importorskip("triton")
    (code,) = build[1].parents[1].glob(f"build/native-*/csrc/cuda/{file}.cu.o")
    sass = succeed(triton.knobs.nvidia.cuobjdump.path, "-sass", "-arch", f"sm_{arch}", code, cwd=code.parent)
    assert not [name for name in instructions if name not in sass]
    assert not re.search(r"\b(ATOM|ATOMG|ATOMS|RED)\b", sass)  # whose order nobody knows


def test_hopper_has_its_products_only_there(build):
    """The other architectures' code of that kernel is empty, and its launcher knows whether there is any."""
    (ninja,) = build[1].parents[1].glob("build/native-*/build.ninja")
    assert "-DDISTILBERT_FAST_SM90A" in ninja.read_text()
