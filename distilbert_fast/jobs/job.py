"""In what distillations differ. A job knows its data, the head of its models, how good a model is, and which students
are worth comparing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from distilbert_fast.evaluation.speed import Batch


@dataclass(frozen=True)
class Variant:
    """A student to train: of the recipe, or of one that lacks something.

    Attributes:
        name: of its directory.
        title: what tables call it.
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
NOTHING: Mapping[str, Any] = {}
LABELS_ALONE: Mapping[str, Any] = {"alpha": 0.0}
TASK_VARIANTS = (
    STUDENT,
    Variant("without-teacher", "fine-tuned without a teacher", LABELS_ALONE),
    Variant("random-init", "random start", random=True),
)


def classes_of_head(names: Sequence[str]) -> dict[str, Any]:
    """The config of a head for classes of these names."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "ignore_mismatched_sizes": True,  # a head of others is one that is missing
    }


class Job(Protocol):
    @property
    def kind(self) -> str:
        """ "mlm", "task" or "qa": an objective of DistillationArguments."""

    @property
    def name(self) -> str:
        """What commands, directories and reports call it."""

    @property
    def head(self) -> str:
        """As in `load_with_head`."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Of the teacher, beyond its checkpoint's."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The first is what counts."""

    @property
    def legend(self) -> str:
        """What a reader of the metrics has to know, in a sentence or more."""

    @property
    def variants(self) -> tuple[Variant, ...]:
        """STUDENT comes first."""

    @property
    def untaught(self) -> Mapping[str, Any]:
        """The objective of a model that has no teacher."""

    @property
    def teacher_epochs(self) -> float:
        """For a teacher that has no head yet."""

    @property
    def max_length(self) -> int:
        """Tokens of a row."""

    @property
    def streaming(self) -> bool:
        """Whether its rows come from a stream, which restarts when exhausted and whose length is unknown."""

    def meet(self, classes: Sequence[str], kept: bool) -> None:
        """Reorder labels to match the teacher, before all else; ``kept``: a head that it has stays as it is."""

    def describe(self) -> dict[str, Any]:
        """The data, for reports; "name" among them. What decides the result is all here."""

    def prepare(self, tokenizer: Any, directory: Path) -> None:
        """Make the rows to train and evaluate on; what is worth keeping goes into ``directory``/corpus."""

    def rows(self) -> Any:
        """To train on."""

    def collator(self) -> Any: ...

    def evaluate(self, model: Any, teacher: Any) -> dict[str, float]:
        """`metrics` of a model by name; those that compare it with its teacher only if there is one."""

    def timed(self, model: Any) -> Any:
        """The part of a model whose speed is measured."""

    def batches(self, size: int, rows: int) -> Sequence[Batch]:
        """Real inputs for it, padded to the longest of each batch."""
