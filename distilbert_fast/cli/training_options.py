"""The options of commands that train a model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import typer

from distilbert_fast.jobs.settings import Training

in_training = partial(typer.Option, rich_help_panel="Training")


@dataclass(kw_only=True)
class TrainingOptions:
    """The defaults fit a task."""

    epochs: Annotated[float, in_training(help="Passes over the rows.")] = 3.0
    max_steps: Annotated[int, in_training(help="Stop after so many steps; 0: after the epochs.")] = 0
    batch_size: Annotated[int, in_training(help="Rows of an optimizer step, in all processes together.")] = 32
    micro_batch: Annotated[int, in_training(help="Rows that are computed at a time; gradients add up.")] = 32
    lr: Annotated[float, in_training("--lr", help="Peak learning rate of AdamW.")] = 1e-4
    warmup: Annotated[float, in_training(help="Share of the steps over which the learning rate rises.")] = 0.05
    weight_decay: Annotated[float, in_training(help="Weight decay of AdamW.")] = 0.0
    bf16: Annotated[bool, in_training("--bf16", help="Compute in bfloat16, a teacher too.")] = False
    gradient_checkpointing: Annotated[
        bool,
        in_training(
            "--gradient-checkpointing",
            help="Keep the input of each layer alone, and compute the layer again in backward.",
        ),
    ] = False
    seed: Annotated[int, in_training(help="Seed of random weights, order, masks, dropout.")] = 0

    def training(self) -> Training:
        names = ("epochs", "max_steps", "batch_size", "micro_batch", "warmup", "weight_decay", "bf16", "seed")
        settings = {name: getattr(self, name) for name in (*names, "gradient_checkpointing")}
        return Training(learning_rate=self.lr, **settings)
