"""What can run on this machine, why the rest cannot, and which backend serves an op.

Four ways to compute an op: ``cuda`` (csrc/cuda), ``triton`` (kernels/), ``cpu`` (csrc/cpu) and ``torch``, the
reference inside ops/<op>.py, which always exists. A tensor's device decides the order in which they are tried.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import importlib.metadata
import importlib.util
import logging
import os
import platform
import posix
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

log = logging.getLogger("distilbert_fast")
T = TypeVar("T")

if os.environ.get("DISTILBERT_FAST_LOG", "0") not in ("", "0"):  # calls and fall-backs, as they come
    _handler = logging.StreamHandler()
    _handler.setFormatter(logging.Formatter("distilbert_fast: %(message)s"))
    log.addHandler(_handler)
    log.setLevel(logging.INFO)
    log.propagate = False

BACKENDS = ("cuda", "triton", "cpu", "torch")

# The kernels that exist beside the torch reference: op -> dtype names each takes, in order of preference per
# device. The first entry that can run here serves; where none can, `torch` does. Where a backend has only the
# forward of an op, backward has an entry of its own.
_FLOAT = ("float32", "bfloat16", "float16")
KERNELS: dict[str, dict[str, tuple[str, ...]]] = {
    "kl_div": {"triton": _FLOAT, "cuda": _FLOAT, "cpu": ("float32", "bfloat16")},
    "linear_kl_div": {"triton": _FLOAT, "cpu": ("float32", "bfloat16")},
    "linear_topk_kl_div": {"cpu": ("float32", "bfloat16")},
    "attention": {"triton": _FLOAT, "cuda": ("bfloat16", "float16"), "cpu": ("float32", "bfloat16")},
    "quantize": {"triton": _FLOAT, "cpu": ("float32", "bfloat16")},
    "fit_scale": {"cpu": ("float32", "bfloat16")},
    "int8_linear": {"triton": _FLOAT, "cuda": _FLOAT, "cpu": ("float32", "bfloat16")},
    "layer_norm": {"triton": _FLOAT, "cuda": _FLOAT, "cpu": ("float32", "bfloat16")},
    "layer_norm_backward": {"triton": _FLOAT, "cpu": ("float32", "bfloat16")},
    "embedding": {"triton": _FLOAT, "cpu": ("float32", "bfloat16")},
    "cosine_loss": {"triton": _FLOAT, "cpu": ("float32", "bfloat16")},
    "linear": {"cpu": ("float32", "bfloat16")},
    "codebook_linear": {"cpu": ("float32", "bfloat16")},
    "codebook_linear_backward": {},
}

# The scalar tier is for tests. Where no other runs, torch's own vectors are faster at products, attention and whole
# encoders, and at LayerNorm beside them; the losses and `quantize` are faster in one scalar pass than in many of torch.
FASTER_BY_TORCH_THAN_SCALAR = ("linear", "int8_linear", "codebook_linear", "attention", "layer_norm", "embedding")
NO_VECTORS = (
    "no vector ISA tier runs here, and torch is faster than the scalar one, which is for tests"
    " (DISTILBERT_FAST_ISA=scalar forces it)"
)

ISA_TIERS = ("amx", "avx512_bf16", "avx512_vnni", "avx_vnni", "avx2", "scalar")


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot serve."""


class Availability(NamedTuple):
    ok: bool
    reason: str  # how it can run, or why it cannot


@functools.cache
def cpu() -> Any:
    """The native CPU module, told which ISA tier to use. Raises ImportError where it was not built."""
    import distilbert_fast._cpu as _cpu

    tier = os.environ.get("DISTILBERT_FAST_ISA")
    if tier:
        if tier not in ISA_TIERS:
            raise BackendError(f"DISTILBERT_FAST_ISA must be one of {', '.join(ISA_TIERS)}, got {tier!r}")
        _cpu.set_isa(tier)
    return _cpu


def without_vectors() -> str | None:
    """Why products, attention and encoders on the CPU are torch's though the native module runs; None if they are not.

    Whoever asks for the scalar tier, or forces a backend, gets it.
    """
    if forced() is None and availability("cpu").ok and cpu().scalar_by_default():
        return NO_VECTORS
    return None


_LARGE_BYTES = 8 << 20


def empty_cpu(like: torch.Tensor) -> torch.Tensor:
    """Uninitialised contiguous memory of the shape and dtype of ``like``.

    Where it is large it comes from the native module, which keeps such blocks (the newest 256 MiB) when their tensors
    die: an output that each step makes again costs page faults the first time only.
    """
    size = like.numel() * like.element_size()
    if size < _LARGE_BYTES:
        return torch.empty(like.shape, dtype=like.dtype, device="cpu")
    # Given its shape in place: autograd adds to a gradient in place only if no view of it holds the memory too.
    return torch.frombuffer(cpu().Buffer(size), dtype=like.dtype).resize_(like.shape)


@functools.cache
def cuda() -> Any:
    """The native CUDA module. Raises ImportError where it was not built."""
    import distilbert_fast._cuda as _cuda

    return _cuda


# The codes by which native entries know a dtype: enum DType of csrc/cpu/rows.h (enum Output of csrc/cpu/gemm.h has int8
# too) and of csrc/cuda/common.cuh.
CPU_FLOATS = (torch.float32, torch.bfloat16)
CPU_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
CUDA_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


def device_and_stream(device: torch.device) -> tuple[int, int]:
    """Where a native CUDA entry queues its work: the device's number and torch's current stream on it."""
    return device.index, torch.cuda.current_stream(device).cuda_stream


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def availability(name: str) -> Availability:
    """Whether a backend can run in this process, and the reason."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "torch":
        return Availability(True, f"torch {torch.__version__}")
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return Availability(False, "the triton package is not installed")
        how = f"triton {importlib.metadata.version('triton')}"
        if interpreted():
            return Availability(True, f"{how}, interpreter")
        without_device = f"{how} is installed"
    else:
        try:
            module = cpu() if name == "cpu" else cuda()
        except ImportError as error:
            return Availability(False, f"the native module is not built ({error})")
        if name == "cpu":
            return Availability(True, f"ISA tier {module.isa()}")
        how, without_device = f"CUDA {torch.version.cuda}", "the native module is built"
    if not torch.cuda.is_available():
        return Availability(False, f"{without_device}, but torch sees no CUDA device")
    return Availability(True, how)


def fingerprint(tensors: Sequence[torch.Tensor], blocks: int) -> Any:
    """Hashes of the bytes of CPU tensors, to learn of writes that torch does not count (csrc/cpu/watch/fingerprint.h).

    Of large tensors a sample compares some ``blocks`` blocks of 128 bytes. Whoever asks it keeps their storages alive.
    """

    def span(tensor: torch.Tensor) -> int:
        """Bytes from the first element to the end of the last one."""
        steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return (steps + 1) * tensor.element_size() if tensor.numel() > 0 else 0

    return cpu().Fingerprint([(tensor.data_ptr(), span(tensor)) for tensor in tensors], blocks)


_locks: weakref.WeakSet[Any] = weakref.WeakSet()


def fork_safe_lock() -> Any:
    """A ``threading.Lock`` that is open in a child process, whoever held it in the parent when that forked."""
    lock = threading.Lock()
    _locks.add(lock)
    return lock


def _open_locks() -> None:
    for lock in list(_locks):
        lock._at_fork_reinit()


os.register_at_fork(after_in_child=_open_locks)


def run_aside(work: Callable[[], T]) -> T:
    """``work()`` on a thread of its own, in the caller's grad and inference mode and on its CUDA stream.

    What runs at load must go through here: OpenMP's threads belong to the thread that first needed them, and end with
    it. Had the caller needed them, a process forked from it later, as servers and data loaders do, would wait for ever
    for the ones that its parent has.
    """
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def run() -> T:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad), torch.cuda.stream(stream):
            return work()

    with concurrent.futures.ThreadPoolExecutor(1, "distilbert_fast") as executor:
        return executor.submit(run).result()


def _named(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise BackendError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_forced: str | None = None  # process-wide, so that autograd's own threads see it too


def forced() -> str | None:
    """The backend that every op must use, from ``backend(...)`` or DISTILBERT_FAST_BACKEND; None = free choice."""
    if _forced is not None:
        return _forced
    # The dict within os.environ, which itself takes a microsecond of every call to raise and catch a KeyError.
    name = posix.environ.get(b"DISTILBERT_FAST_BACKEND")
    return _named(os.fsdecode(name), "DISTILBERT_FAST_BACKEND") if name else None


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Serve every op by one backend inside the ``with`` block, in the whole process.

    Args:
        name: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"torch"``.

    Raises:
        BackendError: unknown name here; at the op, a backend that has no kernel for it or cannot run, with the
            reason.
    """
    global _forced
    previous, _forced = _forced, _named(name, "backend")
    try:
        yield
    finally:
        _forced = previous


def _runs_on(name: str, device: str) -> bool:
    if name == "torch":
        return True
    if name == "triton" and interpreted():
        return device == "cpu"
    return device == ("cpu" if name == "cpu" else "cuda")


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


Unfit = tuple[tuple[str, str], ...]  # backends that cannot serve a call for what else is in it, and why


def _obstacle(op: str, name: str, device: str, dtypes: tuple[str, ...], unfit: Unfit) -> str | None:
    """Why backend ``name`` cannot serve this call; None if it can."""
    if name == "torch":
        return None
    if name not in KERNELS[op]:
        return f"{op} has no {name} kernel"
    state = availability(name)
    if not state.ok:
        return state.reason
    if not _runs_on(name, device):
        return f"it does not take {device} tensors"
    alien = [dtype for dtype in dict.fromkeys(dtypes) if dtype not in KERNELS[op][name]]
    if alien:
        return f"its {op} takes {', '.join(KERNELS[op][name])}, not {', '.join(alien)}"
    return dict(unfit).get(name)


@functools.lru_cache(maxsize=1024)
def _choose(op: str, device: str, dtypes: tuple[torch.dtype, ...], name: str | None, unfit: Unfit = ()) -> str:
    names = tuple(str(dtype)[6:] for dtype in dtypes)
    if name is not None:
        obstacle = _obstacle(op, name, device, names, unfit)
        if obstacle:
            raise BackendError(f"{op}: backend {name!r} was forced but cannot serve: {obstacle}")
        return name
    reasons = []
    for candidate in KERNELS[op]:
        if not _runs_on(candidate, device) or (candidate == "triton" and device == "cpu"):
            continue  # the interpreter serves only who asks for it by name
        obstacle = _obstacle(op, candidate, device, names, unfit)
        if obstacle is None:
            return candidate
        reasons.append(f"{candidate}: {obstacle}")
    if reasons:
        _warn_once(f"{op} on {device} falls back to torch: {'; '.join(reasons)}")
    return "torch"


def select(op: str, device: torch.device, *dtypes: torch.dtype, unfit: Unfit = ()) -> str:
    """The backend that serves ``op`` for tensors of these dtypes on this device and is not ``unfit`` for the call.

    Raises:
        BackendError: a forced backend cannot serve; the message says why.
    """
    name = forced()
    chosen = _choose(op, device.type, dtypes, name, unfit)
    if chosen == "cpu" and name is None and op in FASTER_BY_TORCH_THAN_SCALAR and cpu().scalar_by_default():
        return _choose(op, device.type, dtypes, None, (*unfit, ("cpu", NO_VECTORS)))
    return chosen


def select_backward(op: str, device: torch.device, *dtypes: torch.dtype) -> str:
    """The backend for the gradients of ``op``, by the entry ``<op>_backward`` of KERNELS.

    A forced backend that has only a forward leaves backward to the free choice: what it kept serves any.
    """
    name, backward = forced(), f"{op}_backward"
    forward_only = name in KERNELS[op] and name not in KERNELS[backward]
    return _choose(backward, device.type, dtypes, None if forward_only else name)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def isa_report() -> dict[str, Any]:
    """The CPU tier in use, those this machine has, why each other one cannot be used, and why some ops are torch's."""
    try:
        module = cpu()
    except ImportError as error:
        return {"tier": None, "missing": {"_cpu": str(error)}}
    report = {"tier": module.isa(), "available": module.available_isas(), "missing": dict(module.missing_isas())}
    return report | {"left_to_torch": without_vectors()}


def report() -> dict[str, Any]:
    """What ``distilbert-fast env`` prints: versions, backends, CPU tier, build, and who serves each op."""
    try:
        from distilbert_fast import _build_info

        build = {key: value for key, value in vars(_build_info).items() if not key.startswith("_")}
    except ImportError:
        build = {}
    serves = {}
    for op in KERNELS:
        serves[op] = {"cpu": select(op, torch.device("cpu"), torch.float32)}
        if torch.cuda.is_available():
            serves[op]["cuda"] = select(op, torch.device("cuda"), torch.bfloat16)
    packages = ("distilbert-fast", "torch", "transformers", "accelerate", "datasets", "safetensors", "triton")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {package: _version(package) for package in packages},
        "cpu": {"threads": torch.get_num_threads(), "cores": os.cpu_count(), **isa_report()},
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "backends": {name: availability(name)._asdict() for name in BACKENDS},
        "forced_backend": forced(),
        "ops": serves,
        "build": build,
    }
