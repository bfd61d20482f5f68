"""The model card of a model that was made from another one's weights, without training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData


def card(
    model: str, network: Any, form: str, made: str, tag: str, points: Sequence[str], command: str | None = None
) -> str:
    """README.md of a directory that holds ``network``.

    Args:
        model: directory or hub id of the model that it was made of.
        form: what it is now: "in int8".
        made: how it was made, as a participle: "Quantized".
        tag: the same as a tag of the hub.
        points: Markdown, a line each: sizes, and how it compares.
        command: what was called.
    """
    hub = model if model.count("/") == 1 and not model.startswith((".", "/")) else None
    data = ModelCardData(library_name="transformers", base_model=hub, tags=[tag, "distilbert_fast"])
    kind = type(network).__name__
    text = [
        f"# {kind} {form}",
        "",
        f"{made} from {model} with distilbert_fast{f' by `{command}`' if command else ''}.",
        "",
        *(f"- {point}" for point in points),
        "",
        "```python",
        "import distilbert_fast",
        f"from transformers import {kind}",
        "",
        f'model = distilbert_fast.optimize({kind}.from_pretrained("<this directory>"))',
        "```",
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(text) + "\n"))


def size_point(after: int, before: int) -> str:
    """How large the weights are, in bytes, and were."""
    return f"**Weights:** {after / 1e6:.1f} MB, {100 * after / before:.1f}% of {before / 1e6:.1f} MB"
