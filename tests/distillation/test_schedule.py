from __future__ import annotations

import math

import pytest
from distillation import tiny

from distilbert_fast.distillation.schedule import at, bounds, is_zero, plain

PROGRESS = [i / 20 for i in range(21)]


@pytest.mark.parametrize("value", [2.0, "2.0", "2", 2, "constant:2:2"])
def test_a_number_is_itself_throughout(value):
    assert [at(value, x) for x in (0, 0.3, 1)] == [2.0] * 3
    assert bounds(value) == (2.0, 2.0) and plain(value) == 2.0


@pytest.mark.parametrize(("start", "end"), [(2.0, 1.0), (0.0, 5.0), (1e-3, 1e3)])
def test_linear_and_cosine_are_their_formulas(start, end):
    for x in PROGRESS:
        assert at(f"linear:{start}:{end}", x) == pytest.approx((1 - x) * start + x * end)
        half = (1 + math.cos(math.pi * x)) / 2
        assert at(f"cosine:{start}:{end}", x) == pytest.approx(end + (start - end) * half)
    assert bounds(f"cosine:{start}:{end}") == (min(start, end), max(start, end))
    assert plain(f"linear:{start}:{end}") == f"linear:{start}:{end}"


def test_it_stays_at_its_ends():
    assert at("linear:1:3", -0.5) == 1 and at("linear:1:3", 1.5) == 3


def test_zero_is_zero_throughout():
    assert is_zero(0) and is_zero("0.0") and is_zero("linear:0:0")
    assert not is_zero("linear:1:0") and not is_zero("cosine:0:1")


@pytest.mark.parametrize(
    "value", ["", "two", "linear:1", "linear:1:2:3", "exponential:1:2", "linear:a:b", ":1:2", None]
)
def test_what_is_no_schedule(value):
    with pytest.raises((ValueError, TypeError)):
        bounds(value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": "linear:2:0"}, "temperature must be finite and above 0, got linear:2:0"),
        ({"temperature": "linear:2:nan"}, "temperature must be finite and above 0, got linear:2:nan"),
        (
            {"temperature": "linear:2"},
            'temperature must be a number, "linear:FROM:TO" or "cosine:FROM:TO", got \'linear:2\'',
        ),
        ({"alpha": "cosine:0:1.5"}, "alpha must be 0 to 1, got cosine:0:1.5"),
        ({"alpha_cos": -1.0}, "alpha_cos must be finite and 0 or more, got -1.0"),
        ({"alpha_ce": "linear:5:inf"}, "alpha_ce must be finite and 0 or more, got linear:5:inf"),
        ({"objective": "lm"}, "objective must be one of task, qa, mlm, got lm"),
        ({"layer_map": "0-1"}, "layer_map must be pairs such as \"0:1,1:3\", got '0-1'"),
        ({"relation_heads": -1}, "relation_heads must be 0 or more, got -1"),
        (
            {"objective": "mlm", "label_smoothing_factor": 0.1},
            "label_smoothing_factor must be 0 for objective mlm, got 0.1",
        ),
    ],
)
def test_bad_arguments(tmp_path, settings, message):
    with pytest.raises(ValueError) as caught:
        tiny.arguments(tmp_path, **settings)
    assert str(caught.value) == f"DistillationArguments: {message}"
