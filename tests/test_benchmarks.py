import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.harness import Bar, Case, check, described, judged, measure

ROOT = Path(__file__).parents[1]
TIMED = {"token_logprobs", "linear_logprobs", "linear_policy_loss", "policy_loss", "gae"}


def gpu_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def doubling(scale: float) -> Case:
    return Case(
        "double", "4", lambda: {"x": torch.ones(4)}, lambda x, rows: [2 * x["x"][:rows].double()],
        {"eager": lambda x: [2 * x["x"]], "ours": lambda x: [scale * x["x"]]},
    )  # fmt: skip


def test_a_contender_that_is_wrong_is_not_timed():
    with pytest.raises(AssertionError, match="double, ours, result 0"):
        measure(doubling(2.01), "cpu", repeats=1)


def test_contenders_that_are_right_get_one_time_per_repeat():
    check(doubling(2.0))
    result = measure(doubling(2.0), "cpu", repeats=3)
    assert set(result["contenders"]) == {"eager", "ours"}
    assert all(0 < t["min_ms"] <= t["median_ms"] <= t["max_ms"] for t in result["contenders"].values())


def test_a_bar_takes_the_better_of_the_repeats_and_says_what_was_measured():
    faster, slower = Bar("ours", "eager", 2.0), Bar("ours", "products", 1 / 1.08)
    times = {"ours": [5.0, 4.0], "eager": [9.0, 10.0], "products": [3.9, 3.6]}
    assert judged(faster, times)["measured"] == 2.25
    assert described(judged(faster, times)) == "bar kept: 2.25 x as fast as eager, at least 2"
    assert described(judged(slower, times)) == "bar MISSED: 1.111 x the time of products, at most 1.080"
    assert described(judged(Bar("ours", "trl", 4), times)) == "bar: trl is not installed"


def test_peers_are_compared_and_not_judged():
    case = doubling(2.0)
    errors = check(Case(case.name, case.shape, case.draw, case.oracle, case.contenders, {"peer": lambda x: [x["x"]]}))
    assert errors == {"eager": 0.0, "ours": 0.0, "peer": 1.0}


def test_the_gpu_benchmark_runs_the_same_code_on_small_cpu_tensors(tmp_path):
    run = gpu_benchmark("--device", "cpu", "--tiny", "--repeats", "2", "--out", str(tmp_path / "out.json"))
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert {"commit", "cpu", "torch"} <= set(report["machine"])
    assert all(rate > 0 for rate in report["limits"].values())
    assert all({"eager", "cpu"} <= set(case["contenders"]) for case in report["cases"])
    assert {case["case"].split()[0].rstrip(",") for case in report["cases"]} == TIMED


def test_the_dry_run_lists_the_cases_and_writes_nothing(tmp_path):
    run = gpu_benchmark("--dry-run", "--out", str(tmp_path / "out.json"))
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert {line.split()[0].rstrip(",") for line in lines} == TIMED
    assert all("eager, triton" in line for line in lines)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_benchmark_says_in_one_line_that_there_is_no_gpu(tmp_path):
    run = gpu_benchmark("--out", str(tmp_path / "out.json"))
    assert (run.returncode, run.stderr) == (1, "benchmarks.gpu: PyTorch finds no GPU here\n")
