"""The native CPU module by itself: what it refuses before touching memory, its tiers, and what import leaves alone."""

import os
import subprocess
import sys

import pytest
import torch

from distilbert_fast import backends, kl_div, padded_attention

_cpu = backends.cpu()


def arguments(**changed) -> list:
    """A valid call of kl_div_forward on memory that lives as long as this module, with some arguments changed."""
    values = {
        "student": LOGITS.data_ptr(),
        "teacher": LOGITS.data_ptr(),
        "student_stride": 3,
        "teacher_stride": 3,
        "student_dtype": 0,
        "teacher_dtype": 0,
        "mask": 0,
        "rows": 2,
        "columns": 3,
        "temperature": 1.0,
        "mean": True,
        "loss": LOSS.data_ptr(),
        "stats": 0,
        "gradient": 0,
        "threads": 1,
    }
    assert set(changed) <= set(values)
    return list({**values, **changed}.values())


LOGITS = torch.arange(6.0)
LOSS = torch.empty(2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": -1}, "kl_div: rows must be 0 or more, got -1"),
        ({"columns": 0}, "kl_div: columns must be 1 or more, got 0"),
        ({"columns": 2**62}, "kl_div: rows · columns must fit in 60 bits, got 2 · 4611686018427387904"),
        ({"student_dtype": 7}, "kl_div: dtype must be 0 (float32) or 1 (bfloat16), got 7"),
        ({"temperature": 0.0}, "kl_div: temperature must be finite and above 0, got 0.000000"),
        ({"temperature": float("nan")}, "kl_div: temperature must be finite and above 0, got nan"),
        ({"teacher": 0}, "kl_div: student and teacher must point to logits, got null"),
        ({"loss": 0}, "kl_div: loss must point to memory, got null"),
    ],
)
def test_entries_refuse_before_touching_memory(changed, message):
    with pytest.raises(ValueError) as error:
        _cpu.kl_div_forward(*arguments(**changed))
    assert str(error.value) == message


def test_backward_refuses_missing_outputs():
    call = [*arguments()[:10], 0, 0, 0, 1]
    with pytest.raises(ValueError) as error:
        _cpu.kl_div_backward(*call)
    assert str(error.value) == "kl_div: dloss, stats and gradient must point to memory, got null"


LABELS = torch.tensor([2, -1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": -1, "kl_rows": -1}, "linear_kl_div: rows must be 0 or more, got -1"),
        ({"kl_rows": 3}, "linear_kl_div: kl_rows must be from 0 to rows, got 3"),
        ({"columns": 0}, "linear_kl_div: columns must be 1 or more, got 0"),
        ({"columns": 2**62}, "linear_kl_div: rows · columns must fit in 60 bits, got 2 · 4611686018427387904"),
        ({"teacher_dtype": 7}, "linear_kl_div: dtype must be 0 (float32) or 1 (bfloat16), got 7"),
        ({"temperature": 0.0}, "linear_kl_div: temperature must be finite and above 0, got 0.000000"),
        ({"student": 0}, "linear_kl_div: student must point to memory, got null"),
        ({"teacher": 0}, "linear_kl_div: teacher must point to memory, got null"),
        ({"ce": 0}, "linear_kl_div: ce must point to memory, got null"),
        ({"ce_gradient": 0}, "linear_kl_div: ce_gradient must point to memory, got null"),
        ({"columns": 2}, "linear_kl_div: labels must be from -1 (none) to columns - 1, got 2"),
    ],
)
def test_linear_kl_div_refuses_before_touching_memory(changed, message):
    values = {
        "student": LOGITS.data_ptr(),
        "teacher": LOGITS.data_ptr(),
        "student_dtype": 0,
        "teacher_dtype": 0,
        "rows": 2,
        "kl_rows": 1,
        "columns": 3,
        "temperature": 1.0,
        "labels": LABELS.data_ptr(),
        "gradient": True,
        "kl": LOSS.data_ptr(),
        "ce": LOSS.data_ptr(),
        "ce_gradient": LOGITS.data_ptr(),
        "threads": 1,
    }
    assert set(changed) <= set(values)
    before = LOGITS.clone()
    with pytest.raises(ValueError) as error:
        _cpu.linear_kl_div(*{**values, **changed}.values())
    assert str(error.value) == message
    assert torch.equal(LOGITS, before)


IDS = torch.tensor([[2, 0]])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": -1, "kl_rows": -1}, "rows must be 0 or more, got -1"),
        ({"columns": 2**62}, "rows · columns must fit in 60 bits, got 2 · 4611686018427387904"),
        ({"student_dtype": 7}, "dtype must be 0 (float32) or 1 (bfloat16), got 7"),
        ({"student": 0}, "student must point to memory, got null"),
        ({"kl": 0}, "kl must point to memory, got null"),
        ({"ids": 0}, "ids must point to memory, got null"),
        ({"log_p": 0}, "log_p must point to memory, got null"),
        ({"log_tail": 0}, "log_tail must point to memory, got null"),
        ({"kept": 0}, "kept must be from 1 to columns, got 0"),
        ({"kept": 4}, "kept must be from 1 to columns, got 4"),
        ({"columns": 2, "labels": 0}, "ids must be from 0 to columns - 1, got 2"),
        ({"columns": 2}, "labels must be from -1 (none) to columns - 1, got 2"),
    ],
)
def test_linear_topk_kl_div_refuses_before_touching_memory(changed, message):
    values = {
        "student": LOGITS.data_ptr(),
        "student_dtype": 0,
        "rows": 2,
        "kl_rows": 1,
        "columns": 3,
        "temperature": 1.0,
        "ids": IDS.data_ptr(),
        "log_p": LOGITS.data_ptr(),
        "log_tail": LOGITS.data_ptr(),
        "kept": 2,
        "labels": LABELS.data_ptr(),
        "gradient": True,
        "kl": LOSS.data_ptr(),
        "ce": LOSS.data_ptr(),
        "ce_gradient": LOGITS.data_ptr(),
        "threads": 1,
    }
    assert set(changed) <= set(values)
    before = LOGITS.clone()
    with pytest.raises(ValueError) as error:
        _cpu.linear_topk_kl_div(*{**values, **changed}.values())
    assert str(error.value) == f"linear_topk_kl_div: {message}"
    assert torch.equal(LOGITS, before)


HEADS = torch.arange(24.0).view(3, 2, 4)  # [N, H, D]
OFFSETS = torch.tensor([0, 1, 3], dtype=torch.int32)


def attention_arguments(**changed) -> list:
    """The same for what attention_forward and attention_backward begin with."""
    heads = (HEADS.data_ptr(), 0, 8, 4)
    values = {
        "q": heads,
        "k": heads,
        "v": heads,
        "dtype": 0,
        "cu_seqlens": OFFSETS.data_ptr(),
        "mask": 0,
        "length": 0,
        "batch": 2,
        "heads": 2,
        "head_size": 4,
        "head_mask": 0,
        "head_mask_stride": 0,
        "scale": 0.5,
        "dropout_p": 0.0,
        "seed": 0,
        "tokens": 3,
    }
    assert set(changed) <= set(values)
    return list({**values, **changed}.values())


NOWHERE = (0, 0, 8, 4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch": -1}, "attention: batch must be 0 or more, got -1"),
        ({"heads": -1}, "attention: heads must be 0 or more, got -1"),
        ({"head_size": 0}, "attention: head_size must be 1 or more, got 0"),
        ({"heads": 2**31}, "attention: heads and head_size must fit in 31 bits, got 2147483648 and 4"),
        ({"dtype": 2}, "attention: dtype must be 0 (float32) or 1 (bfloat16), got 2"),
        ({"scale": 0.0}, "attention: scale must be finite and above 0, got 0.000000"),
        ({"scale": float("nan")}, "attention: scale must be finite and above 0, got nan"),
        ({"dropout_p": 1.0}, "attention: dropout_p must be at least 0 and below 1, got 1.000000"),
        ({"tokens": 4}, "attention: cu_seqlens must be N = 4 at the end, got 3"),
        ({"cu_seqlens": 0, "length": -1}, "attention: length must be 0 or more and fit in 31 bits, got -1"),
        ({"q": NOWHERE}, "attention: q, k and v must point to memory, got null"),
        ({"v": NOWHERE}, "attention: q, k and v must point to memory, got null"),
    ],
)
def test_attention_refuses_before_touching_memory(changed, message):
    out = (HEADS.data_ptr(), 0, 8, 4)
    calls = [
        lambda: _cpu.attention_forward(*attention_arguments(**changed), out, 0, 1),
        lambda: _cpu.attention_backward(*attention_arguments(**changed), out, out, out, out, 0, 1),
    ]
    before = HEADS.clone()
    for call in calls:
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == message
    assert torch.equal(HEADS, before)


@pytest.mark.parametrize(
    "changed",
    [
        {"q": (HEADS.data_ptr(), 0, 8)},
        {"q": (HEADS.data_ptr(), 0, 8, 4, 1)},
        {"q": HEADS.data_ptr()},
        {"q": (-1, 0, 8, 4)},
        {"q": (None, 0, 8, 4)},
        {"dtype": "float32"},
        {"cu_seqlens": OFFSETS},
        {"cu_seqlens": 2**64},
        {"seed": -1},
    ],
)
def test_entries_refuse_what_is_no_address_no_number_or_another_tuple(changed):
    before = HEADS.clone()
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _cpu.attention_forward(*attention_arguments(**changed), (HEADS.data_ptr(), 0, 8, 4), 0, 1)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _cpu.attention_forward(*attention_arguments(), (HEADS.data_ptr(), 0, 8, 4), 0)
    assert torch.equal(HEADS, before)


def test_attention_refuses_missing_outputs():
    with pytest.raises(ValueError) as error:
        _cpu.attention_forward(*attention_arguments(), NOWHERE, 0, 1)
    assert str(error.value) == "attention: o must point to memory, got null"
    with pytest.raises(ValueError) as error:
        _cpu.attention_forward(*attention_arguments(), (HEADS.data_ptr(), 0, 8, 4), 3, 1)
    assert str(error.value) == "attention: o_dtype must be 0 (float32) or 1 (bfloat16), got 3"
    with pytest.raises(ValueError) as error:
        _cpu.attention_backward(*attention_arguments(), *[NOWHERE] * 4, 0, 1)
    assert str(error.value) == "attention: do, dq, dk and dv must point to memory, got null"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 4, 16, 19, 33])
def test_attention_writes_its_outputs_and_nothing_beside_them(size, dtype, tier):
    """Outputs with gaps between tokens, heads and sequences, of another dtype than the inputs; one head is dead."""
    batch, length, heads, canary = 2, 5, 3, 77.0
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, length, heads, size, generator=generator)
    mask = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    head_mask = torch.tensor([1.0, 0.0, -0.5])
    room = torch.full((batch, length + 1, heads + 1, size + 3), canary, dtype=dtype)
    o = room[:, :length, :heads, 2 : 2 + size]
    where = lambda x: (x.data_ptr(), *x.stride()[:3])  # noqa: E731
    call = [where(q)] * 3 + [0, 0, mask.data_ptr(), length, batch, heads, size, head_mask.data_ptr(), 0, 0.3, 0.0, 0, 0]
    _cpu.attention_forward(*call, where(o), 0 if dtype == torch.float32 else 1, 1)
    if dtype == torch.float32:
        rooms = [room.clone().fill_(canary) for _ in range(3)]
        dq, dk, dv = (x[:, :length, :heads, 2 : 2 + size] for x in rooms)
        _cpu.attention_backward(*call, *(where(x) for x in (q, dq, dk, dv)), 0, 1)
        for x in (dq, dk, dv):
            assert (x[0, [1, 4]] == 0).all() and (x[:, :, 1] == 0).all() and not (x == canary).any()
            x.fill_(canary)
        assert all((x == canary).all() for x in rooms)
    expected = padded_attention(q, q, q, mask, head_mask, scale=0.3)
    torch.testing.assert_close(o, expected.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    o.fill_(canary)
    assert (room == canary).all()


def test_no_rows_touch_nothing():
    _cpu.kl_div_forward(*arguments(rows=0, student=0, teacher=0, loss=0))


def test_tiers():
    tier = _cpu.isa()
    assert _cpu.available_isas()[-1] == "scalar"
    assert [name for name in backends.ISA_TIERS if name in _cpu.available_isas()] == _cpu.available_isas()
    try:
        for name in _cpu.available_isas():
            _cpu.set_isa(name)
            assert _cpu.isa() == name
        with pytest.raises(ValueError) as error:
            _cpu.set_isa("mmx")
        assert str(error.value) == "ISA tier must be amx, avx512_bf16, avx512_vnni, avx_vnni, avx2 or scalar, got 'mmx'"
        for name, reason in _cpu.missing_isas().items():
            with pytest.raises(ValueError) as error:
                _cpu.set_isa(name)
            assert str(error.value) == f"ISA tier '{name}' cannot run here: {reason}"
    finally:
        _cpu.set_isa(tier)


def test_subnormals_survive_import():
    """A module linked with fast-math flushes them in the whole process (CTranslate2#1018)."""
    code = "import torch, numpy; from distilbert_fast import backends; backends.cpu(); "
    code += "x = numpy.float32(1e-40) * numpy.float32(0.5); assert x > 0, x"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_import_is_light():
    """The package itself loads neither torch nor transformers, and an op loads no transformers."""
    code = "import sys, distilbert_fast; assert not {'torch', 'transformers'} & set(sys.modules); "
    code += "distilbert_fast.kl_div; "
    code += "heavy = {'transformers', 'datasets', 'matplotlib', 'accelerate', 'sklearn', 'scipy', 'rich', 'triton'}; "
    code += "import torch; torch_itself = {m for m in heavy if m in sys.modules}; assert not torch_itself, torch_itself"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_every_public_name_resolves():
    import distilbert_fast

    for name in distilbert_fast.__all__:
        assert getattr(distilbert_fast, name) is not None
    assert set(distilbert_fast.__all__) < set(dir(distilbert_fast))
    with pytest.raises(AttributeError, match="module 'distilbert_fast' has no attribute 'nonsense'"):
        _ = distilbert_fast.nonsense


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_computes_on_one_thread():
    """An OpenMP region cannot follow a fork; one thread stays outside of OpenMP."""
    student, teacher = torch.randn(64, 1024), torch.randn(64, 1024)
    expected = kl_div(student, teacher)  # starts the parent's thread pool
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(kl_div(student, teacher), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_large_buffers_are_kept_for_the_next_of_their_size():
    like = torch.empty(9 << 20, dtype=torch.uint8)
    first = backends.empty_cpu(like)
    address = first.data_ptr()
    second = backends.empty_cpu(like)
    assert second.data_ptr() != address  # the first is still in use
    view = first[5:]
    del first
    assert backends.empty_cpu(like).data_ptr() != address  # a view of it too
    del view
    assert backends.empty_cpu(like).data_ptr() == address
    assert backends.empty_cpu(torch.empty(12 << 20, dtype=torch.uint8)).data_ptr() % 64 == 0  # too large for it
    with pytest.raises(ValueError, match="Buffer: bytes must be 1 or more, got 0"):
        _cpu.Buffer(0)


def test_autograd_adds_to_a_large_gradient_in_place():
    """Else tied weights cost a matrix of memory more."""
    found = []

    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, dy):
            gradient = backends.empty_cpu(torch.empty(3, 1 << 20))
            found.append(gradient.data_ptr())
            return gradient.fill_(1)

    x = torch.zeros(3, 1 << 20, requires_grad=True)
    (Sum.apply(x) + Sum.apply(x)).backward()
    assert x.grad.data_ptr() in found and (x.grad == 2).all()


def test_buffers_are_kept_up_to_a_limit_the_newest_first():
    def addresses(megabytes, count):
        alive = [backends.empty_cpu(torch.empty(megabytes << 20, dtype=torch.uint8)) for _ in range(count)]
        return [x.data_ptr() for x in alive]

    _cpu.release_spares()
    weight, logits = addresses(64, 2), addresses(30, 1)
    assert sorted(addresses(64, 2)) == sorted(weight) and addresses(30, 1) == logits
    assert _cpu.release_spares() == (2 * 64 + 30) << 20
    assert _cpu.release_spares() == 0
    addresses(100, 3)
    assert _cpu.release_spares() == 200 << 20  # 256 MiB at most
    addresses(300, 1)
    assert _cpu.release_spares() == 0


def test_large_gradients_of_two_steps_do_not_share_memory():
    student, teacher = torch.randn(70, 30522, requires_grad=True), torch.randn(70, 30522)
    kl_div(student, teacher).backward()
    first, student.grad = student.grad, None
    kept = first.clone()
    kl_div(student, teacher.flip(0)).backward()
    assert first.data_ptr() != student.grad.data_ptr()
    assert torch.equal(first, kept)
    with torch.no_grad():
        assert student.grad.isfinite().all()
