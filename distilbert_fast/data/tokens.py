"""Token classification: words with a tag each, from files of CoNLL's form, tables or the hub, in pieces that a model
reads; entity F1, accuracy and agreement.

A word's tag is read off its first token (Devlin et al., BERT, section 5.3). A sentence longer than a model reads is cut
between words into pieces, so that every word is trained on and judged.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor

from distilbert_fast.data import IGNORED
from distilbert_fast.data.conll import Tagged, read_conll
from distilbert_fast.data.sentences import by_length
from distilbert_fast.data.tables import (
    EVAL_SPLITS,
    Table,
    check_sources,
    class_order,
    file_name,
    hold_out,
    hub_splits,
    limited,
    names_in_order,
    read_table,
    refuse_unknown,
    text_of,
)
from distilbert_fast.data.tags import Scheme, is_outside, odd_one, scheme_of
from distilbert_fast.files.text import read_text, refuse_input, shortened, visible

OP = "load_tokens"
TAG_COLUMNS = ("tags", "ner_tags")
_NUMBER = re.compile(r"-?\d+")
_NO_NAME = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|true|false", re.IGNORECASE)


class Sentence(NamedTuple):
    words: tuple[str, ...]
    tags: tuple[int, ...]


@dataclass(frozen=True)
class TagTask:
    """A token classification task.

    Attributes:
        name: what it is called in reports.
        train, eval: sentences; a tag is an index into `tag_names`.
        tag_names: one name per tag.
    """

    name: str
    train: tuple[Sentence, ...]
    eval: tuple[Sentence, ...]
    tag_names: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all words, tags and tag names: equal for equal tasks on any machine."""
        return hashlib.sha256(json.dumps([self.tag_names, self.train, self.eval]).encode()).hexdigest()

    @cached_property
    def scheme(self) -> Scheme | None:
        """The scheme by which tags mark entities, or None. Tags that only a teacher has may be outside of it."""
        used = {self.tag_names[tag] for row in (*self.train, *self.eval) for tag in row.tags}
        return scheme_of(used) or scheme_of(self.tag_names)

    @property
    def has_entities(self) -> bool:
        """Whether tags mark entities, as B-PER, I-PER and O do; see `tags.py` for all ways to write them."""
        return self.scheme is not None

    def for_classes(self, names: Sequence[str], kept: bool) -> TagTask:
        """The same task with its tags numbered as the teacher's, which may have more; see `class_order`."""
        order = class_order(OP, self.tag_names, names, kept, fewer=True)
        if order is None:
            return self
        train, held_out = (
            tuple(Sentence(row.words, tuple(order[tag] for tag in row.tags)) for row in rows)
            for rows in (self.train, self.eval)
        )
        return TagTask(self.name, train, held_out, names_in_order(self.tag_names, names, order))


def load_tokens(
    name: str | None = None,
    data: str | Path | None = None,
    eval_data: str | Path | None = None,
    max_train_rows: int | None = None,
) -> TagTask:
    """Load tagged sentences from files or from the hub; sentences without words are left out.

    Args:
        name: a hub data set, `"owner/set"` or `"owner/set/config"`, with the columns `tokens` and `ner_tags` or `tags`.
            With `data` it is only the name that reports show.
        data: a .jsonl or .parquet file with the columns `tokens` and `tags` or `ner_tags`, lists of strings (numbers
            in a Parquet file that `datasets` wrote, which has their names), tags without the spaces around them; or any
            other file of CoNLL's form in UTF-8: a word a line in the first column, its tag in the last one, columns
            separated by a tab if there is one in the line, else by spaces; a blank line ends a sentence, and comments
            before one (`# sent_id = 1`) and lines that begin with -DOCSTART-, in any case, are skipped.
        eval_data: the same for the evaluation split. Without it, about 10 % of the distinct sentences of `data` are
            held out, chosen by their hash, so that the same one never stands on both sides.
        max_train_rows: keep only this many training sentences, chosen by hash; all when None.

    Raises:
        ValueError: a file that is missing, empty or of another form, with the number of the line or row; a single tag;
            tags that are numbers without names, have an invisible character or a mark without a type (B-); a word of
            invisible characters whose tag is not O; tags of which only some mark entities, or types that differ in case
            alone; an evaluation tag of a kind that the training split has not; a name that is not on the hub.
    """
    check_sources(OP, data, eval_data, max_train_rows)
    names: Sequence[str] | None = None
    found: list[Tagged]  # for training and, if there are others, for evaluation
    if data is not None:
        given = [("data", Path(data)), *([] if eval_data is None else [("eval_data", Path(eval_data))])]
        found = [read_tagged_file(OP, argument, path) for argument, path in given]
        sources = [f"{argument}: {str(path)!r}" for argument, path in given]
        name = name or file_name(Path(data))
    elif name is None:
        refuse_input(f"{OP}: data", "a file, or the name of a hub data set", "neither")
    else:
        found, names = _from_hub(name)
        sources = [f"name: {name!r}"] * len(found)
    for source, tagged in zip(sources, found, strict=True):
        refuse_unseen_words(f"{OP}: {source}", tagged)
    used = {tag for tagged in found for tag in tagged.places}
    odd = odd_one(used)
    for source, tagged in zip(sources, found, strict=True):
        if odd in tagged.places:
            raise ValueError(
                f"{OP}: {source}: {tagged.places[odd]}: expected tags such as B-PER, I-PER and O, got {odd!r} among "
                f"{', '.join(map(repr, sorted(used - {odd})[:9]))}"
            )
    train, held_out = (of.rows for of in found) if len(found) > 1 else hold_out(OP, found[0].rows, "sentences")
    if names is None:
        names = _tag_names(*({tag for _, tags in rows for tag in tags} for rows in (train, held_out)))
    if len(names) < 2:
        refuse_input(f"{OP}: data", "at least 2 tags", f"only {names[0]!r}")
    index = {tag: i for i, tag in enumerate(names)}
    splits = [
        tuple(Sentence(words, tuple(index[tag] for tag in tags)) for words, tags in rows)
        for rows in (limited(train, max_train_rows), held_out)
    ]
    return TagTask(name, splits[0], splits[1], tuple(names))


def read_tagged_file(op: str, argument: str, path: Path) -> Tagged:
    """The sentences of one file, see `load_tokens`; messages begin with ``op`` and ``argument``."""
    source = f"{op}: {argument}: {str(path)!r}"
    if path.suffix.lower() not in (".jsonl", ".parquet"):
        tagged = read_conll(source, read_text(op, argument, path))
    else:
        table = read_table(op, argument, path)
        tagged = _sentences(source, table, _tag_column(source, [*table.columns]))
    _refuse_numbers(source, tagged)
    return tagged


def _tag_column(source: str, names: Sequence[str]) -> str:
    column = next((column for column in TAG_COLUMNS if column in names), None)
    if column is None or "tokens" not in names:
        raise ValueError(
            f"{source} has no columns tokens and {' (or '.join(TAG_COLUMNS)}); its columns: {', '.join(names)}"
        )
    return column


def _sentences(source: str, table: Table, column: str) -> Tagged:
    """Make sentences of lists of words and of tags, texts or numbers that have names."""
    tagged = Tagged("row")
    names = table.class_names.get(column)
    for number, row in enumerate(zip(table.columns["tokens"], table.columns[column], strict=True), start=1):
        place = f"{source}: row {number}"
        if not all(isinstance(of, list) for of in row) or len(row[0]) != len(row[1]):
            found = " and ".join(f"{len(of)}" if isinstance(of, list) else shortened(of) for of in row)
            refuse_input(place, "lists of as many tokens as tags", found)
        cells = [text_of(place, cell, "texts as tokens and tags", "token or tag") for cell in row[0]]
        found_words, found_tags = tuple(cells), tuple(_tag(place, tag, names) for tag in row[1])
        if found_words:
            tagged.add(number, list(zip(found_words, found_tags, strict=True)))
        for tag in found_tags:
            tagged.met(source, tag, number)
    if not tagged.rows:
        raise ValueError(f"{source} holds no sentences")
    return tagged


def _tag(place: str, tag: Any, names: Sequence[str] | None) -> str:
    if names is None:
        return text_of(place, tag, "texts as tokens and tags", "token or tag").strip()
    if not isinstance(tag, int) or isinstance(tag, bool) or not 0 <= tag < len(names):
        refuse_input(place, f"tags 0 to {len(names) - 1}", shortened(tag))
    return names[tag]


def _refuse_numbers(source: str, tagged: Tagged) -> None:
    """Refuse numbers without names as tags: nobody can say which of them mark entities."""
    for tag, place in tagged.places.items():
        if _NO_NAME.fullmatch(tag):
            what = "" if tag.isalpha() else "the number "
            refuse_input(f"{source}: {place}", "the names of tags, such as B-PER", f"{what}{tag}")


def refuse_unseen_words(source: str, tagged: Tagged) -> None:
    """Refuse a word without a visible character unless its tag is O: tokenizers drop it, and it would cost F1."""
    for first, (words, tags) in zip(tagged.lines, tagged.rows, strict=True):
        for at, (word, tag) in enumerate(zip(words, tags, strict=True)):
            if not visible(word) and not is_outside(tag):
                number = first + at if tagged.unit == "line" else first
                expected = f"a word of visible characters, as its tag is {tag}"
                refuse_input(f"{source}: {tagged.unit} {number}", expected, ascii(word))


def _from_hub(name: str) -> tuple[list[Tagged], Sequence[str] | None]:
    splits = hub_splits(OP, name)
    source = f"{OP}: name: {name!r}"
    column = _tag_column(source, [*splits["train"].columns])
    held_out = next((split for split in EVAL_SPLITS if split in splits), None)
    found = [_sentences(source, splits[part], column) for part in ("train", held_out) if part]
    if column == "ner_tags":
        for tagged in found:
            _refuse_numbers(source, tagged)
    return found, splits["train"].class_names.get(column)


def _tag_names(known: set[str], used: set[str]) -> list[str]:
    """All tags; one of the evaluation split alone must be of a kind (PER of I-PER) that the training split has."""
    scheme = scheme_of(known | used)

    def kind(tag: str) -> str:
        return tag if scheme is None else scheme.split(tag)[1]

    kinds = {kind(tag) for tag in known if not is_outside(tag)}
    refuse_unknown(OP, "tag", {tag for tag in used if kind(tag) not in kinds and not is_outside(tag)}, sorted(known))
    if all(_NUMBER.fullmatch(tag) for tag in known | used):
        return sorted(known | used, key=int)
    return sorted(known | used, key=lambda tag: (not is_outside(tag), kind(tag), tag))


class Pieces:
    """Sentences as a model reads them, in pieces of whole words.

    Args:
        task: names of tags.
        sentences: of the task; W words in all.
        tokenizer: a fast one. Words of which it makes no token (control characters, say) have no label, and are judged
            as outside of all entities; of a word longer than a piece the first tokens are read.
        max_length: tokens of a piece, [CLS] and [SEP] among them.

    Raises:
        ValueError: no sentence has a word of which the tokenizer makes a token.

    Attributes:
        rows: a ``datasets.Dataset`` with the tokenizer's columns and labels: a word's tag on its first token, -100 on
            others.
        words: int64 [L], the number of each word that has a label among all W words, piece by piece.
    """

    def __init__(self, task: TagTask, sentences: Sequence[Sentence], tokenizer: Any, max_length: int) -> None:
        self.task, self.sentences, self.tokenizer = task, sentences, tokenizer
        texts: list[list[str]] = []
        firsts: list[int] = []  # the number of each piece's first word
        room = max_length - tokenizer.num_special_tokens_to_add()
        whole = tokenizer(
            [list(row.words) for row in sentences], is_split_into_words=True, add_special_tokens=False, verbose=False
        )
        number = 0
        for at, row in enumerate(sentences):
            counts = Counter(whole.word_ids(at))
            for start, stop in _cuts([counts[word] for word in range(len(row.words))], room):
                texts.append(list(row.words[start:stop]))
                firsts.append(number + start)
            number += len(row.words)
        if not texts:
            raise ValueError("Pieces: sentences must have a word that the tokenizer knows, got none")
        self.truth = torch.tensor([tag for row in sentences for tag in row.tags])  # [W]
        encoded = tokenizer(texts, is_split_into_words=True, truncation=True, max_length=max_length)
        self.places: list[list[int]] = []  # where in a piece its words begin
        labels, words = [], []
        for piece, first in enumerate(firsts):
            begins = _first_tokens(encoded.word_ids(piece))
            label = [IGNORED] * len(encoded["input_ids"][piece])
            for word, place in begins.items():
                words.append(first + word)
                label[place] = int(self.truth[words[-1]])
            self.places.append(list(begins.values()))
            labels.append(label)
        self.words = torch.tensor(words)
        self.rows: Dataset = Dataset.from_dict({**encoded, "labels": labels})

    def batches(self, size: int, rows: int) -> list[dict[str, Tensor]]:
        """The columns that a model takes, of pieces spread over the data."""
        order = range(0, len(self.rows), max(1, len(self.rows) // rows))[:rows]
        return [self._batch(order[start : start + size]) for start in range(0, len(order), size)]

    @torch.inference_mode()
    def logits(
        self,
        model: Any,
        batch_size: int = 32,
        in_order: bool = False,
        watch: Callable[[Sequence[Any]], Iterable[Any]] = iter,
    ) -> Tensor:
        """Logits of the words that have a label, fp32 [L, K] on the CPU; the model is left in eval mode.

        ``in_order``: batches follow the data, else pieces of one length meet. ``watch`` sees the batches go by.
        """
        model.eval()
        device = next(model.parameters()).device
        found: list[Tensor] = [torch.empty(0)] * len(self.rows)
        for pieces in watch(by_length([len(ids) for ids in self.rows["input_ids"]], batch_size, in_order)):
            batch = {name: x.to(device) for name, x in self._batch(pieces).items()}
            for piece, row in zip(pieces, model(**batch).logits.float().cpu(), strict=True):  # [T, K]
                found[piece] = row[self.places[piece]]
        return torch.cat(found)

    def chosen(self, logits: Tensor) -> Tensor:
        """The tags [W] of all words by logits [L, K]; of a word without a label, that of no entity (-1 without one)."""
        outside = next((at for at, name in enumerate(self.task.tag_names) if is_outside(name)), -1)
        chosen = torch.full_like(self.truth, outside)
        chosen[self.words] = logits.argmax(dim=1)
        return chosen

    def tags(self, of_words: Tensor) -> list[list[str]]:
        """The names of tags [W], sentence by sentence."""
        each = of_words.split([len(row.words) for row in self.sentences])
        return [[self.task.tag_names[tag] for tag in tags.tolist()] for tags in each]

    def _batch(self, pieces: Iterable[int]) -> dict[str, Tensor]:
        rows = [{name: x for name, x in self.rows[at].items() if name != "labels"} for at in pieces]
        return dict(self.tokenizer.pad(rows, return_tensors="pt"))


def _cuts(lengths: Sequence[int], room: int) -> list[tuple[int, int]]:
    """Where pieces of words begin and end, as long as they can be; those without a token are left out."""
    cuts, start, total = [], 0, 0
    for word, length in enumerate([*lengths, room + 1]):
        if total and total + length > room:
            cuts.append((start, word))
            start, total = word, 0
        total += length
    return cuts


def _first_tokens(word_ids: Sequence[int | None]) -> dict[int, int]:
    """The place of the first token of each word, in order."""
    firsts: dict[int, int] = {}
    for place, word in enumerate(word_ids):
        if word is not None:
            firsts.setdefault(word, place)
    return firsts
