"""The corpus of a distillation by masked language modelling: read, tokenized and packed once, then memory-mapped.

``load_corpus`` reads text with `datasets`, makes rows of it (packing.py) and keeps them as Arrow files in

    cache_dir/<fingerprint>/    [train.arrow]  [holdout.arrow]  token_counts.npy  checkpoint_manifest.json

The fingerprint hashes the bytes of the sources, the tokenizer and the settings. A corpus that has not changed is read
from the cache if its files match their SHA-256, else it is made again. The directory is built under a hidden name,
flushed, and renamed while a lock is held, so it is there whole or not at all; if several processes want it, one builds
and the others wait. For a stream the cache holds what the first rows tell, and no train.arrow.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from datasets.table import MemoryMappedTable

from distilbert_fast.data.packing import CorpusReport, Flat, LineTokenizer, RowFilter, RowFormat, join
from distilbert_fast.data.text_sources import TextSource
from distilbert_fast.files.durable import building, lock
from distilbert_fast.files.schema import integer, record, validate
from distilbert_fast.ops._check import choice, refuse
from distilbert_fast.runs import manifest

logger = logging.getLogger(__name__)

_FORMAT = 1  # of what is cached; a change of packing.py that changes rows raises it
_COUNTS = "token_counts.npy"
_CHUNK = 20_000  # pieces that are joined at once, so also the most rows that an Arrow record batch has
_STREAM_CHUNK = 1_000  # texts that are tokenized at once
_REPORT = record({field.name: integer(0) for field in fields(CorpusReport)})
_SETTINGS = record({"report": _REPORT})  # of a cache's manifest


@dataclass(frozen=True)
class Corpus:
    """Rows of token ids to train on.

    Attributes:
        train: a ``datasets.Dataset``, memory-mapped, with the columns input_ids (list of uint16, or of int32 if the
            vocabulary needs it) and length; of a streamed corpus an ``IterableDataset`` with the same rows.
        holdout: the held-out rows, of the same kind; None if none were asked for. That of a stream's head is a
            ``Dataset``.
        token_counts: int64 [V], how often each id stands in ``train``.
        report: what was read, kept and dropped.
        fingerprint: of sources, tokenizer and settings.
        path: the directory it is cached in.

    For a streamed corpus the last four describe its head; they are None if none was asked for.
    """

    train: datasets.Dataset | datasets.IterableDataset
    holdout: datasets.Dataset | datasets.IterableDataset | None
    token_counts: np.ndarray | None = None
    report: CorpusReport | None = None
    fingerprint: str | None = None
    path: Path | None = None


def load_corpus(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    tokenizer: Any,
    *,
    max_length: int = 512,
    packing: str = "full_sentences",
    text_column: str | None = None,
    split: str = "train",
    min_length: int = 12,
    max_unknown: float = 0.5,
    cache_dir: str | os.PathLike[str] | None = None,
    num_proc: int | None = None,
    streaming: bool = False,
    head: int = 0,
    holdout: float = 0.0,
    seed: int = 0,
) -> Corpus:
    """Read a corpus and make training rows of it, or take them from the cache.

    A document is a text of a row of .jsonl, .parquet, .csv, .tsv or a data set; in .txt files, what blank lines or a
    file's end enclose. Its sentences are its lines. A sentence of more than max_length − 2 tokens is cut into pieces
    of that, as in DistilBERT's own distiller, whose filters are the defaults.

    Args:
        source: a path or glob of .txt, .jsonl, .parquet, .csv or .tsv files, or several, all of one kind; or a data
            set as `datasets` knows it: a directory, or a hub id: "owner/set", "owner/set/config".
        tokenizer: a fast one of BERT's or RoBERTa's kind.
        max_length: tokens a row has at most, special ones counted.
        packing: "full_sentences" fills rows with sentences in order, across documents, the separator token between
            two of them; "lines" makes a row of each sentence. There is no next-sentence prediction.
        text_column: which column holds the text; by default "text", "sentence", or the only one.
        split: of a data set.
        min_length: shorter rows are dropped.
        max_unknown: rows are dropped whose share of unknown tokens is this or more.
        cache_dir: where corpora are kept; needed unless streaming without ``head``.
        num_proc: processes that tokenize. None: this one, whose tokenizer uses all cores.
        streaming: keep nothing; read, tokenize and pack while training. Faults in the source raise only then.
        head: rows of a stream that are read at once (fewer if there are fewer). The rows held out of them are kept,
            and how often each id occurs in the others. A stream counts as the same while the names and sizes of its
            files are.
        holdout: share of rows that is held out of ``train``. A row's ids and ``seed`` decide, so equal rows are never
            on both sides and the choice is the same everywhere.
        seed: of the hold-out.

    Raises:
        ValueError: no such source, files of several kinds, no or no clear text column, no row kept; or an argument
            out of range.
        TypeError: the column holds something other than text, or the tokenizer is not a fast one.
    """
    choice("load_corpus", "packing", packing, ("full_sentences", "lines"))
    if max_length < 3:
        refuse("load_corpus", "max_length", "at least 3", max_length)
    if head < 0 or (head and not streaming):
        refuse("load_corpus", "head", "0, or rows of a stream", head)
    if not 0 <= holdout < 1:
        refuse("load_corpus", "holdout", "0 or more and below 1", holdout)
    if not 0 <= seed < 2**64:
        refuse("load_corpus", "seed", "from 0 to 2^64 - 1", seed)
    if not getattr(tokenizer, "is_fast", False):
        refuse("load_corpus", "tokenizer", "a fast tokenizer", type(tokenizer).__name__, TypeError)
    cls = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    sep = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    if cls is None or sep is None:
        refuse("load_corpus", "tokenizer", "one with tokens that open and close a sequence", type(tokenizer).__name__)
    form = RowFormat(cls, sep, max_length, packing, "uint16" if len(tokenizer) <= 2**16 else "int32")
    keep = RowFilter(min_length, max_unknown, tokenizer.unk_token_id, holdout, seed if holdout else 0)
    texts = TextSource(source, text_column, split, across_lines=packing == "full_sentences")
    pipeline = _Pipeline(texts, tokenizer, form, keep)
    if streaming and not head:
        return Corpus(_stream(pipeline, 0), _stream(pipeline, 1) if holdout else None)
    if cache_dir is None:
        refuse("load_corpus", "cache_dir", "given unless streaming", None)
    settings = {
        "format": _FORMAT,
        "source": [head, *texts.sizes()] if streaming else texts.identity(num_proc or 1),
        "text_column": text_column,
        "tokenizer": _tokenizer_hash(tokenizer),
        "layout": asdict(form),
        "filter": asdict(keep),
    }
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    path = Path(cache_dir).resolve() / fingerprint
    if manifest.fault(path) is not None:
        _build(path, pipeline, head, num_proc)
    corpus = _open(path)
    return replace(corpus, train=_stream(pipeline, 0)) if streaming else corpus


class _Pipeline(NamedTuple):
    """The steps from texts to rows."""

    texts: TextSource
    tokenizer: Any
    form: RowFormat
    keep: RowFilter


def _build(path: Path, pipeline: _Pipeline, head: int, num_proc: int | None) -> None:
    """Make a corpus' directory unless another process does so first."""
    with lock(path):
        reason = manifest.fault(path)
        if reason is None:
            return
        if path.exists():
            logger.warning("load_corpus: making %s again: %s", path, reason)
            manifest.make_room(path)
        with building(path) as partial:
            report = _write(partial, pipeline, head, num_proc)
            manifest.complete(partial, {"report": asdict(report)})
        logger.info("load_corpus: made %s: %s", path, report)


def _write(directory: Path, pipeline: _Pipeline, head: int, num_proc: int | None) -> CorpusReport:
    """Fill a directory with the files of a corpus: with all rows, or with what the first ``head`` of a stream tell."""
    report = CorpusReport()
    held_out = ["holdout"] if pipeline.keep.holdout > 0 else []
    if head:
        _store(directory, held_out, _first(head, pipeline, report), pipeline)
    else:
        work = directory / "work"
        work.mkdir()
        _store(directory, ["train", *held_out], _splits(pipeline, report, work, num_proc), pipeline)
        shutil.rmtree(work)
    if report.kept == 0:
        where = "begin with" if head else "hold"
        raise ValueError(f"load_corpus: source must {where} rows that pass the filters, got none: {report}")
    return report


def _first(head: int, pipeline: _Pipeline, report: CorpusReport) -> Iterator[tuple[Flat, Flat]]:
    """The first rows of a stream: ``head`` of them, and those that are made together with the last."""
    for split in _splits(pipeline, report):
        yield split
        if report.kept + report.held_out >= head:
            return


def _splits(
    pipeline: _Pipeline, report: CorpusReport, work: Path | None = None, num_proc: int | None = None
) -> Iterator[tuple[Flat, Flat]]:
    """Rows to train on and held-out ones, chunk by chunk: of a stream, or of a table that is tokenized in ``work``."""
    table = pipeline.texts.open(work, num_proc, streaming=work is None)
    tokenizer = LineTokenizer(pipeline.tokenizer, table.column, table.documents, pipeline.form)
    texts = table.rows.with_format("arrow")

    def counted(batch: pa.Table) -> pa.Table:
        report.texts += len(batch)
        return tokenizer(batch)

    if work is None:
        pieces = map(counted, texts.iter(_STREAM_CHUNK))
    else:
        report.texts = len(table.rows) - table.added
        tokenized = texts.map(
            tokenizer,
            batched=True,
            remove_columns=table.rows.column_names,
            num_proc=num_proc,
            cache_file_name=str(work / "pieces.arrow"),
            new_fingerprint="pieces",  # `datasets` need not hash the tokenizer
            desc="Tokenizing",
        )
        pieces = tokenized.iter(_CHUNK)
    chunks = (Flat.of(chunk["input_ids"]) for chunk in pieces)
    return (pipeline.keep(rows, report) for rows in join(chunks, pipeline.form))


def _store(directory: Path, parts: Sequence[str], splits: Iterable[tuple[Flat, Flat]], pipeline: _Pipeline) -> None:
    """Write rows to train on, held-out ones, or both, and how often each id stands in the former."""
    counts = np.zeros(len(pipeline.tokenizer), np.int64)  # [V]
    schema = pa.schema({"input_ids": pa.list_(pa.from_numpy_dtype(pipeline.form.dtype)), "length": pa.int32()})
    with ExitStack() as files:
        writers = {part: files.enter_context(pa.ipc.new_stream(directory / f"{part}.arrow", schema)) for part in parts}
        for split in splits:
            counts += np.bincount(split[0].ids, minlength=len(counts))
            for part, flat in zip(("train", "holdout"), split, strict=True):
                if part in writers:
                    columns = [flat.to_arrow(), flat.lengths.astype(np.int32)]
                    writers[part].write_batch(pa.record_batch(columns, schema=schema))
    np.save(directory / _COUNTS, counts)


def _open(path: Path) -> Corpus:
    def part(name: str) -> datasets.Dataset | None:
        file = path / f"{name}.arrow"
        # the fingerprint `datasets` would give it depends on the file's time
        table = MemoryMappedTable.from_file(str(file)) if file.exists() else None
        return None if table is None else datasets.Dataset(table, fingerprint=f"{path.name}-{name}")

    settings = manifest.settings_of(path)
    validate(settings, path / manifest.MANIFEST, _SETTINGS, "settings")
    report = CorpusReport(**settings["report"])
    return Corpus(part("train"), part("holdout"), np.load(path / _COUNTS), report, path.name, path)


def _stream(pipeline: _Pipeline, part: int) -> datasets.IterableDataset:
    """The rows that ``_write`` would write into its train (0) or holdout (1) file, made while they are asked for."""
    features = datasets.Features(
        {"input_ids": datasets.Sequence(datasets.Value(pipeline.form.dtype)), "length": datasets.Value("int32")}
    )
    return datasets.IterableDataset.from_generator(_rows, features, {"pipeline": pipeline, "part": part})


def _rows(pipeline: _Pipeline, part: int) -> Iterator[dict[str, Any]]:
    for split in _splits(pipeline, CorpusReport()):
        for row in split[part].split():
            yield {"input_ids": row, "length": len(row)}


def _tokenizer_hash(tokenizer: Any) -> str:
    """A hash of all that decides which ids a text gets; truncation and padding, which each call sets, do not."""
    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    return hashlib.sha256(json.dumps([state, len(tokenizer)], sort_keys=True).encode()).hexdigest()
