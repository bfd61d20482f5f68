"""Weights laid out for the native CPU kernels, once for each tensor and for as long as it lives."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from distilbert_fast import backends

INT8_LAYOUT = 0  # the code of its layout in csrc/cpu/gemm/gemm.h
_VIEWS = 64  # of one tensor whose packs are kept: enough for the layers of a stacked weight


_BLOCKS = 16  # of 128 bytes of a weight, which each call compares: a microsecond or two


class Packed(NamedTuple):
    blob: torch.Tensor  # uint8, as pack_linear lays it out
    matches: Any  # LayerMatches of it, or None


class _Pack(NamedTuple):
    packed: Packed
    storage: torch.UntypedStorage  # kept alive: no other weights can come to lie at its address
    fingerprint: Any


# Tensor that owns the memory -> the view of it and its version -> pack. An entry dies with its tensor.
_packs: MutableMapping[torch.Tensor, dict[tuple[Any, ...], _Pack]] = WeakIdKeyDictionary()
_lock = backends.fork_safe_lock()


def packed_int8(w_q: torch.Tensor) -> Packed:
    """int8 [F, C] for the native ``int8_linear``; the scales in the blob are 1 and the biases 0.

    The pack is remembered with the tensor that owns the memory and made again once torch has counted a change of it
    (``_version``), or once a sample of the bytes shows one that torch does not count (through ``.data``, NumPy, another
    process): at the next call if it is of many numbers, within ``samples()`` calls if of few. Inference tensors have no
    counter: they are packed every time, without matches.
    """
    if w_q.is_inference():
        return Packed(_pack_int8(w_q), None)
    owner = w_q if w_q._base is None else w_q._base
    # Read before the pack is made: torch raises it after a write, so a pack made meanwhile is not found again.
    version = w_q._version
    key = (version, w_q.data_ptr(), w_q.storage_offset(), tuple(w_q.shape), w_q.stride())
    with _lock:
        packs = _packs.get(owner)
        pack = None if packs is None else packs.get(key)
    if pack is None or not pack.fingerprint.matches_samples(1, 1):
        # Hashed before it is packed: a write meanwhile shows at the next call.
        fingerprint = backends.fingerprint([w_q], _BLOCKS)
        blob = _pack_int8(w_q)
        matches = backends.cpu().LayerMatches(INT8_LAYOUT, blob.data_ptr(), blob.numel(), *w_q.shape)
        pack = _Pack(Packed(blob, matches), w_q.untyped_storage(), fingerprint)
        with _lock:
            kept = [(k, p) for k, p in _packs.get(owner, {}).items() if k[0] == version and p.storage is pack.storage]
            _packs[owner] = dict([*kept[1 - _VIEWS :], (key, pack)])
    return pack.packed


def _pack_int8(w_q: torch.Tensor) -> torch.Tensor:
    f, c = w_q.shape
    module = backends.cpu()
    blob = torch.empty(module.packed_bytes(INT8_LAYOUT, f, c), dtype=torch.uint8, device="cpu")
    module.pack_linear(INT8_LAYOUT, w_q.data_ptr(), False, *w_q.stride(), 0, 0, 0, f, c, blob.data_ptr(), blob.numel())
    return blob
