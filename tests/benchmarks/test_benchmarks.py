"""The benchmarks, on cases so small that only the machinery is tested."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import breakeven, calls, check, measure, plots, profile, report, results, suites, targets, timing
from benchmarks.__main__ import main
from benchmarks.cases import FORWARD, FORWARD_BACKWARD, PASSES, Case, Target, TimeLimit
from benchmarks.inputs import make_inputs
from benchmarks.measure import Meter, one_line
from benchmarks.run import Options, run

TINY = Case("hash", "hash", 48, heads=2, head_dim=16, parameter=3, dtype="float32", implementation="xla")
KEEP = dataclasses.replace(TINY, name="keep", pattern="keep", parameter=0.5)
MOBA = dataclasses.replace(TINY, name="moba", pattern="moba", parameter=8, chosen=2)
BLOCKS = dataclasses.replace(MOBA, name="blocks", pattern="blocks", heads=4, key_heads=2)
IMPOSSIBLE = dataclasses.replace(TINY, name="impossible", implementation="no such one")


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """A case that fails, then one that does not, with a target."""
    if jax.default_backend() != "cpu":
        pytest.skip("its baseline is that of a CPU")
    folder = tmp_path_factory.mktemp("tiny")
    case = dataclasses.replace(TINY, targets={FORWARD: Target(1e-6, 1e6), FORWARD_BACKWARD: Target(1e6)})
    return run(Options(suite="cpu", out=folder, repeats=3), cases=[IMPOSSIBLE, case])


def test_a_run_writes_all_that_is_known(tiny_run):
    record, file = tiny_run
    assert json.loads(file.read_text()) == json.loads(json.dumps(record))
    assert record["format"] == results.FORMAT
    assert record["suite"] == "cpu"
    assert record["left_out"] == []
    needed = {"device", "driver", "jax", "jaxlib", "python", "commit", "dirty", "command", "date"}
    assert needed <= set(record["environment"])
    assert str(file.parent) not in file.read_text()
    row = record["rows"][1]
    assert row["status"] == "ok"
    assert row["case"]["pattern"] == "hash"
    assert 0 < row["density"] < 1
    assert 0 < row["tiles"]["share"] <= 1
    for which in PASSES:
        one = row["passes"][which]
        assert one["check"]["ok"]
        ours, dense = one["times"][calls.OURS], one["times"]["dense"]
        assert one["speedup"] == dense["median_ms"] / ours["median_ms"]
        assert ours["lower_quartile_ms"] <= ours["median_ms"] <= ours["upper_quartile_ms"]
        assert len(ours["samples_ms"]) == 3
        assert one["memory"][calls.OURS]["peak"] > 0
        assert one["compile_s"][calls.OURS] > 0
    assert set(row["passes"][FORWARD_BACKWARD]["check"]["errors"]) == {"output", "dq", "dk", "dv"}


def test_a_failing_case_is_recorded_and_the_run_goes_on(tiny_run):
    record, _ = tiny_run
    row = record["rows"][0]
    assert row["status"] == "failed"
    assert "implementation must be one of" in row["passes"][FORWARD]["times"][calls.OURS]["error"]
    assert row["passes"][FORWARD]["times"]["dense"]["median_ms"] > 0
    assert "implementation must be one of" in report.table(record)


def test_the_table_shows_targets(tiny_run, capsys):
    record, file = tiny_run
    assert main(["table", str(file)]) == 0
    text = capsys.readouterr().out
    assert ">= 1e-06x, aim 1e+06x: met" in text
    assert ">= 1e+06x: MISSED" in text
    assert "1 of 4 targets met" not in text  # the failing case has none
    assert "1 of 2 targets met" in text
    assert record["rows"][1]["passes"][FORWARD]["target"]["reached_aim"] is False


def test_an_interruption_loses_nothing_and_a_time_limit_names_what_is_left_out(tmp_path, monkeypatch):
    def measure(meter, case):
        if case.name == KEEP.name:
            raise KeyboardInterrupt
        return {"name": case.name, "case": case.as_json(), "status": "ok", "passes": {}, "seconds": 0.0}

    monkeypatch.setattr(Meter, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        run(Options(suite="cpu", out=tmp_path), cases=[TINY, KEEP])
    record = results.read(tmp_path / "cpu.json")
    assert [row["name"] for row in record["rows"]] == ["hash"]
    assert record["left_out"] == ["keep"]
    again = lambda meter, case: measure(meter, TINY) | {"name": case.name, "measured": "again"}
    monkeypatch.setattr(Meter, "measure", again)
    record, _ = run(Options(suite="cpu", out=tmp_path, resume=True), cases=[TINY, KEEP])
    first, second = record["rows"]
    assert (first["name"], second["name"], record["left_out"]) == ("hash", "keep", [])
    assert "measured" not in first
    assert first["environment"]["command"] != record["environment"]["command"]
    assert "environment" not in second
    assert f"from earlier runs, of {first['environment']['commit'][:10]}" in report.table(record)
    results.write(tmp_path / "cpu.json", record | {"environment": record["environment"] | {"jax": "0.1"}})
    with pytest.raises(ValueError, match=r"--resume needs the jax of the earlier results, 0\.1"):
        run(Options(suite="cpu", out=tmp_path, resume=True), cases=[TINY, KEEP])
    record, _ = run(Options(suite="cpu", out=tmp_path, time_limit=1e-9), cases=[TINY, KEEP])
    assert record["left_out"] == ["hash", "keep"]
    assert "time limit" in report.table(record)
    _, file = run(Options(suite="cpu", out=tmp_path, only="has"), cases=[TINY, KEEP])
    assert file.name == "cpu-partial.json"


def test_mistakes_in_the_arguments(tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    for argv in (["--only", "nothing", "--suite", "cpu"], ["--repeats", "0"], ["table"], ["plot", "absent.json"]):
        assert main(argv) == 2
    assert main(["table", str(tmp_path / "other.json")]) == 2
    assert capsys.readouterr().err.count("error: ") == 5


@pytest.mark.parametrize("case", [TINY, KEEP, dataclasses.replace(TINY, pattern="window", parameter=5)])
def test_allowed_pairs(case):
    inputs = make_inputs(case, 0)
    pattern = inputs.pattern
    position = np.arange(case.length)
    mask = pattern.query_id[:, :, None] == pattern.key_id[:, None]  # [B, T, S, N]
    mask &= ((position >= pattern.low[:, None]) & (position <= pattern.high[:, None]))[None, ..., None]
    assert pattern.pairs() == mask.sum() > 0
    entries = calls.index(case)(*inputs.extra).stats()["pairs"]  # heads that share an entry appear once
    assert pattern.pairs() == entries.sum() * (case.heads / entries.size)
    start, stop = pattern.ranges()
    np.testing.assert_array_equal((stop - start).sum(-1), mask.sum((1, 2)))


@pytest.mark.parametrize("case", [MOBA, BLOCKS])
def test_allowed_pairs_in_blocks(case):
    inputs = make_inputs(case, 0)
    pattern = inputs.pattern
    assert 0 < measure._tiles(case, inputs)["share"] <= 1
    position = np.arange(case.length)
    chosen = (pattern.blocks[..., None] == position // 8).any(3)  # [B, T, N, S]
    chosen |= (position[:, None] // 8 == position // 8)[None, :, None]
    assert pattern.pairs() == (chosen & (position[:, None] >= position)[None, :, None]).sum()
    assert (pattern.blocks >= 0).sum() == case.heads * 8 * (1 + 4 * 2)  # one block to choose from, then two or more


@pytest.fixture(scope="module", params=[TINY, MOBA, BLOCKS], ids=lambda case: case.name)
def right(request):
    """Inputs with right results: the output, dq, dk and dv."""
    inputs = make_inputs(request.param, 1)
    call = calls.ours(request.param)
    return inputs, jax.jit(call.function(FORWARD_BACKWARD))(*call.arguments(inputs, FORWARD_BACKWARD))


@pytest.mark.parametrize("which", range(4), ids=check.NAMES)
def test_the_spot_check_finds_a_planted_error(right, which):
    inputs, arrays = right
    assert check.spot_check(inputs, arrays)["ok"]
    row = arrays[which][0, 30, -1]
    for planted in (row * 1.01, row.at[3].set(jnp.nan), row.at[3].set(jnp.inf)):
        wrong = list(arrays)
        wrong[which] = wrong[which].at[0, 30, -1].set(planted)
        found = check.spot_check(inputs, wrong)
        assert not found["ok"]
        assert [name for name, error in found["errors"].items() if not error <= found["bound"]] == [check.NAMES[which]]


def test_the_spot_check_wants_zeros_where_there_are_no_keys(right):
    inputs, (output, *_) = right
    pattern = inputs.pattern
    if pattern.blocks is not None:
        return  # every query sees itself
    alone = [t for t in range(TINY.length) if pattern.query_id[0, t, 0] not in pattern.key_id[0, : t + 1, 0]]
    assert alone
    assert not check.spot_check(inputs, [output.at[0, alone[0], 0, 0].set(1e-6)])["ok"]


def row_of(name, milliseconds, speedup, pairs=1.0, density=0.1, **case):
    """A record as a run leaves it."""
    ours = {calls.OURS: {"median_ms": milliseconds}, "dense": {"median_ms": milliseconds * speedup}}
    one = {"status": "ok", "times": ours, "speedup": speedup, "baseline": "dense", "memory": {}}
    one["check"] = {"errors": {"output": 1e-3}, "bound": 1e-2, "ok": True}
    case = dataclasses.replace(TINY, name=name, **case).as_json()
    passes = {which: dict(one) for which in PASSES}
    return {"name": name, "case": case, "status": "ok", "passes": passes, "pairs": pairs, "density": density}


def test_targets_are_met_within_three_percent_and_limits_exactly():
    judged = {}
    for speedup in (3.87, 3.89, 5.0):
        case = dataclasses.replace(TINY, targets={FORWARD: Target(4, 5)})
        rows = [row_of("hash", 1.0, speedup)]
        targets.judge(rows, {"hash": case})
        judged[speedup] = rows[0]["passes"][FORWARD]["target"]
    assert [judged[s]["met"] for s in (3.87, 3.89, 5.0)] == [False, True, True]
    assert [judged[s]["reached_aim"] for s in (3.87, 3.89, 5.0)] == [False, False, True]

    limit = TimeLimit("hash", factor=1.3, per_pair=True, extra_ms=0.1)
    skewed = dataclasses.replace(TINY, name="skewed", targets={FORWARD: limit})
    rows = [row_of("hash", 1.0, 4, pairs=10), row_of("skewed", 2.7, 4, pairs=20)]
    for time, met in ((2.7, True), (2.71, False)):
        rows[1]["passes"][FORWARD]["times"][calls.OURS] = {"median_ms": time}
        targets.judge(rows, {"hash": TINY, "skewed": skewed})
        assert rows[1]["passes"][FORWARD]["target"]["limit_ms"] == pytest.approx(2.7)
        assert rows[1]["passes"][FORWARD]["target"]["met"] is met
    # Nor is what another run measured, which `--resume` took over, compared with.
    targets.judge([{**rows[0], "environment": {"commit": "a"}}, rows[1]], {"hash": TINY, "skewed": skewed})
    assert rows[1]["passes"][FORWARD]["target"]["met"] is None
    targets.judge(rows[1:], {"skewed": skewed})
    assert rows[1]["passes"][FORWARD]["target"]["met"] is None  # the other case was not measured


def test_wrong_results_meet_no_target():
    rows = [row_of("hash", 1.0, 5)]
    rows[0]["passes"][FORWARD]["status"] = "wrong"
    targets.judge(rows, {"hash": dataclasses.replace(TINY, targets={FORWARD: Target(4)})})
    assert rows[0]["passes"][FORWARD]["target"]["met"] is False


def synthetic_results():
    """Three lengths, each at four densities, with a speed-up of 0.5 / density."""
    rows = [
        row_of(
            f"{length}-{density}", length / 100, 0.5 / density, density=density, length=length, parameter=1 / density
        )
        for length in (1024, 2048, 4096)
        for density in (0.0625, 0.25, 0.75, 1.0)
    ]
    environment = {"device": "a device", "jax": "0", "commit": "abc", "dirty": True, "date": "today"}
    return {"format": 1, "suite": "full", "environment": environment, "rows": rows, "left_out": []}


def test_plots_and_break_even(tmp_path, capsys):
    record = synthetic_results()
    curves = breakeven.break_evens(record["rows"])
    assert len(curves) == 6
    assert all(curve.break_even() == pytest.approx(0.5) for curve in curves)
    faster = dataclasses.replace(curves[0], points=tuple((x, 2.0, name) for x, _, name in curves[0].points))
    assert faster.break_even() is None
    assert "faster at all densities" in faster.break_even_text()
    assert "0.50" in report.table(record)

    results.write(tmp_path / "full.json", record)
    assert main(["plot", str(tmp_path / "full.json")]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"full.json", "full-time.png", "full-density.png"}
    assert all((tmp_path / name).stat().st_size > 5000 for name in names - {"full.json"})
    assert plots.plot({**record, "rows": record["rows"][:1]}, tmp_path / "few") == []


def test_suites_are_well_formed():
    for name in ("headline", "blocks", "full", "cpu", "phases"):
        cases = suites.suite(name)
        assert len({case.name for case in cases}) == len(cases)
    headline = {case.name: case for case in suites.headline()}
    assert len(headline) == 14
    assert all(set(case.targets) == set(PASSES) for case in headline.values())
    for case in headline.values():
        for target in case.targets.values():
            assert isinstance(target, Target) or target.of in headline
    assert headline["hash64-64k-1x12x64"].targets[FORWARD_BACKWARD] == Target(21, 32)
    assert headline["hash16-zipf-64k-1x12x64"].targets[FORWARD] == TimeLimit(
        "hash16-64k-1x12x64", factor=1.3, per_pair=True
    )
    sizes = np.bincount(make_inputs(dataclasses.replace(TINY, length=4096, parameter=16, zipf=1.1), 0).extra[0].ravel())
    assert 0.3 < sizes.max() / sizes.sum() < 0.36


def test_functions_take_turns_and_one_that_fails_is_left_behind():
    order = []

    def function(name, x):
        order.append(name)
        if name == "bad" and len(order) > 8:
            raise RuntimeError("out of memory")
        return x

    sets = [(jnp.ones(()),)] * 2
    good, bad = (lambda x, name=name: function(name, x) for name in ("good", "bad"))
    times, errors = timing.take_turns({"good": (good, sets), "bad": (bad, sets)}, samples=4, min_seconds=0)
    assert set(times) == {"good"}
    assert set(errors) == {"bad"}
    assert len(times["good"]["samples_ms"]) == 4
    assert timing.summary([1, 2, 3, 4, 10])["median_ms"] == 3
    assert timing.summary([7.0])["upper_quartile_ms"] == 7


def test_errors_become_one_line_without_paths():
    assert one_line(ValueError("\nno /home/someone/lib/file.py here\nand more")) == "ValueError: no file.py here"


def test_kernels_are_listed():
    times = profile.kernel_times(jax.jit(lambda x: jnp.sort(x @ x)), jnp.ones((64, 64)), calls=3)
    assert times
    assert all(count >= 1 and milliseconds >= 0 for _, count, milliseconds in times)
    assert [ms for *_, ms in times] == sorted((ms for *_, ms in times), reverse=True)
    assert "in all" in profile.listing(times)
    assert profile.short_name("void cub::Sort<cub::Policy<int, (bool)1>, float>(int*, (a b)*)") == "cub::Sort"
    assert profile.short_name("scfa_forward") == "scfa_forward"


def test_gpu_streams_are_told_from_derived_lines():
    def thing(name="", **parts):
        return types.SimpleNamespace(name=name, **parts)

    kernel = thing("void a::kernel<int>(int*)", start_ns=5.0, duration_ns=1000.0)
    lines = [thing("XLA Ops", events=[kernel]), thing("Stream #13(Compute)", events=[kernel, kernel])]
    host = thing("/host:CPU", lines=[thing("python", events=[kernel])])
    seen = list(profile._events(thing(planes=[host, thing("/device:GPU:0", lines=lines)])))
    assert seen == [(5.0, "a::kernel", 1000.0)] * 2
