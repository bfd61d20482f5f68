"""Let a transformers model train on this package's kernels, with the same files and results."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound="PreTrainedModel")


def for_training(model: Model) -> Model:
    """The model itself, changed in place.

    A DistilBERT becomes the drop-in class of its name, which computes no padding (`modeling.distilbert`). Another
    encoder that the attention op knows gets that op (`modeling.attention_interface`). The rest stay as they are, and
    so does every parameter and what ``save_pretrained`` writes.
    """
    from distilbert_fast.modeling import distilbert
    from distilbert_fast.modeling.attention_interface import ENCODERS, IMPLEMENTATION

    if type(model) in distilbert.DROP_INS:
        distilbert.adopt(model)
    elif model.config.model_type in ENCODERS and type(model) not in distilbert.DROP_INS.values():
        model.set_attn_implementation(IMPLEMENTATION)
    return model
