"""The suite behind `rlhf_fast bench`: its cases, what it writes, tables, plots and comparisons."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import peers, plots, tables
from benchmarks.__main__ import bench, main, parsed
from benchmarks.cases import GROUPS, Sizes, scaling, selected
from benchmarks.cases.sizes import ragged_rows
from benchmarks.costs import COSTS
from benchmarks.harness import check
from benchmarks.results_file import ResultsError, load, regressions, source
from rlhf_fast import cli
from rlhf_fast.ops import table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TINY = {
    "bars": Sizes(N=24, V=1031, D=32, B=17, T=33, packed=99, dtype=torch.float32),
    "ops": Sizes(N=24, V=131, D=16, B=4, T=33, packed=99, dtype=torch.float32),
    "ragged": Sizes(N=80, V=131, D=16, B=4, T=33, packed=99, dtype=torch.float32),
    "products": Sizes(N=16, V=64, D=16, B=2, T=64, packed=0, dtype=torch.float32),
    "scaling": Sizes(N=16, V=64, D=16, B=2, T=64, packed=0, dtype=torch.float32),
}


def tiny_cases(*groups: str, dtype: torch.dtype = torch.float32):
    """Of our contenders alone."""
    return [
        replace(case, peers={}) for group in groups for case in GROUPS[group](replace(TINY[group], dtype=dtype), "cpu")
    ]


def row(median: float, error: float | None = 0.0, scratch: int = 0) -> dict:
    return {
        "median_ms": median, "min_ms": 0.8 * median, "max_ms": 1.2 * median, "p10_ms": 0.9 * median,
        "p90_ms": 1.1 * median, "max_error": error, "scratch_bytes": scratch,
    }  # fmt: skip


def a_run(**contenders: dict) -> dict:
    """A run of one case of 1,000 bytes and 2,000 FLOPs, of a machine with limits of 1e6 and 1e6 per second."""
    case = {
        "case": "op, forward", "shape": "N=1", "group": "ops", "op": "whiten", "passes": "forward", "sizes": {"N": 1},
        "repeats": 3, "bytes": 1000, "flops": 2000, "scratch": 0, "contenders": contenders, "bars": [], "failed": {},
    }  # fmt: skip
    return {
        "machine": {
            "cpu": "a cpu", "threads": 1, "torch": "2", "commit": "abc", "command": "c", "uncommitted_changes": False
        },
        "peers": {}, "absent": {"verl": "No module named 'verl'"},
        "limits": {"copy_bytes_per_second": 1e6, "float32_flops_per_second": 1e6}, "cases": [case],
    }  # fmt: skip


def test_every_op_has_a_case_of_every_pass():
    cases = selected(["bars", "ops"], "cpu", quick=True)
    timed = {(op, case.passes != "forward") for case in cases for op in case.op.split(" + ") if op}
    asked = {(op, backward) for op in table() for backward in (False, True) if COSTS[op].backward or not backward}
    assert asked - timed == set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", TINY)
def test_every_case_keeps_the_contract(group, dtype):
    for case in tiny_cases(group, dtype=dtype):
        errors, failed = check(case)
        assert set(errors) == {"eager", "cpu"}, case.name
        assert failed == {}


def test_cases_are_told_apart_by_name_and_shape():
    cases = [case for group in GROUPS for case in selected([group], "cpu", quick=True)]
    names = [(case.group, case.name, case.shape) for case in cases]
    assert len(names) == len(set(names))


def test_a_ragged_mask_counts_the_share_that_its_case_says_and_its_cost_leaves_the_rest_out():
    assert ragged_rows(8000, 0.3, "cpu").float().mean().item() == pytest.approx(0.3, abs=1e-3)
    assert ragged_rows(8000, 0.7, "cpu").float().mean().item() == pytest.approx(0.7, abs=1e-3)
    less, more = (
        next(c for c in tiny_cases("ragged") if "trained head" in c.name and share in c.shape) for share in ("30", "70")
    )
    assert less.cost.flops / more.cost.flops == pytest.approx(3 / 7, rel=0.05)


def test_where_eager_does_not_fit_it_is_no_contender_and_still_the_yardstick(monkeypatch):
    monkeypatch.setattr(scaling, "free_bytes", lambda device: 16 * 32 * 16)  # no more than what 32 tokens take
    heads = [case for case in tiny_cases("scaling") if case.op == "linear_logprobs"]
    by_context = [case for case in heads if case.sizes["V"] == 16]
    assert {case.sizes["N"]: "eager" in case.contenders for case in by_context} == {16: True, 32: False, 64: False}
    for case in heads:
        assert set(check(case)[0]) == set(case.contenders)


def test_contexts_and_vocabularies_double():
    heads = [case for case in tiny_cases("scaling") if case.op == "linear_logprobs"]
    assert [case.sizes["N"] for case in heads if case.sizes["V"] == 16] == [16, 32, 64]
    assert [case.sizes["V"] for case in heads if case.sizes["V"] >= 64] == [64, 128, 256, 512]


def test_torch_compile_takes_part_where_it_is_asked_for():
    def others(compiled: bool) -> set[str]:
        return set(selected(["ops"], "cpu", True, "value_loss", compiled)[0].peers)

    assert others(True) - others(False) == {"torch.compile"}


def test_a_peer_that_cannot_be_imported_is_named_with_its_reason(monkeypatch):
    def load():
        raise ImportError("no such library\nand more")

    monkeypatch.setitem(peers.JOBS, "a job", {"nobody": load, "somebody": lambda: len})
    assert peers.find("a job") == {"somebody": len}
    assert peers.absent()["nobody"] == "no such library"
    assert "somebody" not in peers.absent()


def test_the_cases_of_one_peer_are_those_in_which_it_takes_part(monkeypatch):
    monkeypatch.setitem(peers.JOBS, "whiten", {"somebody": lambda: lambda x, mask: x})
    assert [case.name for case in selected(["bars", "ops"], "cpu", quick=True, peer="somebody")] == ["whiten, forward"]


def test_a_peer_that_is_asked_for_and_not_there_is_told_with_its_reason(monkeypatch, tmp_path):
    def load():
        raise ImportError("no such library")

    monkeypatch.setitem(peers.JOBS, "whiten", {"nobody": load})
    with pytest.raises(ResultsError, match="nobody: no such library"):
        bench(parsed(["--quick", "--device", "cpu", "--peer", "nobody", "--out", str(tmp_path / "run.json")]))


def test_a_run_is_written_and_rendered_as_tables_and_plots(tmp_path):
    out = tmp_path / "run.json"
    assert (
        bench(parsed(["--quick", "--device", "cpu", "--case", "whiten, f", "--group", "ops", "--out", str(out)])) == 0
    )
    run = load(out)
    assert {"commit", "cpu", "torch"} <= set(run["machine"])
    assert all(rate > 0 for rate in run["limits"].values())
    case = next(case for case in run["cases"] if case["op"] == "whiten")
    assert (case["bytes"], case["flops"]) == (9 * 8 * 256, 6 * 8 * 256)
    done = parsed(["report", str(out), "--out", str(tmp_path / "report")])
    assert done.run(done) == 0
    page = (tmp_path / "report" / "report.md").read_text()
    assert "| **cpu** |" in page
    for name in ("speed", "memory", "error", "roofline"):
        picture = (tmp_path / "report" / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert source(out).encode() in picture
        assert f"({name}.png)" in page


def test_a_row_has_time_spread_share_of_the_limit_memory_and_error():
    run = a_run(eager=row(40.0, 1e-3), cpu=row(10.0, 2e-7, 3 << 20))
    assert tables.rows(run, run["cases"][0])[1] == (
        "| op, forward, N=1 | **cpu** | 10 | 9 to 11 | 4.00 | 20% | 3.0 | 2.0e-07 |"
    )
    assert "Not there: verl (No module named 'verl')." in tables.page(run, [])


def test_what_another_one_does_better_is_named():
    faster, smaller = row(5.0), row(20.0)
    run = a_run(cpu=row(10.0, 4e-6, 5 << 20), trl=faster, liger=smaller, memcpy=row(1.0, None))
    assert tables.better_elsewhere(run) == [
        "- trl, op, forward, N=1: 2.00 x as fast; 5 MiB less beside its results; error 0.0e+00 against 4.0e-06",
        "- liger, op, forward, N=1: 5 MiB less beside its results; error 0.0e+00 against 4.0e-06",
    ]
    assert tables.better_elsewhere(a_run(cpu=row(10.0), trl=row(10.5))) == ["Nothing in this run."]


def test_what_is_faster_within_the_spread_is_named_as_such_on_the_page_and_not_in_the_readme():
    near = a_run(cpu=row(10.0), trl=row(9.5))
    assert tables.better_elsewhere(near) == ["- trl, op, forward, N=1: 1.05 x as fast (within the spread)"]
    assert tables.faster_elsewhere(near) == []
    clear = a_run(cpu=row(10.0), eager=row(5.0), trl=row(4.0), memcpy=row(1.0, None))
    assert tables.faster_elsewhere(clear) == ["- op, forward, N=1: eager 2.00 x as fast, trl 2.50 x as fast"]


def test_times_over_the_context_are_drawn_in_its_order(tmp_path):
    run = a_run(cpu=row(10.0))
    sizes = [{"N": n, "V": v} for n, v in ((32, 64), (16, 64), (16, 128))]
    run["cases"] = [{**run["cases"][0], "group": "scaling", "sizes": s} for s in sizes]
    assert [c["sizes"]["N"] for c in plots.curves(run["cases"], "context")["op, forward"]] == [16, 32]
    assert [c["sizes"]["V"] for c in plots.curves(run["cases"], "vocabulary")["op, forward"]] == [64, 128]
    assert {path.stem for path in plots.draw(run, tmp_path, "")} == {"scaling_context", "scaling_vocabulary"}


def test_a_time_beyond_the_spread_is_a_regression_and_one_within_it_is_none():
    old = a_run(eager=row(40.0), cpu=row(10.0))
    slower, lines = regressions(a_run(eager=row(20.0), cpu=row(15.0)), old)
    assert slower
    assert lines[0].startswith("faster: op, forward, N=1, eager: 0.50 x the time")
    assert lines[1] == "SLOWER: op, forward, N=1, cpu: 1.50 x the time, 10 -> 15 ms"
    assert regressions(a_run(eager=row(41.0), cpu=row(11.0)), old)[0] is False
    assert regressions(a_run(eager=row(99.0), cpu=row(10.0)), old)[0] is False  # eager's slowness is not ours


def test_runs_of_different_machines_are_not_compared():
    other = a_run(cpu=row(1.0))
    other["machine"]["threads"] = 64
    with pytest.raises(ResultsError, match=r"'threads': 1.*'threads': 64"):
        regressions(other, a_run(cpu=row(1.0)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no such file"),
        ("{", "not JSON"),
        ('{"rows": []}', "not results"),
        (json.dumps({"machine": {}, "limits": {}, "cases": [{"case": "gae", "contenders": {}}]}), "measure it again"),
    ],
)
def test_a_file_that_is_no_run_is_refused_in_one_line(text, words, tmp_path, monkeypatch, capsys):
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "report", str(path), "--out", str(tmp_path / "report")])
    with pytest.raises(SystemExit) as stopped:
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert (stopped.value.code, words in line) == (2, True), line


def test_the_command_of_the_package_runs_the_suite_of_the_repository(tmp_path):
    command = [
        sys.executable,
        "-m",
        "rlhf_fast",
        "bench",
        "--dry-run",
        "--quick",
        "--device",
        "cpu",
        "--group",
        "bars",
        "--case",
        "gae pack",
    ]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "gae packed, 512 steps float32: eager, cpu\n"), run.stderr


def test_without_the_repository_the_command_says_so_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "rlhf_fast" / "cli.py"))
    run = CliRunner().invoke(cli.app, ["bench", "--quick"])
    assert (run.exit_code, run.stdout) == (2, "")
    assert run.stderr.splitlines() == [
        "error: the benchmarks are not part of the package: run this from a clone, with pip install -e ."
    ]


def test_pytest_runs_the_micro_cases():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "--benchmark-only",
        "-q",
        "-k",
        "shaped_rewards",
        "-p",
        "no:xdist",
    ]
    short = ["--benchmark-max-time=0.001", "--benchmark-min-rounds=1", "--benchmark-disable-gc"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    run = subprocess.run([*command, *short], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout
    assert "2 passed" in run.stdout
