"""`kernels` is Hugging Face's package, which transformers imports: ours must never be taken for it."""

from __future__ import annotations

import sys

import pytest
from install.commands import ROOT, succeed

# Stands for whatever transformers imports from the real package: a class, a decorator, an enumeration.
STAND_IN = """
class _Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __or__(cls, other):
        return cls


class Anything(metaclass=_Anything):
    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, decorated=None, *args, **kwargs):
        return decorated


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything
"""

PROGRAM = """
import sys
import transformers
from transformers import DistilBertModel
from transformers.utils import is_kernels_available
import distilbert_fast.kernels.kl_div

found = sys.modules.get("kernels")
print(is_kernels_available(), getattr(found, "__file__", None))
print(distilbert_fast.__file__)
model = DistilBertModel(transformers.DistilBertConfig(vocab_size=9, dim=8, hidden_dim=8, n_layers=1, n_heads=2))
print(type(model).__name__)
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    from transformers.utils import import_utils

    folder = tmp_path_factory.mktemp("stand_in")
    (folder / "kernels").mkdir()
    (folder / "kernels/__init__.py").write_text(STAND_IN)
    version = getattr(import_utils, "KERNELS_MIN_VERSION", "0.10.2")  # transformers ignores an older one
    (folder / f"kernels-{version}.dist-info").mkdir()
    (folder / f"kernels-{version}.dist-info/METADATA").write_text(
        f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n"
    )
    return folder


def imported(built, cwd, *path) -> list[str]:
    """What PROGRAM prints, run in cwd with the wheel's installation and `path` first on the import path."""
    places = ":".join(map(str, (built.site, *path)))
    return succeed(sys.executable, "-W", "ignore", "-c", PROGRAM, cwd=cwd, PYTHONPATH=places).splitlines()[-3:]


@pytest.mark.parametrize("place", ["checkout", "elsewhere"])
def test_beside_hugging_faces_kernels(built, stand_in, tmp_path, place):
    cwd = ROOT if place == "checkout" else tmp_path
    available, ours, model = imported(built, cwd, stand_in)
    assert available == f"True {stand_in}/kernels/__init__.py"
    assert ours == f"{cwd if place == 'checkout' else built.site}/distilbert_fast/__init__.py"
    assert model == "DistilBertModel"


@pytest.mark.parametrize("place", ["checkout", "elsewhere"])
def test_without_hugging_faces_kernels(built, tmp_path, place):
    from transformers.utils import is_kernels_available

    if is_kernels_available():
        pytest.skip("Hugging Face's kernels is installed here")
    available, _, model = imported(built, ROOT if place == "checkout" else tmp_path)
    assert available == "False None"
    assert model == "DistilBertModel"
