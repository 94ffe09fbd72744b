"""The soak run finds what is planted: wrong results, NaN, other bits, leaks, compilations; and nothing else."""

import gc
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tools import fuzz_program, soak, tolerance
from tools.fuzz import Signature

# In each of their cases most queries have keys.
SIGNATURES = [
    Signature("causal", (2, 9, 12, 2, 2, 4, 4), transform="forward", implementation="xla", broadcast=broadcast)
    for broadcast in (False, True)
]
PASSES = 4


@pytest.fixture(autouse=True, scope="module")
def _what_other_tests_left():
    """Garbage is collected in each pass here, which takes seconds through what the tests before these have compiled."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _two_signatures(monkeypatch):
    monkeypatch.setattr(soak, "drawn_signatures", lambda options: SIGNATURES)


def honest(signature):
    """A program that is right, and compiles nothing of its own."""

    def run(case):
        query, key, value, *given = case.arrays
        want = tolerance.dense_results(query, key, value, case.mask, *given, scale=signature.scale).want
        return tuple(map(np.asarray, want))

    return run


def soaked(spoil=None, **options):
    """What a run finds whose results `spoil(number of the call, results)` changes."""
    calls = itertools.count()

    def make_program(signature):
        run = honest(signature)
        return lambda case: run(case) if spoil is None else spoil(next(calls), run(case))

    return soak.soak(soak.Options(cases=PASSES * len(SIGNATURES), signatures=len(SIGNATURES), **options), make_program)


def test_nothing_is_found_where_nothing_is_wrong():
    found = soaked()
    assert found["ok"]
    assert found["faults"] == []
    assert found["cases"] == 8
    assert found["reruns"] >= 1
    assert found["compilations_after_the_first_pass"] == 0
    assert found["growth_bytes"]["arrays"] == 0
    assert len(found["memory"]) == PASSES


def failing(results):
    raise RuntimeError("planted")


NAN_IN_THE_LAST_ROWS = np.where(np.arange(9)[:, None, None] == 8, np.nan, 1).astype(np.float32)
# By the number of the call; the first are those of compiling, and of the case that is computed twice.
PLANTED = {
    4: ("output: error", lambda r: (r[0] * 1.001, *r[1:])),
    5: ("dquery: error", lambda r: (*r[:2], r[2] + 1, *r[3:])),
    6: ("output: 16 of 144 are not finite", lambda r: (r[0] * NAN_IN_THE_LAST_ROWS, *r[1:])),
    7: ("logsumexp: other rows are empty", lambda r: (r[0], np.where(r[1] == -np.inf, 0, -np.inf), *r[2:])),
    8: (r"output: shape \(1, 9, 2, 4\), not \(2, 9, 2, 4\)", lambda r: tuple(x[:1] for x in r)),
    9: ("RuntimeError: planted", failing),
}


def test_each_wrong_case_is_found_and_can_be_repeated():
    found = soaked(lambda call, r: PLANTED[call][1](r) if call in PLANTED else r)
    assert not found["ok"]
    assert found["faults"] == ["6 of 8 cases failed"]
    for failure, (call, (message, _)) in zip(found["failures"], PLANTED.items(), strict=True):
        assert re.match(message, failure["problems"][0])
        assert failure["repeat"].endswith(f"--signature '{SIGNATURES[(call + 1) % 2]}' --case {(call - 3) // 2}")


def test_other_bits_in_a_second_run_are_found():
    found = soaked(lambda call, r: (r[0] * np.float32(1 + call % 2 * 2**-23), *r[1:]))
    assert {problem for failure in found["failures"] for problem in failure["problems"]} == {
        "a second run gave other bits"
    }


def test_growing_memory_and_late_compilations_are_found():
    """All in one run: arrays on the device, memory of the host, and a new function for each call."""
    kept = []

    def spoil(call, results):
        kept.append((jnp.zeros(1), np.ones(2**23)))  # 64 MiB: pools may give back tens of MiB meanwhile
        return jax.jit(lambda x: x + 0)(results[0]), *results[1:]

    found = soaked(spoil)
    assert found["growth_bytes"]["arrays"] == 5 * 4  # two passes of two cases, one of them twice
    assert found["growth_bytes"]["host"] > found["allowed_growth_bytes"]["host"]
    assert found["compilations_after_the_first_pass"] == 7
    starts = ("7 functions were compiled", "memory grew: 20 bytes (arrays)", "memory grew: ")
    assert [fault[: len(start)] for fault, start in zip(found["faults"], starts, strict=True)] == list(starts)
    assert found["faults"][2].endswith("(host)")


def test_what_the_time_limit_cuts_off_is_a_fault():
    assert "only 0 of 8 cases ran within the time limit" in soaked(time_limit=0.0)["faults"]


def test_the_command_writes_its_findings(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(soak, "drawn_signatures", lambda options: SIGNATURES[1:])
    argv = ["--cases", "2", "--signatures", "1", "--out", str(tmp_path)]
    assert soak.main(argv) == 0
    assert "no fault" in capsys.readouterr().out
    written = json.loads((tmp_path / "soak.json").read_text())
    assert written["ok"]
    assert written["signatures"] == [str(SIGNATURES[1])]
    assert written["environment"]["command"] == " ".join(["python -m tools.soak", *argv])
    for mistake in (["--cases", "3", "--signatures", "5"], ["--signature", "colour=red"]):
        assert soak.main(mistake) == 2
    assert capsys.readouterr().err.count("error: ") == 2


def test_a_case_is_repeated_and_a_wrong_operator_is_found(monkeypatch, capsys):
    """Through the real programs: a factor that is off by one in a thousand."""
    again = ["--signature", str(SIGNATURES[0]), "--case", "1"]
    assert soak.main(again) == 0
    assert "as the reference has it" in capsys.readouterr().out
    attend = fuzz_program.scfa_jax.causal_attention

    def wrong(*arrays, **options):
        output, logsumexp = attend(*arrays, **options)
        return output * 1.001, logsumexp

    monkeypatch.setattr(fuzz_program.scfa_jax, "causal_attention", wrong)
    assert soak.main(again) == 1
    assert capsys.readouterr().out.startswith("FAILED: output: error")
