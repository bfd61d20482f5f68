"""Files of packed encoders: safetensors whose metadata say what the tensors are.

    format    "distilbert_fast.encoder.2"
    shape     the fields of ``EncoderShape`` as JSON. In format 1, which is read too, ``ffn`` and ``precision`` are
              those of all layers, and hidden states are of the dtype of the tables
    xxh3      the checksum that files/durable.py describes; older files have none

The tensors are those of ``PackedEncoder``, all of them and no others. A file is mapped into memory, so what it holds is
checked before anything follows a size or an address in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from distilbert_fast.engine.native_encoder import (
    CODED,
    DTYPES,
    NORMS,
    WEIGHTS,
    EncoderShape,
    PackedEncoder,
    packed_bytes,
    whole_panels,
)
from distilbert_fast.engine.weights import OP
from distilbert_fast.files.durable import (
    UNSEALED,
    XXH3_KEY,
    FileError,
    check_seal,
    few,
    refuse_file,
    regular_size,
    replacing,
    seal,
)
from distilbert_fast.files.schema import Check, array, integer, nullable, number, one_of, parse_json, record
from distilbert_fast.ops import _check

VERIFIED = 10**9  # bytes up to which a file is compared with its checksum by default

FORMAT = "distilbert_fast.encoder.2"
_SIZE = integer(1, 2**24)
_FIELDS: dict[str, Check] = {
    "kinds": array(array(one_of(*WEIGHTS), 4, 4), most=2**12),
    "dtype": one_of(*DTYPES),
    "hidden": _SIZE,
    "head_size": _SIZE,
    "num_heads": _SIZE,
    "padding_idx": nullable(integer(0, 2**31 - 1)),
    "heads": array(array(integer(0, 2**24)), most=2**12),
    "ffn": array(integer(0, 2**24)),
    "eps": array(number(0)),
    "scales": array(array(number(0), 2, 2)),
}
_FIELDS_1 = {name: check for name, check in _FIELDS.items() if name not in ("kinds", "dtype")}
_FORMATS: dict[str, dict[str, Check]] = {
    "distilbert_fast.encoder.1": _FIELDS_1 | {"ffn": _SIZE, "precision": one_of(*WEIGHTS)},
    FORMAT: _FIELDS,
}
_TABLES, _VECTORS = (torch.float32, torch.bfloat16), (torch.float32,)


def write(packed: PackedEncoder, path: str | Path) -> None:
    """Write a file, or replace one. Raises OSError that names it; no half-written file is left."""
    tensors = {name: tensor.clone() if tensor.is_inference() else tensor for name, tensor in packed.tensors.items()}
    metadata = {"format": FORMAT, "shape": json.dumps(packed.shape._asdict()), XXH3_KEY: UNSEALED}
    with replacing(path, unique=True) as partial:
        save_file(tensors, partial, metadata)
        seal(partial)


def read(path: str | Path, verify: bool | None) -> PackedEncoder:
    """Map a file; see ``Engine.load``."""
    try:
        size = regular_size(path)
        metadata, tensors = _parts(path)
        shape = _shape(path, metadata, tensors)
        if verify and metadata.get(XXH3_KEY, UNSEALED) == UNSEALED:
            refuse_file(path, "expected a checksum to verify, got a file of an earlier version; save it again")
        check_seal(path, metadata.get(XXH3_KEY), size < VERIFIED if verify is None else verify)
        _check_parts(shape, tensors)
        return PackedEncoder(shape, tensors)
    except FileError as error:
        raise FileError(f"{OP}: {error}", error.reason) from error
    except (ValueError, TypeError) as error:  # raised by a check that does not know the path
        raise FileError(f"{OP}: {str(path)!r}: {error}", str(error)) from error


def _parts(path: str | Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of a file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            if metadata.get("format") not in _FORMATS:
                given = f"{str(path)!r} of {metadata.get('format')}"
                raise FileError(f"path must be a file of format {FORMAT}, got {given}")
            return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except FileError:
        raise
    except (SafetensorError, ValueError, TypeError, LookupError, RuntimeError, AttributeError) as error:
        raise FileError(f"{str(path)!r} is truncated or no safetensors file: {error}") from error


def _shape(path: str | Path, metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> EncoderShape:
    unknown = metadata.keys() - {"format", "shape", XXH3_KEY}
    if unknown or "shape" not in metadata:
        refuse_file(path, f"expected the metadata format, shape and {XXH3_KEY}, got {', '.join(sorted(metadata))}")
    fields = parse_json(metadata["shape"], path, record(_FORMATS[metadata["format"]]), "shape")
    fields["heads"] = tuple(map(tuple, fields["heads"]))
    fields["scales"] = tuple(map(tuple, fields["scales"]))
    fields["eps"] = tuple(map(float, fields["eps"]))
    if "precision" in fields:  # format 1
        depth = len(fields["heads"])
        fields |= {"ffn": [fields["ffn"]] * depth, "kinds": [[fields.pop("precision")] * 4] * depth}
        fields["dtype"] = "bf16" if "word" in tensors and tensors["word"].dtype == torch.bfloat16 else "fp32"
    fields["ffn"], fields["kinds"] = tuple(fields["ffn"]), tuple(map(tuple, fields["kinds"]))
    return EncoderShape(**fields)


def _check_parts(shape: EncoderShape, tensors: dict[str, torch.Tensor]) -> None:
    """Refuse what cannot be of one encoder: numbers that contradict each other, tensors that lack or are too many."""
    layers = len(shape.heads)
    if shape.head_size * shape.num_heads != shape.hidden:
        share = f"{shape.hidden} / {shape.num_heads}, the share of a head"
        _check.refuse("shape", "head_size", share, shape.head_size)
    for i, heads in enumerate(shape.heads):
        if len(set(heads)) != len(heads) or not all(head < shape.num_heads for head in heads):
            _check.refuse("shape", f"heads[{i}]", f"different ones of {shape.num_heads}", list(heads))
    for name, wanted in (("eps", 1 + 2 * layers), ("scales", layers), ("ffn", layers), ("kinds", layers)):
        if len(getattr(shape, name)) != wanted:
            _check.refuse("shape", name, f"{wanted} for {layers} layers", len(getattr(shape, name)))
    for i, ((_, *readers), scales) in enumerate(zip(shape.kinds, shape.scales, strict=True)):
        for kind, scale in zip((readers[0], readers[2]), scales, strict=True):
            if scale != 0 and kind not in CODED:
                _check.refuse("shape", f"scales[{i}]", f"0 for {kind}", scale)
    if len({kind for kinds in shape.kinds for kind in kinds} - CODED) > 1:
        _check.refuse("shape", "kinds", "int8, codebook16 and one of the others", shape.precision)
    expected = dict(_expected(shape, tensors))
    if lacking := expected.keys() - tensors.keys():
        raise ValueError(f"it lacks {few(sorted(lacking))}")
    if unused := tensors.keys() - expected.keys():
        raise ValueError(f"it holds what no layer uses: {few(sorted(unused))}")
    for name, (size, dtypes) in expected.items():
        _check.tensor("tensor", name, tensors[name], size, dtypes)
        if dtypes == _VECTORS and not bool(tensors[name].isfinite().all()):
            _check.refuse("tensor", name, "finite", "NaN or infinite numbers")
    if shape.padding_idx is not None and not shape.padding_idx < len(tensors["position"]):
        _check.refuse("shape", "padding_idx", f"below the {len(tensors['position'])} positions", shape.padding_idx)


def _expected(
    shape: EncoderShape, given: dict[str, torch.Tensor]
) -> Iterator[tuple[str, tuple[tuple[int | str, ...], tuple[torch.dtype, ...]]]]:
    """Name, shape and dtypes of each tensor; of the optional ones, of those that are there."""
    for name in ("word", "position", *(["token_type"] if "token_type" in given else [])):
        coded = "word.scale" in given
        yield name, (("rows", shape.hidden), (torch.int8,) if coded else _TABLES)
        if coded and name in given:
            yield f"{name}.scale", ((given[name].shape[0] if given[name].dim() else 0,), _VECTORS)
    norms = ["norm", *(f"{i}.{norm}" for i in range(len(shape.heads)) for norm in NORMS)]
    for norm in norms:
        yield f"{norm}.weight", ((shape.hidden,), _VECTORS)
        yield f"{norm}.bias", ((shape.hidden,), _VECTORS)
    for i, heads in enumerate(shape.heads):
        for kind, (name, size) in zip(shape.kinds[i], shape.linears(i).items(), strict=True):
            yield f"{i}.{name}", ((packed_bytes(kind, *size),), (torch.uint8,))
        if f"{i}.mask" in given:
            yield f"{i}.mask", ((len(heads),), _VECTORS)
        if shape.scales[i][1] > 0:
            yield f"{i}.ffn_factors", ((whole_panels(shape.ffn[i]),), _VECTORS)
