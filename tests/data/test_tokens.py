"""Tagged words from files and the hub, the pieces that a model reads, and scores of planted answers."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from demo_input import bert, conll

from distilbert_fast.data.tokens import Pieces, Sentence, TagTask, load_tokens
from distilbert_fast.evaluation.entity_scores import entity_scores
from distilbert_fast.evaluation.metrics import tag_scores

ROWS = [
    (["EU", "rejects", "German", "call"], ["B-ORG", "O", "B-MISC", "O"]),
    (["Peter", "Blackburn"], ["B-PER", "I-PER"]),
]


def tagged(rows) -> list[tuple[list[str], list[str]]]:
    return [([*row.words], [*row.tags]) for row in rows]


def named(task: TagTask, rows) -> list[tuple[list[str], list[str]]]:
    return [(words, [task.tag_names[tag] for tag in tags]) for words, tags in tagged(rows)]


CONLL = {
    "eng.train": "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\nGerman JJ B-NP B-MISC\n"
    "call NN I-NP O\n\nPeter NNP B-NP B-PER\nBlackburn NNP I-NP I-PER\n\n",
    "uncased": "-docstart- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\nGerman JJ B-MISC\ncall NN O\n-Docstart- -X- O\n"
    "Peter NNP B-PER\nBlackburn NNP I-PER\n",
    "tabs.tsv": "\ufeffEU\tB-ORG\nrejects\tO\nGerman\tB-MISC\ncall\tO\n\n\n\nPeter\tB-PER\nBlackburn\tI-PER",
    "windows.conll": "EU  B-ORG\r\nrejects  O \r\nGerman  B-MISC\r\ncall\tO\r\n\r\n-DOCSTART- O\r\nPeter B-PER\r\n"
    "Blackburn I-PER\r\n \r\n",
    # a break that is a lone tab, or white space
    "wnut.conll": "EU\tB-ORG\nrejects\tO\nGerman\tB-MISC\ncall\tO\n\t\nPeter\tB-PER\nBlackburn\tI-PER\n\t\t \n\t",
    "mac.txt": "EU B-ORG\rrejects O\rGerman B-MISC\rcall O\r\rPeter B-PER\rBlackburn I-PER\r",
    "conllu": "# newdoc id = a\n# sent_id = 1\n# text = EU rejects\nEU x y B-ORG\nrejects x y O\nGerman x y B-MISC\n"
    "call x y O\n\n# newpar\n#\n# sent_id=2\n# 2\n#x = y\nPeter x y B-PER\nBlackburn x y I-PER\n\n# end\n",
    "multiconer": "\n# id 5239\tdomain=en\nEU _ _ B-ORG\nrejects _ _ O\nGerman _ _ B-MISC\ncall _ _ O\n\n"
    "# id 7f5a-4ee1\tdomain=en\nPeter _ _ B-PER\nBlackburn _ _ I-PER\n\n",
    "two columns": "# id 5239\tdomain=en\nEU\tB-ORG\nrejects\tO\nGerman\tB-MISC\ncall\tO\n\n# 2\n# newpar\n# x y z\n"
    "Peter\tB-PER\nBlackburn\tI-PER\n",
    "ontonotes": "#begin document (x); part 000\nEU a B-ORG\nrejects b O\nGerman c B-MISC\ncall d O\n\nPeter e B-PER\n"
    "Blackburn f I-PER\n\n#end document\n",
}


@pytest.mark.parametrize("name", CONLL)
def test_files_of_conll(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(CONLL[name].encode())
    task = load_tokens(data=path, eval_data=path)
    assert task.name == f"{tmp_path.name}/{name}"
    assert task.tag_names == ("O", "B-MISC", "B-ORG", "B-PER", "I-PER")
    assert named(task, task.train) == named(task, task.eval) == ROWS
    assert task.has_entities


def test_words_that_begin_as_comments_do(tmp_path):
    """A # with a tag of the file's, and hashtags."""
    path = tmp_path / "x"
    path.write_text("# O\n1 O\n\n#hash B-X\ntag O\n\n# B-X\n# I-X\n\n#1 O\n\na O\n# O\n")
    rows = [["#", "1"], ["#hash", "tag"], ["#", "#"], ["#1"], ["a", "#"]]
    assert [list(row.words) for row in load_tokens(data=path, eval_data=path).train] == rows
    path.write_text("#\t#\n1\tCD\n\n#\tNN\n#\tSYM\n")  # parts of speech
    assert [list(row.words) for row in load_tokens(data=path, eval_data=path).train] == [["#", "1"], ["#", "#"]]
    path.write_text("# B-X\n#a O\n")  # nothing but
    assert load_tokens(data=path, eval_data=path).train[0].words == ("#", "#a")
    path.write_text("is\tO\n\n# 1 fan\tB-X\nis\tO\n")  # words with spaces in them
    assert load_tokens(data=path, eval_data=path).train[1].words == ("# 1 fan", "is")


SCHEMES = {
    "IOB1": ("EU I-ORG\nrejects O\nGerman I-MISC\ncall O\n\nPeter I-PER\nBlackburn I-PER\nJohn B-PER\n", "PER"),
    "suffix": ("EU ORG-B\nrejects O\nGerman MISC-B\ncall O\n\nPeter PER-B\nBlackburn PER-I\nJohn PER-B\n", "PER"),
    "lower": ("EU b-org\nrejects O\nGerman b-misc\ncall O\n\nPeter b-per\nBlackburn i-per\nJohn b-per\n", "per"),
    "lower o": ("EU b-org\nrejects o\nGerman b-misc\ncall o\n\nPeter b-per\nBlackburn i-per\nJohn b-per\n", "per"),
    "BIOES": ("EU S-ORG\nrejects O\nGerman S-MISC\ncall O\n\nPeter B-PER\nBlackburn E-PER\nJohn S-PER\n", "PER"),
    "BILOU": ("EU U-ORG\nrejects O\nGerman U-MISC\ncall O\n\nPeter B-PER\nBlackburn L-PER\nJohn U-PER\n", "PER"),
    "underscore": ("EU B_ORG\nrejects O\nGerman B_MISC\ncall O\n\nPeter B_PER\nBlackburn I_PER\nJohn B_PER\n", "PER"),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_schemes_of_tags(tmp_path, tokenizer, name):
    """Tags stay as written, and are scored as entities."""
    content, person = SCHEMES[name]
    path = tmp_path / "x"
    path.write_text(content)
    task = load_tokens(data=path, eval_data=path)
    lines = [line.split() for line in content.splitlines() if line]
    assert [task.tag_names[tag] for row in task.train for tag in row.tags] == [tag for _, tag in lines]
    assert task.has_entities and task.scheme.entities(["O", "O"]) == set()
    names = [task.tag_names[tag] for tag in task.train[1].tags]
    assert task.scheme.entities(names) == {(person, 0, 2), (person, 2, 3)}
    pieces = Pieces(task, (Sentence(("a", "b", "c"), task.train[1].tags),), tokenizer, 16)
    ids = tokenizer.convert_tokens_to_ids(["a", "b", "c"])
    assert tag_scores(pieces, Knowing(dict(zip(ids, task.train[1].tags, strict=True)), len(task.tag_names)))["f1"] == 1
    outside = next(at for at, tag in enumerate(task.tag_names) if tag in "Oo")
    wrong = dict(zip(ids, [*task.train[1].tags[:2], outside], strict=True))
    assert tag_scores(pieces, Knowing(wrong, len(task.tag_names)))["f1"] == pytest.approx(2 / 3)


def test_a_teacher_with_classes_of_no_scheme(tmp_path, tokenizer):
    """[SEP] and the like, which some have: they are outside, and the data's own tags are still scored as entities."""
    path = tmp_path / "x"
    path.write_text(CONLL["tabs.tsv"])
    task = load_tokens(data=path, eval_data=path).for_classes(
        ["O", "B-PER", "I-PER", "B-ORG", "B-MISC", "X", "[SEP]"], kept=True
    )
    assert task.has_entities and len(task.tag_names) == 7
    pieces = Pieces(task, (Sentence(("a", "b"), (1, 2)), Sentence(("c",), (0,))), tokenizer, 16)
    a, b, c = tokenizer.convert_tokens_to_ids(["a", "b", "c"])
    assert tag_scores(pieces, Knowing({a: 1, b: 2, c: 6}, 7))["f1"] == 1


@pytest.mark.parametrize("column", ["tags", "ner_tags"])
def test_numbers_as_tags(tmp_path, monkeypatch, column):
    """The names are in a Parquet file that `datasets` wrote; nobody can tell what other numbers mean."""
    monkeypatch.chdir(tmp_path)
    names = ["O", "B-ORG", "I-ORG", "B-PER", "I-PER", "B-MISC"]
    rows = Dataset.from_dict(
        {"tokens": [words for words, _ in ROWS], column: [[names.index(tag) for tag in tags] for _, tags in ROWS]}
    )
    named_rows = rows.cast(Features({"tokens": [Value("string")], column: [ClassLabel(names=names)]}))
    named_rows.to_parquet("named.parquet")
    task = load_tokens(data="named.parquet", eval_data="named.parquet")
    assert named(task, task.train) == ROWS and task.has_entities
    rows.to_parquet("x.parquet")
    rows.to_json("x.jsonl")
    Path("x.conll").write_text("EU\tO\nrejects\t3\n")
    for name, place, number in (("x.parquet", "row 1", 1), ("x.jsonl", "row 1", 1), ("x.conll", "line 2", 3)):
        with pytest.raises(ValueError) as caught:
            load_tokens(data=name, eval_data=name)
        assert str(caught.value) == (
            f"load_tokens: data: {name!r}: {place}: expected the names of tags, such as B-PER, got the number {number}"
        )


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_tables(tmp_path, name):
    columns = {"tokens": [words for words, _ in ROWS] + [[]], "tags": [tags for _, tags in ROWS] + [[]]}
    path = tmp_path / name
    if name.endswith("jsonl"):
        Dataset.from_dict(columns).to_json(path)
    else:
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    task = load_tokens(data=path, eval_data=path)
    assert named(task, task.train) == ROWS
    (tmp_path / "conll").write_text(CONLL["tabs.tsv"])
    other = load_tokens(data=tmp_path / "conll", eval_data=tmp_path / "conll")
    assert other.fingerprint == task.fingerprint


def test_words_as_they_stand_in_a_file(tmp_path):
    """Separators of lines and words other than the ASCII ones are parts of words, as are # and quotes."""
    words = ["a\u00a0b", "\u2028", "\u200b", "#", '"', "NA", "x\x85"]
    path = tmp_path / "x"
    path.write_text("".join(f"{word} {'O' if i else 'B-X'}\n" for i, word in enumerate(words)))
    assert load_tokens(data=path, eval_data=path).train[0].words == tuple(words)
    path.write_text("New York\tB-LOC\nis\tO\n")
    assert load_tokens(data=path, eval_data=path).train[0].words == ("New York", "is")


def test_what_is_held_out_and_what_is_left_of_it(tmp_path):
    path = conll(tmp_path / "x.conll", 150, seed=3)
    task, part = load_tokens(data=path), load_tokens(data=path, max_train_rows=40)
    assert len(task.train) + len(task.eval) == 150 and 5 < len(task.eval) < 30
    assert part.eval == task.eval and len(part.train) == 40 and set(part.train) < set(task.train)
    assert part.fingerprint != task.fingerprint == load_tokens(data=path).fingerprint
    # a tag that only a sentence has which is evaluated on, of a type that is known
    (tmp_path / "train").write_text("a B-X\n")
    (tmp_path / "dev").write_text("a B-X\nb I-X\nc O\n")
    assert load_tokens(data=tmp_path / "train", eval_data=tmp_path / "dev").tag_names == ("O", "B-X", "I-X")


def test_tags_in_the_order_of_a_teacher_who_may_know_more(tmp_path):
    path = tmp_path / "x"
    path.write_text(CONLL["tabs.tsv"])
    task = load_tokens(data=path, eval_data=path)
    theirs = ["O", "B-LOC", "I-LOC", "B-PER", "i-per", "B-ORG", "B-MISC"]
    met = task.for_classes(theirs, kept=True)
    assert met.tag_names == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER", "B-ORG", "B-MISC")
    assert named(met, met.train) == named(met, met.eval) == ROWS
    assert task.for_classes(["LABEL_0", "LABEL_1"], kept=True) is task
    with pytest.raises(
        ValueError, match=r"^load_tokens: data: expected the teacher's labels 'a', 'b', 'c', 'd', 'e', got"
    ):
        task.for_classes("abcde", kept=True)
    assert task.for_classes("abcde", kept=False) is task


BAD = {
    "empty": ("", "load_tokens: data: 'empty' is empty"),
    "blank": ("\n \n-DOCSTART- O\n", "load_tokens: data: 'blank' holds no sentences"),
    "one.csv": ("EU,B-ORG\n", "load_tokens: data: 'one.csv': line 1: expected a word and its tag, got 'EU,B-ORG'"),
    "torn": (
        "a X O\n\nb O\n",
        "load_tokens: data: 'torn': line 3: expected 3 columns as in the lines before, got 'b O'",
    ),
    "missing": (
        "a\tO\nb\t\n",
        "load_tokens: data: 'missing': line 2: expected 2 columns as in the lines before, got 'b'",
    ),
    "single": ("a O\n\nb O\n", "load_tokens: data: expected at least 2 tags, got only 'O'"),
    "header": (
        "token tag\na B-X\nb O\n",
        "load_tokens: data: 'header': line 1: expected tags such as B-PER, I-PER and O, got 'tag' among 'B-X', 'O'",
    ),
    "comment": (
        "a x y O\n# sent_id = 1\nb x y B-X\n",
        "load_tokens: data: 'comment': line 2: expected comments before a sentence, got '# sent_id = 1' inside one",
    ),
    "hash": (
        "a O\n\n#tag\nb B-X\n",
        "load_tokens: data: 'hash': line 3: expected 2 columns as in the lines before, got '#tag'",
    ),
    "numbered": (
        "# sent_id = 1\n1\tEU\tB-ORG\n2\trejects\tO\n\n1-2\tzum\tO\n1\tzu\tO\n2\tdem\tO\n",
        "load_tokens: data: 'numbered': line 2: expected words in the first column, got their numbers",
    ),
    "germeval": (
        "#\thttp://x.org/\t[2009-10-17]\n1\tAufgrund\tO\tO\n2\tEU\tB-ORG\tO\n",
        "load_tokens: data: 'germeval': line 2: expected words in the first column, got their numbers",
    ),
    "nul": ("a O\nb\0 B-X\n", "load_tokens: data: 'nul': line 2 holds a NUL byte, which no text has"),
    "half": (
        "a NP-B\nb VP\nc O\n",
        "load_tokens: data: 'half': line 2: expected tags such as B-PER, I-PER and O, got 'VP' among 'NP-B', 'O'",
    ),
    "half lower": (
        "a b-x\nb y\nc O\n",
        "load_tokens: data: 'half lower': line 2: expected tags such as B-PER, I-PER and O, got 'y' among 'O', 'b-x'",
    ),
    "case": (
        "a B-ORG\nb O\nc I-org\n",
        "load_tokens: data: 'case': line 3: expected tags such as B-PER, I-PER and O, got 'I-org' among 'B-ORG', 'O'",
    ),
    "brackets": (
        "a (ORG*\nb *)\nc *\n",
        "load_tokens: data: 'brackets': line 1: expected tags such as B-PER, I-PER and O, got '(ORG*' among '*', '*)'",
    ),
    "v.jsonl": (
        '{"tokens": ["a", ["b"]], "tags": ["O", "B-X"]}\n',
        "load_tokens: data: 'v.jsonl': row 1: expected texts as tokens and tags, got ['b']",
    ),
    "u.jsonl": (
        '{"tokens": ["a", "\\udc00b"], "tags": ["O", "B-X"]}\n',
        "load_tokens: data: 'u.jsonl': row 1: expected texts as tokens and tags, got the lone surrogate '\\udc00' at "
        "character 0",
    ),
    "t.jsonl": (
        '{"tokens": ["a"], "tags": ["O"]}\n\n{"tokens": ["a"], "tags": [',
        "load_tokens: data: cannot read 't.jsonl' as JSONL: line 3: Expecting value: line 1 column 28 (char 27)",
    ),
    "x.jsonl": (
        '{"words": ["a"], "tags": ["O"]}\n',
        "load_tokens: data: 'x.jsonl' has no columns tokens and tags (or ner_tags); its columns: words, tags",
    ),
    "y.jsonl": (
        '{"tokens": ["a"], "tags": ["O"]}\n{"tokens": ["a", "b"], "tags": ["O"]}\n',
        "load_tokens: data: 'y.jsonl': row 2: expected lists of as many tokens as tags, got 2 and 1",
    ),
    "z.jsonl": (
        '{"tokens": "a b", "tags": ["O", "O"]}\n',
        "load_tokens: data: 'z.jsonl': row 1: expected lists of as many tokens as tags, got 'a b' and 2",
    ),
    "w.jsonl": (
        '{"tokens": ["a", " "], "tags": ["O", "X"]}\n',
        "load_tokens: data: 'w.jsonl': row 1 has an empty token or tag",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(tmp_path, monkeypatch, name):
    content, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(content)
    with pytest.raises(ValueError) as caught:
        load_tokens(data=name, eval_data=name)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "load_tokens: data: expected a file, or the name of a hub data set, got neither"),
        ({"eval_data": "good"}, "load_tokens: eval_data: given without data"),
        ({"data": "nowhere"}, "load_tokens: data: no such file: 'nowhere'"),
        (
            {"data": "latin", "eval_data": "good"},
            "load_tokens: data: 'latin': line 1: expected UTF-8, got byte 0xe9 (invalid continuation byte)",
        ),
        ({"data": "good", "max_train_rows": 1}, "load_tokens: max_train_rows: expected at least 2, got 1"),
        (
            {"data": "good"},
            "load_tokens: data: expected enough distinct sentences to hold some out for evaluation, got 1;",
        ),
        (
            {"data": "good", "eval_data": "alien"},
            "load_tokens: the evaluation split has the tag 'I-Y', which the training split has not; its tags: 'B-X'",
        ),
        (
            {"name": "nobody/nothing"},
            "load_tokens: name: the Hugging Face hub did not give the data set 'nobody/nothing': ",
        ),
    ],
)
def test_bad_arguments_are_named(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("good").write_text("a B-X\nb O\n")
    Path("alien").write_text("a I-Y\n")
    Path("latin").write_bytes(b"\xe9t O\n")
    with pytest.raises(ValueError) as caught:
        load_tokens(**arguments)
    assert str(caught.value).startswith(message)


def test_hub_data_sets(monkeypatch):
    names = ["O", "B-ORG", "I-ORG", "B-PER", "I-PER", "B-MISC"]
    features = Features(
        {"tokens": [Value("string")], "pos_tags": [Value("string")], "ner_tags": [ClassLabel(names=names)]}
    )
    columns = {
        "tokens": [words for words, _ in ROWS],
        "ner_tags": [[names.index(tag) for tag in tags] for _, tags in ROWS],
    }
    rows = Dataset.from_dict({**columns, "pos_tags": columns["tokens"]}, features=features)
    numbers = Dataset.from_dict({"tokens": columns["tokens"], "tags": columns["ner_tags"]})
    holds = {
        ("owner/ner", "en"): DatasetDict(train=rows, validation=rows.select([1]), test=rows.select([0])),
        ("owner/numbers",): DatasetDict(train=numbers, test=numbers),
        ("owner/texts",): DatasetDict(train=Dataset.from_dict({"text": ["a"]})),
    }
    monkeypatch.setattr("datasets.load_dataset", lambda *parts: holds[parts])
    task = load_tokens("owner/ner/en")
    assert task.tag_names == tuple(names)
    assert named(task, task.train) == ROWS and named(task, task.eval) == ROWS[1:]
    unnamed = load_tokens("owner/numbers")
    assert unnamed.tag_names == ("0", "1", "3", "4", "5") and not unnamed.has_entities
    for wrong, message in (
        (-1, "row 1: expected tags 0 to 5, got -1"),
        (None, "row 1: expected tags 0 to 5, got None"),
    ):
        odd = Dataset.from_dict({"tokens": [["a"]], "ner_tags": [[wrong]]})
        odd = odd.cast(Features({"tokens": [Value("string")], "ner_tags": [ClassLabel(num_classes=6)]}))
        holds["owner/odd",] = DatasetDict(train=odd)
        with pytest.raises(ValueError, match=f"^load_tokens: name: 'owner/odd': {message}$"):
            load_tokens("owner/odd")
    holds["owner/numbers",] = DatasetDict(train=numbers.rename_column("tags", "ner_tags"))
    with pytest.raises(ValueError, match=r"'owner/numbers': row 1: expected the names of tags, such as B-PER, got"):
        load_tokens("owner/numbers")
    with pytest.raises(ValueError) as caught:
        load_tokens("owner/texts")
    assert str(caught.value) == (
        "load_tokens: name: 'owner/texts' has no columns tokens and tags (or ner_tags); its columns: text"
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Of these words alone; what else it splits into pieces or drops."""
    from transformers import BertTokenizer

    path = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d", "##a", "##b", "##c", "##d"]
    (path / "vocab.txt").write_text("\n".join(words))
    return BertTokenizer(str(path / "vocab.txt"))


NAMES = ("O", "B-X", "I-X")
SENTENCES = (
    Sentence(("a", "bcd", "\x00", "d"), (0, 1, 2, 0)),  # 1, 3, 0 and 1 tokens
    Sentence(("\x00",), (1,)),  # none at all
    Sentence(("abcdabcd", "c"), (1, 2)),
    Sentence(("a", "b", "c", "d", "a", "b"), (1, 2, 0, 1, 2, 2)),
)


@pytest.mark.parametrize("max_length", [4, 5, 7, 16])
def test_every_word_is_in_one_piece_and_its_tag_on_its_first_token(tokenizer, max_length):
    task = TagTask("test", (), SENTENCES, NAMES)
    pieces = Pieces(task, task.eval, tokenizer, max_length)
    words = [word for row in SENTENCES for word in row.words]
    tags = [tag for row in SENTENCES for tag in row.tags]
    seen = []
    for row in pieces.rows:
        assert len(row["input_ids"]) <= max_length
        tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
        for token, label in zip(tokens, row["labels"], strict=True):
            first = not token.startswith(("##", "["))
            assert (label != -100) == first
            if first:
                word = int(pieces.words[len(seen)])
                assert words[word].startswith(token) and tags[word] == label
                seen.append(word)
    assert seen == [word for word, text in enumerate(words) if text != "\x00"]  # in order, once each
    whole = 3 if max_length == 16 else None  # the second sentence has nothing to read
    assert whole is None or len(pieces.rows) == whole


class Knowing(torch.nn.Module):
    """Says for each token what it is told by its id."""

    def __init__(self, by_id: dict[int, int], tags: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.table = torch.zeros(64, tags)
        for token, tag in by_id.items():
            self.table[token, tag] = 4.0

    def forward(self, input_ids, **_):
        return type("Output", (), {"logits": self.table[input_ids]})


@pytest.mark.parametrize("max_length", [4, 16])
def test_scores(tokenizer, max_length):
    task = TagTask("test", (), SENTENCES, NAMES)
    pieces = Pieces(task, task.eval, tokenizer, max_length)
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in "abcd"}
    model = Knowing({ids["a"]: 1, ids["b"]: 2, ids["c"]: 0, ids["d"]: 1}, 3)
    # words without a token are outside, whatever their tag
    found = [[1, 2, 0, 1], [0], [1, 0], [1, 2, 0, 1, 1, 2]]
    true = [list(row.tags) for row in SENTENCES]
    score = tag_scores(pieces, model)
    same = sum(one == other for row in zip(found, true, strict=True) for one, other in zip(*row, strict=True))
    assert score["accuracy"] == pytest.approx(same / 13)
    named = [[[NAMES[tag] for tag in row] for row in rows] for rows in (found, true)]
    assert score["f1"] == pytest.approx(entity_scores(*named)[0].f1) and set(score) == {"f1", "accuracy"}
    teacher = Knowing({ids["a"]: 1, ids["b"]: 2, ids["c"]: 0, ids["d"]: 2}, 3)
    taught = tag_scores(pieces, model, teacher)
    assert taught["agreement"] == pytest.approx(9 / 11)  # not on the two d of the eleven words that have a token
    probability = teacher.table[ids["d"]].softmax(0)
    one = float((probability * (probability.log() - model.table[ids["d"]].log_softmax(0))).sum())
    assert taught["kl"] == pytest.approx(one * 2 / 11, rel=1e-4)
    assert [len(batch["input_ids"]) for batch in pieces.batches(2, 3)] == [2, 1]
    assert "labels" not in pieces.batches(2, 3)[0]


def test_tags_without_entities_have_no_f1(tokenizer):
    task = TagTask("test", (), SENTENCES, ("DET", "NOUN", "VERB"))
    score = tag_scores(Pieces(task, task.eval, tokenizer, 16), Knowing({}, 3))
    assert set(score) == {"accuracy"}
    assert score["accuracy"] == pytest.approx(3 / 13)  # a word without a token is no DET either


def test_words_of_which_nothing_is_left(tokenizer):
    with pytest.raises(ValueError, match=r"^Pieces: sentences must have a word that the tokenizer knows, got none$"):
        Pieces(TagTask("test", (), (), NAMES), SENTENCES[1:2], tokenizer, 16)


def test_a_tokenizer_of_roberta_sees_words_as_in_a_text(tmp_path):
    from transformers import RobertaTokenizer

    from distilbert_fast.modeling.loading import load_tokenizer

    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "b", "Ġ", "Ġa", "Ġb", "ab"]
    merges = [("Ġ", "a"), ("Ġ", "b"), ("a", "b")]
    RobertaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    tokenizer = load_tokenizer(tmp_path, "TokenClassification")
    pieces = Pieces(TagTask("x", (), (), NAMES), [Sentence(("a", "ba"), (1, 2))], tokenizer, 16)
    tokens = tokenizer.convert_ids_to_tokens(pieces.rows[0]["input_ids"])
    assert (
        tokens == ["<s>", "Ġa", "Ġb", "a", "</s>"] == tokenizer.convert_ids_to_tokens(tokenizer(" a ba")["input_ids"])
    )
    assert pieces.rows[0]["labels"] == [-100, 1, 2, -100, -100]
    tokenizer.save_pretrained(tmp_path / "again")  # as beside the student
    (tmp_path / "again" / "config.json").write_text('{"model_type": "distilbert"}')
    again = load_tokenizer(tmp_path / "again", "TokenClassification")
    assert again(["a", "ba"], is_split_into_words=True)["input_ids"] == pieces.rows[0]["input_ids"]


def test_pieces_of_a_real_file_keep_its_words(tmp_path):
    from transformers import AutoTokenizer

    task = load_tokens(data=conll(tmp_path / "x.conll", 40, seed=1))
    tokenizer = AutoTokenizer.from_pretrained(bert(tmp_path / "bert"))
    pieces = Pieces(task, task.train, tokenizer, 6)
    assert pieces.words.tolist() == list(range(sum(len(row.words) for row in task.train)))
    assert len(pieces.rows) > len(task.train)


POS = "EU\tNNP\nrejects\tVBZ\n\nPeter\tNNP\nb\tNN\n"
NER = "EU B-ORG\nrejects O\n\nPeter B-PER\nB I-PER\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            NER.replace("\n", "\r\r\n"),
            "line 1: expected lines that end with LF, CRLF or CR, got a CR beside a line end",
        ),
        (NER.replace("\n", "\n\r"), "line 1: expected lines that end with LF, CRLF or CR"),
        (NER + "c O\r\r\nd O\n", "line 6: expected lines that end with LF, CRLF or CR"),
        (POS + "New York\n", "line 6: expected tabs between columns as in other lines, got 'New York'"),
        ("New York\n" + POS, "line 1: expected tabs between columns as in other lines, got 'New York'"),
        (POS + "# sent1\n", "line 6: expected comments before a sentence, got '# sent1' inside one"),
        ("# sent1\n" + POS.replace("\t", " "), "line 1: expected a word and its tag, or a comment such as"),
        (NER + "c o\n", "line 6: expected tags such as B-PER, I-PER and O, got 'o'"),
        (NER + "c b-ORG\n", "line 6: expected tags such as B-PER, I-PER and O, got 'b-ORG'"),
        *(
            (NER.replace("-", mark), f"line 1: expected tags such as B-PER, I-PER and O, got 'B{mark}ORG'")
            for mark in (":", "\u2013", "/", "|", ".", "\u2212", "=", "+")
        ),
        (NER + "\n\ufeffc O\n", "line 7: expected a mark (BOM) at the file's beginning alone, got one here"),
        *(
            (f"{NER}c B-ORG{mark}\n", f"line 6: expected a tag of visible characters, got {f'B-ORG{mark}'!a}")
            for mark in ("\u00a0", "\u200b", "\u3000", "\u2028", "\x85", "\ufe0f", "\u3164", "\xad", "\x07")
        ),
        ("a\tB-X  Y\nb\tO\n", "line 1: expected a tag of visible characters, got 'B-X  Y'"),
        (NER + "\u200b I-ORG\n", "line 6: expected a word of visible characters, as its tag is I-ORG, got '\\u200b'"),
        (POS + "\u2060\tNN\n", "line 6: expected a word of visible characters, as its tag is NN, got '\\u2060'"),
        ("% a comment\n" + NER, "line 1: expected 2 columns as in other lines, got '% a comment'"),
        ("John\n" + NER, "line 1: expected 2 columns as in other lines, got 'John'"),
        (NER + "c\n\nd\n\ne\n\nf\n\ng\n", "line 6: expected 2 columns as in the lines before, got 'c'"),
        *(
            (f"{NER}c {tag}\n", f"line 6: expected a tag with a type, such as B-PER, got {tag!r}")
            for tag in ("B-", "I-", "i_", "S-", "-B")
        ),
        ("a PER:B\nb PER:I\nc O\n", "line 1: expected tags such as B-PER, I-PER and O, got 'PER:B'"),
        ("a 1.0\nb 0.0\n", "line 1: expected the names of tags, such as B-PER, got the number 1.0"),
        ("a True\nb False\n", "line 1: expected the names of tags, such as B-PER, got True"),
    ],
)
def test_lines_that_would_be_read_as_others(tmp_path, content, message):
    path = tmp_path / "a.conll"
    path.write_bytes(content.encode())
    with pytest.raises(ValueError) as caught:
        load_tokens(data=path, eval_data=path)
    assert str(caught.value).startswith(f"load_tokens: data: {str(path)!r}: {message}")


def test_comments_of_a_file_with_tabs(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text("# sent1\n" + POS.replace("\n\n", "\n\n# sent2\n# x y\n") + "#\tSYM\n")
    task = load_tokens(data=path, eval_data=path)
    assert [row.words for row in task.train] == [("EU", "rejects"), ("Peter", "b", "#")]


@pytest.mark.parametrize("tags", ["[0.0, 1.0]", "[1e0, 2.5]", "[false, true]", '["0.0", "1.0"]'])
def test_tags_that_name_nothing(tmp_path, tags):
    path = tmp_path / "a.jsonl"
    path.write_text('{"tokens": ["a", "b"], "ner_tags": ' + tags + "}\n")
    with pytest.raises(ValueError, match=r"a\.jsonl'?: row 1: expected the names of tags, such as B-PER, got "):
        load_tokens(data=path, eval_data=path)


def test_spaces_around_tags_are_no_part_of_them(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"tokens": ["a", " b", "c"], "ner_tags": ["O ", " B-X", "O"]}\n')
    task = load_tokens(data=path, eval_data=path)
    assert task.tag_names == ("O", "B-X") and task.train == (Sentence(("a", " b", "c"), (0, 1, 0)),)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('["a", "b"], "tags": ["O", "B-X\\u200b"]', "a tag of visible characters, got 'B-X\\u200b'"),
        ('["a", "b"], "tags": ["O", "B-"]', "a tag with a type, such as B-PER, got 'B-'"),
        ('["\\u200b", "b"], "tags": ["B-X", "O"]', "a word of visible characters, as its tag is B-X, got '\\u200b'"),
    ],
)
def test_rows_with_what_nobody_sees(tmp_path, row, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"tokens": ["a", "\\u200b"], "tags": ["B-X", "O"]}\n')
    assert load_tokens(data=path, eval_data=path).train[0].words == ("a", "\u200b")
    path.write_text(path.read_text() + '{"tokens": ' + row + "}\n")
    with pytest.raises(ValueError) as caught:
        load_tokens(data=path, eval_data=path)
    assert str(caught.value) == f"load_tokens: data: {str(path)!r}: row 2: expected {message}"
