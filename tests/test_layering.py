"""Who may import whom (docs/design.md), read from the source: only downward, transformers only from modeling/ on."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "distilbert_fast"

# A room of the package and the rooms that it may import, itself aside: floor by floor, and none up. testing stands
# apart: it serves tests/ and bench/.
LAYERS = {"backends", "ops"}
MODELING = LAYERS | {"files", "layers", "embeddings", "sparse", "engine"}
DATA = MODELING | {"modeling", "runs"}
ABOVE = DATA | {"data"}
JOBS = ABOVE | {"compression", "distillation", "evaluation", "serving"}
MAY_IMPORT: dict[str, set[str]] = {
    "kernels": set(),
    "files": set(),
    "backends": {"_cpu", "_cuda", "_build_info"},
    "ops": {"backends", "kernels", "_cpu", "_cuda"},
    "layers": LAYERS,
    "embeddings": LAYERS,
    "sparse": LAYERS | {"layers"},
    "engine": LAYERS | {"layers", "embeddings", "sparse", "files"},
    "modeling": MODELING,
    "runs": {"files"},
    "data": DATA,
    "compression": ABOVE,
    "distillation": ABOVE,
    "evaluation": ABOVE,
    "serving": ABOVE,
    "jobs": JOBS,
    "cli": JOBS | {"jobs", ""},  # "": the package itself, for its version
    "__main__": {"cli"},
    "__init__": {"modeling"},  # only to have transformers told of us once it is imported
    "testing": set(),
}
# Other packages that the lower rooms may import, beside the standard library. From modeling/ on there is no limit.
THIRD_PARTY = {
    "kernels": {"torch", "triton"},
    "files": {"xxhash", "pandas", "filelock"},
    "backends": {"torch"},
    "ops": {"torch"},
    "layers": {"torch"},
    "embeddings": {"torch"},
    "sparse": {"torch"},
    "engine": {"torch", "safetensors"},
    "testing": {"torch"},
    "__init__": set(),
    "__main__": set(),
}
UNPICKLING = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "pickletools"}


def modules() -> Iterator[tuple[str, str, ast.Module]]:
    """Every module of the package: its file, the part it belongs to, its syntax tree."""
    for path in sorted([*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]):
        inside = path.relative_to(ROOT / PACKAGE if path.is_relative_to(ROOT / PACKAGE) else ROOT)
        part = inside.parts[0].removesuffix(".py")
        if part != "_build_info" and "__pycache__" not in inside.parts:
            yield str(path.relative_to(ROOT)), part, ast.parse(path.read_text())


def imports(file: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported, inside functions and by importlib.import_module too."""
    package = list(Path(file).with_suffix("").parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *(node.module or "").split(".")]).strip(".")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, arg.value) for arg in node.args if isinstance(arg, ast.Constant) and arg.value)


def breaches(file: str, part: str, tree: ast.Module) -> Iterator[str]:
    for line, name in imports(file, tree):
        top, _, rest = name.partition(".")
        if top == PACKAGE:
            target = rest.partition(".")[0]
            if target != part and target not in MAY_IMPORT[part]:
                yield f"{file}:{line}: {part} must not import {name}"
        elif top in ("tests", "bench", "kernels", "csrc"):
            yield f"{file}:{line}: {name} is not part of the package"
        elif part in THIRD_PARTY and top not in THIRD_PARTY[part] | sys.stdlib_module_names:
            yield f"{file}:{line}: {part} must not import {top}"


def test_imports_go_downward():
    held = list(modules())
    assert {part for _, part, _ in held} <= set(MAY_IMPORT), "a new part of the package: give it its place above"
    assert not [breach for module in held for breach in breaches(*module)]


@pytest.mark.parametrize(
    ("file", "source", "breach"),
    [
        ("distilbert_fast/ops/x.py", "from distilbert_fast.layers import unpad", "ops must not import distilbert_fast"),
        ("distilbert_fast/ops/x.py", "def f():\n    import transformers", "ops must not import transformers"),
        ("distilbert_fast/ops/x.py", "from ..modeling import y", "ops must not import distilbert_fast.modeling.y"),
        ("distilbert_fast/evaluation/x.py", "from ..distillation import y", "evaluation must not import"),
        ("distilbert_fast/modeling/x.py", "from distilbert_fast import kl_div", "modeling must not import"),
        ("distilbert_fast/layers.py", "importlib.import_module('distilbert_fast._cpu')", "layers must not import"),
        ("distilbert_fast/jobs/demo.py", "import kernels.kl_div", "kernels.kl_div is not part of the package"),
        ("distilbert_fast/ops/x.py", "from . import _check", None),
        ("distilbert_fast/ops/x.py", "from distilbert_fast import backends", None),
        ("distilbert_fast/modeling/x.py", "import transformers, distilbert_fast.layers", None),
    ],
)
def test_the_reader_sees(file, source, breach):
    part = Path(file).parts[1].removesuffix(".py")
    found = list(breaches(file, part, ast.parse(source)))
    assert len(found) == (breach is not None) and (breach or "") in "".join(found)


def test_nothing_is_unpickled():
    """No pickle module, no torch.load (weights_only or not), no numpy pickles."""
    found = []
    for file, _, tree in modules():
        found += [f"{file}:{line}: {name}" for line, name in imports(file, tree) if name.split(".")[0] in UNPICKLING]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                allowing = any(keyword.arg == "allow_pickle" for keyword in node.keywords)
                if re.search(r"(^|\.)(torch\.load|jit\.load|torch\.serialization\.\w+)$", name) or allowing:
                    found.append(f"{file}:{node.lineno}: {name}")
    assert not found


def test_no_flag_that_changes_arithmetic_or_needs_this_machine():
    """-ffast-math and its like flush subnormals for the whole process; -march=native runs on one machine."""
    banned = re.compile(r"f?fast-math|use_fast_math|-Ofast|-march=native|-mtune=native|unsafe-math|-ffinite-math")
    files = [ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "Makefile"]
    for folder in ("csrc", "kernels", PACKAGE):
        files += [path for path in (ROOT / folder).rglob("*.*") if path.suffix not in (".so", ".pyc")]
    texts = {path: path.read_text() for path in files if path.is_file()}
    assert not [str(path.relative_to(ROOT)) for path, text in texts.items() if banned.search(text)]


# Rooms that need an extra, by its name in pyproject.toml; fastapi and uvicorn bring starlette and pydantic.
OF_EXTRAS = {
    "serve": ("distilbert_fast/serving/http/", "distilbert_fast/jobs/serve.py"),
    "ray": ("distilbert_fast/jobs/ray_cluster.py", "distilbert_fast/jobs/serve_ray.py"),
}
BROUGHT = {"serve": {"starlette", "pydantic", "pydantic_core"}, "ray": set()}


def test_what_is_imported_is_declared():
    """Triton aside: torch brings it where it can be used, and backends.py looks whether it is there."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)[1]
    declared = {name.replace("-", "_") for name in re.findall(r'^ +"([\w-]+)', listed, re.MULTILINE)}
    used = set()
    for file, _, tree in modules():
        names = {name.split(".")[0] for _, name in imports(file, tree)}
        extra = next((one for one, places in OF_EXTRAS.items() if file.startswith(places)), None)
        if extra is not None:
            found = re.search(rf"^{extra} = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)[1]
            names -= BROUGHT[extra] | {name.replace("-", "_") for name in re.findall(r'"([\w-]+)', found)}
        used |= names
    named = {"sklearn": "scikit_learn"}  # by another name than they are imported by
    assert {named.get(name, name) for name in used} - sys.stdlib_module_names - {PACKAGE, "triton"} <= declared


def test_kernels_is_no_package():
    assert not (ROOT / "kernels/__init__.py").exists()
    assert (ROOT / PACKAGE / "kernels").resolve() == ROOT / "kernels"


def test_import_is_light():
    """`import distilbert_fast` and an op: nothing heavier than torch."""
    heavy = ("transformers", "datasets", "accelerate", "matplotlib", "sklearn", "scipy", "rich", "typer", "pandas")
    program = (
        "import sys, distilbert_fast\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
        "distilbert_fast.kl_div, distilbert_fast.attention, distilbert_fast.backend\n"
        f"print(*set({heavy!r}) & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True)
    assert (done.stdout, done.returncode) == ("\n", 0), done.stdout + done.stderr
