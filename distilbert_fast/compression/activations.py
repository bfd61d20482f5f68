"""What the linear layers of a model read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from distilbert_fast.layers import is_token
from distilbert_fast.modeling.quantizer import Moments
from distilbert_fast.ops import _check


@torch.no_grad()
def moments(
    model: PreTrainedModel, names: Iterable[str], given: Iterable[Mapping[str, torch.Tensor]], caller: str
) -> dict[str, Moments]:
    """What the linear layers of these names read at the tokens of batches; the model is run in eval mode, as it is.

    Raises:
        ValueError: no token, or activations that are not finite.
    """
    sums: dict[str, tuple[torch.Tensor, torch.Tensor, int]] = {}
    real: torch.Tensor | None = None  # of the batch that is run, bool [B, T]
    latest: tuple[Any, Any] = None, None  # what query, key and value read is added up once

    def added_up(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        rows = x[real] if real is not None and x.shape[:-1] == real.shape else x.reshape(-1, x.shape[-1])
        rows = rows.float()  # [N, C]
        return rows.sum(0).double(), rows.square().sum(0).double(), len(rows)

    def see(name: str, x: torch.Tensor) -> None:
        nonlocal latest
        if latest[0] is not x:
            latest = x, added_up(x)
        sums[name] = tuple(map(sum, zip(sums.get(name, (0, 0, 0)), latest[1], strict=True)))  # type: ignore[assignment]

    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
        for name in names
    ]
    training = model.training
    try:
        model.eval()
        for batch in given:
            on_device = {name: x.to(model.device) for name, x in batch.items()}
            mask = on_device.get("attention_mask")
            real = None if mask is None else is_token(mask)
            model(**on_device)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    found = {name: Moments((a / n).float(), (b / n).float()) for name, (a, b, n) in sums.items() if n}
    if not found or not all(bool(part.isfinite().all()) for both in found.values() for part in both):
        expected = "batches with finite activations" if found else "at least one token"
        _check.refuse(caller, "calibration", expected, "others" if found else "none")
    return found
