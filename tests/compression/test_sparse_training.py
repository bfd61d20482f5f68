"""Connections that go while a model is trained: how many when, what is chosen, and runs that are killed and resumed."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
import transformers
from distillation import tiny
from safetensors.torch import load_file

from distilbert_fast import SparsityCallback, SparsityConfig, prune_connections
from distilbert_fast.compression.connections import masks_of
from distilbert_fast.distillation.trainer import DistillationTrainer
from distilbert_fast.runs.resumable_trainer import ResumeError
from distilbert_fast.sparse import SparseLinear

STEPS = 12
SETTINGS = dict(max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-2)
SAVING = dict(save_strategy="steps", save_steps=3)


def layers(model):
    return [module for module in model.modules() if isinstance(module, SparseLinear)]


def gone(model):
    masks = torch.cat([layer.mask.flatten() for layer in layers(model)])
    return 1 - float(masks.float().mean())


class Watch(transformers.TrainerCallback):
    """Keeps what is gone in each step, and may stop the run as a kill does."""

    def __init__(self, stop=None):
        self.gone, self.masks, self.stop = [], [], stop

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.gone.append(gone(model))
        self.masks.append([layer.mask.clone() for layer in layers(model)])
        if state.global_step == self.stop:
            raise KeyboardInterrupt


def trainer(path, config, *callbacks, **settings):
    teacher = tiny.teacher()
    args = tiny.arguments(path, **SETTINGS | settings)
    callbacks = [SparsityCallback(config), *callbacks]
    return DistillationTrainer(tiny.student(teacher), teacher, args, tiny.rows(20), callbacks=callbacks)


def config(**settings):
    return SparsityConfig(**dict(amount=0.8, begin=0.25, end=0.75, updates=6) | settings)


@pytest.mark.parametrize("method", ["magnitude", "movement"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_share_follows_the_cubic_schedule(scope, method, tmp_path):
    watch = Watch()
    run = trainer(tmp_path, config(scope=scope, method=method), watch)
    assert len(layers(run.model)) == 6 and gone(run.model) == 0
    run.train()
    expected = [0.8 * (1 - (1 - min(max((t + 1) / 12 - 0.25, 0) / 0.5, 1)) ** 3) for t in range(STEPS)]
    assert watch.gone == pytest.approx(expected, abs=1e-3)
    assert expected[2] == 0 and expected[8] == 0.8 and all(watch.gone[8] == share for share in watch.gone[8:])
    back = any(bool((b & ~a).any()) for x, y in zip(watch.masks, watch.masks[1:], strict=False) for a, b in zip(x, y))  # noqa: B905
    assert back == (method == "movement")
    assert all(layer.scores is None for layer in layers(run.model))
    run.model.save_pretrained(tmp_path / "saved")
    read = type(run.model).from_pretrained(tmp_path / "saved")
    state = run.model.state_dict()
    assert len(layers(read)) == 6 and all(torch.equal(state[name], x) for name, x in read.state_dict().items())


def test_two_of_four_in_the_end(tmp_path):
    for method in ("magnitude", "movement"):
        watch = Watch()
        run = trainer(tmp_path, config(amount=0.5, pattern="2:4", method=method), watch)
        run.train()
        assert 0 < watch.gone[4] < 0.5
        for layer in layers(run.model):
            assert bool((layer.mask.unflatten(1, (-1, 4)).sum(-1) == 2).all())


def test_movement_keeps_what_gradients_say():
    layer = SparseLinear.from_linear(torch.nn.Linear(30, 7), torch.rand(7, 30) < 0.5)
    layer.scores = torch.nn.Parameter(torch.zeros(7, 30))
    x, dy = torch.randn(5, 30), torch.randn(5, 7)
    layer.weight.data[~layer.mask] = 0.3
    layer(x).backward(dy)
    torch.testing.assert_close(layer.scores.grad, (dy.T @ x) * layer.weight)
    torch.testing.assert_close(layer.weight.grad, (dy.T @ x) * layer.mask)
    torch.optim.SGD([layer.scores], lr=1.0).step()
    (mask,) = masks_of([layer.scores.detach()], 0.5, SparsityConfig(amount=0.5, method="movement"))
    assert int(mask.sum()) == 105 and layer.scores[mask].min() >= layer.scores[~mask].max()


@pytest.mark.parametrize("method", ["magnitude", "movement"])
def test_killed_and_resumed_it_ends_with_the_same_bits(method, tmp_path):
    whole = trainer(tmp_path / "whole", config(method=method), **SAVING)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "killed", config(method=method), Watch(stop=8), **SAVING).train()
    resumed = trainer(tmp_path / "killed", config(method=method), **SAVING)
    resumed.train(resume_from_checkpoint="auto")
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    file = "checkpoint-12/model.safetensors"
    a, b = (load_file(tmp_path / run / file) for run in ("whole", "killed"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    finished = trainer(tmp_path / "killed", config(method=method), **SAVING)
    finished.train(resume_from_checkpoint="auto")  # has no step left
    for (name, a), b in zip(whole.model.state_dict().items(), finished.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_is_a_sparse_model(tmp_path):
    run = trainer(tmp_path, config(), **SAVING)
    run.train()
    read = type(run.model).from_pretrained(tmp_path / "checkpoint-6")
    assert 0 < gone(read) < 0.8
    assert gone(type(run.model).from_pretrained(tmp_path / "checkpoint-12")) == pytest.approx(0.8, abs=1e-3)


def test_other_settings_do_not_resume(tmp_path):
    trainer(tmp_path, config(), **SAVING).train()
    with pytest.raises(ResumeError, match="was written with other settings: sparsity was"):
        trainer(tmp_path, config(amount=0.7), **SAVING).train(resume_from_checkpoint="auto")


def test_the_trainer_of_transformers_trains_so_too(tmp_path):
    model = tiny.teacher()
    args = transformers.TrainingArguments(
        output_dir=tmp_path, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", **SETTINGS
    )
    transformers.Trainer(model, args, train_dataset=tiny.rows(20), callbacks=[SparsityCallback(config())]).train()
    assert gone(model) == pytest.approx(0.8, abs=1e-3)


def test_a_run_that_ends_early_says_so(tmp_path, caplog):
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

    with caplog.at_level(logging.WARNING, "distilbert_fast"):
        trainer(tmp_path, config(), Stop()).train()
    assert caplog.messages == ["SparsityCallback: the training ended early: 56.3% of the weights are gone, not 80.0%"]


def test_the_best_model_of_a_run_is_refused():
    args = SimpleNamespace(load_best_model_at_end=True)
    with pytest.raises(ValueError, match=r"^SparsityCallback: args.load_best_model_at_end must be off: earlier models"):
        SparsityCallback(config()).on_init_end(args, None, None, model=tiny.teacher())


def test_movement_begins_with_all_weights():
    model = prune_connections(tiny.teacher(), SparsityConfig(0.5))
    args = SimpleNamespace(load_best_model_at_end=False)
    with pytest.raises(ValueError, match=r"^SparsityCallback: model must be a dense one for movement, got one that is"):
        SparsityCallback(config(method="movement")).on_init_end(args, None, None, model=model)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"begin": 0.5, "end": 0.5}, "begin and end must be 0 to 1, the second larger, got 0.5 and 0.5"),
        ({"begin": -0.1}, "begin and end must be 0 to 1, the second larger, got -0.1 and 0.75"),
        ({"end": 1.1}, "begin and end must be 0 to 1, the second larger, got 0.25 and 1.1"),
        ({"updates": 0}, "updates must be an integer of 1 or more, got 0"),
    ],
)
def test_schedules_that_cannot_be(given, message):
    with pytest.raises(ValueError) as caught:
        config(**given)
    assert str(caught.value) == f"SparsityConfig: {message}"
