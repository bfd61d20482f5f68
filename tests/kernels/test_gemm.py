"""The GEMM kernels of every tier by themselves: parts of K, lists of panels, parts of the rows, every epilogue.

They are reached through amx_emulated/emulated.cpp, so this runs inside the checkouts that test_amx_emulated.py builds.
"""

from __future__ import annotations

import ctypes
import random
import threading
from dataclasses import dataclass

import pytest
import torch

from distilbert_fast import backends
from distilbert_fast.ops.quantize import quantize_reference

library = ctypes.CDLL(backends.cpu().__file__)
if not hasattr(library, "emulated_gemm"):
    pytest.skip("runs inside the checkouts that test_amx_emulated.py builds", allow_module_level=True)

INT8, BFLOAT16, FLOAT32, CODEBOOK16 = WEIGHTS = (0, 1, 2, 3)
BLOCK = {INT8: 64, BFLOAT16: 32, FLOAT32: 16, CODEBOOK16: 64}  # elements of K
CODED = (INT8, CODEBOOK16)  # whose activations are int8
GELU, GELU_FAST = 1, 2
OUT = (torch.float32, torch.bfloat16, torch.uint8)
FIELDS = (
    "weights blob columns k a a_stride a_scale a_scale_stride activation residual residual_stride residual_is_bfloat16"
    " out out_stride output out_scale out_scale_stride out_flip blocks block_ranges panels"
    " out_factors row_begin row_end panel_begin panel_end"
)


class Arguments(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in FIELDS.split()]


@pytest.fixture(autouse=True)
def no_tiles_are_left_configured(tier):
    yield
    assert library.emulated_threads_with_tiles() == 0


def up(n: int, unit: int) -> int:
    return (n + unit - 1) // unit * unit


@dataclass
class Layer:
    """A linear layer, packed, and rows for it as the tier in use wants them."""

    kind: int
    x: torch.Tensor  # float64 [N, K], of which the tier loses nothing
    w: torch.Tensor  # float64 [F, K]
    scale: torch.Tensor  # float32 [F]
    bias: torch.Tensor  # float32 [F]
    x_scale: torch.Tensor  # float32 [N]
    row_begin: int = 0

    def __post_init__(self):
        (n, k), f = self.x.shape, self.w.shape[0]
        self.k_padded = up(k, BLOCK[self.kind])
        dtype = {BFLOAT16: torch.bfloat16, FLOAT32: torch.float32}.get(self.kind, torch.int8)
        w, tables = self.w.to(dtype), torch.zeros(f // 4, 16, dtype=torch.int8)
        if self.kind == CODEBOOK16:
            for table, strip in zip(tables, w.split(4), strict=True):
                values, codes = strip.unique(return_inverse=True)
                table[: len(values)] = values
                strip.copy_(codes)
        module = backends.cpu()
        self.blob = torch.empty(module.packed_bytes(self.kind, f, k), dtype=torch.uint8)
        pointers = self.scale.data_ptr(), self.bias.data_ptr(), tables.data_ptr()
        module.pack_linear(
            self.kind, w.data_ptr(), dtype == torch.float32, k, 1, *pointers, f, k, self.blob.data_ptr(), len(self.blob)
        )
        if dtype == torch.bfloat16 and not library.emulated_reads_bfloat16():
            dtype = torch.float32
        rows = self.row_begin + up(n - self.row_begin, 32)  # the last rows hold garbage: NaN in every float
        a = torch.full((rows, self.k_padded * dtype.itemsize), 255, dtype=torch.uint8)
        a[:n] = 0
        a.view(dtype)[:n, :k] = self.x.to(dtype)
        if self.kind in CODED:
            a[:n] ^= library.emulated_code_flip()
        self.a = a

    def run(self, out: torch.Tensor, **changed: int) -> None:
        """out [N, F] = A · Wᵀ + bias; ``changed`` are Arguments."""
        ranges = torch.tensor([[0, self.k_padded // BLOCK[self.kind]]], dtype=torch.int32)
        (n, k), f = self.x.shape, self.w.shape[0]
        values = dict(
            weights=self.kind, blob=self.blob.data_ptr(), columns=f, k=k, a=self.a.data_ptr(),
            a_stride=self.a.stride(0), a_scale=self.x_scale.data_ptr(), a_scale_stride=1,
            out=out.data_ptr(), out_stride=out.stride(0),
            output=OUT.index(out.dtype), blocks=ranges.data_ptr(), block_ranges=1, row_begin=self.row_begin, row_end=n,
            panel_end=up(f, 32) // 32,
        )  # fmt: skip
        library.emulated_gemm(ctypes.byref(Arguments(**{**values, **changed})))

    def exact(self, ranges: list[list[int]] | None = None) -> torch.Tensor:
        """float64 [N, F] over the blocks [begin, end) of K in ``ranges``."""
        chosen = torch.zeros(self.k_padded, dtype=torch.float64)
        for begin, end in [[0, self.k_padded]] if ranges is None else ranges:
            chosen[begin * BLOCK[self.kind] : end * BLOCK[self.kind]] = 1
        y = (self.x * chosen[: self.x.shape[1]]) @ self.w.t()
        if self.kind in CODED:
            y = y * self.x_scale[:, None].double() * self.scale.double()
        return y + self.bias.double()


def layer(kind: int, n: int, k: int, f: int, seed: int = 0, row_begin: int = 0, fill: int | None = None) -> Layer:
    g = torch.Generator().manual_seed(seed)
    if kind == CODEBOOK16:
        k, f = up(k, 64), up(f, 4)
    if kind in CODED:
        x, w = (torch.randint(-128, 128, (rows, k), generator=g).double() for rows in (n, f))
        if kind == CODEBOOK16:
            w = of_few_values(w, g)
        if fill is not None:
            x, w = torch.full_like(x, fill), torch.full_like(w, fill)
        x_scale, scale = (torch.rand(rows, generator=g) * 0.02 + 1e-3 for rows in (n, f))
    else:
        x, w = (torch.randn(rows, k, generator=g).bfloat16().double() for rows in (n, f))
        x_scale, scale = torch.ones(n), torch.ones(f)
    return Layer(kind, x, w, scale, torch.randn(f, generator=g), x_scale, row_begin)


def of_few_values(w: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """w [F, K], but each four rows have no other values than 16 of theirs."""
    strips = w.view(len(w) // 4, -1)
    chosen = torch.randint(0, strips.shape[1], (len(strips), 16), generator=g)
    return strips.gather(1, chosen).gather(1, torch.randint(0, 16, strips.shape, generator=g)).view_as(w)


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("fill", [None, 127, -128])
def test_int8_sums_are_exact_for_every_row_count(kind, fill):
    for n in range(1, 131):
        k, f = (1, 3, 37, 64, 65, 129)[n % 6], (1, 5, 32, 33, 71)[n % 5]
        given = layer(kind, n, k, f, n, fill=fill)
        f = len(given.w)
        given.x_scale.fill_(1.0)
        given.blob.view(torch.float32)[-2 * up(f, 32) :] = 1.0  # scales and biases
        out = torch.empty(n, f)
        given.run(out)
        assert torch.equal(out.double(), given.x @ given.w.t() + 1)


def codes(kind: str, rows: int, k: int, g: torch.Generator) -> torch.Tensor:
    """float64 [rows, k] of int8: those at which instructions saturate that add products in 16 bits, and others."""
    uniform = torch.randint(-128, 128, (rows, k), generator=g)
    if kind == "extreme":
        return torch.tensor([-128, -127, 127])[uniform % 3].double()
    if kind == "alternating":  # neighbours that cancel out, or add up
        return (torch.tensor([127, -128, 127, 127, -128, -128, 0]).repeat(k)[:k] * torch.ones(rows, 1)).double()
    if kind == "limits":  # sums of two and of four of them lie about 128
        return torch.tensor([-128, 127, -128, 127, 127, -65, -64, 63, 64, 1, 0])[uniform % 11].double()
    if kind == "gaussian":  # as real weights: few pairs are large
        return (torch.randn(rows, k, generator=g) * 40).round().clamp(-127, 127).double()
    return uniform.double()


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("of_w", ["uniform", "extreme", "alternating", "limits", "gaussian"])
@pytest.mark.parametrize("of_x", ["uniform", "extreme", "alternating", "limits"])
def test_int8_sums_of_any_codes_have_the_same_bits_on_every_tier(kind, of_x, of_w):
    """Those that the exact sums become as float32."""
    g = torch.Generator().manual_seed(0)
    k, f = (3100, 70) if kind == INT8 else (3136, 72)
    x, w = codes(of_x, 99, k, g), codes(of_w, f, k, g)
    if kind == CODEBOOK16:
        w = of_few_values(w, g)
    given = Layer(kind, x, w, torch.ones(f), torch.zeros(f), torch.ones(99))
    out = torch.empty(99, f)
    for ranges in ([[0, 49]], [[3, 11], [12, 13], [40, 49]]):
        pairs = torch.tensor(ranges, dtype=torch.int32)
        for rows in (3, 12, 19, 99):
            given.run(out, blocks=pairs.data_ptr(), block_ranges=len(ranges), row_end=rows)
            assert torch.equal(out[:rows], given.exact(ranges)[:rows].float())


@pytest.mark.parametrize("seed", range(60))
def test_any_call(seed):
    """Shapes, strides, parts of the rows, of K and of the panels, and an epilogue, drawn at random."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    kind, n, k, f = draw.choice(WEIGHTS), draw.randint(1, 100), draw.randint(1, 300), draw.randint(1, 150)
    row_begin = draw.choice([0, draw.randint(0, n - 1)])
    given = layer(kind, n, k, f, seed, row_begin)
    f = len(given.w)

    blocks, panels = given.k_padded // BLOCK[kind], up(f, 32) // 32
    cuts = sorted(draw.sample(range(blocks + 1), min(blocks + 1, draw.choice([0, 2, 4])) // 2 * 2))
    ranges = draw.choice([[[0, blocks]], [[a, b] for a, b in zip(cuts[::2], cuts[1::2], strict=True)]])
    chosen = draw.sample(range(panels), draw.randint(1, panels))
    panel_begin = draw.randint(0, len(chosen))
    done = torch.zeros(n, f, dtype=torch.bool)
    for panel in chosen[panel_begin:]:
        done[row_begin:, panel * 32 : panel * 32 + 32] = True

    want = before = given.exact(ranges)
    activation = draw.choice([0, GELU, GELU_FAST])
    if activation:
        want = torch.nn.functional.gelu(want)
    residual = draw.choice([None, torch.randn(n, f + 3), torch.randn(n, f + 3).bfloat16()])
    if residual is not None:
        want = want + residual[:, :f].double()

    dtype, flip = draw.choice(OUT), draw.choice([0, 0x80])
    room = torch.full((n + 2, f + 7), 99, dtype=dtype)
    out, out_scale = room[1:-1, 3:-4], torch.rand(n) * 0.05 + 0.01
    factors = draw.choice([None, torch.rand(up(f, 32)) * 50 + 10])  # of columns, in the place of 1 / out_scale
    pairs = torch.tensor(ranges, dtype=torch.int32)
    listed = torch.tensor(chosen, dtype=torch.int32)
    given.run(
        out, blocks=pairs.data_ptr(), block_ranges=len(ranges), panels=listed.data_ptr(), panel_begin=panel_begin,
        panel_end=len(chosen), activation=activation, residual=0 if residual is None else residual.data_ptr(),
        residual_stride=f + 3, residual_is_bfloat16=int(residual is not None and residual.dtype == torch.bfloat16),
        out_scale=out_scale.data_ptr(), out_scale_stride=1, out_flip=flip,
        out_factors=0 if factors is None else factors.data_ptr(),
    )  # fmt: skip

    size = given.x.abs() @ given.w.abs().t() if kind not in CODED else want.abs() + 10  # what rounding is relative to
    error = 2e-6 * size + (6e-5 * before.abs() + 1.5e-4 if activation == GELU_FAST else 0) + 1e-6
    if dtype == torch.uint8:
        codes = (out.int() ^ flip).to(torch.uint8).view(torch.int8).int()
        if factors is None:
            ideal = quantize_reference(want.float(), out_scale)[0].int()
        else:
            ideal = (want * factors[:f].double()).clamp(-127, 127).round().int()
        wrong = (codes - ideal).abs() > 1
    else:
        wrong = (out.double() - want).abs() > error + (want.abs() / 128 if dtype == torch.bfloat16 else 0)
    assert not (wrong & done).any()
    expected = torch.full_like(room, 99)
    expected[1:-1, 3:-4][done] = out[done]
    assert torch.equal(room, expected), "something else was written"


@pytest.mark.parametrize("kind", WEIGHTS)
def test_no_blocks_leave_the_bias(kind):
    given, out = layer(kind, 37, 70, 40), torch.empty(37, 40)
    given.run(out, block_ranges=0)
    assert torch.equal(out, given.bias.expand(37, 40))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_no_rows_and_no_panels_write_nothing(kind):
    given, out = layer(kind, 37, 70, 72), torch.full((37, 72), 99.0)
    given.run(out, row_begin=5, row_end=5)
    given.run(out, panel_begin=2, panel_end=2)
    assert (out == 99).all()


@pytest.mark.parametrize("kind", WEIGHTS)
def test_concurrent_calls_give_the_bits_of_one_alone(kind):
    given = layer(kind, 45, 300, 72)
    want = torch.empty(45, 72)
    given.run(want)
    found = [torch.empty(45, 72) for _ in range(4)]

    def repeat(out):
        for _ in range(5):
            given.run(out)

    threads = [threading.Thread(target=repeat, args=(out,)) for out in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(out, want) for out in found)


def test_subnormal_bfloat16_count_as_zero_at_most():
    given = layer(BFLOAT16, 17, 40, 33)
    given.x.fill_(2.0**-130)
    given.w.fill_(1.0)
    given.bias.zero_()
    given.__post_init__()
    out = torch.empty(17, 33)
    given.run(out)
    assert ((out == 0) | (out == 40 * 2.0**-130)).all()


@pytest.mark.parametrize("kind", [INT8, BFLOAT16, CODEBOOK16])
@pytest.mark.parametrize(("n", "tiles"), [(1, 2), (16, 2), (17, 4), (32, 4), (48, 6), (49, 8)])
def test_amx_multiplies_no_more_tiles_than_it_must(tier, kind, n, tiles):
    if tier != "amx":
        pytest.skip("of AMX")
    before = library.emulated_multiplications()
    layer(kind, n, 3 * BLOCK[kind] - 1, 72).run(torch.empty(n, 72))
    assert library.emulated_multiplications() - before == tiles * 3 * 3  # blocks of K, panels
