"""What a student was made of, for people to read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class StudentReport:
    """What a student was made of; ``print(report)`` shows it.

    Attributes:
        teacher, student: class names.
        num_layers: depth of the student.
        layers: the teacher's layer that each layer of the student starts from; empty if it starts at random.
        copied: each tensor of the student and where it comes from.
        left_out: tensors of the teacher that the student has no place for, whole layers as one entry.
        notes: in what the student differs from its teacher beyond depth.
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


def by_layer(names: Iterable[str]) -> list[str]:
    """Sorted, the tensors of one layer as one entry."""
    entries = {re.sub(r"(\.layer\.\d+)\..*", r"\1", name) for name in names}
    return sorted(
        entries, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    )
