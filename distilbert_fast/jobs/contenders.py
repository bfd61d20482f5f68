"""Who takes part in `distilbert-fast compare`: how each model is made, written, read back and called.

Loads heavy libraries only inside functions: the start of a process is measured too.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilbert_fast.data.stsb_lengths import PairLengths

if TYPE_CHECKING:
    from torch import Tensor

ELMO, TRANSFORMERS, OURS = "torch", "transformers", "distilbert_fast"  # what runs a model
PRUNED, QUANTIZED, CODEBOOK = "half pruned, int8", "int8", "16 values a group"
REFERENCE = "bert-base"  # that the others take turns with
_ELMO_CONFIG, _ELMO_WEIGHTS = "elmo.json", "elmo.safetensors"

# What configs say that differs from transformers' defaults.
_BASE: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1},
    "xlnet": {"d_model": 768, "n_layer": 12, "n_head": 12, "d_inner": 3072},
    "distilbert": {},
}
_SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
_TINY: dict[str, dict[str, Any]] = {  # for tests
    "bert": _SMALL,
    "roberta": _SMALL,
    "xlnet": {"d_model": 64, "n_layer": 2, "n_head": 2, "d_inner": 128},
    "distilbert": {"n_layers": 2, "dim": 64, "n_heads": 2, "hidden_dim": 128},
}
SIZES = {"base": _BASE, "tiny": _TINY}


@dataclass(frozen=True)
class Contender:
    """A row of the comparison.

    Attributes:
        name: on the command line.
        family: transformers' name of the architecture, or "elmo".
        runs_on: of `ELMO`, `TRANSFORMERS` and `OURS`.
        precision: of `optimize`, or what was made of the model before.
    """

    name: str
    family: str
    runs_on: str
    precision: str = "fp32"

    @property
    def title(self) -> str:
        return f"{self.name.partition(':')[0]}, {self.runs_on}, {self.precision}"

    @property
    def takes(self) -> tuple[str, ...]:
        """The names by which `--model` may give its weights, the first that is given counts."""
        if self.family not in ("bert", "roberta", "distilbert"):
            return ()
        whole = () if self.precision == PRUNED else (self.name.partition(":")[0],)
        return (self.name, *whole) if self.precision in (PRUNED, CODEBOOK) else whole


CONTENDERS = {
    one.name: one
    for one in (
        Contender("elmo-bilstm", "elmo", ELMO),
        Contender(REFERENCE, "bert", TRANSFORMERS),
        Contender("roberta-base", "roberta", TRANSFORMERS),
        Contender("xlnet-base", "xlnet", TRANSFORMERS),
        Contender("distilbert-base", "distilbert", TRANSFORMERS),
        Contender("bert-base:fp32", "bert", OURS),
        Contender("bert-base:bf16", "bert", OURS, "bf16"),
        Contender("bert-base:int8", "bert", OURS, QUANTIZED),
        Contender("distilbert-base:fp32", "distilbert", OURS),
        Contender("distilbert-base:bf16", "distilbert", OURS, "bf16"),
        Contender("distilbert-base:fp16", "distilbert", OURS, "fp16"),
        Contender("distilbert-base:int8", "distilbert", OURS, QUANTIZED),
        Contender("distilbert-base:pruned", "distilbert", OURS, PRUNED),
        Contender("distilbert-base:codebook16", "distilbert", OURS, CODEBOOK),
    )
}


@dataclass(frozen=True)
class Made:
    """What is known of a contender before it is timed.

    Attributes:
        parameters: of the encoder, and of ELMo with its classifier's BiLSTM; those that pruning left.
        with_head: the same with the task head.
        file_bytes: of the weights as they are saved.
        flops: floating-point operations for a pair, a multiplication and an addition being two; what an int8 or a
            codebook's product does counts as if it were float.
    """

    parameters: int
    with_head: int
    file_bytes: int
    flops: int


def make(one: Contender, directory: Path, size: str, checkpoint: Path | None, pair: PairLengths) -> Made:
    """Write a contender's model into a directory: the checkpoint's, or one of random weights; FLOPs are of ``pair``.

    Raises:
        CheckpointError: a checkpoint that cannot be used.
        ValueError: one that is compressed where a contender of float weights is made.
    """
    import torch

    from distilbert_fast.evaluation.speed import file_bytes

    torch.manual_seed(0)
    model = _elmo(size) if one.family == "elmo" else _model(one, size, checkpoint)
    plain = _plain(model) if _is_compressed(model) else model
    body = [plain.elmo, plain.lstm] if one.family == "elmo" else [plain.base_model]
    parameters = sum(p.numel() for part in body for p in part.parameters())
    with_head = sum(p.numel() for p in plain.parameters())
    flops = _flops(one, plain, pair)
    directory.mkdir(parents=True, exist_ok=True)
    if one.family == "elmo":
        from safetensors.torch import save_model

        (directory / _ELMO_CONFIG).write_text(json.dumps(model.config.to_dict()))
        save_model(model, str(directory / _ELMO_WEIGHTS))
    else:
        _compressed(one, model).save_pretrained(directory)
        if checkpoint is not None:
            from distilbert_fast.modeling.loading import load_tokenizer, locate

            load_tokenizer(locate(checkpoint), "SequenceClassification").save_pretrained(directory)
    return Made(parameters, with_head, file_bytes(directory), flops)


def load_contender(one: Contender, directory: Path) -> Callable[[Mapping[str, Any]], Any]:
    """Read a model back and make it ready, as a user would: what then takes the batches of `batch_of`."""
    if one.family == "elmo":
        return _load_elmo(directory)
    from transformers import AutoModelForSequenceClassification

    model: Any = AutoModelForSequenceClassification.from_pretrained(directory, dtype="auto").eval()
    if one.runs_on == OURS:
        from distilbert_fast.modeling.optimize import optimize

        optimize(model, one.precision if one.precision in ("fp32", "bf16", "fp16") else None)
    return lambda batch: model(**batch).logits


def batch_of(one: Contender, pairs: Sequence[PairLengths], vocabulary: int, seed: int) -> Mapping[str, Any]:
    """Pairs of random words, padded to the longest: ids and mask [B, T], or of each sentence characters and lengths."""
    import torch

    g = torch.Generator().manual_seed(seed)

    def ends(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        from distilbert_fast.evaluation.elmo import CHARACTERS

        shape = len(lengths), max(lengths), CHARACTERS
        return torch.randint(1, 256, shape, generator=g), torch.tensor(lengths)

    if one.family == "elmo":
        return {
            "first": ends([max(1, pair.first) for pair in pairs]),
            "second": ends([max(1, pair.second) for pair in pairs]),
        }
    lengths = torch.tensor([pair.tokens for pair in pairs])
    ids = torch.randint(min(1000, vocabulary // 2), vocabulary, (len(pairs), int(lengths.max())), generator=g)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


def vocabulary(one: Contender, directory: Path) -> int:
    """How many ids a saved model knows."""
    return 0 if one.family == "elmo" else json.loads((directory / "config.json").read_text())["vocab_size"]


def _model(one: Contender, size: str, checkpoint: Path | None) -> Any:
    import transformers

    if checkpoint is not None:
        from distilbert_fast.modeling.loading import load_with_head

        given = json.loads((checkpoint / "config.json").read_text())["model_type"]
        if given != one.family:
            raise ValueError(f"expected a model of the type {one.family!r}, got {given!r}")
        model, _, _ = load_with_head(checkpoint, "SequenceClassification")
        if _is_compressed(model) and one.precision not in (PRUNED, CODEBOOK):
            raise ValueError("expected a model of float weights, got a quantized one")
        return model
    config = transformers.AutoConfig.for_model(one.family, num_labels=1, **SIZES[size][one.family])
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    if one.precision == PRUNED:
        _halve(model)
    return model


def _halve(model: Any) -> None:
    """Leave every layer half of its heads and neurons, as `prune` would write it, by their numbers alone."""
    from distilbert_fast.modeling.quantizer import record_structure
    from distilbert_fast.modeling.structure import LayerStructure, restructure, structure_of

    encoder = model.base_model
    restructure(encoder, [LayerStructure(heads[::2], ffn // 2) for heads, ffn in structure_of(encoder)])
    record_structure(model)


def _is_compressed(model: Any) -> bool:
    """Whether linear layers of a model hold something else than floats."""
    settings = getattr(model.config, "quantization_config", None)
    return settings is not None and not settings.is_float


def _plain(model: Any) -> Any:
    """A model with float weights of the same structure, to count what it has and does."""
    import copy

    import transformers

    from distilbert_fast.modeling.structure import restructure, structure_of

    config = copy.deepcopy(model.config)
    del config.quantization_config
    made = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    restructure(made.base_model, structure_of(model.base_model))
    return made


def _compressed(one: Contender, model: Any) -> Any:
    """The model as the contender's files hold it."""
    import torch

    from distilbert_fast.compression.quantize import quantize_model
    from distilbert_fast.modeling.compression_config import CodebookConfig, Int8Config

    if _is_compressed(model):
        return model
    if one.precision in (QUANTIZED, PRUNED):
        return quantize_model(model, Int8Config(embeddings=True))
    if one.precision == CODEBOOK:
        return quantize_model(model, CodebookConfig(16, "group", 16))
    return model.to({"bf16": torch.bfloat16, "fp16": torch.float16}.get(one.precision, torch.float32))


def _flops(one: Contender, model: Any, pair: PairLengths) -> int:
    """Of a call on one pair, by torch's counter, which knows neither oneDNN's LSTM nor all fused attention."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def counted(batch: Mapping[str, Any]) -> int:
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(**batch)
        return counter.get_total_flops()

    if one.family == "elmo":
        with warnings.catch_warnings(), torch.backends.mkldnn.flags(enabled=False):
            warnings.simplefilter("ignore")  # of TF32 and of LSTMs, whose form does not matter here
            return counted(batch_of(one, [pair], 0, 0))
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return counted(batch_of(one, [pair], model.config.vocab_size, 0))
    finally:
        model.set_attn_implementation(usual)


def _elmo(size: str) -> Any:
    from distilbert_fast.evaluation.elmo import ElmoClassifier, ElmoConfig

    tiny = {"filters": ((1, 4), (3, 8)), "hidden": 16, "projection": 6, "classifier_hidden": 5, "classifier_layer": 7}
    return ElmoClassifier(ElmoConfig(**tiny) if size == "tiny" else ElmoConfig()).eval()  # type: ignore[arg-type]


def _load_elmo(directory: Path) -> Callable[[Mapping[str, Any]], Any]:
    import torch
    from safetensors.torch import load_model

    from distilbert_fast.evaluation.elmo import ElmoClassifier, ElmoConfig

    with torch.device("meta"):
        model = ElmoClassifier(ElmoConfig.of(json.loads((directory / _ELMO_CONFIG).read_text()))).eval()
    model.to_empty(device="cpu")
    load_model(model, str(directory / _ELMO_WEIGHTS))
    return lambda batch: model(**batch)
