"""How `distill` compresses the student while it trains it: connections that go, int8, or shared values.

The command line shows the defaults, so this file loads heavy libraries only inside functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distilbert_fast.jobs.job import Job

_ROWS, _BATCH = 256, 32  # of the training data, that decide which weights count more


@dataclass(frozen=True)
class StudentCompression:
    """Of a student in training; by default none.

    Attributes:
        sparsity: share of the weights of the encoder's linear layers that go, see `SparsityConfig`; 0: none.
        sparsity_method, sparsity_scope, sparsity_pattern: its method, scope and pattern.
        qat: "int8": float weights are trained that compute as int8 ones. "codebook": ones that share values. "values":
            the values that they share are trained alone, which weight has which is found once, at the start. "": none.
        codebook, group_size: how many values, and the rows in a row that share them; None: all rows of a layer do.
    """

    sparsity: float = 0.0
    sparsity_method: str = "magnitude"
    sparsity_scope: str = "layer"
    sparsity_pattern: str | None = None
    qat: str = ""
    codebook: int = 16
    group_size: int | None = None

    def __bool__(self) -> bool:
        return bool(self.sparsity or self.qat)

    def check(self, student: Any, job: Job) -> None:
        """Refuse settings that cannot be, or do not fit the student. Raises TypeError, ValueError."""
        from distilbert_fast.compression.connections import layers_of

        if self.qat not in ("", "int8", "codebook", "values"):
            raise ValueError(f"qat: expected int8, codebook or values, got {self.qat}")
        if self.sparsity and self.qat:
            raise ValueError(f"sparsity: expected 0 with qat {self.qat}, got {self.sparsity}")
        if self.qat == "values" and job.streaming:
            raise ValueError("qat: expected another than values for a corpus that is streamed, got values")
        if self.sparsity:
            layers_of(student, self._sparsity(), "distill")
        if self.qat:
            self._config()

    def callbacks(self) -> list[Any]:
        """Of the trainer."""
        from distilbert_fast.compression.connections import SparsityCallback

        return [SparsityCallback(self._sparsity())] if self.sparsity else []

    def begin(self, student: Any, job: Job) -> None:
        """Make the student what is trained."""
        from distilbert_fast.compression.qat import prepare_qat
        from distilbert_fast.compression.quantize import quantize_model

        if self.qat == "values":
            rows = [job.train_rows[i] for i in range(min(_ROWS, len(job.train_rows)))]
            parts = [job.collator(rows[i : i + _BATCH]) for i in range(0, len(rows), _BATCH)]
            names = ("input_ids", "attention_mask")
            quantize_model(student, self._config(), [{name: part[name] for name in names} for part in parts])
        elif self.qat:
            prepare_qat(student, self._config())

    def end(self, student: Any) -> None:
        """Make the student what it was trained as."""
        from distilbert_fast.compression.quantize import quantize_model

        if self.qat in ("int8", "codebook"):
            quantize_model(student, self._config())

    def _sparsity(self) -> Any:
        from distilbert_fast.compression.connections import SparsityConfig

        return SparsityConfig(self.sparsity, self.sparsity_method, self.sparsity_scope, self.sparsity_pattern)

    def _config(self) -> Any:
        from distilbert_fast.modeling.compression_config import CodebookConfig, Int8Config

        if self.qat == "int8":
            return Int8Config()
        return CodebookConfig(self.codebook, "tensor" if self.group_size is None else "group", self.group_size)
