import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import clock, machine
from benchmarks.cases import advantages, head, sizes
from benchmarks.cases.build import forward
from benchmarks.cases.sizes import Sizes, with_gradient
from benchmarks.costs import PASSES, Work, evaluated, floor_seconds, work
from benchmarks.harness import Bar, Case, best_of, check, described, enough, judged, measure, print_result, spread
from benchmarks.roofline import Fact, measured
from rlhf_fast.testing.memory import peak_bytes

ROOT = Path(__file__).parents[2]
TIMED = {"token_logprobs", "linear_logprobs", "linear_policy_loss", "policy_loss", "gae"}


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True)


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
    assert all(0 < t["min_ms"] <= t["p10_ms"] <= t["median_ms"] <= t["p90_ms"] for t in result["contenders"].values())


def test_a_bar_takes_the_better_of_the_repeats_and_says_what_was_measured():
    faster, slower = Bar("ours", "eager", 2.0), Bar("ours", "products", 1 / 1.08)
    times = {"ours": [5.0, 4.0], "eager": [9.0, 10.0], "products": [3.9, 3.6]}
    assert judged(faster, times)["measured"] == 2.25
    assert described(judged(faster, times)) == "bar kept: 2.25 x as fast as eager, at least 2"
    assert described(judged(slower, times)) == "bar MISSED: 1.111 x the time of products, at most 1.080"
    assert described(judged(Bar("ours", "trl", 4), times)) == "bar: trl is not there"


def test_peers_are_compared_and_not_judged():
    case = doubling(2.0)
    errors, _ = check(replace(case, peers={"peer": lambda x: [x["x"]]}))
    assert errors == {"eager": 0.0, "ours": 0.0, "peer": 1.0}


@pytest.mark.parametrize("kind", [RuntimeError, ImportError])
def test_a_peer_that_cannot_run_is_named_with_its_reason_and_the_others_are_timed(kind):
    def breaks(inputs):
        raise kind("no memory\nand more lines")

    result = measure(replace(doubling(2.0), peers={"peer": breaks}), "cpu", repeats=1)
    assert result["failed"] == {"peer": f"{kind.__name__}: no memory"}
    assert set(result["contenders"]) == {"eager", "ours"}


def test_where_eager_does_not_fit_its_first_rows_are_the_yardstick():
    case = doubling(2.0)
    whole = replace(case, contenders={"ours": case.contenders["ours"]}, yardstick=case.contenders["eager"])
    assert check(whole) == ({"ours": 0.0}, {})
    with pytest.raises(AssertionError, match="double, ours"):
        check(replace(whole, contenders={"ours": lambda x: [3 * x["x"]]}))


@pytest.mark.parametrize(
    ("done", "repeats", "seconds", "answer"),
    [
        (15, 15, 10, True),
        (15, 15, 0.1, False),  # short: more of them
        (198, 15, 0.1, True),
        (14, 15, 9, False),
        (5, 15, 11, True),  # long: a few must do
        (4, 15, 999, False),
        (3, 3, 0.1, True),  # a trial
    ],
)
def test_short_cases_get_two_seconds_and_long_ones_a_budget(done, repeats, seconds, answer):
    assert enough(done, repeats, seconds, budget=10) is answer


def test_a_case_is_drawn_once_and_everybody_gets_inputs_of_their_own():
    drawn, seen = [], []

    def draw():
        drawn.append(torch.ones(4))
        return {"x": drawn[-1]}

    def overwriting(inputs):
        seen.append(inputs["x"].data_ptr())
        return [inputs["x"].mul_(2)]

    case = doubling(2.0)
    measure(replace(case, draw=draw, peers={"peer": overwriting}), "cpu", repeats=1)
    assert len(drawn) == 1
    assert torch.equal(drawn[0], torch.ones(4))
    assert drawn[0].data_ptr() not in seen


def test_the_spread_is_that_of_the_repeats():
    assert spread([float(t) for t in range(101)]) == {
        "median_ms": 50, "min_ms": 0, "max_ms": 100, "p10_ms": 10, "p90_ms": 90,
    }  # fmt: skip
    assert set(spread([3.0]).values()) == {3.0}


def test_results_of_the_last_run_are_no_uncommitted_change_and_code_is(monkeypatch, tmp_path):
    def git(*arguments):
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *author, *arguments], cwd=tmp_path, check=True, capture_output=True)

    code, result = tmp_path / "csrc" / "gae.cpp", tmp_path / "benchmarks" / "results" / "cpu.json"
    for path in (code, result):
        path.parent.mkdir(parents=True)
        path.write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    result.write_text("2")
    assert machine.machine("cpu")["uncommitted_changes"] is False
    code.write_text("2")
    assert machine.machine("cpu")["uncommitted_changes"] is True


def test_costs_are_the_sums_that_their_text_says():
    assert evaluated("2 Ns + 9 N", {"N": 10, "s": 4}) == 170
    assert evaluated("P + 2 NDR", {"N": 2, "D": 3, "V": 5, "R": 7}) == 2 * 2 * 3 * 5 + 2 * 2 * 3 * 7
    with pytest.raises(KeyError, match="V"):
        evaluated("10 NV", {"N": 10})


def test_passes_add_up():
    sizes = {"N": 2, "D": 3, "V": 5, "s": 4}
    one = 2 * 2 * 3 * 5
    assert [work("linear_logprobs", passes, sizes).flops for passes in PASSES] == [one, 2 * one, 3 * one]
    n = {"N": 10, "s": 4}
    assert work("gae + whiten", "forward", n).bytes == work("gae", "forward", n).bytes + 10 * 4 + 50


def test_the_floor_is_the_longer_of_bytes_and_flops():
    limits = {"copy_bytes_per_second": 10.0, "float32_flops_per_second": 100.0}
    assert floor_seconds(Work(flops=100, bytes=50), limits) == 5
    assert floor_seconds(Work(flops=1000, bytes=50), limits) == 10


def test_the_dry_run_lists_the_cases_of_a_gpu_without_one_and_writes_nothing(tmp_path):
    out = str(tmp_path / "out.json")
    run = benchmark("--device", "cuda", "--group", "bars", "--dry-run", "--out", out)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert {line.split()[0].rstrip(",") for line in lines} == TIMED
    assert all("eager, triton" in line for line in lines)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("rest", [["--out", "out.json"], ["--group", "scaling", "--dry-run"]], ids=["run", "scaling"])
def test_without_a_gpu_one_line_says_so(rest):
    run = benchmark("--device", "cuda", *rest)
    assert (run.returncode, run.stderr) == (2, "benchmarks: PyTorch finds no GPU here\n")


def test_without_git_results_have_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    info = machine.machine("cpu")
    assert info["commit"] is None
    assert info["uncommitted_changes"] is None


def test_outside_a_checkout_results_have_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.machine("cpu")["commit"] is None


# --- The clock of a GPU ----------------------------------------------------------------------------------------------


class Gpu:
    """A stream that works off what is queued: `now` is the host's time in ms, `busy` when the stream is through."""

    def __init__(self, monkeypatch):
        self.now = self.busy = 0.0
        self.runs = 0
        for name in ("synchronize", "_sleep", "Event"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def synchronize(self):
        self.now = max(self.now, self.busy)

    def _sleep(self, cycles):
        self.work(cycles / clock.CYCLES_PER_MS)

    def work(self, milliseconds, launch=0.0):
        """A launch that the host takes `launch` ms to make."""
        self.now += launch
        self.busy = max(self.now, self.busy) + milliseconds

    def Event(self, enable_timing):
        gpu = self

        class Event:
            def record(self):
                self.at = max(gpu.now, gpu.busy)

            def query(self):
                return self.at <= gpu.now

            def synchronize(self):
                gpu.now = max(gpu.now, self.at)

            def elapsed_time(self, other):
                return other.at - self.at

        return Event()


def test_a_gpu_is_timed_without_the_time_of_the_launches(monkeypatch):
    gpu, watch = Gpu(monkeypatch), clock.GpuClock()

    def run():  # 200 kernels of 1 us, each of which the host takes 20 us to launch
        for _ in range(200):
            gpu.work(0.001, launch=0.02)

    assert [watch.time(run) for _ in range(3)] == pytest.approx([0.2] * 3)
    assert watch.remarks() == {}


def test_a_run_that_waits_for_the_gpu_says_that_its_times_hold_the_host_s(monkeypatch):
    gpu, watch = Gpu(monkeypatch), clock.GpuClock()

    def run():
        gpu.work(0.1, launch=0.02)
        gpu.synchronize()
        gpu.work(0.1, launch=0.3)

    assert watch.time(run) == pytest.approx(0.52)
    assert watch.remarks() == {"host_bound": True}


# --- Float64 in parts, and loops of which a part is timed ------------------------------------------------------------

SMALL = Sizes(N=64, V=101, D=16, B=8, T=8, packed=256, dtype=torch.float64)


@pytest.mark.parametrize("name", ["linear_logprobs", "linear_policy_loss", "linear_kl", "linear_preference_loss"])
def test_oracles_in_row_chunks_are_those_of_all_rows(name, monkeypatch):
    jobs = [job for job in head.hidden_jobs(SMALL, "cpu") if job.op == name]
    for job in jobs:
        gradients = []
        for rows in (10, 1000):
            monkeypatch.setattr(sizes, "ORACLE_ROWS", rows)
            gradients.append(with_gradient(job.exact, "hidden", "weight")(job.draw()))
        for chunked, whole in zip(*gradients, strict=True):
            torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12)


def test_an_oracle_never_holds_all_logits(monkeypatch):
    monkeypatch.setattr(sizes, "ORACLE_ROWS", 32)
    drawn = head.draw_samples(Sizes(N=1024, V=2048, D=8, B=8, T=8, packed=0, dtype=torch.float64), "cpu")
    run = with_gradient(head.exact_policy_loss, "hidden", "weight")
    assert peak_bytes(lambda: run(drawn)) < 1024 * 2048 * 8 / 2


def test_a_long_loop_is_timed_in_part_and_the_result_says_so(monkeypatch, capsys):
    monkeypatch.setattr(advantages, "LOOPED", 20)
    case = forward(advantages.packed_gae(SMALL, "cpu"), "cpu")
    result = measure(case, "cpu", repeats=1)
    share = result["contenders"]["eager"]["timed_share"]
    done = case.contenders["eager"](case.draw())[0].shape[0]
    assert share == done / SMALL.packed
    assert 20 <= done < SMALL.packed
    assert "timed_share" not in result["contenders"]["cpu"]
    print_result(result, case)
    assert f"{share:.2%} of it timed" in capsys.readouterr().out


def test_the_time_of_a_part_is_scaled_to_the_whole():
    case = replace(doubling(2.0), timed_share={"eager": lambda drawn: 1e-6})
    times = measure(case, "cpu", repeats=3)["contenders"]
    assert times["eager"]["min_ms"] > 1000 * times["ours"]["min_ms"]
    assert not math.isnan(times["eager"]["median_ms"])


def test_a_limit_is_timed_after_load():
    began = []
    best_of(lambda: began.append(time.perf_counter()), "cpu", 0.05)
    assert sum(start > began[0] + 0.05 for start in began) >= 20
    assert sum(start <= began[0] + 0.05 for start in began) > 20


def test_a_product_faster_than_the_limit_raises_it():
    best = {"copy_bytes_per_second": 1e12, "float32_flops_per_second": 1.0}
    product = Fact("product", lambda: lambda: None, Work(flops=10**9))
    assert measured(product, "cpu", best)["of the limit"] == 1
    assert best["float32_flops_per_second"] > 1e9
