"""One case: the same work by us, on each backend, and by others: whether they agree, and how long they take.

Ours come first and are recorded at once; then the oracle, with which results are compared; then one rival at a time,
made when its turn has come, in turns with the best of ours. A rival that takes all the time that is left, or the
process, takes nothing with it that was found before. On a GPU times are those of bench/harness/contest.py (CUDA events
after a queued sleep, flushed caches, medians). Without one each is called once, on tiny tensors.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from statistics import median
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
        self.calls: dict[str, Call] = {}  # ours, and the oracle
        self.rivals: dict[str, Callable[[], Call]] = {}
        self.missing: dict[str, str] = {}

    def ours(self, where: Where, dtypes: Sequence[torch.dtype], make: Callable[[], Call], suffix: str = "") -> None:
        """Our public function by every backend that serves it here; by torch only if none else does.

        ``make`` makes a call for each, so that what one call keeps is not another backend's.
        """
        chosen = backends.select(self.op, where.device, *dtypes)
        names = [name for name in backends.KERNELS[self.op] if _serves(self.op, name, where, dtypes)] or [chosen]
        if where.compiling:  # native modules may be built at this moment
            names = [name for name in names if name == "triton"]
        for name in sorted(names, key=lambda name: name != chosen):
            self.calls[f"{OURS}, {name}{suffix}"] = _by(name, make())

    def rival(
        self,
        where: Where,
        name: str,
        make: Callable[[], Call],
        package: str = "",
        gpu: bool = True,
        compiled: bool = False,
    ) -> None:
        """Somebody else's way; ``make`` imports what it needs, when its turn has come.

        Args:
            package: without which it cannot be made.
            gpu: it cannot run without one.
            compiled: by torch.compile, which may take most of a minute.
        """
        if name == self.oracle:  # which takes part whoever else does
            self.calls[name] = make()
        if name == self.oracle or where.rivals == "none" or where.compiling:
            return
        if package and importlib.util.find_spec(package) is None:
            self.missing[name] = f"{package} is not installed"
        elif gpu and not where.gpu:
            self.missing[name] = "needs a CUDA device"
        elif compiled and where.rivals == "ready":
            self.missing[name] = "left out: torch.compile would have to make it"
        else:
            self.rivals[name] = make


def run(case: Case, where: Where, records: Records, rounds: int = ROUNDS) -> None:
    """Measure a case and record it: {op, case, work, contenders: {name: {error, median, low, high, …}}, missing}."""
    with records.attempt(f"{case.op}, {case.name}"):
        _Run(case, where, records, rounds)()
    case.reset()
    if where.gpu:
        torch.cuda.empty_cache()


class _Run:
    def __init__(self, case: Case, where: Where, records: Records, rounds: int) -> None:
        self.case, self.where, self.records, self.rounds = case, where, records, rounds
        self.contenders: dict[str, dict[str, Any]] = {}

    def __call__(self) -> None:
        case = self.case
        ours = {name: call for name, call in case.calls.items() if name.startswith(OURS)}
        if self.where.compiling:
            for call in ours.values():
                _once(case, call)
            return
        found = {name: self._first(name, call) for name, call in ours.items()}
        want = self._first(case.oracle, case.calls[case.oracle])
        for name, results in found.items():
            self._compare(name, results, want)
        self._compare(case.oracle, want, want)
        del found
        for name, make in case.rivals.items():
            try:
                call = make()
            except Exception as error:  # whatever is wrong with a rival, the others go on
                case.missing[name] = reason(error)
                continue
            self._compare(name, self._first(name, call), want)
        self._save()

    def _first(self, name: str, call: Call) -> list[torch.Tensor] | None:
        """A contender's results, after it was timed and that was written down; None if it cannot run."""
        case = self.case
        try:
            results = _flat(_once(case, call))
            self.contenders[name] = self._timed(name, call) if self.where.gpu else {}
            self._save()
            return results
        except torch.AcceleratorError:
            raise
        except Exception as error:
            case.missing[name] = reason(error)
            self.contenders.pop(name, None)
            return None

    def _timed(self, name: str, call: Call) -> dict[str, Any]:
        """Times and memory; of others also the median of our best in the same rounds, "beside"."""
        case = self.case
        moved = int(case.work.moved_bytes)
        timed = {name: Contender(call, case.reset, moved)}
        mine = [
            (one["median"], key) for key, one in self.contenders.items() if key.startswith(OURS) and "median" in one
        ]
        best = min(mine)[1] if mine and not name.startswith(OURS) else None
        if best is not None:
            timed[best] = Contender(case.calls[best], case.reset, moved)
        results = contest(timed, self.rounds)
        said = vars(spread(results[name].seconds)) | {"peak_bytes": results[name].peak_bytes}
        if results[name].host_bound:
            said["host_bound"] = True
        return said if best is None else said | {"beside": median(results[best].seconds)}

    def _compare(self, name: str, found: list[torch.Tensor] | None, want: list[torch.Tensor] | None) -> None:
        if found is None or want is None:
            return
        error = max(map(_difference, found, want), default=0.0)
        agrees = len(found) == len(want) and error <= self.case.tolerance
        self.contenders[name] |= {"error": error, "agrees": agrees}
        self._save()

    def _save(self) -> None:
        case = self.case
        self.records.add(
            "case",
            op=case.op,
            case=case.name,
            work=case.work._asdict(),
            contenders=self.contenders,
            missing=case.missing,
        )


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
