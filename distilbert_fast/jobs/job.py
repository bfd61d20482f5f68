"""What a distillation is done on. A job knows its data, the head of its models, how to judge a model, and which
students are worth comparing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from distilbert_fast.evaluation.speed import Batch


@dataclass(frozen=True)
class Variant:
    """A student to train: as the recipe says, or without a part of it, for comparison.

    Attributes:
        name: of its directory.
        title: its name in tables.
        objective: settings of `DistillationArguments` in place of the recipe's.
        random: starts at random instead of from the teacher's layers.
    """

    name: str
    title: str
    objective: Mapping[str, Any] = field(default_factory=dict)
    random: bool = False


class Metric(NamedTuple):
    """A number by which models are judged; ``share``: shown as a percentage."""

    name: str
    title: str
    share: bool = False


STUDENT = Variant("student", "distilled")
LABELS_ALONE: Mapping[str, Any] = {"alpha": 0.0}


class Job(ABC):
    """The defaults are those of a task with labels.

    Attributes:
        kind: the objective of `DistillationArguments`: "mlm", "task" or "qa".
        name: its name in commands, directories and reports.
        head: of the models, as in `load_with_head`.
        max_length: tokens of a row.
        streaming: rows come from a stream, which restarts when exhausted and whose length is unknown.
        regression: labels are numbers.
        teacher_epochs: passes over the rows that train a teacher without such a head.
        untaught: objective settings of a model that is trained without a teacher.
        variants: students to compare; STUDENT comes first.
        tokenizer, train_rows, collator: set by `prepare`: the rows to train on, and what makes batches of them.
    """

    kind: str
    name: str
    head: str
    max_length: int
    streaming = False
    regression = False
    teacher_epochs = 3.0
    untaught = LABELS_ALONE
    variants: tuple[Variant, ...] = (
        STUDENT,
        Variant("without-teacher", "fine-tuned without a teacher", LABELS_ALONE),
        Variant("random-init", "random start", random=True),
    )
    tokenizer: Any
    train_rows: Any
    collator: Any

    @property
    def config(self) -> Mapping[str, Any]:
        """Settings of the teacher's config that its checkpoint need not have, such as its classes."""
        return {}

    @property
    @abstractmethod
    def metrics(self) -> tuple[Metric, ...]:
        """By which models are judged; the first is the most important one."""

    @property
    @abstractmethod
    def legend(self) -> str:
        """Sentences that explain the metrics to a reader."""

    def match_classes(self, classes: Sequence[str], kept: bool) -> None:  # noqa: B027  # some jobs have no classes
        """Number the labels as the teacher does, before all else; ``kept``: a head that it has stays as it is."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The data, for reports, with their "name". All that decides the result is among them."""

    @abstractmethod
    def prepare(self, tokenizer: Any, directory: Path) -> None:
        """Make the rows to train and evaluate on; ``directory``/corpus holds what later runs can use again."""

    @abstractmethod
    def evaluate(self, model: Any, teacher: Any) -> dict[str, float]:
        """`metrics` of a model by name; those that compare it with its teacher only if there is one."""

    def timed(self, model: Any) -> Any:
        """The part of a model whose speed is measured."""
        return model

    @abstractmethod
    def batches(self, size: int, rows: int) -> Sequence[Batch]:
        """Evaluation rows as inputs of `timed`, padded to the longest of each batch."""
