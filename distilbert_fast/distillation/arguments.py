"""The settings of a distillation, and the objective that they name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from distilbert_fast.distillation.objectives.mlm import MlmObjective, even_layer_map
from distilbert_fast.distillation.objectives.task import (
    MultiLabelObjective,
    Objective,
    QaObjective,
    RegressionObjective,
    TaskObjective,
    is_multi_label,
    is_regression,
)
from distilbert_fast.distillation.schedule import bounds, is_zero, plain
from distilbert_fast.distillation.teachers.model import TEACHER_PRECISIONS
from distilbert_fast.ops._check import refuse

if TYPE_CHECKING:
    from distilbert_fast.distillation.schedule import Scheduled
else:
    Scheduled = str  # what HfArgumentParser reads from a command line

OP = "DistillationArguments"

# Weights of the losses of "mlm", by the names that the original has for them.
_ALPHAS = {
    "kl": "alpha_ce",
    "mlm": "alpha_mlm",
    "cos": "alpha_cos",
    "mse": "alpha_mse",
    "hidden": "alpha_hidden",
    "relation": "alpha_relation",
}
# How metrics that are losses end, of which Trainer knows those in "loss".
_LOSSES = tuple(f"_{name}" for name in (*_ALPHAS, "ce"))


@dataclass
class DistillationArguments(TrainingArguments):
    """TrainingArguments, and what a student is trained for.

    temperature and the alphas are numbers, or follow a schedule over the steps of the run: "linear:2.0:1.0" or
    "cosine:2.0:1.0" goes from 2 to 1. For ``metric_for_best_model`` any loss may be named; less of it is better.

    Raises:
        ValueError: a setting out of range.
    """

    objective: str = field(
        default="task",
        metadata={
            "help": '"task": classification or regression; "qa": extractive answers; "mlm": masked language modelling.'
        },
    )
    temperature: Scheduled = field(
        default=2.0, metadata={"help": "τ > 0: teacher and student logits are divided by it in the KL divergence."}
    )
    alpha: Scheduled = field(
        default=0.5, metadata={"help": "task, qa: weight of the KL divergence, 0 to 1; the hard labels have 1 - alpha."}
    )
    alpha_ce: Scheduled = field(
        default=5.0, metadata={"help": "mlm: weight of the KL divergence to the teacher's vocabulary."}
    )
    alpha_mlm: Scheduled = field(default=2.0, metadata={"help": "mlm: weight of the cross-entropy of masked tokens."})
    alpha_cos: Scheduled = field(default=1.0, metadata={"help": "mlm: weight of 1 - cosine of the last hidden states."})
    alpha_mse: Scheduled = field(
        default=0.0, metadata={"help": "mlm: weight of the squared error of the vocabulary logits."}
    )
    alpha_hidden: Scheduled = field(
        default=0.0, metadata={"help": "mlm: weight of the loss of hidden states, layer by layer."}
    )
    alpha_relation: Scheduled = field(
        default=0.0, metadata={"help": "mlm: weight of the self-attention relations of the last layer."}
    )
    kd_positions: str = field(
        default="real", metadata={"help": 'mlm: the KL counts all "real" tokens, or only "masked" ones.'}
    )
    hidden_loss: str = field(default="mse", metadata={"help": 'mlm: "mse" or "cosine", for alpha_hidden.'})
    layer_map: str = field(
        default="",
        metadata={"help": 'mlm: "0:1,1:3,…", layers of student and teacher for alpha_hidden; "" spaces evenly.'},
    )
    relation_heads: int = field(default=0, metadata={"help": "mlm: heads for alpha_relation; 0 takes the teacher's."})
    teacher_precision: str = field(
        default="auto",
        metadata={
            "help": '"fp32", "bf16", "fp16" or "int8": of the engine that runs the teacher; "model": its own forward; '
            '"auto": the engine on a CPU, in the precision of the model.'
        },
    )
    teacher_cache: str = field(
        default="",
        metadata={"help": "mlm: directory that build_cache wrote; answers are read from it, no teacher runs."},
    )

    def __post_init__(self) -> None:
        best = self.metric_for_best_model
        if self.greater_is_better is None and best is not None and f"_{best}".endswith(_LOSSES):
            self.greater_is_better = False
        super().__post_init__()
        if self.objective not in ("task", "qa", "mlm"):
            refuse(OP, "objective", "one of task, qa, mlm", self.objective)
        if self.teacher_precision not in TEACHER_PRECISIONS:
            refuse(OP, "teacher_precision", f"one of {', '.join(TEACHER_PRECISIONS)}", self.teacher_precision)
        if self.teacher_cache and self.teacher_precision != "auto":
            refuse(OP, "teacher_precision", "auto with a teacher_cache", self.teacher_precision)
        for name in ("temperature", "alpha", *_ALPHAS.values()):
            value = getattr(self, name)
            try:
                low, high = bounds(value)
            except ValueError as error:
                raise ValueError(f"{OP}: {name} {error}") from None
            if name == "temperature" and not low > 0:
                refuse(OP, name, "finite and above 0", value)
            if name == "alpha" and not (low >= 0 and high <= 1):
                refuse(OP, name, "0 to 1", value)
            if not low >= 0:
                refuse(OP, name, "finite and 0 or more", value)
            setattr(self, name, plain(value))
        _pairs(self.layer_map)
        if self.relation_heads < 0:
            refuse(OP, "relation_heads", "0 or more", self.relation_heads)
        if self.label_smoothing_factor and self.objective != "task":
            refuse(OP, "label_smoothing_factor", f"0 for objective {self.objective}", self.label_smoothing_factor)


def objective_settings(args: DistillationArguments) -> dict[str, Any]:
    """The settings that the objective reads; "task" is left out, since it is the default."""
    of_mlm = (*_ALPHAS.values(), "kd_positions", "hidden_loss", "layer_map", "relation_heads")
    read = ("temperature", *(of_mlm if args.objective == "mlm" else ("alpha",)))
    objective = {} if args.objective == "task" else {"objective": args.objective}
    return objective | {name: getattr(args, name) for name in read}


def objective_of(args: DistillationArguments, student: Any, teacher: Any) -> Objective:
    """The objective that the settings ask for; settings that they leave open are taken from the models.

    Args:
        student: the transformers model to be trained.
        teacher: a transformers model, or None where there is none.
    """
    if args.objective == "qa":
        return QaObjective(args.temperature, args.alpha)
    if args.objective == "task":
        if is_regression(student) and (teacher is None or is_regression(teacher)):
            return RegressionObjective(args.alpha)
        if is_multi_label(student) and (teacher is None or is_multi_label(teacher)):
            if args.label_smoothing_factor:
                refuse(OP, "label_smoothing_factor", "0 for labels that do not exclude each other", "more")
            return MultiLabelObjective(args.temperature, args.alpha)
        return TaskObjective(args.temperature, args.alpha, args.label_smoothing_factor)
    # without a teacher model, only the student can tell
    example = (student if teacher is None else teacher).config
    even = even_layer_map(student.config.num_hidden_layers, example.num_hidden_layers)
    return MlmObjective(
        args.temperature,
        **{loss: getattr(args, alpha) for loss, alpha in _ALPHAS.items()},
        kd_positions=args.kd_positions,
        hidden_loss=args.hidden_loss,
        layer_map=_pairs(args.layer_map) or (() if is_zero(args.alpha_hidden) else even),
        relation_heads=args.relation_heads or example.num_attention_heads,
    )


def _pairs(text: str) -> tuple[tuple[int, int], ...]:
    try:
        pairs = [tuple(map(int, pair.split(":"))) for pair in text.split(",") if pair]
        return tuple((student, teacher) for student, teacher in pairs)
    except ValueError:
        refuse(OP, "layer_map", 'pairs such as "0:1,1:3"', repr(text))
