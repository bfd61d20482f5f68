"""The native CPU module by itself: what it refuses before touching memory, its tiers, and what import leaves alone."""

import os
import subprocess
import sys

import pytest
import torch

from distilbert_fast import backends, kl_div

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
        assert str(error.value) == "ISA tier must be amx, avx512_vnni, avx2 or scalar, got 'mmx'"
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
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_import_is_light():
    """The package itself loads neither torch nor transformers, and an op loads no transformers."""
    code = "import sys, distilbert_fast; assert not {'torch', 'transformers'} & set(sys.modules); "
    code += "distilbert_fast.kl_div; "
    code += "heavy = {'transformers', 'datasets', 'matplotlib', 'accelerate', 'torchmetrics', 'rich', 'triton'}; "
    code += "import torch; torch_itself = {m for m in heavy if m in sys.modules}; assert not torch_itself, torch_itself"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


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
