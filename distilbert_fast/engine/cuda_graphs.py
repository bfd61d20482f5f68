"""Small batches on a GPU: an encoder's launches, captured once as a CUDA graph and replayed with one call.

A graph has fixed shapes. So N tokens in B sequences are computed as the next of a few larger sizes, N' tokens in S
sequences: what is added are sequences of old tokens, PADDING long, which nobody reads, and empty ones. No token sees
another sequence, so the real ones come out as if they were alone among N' tokens.

    N'   16, 32 … 128, 160, 192, 224, 256, 320 …   four sizes an octave, up to MOST_TOKENS: at most a quarter more
    S    1, 2 … 8, 10, 12, 14, 16, 20 …            likewise, so that their mean length stays near the real one
    and whether no sequence exceeds 128 tokens, or 512

Graphs share one pool for what they compute in between, and so run one after another, in whatever streams they are
asked for; what comes out is copied before the next one runs. The least recently used go first.

Shapes: B batch, N tokens, C hidden.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from distilbert_fast import backends
from distilbert_fast.engine.op_encoder import OpEncoder, TokenLayout

MOST_TOKENS = 65_536  # beyond that even a layer's shortest kernels run for longer than their launches take the host
PADDING = 128  # tokens of an added sequence: short, since attention grows with the square
GRAPHS = 64  # kept by default
MAX_BYTES = 512 << 20  # of the kept graphs' inputs and outputs, what they share aside

LENGTHS = (PADDING, 512)  # beyond, attention searches where each sequence lies

_STEP = 16


def token_bucket(tokens: int) -> int:
    """The size N' that N ≥ 1 tokens are computed as."""
    return _round_up(tokens, _STEP)


def sequence_bucket(batch: int, padding: int) -> int:
    """The size S for B sequences and N' − N tokens of padding."""
    return _round_up(batch + -(-padding // PADDING), 1)


def length_bucket(max_length: int | None) -> int | None:
    """The longest length for which attention is captured: of added sequences, too."""
    return next((bound for bound in LENGTHS if max_length is not None and max_length <= bound), None)


def _round_up(count: int, step: int) -> int:
    """Round up to the next of four sizes an octave, multiples of a step."""
    step = max(step, 1 << max((count - 1).bit_length() - 3, 0))
    return -(-count // step) * step


class GraphInputs(NamedTuple):
    """What a graph reads: the memory stays, the values change."""

    ids: torch.Tensor  # int64 [N']
    positions: torch.Tensor  # int64 [N']
    types: torch.Tensor | None  # int64 [N']
    cu_seqlens: torch.Tensor  # int32 [S + 1]


class Captured(NamedTuple):
    inputs: GraphInputs
    output: torch.Tensor
    replay: Callable[[], None]


class CudaDevice:
    """One GPU, where graphs are captured and replayed.

    Their memory belongs to a stream of its own, so that the allocator hands it out late enough.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._pool, self._done = torch.cuda.graph_pool_handle(), torch.cuda.Event()

    def free(self, dtype: torch.dtype) -> bool:
        """Whether an encoder of this dtype can be captured and replayed now: not while the caller captures a graph, nor
        if torch serves attention, which asks where sequences end.
        """
        return not torch.cuda.is_current_stream_capturing() and (
            backends.select("attention", self._device, dtype) != "torch"
        )

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """Work launched inside runs after the work that was launched inside before, in any stream."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            current.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(current)

    def capture(self, make: Callable[[], GraphInputs], function: Callable[[GraphInputs], torch.Tensor]) -> Captured:
        """Capture ``function`` of the inputs made; called in turn."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            inputs = make()
            for _ in range(2):  # compile, make workspaces
                function(inputs)
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may allocate meanwhile.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            output = function(inputs)
        current.wait_stream(self._stream)
        return Captured(inputs, output, graph.replay)


class _Graph:
    def __init__(self, captured: Captured) -> None:
        self.inputs, self.output, self.replay = captured
        self.bytes = sum(x.nbytes for x in (*self.inputs, self.output) if x is not None)
        self._regular: tuple[int, int] | None = None  # shape of the batch whose layout the inputs hold
        self._streams: set[torch.cuda.Stream] = set()  # that it ran in

    def fill(self, ids: torch.Tensor, layout: Callable[[], TokenLayout], regular: tuple[int, int] | None) -> None:
        n, inputs = ids.shape[0], self.inputs
        if ids.is_cuda and (stream := torch.cuda.current_stream()) not in self._streams:
            for x in inputs:
                if x is not None:
                    x.record_stream(stream)  # once given back, its memory waits for what still runs there
            self._streams.add(stream)
        inputs.ids[:n].copy_(ids)
        if regular is not None and regular == self._regular:
            return
        positions, types, cu_seqlens = layout()
        inputs.positions[:n].copy_(positions)
        if inputs.types is not None and types is not None:
            inputs.types[:n].copy_(types)
        batch = cu_seqlens.shape[0] - 1
        inputs.cu_seqlens[: batch + 1].copy_(cu_seqlens)
        added = inputs.cu_seqlens[batch + 1 :]  # where the added sequences end, which share the other tokens
        steps = torch.arange(1, added.shape[0] + 1, dtype=torch.int32, device=added.device)
        added.copy_((n + PADDING * steps).clamp_(max=inputs.ids.shape[0]))
        self._regular = regular


class Graphs:
    """An encoder's graphs. Thread-safe.

    Args:
        encoder: what is captured; its weights stay where they are.
        count: how many are kept at most, and of MAX_BYTES at most, but one always.
        device: where; None: the GPU that the encoder is on.
    """

    def __init__(self, encoder: OpEncoder, count: int = GRAPHS, device: CudaDevice | None = None) -> None:
        self._encoder, self._count = encoder, count
        self._device = device or CudaDevice(encoder.word.device)
        self._kept: OrderedDict[tuple[int, int, int | None, bool, str | None], _Graph] = OrderedDict()
        self._lock = backends.fork_safe_lock()

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, tokens: int) -> bool:
        """Whether ``run`` serves so many tokens now."""
        return 0 < tokens <= MOST_TOKENS and self._device.free(self._encoder.dtype)

    def run(
        self,
        ids: torch.Tensor,
        batch: int,
        layout: Callable[[], TokenLayout],
        first: bool = False,
        regular: tuple[int, int] | None = None,
        max_length: int | None = None,
    ) -> torch.Tensor:
        """The last state that ``OpEncoder.run`` finds, [N, C] or, with ``first``, [B, C].

        Args:
            ids: [N], as many as it takes.
            batch: B.
            layout: makes the rest.
            regular: what the layout depends on, where that is only the batch's shape: it then is not made again.
            max_length: that none of the sequences exceeds.
        """
        size = token_bucket(ids.shape[0])
        sequences, bound = sequence_bucket(batch, size - ids.shape[0]), length_bucket(max_length)
        key = size, sequences, bound, first, backends.forced()
        with torch.inference_mode(False), torch.no_grad(), self._lock, self._device.in_turn():
            graph = self._kept.get(key)
            if graph is None:
                graph = self._kept[key] = _Graph(self._capture(size, sequences, bound, first))
                self._evict()
            self._kept.move_to_end(key)
            graph.fill(ids, layout, regular)
            graph.replay()
            return graph.output[: batch if first else ids.shape[0]].clone()

    def _capture(self, tokens: int, sequences: int, bound: int | None, first: bool) -> Captured:
        encoder = self._encoder

        def make() -> GraphInputs:
            ids, positions, types = torch.zeros(3, tokens, dtype=torch.int64, device=encoder.word.device)
            ends = [min(i * -(-tokens // sequences), tokens) for i in range(sequences + 1)]
            cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=ids.device)
            return GraphInputs(ids, positions, None if encoder.token_type is None else types, cu_seqlens)

        return self._device.capture(make, lambda inputs: encoder.run(*inputs, first=first, max_length=bound)[-1])

    def _evict(self) -> None:
        """Drop old graphs, always after a capture: torch frees the pool once no graph is left in it."""
        while len(self._kept) > 1 and (
            len(self._kept) > self._count or sum(graph.bytes for graph in self._kept.values()) > MAX_BYTES
        ):
            self._kept.popitem(last=False)
