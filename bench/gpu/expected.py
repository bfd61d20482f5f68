"""python -m bench.gpu.expected: what our kernels should take on an H200, by a model, next to the limit (docs/gpu.md).

The model runs launches one after another. Each takes the longer of its bytes at BYTES and its operations at their
rate, and LAUNCH more. Bytes and operations are those that our kernels really move and do: seven products in attention's
backward where five would do, float32 statistics, chunks of logits written and read again. What a second pass finds in
the L2 cache counts nothing. The limit is what anybody must move and do, without launches, as in measure.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from bench.gpu.measure import Work

BYTES = 4.3e12  # a second, measured copies on an H200
RATES = {"bf16": 790e12, "int8": 1979e12}  # operations a second: measured products; int8 as NVIDIA states it
LAUNCH = 3e-6  # seconds
C, F, V, HEADS = 768, 3072, 30_522, 12
BF16 = 2  # bytes


class Launch(NamedTuple):
    moved_bytes: float = 0.0
    operations: float = 0.0
    unit: str = "bf16"

    @property
    def seconds(self) -> float:
        return max(self.moved_bytes / BYTES, self.operations / RATES[self.unit]) + LAUNCH


class Row(NamedTuple):
    op: str
    case: str
    limit: Work
    launches: list[Launch]

    @property
    def limit_seconds(self) -> float:
        return max(self.limit.moved_bytes / BYTES, self.limit.operations / RATES[self.limit.unit])

    @property
    def seconds(self) -> float:
        return sum(launch.seconds for launch in self.launches)


def product(n: int, c: int, f: int, size: float = BF16, out: float = BF16, unit: str = "bf16") -> Launch:
    """[n, c] by [c, f]: bytes an element read and written."""
    return Launch((n * c + c * f) * size + n * f * out, 2.0 * n * c * f, unit)


def rows() -> Iterator[Row]:
    yield from _losses()
    yield from _int8_linear()
    for length in (128, 512):
        yield from _attention(64, length)
    yield from _rows(65_536)
    for batch in (256, 1):
        yield _encoder(batch, 128)


def _losses() -> Iterator[Row]:
    n = 16_384
    logits = n * V * BF16
    small = [Launch()] * 5  # the count, the scale, the mean, and the look at the upstream gradient
    yield Row("kl_div", f"loss and gradient, {n} × {V}", Work(moved_bytes=3 * logits), [Launch(3 * logits), *small])
    for case, counted in (("all rows", n), ("15 % of the rows", n * 15 // 100)):
        launches = []
        for begin in range(0, counted, 4352):
            r = min(4352, counted - begin)
            chunk = r * V * BF16
            launches += [product(r, C, V)] * 2  # both sides' logits
            launches += [Launch(3 * chunk)] + [Launch()] * 8  # the losses, and what gathers rows and adds up
            launches += [product(r, V, C), Launch(chunk + r * C * BF16 + 2 * C * V * 4, 2.0 * r * V * C)]
            launches += [Launch(chunk)]  # db
        yield Row("linear_kl_div", f"{case} of {n} × {C}, V = {V}", Work(4 * 2.0 * counted * C * V), launches)


def _int8_linear() -> Iterator[Row]:
    n = 65_536
    for name, c, f, out in (
        ("QKV", C, 3 * C, 2),
        ("out", C, C, 2),
        ("FFN in, GELU, codes", C, F, 1),
        ("FFN out", F, C, 2),
    ):
        launch = product(n, c, f, 1, out, "int8")
        limit = Work(launch.operations, "int8", launch.moved_bytes)
        yield Row("int8_linear", f"{name}, {n} × {c} → {f}", limit, [launch])


def _attention(batch: int, length: int) -> Iterator[Row]:
    matrix, products = batch * length * C * BF16, 2.0 * batch * length**2 * C
    case = f"{batch} × {length}, 12 heads of 64"
    forward = [Launch(4 * matrix, 2 * products)]
    if length <= 128:
        backward = [Launch(7 * matrix, 5 * products)]
    else:
        statistics = 3 * 4.0 * batch * length * HEADS
        backward = [
            Launch(6 * matrix + statistics, 3 * products),
            Launch(6 * matrix + statistics, 4 * products),
            Launch(),
        ]
    yield Row("attention", f"forward, {case}", Work(2 * products, "bf16", 4 * matrix), forward)
    yield Row("attention", f"backward, {case}", Work(5 * products, "bf16", 8 * matrix), backward)


def _rows(n: int) -> Iterator[Row]:
    matrix = n * C * BF16
    parts = [Launch(2 * 132 * 4 * C * 4.0)] * 2
    for op, case, limit, launches in (
        ("layer_norm", "forward, with a residual", 3, [Launch(3 * matrix)]),
        ("layer_norm", "forward, with a residual, and codes", 3.5, [Launch(3.5 * matrix)]),
        ("layer_norm", "forward and backward, with a residual", 7, [Launch(3 * matrix), Launch(4 * matrix), *parts]),
        ("quantize", "a scale a row", 1.5, [Launch(1.5 * matrix)]),
        ("embedding", f"V = {V}", 2, [Launch(2 * matrix)]),
    ):
        yield Row(op, f"{case}, {n} × {C}", Work(moved_bytes=limit * matrix), launches)


def layer(n: int, length: int) -> list[Launch]:
    """The launches of an int8 layer with static scales; tests/engine/test_launches.py compares them with a call's."""
    matrix = n * C
    products = 2.0 * n * length * C
    norm = Launch(7 * matrix)  # two matrices of bfloat16 in, one out, and codes
    return [
        product(n, C, 3 * C, 1, 2, "int8"),
        Launch(8 * matrix, 2 * products),
        Launch(3 * matrix),  # codes of the context
        product(n, C, C, 1, 2, "int8"),
        norm,
        product(n, C, F, 1, 1, "int8"),
        product(n, F, C, 1, 2, "int8"),
        norm,
    ]


def _encoder(batch: int, length: int) -> Row:
    n = batch * length
    operations = 6 * n * (2.0 * (4 * C * C + 2 * C * F) + 4.0 * length * C)
    weights = 6 * (4 * C * C + 2 * C * F)
    case = f"DistilBERT-base, int8, static scales, {batch} × {length}"
    limit = Work(operations, "int8", weights + 2.0 * n * C * BF16)
    return Row("encoder", case, limit, [Launch(5 * n * C), *(6 * layer(n, length))])


def markdown() -> str:
    """The table of docs/gpu.md."""
    lines = ["| op | case | limit, µs | expected, µs | of the limit | measured, µs |", "|---|---|--:|--:|--:|--:|"]
    for row in rows():
        limit, expected = 1e6 * row.limit_seconds, 1e6 * row.seconds
        share = row.limit_seconds / row.seconds
        lines.append(f"| {row.op} | {row.case} | {limit:,.1f} | {expected:,.1f} | {share:.0%} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
