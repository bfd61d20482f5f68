"""What `distilbert-fast quantize` runs: a checkpoint in; int8, or shared values, with a model card out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from distilbert_fast.compression.agreement import Agreement, agreement_of, answers, has_answers
from distilbert_fast.compression.quantize import quantize_model
from distilbert_fast.data.text_sources import TextSource
from distilbert_fast.evaluation.speed import file_bytes
from distilbert_fast.files.durable import building, flush
from distilbert_fast.jobs.cards import card, size_point
from distilbert_fast.jobs.flow import save
from distilbert_fast.jobs.settings import RecipeError, config_of, refused
from distilbert_fast.layers import is_token
from distilbert_fast.modeling.architectures import head_of
from distilbert_fast.modeling.calibration import batches
from distilbert_fast.modeling.compression_config import FLOAT, SPARSE, CodebookConfig, Int8Config
from distilbert_fast.modeling.encoder import encoder_layers
from distilbert_fast.modeling.loading import load_with_head, locate, without_bars
from distilbert_fast.sparse import SparseLinear

JOB = "quantize"


class Fidelity(NamedTuple):
    """How a quantized model's results on texts compare with the float model's."""

    texts: int
    answers: Agreement | None  # of a model with a task head
    cosine: float | None  # the mean, of last hidden states of tokens, of one without

    def __str__(self) -> str:
        if self.answers is None:
            return f"mean cosine of hidden states {self.cosine:.5f} on {self.texts} texts"
        found = self.answers
        return f"{100 * found.share:.2f}% of {found.answers} answers the same, mean KL {found.kl:.2e} nats"


def quantize(
    model: str,
    output: Path,
    calibration: Path | None = None,
    config: Int8Config | CodebookConfig | None = None,
    budget: float | None = None,
    max_texts: int = 256,
    say: Callable[[str], None] = print,
    command: str | None = None,
) -> dict[str, Any]:
    """Quantize a checkpoint of a model that ``quantize_model`` takes.

    Args:
        model: directory or hub id of a float model.
        output: a directory that is not there yet.
        calibration: .txt (a text a line), .jsonl, .csv, .tsv or Parquet with a column text or sentence.
        config, budget: as for ``quantize_model``.
        max_texts: so many of ``calibration``, from its beginning.
        command: what was called, for the model card.

    Returns:
        "before_bytes", "after_bytes"; "float", names of the encoder's linear layers that were left so; "texts", "kl",
        "agreement" and "cosine", None where there is nothing to say.

    Raises:
        RecipeError: what a user can mend, by name.
        CheckpointError: a checkpoint that cannot be used.
        OSError: the disk is full or cannot be written.
    """
    if output.exists():
        raise RecipeError(f"{JOB}: output: {str(output)!r} is there already; choose another directory")
    if budget is not None and calibration is None:
        raise RecipeError(f"{JOB}: --budget needs --calibration: a file of texts to keep it on")
    if max_texts < 1:
        raise RecipeError(f"{JOB}: max_texts must be 1 or more, got {max_texts}")
    directory = locate(model)
    if not _is_float((read := config_of(directory)).get("quantization_config", {"format": 2})):
        raise RecipeError(f"{JOB}: model: {model!r} is quantized already")
    with refused(JOB):
        texts = _texts(calibration, max_texts) if calibration is not None else None
    network, tokenizer, _ = load_with_head(directory, _head(read, model))
    say(f"{model}: {type(network).__name__}, {_megabytes(before := file_bytes(directory))}")
    given = [] if texts is None else list(batches(texts, network, tokenizer, JOB))
    reference = copy.deepcopy(network) if given else None
    with refused(JOB):
        quantize_model(network, config, given or None, tokenizer, budget=budget)
    fidelity = None if reference is None else _compared(network, reference, given)
    inside = set(encoder_layers(network.base_model).modules())
    floats = [(name, module) for name, module in network.named_modules() if type(module) in (nn.Linear, SparseLinear)]
    left = [name for name, module in floats if module in inside]
    output.parent.mkdir(parents=True, exist_ok=True)
    with building(output) as partial, without_bars():
        save(JOB, partial, network, tokenizer)
        after = file_bytes(partial)
        text = _card(model, network, before, after, left, fidelity, command, config)
        (partial / "README.md").write_text(text, encoding="utf-8")
        flush(partial)
    say(f"{output}: {_megabytes(after)}, {100 * after / before:.1f}% of that")
    if left:
        say(f"linear layers of the encoder left float: {', '.join(left)}")
    say("not compared: no --calibration was given" if fidelity is None else f"compared: {fidelity}")
    return {
        "before_bytes": before,
        "after_bytes": after,
        "float": left,
        "texts": None if fidelity is None else fidelity.texts,
        "kl": fidelity and fidelity.answers and fidelity.answers.kl,
        "agreement": fidelity and fidelity.answers and fidelity.answers.share,
        "cosine": fidelity and fidelity.cosine,
    }


def _is_float(settings: dict[str, Any]) -> bool:
    """Whether a ``quantization_config`` says that all weights are floats, dense or sparse."""
    kinds = [settings.get("linear"), settings.get("embeddings"), *settings.get("linears", {}).values()]
    return "format" in settings and all(kind in (None, FLOAT, SPARSE) for kind in kinds)


def _head(config: dict[str, Any], model: str) -> str:
    """The head that a checkpoint was saved with, as ``load_with_head`` calls it; "" for none."""
    names = config.get("architectures") or ["?"]
    kind = getattr(transformers, str(names[0]), None)
    known = head_of(kind) if isinstance(kind, type) else None
    if known is None:
        raise RecipeError(f"{JOB}: model: {model!r} must be of a class that is known, got architectures {names}")
    return "" if known[1] == "Model" else known[1].removeprefix("For")


def _texts(path: Path, count: int) -> list[str]:
    opened = TextSource(path, None, "train", across_lines=False).open(streaming=True)
    rows = (row[opened.column] for row in opened.rows)
    found = list(islice((text for text in rows if text.strip()), count))
    if not found:
        raise ValueError(f"calibration: {str(path)!r} must hold at least one text, got none")
    return found


@torch.no_grad()
def _compared(network: Any, reference: Any, given: Sequence[Mapping[str, torch.Tensor]]) -> Fidelity:
    count = sum(len(batch["input_ids"]) for batch in given)
    if has_answers(network):
        parts = [agreement_of(answers(network, batch, JOB), answers(reference, batch, JOB)) for batch in given]
        return Fidelity(count, sum(parts[1:], parts[0]), None)
    cosines = []
    for batch in given:
        a, b = (model.base_model(**batch)[0][is_token(batch["attention_mask"])] for model in (network, reference))
        cosines.append(torch.cosine_similarity(a.double(), b.double(), dim=-1))
    return Fidelity(count, None, float(torch.cat(cosines).mean()))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB of weights"


def _card(
    model: str,
    network: Any,
    before: int,
    after: int,
    left: Sequence[str],
    found: Fidelity | None,
    command: str | None,
    config: Int8Config | CodebookConfig | None,
) -> str:
    tag, form, fitted = "int8", "in int8", "scales and biases were"
    if isinstance(config, CodebookConfig):
        tag, form, fitted = "codebook", f"with {config.values} shared values", "values were"
    points = [
        size_point(after, before),
        f"**Compared with the float model:** {found or 'not'}"
        + (f", which {fitted} fitted to ({found.texts} texts)" if found and found.answers else ""),
        f"**Linear layers of the encoder left float:** {', '.join(left) or 'none'}",
    ]
    return card(model, network, form, "Quantized", tag, points, command)
