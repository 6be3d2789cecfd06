"""`make gpu-first` and `make gpu-second` run where there is no network, in seven minutes each, and lose nothing."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_session
from benchmarks.gpu_session import COMMANDS, SECONDS, Phase, Session, outcomes

ROOT = Path(__file__).parents[2]
ABSENT = ("pytest_benchmark", "matplotlib", "trl", "liger_kernel", "transformers", "pydantic", "typer")
PYTHON = sys.executable


def test_the_gpu_tests_and_benchmarks_import_with_torch_and_pytest_alone():
    hide = f"import sys\nfor name in {ABSENT}: sys.modules[name] = None\n"
    imports = "import benchmarks.__main__, benchmarks.roofline, benchmarks.gpu_session, tests.conftest\n"
    imports += "import tests.gpu.test_devices, tests.gpu.test_gradient_in_forward, tests.gpu.test_ops"
    subprocess.run([PYTHON, "-c", hide + imports], cwd=ROOT, check=True)


def test_the_gpu_tests_are_all_in_one_folder():
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "@pytest.mark.gpu" in path.read_text()]
    assert {path.parent.name for path in marked if path.name != "test_gpu_session.py"} == {"gpu"}


def test_both_commands_are_targets_of_the_makefile():
    printed = subprocess.run(["make", "-n", "gpu", "OUT=there"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.findall(r"-m benchmarks.gpu_session (\w+) --out there", printed.stdout) == ["first", "second"]


@pytest.mark.parametrize("which", COMMANDS)
def test_the_limits_of_the_phases_fit_seven_minutes(which, tmp_path):
    assert sum(phase.seconds for phase in COMMANDS[which](tmp_path, "cuda")) < SECONDS <= 420


@pytest.mark.parametrize("which", COMMANDS)
def test_every_module_that_a_phase_runs_is_there(which, tmp_path):
    commands = [phase.command for phase in COMMANDS[which](tmp_path, "cuda")]
    modules = {command[command.index("-m") + 1] for command in commands}
    assert modules <= {"pytest", "benchmarks", "benchmarks.roofline"}
    assert all(importlib.util.find_spec(module) for module in modules)


def chosen(which: str, tests: list[str]) -> set[str]:
    """What pytest's -k takes: words are parts of a test's name."""
    words = re.sub(r"[\w.-]+", lambda m: m[0] if m[0] in ("and", "or", "not") else f"({m[0]!r} in name)", which)
    return {name for name in tests if eval(words, {"name": name})}


def test_the_phases_run_every_gpu_test_of_a_backend_once_and_few_under_the_sanitizer(tmp_path):
    phases = [phase for make in COMMANDS.values() for phase in make(tmp_path, "cuda")]
    collect = [PYTHON, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "tests/gpu"]
    printed = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True).stdout
    tests = [line for line in printed.splitlines() if "::" in line]
    parts = [chosen(phase.command[-1], tests) for phase in phases if "tests" in phase.name]
    everything = chosen("triton or cuda", tests)
    assert set().union(*parts) == everything
    assert sum(map(len, parts)) == len(everything) > 500
    sanitized = chosen(gpu_session.SANITIZED, tests)
    assert 8 <= len(sanitized) <= 16
    assert any("gradient_in_forward" in test for test in sanitized)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "facts.jsonl").read_text().splitlines()]


def test_a_phase_that_fails_or_takes_too_long_ends_alone(tmp_path):
    worker = "import time; time.sleep(60)"
    forever = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {worker!r}])"
    session = Session(tmp_path, 60)
    began = time.perf_counter()
    for phase in (
        Phase("fails", [PYTHON, "-c", "print('said', flush=True); raise SystemExit(3)"], 20),
        Phase("too long", [PYTHON, "-u", "-c", f"{forever}; print('begun', flush=True); time.sleep(60)"], 2),
        Phase("has no tool", ["no-such-profiler", "x"], 5, tool="no-such-profiler"),
        Phase("works", [PYTHON, "-c", "print('done')"], 20),
    ):
        session.run(phase)
    assert time.perf_counter() - began < 30
    assert {line["phase"]: line["status"] for line in lines(tmp_path)} == {
        "fails": 3, "too long": "over its limit", "has no tool": "left out", "works": 0,
    }  # fmt: skip
    log = (tmp_path / "log.txt").read_text()
    assert all(word in log for word in ("said", "begun", "done"))
    assert session.failed


def test_no_phase_begins_when_the_time_is_used_up(tmp_path):
    session = Session(tmp_path, 0)
    session.run(Phase("late", [PYTHON, "-c", ""], 5))
    assert lines(tmp_path)[0]["reason"] == "no time"


def test_what_needs_the_native_module_waits_for_it(tmp_path):
    session = Session(tmp_path, 60)
    built = tmp_path / "built"
    write = f"import pathlib, time; time.sleep(1); pathlib.Path({str(built)!r}).touch()"
    session.build = gpu_session.spawn([PYTHON, "-c", write], {}, session.build_log)
    session.run(Phase("before", [PYTHON, "-c", f"import os; assert not os.path.exists({str(built)!r})"], 20))
    session.run(Phase("after", [PYTHON, "-c", f"import os; assert os.path.exists({str(built)!r})"], 20, built=True))
    assert [(line["phase"], line["status"]) for line in lines(tmp_path)] == [
        ("before", 0), ("native module", 0), ("after", 0),
    ]  # fmt: skip


def test_tests_are_counted_where_a_run_was_cut_short():
    of_workers = (
        "[gw0] [  1%] PASSED tests/gpu/test_ops.py::test_a[x-torch.float32] \n"
        "[gw3] [  2%] FAILED tests/gpu/test_ops.py::test_a[a, b-torch.bfloat16] \n"
        "[gw1] [  2%] SKIPPED tests/gpu/test_ops.py::test_b \n"
    )
    alone = (
        "tests/gpu/test_ops.py::test_c[x y] PASSED                [ 3%]\ntests/gpu/test_ops.py::test_d[x] ERROR [ 4%]\n"
    )
    assert outcomes(of_workers + alone + "tests/gpu/test_ops.py::test_e ") == {
        "passed": 2, "failed": 1, "error": 1, "skipped": 1,
        "which": ["tests/gpu/test_ops.py::test_a[a, b-torch.bfloat16]", "tests/gpu/test_ops.py::test_d[x]"],
    }  # fmt: skip
    assert outcomes("nothing of tests") == {}


def test_a_fact_is_on_the_disk_before_the_next_one_is_measured(tmp_path):
    out = tmp_path / "facts.jsonl"
    command = [PYTHON, "-m", "benchmarks.roofline", "--device", "cpu", "--seconds", "0", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    facts = lines(tmp_path)
    assert set(facts[0]) >= {"device", "copy_bytes_per_second"}
    assert len(facts) > 8
    assert all(line["left_out"] == "no time" for line in facts[1:])
