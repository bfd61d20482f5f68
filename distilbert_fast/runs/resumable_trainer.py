"""A transformers Trainer that can be killed at any moment and goes on from its newest complete checkpoint.

What transformers' own Trainer does, and what is done here instead:

- it takes the newest checkpoint directory, whole or not: here only a complete one, see ``manifest``;
- it writes optimizer, scheduler, random states and its arguments with ``torch.save`` and unpickles them (with
  weights_only) to resume: here they are safetensors, so no checkpoint holds a pickle and none is ever loaded;
- a missing optimizer state resumes silently from zero: here every file of a checkpoint is accounted for;
- resuming a run that is finished trains one step more, if max_steps lies inside an epoch: here none;
- rotation deletes the old checkpoint before it is known that the new one is whole: here after;
- resumed inside an epoch, length-grouped batches come in another order than the epoch began with: here not;
- callbacks begin again in a resumed run, so that early stopping comes later: here they go on;
- in several processes, length-grouped batches are of a length in each process alone: here in all;
- evaluation draws from the random generators, so that evaluating more often changes the model: here not;
- a dataset's ``set_epoch`` is not always called, by several processes and in resumed epochs: here in every epoch;
- a stream that ends inside of an optimizer step leaves its gradients to the next one, and a run resumed after its first
  end reads on from the wrong place: here a stream restarts when exhausted (see ``_Endless``);
- of a stream one process reads for all, whose batches must then be of one width: here each process reads it.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import TrainOutput

from distilbert_fast.files.durable import FileError, filling, raise_disk_error
from distilbert_fast.runs import manifest
from distilbert_fast.runs.manifest import newest_complete_checkpoint
from distilbert_fast.runs.resume_settings import as_json, changes, describe_arguments, describe_dataset, describe_model
from distilbert_fast.runs.training_state import load_state, random_state, save_state, set_random_state

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

__all__ = ["ResumableTrainer", "ResumeError", "newest_complete_checkpoint"]

_OPTIMIZER = "optimizer.safetensors"
_SCALER = "scaler.safetensors"
_RANDOM = "random_state_{rank}.safetensors"


class ResumeError(FileError):
    """A checkpoint that training cannot go on from, or is not asked to."""


class ResumableTrainer(Trainer):
    """``transformers.Trainer`` whose checkpoints are trusted only when complete, and hold no pickle.

    Same arguments as Trainer. A run that is killed and resumed with ``train(resume_from_checkpoint="auto")``
    ends with the very weights of a run that was not, if the arithmetic of the machine is deterministic and
    the data collator and a stream are repeatable. A stream is one epoch, however often it is read: what is to be done
    every "epoch" is done at the end.

    Raises:
        ValueError: FSDP, DeepSpeed or save_only_model is asked for: their checkpoints cannot be resumed here.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refused = {
            "fsdp": self.is_fsdp_enabled,
            "deepspeed": self.is_deepspeed_enabled,
            "save_only_model": self.args.save_only_model,
        }
        for name in (name for name, on in refused.items() if on):
            raise ValueError(f"{type(self).__name__}: args.{name} must be off, got {getattr(self.args, name)}")
        if self.accelerator.dispatch_batches is None:
            self.accelerator.dataloader_config.dispatch_batches = False
        self.args.restore_callback_states_from_checkpoint = True
        self.add_callback(_SetEpoch(lambda: self.train_dataset))
        self._settings: dict[str, Any] = {}
        self._save_total_limit = self.args.save_total_limit

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: "auto" goes on from the newest complete checkpoint in output_dir, or
                starts if there is none; True does the same but refuses to start; a path goes on from that
                checkpoint; None or False starts.
            trial, ignore_keys_for_eval: as in Trainer; a trial is refused.

        Returns:
            Trainer's TrainOutput; of a run that was already finished, with the training loss logged last.

        Raises:
            ResumeError: the checkpoint is not complete, or was written with other settings or by another number of
                processes; or output_dir holds a complete checkpoint beyond the one this run starts from, which it
                would overwrite.
        """
        if trial is not None:
            raise ValueError(f"{type(self).__name__}: train: hyperparameter search is not supported")
        self._settings = as_json(self.resume_settings())
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        if checkpoint is not None and (done := self._take_finished(checkpoint)) is not None:
            return done
        self._save_total_limit = self.args.save_total_limit
        self.args.save_total_limit = None  # rotation is ours
        try:
            return super().train(checkpoint, ignore_keys_for_eval=ignore_keys_for_eval)
        finally:
            self.args.save_total_limit = self._save_total_limit

    def resume_settings(self) -> dict[str, Any]:
        """What must be the same to resume: all that shapes the course of training. Subclasses add theirs.

        How often to log, evaluate and save may change between a run and its continuation. A callback adds what its
        ``resume_settings()``, if it has one, returns.
        """
        settings = {
            **describe_arguments(self.args),
            "model": describe_model(self.model),
            "train_dataset": describe_dataset(self.train_dataset),
        }
        for callback in self.callback_handler.callbacks:
            settings |= getattr(callback, "resume_settings", dict)()
        return settings

    def _checkpoint_to_resume(self, asked: str | bool | None) -> str | None:
        """Path of the checkpoint to go on from, checked; None to start."""
        output_dir = self._output_dir
        newest = newest_complete_checkpoint(output_dir)
        if asked is None or asked is False:
            checkpoint = None
        elif asked is True or asked == "auto":
            checkpoint = newest
            if asked is True and newest is None:
                raise ResumeError(f"train: resume_from_checkpoint is True, but {output_dir} has no complete checkpoint")
        else:
            checkpoint = os.fspath(asked)
            if (reason := manifest.fault(Path(checkpoint))) is not None:
                raise ResumeError(f"train: cannot resume from {checkpoint}: {reason}")
        if newest is not None and (checkpoint is None or not Path(checkpoint).samefile(newest)):
            raise ResumeError(
                f"train: {output_dir} already holds {Path(newest).name}, complete; "
                f'pass resume_from_checkpoint="auto" to go on from it, or choose another output_dir'
            )
        if checkpoint is not None and (changed := changes(manifest.settings_of(Path(checkpoint)), self._settings)):
            raise ResumeError(
                f"train: {checkpoint} was written with other settings: {changed}; "
                "resume with the old ones, or choose another output_dir to start again"
            )
        return checkpoint

    def _take_finished(self, checkpoint: str) -> TrainOutput | None:
        """Load a checkpoint that has no step left to train; None if it has. Trainer would take one step more."""
        state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
        if state.global_step < state.max_steps:
            return None
        state.is_local_process_zero = self.is_local_process_zero()
        state.is_world_process_zero = self.is_world_process_zero()
        self.state = state
        self._load_from_checkpoint(checkpoint)
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        for callback in self.callback_handler.callbacks:
            getattr(callback, "finish", lambda model: None)(self.model)
        logged = [entry["loss"] for entry in state.log_history if "loss" in entry]
        return TrainOutput(state.global_step, logged[-1] if logged else math.nan, {})

    @property
    def _output_dir(self) -> Path:
        return Path(str(self.args.output_dir))

    # A checkpoint, written and read where Trainer calls for it --------------------------------------------------------

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        path = self._output_dir / f"checkpoint-{self.state.global_step}"
        if manifest.fault(path, contents=False) is None:
            return  # saved twice at one step: it is the same
        self.accelerator.wait_for_everyone()
        try:
            if self.args.should_save:
                manifest.make_room(path)
                manifest.begin(path)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                manifest.complete(path, self._settings)
        except Exception as error:
            shutil.rmtree(path, ignore_errors=True)
            newest = newest_complete_checkpoint(self._output_dir)
            kept = f"{newest} is kept" if newest else "no earlier checkpoint exists"
            raise_disk_error(error, f"could not save {path}", kept)
            raise
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            manifest.rotate(path.parent, self._save_total_limit, Path(best) if best else None)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer, but a file that is there is replaced only by a whole one, and nothing is pickled.

        Raises:
            OSError: the disk is full or cannot be written; the old files are untouched.
        """
        if _internal_call:
            return super().save_model(output_dir, _internal_call=True)
        try:
            return super().save_model(output_dir)
        except Exception as error:
            raise_disk_error(error, f"could not save {output_dir or self.args.output_dir}", "the old files are kept")
            raise

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write the model beside its place, bring it to the disk, then move it there file by file."""
        if not self.args.should_save:
            return
        place = self._output_dir if output_dir is None else Path(output_dir)
        with filling(place) as staging:
            super()._save(str(staging), state_dict)
            (staging / "training_args.bin").unlink(missing_ok=True)  # a pickle

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            assert self.optimizer is not None and self.lr_scheduler is not None
            state = {"optimizer": self.optimizer.state_dict(), "scheduler": self.lr_scheduler.state_dict()}
            save_state(Path(output_dir, _OPTIMIZER), state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            assert self.optimizer is not None and self.lr_scheduler is not None
            state = load_state(Path(checkpoint, _OPTIMIZER))
            self.optimizer.load_state_dict(state["optimizer"])
            self.lr_scheduler.load_state_dict(state["scheduler"])

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if self.args.should_save and scaler is not None:
            save_state(Path(output_dir, _SCALER), scaler.state_dict())

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if checkpoint is not None and scaler is not None:
            scaler.load_state_dict(load_state(Path(checkpoint, _SCALER)))

    def _save_rng_state(self, output_dir: str) -> None:
        path = Path(output_dir, _RANDOM.format(rank=self.args.process_index))
        save_state(path, random_state(self.args.device))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            path = Path(checkpoint, _RANDOM.format(rank=self.args.process_index))
            set_random_state(load_state(path), self.args.device)

    # The order of the data, and random numbers ------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """As in Trainer; of a stream, without an end."""
        stream = self.train_dataset
        if not isinstance(stream, torch.utils.data.IterableDataset) or hasattr(stream, "__len__"):
            return super().get_train_dataloader()
        self.train_dataset = _Endless(stream)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = stream

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy == "group_by_length" and hasattr(dataset, "lengths"):
            # Trainer would read every row to learn its length
            batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
            sampler: Any = LengthGroupedSampler(batch, lengths=dataset.lengths)
        else:
            sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.batch_size *= self.args.world_size  # the rows of an optimizer step, however it is shared
        if sampler is None or hasattr(sampler, "set_epoch"):  # the latter is repeatable by itself
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochSampler(sampler, seed, lambda: int(self.state.epoch or 0))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in Trainer; the random generators are left as they were found."""
        state = random_state(self.args.device)
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            set_random_state(state, self.args.device)


class EpochSampler(torch.utils.data.Sampler[int]):
    """The order that another sampler draws, made a function of seed and epoch alone.

    Args:
        sampler: draws from torch's default generator, as Trainer's do.
        seed: of the run.
        epoch: called at the start of an epoch, for its number.
    """

    def __init__(self, sampler: torch.utils.data.Sampler[int], seed: int, epoch: Callable[[], int]) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, epoch

    def __iter__(self) -> Iterator[int]:
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(self.seed * 1_000_003 + self.epoch())
        try:
            order = list(self.sampler)
        finally:
            torch.set_rng_state(state)
        return iter(order)

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]


class _Endless(torch.utils.data.IterableDataset[Any]):
    """A stream that restarts when exhausted, as its next epoch.

    Trainer, which does not know its length, takes all of it for one epoch: each optimizer step then has all its
    batches, and its number tells what was read before.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Any]:
        stream = copy.copy(self.stream)
        for name, value in vars(stream).items():
            if isinstance(value, torch.Tensor) and value.is_shared():
                setattr(stream, name, value.clone())  # its epoch: workers come to their ends at different times
        for epoch in itertools.count():
            if hasattr(stream, "set_epoch"):
                stream.set_epoch(epoch)
            empty = True
            for row in stream:
                empty = False
                yield row
            if empty:
                return


class _SetEpoch(TrainerCallback):
    def __init__(self, dataset: Callable[[], Any]) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if hasattr(dataset := self.dataset(), "set_epoch"):
            dataset.set_epoch(int(state.epoch or 0))
