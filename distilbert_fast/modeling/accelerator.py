"""The packed weights of an encoder: whether they are still current, and how many calls they served."""

from __future__ import annotations

import functools
import logging
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel

from distilbert_fast import backends
from distilbert_fast.engine.engine import EncoderModules, Engine
from distilbert_fast.modeling.encoder import encoder_modules, find_encoder, settings
from distilbert_fast.modeling.snapshot import Snapshot, loose_tensors, obstacle, own_tensors
from distilbert_fast.ops import _check
from distilbert_fast.ops._operator import is_eager

log = logging.getLogger("distilbert_fast")
OP = "optimize"
_UNCALIBRATED = "optimize: weights have changed since calibration, so each token finds its own scales again"
_WARY = 64  # calls that compare all bytes after an uncounted write


class _Packed(NamedTuple):
    snapshot: Snapshot  # of what was packed
    engine: Engine


_accelerators: weakref.WeakSet[Accelerator] = weakref.WeakSet()


@functools.cache
def _watch_optimizers() -> None:
    """Have every optimizer of torch tell when it has stepped: fused ones write in a way that torch does not count."""

    @torch.compiler.disable
    def stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        written = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
        for accelerator in list(_accelerators):
            packed = accelerator._packed
            if packed is not None and packed.snapshot.has_any(written):
                accelerator.suspect()

    register_optimizer_step_post_hook(stepped)


class Accelerator:
    """Packs an encoder when its weights are not those that were packed last.

    Args:
        precision: of the engine, see ``optimize``.
        keep_padding: whether padded positions are computed; None: if the call asks for them, or may read them.
        graphs: how many CUDA graphs are kept.
    """

    def __init__(self, precision: str | None, keep_padding: bool | None, graphs: int) -> None:
        self.precision, self.keep_padding, self.graphs = precision, keep_padding, graphs
        self.served, self.fallbacks = 0, Counter[str]()
        self._packed: _Packed | None = None
        self._calibrated = False
        # Reasons to think that weights may have changed in a way that torch does not count, and how many of them have
        # been answered by a comparison of all bytes: a call in another thread must not pass before it ends.
        self._suspicions = self._answered = 0
        self._wary = 0  # how many more calls compare all bytes
        _accelerators.add(self)
        _watch_optimizers()
        self._lock, self._counting = backends.fork_safe_lock(), backends.fork_safe_lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Accelerator, (self.precision, self.keep_padding, self.graphs)

    @property
    def engine(self) -> Engine | None:
        """The engine that was packed last."""
        return None if self._packed is None else self._packed.engine

    def replace(self, engine: Engine) -> None:
        """Serve calls by another engine with the weights that were packed last, until they change."""
        assert self._packed is not None
        self._packed = self._packed._replace(engine=engine)

    def suspect(self) -> None:
        """Say that the weights may change now: the encoder trains, or its gradients are wanted."""
        with self._counting:
            self._suspicions += 1

    def count(self, fallback: str | None) -> None:
        """Count a call that the engine served, or did not serve for the reason ``fallback``."""
        with self._counting:
            if fallback is None:
                self.served += 1
            else:
                self.fallbacks[fallback] += 1

    def pack(self, encoder: PreTrainedModel) -> _Packed:
        """Pack the weights that the encoder has now.

        Raises:
            TypeError, ValueError: weights that the engine cannot run.
        """
        weights = [*encoder.parameters(), *(x for m in encoder.modules() for _, x in loose_tensors(m))]
        if any(tensor.is_inference() for tensor in (*weights, *encoder.buffers())):
            _check.refuse(OP, "model weights", "made outside torch.inference_mode()", "inference tensors")
        with torch.inference_mode(False):
            # Before anything is read, so that a change meanwhile shows at the next call. None: in a tracer's hands, or
            # torch.func's.
            snapshot = Snapshot(encoder) if is_eager(weights, default_device=True) else None
            modules = encoder_modules(find_encoder(encoder, OP), OP, self.precision)
            if snapshot is None:
                _check.refuse(OP, "model weights", "plain tensors with values", "wrapped ones")
            snapshot.watch(_copied(encoder, modules), settings(encoder))
            if modules.device.type == "cpu" and backends.without_vectors():  # hardly a call needs an engine
                engine = Engine(None, modules, self.precision, [None] * len(modules.layers))
            else:
                engine = Engine.from_model(modules, self.precision, graphs=self.graphs)
        self._packed = _Packed(snapshot, engine)
        return self._packed

    def calibrate(self, calibration: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Give the packed weights static scales, which they lose when they are packed again."""
        assert self._packed is not None
        self._packed = self._packed._replace(engine=self._packed.engine.calibrated(calibration))
        self._calibrated = True

    def current(self, encoder: PreTrainedModel, doubtful: bool = False) -> _Packed | str:
        """The weights that it has now, packed, if nobody wrote some of their bytes in a way that torch does not count:
        that the call itself has to see, see ``Snapshot.sampled``; or why its own forward must run.

        Args:
            doubtful: a call has met bytes that were written, so all are compared.
        """
        packed = self._packed
        if packed is not None and self._suspicions == self._answered and self._wary == 0 and not doubtful:
            holds, why = packed.snapshot.look(encoder)  # nearly always: some of the bytes will do
            if holds:
                return why or packed
        with self._lock:
            packed, suspicions = self._packed, self._suspicions
            holds = packed is not None and packed.snapshot.look(encoder)[0]
            if packed is None or not (holds and self._all_bytes_hold(packed.snapshot, doubtful)):
                why = obstacle((m for m in encoder.modules() if m is not encoder), encoder)
                if why is not None:  # such as a hook that makes the weights again in each call
                    self.suspect()  # what was packed is of other weights
                    return why
                try:
                    if self._calibrated:
                        warn_once(_UNCALIBRATED)
                        self._calibrated = False
                    packed = self.pack(encoder)
                except (TypeError, ValueError) as error:
                    self.suspect()  # of what was packed before not all bytes have been compared
                    warn_once(f"the model has changed, transformers' own forward runs: {error}")
                    return str(error)
            self._answered = suspicions
            return packed.snapshot.look(encoder)[1] or packed  # what changes from here on shows at the next call

    def _all_bytes_hold(self, snapshot: Snapshot, doubtful: bool) -> bool:
        """Whether no byte has changed; False also where that cannot be seen and the weights are suspect."""
        suspect = self._suspicions != self._answered
        fingerprint = snapshot.fingerprint
        if fingerprint is None:
            return not suspect
        holds = bool(fingerprint.matches())
        self._wary = max(self._wary - 1, 0)
        if holds:
            return True
        if not suspect and fingerprint.samples() > 1:
            self._wary = _WARY
        if doubtful and fingerprint.samples() > 1:
            log.warning(
                "optimize: weights were written in a way that torch does not count (through parameter.data, NumPy or"
                " another process) and are packed again. Each call compares some of the bytes,"
                f" {fingerprint.samples()} calls or fewer compare all, so a write of few numbers may have been noticed"
                " late. After such a write call optimize(model) again"
            )
        return False


def _copied(encoder: PreTrainedModel, model: EncoderModules) -> list[torch.Tensor]:
    """The tensors whose values an engine copies, or is made for: ids that the embeddings hold. Tables, unless they are
    strided, it reads where the model has them."""
    tables: list[Any] = [model.word, model.position, model.token_type]
    strided = [table for table in tables if table is not None and not table.weight.is_contiguous()]
    layers = [part for layer in model.layers for part in layer if isinstance(part, nn.Module)]
    copied = [tensor for module in (*strided, model.norm, *layers) for tensor in own_tensors(module)]
    return [*copied, *own_tensors(cast(nn.Module, encoder.embeddings))]


# What happened to the calls -------------------------------------------------------------------------------------


class Explanation(NamedTuple):
    """How the calls of a model's encoder were computed so far.

    Attributes:
        optimized: whether ``optimize`` was called on it.
        engine: what the engine is, in words: its precision and who computes it.
        served: calls that the engine served.
        fallbacks: reason -> calls that transformers' own forward served for it.
    """

    optimized: bool
    engine: str | None
    served: int
    fallbacks: dict[str, int]

    def __str__(self) -> str:
        if not self.optimized:
            return "not optimized: the model's own forward runs. Call distilbert_fast.optimize(model)"
        lines = [f"engine: {self.engine or 'none'}", f"calls served by the engine: {self.served}"]
        lines += [f"calls served by the model's own forward: {n} ({why})" for why, n in self.fallbacks.items()]
        return "\n".join(lines)


def explain(model: PreTrainedModel) -> Explanation:
    """Which calls of an optimized model the engine served, and why transformers' own forward served the others.

        print(distilbert_fast.explain(model))

    With the environment variable DISTILBERT_FAST_LOG=1 each call is also logged when it happens, to stderr.

    Raises:
        TypeError: a model that is none of transformers' (of a pipeline or a sentence-transformers model take its own).
    """
    if not isinstance(model, PreTrainedModel):
        _check.refuse("explain", "model", "a model of transformers", type(model).__name__, TypeError)
    accelerator: Accelerator | None = vars(model.base_model).get("_accelerator")
    if accelerator is None:
        return Explanation(False, None, 0, {})
    engine, words = accelerator.engine, None
    if engine is not None:
        native = engine.packed
        by = "the C++ encoder" if engine.is_native else "ops"
        precision = native.shape.precision if native is not None else accelerator.precision or "as the model"
        words = f"{precision} by {by} on {engine.word.device}"
        why = backends.without_vectors() if engine.word.is_cpu else None
        words = f"{words}, for calls with a head_mask alone: {why}" if why else words
    return Explanation(True, words, accelerator.served, dict(accelerator.fallbacks))


@functools.cache
def warn_once(message: str) -> None:
    log.warning(message)
