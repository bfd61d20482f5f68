"""CTranslate2: its own converter, int8 with a scale a row and dynamic activations; it removes padding itself.

Beside an imported torch it was seen to be up to three times slower: torch is kept out of this process.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from bench.harness.errors import NotAvailableError
from bench.peers.engines import Job, apart
from bench.peers.workloads import Batch


class CTranslate2:
    def __init__(self, model: Path, cache: Path, threads: int, compute_type: str) -> None:
        sys.modules["torch"] = None  # type: ignore[assignment]  # import ctranslate2 would import it
        import ctranslate2

        supported = ctranslate2.get_supported_compute_types("cpu")
        if compute_type not in supported:
            raise NotAvailableError(f"the wheel has no {compute_type} on this CPU, only {', '.join(sorted(supported))}")
        converted = cache / compute_type
        if not (converted / "model.bin").exists():
            apart(convert, model, converted, compute_type)
        self.views = ctranslate2.StorageView
        self.encoder = ctranslate2.Encoder(
            str(converted), device="cpu", compute_type=compute_type, inter_threads=1, intra_threads=threads
        )

    def prepare(self, batches: list[Batch]) -> Job:
        given = [
            (
                self.views.from_array(batch.input_ids.astype(np.int32)),
                self.views.from_array(np.asarray(batch.lengths, np.int32)),
            )
            for batch in batches
        ]
        return Job(lambda: [self.encoder.forward_batch(ids, lengths).last_hidden_state for ids, lengths in given])


def convert(model: Path, converted: Path, compute_type: str) -> None:
    from ctranslate2.converters import TransformersConverter

    made = converted.with_name(f"making-{converted.name}")
    TransformersConverter(str(model)).convert(str(made), quantization=compute_type, force=True)
    made.rename(converted)
