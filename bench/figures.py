"""python -m bench.figures: the figures of README and docs, made of bench/results/*.json (`make figures`).

A page holds each between <!-- figure: NAME --> and <!-- /figure -->; what stands there is written again. With --check
nothing is written, and the exit status is 1 where a page differs.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.harness.command import RESULTS, ROOT, start

PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"(<!-- figure: (\S+) -->\n)(.*?)(<!-- /figure -->)", re.DOTALL)
FIGURES: dict[str, Callable[[], str]] = {}

SHAPES = {
    "1x16": "1×16",
    "1x128": "1×128",
    "8x128": "8×128",
    "32x128": "32×128",
    "32x128-ragged": "32 of 16 to 128",
    "8x384": "8×384",
    "1x512": "1×512",
}
NAMES = {
    "distilbert_fast": "distilbert_fast",
    "transformers-sdpa": "transformers sdpa",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "ctranslate2": "CTranslate2",
}


def figure(name: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    def register(make: Callable[[], str]) -> Callable[[], str]:
        FIGURES[name] = make
        return make

    return register


@functools.cache
def record(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def three(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)]) + "\n"


# The encoder beside other engines -------------------------------------------------------------------------------------


def results(name: str) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Of a record of bench.peers: results by engine and workload."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for one in record(name)["results"]:
        found.setdefault(one["engine"], {})[one["workload"]] = one
    return found


def milliseconds(one: Mapping[str, Any]) -> float:
    return 1e3 * one["seconds"]["median"]


def engines(parts: Sequence[tuple[str, Sequence[Sequence[str]]]]) -> str:
    """A row an engine, of several configurations the fastest; the best of a class and shape is bold.

    ``parts`` are records, each with the engines of its rows, which are all of one class if they share a precision.
    """
    rows: list[tuple[str, str, dict[str, float], list[float]]] = []
    for name, of in parts:
        found = results(name)
        for configurations in of:
            measured = [found[engine] for engine in configurations]
            shapes = [shape for shape in SHAPES if any(shape in one for one in measured)]
            times = {shape: min(milliseconds(one[shape]) for one in measured if shape in one) for shape in shapes}
            cosines = [one[shape]["cosine"] for one in measured for shape in one]
            precision = next(iter(measured[0].values()))["precision"]
            rows.append((_title(configurations, precision), precision, times, cosines))
    body = []
    for title, precision, times, cosines in rows:
        cells = []
        for shape in SHAPES:
            best = min((row[2][shape] for row in rows if row[1] == precision and shape in row[2]), default=None)
            shown = three(times[shape]) if shape in times else ""
            cells.append(f"**{shown}**" if shown and times[shape] == best else shown)
        low, high = f"{min(cosines):.5f}", f"{max(cosines):.5f}"
        body.append([title, *cells, low if float(high) - float(low) < 5e-5 else f"{low} to {high}"])
    return markdown(["", *SHAPES.values(), "mean cosine to fp32"], body)


def _title(configurations: Sequence[str], precision: str) -> str:
    engine, _, rest = configurations[0].partition(f"-{precision}")
    nncf = " (NNCF)" if (engine, precision) == ("openvino", "int8") else ""
    shown = f"{NAMES[engine]} {precision}{nncf}"
    shown = f"**{shown}**" if engine == "distilbert_fast" else shown
    return shown + (", calibrated" if rest == "-static" else "") + (", the faster of two" if configurations[1:] else "")


INT8 = (("distilbert_fast-int8",), ("distilbert_fast-int8-static",))


@figure("epyc-engines")
def epyc_engines() -> str:
    int8 = (*INT8, ("openvino-int8", "openvino-int8-fp32"), ("onnxruntime-int8",), ("ctranslate2-int8",))
    others = [
        (f"{engine}-{precision}",)
        for precision, of in (
            ("bf16", ("distilbert_fast", "openvino", "transformers-sdpa")),
            ("fp32", ("distilbert_fast", "openvino", "onnxruntime", "transformers-sdpa")),
        )
        for engine in of
    ]
    return engines([("epyc-avx512_bf16-2-threads", (*int8, *others))])


@figure("xeon-amx-engines")
def xeon_amx_engines() -> str:
    int8 = (*INT8, ("openvino-int8",), ("onnxruntime-int8",), ("ctranslate2-int8",))
    bf16 = (("distilbert_fast-bf16",), ("openvino-bf16",), ("transformers-sdpa-bf16",))
    return engines([("xeon-amx-2-threads-int8", int8), ("xeon-amx-2-threads-bf16", bf16)])


def beside_the_fastest(name: str, columns: Sequence[str], ours: str) -> Iterator[list[str]]:
    """A row a shape: engines, and how many times as fast ours is as the fastest rival, with the range over rounds."""
    found = results(name)
    for one in record(name)["verdicts"]:
        if one["ours"] == ours:
            ratio, shape = one["ratio"], one["workload"]
            cells = [three(milliseconds(found[engine][shape])) for engine in columns]
            said = f"{ratio['median']:.2f}× ({ratio['low']:.2f} to {ratio['high']:.2f})"
            rival = next(NAMES[key] for key in NAMES if one["rival"].startswith(key))
            yield [SHAPES[shape], *cells, rival, said]


@figure("avx2-int8")
def avx2_int8() -> str:
    columns = [*(engine for of in INT8 for engine in of), "onnxruntime-int8", "ctranslate2-int8"]
    head = ["int8, ms", "ours", "calibrated", "ONNX Runtime", "CTranslate2", "the fastest rival", "ours is"]
    return markdown(head, list(beside_the_fastest("xeon-amx-as-avx2-2-threads-int8", columns, INT8[0][0])))


@figure("avx2-float")
def avx2_float() -> str:
    of = ("distilbert_fast", "openvino", "onnxruntime", "ctranslate2", "transformers-sdpa")
    head = ["float32, ms", "ours", *(NAMES[engine] for engine in of[1:]), "the fastest rival", "ours is"]
    name, columns = "xeon-amx-as-avx2-2-threads-float", [f"{engine}-fp32" for engine in of]
    return markdown(head, list(beside_the_fastest(name, columns, columns[0])))


@figure("avx2-int8-emerald-rapids")
def avx2_emerald() -> str:
    columns = [*(engine for of in INT8 for engine in of), "onnxruntime-int8", "ctranslate2-int8"]
    head = ["int8, ms", "ours", "calibrated", "ONNX Runtime", "CTranslate2", "the fastest rival", "ours is"]
    name, found = "xeon-as-avx2-2-threads-int8", results("xeon-as-avx2-2-threads-int8")
    whole = {one["workload"] for one in record(name)["verdicts"]} & set(found[INT8[0][0]])
    rows = beside_the_fastest(name, columns, INT8[0][0])
    return markdown(head, [row for row in rows if row[0] in {SHAPES[shape] for shape in whole}])


def chart(records: Sequence[str], names: Sequence[str], cores: str, bar_ms: int) -> str:
    """A bar for each engine named, of any of the records, the slowest first; a block is ``bar_ms`` milliseconds."""
    found = {engine: of for each in records for engine, of in results(each).items()}
    bars = {}
    for engine in names:
        one = found[engine]["32x128-ragged"]
        title = NAMES[engine.removesuffix(f"-{one['precision']}")].removesuffix(" sdpa")
        bars[f"{title}, {one['precision']}"] = milliseconds(one)
    lines = [f"DistilBERT-base, 32 texts of 16 to 128 tokens, {cores}: milliseconds a batch (less is better)", ""]
    for title, ms in sorted(bars.items(), key=lambda bar: -bar[1]):
        lines.append(f"{title:<26}{ms:>6.0f}  {'█' * max(1, int(ms / bar_ms + 0.5))}")
    return "\n".join(["```text", *lines, "```", ""])


OF_CHARTS = (
    *("transformers-sdpa-bf16", "distilbert_fast-bf16"),
    *("onnxruntime-int8", "ctranslate2-int8", "openvino-int8", "distilbert_fast-int8"),
)


@figure("readme-chart")
def readme_chart() -> str:
    engines = ("transformers-sdpa-fp32", "distilbert_fast-fp32", *OF_CHARTS)
    return chart(["epyc-avx512_bf16-2-threads"], engines, "two cores", 25)


@figure("index-chart")
def index_chart() -> str:
    return chart(["xeon-amx-2-threads-int8", "xeon-amx-2-threads-bf16"], OF_CHARTS, "two cores with AMX", 5)


# A distillation step --------------------------------------------------------------------------------------------------


STEPS = {
    "original-fp32": "original form, fp32",
    "ours-fp32": "**ours, fp32**",
    "ours-fp32-teacher-bf16": "**ours, fp32, teacher in bf16**",
    "ours-fp32-teacher-int8": "**ours, fp32, teacher in int8**",
    "ours-fp32-teacher-cached": "**ours, fp32, teacher's answers read from disk**",
    "original-bf16": "original form, bf16 autocast",
    "ours-bf16": "**ours, bf16 autocast, teacher in bf16**",
    "ours-bf16-teacher-int8": "**ours, bf16 autocast, teacher in int8**",
}


def steps(names: Sequence[str], memory: bool) -> str:
    """A row a way that all records have, by seconds, how many times as fast, and MiB."""
    found = [{one["way"]: one for one in record(name)["ways"]} for name in names]
    shapes = [f"{record(name)['batch']}×{record(name)['length']}" for name in names]
    heads = [(f"s a step, {shape}", "ours is", *(["MiB"] if memory else [])) for shape in shapes]
    body = []
    for way, title in STEPS.items():
        if all(way in one for one in found):
            row = [title]
            for one in found:
                faster, mib = one[way]["faster"], one[way]["peak_mib"]
                row += [f"{one[way]['seconds']['median']:.2f}", f"{faster['median']:.1f}×" if faster else ""]
                row += [f"{mib:.0f}"] if memory else []
            body.append(row)
    return markdown(["", *(cell for head in heads for cell in head)], body)


@figure("epyc-step")
def epyc_step() -> str:
    return steps(["epyc-step-8x128"], memory=False)


@figure("epyc-avx2-step")
def epyc_avx2_step() -> str:
    return steps(["epyc-avx2-step-8x128", "epyc-avx2-step-32x128"], memory=True)


# Whole models beside those of the paper -------------------------------------------------------------------------------


@figure("compare")
def compare() -> str:
    from distilbert_fast.evaluation.comparison_report import notes, rows

    content = record("xeon-amx-compare")
    head, *body = rows(content)
    return markdown(head, body) + "\n" + "\n".join(f"- {note}" for note in notes(content)) + "\n"


@figure("base-slowdown")
def base_slowdown() -> str:
    head = ["", "ms before", "ms now", "change of time", "99 % interval", "verdict"]
    body = []
    for case, one in record("xeon-amx-base-slowdown")["verdicts"].items():
        times = [three(1e3 * one[side]) for side in ("base", "this")]
        interval = f"{one['low']:+.1%} to {one['high']:+.1%}"
        body.append([case.removeprefix("test_"), *times, f"{one['change']:+.1%}", interval, one["verdict"]])
    return markdown(head, body)


# Pages ----------------------------------------------------------------------------------------------------------------


def written(text: str, page: str) -> str:
    """A page with its figures written again. Raises ValueError for one that is not known, or has no end."""

    def again(block: re.Match[str]) -> str:
        begin, name, _, end = block.groups()
        if name not in FIGURES:
            raise ValueError(f"{page}: expected a figure of {', '.join(FIGURES)}, got {name!r}")
        return f"{begin}{FIGURES[name]()}{end}"

    made = BLOCK.sub(again, text)
    if text.count("<!-- figure: ") != len(BLOCK.findall(text)) or text.count("<!-- /figure -->") != len(
        BLOCK.findall(text)
    ):
        raise ValueError(f"{page}: a figure lacks its <!-- /figure -->")
    return made


def main(check: Annotated[bool, typer.Option("--check", help="Write nothing.")] = False) -> None:
    """Write the figures of README and docs again, from what bench/results holds."""
    differ = []
    for page in PAGES:
        path = Path(ROOT / page)
        text = path.read_text()
        try:
            made = written(text, page)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        if made != text:
            differ.append(page)
            if not check:
                path.write_text(made)
    print(f"{'differ from' if check else 'written from'} bench/results: {', '.join(differ) or 'none'}")
    raise typer.Exit(int(check and bool(differ)))


if __name__ == "__main__":
    start(main, "")
