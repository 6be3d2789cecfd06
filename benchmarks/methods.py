"""Every method on its small example, five seeds each: what rose, by how much, at what KL, in how many seconds.

    python -m benchmarks.methods --out benchmarks/results/methods.json            those that the file lacks
    python -m benchmarks.methods --out out.json --only dpo --only grpo --seeds 2  some of them

A method is a row of rlhf_fast.algorithms.ALGORITHMS or a file of examples/methods. A row runs the file of its name, or
that of its module with `algorithm` changed. All start from the model and the reward model of
examples/methods/base.yaml, which is trained once, with seed 0. What a method is judged by is its own held-out
evaluation, before and after.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.machine import machine
from rlhf_fast.algorithms import ALGORITHMS
from rlhf_fast.data.reading import read_jsonl

ROOT = Path(__file__).parents[1]
EXAMPLES, RUNS = ROOT / "examples" / "methods", ROOT / "run" / "methods"
BASE = "base"
SEEDS = 5
MEASURES = ("reward", "accuracy", "loss")  # the first that an evaluation has
FALLS = {"loss"}


def methods() -> dict[str, Path]:
    """Method -> its file."""
    files = {path.stem: path for path in sorted(EXAMPLES.glob("*.yaml")) if path.stem != BASE}
    rows = {name: files.get(name, files.get(preset.module)) for name, preset in ALGORITHMS.items()}
    missing = [name for name, path in rows.items() if path is None]
    if missing:
        raise FileNotFoundError(f"no example in {EXAMPLES} for {', '.join(missing)}")
    return {name: path for name, path in rows.items() if path is not None} | files


def run(name: str, path: Path, seed: int) -> dict[str, Any]:
    """One run of a method: its measure before and after, the KL after, and its seconds."""
    from rlhf_fast.algorithms.launch import launch

    torch.set_num_threads(1)
    folder = RUNS / name / str(seed)
    changes: dict[str, Any] = {"output_dir": str(folder), "seed": seed, "report_to": "none"}
    if name in ALGORITHMS and path.stem != name:
        changes["algorithm"] = name
    if "stages" in yaml.safe_load(path.read_text()):
        del changes["report_to"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with (folder.parent / f"{seed}.log").open("w") as log, contextlib.redirect_stdout(log):
        launch(str(path), changes, dry_run=False, resume=None, overwrite=True)
    return {"seed": seed, **judged(folder), "seconds": round(time.perf_counter() - started, 2)}


def judged(folder: Path) -> dict[str, Any]:
    """The first and the last evaluation that have the measure, of all stages in their order."""
    files = sorted(folder.rglob("eval.jsonl"), key=lambda path: path.stat().st_mtime)
    metrics = [row["metrics"] for path in files for row in read_jsonl(path)]
    measure = next(name for name in MEASURES if any(name in row for row in metrics))
    having = [row for row in metrics if measure in row]
    before, after = having[0], having[-1]
    return {"measure": measure, "before": before[measure], "after": after[measure], "kl": after.get("kl")}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Over seeds: means, the mean rise and its standard error."""
    rises = [r["after"] - r["before"] for r in runs]
    spread = statistics.stdev(rises) / len(rises) ** 0.5 if len(rises) > 1 else None
    kls = [r["kl"] for r in runs if r["kl"] is not None]
    return {
        "measure": runs[0]["measure"], "seeds": len(runs), "before": statistics.fmean(r["before"] for r in runs),
        "after": statistics.fmean(r["after"] for r in runs), "rise": statistics.fmean(rises), "rise_se": spread,
        "kl": statistics.fmean(kls) if kls else None, "seconds": statistics.median(r["seconds"] for r in runs),
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """The table of docs/methods.md."""
    lines = ["| method | measure | before | after | change | KL | seconds |", "|---|---|---:|---:|---:|---:|---:|"]
    for name, runs in results["methods"].items():
        s = summary(runs)
        error = "" if s["rise_se"] is None else f" ± {s['rise_se']:.2f}"
        kl = "" if s["kl"] is None else f"{s['kl']:.2f}"
        lines.append(
            f"| `{name}` | {s['measure']} | {s['before']:.2f} | {s['after']:.2f} | {s['rise']:+.2f}{error} | {kl} "
            f"| {s['seconds']:.1f} |"
        )
    where = results["machine"]
    seeds = max(len(runs) for runs in results["methods"].values())
    lines += [
        "", f"Means over up to {seeds} seeds, the change with its standard error; KL to the reference in nats per "
        "completion; median seconds of one run on one thread.", "",
        f"{where['cpu']}, torch {where['torch']}, commit {(where['commit'] or '')[:7]}. Command: `{where['command']}`.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def make_base() -> None:
    """The folder that the examples start from, unless it is there."""
    from rlhf_fast.algorithms.launch import launch

    if not (RUNS / BASE / "teacher" / "summary.json").is_file():
        launch(str(EXAMPLES / f"{BASE}.yaml"), {}, dry_run=False, resume=None, overwrite=True)


def main(words: list[str] | None = None) -> int:
    """The exit status: 1 where a method failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file, which is added to")
    parser.add_argument("--only", action="append", help="a method; again for another; these run anew")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, of one thread each")
    asked = parser.parse_args(words)
    os.chdir(ROOT)  # the examples name their files from there
    there = json.loads(asked.out.read_text()) if asked.out.exists() else {"methods": {}}
    known = methods()
    wanted = asked.only or [name for name in known if name not in there["methods"]]
    make_base()
    results = {"machine": machine("cpu"), "methods": {k: v for k, v in there["methods"].items() if k not in wanted}}
    failed = False
    with ProcessPoolExecutor(asked.jobs, mp_context=get_context("spawn")) as pool:
        # Seed by seed: a run that is cut short has seen every method.
        begun = {pool.submit(run, name, known[name], seed): name for seed in range(asked.seeds) for name in wanted}
        for future in as_completed(begun):
            name = begun[future]
            error = future.exception()
            if error is not None:  # the other methods go on; the exit status tells
                failed = True
                print(f"{name}: {type(error).__name__}: {error}", flush=True)
                continue
            runs = [*results["methods"].get(name, []), future.result()]
            results["methods"][name] = sorted(runs, key=lambda row: row["seed"])
            print(name, results["methods"][name][-1], flush=True)
            ordered = {name: results["methods"][name] for name in known if name in results["methods"]}
            asked.out.parent.mkdir(parents=True, exist_ok=True)
            asked.out.write_text(json.dumps({**results, "methods": ordered}, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
