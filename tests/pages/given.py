"""What the pages name: small models and files, in a directory in which their blocks run."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import demo_input
import torch
import transformers

from distilbert_fast import DistillationArguments

NAMED_ON_HUB = "distilbert-base-uncased-finetuned-sst-2-english"  # a directory of such a name is read instead


def make(folder: Path) -> Path:
    """Everything, into a folder that is there."""
    demo_input.bert(folder / "my-bert", max_position_embeddings=512)
    _classifiers(folder)
    _tables(folder)
    _answers(folder)
    _tags(folder)
    (folder / "corpus").mkdir()
    rows = demo_input.sentences(300, 7)
    (folder / "corpus/a.txt").write_text("".join(f"{text}\n" for text, _ in rows))
    return folder


def namespace(folder: Path) -> dict[str, Any]:
    """The names that python blocks use; each block gets its own models."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "my-classifier")
    texts = [text for text, _ in demo_input.sentences(24, 1)]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")

    def model() -> Any:
        return transformers.AutoModelForSequenceClassification.from_pretrained(folder / "my-classifier").eval()

    rows = [{**tokenizer(text), "labels": at % 2} for at, text in enumerate(texts)]
    return {
        **{"model": model(), "teacher": model(), "student": model(), "tokenizer": tokenizer, "name": "./my-bert"},
        **{"texts": texts, "sentences": texts, "dataset": datasets.Dataset.from_list(rows)},
        **{"rows": datasets.Dataset.from_list(rows), "arguments": DistillationArguments("sparse", max_steps=2)},
        **{"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]},
    }


def _classifiers(folder: Path) -> None:
    names = {0: "animal", 1: "tool"}
    labels = {"id2label": names, "label2id": {name: at for at, name in names.items()}}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "my-bert")
    kinds = {
        "my-classifier": (transformers.BertForSequenceClassification, labels),
        "my-sst2-bert": (transformers.BertForSequenceClassification, {}),
        "seed-1": (transformers.BertForSequenceClassification, labels),
        "seed-2": (transformers.BertForSequenceClassification, labels),
        "seed-3": (transformers.BertForSequenceClassification, labels),
        "my-qa-bert": (transformers.BertForQuestionAnswering, {}),
        "ner": (transformers.BertForTokenClassification, {"id2label": {0: "O", 1: "B-animal", 2: "B-tool"}}),
        "minilm": (transformers.BertModel, {}),
        "runs/cola/model": (transformers.BertForSequenceClassification, {}),
    }
    for seed, (name, (kind, options)) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        kind.from_pretrained(folder / "my-bert", **options).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    demo_input.bert(folder / "my-embedder", hidden_size=192, num_attention_heads=3)
    sizes = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 512}
    config = transformers.DistilBertConfig(vocab_size=len(tokenizer), **sizes)
    small = {
        NAMED_ON_HUB: transformers.DistilBertForSequenceClassification,
        "distilbert-base-uncased": transformers.DistilBertModel,
    }
    for name, kind in small.items():
        kind(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def _tables(folder: Path) -> None:
    for name, count, seed in (("train.tsv", 64, 0), ("dev.tsv", 32, 1)):
        demo_input.tsv(folder / name, count, seed)
    for name, count, seed in (("reviews.csv", 96, 2), ("test.csv", 32, 3), ("dev.csv", 32, 4)):
        rows = [f'"{text}",{label}\n' for text, label in demo_input.sentences(count, seed)]
        (folder / name).write_text("text,label\n" + "".join(rows))
    texts = [text for text, _ in demo_input.sentences(20, 5)]
    (folder / "new.csv").write_text("id,text\n" + "".join(f"{at},{text}\n" for at, text in enumerate(texts)))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "reviews.jsonl").write_text(lines)
    (folder / "news.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    datasets.Dataset.from_dict({"id": [*range(20)], "text": texts}).to_parquet(folder / "corpus.parquet")
    (folder / "SST-2").mkdir()
    for name, count in (("train", 64), ("dev", 24)):
        rows = [f"{text}\t{int(label == 'tool')}" for text, label in demo_input.sentences(count, count)]
        (folder / f"SST-2/{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    (folder / "glue_data/CoLA").mkdir(parents=True)
    rows = [f"gj04\t{at % 2}\t\t{text}\n" for at, text in enumerate(texts)]
    (folder / "glue_data/CoLA/dev.tsv").write_text("".join(rows))


def _answers(folder: Path) -> None:
    """SQuAD's files; every third question of version 2.0 has no answer."""
    for second in (False, True):
        questions = []
        for at, (context, _) in enumerate(demo_input.sentences(24, 6)):
            none = second and at % 3 == 0
            answers = [] if none else [{"text": context.split()[0], "answer_start": 0}]
            asked = {"id": str(at), "question": "the old cat", "answers": answers, "is_impossible": none}
            questions.append({"context": context, "qas": [asked]})
        content = {"version": "2", "data": [{"title": "t", "paragraphs": questions}]}
        version = "v2.0" if second else "v1.1"
        for split in ("train", "dev"):
            (folder / f"{split}-{version}.json").write_text(json.dumps(content))
    (folder / "answers.json").write_text(json.dumps({str(at): "cat" for at in range(24)}))


def _tags(folder: Path) -> None:
    for seed, name in enumerate(("eng.train", "eng.testa", "eng.testb")):
        demo_input.conll(folder / name, 32 if seed == 0 else 16, seed)
    shutil.copy(folder / "eng.testb", folder / "tagged.conll")
