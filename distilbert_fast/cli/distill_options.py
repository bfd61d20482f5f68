"""The options that the commands of `distilbert-fast distill` have in common, and the panels of their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Directory for the models and the report.")]
Teacher = Annotated[
    str | None,
    typer.Option(metavar="DIR_OR_ID", help="BERT, RoBERTa or DistilBERT; by default that of the extra 'demo'."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Move what is in the way in the output directory to previous-1/.")
]
EvalData = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The same, to evaluate on; by default a tenth of --data.")
]
Ablate = Annotated[
    bool, typer.Option("--ablate", help="Also train the students that lack something, and compare them in one table.")
]
Baseline = Annotated[
    bool, typer.Option("--baseline", help="Also fine-tune the same student without its teacher, to compare.")
]

TRAINING = "Training the student"
Epochs = Annotated[float, typer.Option(help="Passes over the rows.", rich_help_panel=TRAINING)]
MaxSteps = Annotated[int, typer.Option(help="Stop after so many steps; 0: after the epochs.", rich_help_panel=TRAINING)]
BatchSize = Annotated[int, typer.Option(help="Rows an optimizer step, of all processes.", rich_help_panel=TRAINING)]
MicroBatch = Annotated[int, typer.Option(help="Rows computed at a time; gradients add up.", rich_help_panel=TRAINING)]
Lr = Annotated[float, typer.Option("--lr", help="Peak learning rate of AdamW.", rich_help_panel=TRAINING)]
Warmup = Annotated[float, typer.Option(help="Share of the steps that it rises.", rich_help_panel=TRAINING)]
WeightDecay = Annotated[float, typer.Option(help="Of AdamW.", rich_help_panel=TRAINING)]
Bf16 = Annotated[
    bool, typer.Option("--bf16", help="Compute in bfloat16, teacher and student.", rich_help_panel=TRAINING)
]
Recompute = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing",
        help="Keep less of the student's forward and compute its layers twice.",
        rich_help_panel=TRAINING,
    ),
]
Seed = Annotated[int, typer.Option(help="Of random weights, order, masks, dropout.", rich_help_panel=TRAINING)]

LOSSES = "Losses: numbers, or schedules such as linear:2:1"
Temperature = Annotated[str, typer.Option(help="τ of the KL divergence.", rich_help_panel=LOSSES)]
Alpha = Annotated[
    str,
    typer.Option(help="Weight of KL, or the squared error; the labels have 1 - alpha.", rich_help_panel=LOSSES),
]

TEACHING = "Training the teacher"
TeacherEpochs = Annotated[
    float | None,
    typer.Option(help="By default: none if it has its head, else some.", rich_help_panel=TEACHING),
]
TeacherSteps = Annotated[
    int, typer.Option(help="Stop after so many steps; 0: after the epochs.", rich_help_panel=TEACHING)
]
TeacherLr = Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=TEACHING)]
TeacherBatch = Annotated[int, typer.Option(help="Rows a step.", rich_help_panel=TEACHING)]

TeacherPrecision = Annotated[
    str,
    typer.Option(
        help="fp32, bf16, fp16 or int8: of the engine that runs it beside the student; model: its own forward; auto: "
        "the engine on a CPU.",
        rich_help_panel=TEACHING,
    ),
]

SHAPE = "The student's shape"
Layers = Annotated[
    str,
    typer.Option(
        metavar="N|I,J,…", help="Depth, or which of the teacher's layers; by default half.", rich_help_panel=SHAPE
    ),
]
Architecture = Annotated[str, typer.Option(help="distilbert or roberta.", rich_help_panel=SHAPE)]
HiddenSize = Annotated[
    int | None, typer.Option(help="Another width; the student then starts at random.", rich_help_panel=SHAPE)
]
NumHeads = Annotated[int | None, typer.Option(help="Attention heads.", rich_help_panel=SHAPE)]
Intermediate = Annotated[int | None, typer.Option(help="Width of the feed-forward layers.", rich_help_panel=SHAPE)]
