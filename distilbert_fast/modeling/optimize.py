"""optimize: run the encoder of a transformers model on the engine, and change nothing else about the model.

The encoder's class is exchanged for a subclass of the same name whose ``forward`` serves a call from packed weights
when it can and calls transformers' own ``forward`` when it cannot. Modules, parameters, state_dict, config and
files stay as they are.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distilbert_fast.backends import run_aside, without_vectors
from distilbert_fast.engine.engine import GRAPHS, PRECISIONS, Engine
from distilbert_fast.engine.native_encoder import MemoryChanged
from distilbert_fast.layers import NO_PADDING, Padding, exported, is_token, labels_padding, traced
from distilbert_fast.modeling.accelerator import OP, Accelerator, log, warn_once
from distilbert_fast.modeling.architectures import is_of_library, reads_padding
from distilbert_fast.modeling.calibration import batches
from distilbert_fast.modeling.encoder import encoder_modules, encoder_output, find_encoder
from distilbert_fast.modeling.readers import is_observed, is_own_head, is_unknown, reads_first_token
from distilbert_fast.modeling.served_calls import FLAGS, why_not
from distilbert_fast.modeling.training import Model
from distilbert_fast.ops import _check

PACK = "pack_encoder"


def optimize(
    model: Model,
    precision: str | None = None,
    calibration: Iterable[Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    cuda_graphs: int = GRAPHS,
    keep_padding: bool | None = None,
) -> Model:
    """Accelerate an encoder of transformers for inference, in place.

    Args:
        model: a DistilBERT, BERT, RoBERTa, XLM-RoBERTa, CamemBERT, Data2VecText, ELECTRA (embeddings as wide as its
            layers) or ERNIE (no task types), with any task head or none. Changed in place, so that pipelines and
            sentence-transformers that hold it are accelerated too.
        precision: "fp32", "bf16", "fp16" or "int8" (dynamic scales, one a token and one a weight row) for the
            encoder's linear layers and attention; outputs and task head keep the dtype of the model. None: as
            the model is, so int8 where ``quantize_model`` made it so. Calling again changes it.
        calibration: for int8, an iterable of texts or of batches (mappings with input_ids, as a DataLoader
            gives them). What attention and GELU put out then gets one scale a layer, from the largest values seen,
            instead of one a token: one pass over it less. A few hundred typical sentences are enough.
            LayerNorm's output keeps a scale for each token, which costs nothing. Lost when weights change.
        tokenizer: for ``calibration`` by texts; None takes the one beside the model's checkpoint.
        cuda_graphs: on a GPU, how many CUDA graphs are kept for batches of up to 65,536 tokens, one for each size they
            are rounded up to (see cuda_graphs.py); their inputs and outputs take 512 MiB at most. 0 = none.
        keep_padding: compute what transformers does at padded positions, instead of 0. None: where something may read
            it, see below. A call may say otherwise: ``model(**batch, keep_padding=False)``.

    Returns:
        ``model``: same object, parameters, config, signature and files.

    Where only first tokens are read, by ``…ForSequenceClassification``, the last layer computes little for the others.
    Hidden states at padded positions are 0 and not computed, unless something may read them: question answering, whose
    softmax runs over every position, a head or a module around the encoder that is not transformers' own or was not
    given to ``optimize``, a label on padding, padding on the left and rows without tokens (heads read position 0). Then
    the engine computes what transformers does. ``head_mask`` [H] or [L, H] is honoured (transformers 5 ignores it).

    transformers' own forward runs, exactly as before, in training mode; where gradients may be wanted (grad mode
    is on and an encoder weight requires grad: use ``torch.no_grad()``); under autocast; where a call is exported, or
    traced by anything but torch.compile; for ``output_attentions``, ``inputs_embeds``, 4-D masks and whatever else
    the engine does not know; while someone's hook sits on a module inside the encoder; and, unless a ``head_mask`` is
    given, on a CPU for which there is no vector ISA tier (``distilbert-fast env``), where torch is faster. Under
    torch.compile the engine runs as one graph break. ``explain(model)`` counts these calls, with the reasons.

    Weights may change at any time and by any means: each call compares their version counters, addresses and some of
    their bytes, and packs them again if they have changed. After the model has trained, all bytes are compared. One
    case may be noticed late, with a warning: a write that torch does not count (``parameter.data[i] = …``, a NumPy
    view, another process) of few numbers in a large weight. Call ``optimize`` again after such a write. On a GPU no
    bytes are compared: call it after any such write.

    Thread-safe. Nothing here starts a thread that a process forked later would need. A deep copy or an unpickled model
    packs its own weights, uncalibrated.

    Raises:
        TypeError, ValueError: a model that is not such an encoder, by name, or an unknown precision; weights of several
            dtypes (except float32 LayerNorms in a model of half precision) or float64 ones for int8; a calibration that
            is empty, holds neither texts nor batches, or is given for a model that is not int8.
    """
    if precision is not None:
        _check.choice(OP, "precision", precision, tuple(PRECISIONS))
    encoder: Any = find_encoder(model, OP)
    if keep_padding is None and _head_may_read_padding(model, encoder):
        keep_padding = True
    accelerator = Accelerator(precision, keep_padding, cuda_graphs)
    run_aside(lambda: accelerator.pack(encoder))
    if calibration is not None:
        given = list(batches(calibration, model, tokenizer, OP))
        run_aside(lambda: accelerator.calibrate(given))
    encoder._accelerator = accelerator
    encoder.__class__ = _with_forward(type(encoder), _encoder_forward)
    if model is not encoder:
        model.__class__ = _with_forward(type(model), _head_forward)
    return model


def _head_may_read_padding(model: PreTrainedModel, encoder: Any) -> bool:
    known = model is encoder or type(model).__module__.split(".")[0] in ("transformers", "distilbert_fast")
    earlier: Accelerator | None = vars(encoder).get("_accelerator")  # of another head of the same encoder, perhaps
    return (
        not known
        or reads_padding(model)
        or getattr(encoder, "always_keep_padding", False)
        or bool(earlier is not None and earlier.keep_padding)
    )


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
    modules = encoder_modules(find_encoder(model, PACK), PACK, precision)
    engine = run_aside(lambda: Engine.from_model(modules, precision, head_mask))
    if calibration is None:
        return engine
    given = list(batches(calibration, model, tokenizer, PACK))
    return run_aside(lambda: engine.calibrated(given))


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
    """Make an empty instance, which pickle and copy then fill."""
    exchanged: Any = _subclass(kind, forward)
    return exchanged.__new__(exchanged)


def _head_forward(kind: Any, names: tuple[str, ...], self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """A task head: padded positions are wanted where a label counts one, and by some only the first."""
    given = dict(zip(names, args, strict=False)) | kwargs
    labels, mask = given.get("labels"), given.get("attention_mask")
    encoder = self.base_model
    accelerator: Accelerator | None = vars(encoder).get("_accelerator")
    if accelerator is not None and _passes_on(kind.forward) and not is_observed(encoder):
        kept = accelerator.keep_padding
        kwargs.setdefault("keep_padding", not is_own_head(self, encoder) if kept is None else kept)
        if labels is not None and mask is not None and labels.shape == mask.shape and not kwargs["keep_padding"]:
            kwargs["keep_padding"] = traced(labels, mask) or labels_padding(labels, mask)
        if reads_first_token(self, kind):
            kwargs["first_rows"] = True
    return kind.forward(self, *args, **kwargs)


@functools.cache
def _passes_on(forward: Any) -> bool:
    """Whether the forward of a head, its library's, takes keywords that it does not know, for the encoder."""
    keywords = any(given.kind is given.VAR_KEYWORD for given in inspect.signature(forward).parameters.values())
    return keywords and is_of_library(forward)


def _encoder_forward(kind: Any, names: tuple[str, ...], self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    given = dict(zip(names, args, strict=False)) | kwargs
    ours = kind.__module__.startswith("distilbert_fast.")  # takes keep_padding and any head_mask itself
    kwargs.pop("first_rows", None)
    if not ours:
        kwargs.pop("keep_padding", None)
    accelerator: Accelerator | None = vars(self).get("_accelerator")  # None in what its class's from_pretrained made
    honoured = ours or self.config._attn_implementation == "distilbert_fast"
    if accelerator is not None:
        if exported(*(x for x in given.values() if isinstance(x, torch.Tensor))):
            if not torch.compiler.is_compiling():
                accelerator.count("a tracer runs")
        elif len(args) <= len(names):
            output = _serve(self, accelerator, given, names, honoured)
            if not isinstance(output, str):
                return output
        if kwargs.get("head_mask") is not None and not honoured:
            raise ValueError(
                "optimize: head_mask must be None where transformers' own forward runs, which ignores it (training,"
                " gradients, autocast, output_attentions, …), got a tensor; with"
                " attn_implementation='distilbert_fast' it is honoured"
            )
    return kind.forward(self, *args, **kwargs)


@torch.compiler.disable
def _serve(
    self: Any, accelerator: Accelerator, given: Mapping[str, Any], names: tuple[str, ...], honoured: bool
) -> Any:
    """The encoder's output from the engine, or the reason why its own forward must compute it. Counts both.

    Args: see ``why_not``.
    """
    output: Any = "training mode"
    if self.training:
        accelerator.suspect()
    else:
        output = _encode(self, accelerator, given, names, honoured)
    accelerator.count(output if isinstance(output, str) else None)
    if log.isEnabledFor(logging.INFO):
        served = f"own forward: {output}" if isinstance(output, str) else "engine"
        log.info("%s %s: %s", type(self).__name__, list(getattr(given.get("input_ids"), "shape", ())), served)
    return output


def _encode(
    self: Any,
    accelerator: Accelerator,
    given: Mapping[str, Any],
    names: tuple[str, ...],
    honoured: bool,
    again: bool = False,
) -> Any:
    given = {name: value for name, value in given.items() if value is not None or name in FLAGS}
    attentions, hidden_states = (given.get(name, getattr(self.config, name, False)) for name in FLAGS)
    refused = why_not(given, names, self.config._attn_implementation, attentions, hidden_states, honoured)
    if refused is None and given["input_ids"].is_cpu and ("head_mask" not in given or honoured):
        refused = without_vectors()
    current = refused or accelerator.current(self, doubtful=again)
    if isinstance(current, str):
        if torch.is_grad_enabled():  # its own forward runs, and an optimizer may step
            accelerator.suspect()
        return current
    snapshot, engine = current
    mask, head_mask = given.get("attention_mask"), given.get("head_mask")
    if torch.is_grad_enabled() and (snapshot.requires_grad() or getattr(head_mask, "requires_grad", False)):
        accelerator.suspect()
        warn_once("optimize: gradients are enabled, so transformers' own forward runs; use torch.no_grad()")
        return "gradients are enabled"

    padding = NO_PADDING if mask is None else Padding.around(is_token(mask))
    keep_padding = not padding.none and (padding.left or _is_read(self, accelerator, given.get("keep_padding")))
    if keep_padding and padding.empty and self.config._attn_implementation == "eager":
        return "a sequence without tokens, where eager attention attends to padding"
    try:
        encoded = engine.encode(
            given["input_ids"],
            None if padding.none else mask,
            None if engine.token_type is None else given.get("token_type_ids"),  # transformers ignores them there
            given.get("position_ids"),
            head_mask,
            bool(hidden_states),
            "first" if given.get("first_rows", False) and not (hidden_states or keep_padding) else "all",
            padding.num_tokens,
            keep_padding,
            None if again else snapshot.sampled(given["input_ids"].numel()),  # all bytes have just been compared
        )
    except MemoryChanged:
        return _encode(self, accelerator, given, names, honoured, again=True)
    output = encoder_output(self, encoded.last)  # [B, T, C] or, the first rows, [B, 1, C]
    if hidden_states:
        output["hidden_states"] = encoded.hidden_states
    return_dict = given.get("return_dict", getattr(self.config, "return_dict", True))
    return output.to_tuple() if return_dict is False else output


def _is_read(encoder: nn.Module, accelerator: Accelerator, asked: bool | None) -> bool:
    """Whether what an encoder puts out at padding is wanted: by its caller, who knows, by its user, or perhaps."""
    if asked is not None:
        return asked
    if accelerator.keep_padding is not None:
        return accelerator.keep_padding
    return is_observed(encoder) or is_unknown(encoder)
