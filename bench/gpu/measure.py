"""One case: the same work by us, on each backend, and by others; first whether they agree, then how long they take.

On a GPU they take turns (bench/harness/contest.py: CUDA events, flushed caches, medians). Without one each is called
once, on tiny tensors, and only whether they agree is found out.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

import distilbert_fast
from bench.gpu.records import Records, Where
from bench.harness.contest import Contender, contest
from bench.harness.errors import reason
from bench.harness.turns import spread
from distilbert_fast import backends

ROUNDS = 11
OURS = "ours"
Call = Callable[[], Any]


class Work(NamedTuple):
    """The least that must be done: what the limit is made of."""

    operations: float = 0.0
    unit: str = "bf16"  # whose peak rate counts: "bf16" or "int8"
    moved_bytes: float = 0.0


class Case:
    """Contenders for the same results, by name.

    Args:
        op, name: such as "kl_div" and "forward and gradient, 16384 x 30522, bf16".
        work: what any of them must do.
        oracle: whose results count as right.
        tolerance: relative, of the 2-norm of each result.
        reset: untimed, before each call.
        read: makes results comparable, untimed, where contenders give them in different forms.
    """

    def __init__(
        self,
        op: str,
        name: str,
        work: Work,
        oracle: str,
        tolerance: float,
        reset: Call = lambda: None,
        read: Callable[[Any], Any] = lambda results: results,
    ) -> None:
        self.op, self.name, self.work, self.oracle, self.tolerance = op, name, work, oracle, tolerance
        self.reset, self.read = reset, read
        self.calls: dict[str, Call] = {}
        self.missing: dict[str, str] = {}

    def ours(self, where: Where, dtypes: Sequence[torch.dtype], make: Callable[[], Call], suffix: str = "") -> None:
        """Our public function by every backend that serves it here; by torch only if none else does.

        ``make`` makes a call for each, so that what one call keeps is not another backend's.
        """
        chosen = backends.select(self.op, where.device, *dtypes)
        names = [name for name in backends.KERNELS[self.op] if _serves(self.op, name, where, dtypes)] or [chosen]
        for name in sorted(names, key=lambda name: name != chosen):
            self.calls[f"{OURS}, {name}{suffix}"] = _by(name, make())

    def rival(self, where: Where, name: str, make: Callable[[], Call], package: str = "", gpu: bool = True) -> None:
        """Somebody else's way; ``make`` imports what it needs. ``gpu``: it cannot run without one."""
        if package and importlib.util.find_spec(package) is None:
            self.missing[name] = f"{package} is not installed"
            return
        try:
            if package:
                importlib.import_module(package)
            if gpu and not where.gpu:
                self.missing[name] = "needs a CUDA device"
            else:
                self.calls[name] = make()
        except Exception as error:  # whatever is wrong with a rival, the others go on
            self.missing[name] = reason(error)


def run(case: Case, where: Where, records: Records, rounds: int = ROUNDS) -> None:
    """Measure a case and record it: {op, case, work, contenders: {name: {error, median, low, high, …}}, missing}."""
    with records.attempt(f"{case.op}, {case.name}"):
        contenders: dict[str, dict[str, Any]] = {}
        want = _flat(_once(case, case.calls[case.oracle]))
        for name in list(case.calls):
            try:
                found = _flat(_once(case, case.calls[name]))
            except torch.AcceleratorError:
                raise
            except Exception as error:
                case.missing[name] = reason(error)
                continue
            error = max(map(_difference, found, want), default=0.0)
            contenders[name] = {"error": error, "agrees": len(found) == len(want) and error <= case.tolerance}
            del found
        del want
        if where.gpu:
            timed = {name: Contender(case.calls[name], case.reset, int(case.work.moved_bytes)) for name in contenders}
            for name, result in contest(timed, rounds).items():
                contenders[name] |= vars(spread(result.seconds)) | {"peak_bytes": result.peak_bytes}
        records.add(
            "case",
            op=case.op,
            case=case.name,
            work=case.work._asdict(),
            contenders=contenders,
            missing=case.missing,
        )
    case.reset()
    if where.gpu:
        torch.cuda.empty_cache()


def _once(case: Case, call: Call) -> Any:
    case.reset()
    return case.read(call())


def _flat(results: Any) -> list[torch.Tensor]:
    """Results kept while others run: floats rounded to a sample, so that a gigabyte is not held twice."""
    tensors = results if isinstance(results, (tuple, list)) else (results,)
    kept = []
    for tensor in tensors:
        flat = tensor.detach().flatten()
        kept.append(flat[:: max(1, flat.numel() // SAMPLE)].double())
    return kept


SAMPLE = 1 << 20


def _difference(found: torch.Tensor, want: torch.Tensor) -> float:
    if found.shape != want.shape:
        return float("inf")
    return float((found - want).norm() / want.norm().clamp(min=1e-12))


def _serves(op: str, name: str, where: Where, dtypes: Sequence[torch.dtype]) -> bool:
    if backends.interpreted():  # an interpreter is not timed
        return False
    with distilbert_fast.backend(name), contextlib.suppress(distilbert_fast.BackendError):
        backends.select(op, where.device, *dtypes)
        return True
    return False


def _by(name: str, call: Call) -> Call:
    def forced() -> Any:
        with distilbert_fast.backend(name):
            return call()

    return forced


@contextlib.contextmanager
def compiled() -> Iterator[Callable[..., Any]]:
    """torch.compile for one case: what it kept from the last one goes."""
    torch.compiler.reset()
    yield lambda function, **options: torch.compile(function, dynamic=False, **options)
