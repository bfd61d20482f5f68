"""A student made from the layers of a BERT, RoBERTa or DistilBERT teacher: a DistilBERT, or one of RoBERTa's shape.

Sanh, Debut, Chaumond, Wolf: DistilBERT, arXiv:1910.01108, which starts the student from every other layer. Two things
that the original drops are kept: token_type[0], folded into the position embeddings, and the teacher's head.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from distilbert_fast.modeling.architectures import (
    DISTILBERT,
    ELECTRA,
    ROBERTA,
    WITHOUT_WEIGHTS,
    Architecture,
    first_position,
    head_of,
    longest_sequence,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

OP = "student_from_teacher"
_ARCHITECTURES = {"distilbert": DISTILBERT, "roberta": ROBERTA}
_STUDENT_EPS = 1e-12  # of every LayerNorm of the DistilBERT architecture, which has no setting for it


@dataclass(frozen=True)
class StudentReport:
    """What a student was made of; ``print(report)`` shows it.

    Attributes:
        teacher, student: class names.
        num_layers: depth of the student.
        layers: the teacher's layer from which each layer was copied; empty if the student starts at random.
        copied: each tensor of the student and where it comes from.
        left_out: tensors of the teacher that the student has no place for, whole layers as one entry.
        notes: how the student differs from its teacher, apart from depth.
        teacher_parameters, student_parameters: counts, shared tensors counted once.
    """

    teacher: str
    student: str
    num_layers: int
    layers: tuple[int, ...]
    copied: Mapping[str, str]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    teacher_parameters: int
    student_parameters: int

    def __str__(self) -> str:
        share = self.student_parameters / self.teacher_parameters
        lines = [
            f"{self.student} of {self.num_layers} layers from {self.teacher}",
            f"parameters: {self.teacher_parameters:,} -> {self.student_parameters:,} ({share:.0%})",
        ]
        rows: dict[str, str] = {}
        for name, source in self.copied.items():
            stem, inside, _ = name.partition(".layer.")
            if inside:  # a layer is one row
                place = name.removeprefix(stem + inside).split(".")[0]
                rows[f"{stem}{inside}{place}"] = f"layer {self.layers[int(place)]}"
            else:
                rows[name] = source
        width = max(map(len, rows), default=0)
        copied = [f"{name:<{width}}  <- {source}" for name, source in rows.items()]
        for title, entries in (("copied:", copied), ("left out:", self.left_out), ("differs:", self.notes)):
            lines += [title, *(f"  {entry}" for entry in entries)] if entries else []
        return "\n".join(lines)


def student_from_teacher(
    teacher: PreTrainedModel,
    num_layers: int | None = None,
    layers: Sequence[int] | None = None,
    architecture: str = "distilbert",
    hidden_size: int | None = None,
    num_heads: int | None = None,
    intermediate_size: int | None = None,
) -> tuple[PreTrainedModel, StudentReport]:
    """Make a student from the tensors of a teacher.

    Args:
        teacher: a transformers DistilBERT, BERT, RoBERTa, XLM-RoBERTa, CamemBERT, Data2VecText, ELECTRA or ERNIE model:
            the base model or the one for masked LM, sequence or token classification, question answering or multiple
            choice. It is not changed.
        num_layers: depth of the student; by default half the teacher's.
        layers: which of the teacher's layers, ascending; by default ``num_layers`` of them, evenly spaced
            from the first to the last (0, 2, 4, 7, 9, 11 of 12).
        architecture: "distilbert", or "roberta" for a student of any other teacher than a DistilBERT that keeps what
            DistilBERT lacks: token types, the teacher's LayerNorm eps and a pooler with tanh.
        hidden_size, num_heads, intermediate_size: widths other than the teacher's. None of its tensors fits
            then, and the student starts at random (torch's generator). By default heads are as wide as the
            teacher's, and the feed-forward layer is as many times as wide as hidden_size.

    Returns:
        The student and a report of what was copied. The student has the teacher's head. A DistilBERT is this package's
        drop-in class, a RoBERTa is transformers' class with this package's attention; both are saved and loaded as
        transformers' own. It is in float32, in eval mode, on the teacher's device. No tensor of it is random, unless
        its width differs from the teacher's.

    How close it starts: with all layers a student of RoBERTa's shape is its teacher. So are a DistilBERT's hidden
    states, if the LayerNorms have eps 1e-12 (BERT's) and for token_type_ids of 0: DistilBERT knows no other. The
    heads for masked LM, token classification and question answering are exact too. Sequence classification and
    multiple choice are not: they pool through ReLU in DistilBERT, tanh in BERT, see ``_fit_pooler``, and GELU in
    ELECTRA, of which a student of RoBERTa's shape keeps all else.

    Raises:
        TypeError: the teacher is no such model.
        ValueError: depth, layers or widths out of range; a feature that the student lacks, by name.
    """
    family, head = _family_and_head(teacher)
    if architecture not in _ARCHITECTURES:
        raise ValueError(f"{OP}: architecture must be one of {', '.join(_ARCHITECTURES)}, got {architecture!r}")
    made = _ARCHITECTURES[architecture]
    if family is DISTILBERT is not made:
        raise ValueError(f"{OP}: architecture must be distilbert for a DistilBert teacher, got {architecture!r}")
    _refuse_features(teacher, family, made, head)
    widths = _widths(teacher, family, made, hidden_size, num_heads, intermediate_size)
    if widths and layers is not None:
        raise ValueError(f"{OP}: layers must be None for a student of another width, got {list(layers)}")
    chosen = _choose_layers(teacher.config.num_hidden_layers, num_layers, layers)

    config = _config(teacher, family, made, len(chosen))
    for name, width in widths.items():
        setattr(config, name, width)
    student = _model(teacher, made, head, config)
    if widths:
        student.to(teacher.device).eval()
        return student, _report(teacher, student, {}, family, made, ())
    sources = _sources(teacher, student, family, made, head, chosen)
    student.load_state_dict(_tensors(teacher, student, sources, family, made))
    student.to(teacher.device).eval()
    return student, _report(teacher, student, sources, family, made, chosen)


def _model(teacher: PreTrainedModel, made: Architecture, head: str, config: PreTrainedConfig) -> Any:
    import transformers

    from distilbert_fast.modeling.training import for_training

    # a base model has a pooler only if its teacher has one to copy
    pooled = getattr(teacher, "pooler", None) is not None
    poolers = {"add_pooling_layer": pooled} if made is ROBERTA and head == "Model" else {}
    return for_training(getattr(transformers, f"{made.prefix}{head}")(config, **poolers).float())


def _widths(
    teacher: PreTrainedModel,
    family: Architecture,
    made: Architecture,
    hidden: int | None,
    heads: int | None,
    inner: int | None,
) -> dict[str, int]:
    """The student's widths under the names of its config; empty if they are the teacher's."""
    old = teacher.config
    old_inner = old.hidden_dim if family is DISTILBERT else old.intermediate_size
    hidden = old.hidden_size if hidden is None else hidden
    heads = max(1, hidden * old.num_attention_heads // old.hidden_size) if heads is None else heads
    inner = hidden * old_inner // old.hidden_size if inner is None else inner
    for name, width in (("hidden_size", hidden), ("num_heads", heads), ("intermediate_size", inner)):
        if width < 1:
            raise ValueError(f"{OP}: {name} must be 1 or more, got {width}")
    if hidden % heads:
        raise ValueError(f"{OP}: num_heads must divide hidden_size {hidden}, got {heads}")
    if (hidden, heads, inner) == (old.hidden_size, old.num_attention_heads, old_inner):
        return {}
    name = "hidden_dim" if made is DISTILBERT else "intermediate_size"
    return {"hidden_size": hidden, "num_attention_heads": heads, name: inner}


def _family_and_head(teacher: PreTrainedModel) -> tuple[Architecture, str]:
    """Return the architecture and head of the transformers class that the teacher is or derives from."""
    known = head_of(type(teacher))
    if known is None:
        raise TypeError(
            f"{OP}: teacher must be a Bert, Roberta or DistilBert model, the base model or one "
            f"{', '.join(name for name in DISTILBERT.heads if name != 'Model')}, got {type(teacher).__name__}"
        )
    return known


def _refuse_features(teacher: PreTrainedModel, family: Architecture, made: Architecture, head: str) -> None:
    from distilbert_fast.modeling.encoder import refuse_embeddings

    config = teacher.config
    features: list[tuple[str, Any]] = [
        ("is_decoder", False),
        ("add_cross_attention", False),
        ("position_embedding_type", "absolute"),
    ]
    if family is ELECTRA and head == "ForMultipleChoice":
        features += [("summary_type", "first"), ("summary_use_proj", True), ("summary_activation", "gelu")]
    for feature, allowed in features:
        value = getattr(config, feature, allowed)
        if value != allowed:
            raise ValueError(f"{OP}: teacher.config.{feature} must be {allowed!r} for a {made.name}, got {value!r}")
    refuse_embeddings(teacher.base_model, OP, "teacher")


def _choose_layers(depth: int, num_layers: int | None, layers: Sequence[int] | None) -> tuple[int, ...]:
    if layers is not None:
        chosen = tuple(layers)
        ascending = all(low < high for low, high in pairwise(chosen))
        if not chosen or not ascending or chosen[0] < 0 or chosen[-1] >= depth:
            raise ValueError(f"{OP}: layers must be ascending, of 0 to {depth - 1}, got {list(chosen)}")
        if num_layers not in (None, len(chosen)):
            raise ValueError(f"{OP}: num_layers must be {len(chosen)}, as many as layers, got {num_layers}")
        return chosen
    count = max(depth // 2, 1) if num_layers is None else num_layers
    if not 1 <= count <= depth:
        raise ValueError(f"{OP}: num_layers must be 1 to {depth}, the teacher's depth, got {count}")
    return tuple(round(i * (depth - 1) / max(count - 1, 1)) for i in range(count))


def _config(teacher: PreTrainedModel, family: Architecture, made: Architecture, num_layers: int) -> PreTrainedConfig:
    old = teacher.config
    if family is made:
        config = copy.deepcopy(old)
        config.num_hidden_layers = num_layers
        return config

    from transformers import DistilBertConfig, RobertaConfig

    classifier_dropout = getattr(old, "classifier_dropout", None)
    common = {
        name: getattr(old, name)
        for name in (
            "vocab_size",
            "initializer_range",
            "pad_token_id",
            "bos_token_id",
            "eos_token_id",
            "tie_word_embeddings",
            "id2label",
            "label2id",
            "problem_type",
        )
    }
    if made is ROBERTA:
        return RobertaConfig(
            **common,
            max_position_embeddings=longest_sequence(old) + old.pad_token_id + 1,
            num_hidden_layers=num_layers,
            num_attention_heads=old.num_attention_heads,
            hidden_size=old.hidden_size,
            intermediate_size=old.intermediate_size,
            hidden_act=old.hidden_act,
            hidden_dropout_prob=old.hidden_dropout_prob,
            attention_probs_dropout_prob=old.attention_probs_dropout_prob,
            classifier_dropout=classifier_dropout,
            type_vocab_size=old.type_vocab_size,
            layer_norm_eps=old.layer_norm_eps,
        )
    return DistilBertConfig(
        **common,
        max_position_embeddings=longest_sequence(old),
        n_layers=num_layers,
        n_heads=old.num_attention_heads,
        dim=old.hidden_size,
        hidden_dim=old.intermediate_size,
        activation=old.hidden_act,
        dropout=old.hidden_dropout_prob,
        attention_dropout=old.attention_probs_dropout_prob,
        seq_classif_dropout=old.hidden_dropout_prob if classifier_dropout is None else classifier_dropout,
        qa_dropout=0.0,  # BERT has none there
    )


def _base_prefix(model: PreTrainedModel) -> str:
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def _sources(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    family: Architecture,
    made: Architecture,
    head: str,
    layers: Sequence[int],
) -> dict[str, str]:
    """Name of every tensor of the student: name of the teacher's tensor it is made from."""
    to, of = _base_prefix(student), _base_prefix(teacher)
    modules = {
        f"{to}embeddings.{name}": f"{of}embeddings.{name}"
        for name in ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm")
    }
    for place, layer in enumerate(layers):
        for part in made.layer.keys() - set(WITHOUT_WEIGHTS):
            name, source = (f"{kind.layers}.{i}.{kind.layer[part]}" for kind, i in ((made, place), (family, layer)))
            modules[to + name] = of + source
    for part, name in made.heads[head].items():
        modules[name] = family.heads[head].get(part, "")
    sources = {}
    for tensor in student.state_dict():
        module, _, parameter = tensor.rpartition(".")
        sources[tensor] = f"{modules[module]}.{parameter}"
    return sources


def _head_activation(family: Architecture, hidden_act: str) -> str:
    """The activation in the head for masked LM, which not every architecture reads from the config."""
    return "gelu" if family.vocabulary_activation is None else hidden_act


def _tensors(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    sources: Mapping[str, str],
    family: Architecture,
    made: Architecture,
) -> dict[str, torch.Tensor]:
    """The student's tensors, made from the teacher's."""
    have, before, first = teacher.state_dict(), first_position(student.config), first_position(teacher.config)
    tensors = {}
    for name, place in student.state_dict().items():
        source = sources[name]
        if source not in have:
            raise ValueError(f"{OP}: teacher must have a tensor {source} to become {name} of the student, got none")
        tensor = have[source]
        if name.endswith("position_embeddings.weight") and before != first:
            tensor = torch.nn.functional.pad(tensor[first:], (0, 0, before, 0))  # [P, C]
        if tensor.shape != place.shape or not tensor.is_floating_point():
            raise ValueError(
                f"{OP}: teacher's {source} must be a float tensor {list(place.shape)} to become {name} of "
                f"the student, got {str(tensor.dtype)[6:]} {list(tensor.shape)}"
            )
        tensors[name] = tensor.float()
    if family is not made is DISTILBERT:
        _fold_token_type(tensors, have)
        if family.pools_by == "tanh":
            _fit_pooler(tensors)
    return tensors


def _fold_token_type(tensors: dict[str, torch.Tensor], have: Mapping[str, torch.Tensor]) -> None:
    """word + position + token_type[0] = word + (position + token_type[0])"""
    (position,) = (name for name in tensors if name.endswith("position_embeddings.weight"))
    (token_type,) = (name for name in have if name.endswith("token_type_embeddings.weight"))
    tensors[position] = tensors[position] + have[token_type][0].float()


def _fit_pooler(tensors: dict[str, torch.Tensor]) -> None:
    """Adapt a head made for tanh, so that its answers after ReLU are close to the old ones.

        teacher: W tanh(z) + b
        student: W (relu(z + 1) − 1) + b = W max(z, −1) + b,    z = pooled states [C]

    max(z, −1) has the slope of tanh at 0 and its limit below, and for every z it is as near to tanh(z) as relu(z), or
    nearer. relu(z), which copying the numbers would give, has neither (it is near to GELU: ELECTRA's are copied). The
    1 goes into the bias before ReLU and out of the bias after it. On a BERT (C=384) fine-tuned on SST-2, with the same
    hidden states, the logits are off by 6% of their norm, against 46% with the numbers copied.
    """
    if "pre_classifier.bias" in tensors:
        tensors["pre_classifier.bias"] = tensors["pre_classifier.bias"] + 1
        tensors["classifier.bias"] = tensors["classifier.bias"] - tensors["classifier.weight"].sum(dim=1)


def _report(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    sources: Mapping[str, str],
    family: Architecture,
    made: Architecture,
    layers: tuple[int, ...],
) -> StudentReport:
    old = teacher.config
    copied = dict(sources)
    left_out = {name for name in teacher.state_dict() if name not in copied.values()}
    notes = []
    if not copied:
        config = student.config
        notes.append(
            f"starts at random: {config.hidden_size} wide with {config.num_attention_heads} heads, the teacher "
            f"{old.hidden_size} with {old.num_attention_heads}"
        )
    elif family is not made:
        (position,) = (name for name in copied if name.endswith("position_embeddings.weight"))
        before, first = first_position(student.config), first_position(old)
        if before != first:
            copied[position] = (f"{before} rows of 0, " if before else "") + copied[position]
            copied[position] += f"[{first}:]" if first else ""
        if made is DISTILBERT:
            notes += _note_differences(teacher, position, copied, left_out)
        notes += _note_pooler(family, made, copied)
        acts = [_head_activation(kind, old.hidden_act) for kind in (made, family)]
        if acts[0] != acts[1] and type(student).__name__.endswith("ForMaskedLM"):
            notes.append(f"the head's activation is {acts[0]}, the teacher's {acts[1]}")
    return StudentReport(
        teacher=f"{type(teacher).__name__} of {old.num_hidden_layers} layers",
        student=type(student).__name__,
        num_layers=student.config.num_hidden_layers,
        layers=layers,
        copied=copied,
        left_out=tuple(_by_layer(left_out)),
        notes=tuple(notes),
        teacher_parameters=teacher.num_parameters(),
        student_parameters=student.num_parameters(),
    )


def _by_layer(names: Iterable[str]) -> list[str]:
    """Sort the names, with one entry for all tensors of a layer."""
    entries = {re.sub(r"(\.layer\.\d+)\..*", r"\1", name) for name in names}
    return sorted(
        entries, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    )


def _note_differences(teacher: PreTrainedModel, position: str, copied: dict[str, str], left_out: set[str]) -> list[str]:
    """Return notes on what DistilBERT has no module for; record in ``copied`` and ``left_out`` what became of it."""
    old, notes = teacher.config, []
    (token_type,) = (name for name in left_out if name.endswith("token_type_embeddings.weight"))
    copied[position] += f" + {token_type}[0]"
    left_out.remove(token_type)
    if old.type_vocab_size > 1:
        left_out.add(f"{token_type}[1:]")
        notes.append("token types other than 0 are unknown to the student")
    if old.layer_norm_eps != _STUDENT_EPS:
        notes.append(f"LayerNorm eps is {_STUDENT_EPS:g}, the teacher's {old.layer_norm_eps:g}")
    return notes


def _note_pooler(family: Architecture, made: Architecture, copied: dict[str, str]) -> list[str]:
    """Return a note if the head pools in another way than the teacher's; record in ``copied`` how it was adapted."""
    if family.pools_by == made.pools_by or not any(f"{name}.weight" in copied for name in _POOLERS):
        return []
    if (family.pools_by, made.pools_by) != ("tanh", "relu"):
        return [f"pools through {made.pools_by}(z) where the teacher has {family.pools_by}(z)"]
    copied["pre_classifier.bias"] += " + 1"
    copied["classifier.bias"] += f" - {copied['classifier.weight']}.sum(dim=1)"
    return ["pools through relu(z + 1) - 1 where the teacher has tanh(z)"]


_POOLERS = {
    made.heads[head]["pooler"]
    for made in _ARCHITECTURES.values()
    for head in ("ForSequenceClassification", "ForMultipleChoice")
}
