"""A student of half its teacher's depth, then int8: python examples/distil_half.py TEACHER TRAIN.csv OUT

TEACHER is a sequence classifier; TRAIN.csv has the columns text and label, whose values are its classes.
"""

from __future__ import annotations

import sys

from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from distilbert_fast import DistillationArguments, DistillationTrainer, quantize_model, student_from_teacher


def main(source: str, file: str, output: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    teacher = AutoModelForSequenceClassification.from_pretrained(source).eval()
    number = {name: at for at, name in teacher.config.id2label.items()}

    def encoded(row: dict) -> dict:
        return {**tokenizer(row["text"], truncation=True), "labels": number[row["label"]]}

    rows = Dataset.from_csv(file)
    rows = rows.map(encoded, remove_columns=rows.column_names)
    student, report = student_from_teacher(teacher)  # every other layer
    print(report)
    arguments = DistillationArguments(f"{output}/checkpoints", temperature=2.0, alpha=0.5, num_train_epochs=1)
    trainer = DistillationTrainer(student, teacher, arguments, rows, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint="auto")
    quantize_model(trainer.model, calibration=rows_as_text(file), tokenizer=tokenizer).save_pretrained(f"{output}/int8")
    tokenizer.save_pretrained(f"{output}/int8")


def rows_as_text(file: str, count: int = 256) -> list[str]:
    return Dataset.from_csv(file)["text"][:count]


if __name__ == "__main__":
    main(*sys.argv[1:])
