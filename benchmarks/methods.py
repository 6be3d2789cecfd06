"""Every method on its small example, five seeds each: what rose, by how much, at what KL, in how many seconds.

    python -m benchmarks.methods --out benchmarks/results/methods.json            the seeds that the file lacks
    python -m benchmarks.methods --out out.json --only dpo --only grpo --seeds 2  of some of them

A method is a row of rlhf_fast.algorithms.ALGORITHMS or a file of examples/methods that no row runs. A row runs the file
of its name, or that of its module with `algorithm` changed. All start from the models of BASES in examples/methods,
which are trained once, with seed 0. What a method is judged by is its own held-out evaluation, before and after.

Every run says its commit and a digest of its settings. Where the settings of a method have changed, its runs with the
old ones go. Whether a change of the code asks for new runs (`--anew`) is for the one who made it to say.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
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
BASES = {"base": "teacher", "lessons": "."}  # file -> its last stage
SEEDS = 5
MEASURES = ("reward", "accuracy", "loss")  # the first that an evaluation has


def methods() -> dict[str, Path]:
    """Method -> its file."""
    files = {path.stem: path for path in sorted(EXAMPLES.glob("*.yaml")) if path.stem not in BASES}
    rows = {name: files.get(name, files.get(preset.module)) for name, preset in ALGORITHMS.items()}
    missing = [name for name, path in rows.items() if path is None]
    if missing:
        raise FileNotFoundError(f"no example in {EXAMPLES} for {', '.join(missing)}")
    used = {name: path for name, path in rows.items() if path is not None}
    return used | {name: path for name, path in files.items() if path not in used.values()}


def settings(name: str, path: Path) -> str:
    """Digest of what a run of the method depends on besides the code: its preset, its file, the files of the models
    that it starts from, and the data and rewards that these name."""
    preset = ALGORITHMS.get(name)
    files = [yaml.safe_load(path.read_text())]
    for base in BASES:
        if base == "base" or f"run/methods/{base}" in path.read_text():
            files.append(yaml.safe_load((EXAMPLES / f"{base}.yaml").read_text()))
    told = json.dumps([preset and [preset.module, dict(preset.defaults)], files], sort_keys=True)
    digest = hashlib.sha256(told.encode())
    for named in sorted(set(re.findall(r"examples/[\w/]+\.\w+", told))):
        digest.update((ROOT / named).read_bytes())
    return digest.hexdigest()[:16]


def kept(results: dict[str, Any], told: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    """Method -> its runs in `results` with the settings `told`."""
    runs = {name: results["methods"].get(name, []) for name in told}
    return {name: [r for r in rows if r["settings"] == told[name]] for name, rows in runs.items()}


def missing(runs: dict[str, list[dict[str, Any]]], seeds: int) -> list[tuple[str, int]]:
    """(method, seed), seed by seed: a session that is cut short has seen every method."""
    there = {(name, r["seed"]) for name, rows in runs.items() for r in rows}
    return [(name, seed) for seed in range(seeds) for name in runs if (name, seed) not in there]


def run(name: str, path: Path, seed: int) -> dict[str, Any]:
    """One run of a method: its measure before and after, the KL after, and its seconds, elapsed and at work."""
    from rlhf_fast.algorithms.launch import launch

    torch.set_num_threads(1)
    folder = RUNS / name / str(seed)
    changes: dict[str, Any] = {"output_dir": str(folder), "seed": seed, "report_to": "none"}
    if name in ALGORITHMS and path.stem != name:
        changes["algorithm"] = name
    if "stages" in yaml.safe_load(path.read_text()):
        del changes["report_to"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    started, worked = time.perf_counter(), time.process_time()
    with (folder.parent / f"{seed}.log").open("w") as log, contextlib.redirect_stdout(log):
        launch(str(path), changes, dry_run=False, resume=None, overwrite=True)
    took = {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - worked}
    return {"seed": seed, **judged(folder), **{name: round(value, 2) for name, value in took.items()}}


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
    seconds = [r.get("processor_seconds", r["seconds"]) for r in runs]
    kls = [r["kl"] for r in runs if r["kl"] is not None]
    return {
        "measure": runs[0]["measure"], "seeds": len(runs), "before": statistics.fmean(r["before"] for r in runs),
        "after": statistics.fmean(r["after"] for r in runs), "rise": statistics.fmean(rises), "rise_se": spread,
        "kl": statistics.fmean(kls) if kls else None, "seconds": min(seconds),
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """The table of docs/methods.md."""
    columns = ["method", "measure", "seeds", "before", "after", "change", "KL", "seconds"]
    lines = [f"| {' | '.join(columns)} |", f"|---|---{'|---:' * (len(columns) - 2)}|"]
    for name, runs in results["methods"].items():
        s = summary(runs)
        change = f"{s['rise']:+.2f}" + ("" if s["rise_se"] is None else f" ± {s['rise_se']:.2f}")
        kl = "" if s["kl"] is None else f"{s['kl']:.2f}"
        means = f"{s['before']:.2f} | {s['after']:.2f} | {change} | {kl} | {s['seconds']:.1f}"
        lines.append(f"| `{name}` | {s['measure']} | {s['seeds']} | {means} |")
    where = results["machine"]
    command = re.sub(r" --(only \S+|jobs \d+|anew)", "", where["command"])
    commits = dict.fromkeys(r["commit"][:7] for runs in results["methods"].values() for r in runs)
    lines += [
        "", "Means over seeds, the change with its standard error; KL to the reference in nats per completion; "
        "seconds of one thread in the fastest run: processor time, or elapsed time where a run says no other.", "",
        f"{where['cpu']}, torch {where['torch']}, commits {', '.join(commits)}. Command: `{command}`.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def make_bases() -> None:
    """The folders that the examples start from, those that are not there."""
    from rlhf_fast.algorithms.launch import launch

    for base, last in BASES.items():
        if not (RUNS / base / last / "summary.json").is_file():
            launch(str(EXAMPLES / f"{base}.yaml"), {}, dry_run=False, resume=None, overwrite=True)


def main(words: list[str] | None = None) -> int:
    """The exit status: 1 where a method failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file, which is added to")
    parser.add_argument("--only", action="append", help="a method; again for another")
    parser.add_argument("--anew", action="store_true", help="of these, also the seeds that the file has")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, of one thread each")
    asked = parser.parse_args(words)
    os.chdir(ROOT)  # the examples name their files from there
    known = methods()
    told = {name: settings(name, path) for name, path in known.items()}
    there = json.loads(asked.out.read_text()) if asked.out.exists() else {"methods": {}}
    runs_of = kept(there, told)
    wanted = asked.only or list(known)
    if asked.anew:
        runs_of |= {name: [] for name in wanted}
    where = machine("cpu")
    commit = f"{where['commit']}{'-dirty' if where['uncommitted_changes'] else ''}"
    begin = missing({name: runs_of[name] for name in wanted}, asked.seeds)
    make_bases()
    failed = False
    with ProcessPoolExecutor(asked.jobs, mp_context=get_context("spawn")) as pool:
        begun = {pool.submit(run, name, known[name], seed): name for name, seed in begin}
        for future in as_completed(begun):
            name = begun[future]
            error = future.exception()
            if error is not None:  # the other methods go on; the exit status tells
                failed = True
                print(f"{name}: {type(error).__name__}: {error}", flush=True)
                continue
            runs_of[name].append({"settings": told[name], "commit": commit, **future.result()})
            runs_of[name].sort(key=lambda r: r["seed"])
            print(name, future.result(), flush=True)
            results = {"machine": where, "methods": {name: runs for name, runs in runs_of.items() if runs}}
            asked.out.parent.mkdir(parents=True, exist_ok=True)
            asked.out.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
