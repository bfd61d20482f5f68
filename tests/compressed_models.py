"""Small models of every family, compressed in every way."""

from __future__ import annotations

import transformers
from tiny_models import padded_batch, tiny

from distilbert_fast import CodebookConfig, Int8Config, SparsityConfig, prune_connections, quantize_model
from distilbert_fast.modeling.quantizer import record_structure
from distilbert_fast.modeling.structure import LayerStructure, restructure

BATCH = padded_batch()
FAMILIES = ["DistilBert", "Bert", "Roberta"]


def made(family, head):
    return tiny(getattr(transformers, family + head), num_hidden_layers=3)


def pruned(model):
    """Whole; with fewer heads and neurons; and without any."""
    restructure(model.base_model, [LayerStructure((1, 2), 8), LayerStructure((), 5), LayerStructure((0, 1, 2), 0)])
    return record_structure(model)


FORMATS = {
    "int8": lambda model: quantize_model(model, Int8Config(heads=True)),
    "int8 in part": lambda model: quantize_model(model, Int8Config(modules_to_not_convert=["layer.0"])),
    "int8 and tables": lambda model: quantize_model(model, Int8Config(embeddings=True), [BATCH]),
    "codebook 256": lambda model: quantize_model(model, CodebookConfig(256)),
    "codebook 64": lambda model: quantize_model(model, CodebookConfig(64, "row", heads=True)),
    "codebook 16": lambda model: quantize_model(model, CodebookConfig(16, "group", 4)),
    "sparse": lambda model: prune_connections(model, SparsityConfig(0.8, scope="global")),
    "sparse and int8": lambda model: quantize_model(
        prune_connections(model, SparsityConfig(0.8)), Int8Config(modules_to_not_convert=["layer.0"])
    ),
    "pruned": pruned,
    "pruned and sparse": lambda model: prune_connections(pruned(model), SparsityConfig(0.5)),
    "pruned and int8": lambda model: quantize_model(pruned(model), Int8Config(embeddings=True)),
    "pruned and codebook 16": lambda model: quantize_model(pruned(model), CodebookConfig(16)),
    "pruned and codebook 64": lambda model: quantize_model(pruned(model), CodebookConfig(64, "group", 3)),
}
