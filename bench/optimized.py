"""What optimize() costs and gains around the encoder: python -m bench.optimized [--rounds 15] [--threads 2]

gate    the share of a 1x16 call that goes into knowing that no weight has changed
heads   sequence classification and question answering on 8 sequences of 44 to 128 tokens, padded to the longest: the
        latter's logits at padding are computed, since its softmax runs over them, unless the call says that nobody does

Models have random weights; transformers' sdpa and ours take turns in one process, on the same inputs.
"""

from __future__ import annotations

import argparse
import copy
import time
from statistics import median
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from bench.harness.machine import machine
from distilbert_fast import optimize
from distilbert_fast.evaluation.speed import time_calls

MINILM = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
MODELS = {
    "DistilBERT-base": lambda: transformers.DistilBertModel(transformers.DistilBertConfig()),
    "BERT-base": lambda: transformers.BertModel(transformers.BertConfig()),
    "MiniLM, 6 layers of 384": lambda: transformers.BertModel(transformers.BertConfig(**MINILM)),
}
HEADS = (("SequenceClassification", None), ("QuestionAnswering", None), ("QuestionAnswering", False))
LENGTHS = (44, 56, 68, 80, 92, 104, 116, 128)


class _Blind:
    """A snapshot that takes it for granted that nothing has changed."""

    def __init__(self, snapshot: Any) -> None:
        self.requires_grad = snapshot.requires_grad

    def look(self, root: torch.nn.Module) -> tuple[bool, None]:
        return True, None

    def sampled(self, tokens: int) -> None:
        return None


def gate(rounds: int) -> Table:
    """Calls that know it beside calls that do not look, in turns: the bytes are compared inside of calls, where threads
    would wait."""
    table = Table("model", "precision", "call, ms", "gate, µs", "share", title="unchanged weights, 1x16")
    ids = torch.randint(1000, 2000, (1, 16))
    for name, make in MODELS.items():
        model = make().eval()
        for precision in ("fp32", "int8"):
            accelerator = optimize(model, precision)._accelerator
            model(ids)
            packed = accelerator._packed
            blind = packed._replace(snapshot=_Blind(packed.snapshot))
            times: dict[bool, list[float]] = {False: [], True: []}
            for _ in range((4 if precision == "fp32" else 30) * rounds):
                for knows, used in ((False, blind), (True, packed)):
                    accelerator._packed = used
                    for turn in range(6):
                        start = time.perf_counter()
                        model(ids)
                        if turn > 0:  # the first one finds the caches as the other way left them
                            times[knows].append(time.perf_counter() - start)
            without, call = median(times[False]), median(times[True])
            gate = call - without
            table.add_row(name, precision, f"{1e3 * call:.2f}", f"{1e6 * gate:.0f}", f"{100 * gate / without:.1f}%")
    return table


def heads(rounds: int) -> Table:
    table = Table("head", "", "ms", "range", "as fast", title=f"8 sequences of {LENGTHS[0]} to {LENGTHS[-1]} tokens")
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(1000, 2000, mask.shape) * mask
    for head, keep_padding in HEADS:
        plain = getattr(transformers, f"DistilBertFor{head}")(transformers.DistilBertConfig()).eval()
        models = {"transformers": plain} | {
            f"optimize, {precision}": optimize(copy.deepcopy(plain), precision, keep_padding=keep_padding)
            for precision in ("fp32", "int8")
        }
        title = head if keep_padding is None else f"{head}, keep_padding=False"
        turns = time_calls(models, [{"input_ids": ids, "attention_mask": mask}], rounds)
        times = {name: [1e3 * calls[0] for calls in found] for name, found in turns.items()}
        for name, ms in times.items():
            ratio = median(a / b for a, b in zip(times["transformers"], ms, strict=True))
            table.add_row(title, name, f"{median(ms):.0f}", f"{min(ms):.0f} to {max(ms):.0f}", f"{ratio:.2f}x")
    return table


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    console.print(machine())
    for part in (gate, heads):
        console.print(part(arguments.rounds))


if __name__ == "__main__":
    main()
