"""What ``quantization_config`` in a config.json says of a compressed model: docs/formats.md.

Nothing here knows a model: which layers a config means is asked of it name by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from distilbert_fast.files import schema
from distilbert_fast.files.durable import FileError, refuse_file
from distilbert_fast.layers import CODEBOOK_SIZES
from distilbert_fast.ops import _check

METHOD = "distilbert_fast"
FORMAT = 2
Kind: TypeAlias = dict[str, Any]  # "kind" and its settings

FLOAT: Kind = {"kind": "float"}
INT8: Kind = {"kind": "int8"}
SPARSE: Kind = {"kind": "sparse"}
# How a linear layer may hold its weights, and what each says of itself beside "kind".
KINDS: dict[str, dict[str, schema.Check]] = {
    "float": {},
    "int8": {},
    "sparse": {},
    "codebook": {"values": schema.one_of(*CODEBOOK_SIZES), "group_size": schema.nullable(schema.integer(1, 2**20))},
}


class _Config(QuantizationConfigMixin):
    """What both formats have."""

    if TYPE_CHECKING:
        structure: list[dict[str, Any]] | None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in transformers, of either format. The settings are checked where the path of their file is known."""
        made = CompressionConfig() if "format" in config_dict else Int8Config()
        vars(made).update(config_dict)
        return (made, kwargs) if return_unused_kwargs else made

    def kind_of(self, name: str, prefix: str, inside: bool) -> Kind:
        """How a linear layer holds its weights.

        Args:
            name: its dotted name in the model.
            prefix: what the names of the encoder's begin with there, as in ``base_model_prefix``.
            inside: whether it belongs to a layer of the encoder.
        """
        raise NotImplementedError

    @property
    def is_float(self) -> bool:
        """Whether all linear layers and tables compute with floats, each its own."""
        raise NotImplementedError

    @property
    def int8_embeddings(self) -> bool:
        """Whether the tables of words, positions and token types hold int8 codes."""
        return False


@register_quantization_config(METHOD)
@dataclass(kw_only=True)
class CompressionConfig(_Config):
    """Format 2: what each layer has left, and how each linear layer holds its weights.

    Args:
        structure: for each layer of the encoder {"heads": numbers of those that are left, ascending, "ffn": width of
            its feed-forward}; None: all layers are whole.
        linear: how the linear layers of the encoder's layers hold their weights, {"kind": …, settings}.
        linears: the same for those that differ from it, and for others of the model that are no floats, by their dotted
            names in the encoder or, outside of that, in the model.
        embeddings: how the tables of words, positions and token types hold theirs, {"kind": "float" or "int8"}.
    """

    structure: list[dict[str, Any]] | None = None
    linear: Kind = field(default_factory=lambda: dict(FLOAT))
    linears: dict[str, Kind] = field(default_factory=dict)
    embeddings: Kind = field(default_factory=lambda: dict(FLOAT))
    format: int = FORMAT
    quant_method: str = METHOD  # type: ignore[assignment]  # transformers' enumeration does not have it

    def to_dict(self) -> dict[str, Any]:
        empty: dict[str, Any] = {"structure": None, "linear": FLOAT, "linears": {}, "embeddings": FLOAT}
        return {name: value for name, value in super().to_dict().items() if name not in empty or value != empty[name]}

    def kind_of(self, name: str, prefix: str, inside: bool) -> Kind:
        return self.linears.get(name.removeprefix(f"{prefix}."), self.linear if inside else FLOAT)

    @property
    def is_float(self) -> bool:
        return all(kind in (FLOAT, SPARSE) for kind in (self.linear, self.embeddings, *self.linears.values()))

    @property
    def int8_embeddings(self) -> bool:
        return self.embeddings == INT8


@dataclass(kw_only=True)
class Int8Config(_Config):
    """Which linear layers hold int8 weights. Activations are quantized as they come, a scale for each token.

    Also for quantizing while loading: ``from_pretrained(..., quantization_config=Int8Config())``. What config.json
    says of a model with int8 tables, or a pruned one, is a ``CompressionConfig``; of any other this, format 1.

    Args:
        heads: also those of pooler and task head.
        modules_to_not_convert: dotted names, or dotted parts of names, of layers that stay float. If one of query, key
            and value of a layer does, all three do.
        embeddings: also the tables of words, positions and token types.
    """

    heads: bool = False
    modules_to_not_convert: list[str] = field(default_factory=list)
    embeddings: bool = False
    quant_method: str = METHOD  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """Of format 1, which has no ``embeddings``."""
        return {name: value for name, value in super().to_dict().items() if name != "embeddings" or value}

    def kind_of(self, name: str, prefix: str, inside: bool) -> Kind:
        skipped = any(part_of(part, name) for part in self.modules_to_not_convert)
        return INT8 if (self.heads or inside) and not skipped else FLOAT

    @property
    def is_float(self) -> bool:
        return False

    @property
    def int8_embeddings(self) -> bool:
        return self.embeddings


@dataclass
class CodebookConfig(_Config):
    """Which linear layers hold weights that share values, and how many. A model so quantized is saved as format 2.

    Also for quantizing while loading: ``from_pretrained(..., quantization_config=CodebookConfig(16))``.

    Args:
        values: 256, 64 or 16: codes of 8, 6 or 4 bits.
        granularity: what shares them: "tensor", all weights of a layer; "row", those of each row, or output feature;
            "group", those of each ``group_size`` rows in a row.
        group_size: for "group" alone.
        heads, modules_to_not_convert: as for ``Int8Config``.

    Raises:
        TypeError, ValueError: another number, granularity or size, by name.
    """

    values: int = 256
    granularity: str = "tensor"
    group_size: int | None = None
    heads: bool = False
    modules_to_not_convert: list[str] = field(default_factory=list)
    quant_method: str = field(default=METHOD, kw_only=True)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        _check.choice("CodebookConfig", "values", self.values, CODEBOOK_SIZES)
        _check.choice("CodebookConfig", "granularity", self.granularity, ("tensor", "row", "group"))
        size, grouped = self.group_size, self.granularity == "group"
        if grouped and not (type(size) is int and 1 <= size <= 2**20):
            _check.refuse("CodebookConfig", "group_size", f"an integer from 1 to {2**20} for groups", repr(size))
        if not grouped and size is not None:
            _check.refuse("CodebookConfig", "group_size", f"None for granularity {self.granularity!r}", repr(size))

    @property
    def kind(self) -> Kind:
        size = 1 if self.granularity == "row" else self.group_size
        return {"kind": "codebook", "values": self.values, "group_size": size}

    def kind_of(self, name: str, prefix: str, inside: bool) -> Kind:
        skipped = any(part_of(part, name) for part in self.modules_to_not_convert)
        return self.kind if (self.heads or inside) and not skipped else FLOAT

    @property
    def is_float(self) -> bool:
        return False


def part_of(part: str, name: str) -> bool:
    """Whether a dotted name holds another, whole parts of it."""
    return f".{part}." in f".{name}."


# Checking ------------------------------------------------------------------------------------------------------------


def _kind(value: Any, where: str) -> None:
    schema.record({"kind": schema.one_of(*KINDS)}, others=True)(value, where)
    schema.record({"kind": schema.anything, **KINDS[value["kind"]]})(value, where)


_LAYER = schema.record({"heads": schema.array(schema.integer(0, 2**12), most=2**12), "ffn": schema.integer(0, 2**20)})
_FORMAT_1 = schema.record(
    {"quant_method": schema.one_of(METHOD)},
    {"heads": schema.boolean, "modules_to_not_convert": schema.array(schema.text())},
    others=True,
)
_FORMAT_2 = schema.record(
    {"quant_method": schema.one_of(METHOD), "format": schema.one_of(FORMAT)},
    {
        "structure": schema.array(_LAYER, most=2**12),
        "linear": _kind,
        "linears": schema.mapping(_kind),
        "embeddings": schema.record({"kind": schema.one_of("float", "int8")}),
    },
)
_KEYS_1 = {"quant_method", "heads", "modules_to_not_convert"}


class _UnknownSettingError(FileError, TypeError):
    """A setting that this version does not know, as of a later one."""


def check_settings(settings: dict[str, Any], path: Path) -> None:
    """Refuse settings of ``path`` that no version writes, or another version. Raises FileError."""
    schema.validate(settings, path, _FORMAT_2 if "format" in settings else _FORMAT_1, "quantization_config")
    if "format" not in settings and (unknown := sorted(settings.keys() - _KEYS_1)):
        given = f"unexpected keyword argument {unknown[0]!r}"
        raise _UnknownSettingError(f"{str(path)!r}: quantization_config: {given}", given)


def check_structure(layers: Sequence[Any], depth: int, heads: int, ffn: int, path: Path) -> None:
    """Refuse what cannot be left of a model of these sizes. Raises FileError.

    Args:
        layers: as ``CompressionConfig.structure``.
        depth, heads, ffn: layers of the unpruned model, heads of each, and width of its feed-forward.
    """
    layer = schema.record(
        {"heads": schema.array(schema.integer(0, heads - 1), 0, heads), "ffn": schema.integer(0, ffn)}
    )
    whole = schema.record({"structure": schema.array(layer, depth, depth)})
    schema.validate({"structure": layers}, path, whole, "quantization_config")
    for i, one in enumerate(layers):
        if sorted(set(one["heads"])) != one["heads"]:
            problem = f"structure[{i}].heads must be ascending, each once, got {one['heads']}"
            refuse_file(path, f"quantization_config: {problem}")
