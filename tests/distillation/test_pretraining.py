"""From text to a student: corpus, masking and trainer together."""

from __future__ import annotations

import shutil

import pytest
import torch
import transformers
from distillation import tiny

pytest.importorskip("datasets")

from distillation import corpora

from distilbert_fast import DistillationTrainer, MaskedDataset, Masking, load_corpus, pad_collator
from distilbert_fast.distillation.student import student_from_teacher

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    path = corpora.write(directory / "text.txt", corpora.documents()[:60])
    return load_corpus(path, corpora.roberta(), max_length=32, cache_dir=directory / "cache", holdout=0.1)


def teacher():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    tokenizer = corpora.roberta()
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=40, pad_token_id=tokenizer.pad_token_id, **sizes
    )
    model = transformers.RobertaForMaskedLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # so that its layers matter
    return model


def train(corpus, output_dir, architecture="distilbert", resume=None, **settings):
    transformers.set_seed(0)
    tokenizer = corpora.roberta()
    student, _ = student_from_teacher(teacher(), num_layers=1, architecture=architecture)
    student = tiny.drop_in(student) if architecture == "distilbert" else student
    masking = Masking(tokenizer, corpus.token_counts)
    args = tiny.arguments(
        output_dir,
        objective="mlm",
        num_train_epochs=3,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        train_sampling_strategy="group_by_length",
        learning_rate=3e-3,
        save_strategy="steps",
        save_steps=1,
        **settings,
    )
    train_rows, held_out = MaskedDataset(corpus.train, masking), MaskedDataset(corpus.holdout, masking)
    trainer = DistillationTrainer(
        student, teacher(), args, train_rows, eval_dataset=held_out, data_collator=pad_collator(tokenizer)
    )
    before = trainer.evaluate()
    trainer.train(resume_from_checkpoint=resume)
    return trainer, before, trainer.evaluate()


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """Where a run from its first step to its last was, its trainer, and evaluations before and after."""
    path = tmp_path_factory.mktemp("whole")
    return path, *train(corpus, path)


@pytest.mark.parametrize("architecture", ["distilbert", "roberta"])
def test_a_student_learns_from_text(corpus, tmp_path, whole, architecture):
    trainer, before, after = whole[1:] if architecture == "distilbert" else train(corpus, tmp_path, architecture)
    for name in ("loss", "mlm", "cos"):
        assert after[f"eval_{name}"] < before[f"eval_{name}"], name
    assert int(trainer.train_dataset._epoch) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_inside_an_epoch_it_ends_with_the_same_weights(corpus, tmp_path, whole, workers):
    path, trainer, _, evaluated = whole
    step = trainer.state.global_step // 2
    shutil.copytree(path / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    resumed, _, again = train(corpus, tmp_path, resume="auto", dataloader_num_workers=workers)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    assert again["eval_loss"] == evaluated["eval_loss"]
