"""torch: transformers as it is, torch.compile, int8 by PT2E and by torchao's dynamic quantization."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.peers.engines import Job
from bench.peers.workloads import Batch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CALIBRATION_BATCHES = 4


def load(directory: Path, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(
        directory, dtype=dtype, attn_implementation=attention, use_safetensors=True, local_files_only=True
    )
    return model.eval()


def inputs(batch: Batch) -> dict[str, torch.Tensor]:
    mask = batch.attention_mask
    given = {"input_ids": torch.from_numpy(batch.input_ids)}
    return given if mask is None else given | {"attention_mask": torch.from_numpy(mask)}


def caller(model: Any, batches: list[Batch]) -> Callable[[], list[torch.Tensor]]:
    given = [inputs(batch) for batch in batches]

    def call() -> list[torch.Tensor]:
        with torch.inference_mode():
            return [model(**each).last_hidden_state for each in given]

    return call


class TorchJob(Job):
    def outputs(self):
        return [output.float().numpy() for output in self.call()]


class Transformers:
    def __init__(self, model: Path, cache: Path, threads: int, precision: str, attention: str) -> None:
        torch.set_num_threads(threads)
        self.model = load(model, DTYPES[precision], attention)

    def prepare(self, batches: list[Batch]) -> Job:
        return TorchJob(caller(self.model, batches))


class LastHidden(nn.Module):
    """Tensors in, a tensor out: what exporters and compilers want. A pooler is left out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]


class Inductor:
    """torch.compile with frozen weights, one graph a shape."""

    def __init__(
        self, model: Path, cache: Path, threads: int, precision: str = "bf16", cpp_wrapper: bool = False
    ) -> None:
        import torch._inductor.config as config

        torch.set_num_threads(threads)
        config.freezing = True
        config.cpp_wrapper = cpp_wrapper
        self.autocast: Any = contextlib.nullcontext
        self.model = self.change(LastHidden(load(model, DTYPES[precision])).eval())

    def change(self, model: LastHidden) -> LastHidden:
        return model

    def graph(self, example: tuple[torch.Tensor, ...]) -> nn.Module:
        """What is compiled for inputs of this shape."""
        return self.model

    def prepare(self, batches: list[Batch]) -> Job:
        torch._dynamo.reset()
        given = [tuple(inputs(batch).values()) for batch in batches]
        compiled = {}
        with torch.no_grad():
            for each in given:
                shape = (len(each), *each[0].shape)
                if shape not in compiled:
                    graph = self.graph(each)
                    compiled[shape] = torch.compile(graph, mode="max-autotune-no-cudagraphs", dynamic=False)
                    with self.autocast():
                        compiled[shape](*each)
        pairs = [(compiled[(len(each), *each[0].shape)], each) for each in given]

        def call() -> list[torch.Tensor]:
            with torch.no_grad(), self.autocast():
                return [graph(*each) for graph, each in pairs]

        return TorchJob(call)


class TorchAo(Inductor):
    """int8 weights, one scale a row; activations quantized a token at a time as they come; the rest bf16."""

    def change(self, model: LastHidden) -> LastHidden:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        return model


class Pt2e(Inductor):
    """Static int8 by X86InductorQuantizer, calibrated and compiled at the shape that is run; the rest bf16."""

    def __init__(self, model: Path, cache: Path, threads: int, cpp_wrapper: bool = False) -> None:
        super().__init__(model, cache, threads, "fp32", cpp_wrapper)
        self.autocast = lambda: torch.autocast("cpu", torch.bfloat16)

    def graph(self, example: tuple[torch.Tensor, ...]) -> nn.Module:
        from torchao.quantization.pt2e import move_exported_model_to_eval
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        exported = torch.export.export(self.model, example).module()
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        observed = prepare_pt2e(exported, quantizer)
        vocabulary = self.model.model.config.vocab_size
        random = torch.Generator().manual_seed(1)
        for _ in range(CALIBRATION_BATCHES):
            drawn = torch.randint(min(1000, vocabulary // 2), vocabulary, example[0].shape, generator=random)
            observed(drawn, *example[1:])
        return move_exported_model_to_eval(convert_pt2e(observed))
