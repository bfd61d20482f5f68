"""ONNX Runtime: its own transformer fusions, then dynamic int8 with signed weights and a scale a channel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from bench.peers.engines import Job, apart
from bench.peers.workloads import Batch


class OnnxRuntime:
    def __init__(self, model: Path, cache: Path, threads: int, int8: bool) -> None:
        file = cache / "fused.onnx"
        if not file.exists():
            apart(export, model, file)
        if int8:
            fused, file = file, cache / "int8.onnx"
            if not file.exists():
                apart(quantize, fused, file)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def prepare(self, batches: list[Batch]) -> Job:
        feeds = []
        for batch in batches:
            mask = batch.attention_mask  # the fusion of attention wants one in the graph
            mask = np.ones_like(batch.input_ids) if mask is None else mask
            feeds.append({"input_ids": batch.input_ids, "attention_mask": mask})
        return Job(lambda: [self.session.run(None, feed)[0] for feed in feeds])


def export(model: Path, fused: Path) -> None:
    import torch
    from onnxruntime.transformers.optimizer import optimize_model

    from bench.peers.with_torch import LastHidden, load

    # The patterns that the fusions know are those of eager attention and of the exporter by tracing.
    module = LastHidden(load(model, torch.float32, "eager")).eval()
    example = torch.full((2, 16), 7)
    mask = torch.ones_like(example)
    mask[0, 10:] = 0
    names = ["input_ids", "attention_mask"]
    exported = fused.with_suffix(".exported")
    torch.onnx.export(
        module,
        (example, mask),
        str(exported),
        input_names=names,
        output_names=["last_hidden_state"],
        dynamic_axes={name: {0: "batch", 1: "sequence"} for name in [*names, "last_hidden_state"]},
        opset_version=17,
        dynamo=False,
    )
    config = module.model.config
    optimized = optimize_model(
        str(exported), model_type="bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size
    )
    found = optimized.get_fused_operator_statistics()["Attention"]
    if found != config.num_hidden_layers:
        raise RuntimeError(f"optimizer fused {found} attentions of {config.num_hidden_layers}")
    made = fused.with_suffix(".making")
    optimized.save_model_to_file(str(made))
    made.rename(fused)
    exported.unlink()


def quantize(fused: Path, quantized: Path) -> None:
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic

    made = quantized.with_suffix(".making")
    quantize_dynamic(
        fused,
        made,
        per_channel=True,
        weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": TensorProto.FLOAT},  # its shape inference does not know the fused nodes
    )
    made.rename(quantized)
