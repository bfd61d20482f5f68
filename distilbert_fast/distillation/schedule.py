"""Numbers that change over a run: a temperature that falls, the weight of a loss that grows.

    2.0 or "2.0"        2 throughout
    "linear:2.0:1.0"    a + (b − a) x                              x = steps done / steps of the run, 0 … 1
    "cosine:2.0:1.0"    a + (b − a) (1 − cos πx) / 2

Settings keep a schedule as the user wrote it, number or text, so that they can be saved and compared.
"""

from __future__ import annotations

import math

Scheduled = float | str


def at(value: Scheduled, progress: float) -> float:
    """The number at a share of the run, 0 … 1."""
    shape, start, end = _parse(value)
    x = min(max(progress, 0.0), 1.0)
    return start + (end - start) * ((1 - math.cos(math.pi * x)) / 2 if shape == "cosine" else x)


def bounds(value: Scheduled) -> tuple[float, float]:
    """The smallest and the largest number it takes; NaN if one of them is not finite.

    Raises:
        ValueError: it is neither a number nor a schedule.
    """
    _, *ends = _parse(value)
    return (min(ends), max(ends)) if all(map(math.isfinite, ends)) else (math.nan, math.nan)


def is_zero(value: Scheduled) -> bool:
    """Whether it is 0 throughout. A loss of that weight need not be computed."""
    return bounds(value) == (0, 0)


def plain(value: Scheduled) -> Scheduled:
    """A number that came as text, from a command line, as a number; a schedule as it is."""
    shape, start, _ = _parse(value)
    return start if shape == "constant" else value


def _parse(value: Scheduled) -> tuple[str, float, float]:
    shape, *numbers = value.split(":") if isinstance(value, str) and ":" in value else ("constant", value, value)
    try:
        start, end = map(float, numbers)
        if shape in ("constant", "linear", "cosine"):
            return shape, start, end
    except ValueError:
        pass
    raise ValueError(f'must be a number, "linear:FROM:TO" or "cosine:FROM:TO", got {value!r}')
