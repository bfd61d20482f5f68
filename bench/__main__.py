"""python -m bench, from a checkout; `distilbert-fast bench` runs it."""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from bench import revisions, suites
from bench.harness.command import RESULTS, checking, console, show, start
from bench.harness.errors import NotAvailableError
from bench.harness.machine import cpu_name, now, versions
from bench.harness.peaks import machine_peaks
from bench.harness.report import write_json
from bench.harness.turns import pick_cores

EPILOG = """\
[bold]Examples[/bold]

Every op beside torch as users write it, torch.compile and others:

    distilbert-fast bench op

The attention in bfloat16 alone, in a minute:

    distilbert-fast bench op -k 'attention and bf16' --rounds 5

Is this checkout slower than main? Both are run in turns, each built from its own sources:

    distilbert-fast bench op -k 'quantize or layer_norm' --base main
"""


def main(
    what: Annotated[str, typer.Argument(metavar="[op|model|step|all]", help="Which suites.")] = "op",
    select: Annotated[str, typer.Option("-k", metavar="EXPRESSION", help="Of these, as pytest selects tests.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contender.")] = 15,
    base: Annotated[
        str | None,
        typer.Option(metavar="REV", help="Compare this checkout with a revision instead of with others' code."),
    ] = None,
    processes: Annotated[int, typer.Option(min=4, help="With --base: of each revision, one after another.")] = 16,
    threads: Annotated[int, typer.Option(min=1, help="Of each process.")] = 2,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The JSON; plots lie beside it.")] = None,
) -> None:
    """Time ops, models and training steps beside others, or beside another revision of this repository.

    A table, the roofline, latencies and a JSON. With --base the verdicts say what differs beyond noise; the exit status
    is 1 where something is slower.
    """
    with checking():
        if what not in suites.SUITES:
            raise ValueError(f"bench: expected {', '.join(suites.SUITES)}, got {what!r}")
        cores = pick_cores(threads)
        if base is not None:
            _revisions(what, select, min(rounds, 9), base, processes, threads, cores, out)
            return
    rows, status = suites.run(what, select, rounds, threads)
    if status == 5:
        with checking():
            raise ValueError(f"-k: no contest of {what} is selected by {select!r}")
    if not rows:
        raise typer.Exit(status or 1)
    measured = machine_peaks(threads)["operations_per_second"]
    path = out or RESULTS / f"bench-{what}.json"
    record = {"command": _command(), **_machine(threads), "peaks": measured, "rows": rows, "status": status}
    write_json(record, path)
    title = f"{cpu_name()}, {threads} threads, {record['date'][:10]}"
    plots = [path.with_name(f"{path.stem}-{name}.png") for name in ("roofline", "latency")]
    suites.plot_roofline(rows, measured, title, plots[0])
    suites.plot_latency(rows, title, plots[1])
    written = ", ".join(str(one) for one in (path, *plots))
    show([suites.table(rows, measured)], written, console())
    raise typer.Exit(status)


def _revisions(
    what: str, select: str, rounds: int, base: str, processes: int, threads: int, cores: list[int], out: Path | None
) -> None:
    say = lambda line: print(line, file=sys.stderr)  # noqa: E731
    given = {"files": suites.SUITES[what], "select": select, "threads": threads, "cores": cores}
    with revisions.checked_out(base, say) as tree:
        try:
            found, left_out = revisions.measure({"base": tree, "this": revisions.ROOT}, given, processes, rounds, say)
        except NotAvailableError as error:
            raise ValueError(f"bench: {error}") from None
    verdicts: dict[str, dict[str, Any]] = {}
    for case, pairs in found.items():
        times = {side: statistics.median(t for pair in pairs for t in pair[side]) for side in ("base", "this")}
        verdicts[case] = {**revisions.verdict(pairs, len(found)), **times}
    path = out or Path(tempfile.gettempdir()) / "bench-base.json"
    record = {"command": _command(), **_machine(threads), "base": base, "verdicts": verdicts, "seconds": found}
    write_json({**record, "left_out": left_out}, path)
    shown: list[Any] = [revisions.table(verdicts, base)]
    shown += [Text(f"left out: {case}: {why}") for case, why in left_out.items()]
    show(shown, str(path), console())
    raise typer.Exit(int(any(one["verdict"] == "slower" for one in verdicts.values())))


def _machine(threads: int) -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "threads": threads,
        "cores": len(os.sched_getaffinity(0)),
        "date": now(),
        "versions": versions(("torch", "transformers", "pytest-benchmark")),
    }


def _command() -> str:
    return " ".join(["python -m bench", *sys.argv[1:]])


if __name__ == "__main__":
    start(main, EPILOG)
