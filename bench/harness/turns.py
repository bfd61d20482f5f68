"""Turns: A B C A B C ..., each alone on its cores; a disturbed turn is run again; ratios are taken inside a round."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bench.harness.errors import NotAvailableError

TRIES = 4  # of a turn, until nothing disturbs it
OTHERS = 0.04  # of the cores' time, that other processes may use in a turn
TICKS = 3  # that /proc/stat may be wrong by
SLOW_PROBE = 1.15  # times the median of the probes before
FIRST_PROBES = 5  # before which none is called slow


@dataclass(frozen=True)
class Turn:
    seconds: float  # a call
    disturbed: str | None = None  # why, where every try was
    dropped: int = 0  # tries that were dropped


Round = Mapping[str, Turn]


class Contender(Protocol):
    def turn(self) -> tuple[float, float]:
        """Run; seconds a call, and the CPU seconds that its process used."""


class Watch(Protocol):
    def around(self, turn: Callable[[], tuple[float, float]]) -> tuple[float, str | None]:
        """Seconds a call, and what disturbed the turn."""


def hold(
    contenders: Mapping[str, Contender],
    rounds: int,
    watch: Watch,
    failed: Callable[[str, NotAvailableError], None],
    after: Callable[[str], None] = lambda name: None,
) -> list[Round]:
    """Every contender once a round; one that fails is told to `failed` and left out of all rounds."""
    held: list[dict[str, Turn]] = []
    going = dict(contenders)
    for _ in range(rounds):
        turns = {}
        for name, contender in list(going.items()):
            try:
                turns[name] = take(contender, watch)
            except NotAvailableError as error:
                failed(name, error)
                del going[name]
            after(name)
        held.append(turns)
    return [{name: turns[name] for name in going} for turns in held]


def take(contender: Contender, watch: Watch) -> Turn:
    """An undisturbed turn; after TRIES disturbed ones, the fastest of them."""
    tries: list[tuple[float, str | None]] = []
    while len(tries) < TRIES:
        seconds, disturbed = watch.around(contender.turn)
        if disturbed is None:
            return Turn(seconds, None, len(tries))
        tries.append((seconds, disturbed))
    seconds, disturbed = min(tries)
    return Turn(seconds, disturbed, len(tries) - 1)


@dataclass(frozen=True)
class Spread:
    """The median over rounds with its range."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def seconds(rounds: Sequence[Round], name: str) -> Spread:
    return spread([turns[name].seconds for turns in rounds])


def ratio(rounds: Sequence[Round], slow: str, fast: str) -> Spread:
    """How many times as fast `fast` is, inside each round; rounds in which both were undisturbed, if there are any."""
    clean = [turns for turns in rounds if not (turns[slow].disturbed or turns[fast].disturbed)]
    return spread([turns[slow].seconds / turns[fast].seconds for turns in clean or rounds])


class Machine:
    """Looks at the cores: what other processes used of them in a turn, and how fast a small GEMM ran around it."""

    def __init__(self, cores: Sequence[int], threads: int) -> None:
        self.cores, self.threads = cores, threads
        self.tick = 1 / os.sysconf("SC_CLK_TCK")
        self.probes: list[float] = []
        for _ in range(FIRST_PROBES):
            self.probe()

    def around(self, turn: Callable[[], tuple[float, float]]) -> tuple[float, str | None]:
        slow = self.probe()
        busy, own, start = self.busy(), time.process_time(), time.perf_counter()
        seconds, used = turn()
        wall = time.perf_counter() - start
        others = self.busy() - busy - (time.process_time() - own) - used
        slow = self.probe() or slow
        if others > OTHERS * wall * len(self.cores) + TICKS * self.tick:
            return seconds, f"other processes used {others / (wall * len(self.cores)):.0%} of the cores"
        return seconds, slow

    def busy(self) -> float:
        """Seconds that the cores have not idled, those that a hypervisor took included."""
        total = 0
        for line in Path("/proc/stat").read_text().splitlines():
            name, *fields = line.split()
            if name in {f"cpu{core}" for core in self.cores}:
                user, nice, system, _, _, interrupt, soft, steal = map(int, fields[:8])
                total += user + nice + system + interrupt + soft + steal
        return total * self.tick

    def probe(self) -> str | None:
        """What is wrong with the machine's speed."""
        import torch

        x = torch.ones(384, 384)
        timed = []
        for _ in range(7):
            start = time.perf_counter()
            x @ x
            timed.append(time.perf_counter() - start)
        taken = statistics.median(timed)
        usual = statistics.median(self.probes) if len(self.probes) >= FIRST_PROBES else None
        self.probes.append(taken)
        if usual is not None and taken > SLOW_PROBE * usual:
            return f"a GEMM probe took {taken / usual:.2f} times its usual time"
        return None


def pick_cores(threads: int) -> list[int]:
    """Cores that this process may use, one hardware thread of each physical core first."""
    allowed = sorted(os.sched_getaffinity(0))
    if threads > len(allowed):
        raise ValueError(f"--threads: expected at most {len(allowed)}, the cores allowed here, got {threads}")

    def rank(core: int) -> tuple[int, int]:
        siblings = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        first = siblings.read_text().replace("-", ",").split(",")[0] if siblings.exists() else str(core)
        return int(int(first) != core), core

    return sorted(sorted(allowed, key=rank)[:threads])
