"""optimize: run the encoder of a transformers model in hand on the engine, and change nothing else about it.

The encoder's class is exchanged for a subclass of the same name whose ``forward`` serves a call from packed weights
when it can and calls transformers' own ``forward`` when it cannot. Modules, parameters, state_dict, config and
files stay as they are.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPoolingAndCrossAttentions

from distilbert_fast.engine import GRAPHS, PRECISIONS, Engine
from distilbert_fast.modeling.calibration import batches
from distilbert_fast.modeling.encoder import DistilBertModel, encoder_modules, find_encoder, reads_first_token
from distilbert_fast.modeling.snapshot import Snapshot
from distilbert_fast.ops import _check

log = logging.getLogger("distilbert_fast")
OP = "optimize"
PACK = "pack_encoder"
Model = TypeVar("Model", bound=PreTrainedModel)


def optimize(
    model: Model,
    precision: str | None = None,
    calibration: Iterable[Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    cuda_graphs: int = GRAPHS,
) -> Model:
    """Accelerate a DistilBERT, BERT or RoBERTa model for inference, in place.

    Args:
        model: a transformers encoder, with any task head or none. Changed in place, so that pipelines and
            sentence-transformers that hold it are accelerated too.
        precision: "fp32", "bf16", "fp16" or "int8" (dynamic scales, one a token and one a weight row) for the
            encoder's linear layers and attention; outputs and task head keep the dtype of the model. None: as
            the model is, so int8 where ``quantize_model`` made it so. Calling again changes it.
        calibration: for int8, an iterable of texts or of batches (mappings with input_ids, as a DataLoader
            gives them). What attention and GELU put out then gets one scale a layer, from the largest values seen,
            instead of one a token: one pass over it less. A few hundred sentences of the kind to come will do.
            LayerNorm's output keeps a scale for each token, which costs nothing. Lost when weights change.
        tokenizer: for ``calibration`` by texts; None takes the one beside the model's checkpoint.
        cuda_graphs: on a GPU, how many CUDA graphs are kept for batches of up to 16,384 tokens, one for each size they
            are rounded up to (see cuda_graphs.py); their inputs and outputs take 512 MiB at most. 0 = none.

    Returns:
        ``model``: same object, parameters, config, signature and files.

    Where only first tokens are read, by ``…ForSequenceClassification``, the last layer computes little for the others.
    Hidden states at padded positions are 0. Padding is never computed, wherever in its row it stands.
    ``head_mask`` [H] or [L, H] is honoured (transformers 5 ignores it).

    transformers' own forward runs, exactly as before, in training mode; where gradients may be wanted (grad mode
    is on and an encoder weight requires grad: use ``torch.no_grad()``); under autocast, torch.export and
    torch.jit; for ``output_attentions``, ``inputs_embeds``, 4-D masks and whatever else the engine does not know;
    where padded positions matter (question answering, labels on padding, padding on the left); and while
    someone's hook sits on a module inside the encoder. Under torch.compile the engine runs as one graph break.

    Weights may change at any time, by an optimizer step, ``load_state_dict``, ``to`` or replaced modules: a look
    at their version counters and addresses before each call finds out, and they are packed again. Only writes
    through ``parameter.data``, which torch does not count, are not seen: call ``optimize`` again after them.

    Thread-safe. A deep copy or an unpickled model packs its own weights, uncalibrated.

    Raises:
        TypeError, ValueError: a model that is not such an encoder, by name, or an unknown precision; a calibration
            that holds nothing, or something else than texts or batches, or is given for a model that is not int8.
    """
    if precision is not None:
        _check.choice(OP, "precision", precision, tuple(PRECISIONS))
    encoder: Any = find_encoder(model, OP)
    reads_padding = type(model).__name__.endswith("ForQuestionAnswering") or getattr(
        encoder, "always_keep_padding", False
    )
    accelerator = _Accelerator(precision, reads_padding, cuda_graphs)
    accelerator.pack(encoder)
    if calibration is not None:
        accelerator.calibrate(batches(calibration, model, tokenizer, OP))
    encoder._accelerator = accelerator
    encoder.__class__ = _with_forward(type(encoder), _encoder_forward)
    if model is not encoder:
        model.__class__ = _with_forward(type(model), _head_forward)
    return model


def pack_encoder(
    model: PreTrainedModel,
    precision: str | None = None,
    calibration: Iterable[Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    head_mask: torch.Tensor | None = None,
) -> Engine:
    """The encoder of a model as an ``Engine`` of its own, to be called, saved and loaded without transformers.

        pack_encoder(model, "int8").save("encoder.safetensors")
        Engine.load("encoder.safetensors")(input_ids, attention_mask)      # last hidden state [B, T, C]

    Loading maps the file into memory: no weight is read before it is used, none is packed again.

    Args:
        model, precision, calibration, tokenizer: as for ``optimize``, which does the same in place.
        head_mask: a fixed factor for each head, [H] or [L, H]; heads with 0 leave the weights.

    Raises:
        TypeError, ValueError: as ``optimize`` and ``Engine.from_model`` do.
    """
    engine = Engine.from_model(encoder_modules(find_encoder(model, PACK), PACK), precision, head_mask)
    return engine if calibration is None else engine.calibrated(batches(calibration, model, tokenizer, PACK))


class _Accelerator:
    """The packed weights of one encoder, and whether they are still what it holds."""

    def __init__(self, precision: str | None, reads_padding: bool, graphs: int) -> None:
        self.precision, self.reads_padding, self.graphs = precision, reads_padding, graphs
        self._packed: tuple[Snapshot, Engine] | None = None
        self._calibrated = False
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Accelerator, (self.precision, self.reads_padding, self.graphs)

    def pack(self, encoder: PreTrainedModel) -> tuple[Snapshot, Engine]:
        devices = {str(tensor.device) for tensor in encoder.parameters()}
        if len(devices) > 1 or devices == {"meta"}:
            _check.refuse(OP, "model weights", "on one device", ", ".join(sorted(devices)))
        if any(tensor.is_inference() for tensor in encoder.parameters()):
            _check.refuse(OP, "model weights", "made outside torch.inference_mode()", "inference tensors")
        snapshot = Snapshot(encoder)
        with torch.inference_mode(False):
            modules = encoder_modules(find_encoder(encoder, OP), OP)
            engine = Engine.from_model(modules, self.precision, graphs=self.graphs)
        self._packed = snapshot, engine
        return snapshot, engine

    def calibrate(self, calibration: Iterable[Mapping[str, torch.Tensor]]) -> None:
        if self._packed is not None:
            snapshot, engine = self._packed
            self._packed, self._calibrated = (snapshot, engine.calibrated(calibration)), True

    def packed(self, encoder: PreTrainedModel) -> tuple[Snapshot | None, Engine | None]:
        """The current weights, packed; no engine if they have become something that it cannot run."""
        packed = self._packed
        if packed is not None and packed[0].holds(encoder):
            return packed
        with self._lock:
            packed = self._packed
            if packed is not None and packed[0].holds(encoder):
                return packed
            if self._calibrated:
                _warn_once("optimize: weights have changed since calibration, so each token finds its own scales again")
                self._calibrated = False
            try:
                return self.pack(encoder)
            except (TypeError, ValueError) as error:
                _warn_once(f"the model has changed, transformers' own forward runs: {error}")
                return None, None


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


# The exchanged classes --------------------------------------------------------------------------------------


@functools.cache
def _subclass(kind: Any, forward: Callable[..., Any]) -> type:
    names = tuple(
        name
        for name, parameter in inspect.signature(kind.forward).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    )[1:]

    @functools.wraps(kind.forward)
    def bound(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return forward(kind, names, self, *args, **kwargs)

    def reduce(self: PreTrainedModel, protocol: Any) -> tuple[Any, ...]:
        return _restore, (kind, forward), self.__dict__.copy()

    body: dict[str, Any] = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    body |= {"forward": bound, "__reduce_ex__": reduce, "_exchanged": kind}
    return type(kind.__name__, (kind,), body)


def _with_forward(kind: type, forward: Callable[..., Any]) -> type:
    return kind if "_exchanged" in vars(kind) else _subclass(kind, forward)


def _restore(kind: type, forward: Callable[..., Any]) -> PreTrainedModel:
    """An empty instance for pickle and copy, which fill it."""
    exchanged: Any = _subclass(kind, forward)
    return exchanged.__new__(exchanged)


def _head_forward(kind: Any, names: tuple[str, ...], self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """A task head: padded positions are wanted where a label counts one, and by some only the first."""
    given = dict(zip(names, args, strict=False)) | kwargs
    labels, mask = given.get("labels"), given.get("attention_mask")
    packed = "_accelerator" in vars(self.base_model)
    if packed and labels is not None and mask is not None and labels.shape == mask.shape:
        kwargs["keep_padding"] = torch.compiler.is_compiling() or bool(((labels != -100) & (mask == 0)).any())
    if packed and reads_first_token(kind) and not self.base_model._forward_hooks:
        kwargs["first_rows"] = True
    return kind.forward(self, *args, **kwargs)


def _encoder_forward(kind: Any, names: tuple[str, ...], self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    given = dict(zip(names, args, strict=False)) | kwargs
    ours = kind.__module__.startswith("distilbert_fast.")  # takes keep_padding and any head_mask itself
    kwargs.pop("first_rows", None)
    if not ours:
        kwargs.pop("keep_padding", None)
    traced = torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    packed = "_accelerator" in vars(self)  # not in a new instance of this class, from its from_pretrained say
    honoured = ours or self.config._attn_implementation == "distilbert_fast"
    if packed and not (self.training or traced or len(args) > len(names)):
        output = _serve(self, given, honoured)
        if output is not None:
            return output
    if packed and kwargs.get("head_mask") is not None and not honoured:
        raise ValueError(
            "optimize: head_mask must be None where transformers' own forward runs, which ignores it (training,"
            " gradients, autocast, output_attentions, …), got a tensor; with"
            " attn_implementation='distilbert_fast' it is honoured"
        )
    return kind.forward(self, *args, **kwargs)


_KNOWN = {
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "head_mask",
    "keep_padding",
    "first_rows",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "use_cache",  # an encoder has no cache
}


@torch.compiler.disable
def _serve(self: Any, given: Mapping[str, Any], honoured: bool) -> Any:
    """The encoder's output from the engine, or None if its own forward must make it.

    ``honoured``: that forward knows head masks, also of more dimensions than the engine does.
    """
    given = {name: value for name, value in given.items() if value is not None or name in _FLAGS}
    input_ids, attention_mask, head_mask = map(given.get, ("input_ids", "attention_mask", "head_mask"))
    attentions, hidden_states = (given.get(name, getattr(self.config, name, False)) for name in _FLAGS)
    if (
        input_ids is None
        or not _KNOWN.issuperset(given)
        or attentions
        or not isinstance(hidden_states, (bool, type(None)))
        or input_ids.dim() != 2
        or (attention_mask is not None and attention_mask.shape != input_ids.shape)
        or (isinstance(head_mask, torch.Tensor) and head_mask.dim() > 2 and honoured)
        or input_ids.device.type == "meta"
        or torch.is_autocast_enabled(input_ids.device.type)
    ):
        return None
    accelerator: _Accelerator = self._accelerator
    snapshot, engine = accelerator.packed(self)
    if snapshot is None or engine is None or snapshot.observed():
        return None
    if torch.is_grad_enabled() and (snapshot.requires_grad() or getattr(head_mask, "requires_grad", False)):
        _warn_once("optimize: gradients are enabled, so transformers' own forward runs; use torch.no_grad()")
        return None
    num_tokens = None
    if attention_mask is not None:
        full, left, num_tokens = _padding(attention_mask != 0)
        if full:
            attention_mask = num_tokens = None
        elif left or given.get("keep_padding", False) or accelerator.reads_padding:
            return None

    distilbert = isinstance(self, DistilBertModel)
    encoded = engine.encode(
        input_ids,
        attention_mask,
        None if distilbert else given.get("token_type_ids"),  # transformers ignores them there
        given.get("position_ids"),
        head_mask,
        bool(hidden_states),
        "first" if given.get("first_rows", False) and not hidden_states else "all",
        num_tokens,
    )
    last = encoded.last  # [B, T, C] or, the first rows, [B, 1, C]
    if distilbert:
        output: Any = BaseModelOutput(last_hidden_state=last)
    else:
        pooled = None if self.pooler is None else self.pooler(last)
        output = BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=last, pooler_output=pooled)
    if hidden_states:
        output["hidden_states"] = encoded.hidden_states
    return_dict = given.get("return_dict", getattr(self.config, "return_dict", True))
    return output.to_tuple() if return_dict is False else output


_FLAGS = ("output_attentions", "output_hidden_states")


def _padding(real: torch.Tensor) -> tuple[bool, bool, int | None]:
    """Of tokens bool [B, T]: whether all are; whether a sequence's first is not at position 0; on a GPU, how many."""
    if real.is_cuda:  # three answers for one wait
        left = (real.any(1) & ~real[:, :1].any(1)).any()
        full, behind, count = torch.stack([real.all(), left, real.sum()]).tolist()
        return bool(full), bool(behind), count
    full = bool(real.all())
    return full, not full and bool((real.any(1) & ~real[:, :1].any(1)).any()), None
