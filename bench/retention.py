"""What a student of half its depth keeps of a teacher, and int8 of that: python -m bench.retention --data DIR -o OUT

For each task the public commands do all the work: `distilbert-fast distill` fine-tunes the BERT of the extra `demo` (6
layers, C=384) on the task and distils it into 3 layers; `distilbert-fast evaluate` judges both, also in int8.
A task that is there is not done again, and an interrupted one goes on. OUT/retention.json has what was found, and
OUT/retention.md the table of docs/results.md.

DIR holds SST-2's train.tsv and dev.tsv in sst2/, AG News's train.tsv in agnews/, QNLI's dev.tsv in qnli/, STS-B's
sts-train.csv and sts-dev.csv in stsb/, IMDb's train.csv in imdb/, WNUT-17's wnut17train.conll and emerging.dev.conll in
wnut17/. Of a task with one file, the rows whose first text has a hash that four divides are held out, about a fourth.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from bench.harness.machine import machine
from distilbert_fast.evaluation.report import as_json
from distilbert_fast.files.durable import write_file

MODELS = {"teacher": ("teacher", "fp32"), "student": ("student", "fp32"), "student, int8": ("student", "int8")}


@dataclass(frozen=True)
class Run:
    """A task: its files, how it is trained, and the metric that counts.

    Attributes:
        files: to train and to evaluate on; or one, of which a part is held out.
        key: which column of that one tells rows that belong together.
        rows: of the training file that are used.
    """

    title: str
    files: tuple[str, ...]
    metric: str
    rows: int
    max_length: int
    teacher_epochs: int
    epochs: int
    alpha: float = 0.9
    temperature: float = 4.0
    key: int = 0


RUNS = {
    "sst2": Run("SST-2", ("sst2/train.tsv", "sst2/dev.tsv"), "accuracy", 12000, 64, 2, 4),
    "stsb": Run("STS-B", ("stsb/sts-train.csv", "stsb/sts-dev.csv"), "spearmanr", 2500, 64, 2, 4),
    "entities": Run("WNUT-17", ("wnut17/wnut17train.conll", "wnut17/emerging.dev.conll"), "f1", 2000, 64, 3, 5),
    "qnli": Run("QNLI", ("qnli/dev.tsv",), "accuracy", 1500, 96, 2, 3, key=1),
    "imdb": Run("IMDb", ("imdb/train.csv",), "accuracy", 600, 128, 2, 3, key=1),
    "ag_news": Run("AG News", ("agnews/train.tsv",), "accuracy", 1500, 64, 2, 3),
}


def files(run: Run, data: Path, output: Path) -> tuple[Path, Path]:
    """The files to train and to evaluate on; those of a split are written first."""
    if len(run.files) == 2:
        return data / run.files[0], data / run.files[1]
    source = data / run.files[0]
    commas = source.suffix == ".csv"
    with open(source, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file)) if commas else [line.rstrip("\n").split("\t") for line in file]
    head = rows[:1] if "label" in rows[0] else []
    held = [xxhash.xxh3_64_intdigest(row[run.key].encode()) % 4 == 0 for row in rows]
    output.mkdir(parents=True, exist_ok=True)
    parts = output / f"train{source.suffix}", output / f"dev{source.suffix}"
    for part, wanted in zip(parts, (False, True), strict=True):
        chosen = head + [row for row, is_held in zip(rows, held, strict=True) if is_held is wanted and row not in head]
        with open(part, "w", newline="", encoding="utf-8") as file:
            if commas:
                csv.writer(file, lineterminator="\n").writerows(chosen)
            else:
                file.writelines("\t".join(row) + "\n" for row in chosen)
    return parts


def distill(name: str, run: Run, train: Path, dev: Path, output: Path, bf16: bool) -> list[str]:
    """The command that makes teacher and student."""
    kind = ["tokens"] if name == "entities" else ["task", "--task", name]
    options = {
        "data": train, "eval-data": dev, "max-train-rows": run.rows, "max-length": run.max_length,
        "teacher-epochs": run.teacher_epochs, "teacher-lr": 1e-4, "epochs": run.epochs, "lr": 3e-4,
        "alpha": run.alpha, "output": output,
    }  # fmt: skip
    if name != "stsb":  # squared errors have no temperature
        options["temperature"] = run.temperature
    given = [str(part) for option, value in options.items() for part in (f"--{option}", value)]
    return ["distill", *kind, *given, *(["--bf16"] if bf16 else [])]


def evaluate(name: str, run: Run, dev: Path, output: Path) -> list[str]:
    """The command that judges them."""
    models = [part for model in ("teacher", "student") for part in ("--model", str(output / model))]
    return ["evaluate", "--task", name, "--data", str(dev), *models, "--precision", "fp32,int8", "--json"]


def command(arguments: list[str]) -> str:
    """What a command of ours prints; it runs in a process of its own."""
    print("distilbert-fast", *arguments, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "distilbert_fast", *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"distilbert-fast {arguments[0]} ended with {done.returncode}")
    return done.stdout


def judged(name: str, run: Run, data: Path, output: Path, bf16: bool) -> dict[str, Any]:
    """Teacher, student and int8 of a task: n, the metric and its standard error of each."""
    record = output / "judged.json"
    if record.exists():
        return json.loads(record.read_text())
    train, dev = files(run, data, output)
    commands = [distill(name, run, train, dev, output / "models", bf16), evaluate(name, run, dev, output / "models")]
    command(commands[0])
    found = json.loads(command(commands[1]))
    results = {(Path(one["model"]).name, one["precision"]): one for one in found["results"]}
    values = {
        title: {"value": one["metrics"][run.metric], "error": one["standard_errors"].get(run.metric)}
        for title, one in ((title, results[key]) for title, key in MODELS.items())
    }
    content = {"n": results["student", "int8"]["n"], "metric": run.metric, "models": values, "commands": commands}
    write_file(record, as_json(content))
    return content


def table(found: dict[str, dict[str, Any]]) -> str:
    """The table of the documentation; all numbers in percent."""
    lines = ["| | metric | n | " + " | ".join(MODELS) + " | kept | kept, int8 |", "|---|---|--:|" + "--:|" * 5]
    kept: list[list[float]] = [[], []]
    means: dict[str, list[float]] = {title: [] for title in MODELS}
    for name, one in found.items():
        cells = []
        for title, model in one["models"].items():
            error = "" if model["error"] is None else f" ± {100 * model['error']:.1f}"
            cells.append(f"{100 * model['value']:.1f}{error}")
            means[title].append(100 * model["value"])
        values = [model["value"] for model in one["models"].values()]
        for place, value in enumerate(values[1:]):
            kept[place].append(100 * value / values[0])
        cells += [f"{part[-1]:.1f}%" for part in kept]
        lines.append(f"| {RUNS[name].title} | {one['metric']} | {one['n']} | " + " | ".join(cells) + " |")
    last = [f"{statistics.mean(part):.1f}" for part in means.values()]
    whole = statistics.mean(means["teacher"])
    last += [f"{100 * statistics.mean(means[title]) / whole:.1f}%" for title in [*MODELS][1:]]
    lines.append("| **mean** | | | " + " | ".join(last) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT")
    parser.add_argument("--tasks", default=",".join(RUNS), metavar="LIST", help="with commas between")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16")
    given = parser.parse_args()
    found = {}
    for name in given.tasks.split(","):
        found[name] = judged(name, RUNS[name], given.data, given.output / name, given.bf16)
        write_file(given.output / "retention.md", table(found).encode())
        write_file(given.output / "retention.json", as_json({"machine": machine(), **found}))
    print(table(found), end="")


if __name__ == "__main__":
    main()
