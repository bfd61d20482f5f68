"""fit_scale finds the scale of the least error, on every tier, and says what it cannot take."""

from __future__ import annotations

import pytest
import torch

from distilbert_fast.ops.fit_scale import fit_scale, fit_scale_reference
from distilbert_fast.ops.quantize import quantize
from distilbert_fast.testing import logits

pytestmark = pytest.mark.usefixtures("place")


def error(w: torch.Tensor, scale: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """Σ_c h_c (w − ŵ)² of each row, in float64, by the codes that ``quantize`` makes."""
    wrong = (w.double() - quantize(w, scale)[0] * scale.double()[:, None]).square()
    return (wrong if importance is None else wrong * importance.double()).sum(1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (33, 129), (17, 768)], ids=str)
def test_error_is_the_least_of_all_steps(shape, dtype, weighted):
    w = logits(*shape, dtype)
    importance = torch.rand(shape[1]) ** 4 if weighted else None
    best = fit_scale_reference(w.double(), None if importance is None else importance.double())
    found, expected = error(w, fit_scale(w, importance), importance), error(w, best.float(), importance)
    assert (found <= expected * (1 + 1e-3) + 1e-12).all()
    assert (found <= error(w, quantize(w)[1], importance) * (1 + 1e-3) + 1e-12).all()


def test_columns_that_count_lie_on_its_multiples():
    w = logits(9, 512)
    importance = torch.full((512,), 1e-6)
    importance[[3, 100, 200]] = 1.0
    plain, weighted = (error(w, scale, importance) for scale in (quantize(w)[1], fit_scale(w, importance)))
    assert weighted.sum() < 0.5 * plain.sum()


def test_gives_up_one_weight_for_many():
    w = logits(1, 20_000).clamp(-3, 3)
    w[0, 7] = 4.0
    assert fit_scale(w)[0] < 0.96 * 4 / 127


def test_empty_zero_and_non_finite_rows():
    assert fit_scale(torch.empty(0, 5)).shape == (0,)
    assert fit_scale(torch.empty(3, 0)).tolist() == [0, 0, 0]
    w = logits(5, 33)
    w[0], w[1], w[2, 3], w[3, 4] = 0, 2.0**-140, float("nan"), float("inf")
    scale = fit_scale(w)
    assert scale[:2].tolist() == [0, 0] and scale[2].isnan() and scale[3].isinf() and 0 < scale[4] < 1
    torch.testing.assert_close(fit_scale(w, torch.zeros(33))[4], quantize(w)[1][4] * 1.05)


def test_rows_that_are_not_next_to_each_other():
    w = logits(8, 70)
    importance = torch.rand(140)
    expected = fit_scale(w[::2, ::2].contiguous(), importance[::4].contiguous())
    assert torch.equal(fit_scale(w[::2, ::2], importance[::4]), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_scale(torch.zeros(3)), "w must be of shape [F, C], got [3]"),
        (lambda: fit_scale(torch.zeros(3, 4), torch.ones(3)), "importance must be of shape [4], got [3]"),
        (
            lambda: fit_scale(torch.zeros(3, 4).char()),
            "w must be float32 or bfloat16 or float16 or float64, got int8",
        ),
        (lambda: fit_scale(torch.zeros(3, 4), torch.ones(4).double()), "importance must be float32, got float64"),
    ],
)
def test_refuses_by_name(call, message):
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    assert str(error.value) == f"fit_scale: {message}"
