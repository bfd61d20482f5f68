"""Custom-kernel performance engine for DistilBERT-style models.

Every public name is listed here with the module that defines it and loads when it is first used, so that
``import distilbert_fast`` costs next to nothing beside ``import torch``. The import also makes
``attn_implementation="distilbert_fast"`` and our int8 checkpoints known to transformers, whichever of the two is
imported first.
"""

from __future__ import annotations

import importlib
from typing import Any

from distilbert_fast.modeling import register_on_import

_HOME = {
    # ops
    "attention": "ops.attention",
    "codebook_linear": "ops.codebook_linear",
    "cosine_loss": "ops.cosine_loss",
    "embedding": "ops.embedding",
    "embedding_quantize": "ops.embedding",
    "int8_linear": "ops.int8_linear",
    "kl_div": "ops.kl_div",
    "layer_norm": "ops.layer_norm",
    "layer_norm_quantize": "ops.layer_norm",
    "linear": "ops.linear",
    "linear_kl_div": "ops.linear_kl_div",
    "linear_topk_kl_div": "ops.linear_topk_kl_div",
    "padded_attention": "ops.attention",
    "quantize": "ops.quantize",
    # where they run
    "BackendError": "backends",
    "backend": "backends",
    # models
    "Engine": "engine.engine",
    "DistilBertForMaskedLM": "modeling.distilbert",
    "DistilBertForMultipleChoice": "modeling.distilbert",
    "DistilBertForQuestionAnswering": "modeling.distilbert",
    "DistilBertForSequenceClassification": "modeling.distilbert",
    "DistilBertForTokenClassification": "modeling.distilbert",
    "DistilBertModel": "modeling.distilbert",
    "Explanation": "modeling.accelerator",
    "CodebookConfig": "modeling.compression_config",
    "Int8Config": "modeling.compression_config",
    "explain": "modeling.accelerator",
    "number_layers": "modeling.attention_interface",
    "optimize": "modeling.optimize",
    "pack_encoder": "modeling.optimize",
    "Predictor": "serving.predictor",
    # data, compression and distillation
    "PruningConfig": "compression.structure",
    "PruningReport": "compression.structure",
    "SparsityCallback": "compression.connections",
    "SparsityConfig": "compression.connections",
    "prune_connections": "compression.connections",
    "prune_model": "compression.structure",
    "prepare_qat": "compression.qat",
    "quantize_model": "compression.quantize",
    "sensitivity": "compression.sensitivity",
    "CachedTeacher": "distillation.teachers.cache",
    "DistillationArguments": "distillation.arguments",
    "DistillationTrainer": "distillation.trainer",
    "MlmObjective": "distillation.objectives.mlm",
    "QaObjective": "distillation.objectives.task",
    "TaskObjective": "distillation.objectives.task",
    "MaskedDataset": "data.masking",
    "Masking": "data.masking",
    "load_corpus": "data.corpus",
    "pad_collator": "data.masking",
    "ModelTeacher": "distillation.teachers.model",
    "build_cache": "distillation.teachers.build_cache",
    "student_from_teacher": "distillation.student",
    "demo": "jobs.demo",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("distilbert-fast")
    if name not in _HOME:
        raise AttributeError(f"module 'distilbert_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"distilbert_fast.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


register_on_import()
