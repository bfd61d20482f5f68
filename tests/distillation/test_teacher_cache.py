"""A cache of a teacher's answers: what is read is what the teacher said, or nothing is."""

from __future__ import annotations

import errno
import logging
import os
import resource
import shutil
import signal

import numpy as np
import pytest
import torch
from distillation import runs, tiny

datasets = pytest.importorskip("datasets")

from distilbert_fast.data.masking import MaskedDataset, Masking, pad_collator, pad_rows  # noqa: E402
from distilbert_fast.distillation.objectives.mlm import MlmObjective  # noqa: E402
from distilbert_fast.distillation.objectives.task import TaskObjective  # noqa: E402
from distilbert_fast.distillation.teachers import build_cache as building  # noqa: E402
from distilbert_fast.distillation.teachers.build_cache import build_cache, cache_report  # noqa: E402
from distilbert_fast.distillation.teachers.cache import CachedTeacher  # noqa: E402
from distilbert_fast.distillation.teachers.model import ModelTeacher  # noqa: E402
from distilbert_fast.distillation.trainer import DistillationTrainer  # noqa: E402

V = tiny.VOCABULARY
TAU = 2.0
FEATURES = datasets.Features(
    {"input_ids": datasets.Sequence(datasets.Value("uint16")), "length": datasets.Value("int32")}
)


class Tokenizer:
    pad_token_id, mask_token_id, all_special_ids = 0, 3, (0, 1, 2, 3)

    def __len__(self):
        return V


def corpus(count=11, seed=0):
    generator = np.random.default_rng(seed)
    ids = [generator.integers(4, V, length).tolist() for length in generator.integers(2, tiny.LENGTH + 1, count)]
    return datasets.Dataset.from_dict({"input_ids": ids, "length": list(map(len, ids))}, FEATURES)


def masked(count=11, seed=0, masking_seed=0, name="train", **settings):
    rows = corpus(count, seed)
    rows._fingerprint = f"{name}{seed}"
    return MaskedDataset(rows, Masking(Tokenizer(), None, probability=0.4, seed=masking_seed), **settings)


def mlm(**settings):
    """With room for what collators round lengths up to."""
    return tiny.teacher("MaskedLM", **{"max_position_embeddings": 16, **settings})


def batch_of(dataset, examples=None):
    return pad_rows(dataset.__getitems__(list(range(len(dataset)) if examples is None else examples)), 0)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(building, "_EXAMPLES", 4)


@pytest.fixture
def model():
    return mlm()


def contents(directory):
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


@pytest.mark.parametrize("positions", ["real", "masked"])
def test_it_holds_what_the_teacher_says_of_every_row(tmp_path, model, positions):
    """Example by example, against the model's own forward of it alone; epochs, and a held-out set, too."""
    dataset, held_out = masked(), masked(5, seed=1, name="held out").at_epoch(7)
    build_cache(
        model,
        dataset,
        tmp_path / "c",
        k=5,
        temperature=TAU,
        positions=positions,
        hidden=True,
        epochs=2,
        held_out=held_out,
    )
    teacher = CachedTeacher(tmp_path / "c", dataset, model)
    rows_seen = 0
    for part in (dataset.at_epoch(0), dataset.at_epoch(1), held_out):
        for example in range(len(part)):
            batch = batch_of(part, [example])
            counted = batch["attention_mask"] & ((batch["labels"] != -100) | (positions == "real"))
            rows = counted.flatten().nonzero().flatten()
            with torch.no_grad():
                logits = model(batch["input_ids"], batch["attention_mask"]).logits[0, rows]
                hidden = model.bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state[0, rows]
            p = torch.softmax(logits.double() / TAU, dim=1)
            answer = teacher.answer(batch)
            soft = answer.soft_targets(rows)
            top, ids = p.topk(5, dim=1)
            assert torch.equal(soft.ids, ids)
            torch.testing.assert_close(soft.log_p.double(), top.log(), rtol=1e-3, atol=2e-3)
            torch.testing.assert_close(
                soft.log_tail.double(), p.scatter(1, ids, 0).sum(dim=1).log(), rtol=1e-3, atol=2e-3
            )
            torch.testing.assert_close(soft.log_p.exp().sum(dim=1) + soft.log_tail.exp(), torch.ones(len(rows)))
            torch.testing.assert_close(answer.hidden(rows), hidden, rtol=1e-3, atol=2e-3)
            rows_seen += len(rows)
    assert teacher.rows == rows_seen


@pytest.mark.parametrize("positions", ["real", "masked"])
def test_with_all_tokens_the_losses_are_the_models(tmp_path, model, positions):
    dataset = masked()
    build_cache(model, dataset, tmp_path / "c", k=V, temperature=TAU, positions=positions, hidden=True)
    cache = CachedTeacher(tmp_path / "c", dataset, model)
    objective = MlmObjective(TAU, cos=float(positions == "real"), kd_positions=positions)
    cache.check(objective)
    student = tiny.student(model, dropout=0.0)
    results = []
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0)).tolist()
    for teacher in (cache, ModelTeacher(model, "model")):
        student.zero_grad()
        sums = sum(objective(student, teacher, batch_of(dataset, part), 0.0).sums for part in (order[:4], order[4:]))
        sums.sum().backward()
        results.append([sums.detach(), *(p.grad.clone() for p in student.parameters() if p.grad is not None)])
    for ours, exact in zip(*results, strict=True):
        assert float((ours - exact).norm()) <= 2e-3 * float(exact.norm()) + 1e-6
    assert torch.equal(results[0][0][1], results[1][0][1])  # that of the labels has nothing to do with a teacher


def test_fewer_tokens_bound_the_kl_from_below_and_the_report_tells(tmp_path, model):
    dataset, student = masked(), tiny.student(model)
    changes = []
    for k in (1, 8, 32, V):
        build_cache(model, dataset, tmp_path / str(k), k=k, temperature=TAU)
        cache = CachedTeacher(tmp_path / str(k), dataset)
        report = cache_report(cache, student, model, [batch_of(dataset)])
        assert report.keys() == {"bytes_per_token", "tail_mass", "kl", "loss_change"}
        assert report["bytes_per_token"] > 4 * k + 4 and abs(report["kl"]) < 1e-4
        objective = MlmObjective(TAU, mlm=0.0, cos=0.0)
        with torch.no_grad():
            kl, full = (
                float(objective(student.eval(), teacher, batch_of(dataset), 0.0).sums[0])
                for teacher in (cache, ModelTeacher(model, "model"))
            )
        assert report["loss_change"] == pytest.approx(kl / full - 1, abs=1e-6)
        changes.append(report["loss_change"])
    assert report["tail_mass"] == 0
    assert changes == sorted(changes) and changes[0] < -0.01 and abs(changes[-1]) < 1e-3


@pytest.mark.parametrize("vocabulary", [2**16, 2**16 + 1])
def test_ids_of_any_vocabulary(tmp_path, vocabulary):
    teacher = mlm(vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    with torch.no_grad():
        teacher.cls.predictions.bias[-1] = 100.0
    dataset = masked(3)
    build_cache(teacher, dataset, tmp_path / "c", k=2)
    soft = CachedTeacher(tmp_path / "c").answer(batch_of(dataset, [0])).soft_targets(torch.tensor([0, 1]))
    assert soft.ids[:, 0].tolist() == [vocabulary - 1] * 2 and soft.ids.dtype == torch.int64
    assert soft.log_p[:, 0].tolist() == pytest.approx([0, 0], abs=1e-3)


def test_another_key_is_refused_by_name(tmp_path, model):
    dataset, directory = masked(), tmp_path / "c"
    build_cache(model, dataset, directory, k=3)
    key = CachedTeacher(directory).key
    for name, other, now in (
        ("corpus", lambda: CachedTeacher(directory, masked(seed=1)), ""),
        ("seed", lambda: CachedTeacher(directory, masked(masking_seed=1)), 1),
        ("teacher", lambda: CachedTeacher(directory, dataset, mlm(seed=1)), ""),
        ("temperature", lambda: build_cache(model, dataset, directory, k=3, temperature=1.0), 1.0),
        ("k", lambda: build_cache(model, dataset, directory, k=4), 4),
        ("positions", lambda: build_cache(model, dataset, directory, k=3, positions="masked"), "masked"),
        ("epochs", lambda: build_cache(model, dataset, directory, k=3, epochs=2), 2),
        ("precision", lambda: build_cache(ModelTeacher(model, "int8"), dataset, directory, k=3), "int8"),
    ):
        with pytest.raises(ValueError) as caught:
            other()
        assert f"{directory} was made of " in str(caught.value) and f"{name} {key[name]}, not {now}" in str(
            caught.value
        )
    assert build_cache(model, dataset, directory, k=3) == directory  # the same: nothing to do


def test_an_example_that_is_not_in_it_is_refused(tmp_path, model):
    dataset = masked()
    build_cache(model, dataset, tmp_path / "c", k=3, epochs=2)
    teacher = CachedTeacher(tmp_path / "c", dataset)
    batch = batch_of(dataset)
    batch["input_ids"][2, 1] += 1
    with pytest.raises(ValueError) as caught:
        teacher.answer(batch)
    assert str(caught.value) == (
        f"CachedTeacher: 1 of 11 examples are not in {tmp_path / 'c'}, which holds epochs 0 to 1 masked with seed 0: "
        "their tokens or masks are others"
    )
    with pytest.raises(ValueError, match=r" of 11 examples are not in "):
        teacher.answer(batch_of(dataset.at_epoch(2)))


def test_examples_that_are_alike_have_one_answer(tmp_path, model):
    """Of special tokens alone nothing is drawn, so their masks are alike as well."""
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2], [1, 5, 2], [1, 2]], "length": [2, 3, 2]}, FEATURES)
    dataset = MaskedDataset(rows, Masking(Tokenizer(), None))
    for positions in ("real", "masked"):
        build_cache(model, dataset, tmp_path / positions, k=3, positions=positions, epochs=2)
        answer = CachedTeacher(tmp_path / positions, dataset).answer(batch := batch_of(dataset))
        counted = batch["attention_mask"] & ((batch["labels"] != -100) | (positions == "real"))
        assert (
            len(answer.soft_targets(counted.flatten().nonzero().flatten()).ids) == {"real": 7, "masked": 1}[positions]
        )


def test_only_drawn_rows_are_found_by_where_they_are(tmp_path, model):
    """A token that was drawn and stays does not show in the ids: the same ids with other rows are not found."""
    dataset = masked()
    build_cache(model, dataset, tmp_path / "c", k=3, positions="masked")
    teacher, batch = CachedTeacher(tmp_path / "c"), batch_of(dataset)
    drawn = (batch["labels"] != -100).flatten().nonzero().flatten()
    other = (batch["attention_mask"] & (batch["labels"] == -100)).flatten().nonzero().flatten()
    assert len(teacher.answer(batch).soft_targets(drawn).ids) == len(drawn)
    with pytest.raises(ValueError, match="holds masked tokens, others are asked for"):
        teacher.answer(batch).soft_targets(other)
    batch["labels"].view(-1)[other[0]] = 5
    with pytest.raises(ValueError, match="1 of 11 examples are not in"):
        teacher.answer(batch)


def test_what_a_cache_cannot_answer_is_refused_at_once(tmp_path, model):
    for positions in ("real", "masked"):
        build_cache(model, masked(), tmp_path / positions, k=3, positions=positions)
    real, drawn = (CachedTeacher(tmp_path / positions) for positions in ("real", "masked"))
    for teacher, objective, message in (
        (real, TaskObjective(2.0, 0.5), "objective must be mlm, got TaskObjective"),
        (real, MlmObjective(1.0), "temperature must be 2.0, that of the cache, got 1.0"),
        (real, MlmObjective("linear:2:1"), "temperature must be 2.0, that of the cache, got linear:2:1"),
        (real, MlmObjective(mse=1.0), "the weight of mse must be 0: a cache does not hold what it needs, got 1.0"),
        (
            real,
            MlmObjective(),
            "the weight of cos must be 0 for a cache without the hidden states of all tokens, got 1.0",
        ),
        (drawn, MlmObjective(cos=0.0), "kd_positions must be masked, the rows of the cache, got real"),
    ):
        with pytest.raises(ValueError) as caught:
            teacher.check(objective)
        assert str(caught.value) == f"CachedTeacher: {message}"
    real.check(MlmObjective(cos=0.0, kd_positions="masked"))
    answer, rows = real.answer(batch_of(masked())), torch.tensor([0])
    for call in (answer.logits, answer.attention_inputs, lambda: answer.hidden(rows), lambda: answer.hidden(rows, 0)):
        with pytest.raises(ValueError, match=r"^CachedTeacher: .*holds no"):
            call()
    wide = torch.nn.Linear(32, V + 1)
    with pytest.raises(ValueError, match=f"model must be one with the {V} tokens of the cache, got {V + 1}"):
        answer.soft_targets(rows).losses(torch.ones(1, 32), wide, 2.0, rows == 0, rows)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": 0}, f"k must be from 1 to the {V} tokens of the vocabulary, got 0"),
        ({"k": V + 1}, f"k must be from 1 to the {V} tokens of the vocabulary, got {V + 1}"),
        ({"temperature": 0.0}, "temperature must be finite and above 0, got 0.0"),
        ({"positions": "all"}, "positions must be one of 'real', 'masked', got 'all'"),
        ({"epochs": 0}, "epochs must be 1 or more, got 0"),
        (
            {"held_out": masked(name="held out")},
            "held_out must be masked alike every time, with cycle=1, got cycle=None",
        ),
        ({"dataset": [1]}, "dataset must be a MaskedDataset, got list"),
        ({"dataset": masked(0)}, "dataset must be of one example at least, got none"),
    ],
)
def test_bad_arguments(tmp_path, model, changed, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        build_cache(**{"teacher": model, "dataset": masked(), "directory": tmp_path / "c"} | changed)
    assert str(caught.value) == f"build_cache: {message}"
    assert not any(tmp_path.iterdir())


def test_a_directory_that_is_no_cache(tmp_path, model):
    with pytest.raises(ValueError, match=r"directory must be a cache that build_cache wrote, got .*not a directory"):
        CachedTeacher(tmp_path / "none")
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="directory must be a new one, or a complete cache, got"):
        build_cache(model, masked(), tmp_path / "mine")
    path = build_cache(model, masked(), tmp_path / "c", k=3)
    shard = path / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"shard-00001.safetensors has \d+ bytes, its manifest says \d+"):
        CachedTeacher(path)


@pytest.mark.parametrize("name", ["index.safetensors", "shard-00000.safetensors"])
def test_a_file_that_was_altered_is_refused_when_it_is_needed(tmp_path, model, name):
    dataset = masked()
    path = build_cache(model, dataset, tmp_path / "c", k=3)
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 1
    (path / name).write_bytes(content)
    teacher = CachedTeacher(path, dataset)
    with pytest.raises(ValueError) as caught:
        teacher.answer(batch_of(dataset)).soft_targets(torch.tensor([0]))
    assert str(caught.value) == (
        f"CachedTeacher: directory must be a cache as build_cache wrote it, got {path}: "
        f"the contents of {name} do not fit their checksum"
    )


def killed(work):
    """Do it in a forked process; its wait status."""
    process = os.fork()
    if process == 0:
        try:
            torch.set_num_threads(1)
            logging.disable(logging.CRITICAL)
            work()
        finally:
            os._exit(1)
    return os.waitpid(process, 0)[1]


@pytest.mark.parametrize("shards", [2, 6])
def test_a_build_that_is_killed_goes_on(tmp_path, model, monkeypatch, shards):
    """After the shards that are whole; these are kept, too, if it dies at the very last step."""
    dataset = masked()
    whole = contents(build_cache(model, dataset, tmp_path / "whole", k=3, epochs=2))
    assert sum(name.startswith("shard") for name in whole) == 6

    def die():
        replace, moved = os.replace, []

        def replacing(source, target):
            if "key" not in str(target):
                if len(moved) == shards:
                    os.kill(os.getpid(), signal.SIGKILL)
                moved.append(target)
            replace(source, target)

        monkeypatch.setattr(os, "replace", replacing)
        build_cache(model, dataset, tmp_path / "c", k=3, epochs=2)

    assert os.WTERMSIG(killed(die)) == signal.SIGKILL
    partial = tmp_path / ".c.partial"
    kept = {file.name: file.stat().st_mtime_ns for file in partial.glob("shard-*.safetensors")}
    assert len(kept) == shards and not (tmp_path / "c").exists()
    with pytest.raises(ValueError, match=r"build_cache \(delete it to start again\): .* was made of k 3, not 4"):
        build_cache(model, dataset, tmp_path / "c", k=4, epochs=2)
    path = build_cache(model, dataset, tmp_path / "c", k=3, epochs=2)
    assert {name: (path / name).stat().st_mtime_ns for name in kept} == kept
    assert contents(path) == whole and not partial.exists()


def test_a_disk_that_is_too_small_or_full(tmp_path, model, monkeypatch):
    dataset = masked()
    needed = 4 * (3 + 1) * sum(dataset.lengths)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
        with pytest.raises(OSError, match=r"build_cache: .*\.c\.partial needs 0.000 GB on a disk that has") as caught:
            build_cache(model, dataset, tmp_path / "c", k=3)
        assert caught.value.errno == errno.ENOSPC
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
        build_cache(model, dataset, tmp_path / "enough", k=3)

    def fill():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
        try:
            build_cache(model, dataset, tmp_path / "c", k=3)
        except OSError as error:
            if "could not write" in str(error) and error.errno == errno.EFBIG:
                os._exit(7)

    assert os.WEXITSTATUS(killed(fill)) == 7
    path = build_cache(model, dataset, tmp_path / "c", k=3)
    assert contents(path) == contents(tmp_path / "enough")


def trainer(output_dir, cache, model, dataset, held_out, **settings):
    torch.manual_seed(3)
    settings = {
        "objective": "mlm",
        "teacher_cache": str(cache),
        "learning_rate": 1e-2,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 3,
        "save_strategy": "steps",
        "save_steps": 3,
        "eval_strategy": "epoch",
        **runs.length_grouped(),
        **settings,
    }
    return DistillationTrainer(
        tiny.student(mlm()),
        model,
        tiny.arguments(output_dir, **settings),
        dataset,
        eval_dataset=held_out,
        data_collator=pad_collator(Tokenizer()),
    )


def test_training_by_a_cache_learns_evaluates_and_resumes_to_the_last_bit(tmp_path, model):
    dataset, held_out = masked(), masked(5, seed=1, name="held out").at_epoch(7)
    cache = build_cache(model, dataset, tmp_path / "c", k=8, hidden=True, epochs=2, held_out=held_out)
    whole = trainer(tmp_path / "whole", cache, None, dataset, held_out)
    before = whole.evaluate()
    whole.train()
    after = whole.evaluate()
    assert after["eval_kl"] < before["eval_kl"] and after["eval_cos"] < before["eval_cos"]

    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    resumed = trainer(tmp_path / "resumed", cache, model, dataset, held_out)  # with its teacher, to be checked
    resumed.train(resume_from_checkpoint="auto")
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)

    long = {"num_train_epochs": 3, "save_strategy": "no"}
    with pytest.raises(ValueError, match=r"args.num_train_epochs must be at most 2, the epochs of the cache, .*got 3"):
        trainer(tmp_path / "long", cache, None, dataset, held_out, **long)
    trainer(tmp_path / "long", cache, None, masked(cycle=2), held_out, **long).train()

    mixed = trainer(tmp_path / "bf16", cache, None, dataset, held_out, bf16=True)
    mixed.train()
    assert mixed.evaluate()["eval_kl"] == pytest.approx(after["eval_kl"], rel=0.1)

    other = build_cache(model, dataset, tmp_path / "other", k=9, hidden=True, epochs=2, held_out=held_out)
    with pytest.raises(ValueError, match=r"teacher was .*\"k\": 8.*, is .*\"k\": 9"):
        trainer(tmp_path / "resumed", other, None, dataset, held_out).train(resume_from_checkpoint="auto")
    with pytest.raises(ValueError, match=r"CachedTeacher: .* was made of teacher .*, not "):
        trainer(tmp_path / "third", cache, mlm(seed=5), dataset, held_out)
    with pytest.raises(ValueError, match=r"CachedTeacher: .* was made of masking .*; seed 0, not 4"):
        trainer(tmp_path / "third", cache, None, masked(masking_seed=4), held_out)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_made_and_read_on_a_gpu(tmp_path, model):
    dataset, held_out = masked(), masked(5, seed=1, name="held out").at_epoch(7)
    cache = build_cache(model, dataset, tmp_path / "c", k=8, hidden=True, epochs=2, held_out=held_out)
    training = trainer(tmp_path / "run", cache, None, dataset, held_out, use_cpu=False, bf16=True)
    before = training.evaluate()["eval_loss"]
    training.train()
    assert training.evaluate()["eval_loss"] < before


def test_the_real_bert(tmp_path, bert_dir, tokenizer):
    """Real text and weights, below a masked-LM head of its own word embeddings: what 64 of 30,522 tokens leave out."""
    import transformers

    torch.manual_seed(0)
    model = transformers.BertForMaskedLM.from_pretrained(bert_dir, use_safetensors=True).eval()
    texts = [f"The {word} of a sequence is what its elements say." for word in ("sum", "order", "length", "median")]
    ids = tokenizer(texts)["input_ids"]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "length": list(map(len, ids))}, FEATURES)
    dataset = MaskedDataset(rows, Masking(tokenizer, None))
    cache = CachedTeacher(build_cache(model, dataset, tmp_path / "c"), dataset, model)
    student = transformers.BertForMaskedLM(model.config)
    report = cache_report(cache, student, model, [batch_of(dataset)])
    assert 4 * 64 + 4 < report["bytes_per_token"] < 400
    assert 0 < report["tail_mass"] < 1 and abs(report["kl"]) < 1e-3 and report["loss_change"] < 1e-4
