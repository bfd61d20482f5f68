"""What `distilbert-fast predict` reaches beside the engine alone: python -m bench.predict [--megabytes 1000]

rate    rows a second of the whole command (reading, tokenizing, computing, writing), and of the engine alone on the
        same rows, tokenized before: the share that the command reaches
memory  resident and peak memory after every 100,000 rows

The rows are sentences of one to many words in JSONL with an id; the model is a BERT of that many layers and that width
with random weights, or the one given, as a classifier.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from bench.harness.machine import machine, status_bytes
from bench.peers.models import minilm
from distilbert_fast import Predictor
from distilbert_fast.jobs.predict import predict
from distilbert_fast.jobs.predict_input import WINDOW_ROWS

EVERY = 100_000  # rows between two looks at the memory


def model(path: Path, layers: int, hidden: int) -> Path:
    """A classifier of that shape, with the vocabulary of a real model."""
    body = minilm(path / "bodies")
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 4 * hidden}
    labels = {0: "negative", 1: "positive"}  # Infinity takes a model whose labels have no names for a reranker
    config = transformers.BertConfig(num_attention_heads=max(1, hidden // 32), id2label=labels, **sizes)
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(path / "model")
    transformers.AutoTokenizer.from_pretrained(body).save_pretrained(path / "model")
    return path / "model"


def write_rows(path: Path, megabytes: float, words: int, vocabulary: list[str], carried: int = 0) -> int:
    """Write rows of 1 to 2 · words - 1 words, and so many characters beside them, until the file is so large; return
    how many."""
    draw = random.Random(0)
    left, count = int(megabytes * 1e6), 0
    with path.open("w") as file:
        while left > 0:
            text = " ".join(draw.choices(vocabulary, k=draw.randint(1, 2 * words - 1)))
            left -= file.write(json.dumps({"id": count, "text": text, "carried": "x" * carried}) + "\n")
            count += 1
    return count


def alone(predictor: Predictor, path: Path, rows: int) -> float:
    """Rows a second of the engine, on the first rows, tokenized before, in the same windows."""
    with path.open() as file:
        texts = [json.loads(line)["text"] for line in islice(file, rows)]
    windows = [predictor.encode(texts[at : at + WINDOW_ROWS]) for at in range(0, len(texts), WINDOW_ROWS)]
    predictor.compute(windows[0][:64])
    start = time.perf_counter()
    for window in windows:
        predictor.compute(window)
    return len(texts) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=2, help="of the input")
    parser.add_argument("--words", type=int, default=20, help="of a row, in the mean")
    parser.add_argument("--carried", type=int, default=0, help="characters of a column that is carried through")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--rounds", type=int, default=3, help="turns of both, of which the best counts; 0: memory alone"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory(prefix="bench-predict-") as name:
        place = Path(name)
        source = place / "rows.jsonl"
        checkpoint = model(place, given.layers, given.hidden)
        vocabulary = [word for word in transformers.AutoTokenizer.from_pretrained(checkpoint).vocab if word.isalpha()]
        rows = write_rows(source, given.megabytes, given.words, vocabulary, given.carried)
        memory: list[tuple[int, float, float]] = []

        def look(totals: Mapping[str, Any]) -> None:
            if totals["rows"] // EVERY > len(memory) or totals["rows"] == rows:
                memory.append((totals["rows"], *(status_bytes(field) / 2**20 for field in ("VmRSS", "VmHWM"))))

        how = {"precision": given.precision, "max_length": given.max_length, "overwrite": True}
        runs, engine = [], []
        for turn in range(max(given.rounds, 1)):
            memory.clear()
            runs.append(predict(checkpoint, source, place / "answers.jsonl", each_shard=look, **how))
            if given.rounds:
                predictor = Predictor.load(checkpoint, precision=given.precision, max_length=given.max_length)
                engine.append(alone(predictor, source, rows))
            print(f"turn {turn + 1}: {runs[-1]['rows_per_second']:.0f} rows/s, alone {engine[-1:]}", flush=True)
    console = Console()
    best = max(run["rows_per_second"] for run in runs)
    console.print(f"{rows:,} rows, {runs[0]['tokens'] / rows:.1f} tokens each; {machine()}", highlight=False)
    if engine:
        console.print(f"predict {best:,.0f} rows/s, the engine alone {max(engine):,.0f}: {best / max(engine):.3f}")
    table = Table("rows", "resident, MiB", "peak, MiB")
    for count, resident, peak in memory:
        table.add_row(f"{count:,}", f"{resident:.0f}", f"{peak:.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
