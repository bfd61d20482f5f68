"""Faults of the original distiller: each with its old form, which fails, and ours.

That its question answering spans padding is in test_objectives.py, that it saves weights only in
runs/test_resumable_trainer.py.
"""

from __future__ import annotations

import itertools
import shutil

import accelerate.data_loader
import pytest
import torch
from distillation import tiny

from distilbert_fast.distillation.objectives.mlm import MlmObjective
from distilbert_fast.distillation.teachers.model import ModelTeacher
from distilbert_fast.distillation.trainer import DistillationTrainer
from distilbert_fast.runs.resumable_trainer import _Endless, _SetEpoch


def tensors(rows):
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


# Each micro-batch was divided by its own N ---------------------------------------------------------------------


def test_every_loss_is_divided_by_its_own_count_of_the_whole_step():
    teacher = tiny.teacher("MaskedLM").double()
    student = tiny.student(teacher, dropout=0.0).double()
    rows = tiny.masked_rows(8, seed=1)
    parts = [tensors(rows[:2]), tensors(rows[2:3]), tensors(rows[3:])]
    objective = MlmObjective()
    weights = torch.tensor(objective.weights(0.0))

    def gradient(batch, counts):
        sums = objective(student, ModelTeacher(teacher), batch, 0.0).sums
        loss = (sums / counts.clamp(min=1) * weights).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(student.parameters()))])

    whole = gradient(tensors(rows), objective.counts(tensors(rows)))
    counts = [objective.counts(part) for part in parts]
    assert torch.stack(counts)[:, 1].tolist() != [1] * 3 and min(c[1] for c in counts) == 0  # one has nothing masked
    ours = sum(gradient(part, sum(counts)) for part in parts)
    old = sum(gradient(part, count) for part, count in zip(parts, counts, strict=True)) / len(parts)
    by_one_count = sum(gradient(part, sum(counts)[1].expand(3)) for part in parts)  # that of the labels, as in Trainer
    torch.testing.assert_close(ours, whole, atol=1e-12, rtol=1e-9)
    for wrong in (old, by_one_count):
        assert (wrong - whole).norm() > 0.05 * whole.norm()


# Without set_epoch every epoch had the same batches ------------------------------------------------------------


class Masked(torch.utils.data.Dataset):
    """Rows that are masked differently in each epoch; it notes in which epoch each was read."""

    def __init__(self, rows):
        self.rows, self.epoch, self.read = rows, 0, []

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.read.append(self.epoch)
        row, place = self.rows[index], self.epoch % 3
        labels = [-100] * tiny.LENGTH
        labels[place] = row["input_ids"][place]
        return {**row, "labels": labels}


class Ordered(DistillationTrainer):
    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def train(output_dir, callback=True, resume=None):
    teacher = tiny.teacher("MaskedLM")
    args = tiny.arguments(
        output_dir,
        objective="mlm",
        num_train_epochs=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=1,
    )
    dataset = Masked(tiny.rows(8))
    trainer = Ordered(tiny.student(teacher), teacher, args, dataset)
    if not callback:
        trainer.remove_callback(_SetEpoch)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, dataset.read


@pytest.fixture
def untold(monkeypatch):
    """Data loaders that tell a dataset nothing, as accelerate's do where the shards' sampler has epochs of its own."""
    monkeypatch.setattr(accelerate.data_loader.DataLoaderShard, "set_epoch", lambda self, epoch: None)


def test_each_epoch_masks_anew_and_a_resumed_one_as_it_would_have(tmp_path, untold):
    whole, read = train(tmp_path / "whole")
    assert sorted(read) == [0] * 8 + [1] * 8 + [2] * 8
    for step, epochs in ((3, {1, 2}), (4, {2})):  # inside of epoch 1, and at its end
        directory = tmp_path / f"resumed at {step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", directory / f"checkpoint-{step}")
        resumed, read = train(directory, resume="auto")
        assert set(read) == epochs
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_without_being_told_it_would_mask_alike(tmp_path, untold):
    _, read = train(tmp_path, callback=False)
    assert set(read) == {0}


# Gradients that were left over at the end of an epoch leaked into the next -------------------------------------


def descent(output_dir, rows, **settings):
    """By labels alone, four rows a step."""
    args = tiny.arguments(
        output_dir,
        alpha=0.0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        **settings,
    )
    return Ordered(tiny.student(tiny.teacher(), dropout=0.0), None, args, rows)


def descend(rows, steps):
    """The weights after plain descent; a step is the rows whose gradients it takes together."""
    model = tiny.student(tiny.teacher(), dropout=0.0)
    for step in steps:
        batch = tensors([rows[index] for index in step])
        logits = model(batch["input_ids"], batch["attention_mask"]).logits
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum") / len(step)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, g in zip(model.parameters(), gradients, strict=True):
                parameter -= 0.1 * g
    return flat(model)


def flat(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_no_gradient_is_left_over_at_the_end_of_an_epoch(tmp_path):
    rows = tiny.rows(6)
    trainer = descent(tmp_path, rows, num_train_epochs=2)
    trainer.train()
    assert trainer.state.global_step == 4
    first, last = [0, 1, 2, 3], [4, 5]
    right = descend(rows, [first, last, first, last])
    old = descend(rows, [first, last + first])  # the last two batches of an epoch never made a step of their own
    torch.testing.assert_close(flat(trainer.model), right, atol=1e-6, rtol=1e-5)
    assert (old - right).abs().max() > 1e-3


class Stream(torch.utils.data.IterableDataset):
    """Rows without a length; it notes in which epochs it was begun."""

    def __init__(self, rows):
        self.rows, self.begun = rows, []
        self.epoch = torch.tensor(-1).share_memory_()

    def set_epoch(self, epoch):
        self.epoch.fill_(epoch)

    def __iter__(self):
        self.begun.append(int(self.epoch))
        yield from self.rows


def test_nor_at_the_end_of_a_stream_and_a_resumed_run_reads_on(tmp_path):
    rows, saving = tiny.rows(5), {"save_strategy": "steps", "save_steps": 1}
    stream = Stream(rows)
    trainer = descent(tmp_path / "whole", stream, max_steps=4, **saving)
    assert trainer.accelerator.dispatch_batches is False  # batches of several processes may differ in width
    trainer.train()
    assert stream.begun == [0, 1, 2, 3]
    expected = descend(rows, [[0, 1, 2, 3], [4, 0, 1, 2], [3, 4, 0, 1], [2, 3, 4, 0]])
    torch.testing.assert_close(flat(trainer.model), expected, atol=1e-6, rtol=1e-5)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    resumed = descent(tmp_path / "resumed", stream, max_steps=4, **saving)
    resumed.train(resume_from_checkpoint="auto")
    assert torch.equal(flat(resumed.model), flat(trainer.model)) and resumed.train_dataset is stream


class Numbers(Stream):
    """In each worker its own share, in an order that the epoch decides."""

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        for number in range(worker.id, 12, worker.num_workers + worker.id):  # one worker has less than the other
            yield number + 100 * int(self.epoch)


def test_each_worker_counts_its_own_epochs():
    loader = torch.utils.data.DataLoader(_Endless(Numbers([])), batch_size=1, num_workers=2)
    read = [int(number) for number in itertools.islice(loader, 36)]
    shares = [0, 2, 4, 6, 8, 10], [1, 4, 7, 10]
    for worker, share in enumerate(shares):
        expected = [number + 100 * epoch for epoch in range(5) for number in share]
        assert read[worker::2] == expected[:18], worker


# Weight decay missed the names of its LayerNorms ---------------------------------------------------------------


@pytest.mark.parametrize("fast", [False, True])
def test_no_layer_norm_and_no_bias_decays(tmp_path, fast):
    student = tiny.student(tiny.teacher("MaskedLM"))
    student = tiny.drop_in(student) if fast else student
    args = tiny.arguments(tmp_path, objective="mlm", alpha_ce=0, alpha_cos=0, weight_decay=0.1)
    trainer = DistillationTrainer(student, None, args, tiny.masked_rows(2))
    decayed = [group for group in trainer.create_optimizer().param_groups if group["weight_decay"] > 0]
    ours = {id(parameter) for group in decayed for parameter in group["params"]}
    named = dict(student.named_parameters())
    matrices = {name for name, parameter in named.items() if parameter.dim() == 2}
    assert {name for name, parameter in named.items() if id(parameter) in ours} == matrices
    old = {name for name in named if not any(part in name for part in ("bias", "LayerNorm.weight"))}
    assert {name.split(".")[-2] for name in old - matrices} == {
        "sa_layer_norm",
        "output_layer_norm",
        "vocab_layer_norm",
    }
