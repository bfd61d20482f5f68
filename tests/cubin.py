"""Compile Triton kernels for GPUs that this machine does not have, and read what became of them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHS = (80, 90, 100)  # A100, H100 and H200, B200
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes of shared memory that a block may take
SHARED_TOTAL = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}  # that a multiprocessor has; each block takes 1 KB more


def compiled(
    kernel: Any,
    arch: int,
    types: Mapping[str, str | tuple[str, ...]],
    constants: Mapping[str, Any],
    misaligned: Collection[str] = (),
    **options: Any,
) -> Any:
    """Compile a kernel for an architecture, as a launch with these arguments would.

    Args:
        kernel: a ``triton.jit`` function.
        arch: such as 90.
        types: Triton's type of each argument, "*bf16", "i32" …, or a named tuple of such; names that the kernel lacks
            are passed over.
        constants: arguments that are constexpr or, None, absent.
        misaligned: pointers (and integers) that are not promised to be multiples of 16 bytes (of 16); pointers are
            otherwise, integers only if their type is written "i32:16" or "i64:16".
        options: num_warps, num_stages …
    """
    names = kernel.arg_names
    parts = {  # where each type stands among the arguments
        ((names.index(name),) if isinstance(type, str) else (names.index(name), place)): part
        for name, type in types.items()
        if name in names and name not in constants
        for place, part in enumerate((type,) if isinstance(type, str) else type)
    }
    plain = {name: _plain(type) for name, type in types.items()}
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else plain[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items() if name in names},
        attrs={
            path: [["tt.divisibility", 16]]
            for path, part in parts.items()
            if (part.startswith("*") or part.endswith(":16")) and names[path[0]] not in misaligned
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": True, **options})


def _plain(type: Any) -> Any:
    return type.removesuffix(":16") if isinstance(type, str) else type._make(map(_plain, type))


def resources(program: Any, folder: Path) -> dict[str, int]:
    """What cuobjdump says one thread needs: {"REG": registers, "STACK": bytes, "LOCAL": bytes, ...}."""
    said = _tool(program, folder, triton.knobs.nvidia.cuobjdump.path, "-res-usage")
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", said)}


def instructions(program: Any, folder: Path) -> list[str]:
    """The machine code, as nvdisasm writes it: an instruction with its operands each."""
    said = _tool(program, folder, triton.knobs.nvidia.nvdisasm.path)
    return re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d\s+)?([A-Z][^;]*?)\s*;", said, re.MULTILINE)


def assert_products_overlap(program: Any, folder: Path) -> None:
    """Hopper's products are asynchronous; where a register of theirs is touched too early, each is waited for alone."""
    code = instructions(program, folder)
    products = sum(bool(re.match("[HI]GMMA", each)) for each in code)
    waits = sum(each.startswith("WARPGROUP.DEPBAR") for each in code)
    assert products >= 4 * waits > 0, f"{products} products, {waits} waits"


def residents(program: Any, folder: Path) -> int:
    """How many programs a multiprocessor of its architecture holds, by registers, shared memory and warps."""
    warps = program.metadata.num_warps
    registers = -(-resources(program, folder)["REG"] // 8) * 8 * 32 * warps  # a warp takes them by 256
    room = SHARED_TOTAL[program.metadata.target.arch]
    return min(65536 // registers, room // (program.metadata.shared + 1024), 64 // warps)


def _tool(program: Any, folder: Path, *command: str) -> str:
    path = folder / "kernel.cubin"
    path.write_bytes(program.asm["cubin"])
    return subprocess.run([*command, str(path)], capture_output=True, text=True, check=True).stdout


def loops(ptx: str) -> Iterator[str]:
    """The basic blocks that jump back to their own label."""
    for block in re.split(r"^(?=\$L__BB)", ptx, flags=re.MULTILINE)[1:]:
        label = block.split(":")[0]
        if re.search(rf"bra(\.uni)?\s+{re.escape(label)};", block):
            yield block
