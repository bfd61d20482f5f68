"""kmeans: its cost against dynamic programming over all partitions, its codes, rows that break things, its messages."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distilbert_fast import backends
from distilbert_fast.ops.kmeans import kmeans, kmeans_reference


def cost(x, centroids, codes, weight=None):
    """Σ w (x − c)² of each row, in float64."""
    error = (x.double() - centroids.double().gather(1, codes.long())) ** 2
    return (error if weight is None else error * weight.double()).sum(1)


def check(x, k, weight=None):
    centroids, codes = kmeans(x, k, weight)
    assert centroids.shape == (x.shape[0], k) and centroids.dtype == torch.float32
    assert codes.shape == x.shape and codes.dtype == torch.uint8
    assert bool((centroids.diff(dim=1) >= 0).all())
    # The nearest centroid, of two the lower.
    distances = (x.double()[:, :, None] - centroids.double()[:, None]).abs()
    assert torch.equal(codes.long(), distances.argmin(dim=2))
    counted = weight
    if weight is not None:  # a row of zeros counts as one of ones
        counted = torch.where((weight == 0).all(1, keepdim=True), 1.0, weight)
    best = kmeans_reference(x, k, counted)
    scale = (x.double() ** 2 * (1 if counted is None else counted.double())).sum(1)
    found = cost(x, centroids, codes, counted)
    assert bool((found <= best * (1 + 1e-6) + scale * 1e-13).all()), (found, best)
    assert bool((found >= best * (1 - 1e-6) - scale * 1e-13).all()), (found, best)
    return centroids, codes


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 4), (5, 5), (5, 2), (17, 16), (90, 1), (90, 2), (300, 16), (300, 64)])
def test_cost_is_the_least(n, k, weighted):
    generator = torch.Generator().manual_seed(n + k)
    x = torch.randn(6, n, generator=generator) * torch.logspace(-6, 6, 6)[:, None]
    weight = torch.rand(6, n, generator=generator) ** 8 if weighted else None
    check(x, k, weight)


@pytest.mark.parametrize("weighted", [False, True])
def test_ties_and_repeats(weighted):
    """Where many prices have no partition into k clusters: equal distances, few different numbers."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.arange(48.0), torch.arange(48.0) % 7, torch.arange(48.0).div(3, rounding_mode="floor")]
    rows += [torch.randint(-4, 5, (48,), generator=generator).float() for _ in range(20)]
    x = torch.stack(rows)
    weight = torch.randint(0, 3, x.shape, generator=generator).float() if weighted else None
    for k in (2, 3, 4, 5, 7, 8, 13, 16, 47):
        check(x, k, weight)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_numbers(data):
    n, k = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 9))
    number = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e3, 1e3, width=32))
    x = torch.tensor([data.draw(st.lists(number, min_size=n, max_size=n))])
    weight = torch.tensor([data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=n, max_size=n))])
    check(x, k, weight)


@pytest.mark.parametrize("k", [16, 256])
def test_many_numbers_cost_as_little_as_any_neighbour(k):
    """Too many for the reference: no centroid and no border can be moved, and few values gain by one cluster more."""
    x = torch.randn(1, 400_000, generator=torch.Generator().manual_seed(3))
    centroids, codes = kmeans(x, k)
    counts = torch.bincount(codes[0].long(), minlength=k)
    means = torch.zeros(k, dtype=torch.float64).index_add_(0, codes[0].long(), x[0].double()) / counts
    torch.testing.assert_close(centroids[0].double(), means, rtol=1e-5, atol=1e-6)
    # Panter and Dite: the least cost of a density p is (∫ p^⅓)³ / 12 k² for many clusters.
    mean_cost = float(cost(x, centroids, codes)) / x.numel()
    assert mean_cost == pytest.approx(3**0.5 * torch.pi / 2 / k**2, rel=0.12)
    assert float(cost(x, *kmeans(x, k - 1))) > float(cost(x, centroids, codes))


def test_least_cost_of_many_numbers_with_few_values():
    """65,000 numbers of 500 values: the reference counts them by weight."""
    generator = torch.Generator().manual_seed(4)
    values = torch.randn(500, generator=generator)
    picked = torch.randint(0, 500, (65_000,), generator=generator)
    centroids, codes = kmeans(values[picked][None], 16)
    best = kmeans_reference(values[None], 16, torch.bincount(picked, minlength=500)[None].float())
    torch.testing.assert_close(cost(values[picked][None], centroids, codes), best, rtol=1e-9, atol=0)


def test_numbers_without_weight_do_not_move_centroids():
    x = torch.tensor([[0.0, 1.0, 2.0, 100.0, 50.0]])
    centroids, codes = kmeans(x, 2, torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0]]))
    assert centroids.tolist() == [[0.0, 1.5]] and codes.tolist() == [[0, 1, 1, 1, 1]]


@pytest.mark.parametrize("value", [0.0, -0.0, 3.5, -1e-42, 3.4e38])
def test_constant_numbers(value):
    centroids, codes = kmeans(torch.full((2, 9), value), 4)
    assert torch.equal(centroids, torch.full((2, 4), value)) and not codes.any()


def test_fewer_different_numbers_than_clusters():
    centroids, codes = kmeans(torch.tensor([[3.0, 1.0, 3.0, 2.0]]), 8)
    assert centroids.tolist() == [[1.0, 2.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0]]
    assert codes.tolist() == [[2, 0, 2, 1]]


def test_an_outlier_leaves_the_others_apart():
    x = torch.cat([torch.randn(2000, generator=torch.Generator().manual_seed(5)), torch.tensor([1e4])])[None]
    centroids, codes = kmeans(x, 9)
    inner = kmeans(x[:, :-1], 8)[0]
    torch.testing.assert_close(centroids[:, :8], inner, rtol=1e-4, atol=1e-4)
    assert int((codes == 8).sum()) == 1 and float(centroids[0, 8]) == 1e4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_float32(dtype):
    x = torch.randn(3, 200).to(dtype)
    for found, want in zip(kmeans(x, 16), kmeans(x.float(), 16), strict=True):
        assert torch.equal(found, want)


def test_rows_threads_and_layouts_change_no_bit():
    x = torch.randn(40, 300, generator=torch.Generator().manual_seed(6))
    weight, before = torch.rand(40, 300), copy.deepcopy(x)
    want = kmeans(x, 16, weight, threads=1)
    for found in (
        kmeans(x, 16, weight, threads=5),
        kmeans(x.t().contiguous().t(), 16, weight.t().contiguous().t()),
        tuple(torch.cat(parts) for parts in zip(*(kmeans(x[i : i + 1], 16, weight[i : i + 1]) for i in range(40)))),  # noqa: B905
    ):
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert torch.equal(x, before)
    assert [t.shape for t in kmeans(x[:0], 4)] == [(0, 4), (0, 300)]


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], 2), TypeError, "kmeans: x must be a tensor, got list"),
        ((X.long(), 2), TypeError, "kmeans: x must be float32 or bfloat16 or float16 or float64, got int64"),
        ((X[0], 2), ValueError, r"kmeans: x must be of shape \[R, n\], got \[3\]"),
        ((X, 2.0), TypeError, "kmeans: k must be an integer, got float"),
        ((X, True), TypeError, "kmeans: k must be an integer, got bool"),
        ((X, 0), ValueError, "kmeans: k must be from 1 to 256, got 0"),
        ((X, -3), ValueError, "kmeans: k must be from 1 to 256, got -3"),
        ((X, 257), ValueError, "kmeans: k must be from 1 to 256, got 257"),
        ((X[:, :0], 2), ValueError, "kmeans: x must be of 1 to 2147483646 columns, got 0"),
        ((X, 2, X[:1]), ValueError, r"kmeans: weight must be of shape \[2, 3\], got \[1, 3\]"),
        ((X / 0, 2), ValueError, "kmeans: x must be finite, got -?nan"),
        ((X + torch.inf, 2), ValueError, "kmeans: x must be finite, got inf"),
        ((X, 2, X - 1), ValueError, "kmeans: weights must be finite and not negative, got -1.0"),
        ((X, 2, X / 0), ValueError, "kmeans: weights must be finite and not negative, got -?nan"),
        ((X, 2, X + torch.inf), ValueError, "kmeans: weights must be finite and not negative, got inf"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        kmeans(*arguments)


def test_without_the_native_module(monkeypatch):
    monkeypatch.setattr(backends, "availability", lambda name: backends.Availability(False, "not built"))
    with pytest.raises(backends.BackendError, match=r"^kmeans: the native module is needed: not built$"):
        kmeans(X, 2)
