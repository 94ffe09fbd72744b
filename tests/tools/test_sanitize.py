"""What compute-sanitizer prints is read as it is meant, and what it must watch is what it should be."""

import dataclasses
import json
import stat
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import lowered_for_cuda, number_of_kernels

from scfa_jax.backends.triton import decode
from tools import fuzz, fuzz_program, sanitize
from tools.sanitize import DONE, Findings, faults, parse

CLEAN = f"""========= COMPUTE-SANITIZER
{DONE}
========= ERROR SUMMARY: 0 errors
"""
# In the formats of compute-sanitizer 2022 to 2025.
OVERRUN = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at overrun_kernel+0x110 in kernel.py:12
=========     by thread (31,0,0) in block (0,0,0)
=========     Access at 0x7f89bfa00200 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f89bfa00000 of size 512 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: cuLaunchKernel in python3
=========
========= Invalid __global__ write of size 4 bytes
=========     at 0x3b0 in void other<float>(float*, int)
=========     by thread (0,0,0) in block (1,0,0)
=========     Address 0x964000008 is out of bounds
========= Target application returned an error
========= ERROR SUMMARY: 2 errors
"""
RACES = f"""========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at matmul+0xa70 in kernel.py:98
=========     and Read access at matmul+0xb00 in kernel.py:99 [1,024 hazards]
=========
========= Warning: Race reported between Read access at 0x570 in void softmax(float*)
=========     and Write access at 0x5a0 in void softmax(float*) [32 hazards]
=========
========= Error: Potential WAW hazard detected at __shared__ 0x404 in block (0,0,0) :
=========     Write Thread (23,0,0) at softmax+0x1a0 in kernel.py:32
=========     Write Thread (24,0,0) at softmax+0x1a0 in kernel.py:32
=========     Current Value : 2, Incoming Value : 3
=========
{DONE}
========= RACECHECK SUMMARY: 1,057 hazards displayed (1,025 errors, 32 warnings)
"""


def test_memcheck_is_read():
    assert parse(CLEAN) == Findings(0, {}, True)
    found = parse(OVERRUN)
    assert found.errors == 2
    assert found.reports["Invalid __global__ write of size 4"] == {"overrun_kernel": 1, "void other<float>": 1}
    assert not found.finished


def test_racecheck_is_read():
    assert parse(RACES) == Findings(
        1057,
        {
            "Error: Race reported between Write and Read": {"matmul": 1024},
            "Warning: Race reported between Read and Write": {"void softmax": 32},
            "Error: Potential WAW hazard": {"softmax": 1},
        },
        True,
    )


def test_a_log_that_breaks_off_is_not_clean():
    assert parse(f"{DONE}\n").errors is None
    assert faults({"racecheck": {"plain": parse(f"{DONE}\n")}}) == ["racecheck of plain: the log has no summary"]
    broken = CLEAN.replace(DONE, "Segmentation fault")
    assert faults({"racecheck": {"plain": parse(broken)}}) == [
        "racecheck of plain: the program did not come to its end"
    ]


def test_the_planted_overrun_must_be_seen_and_nothing_else():
    clean, overrun = parse(CLEAN), parse(OVERRUN)
    assert faults({"memcheck": {"overrun": overrun, "plain": clean, "kernels": clean}}) == []
    assert "proves nothing" in faults({"memcheck": {"overrun": clean, "kernels": clean}})[0]
    assert "memcheck of kernels: 2 errors" in faults({"memcheck": {"overrun": overrun, "kernels": overrun}})


def test_hazards_that_a_plain_kernel_has_too_are_explained():
    clean, races = parse(CLEAN), parse(RACES)
    assert faults({"racecheck": {"plain": races, "kernels": races}}) == []
    found = faults({"racecheck": {"plain": clean, "kernels": races}})
    assert len(found) == 3
    assert "'Error: Race reported between Write and Read', which no plain kernel has: 1024 in matmul" in found[0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
def test_plain_kernels_are_what_they_say(dtype):
    x, y = (jnp.asarray(np.random.default_rng(i).normal(size=(64, 64)), dtype) for i in range(2))
    product = np.asarray(x, np.float32) @ np.asarray(y, np.float32)
    np.testing.assert_allclose(sanitize.plain_matmul(x, y, interpret=True), product, atol=1e-4)
    np.testing.assert_allclose(
        sanitize.plain_softmax(x, y, interpret=True), jax.nn.softmax(product, axis=1), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("function", [sanitize.plain_matmul, sanitize.plain_softmax, sanitize.overrun])
def test_what_runs_beside_our_kernels_lowers_for_cuda(function):
    x = jnp.zeros((sanitize.LENGTH,) * (1 if function is sanitize.overrun else 2), jnp.float32)
    assert number_of_kernels(lowered_for_cuda(function, *[x] * (2 - (x.ndim == 1)))) == 1


def test_the_small_cases_are_of_every_operator():
    signatures = sanitize.small_signatures(sanitize.Options().signatures)
    assert {signature.operator for signature in signatures} == set(fuzz.OPERATORS)
    assert {signature.implementation for signature in signatures} == {"triton"}
    assert max(max(signature.shape[1:3]) for signature in signatures) <= 182


def test_decoding_runs_on_caches_almost_empty_and_full_and_on_buckets_of_no_key_and_of_several_tiles():
    options = sanitize.Options()
    signatures = [s for s in sanitize.small_signatures(options.signatures) if s.operator == "decode"]
    assert len(signatures) <= 4
    assert {signature.dtype for signature in signatures} == set(fuzz.DTYPES)
    assert {signature.shape[-1] for signature in signatures} >= {24, 64, 80}
    assert all(signature.shape[3] > signature.shape[4] for signature in sanitize.DECODING)
    cases = [fuzz.draw_case(signature, number) for signature in signatures for number in range(options.cases)]
    room_left = [case.mask.shape[3] - 1 - int(case.pattern["query_offset"]) for case in cases]
    assert min(room_left) == 0
    assert any(case.pattern["query_offset"] <= 1 for case in cases)
    keys = [case.mask.sum(axis=3) for case in cases]
    assert any(np.any(number == 0) for number in keys)
    one_program_each = [number for number in keys if number.size >= decode._PROGRAMS]
    assert max(number.max() for number in one_program_each) > 2 * 64  # so that some visit several tiles


@pytest.mark.parametrize("error", [0, 1e-4])
def test_a_wrong_result_of_decoding_is_a_fault(error, monkeypatch, capsys):
    signature = dataclasses.replace(
        sanitize.DECODING[1], shape=(2, 1, 40, 4, 2, 80, 80), implementation="triton_interpret"
    )
    program = fuzz_program.program(signature)
    monkeypatch.setattr(sanitize, "small_signatures", lambda count: [signature])
    monkeypatch.setattr(fuzz_program, "program", lambda _: lambda case: tuple(x + error for x in program(case)))
    sanitize.run_workload("kernels", 1, cases=2)
    findings = parse(CLEAN.replace(DONE, capsys.readouterr().out))
    assert findings.finished
    found = faults({"memcheck": {"kernels": findings}})
    starts = [f"memcheck of kernels: {signature}, case {number}: output: error " for number in range(2)]
    assert [fault[: len(start)] for fault, start in zip(found, starts, strict=False)] == (starts if error else [])


def test_without_the_sanitizer_it_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert sanitize.main([]) == 2
    assert capsys.readouterr().err == (
        "error: compute-sanitizer is not on PATH: it comes with the CUDA toolkit, in its folder bin or "
        "compute-sanitizer\n"
    )
    assert sanitize.main(["--tools", "synccheck"]) == 2
    assert "--tools takes memcheck and racecheck, got synccheck" in capsys.readouterr().err


def test_the_command_from_beginning_to_end(tmp_path, monkeypatch, capsys):
    """With a program in the sanitizer's place that prints what it would."""
    logs = {"memcheck-overrun": OVERRUN, "racecheck-plain": RACES, "racecheck-kernels": RACES}
    said = json.dumps(logs)
    tool = tmp_path / sanitize.TOOL
    tool.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"assert os.environ['XLA_PYTHON_CLIENT_ALLOCATOR'] == 'cuda_async'\n"
        f"workload = sys.argv[sys.argv.index('workload') + 1]\n"
        f"print(json.loads({said!r}).get(sys.argv[2] + '-' + workload, {CLEAN!r}))\n"
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert sanitize.main(["--out", str(tmp_path)]) == 0
    assert "no fault" in capsys.readouterr().out
    written = json.loads((tmp_path / "sanitize.json").read_text())
    assert written["ok"]
    assert written["runs"]["racecheck"]["kernels"]["errors"] == 1057
    assert (tmp_path / "sanitize" / "memcheck-overrun.txt").read_text().strip() == OVERRUN.strip()
    logs["memcheck-kernels"] = OVERRUN
    tool.write_text(tool.read_text().replace(repr(said), repr(json.dumps(logs))))
    assert sanitize.main(["--out", str(tmp_path), "--tools", "memcheck"]) == 1
    assert "FAULT: memcheck of kernels: 2 errors" in capsys.readouterr().out
