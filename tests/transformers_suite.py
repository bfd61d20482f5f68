"""pytest plugin: have transformers' own tests meet our code where they name transformers'.

    SUITE=drop-in python -m pytest -p transformers_suite tests/models/distilbert      # in a checkout of transformers

SUITE is "drop-in" (our classes under transformers' names), "optimized" (``eval()`` is followed by ``optimize``) or
"attention" (our attention under the name "sdpa").
"""

from __future__ import annotations

import os
import sys

import pytest
import transformers
from torch import nn
from transformers.models.distilbert.modeling_distilbert import DistilBertPreTrainedModel

from distilbert_fast import optimize
from distilbert_fast.modeling import attention_interface
from distilbert_fast.modeling import distilbert as ours


def drop_in() -> None:
    for name in ours.__all__:
        for place in ("transformers", "transformers.models.distilbert"):
            setattr(sys.modules[place], name, getattr(ours, name))  # which transformers itself may exchange


def optimized() -> None:
    def evaluate(self: DistilBertPreTrainedModel) -> DistilBertPreTrainedModel:
        nn.Module.eval(self)
        return self if self.device.type == "meta" else optimize(self)

    DistilBertPreTrainedModel.eval = evaluate


def attention() -> None:
    transformers.AttentionInterface.register("sdpa", attention_interface.attention_forward)
    transformers.AttentionMaskInterface.register("sdpa", attention_interface.attention_mask)


SUITES = {"drop-in": drop_in, "optimized": optimized, "attention": attention}


# It compares padded positions, which the engine leaves at 0, with those of a call that transformers computes itself.
LEFT_OUT = {"optimized": "test_inputs_embeds_matches_input_ids"}


def pytest_configure(config: pytest.Config) -> None:
    SUITES[os.environ["SUITE"]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if item.name != LEFT_OUT.get(os.environ["SUITE"])]
