"""What must be the same for a training to be resumed, as JSON values: arguments, model and data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

_ARGUMENTS = (
    "per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps learning_rate "
    "lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio optim optim_args adam_beta1 adam_beta2 "
    "adam_epsilon weight_decay max_grad_norm label_smoothing_factor neftune_noise_alpha bf16 fp16 seed data_seed "
    "train_sampling_strategy group_by_length dataloader_drop_last world_size"
).split()
_CONFIG_IGNORED = ("transformers_version", "_name_or_path", "problem_type", "use_cache")
_WRITTEN_BY_SAVING = ("architectures", "dtype")  # into the config in memory: of the class and tensors named beside it


def describe_arguments(args: Any) -> dict[str, Any]:
    """The training arguments that shape the course of training. How often to log, evaluate and save may change."""
    return {f"args.{name}": getattr(args, name, None) for name in _ARGUMENTS}


def describe_model(model: Any, weights: bool = False) -> dict[str, Any]:
    """Class, settings and shapes of a model, with a digest of its weights if asked for; JSON types."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if weights:
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    config = model.config.to_diff_dict() if hasattr(model, "config") else {}
    return {
        "class": type(model).__name__,
        "config": {name: value for name, value in config.items() if name not in _CONFIG_IGNORED},
        "tensors": digest.hexdigest()[:16],
    }


def describe_dataset(dataset: Any) -> dict[str, Any] | None:
    """Length and the dataset's own fingerprint; or, where reading a row is repeatable, a digest of up to 64 rows."""
    if dataset is None or not hasattr(dataset, "__len__"):
        return None
    described: dict[str, Any] = {"rows": len(dataset)}
    if hasattr(dataset, "fingerprint"):
        return described | {"fingerprint": dataset.fingerprint}
    if hasattr(dataset, "with_format"):  # a datasets.Dataset: its stored rows, before any transform
        dataset = dataset.with_format(None)
    elif not isinstance(dataset, Sequence):
        return described
    rows = [dataset[i] for i in range(0, len(dataset), -(-len(dataset) // 64) or 1)]
    described["sample"] = hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
    return described


def as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As they will read back from JSON; what is None is left out, so that a setting may be added later."""
    given = {name: value for name, value in settings.items() if value is not None}
    return json.loads(json.dumps(given, default=str))


def changes(old: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two settings, in words; empty if nothing does."""
    return "; ".join(
        f"{name} was {json.dumps(old.get(name))}, is {json.dumps(now.get(name))}"
        for name in sorted({*old, *now})
        if _without_saving(old.get(name)) != _without_saving(now.get(name))
    )


def _without_saving(setting: Any) -> Any:
    """A setting, without what the first ``save_pretrained`` adds to the config that ``describe_model`` reads."""
    if not isinstance(setting, dict) or not isinstance(setting.get("config"), dict):
        return setting
    config = {name: value for name, value in setting["config"].items() if name not in _WRITTEN_BY_SAVING}
    return {**setting, "config": config}
