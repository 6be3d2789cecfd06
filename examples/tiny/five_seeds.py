"""Run examples/tiny_rlhf.yaml for five seeds and write docs/tiny.md: does the reward rise far beyond noise?

python examples/tiny/five_seeds.py
"""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

from rlhf_fast.data.reading import read_jsonl

ROOT = Path(__file__).parents[2]
SEEDS = range(5)


def run(seed: int) -> dict:
    """One whole job; the held-out evaluations of its PPO stage before and after, and the minutes it took."""
    folder = ROOT / "runs" / f"tiny-seed-{seed}"
    command = [sys.executable, "-m", "rlhf_fast", "train", "examples/tiny_rlhf.yaml", f"seed={seed}"]
    start = time.perf_counter()
    subprocess.run([*command, f"output_dir={folder}", "--overwrite"], cwd=ROOT, check=True)
    evaluations = read_jsonl(folder / "ppo" / "eval.jsonl")
    minutes = (time.perf_counter() - start) / 60
    return {"seed": seed, "before": evaluations[0], "after": evaluations[-1], "minutes": minutes}


def row(result: dict) -> str:
    before, after = result["before"]["metrics"], result["after"]["metrics"]
    rise = after["reward"] - before["reward"]
    noise = (before["reward_se"] ** 2 + after["reward_se"] ** 2) ** 0.5
    return (
        f"| {result['seed']} | {before['reward']:.2f} ± {before['reward_se']:.2f} "
        f"| {after['reward']:.2f} ± {after['reward_se']:.2f} | {rise:+.2f} | {rise / noise:.1f} "
        f"| {after['kl']:.2f} ± {after['kl_se']:.2f} | {result['minutes']:.1f} min |"
    )


def main() -> None:
    results = [run(seed) for seed in SEEDS]
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    first = results[0]
    pairs = zip(first["before"]["samples"], first["after"]["samples"], strict=True)
    page = [
        "# `make train`, five seeds",
        "",
        "SFT, a reward model and PPO against it on the tiny byte-level model. Reward: the reward model's score on "
        "held-out prompts, mean ± standard error; noise is the standard error of the difference; KL to the reference "
        "in nats per completion; time is that of the whole job.",
        "",
        "| seed | reward before | reward after | rise | rise / noise | KL after | time |",
        "|---|---|---|---|---|---|---|",
        *map(row, results),
        "",
        "Seed 0, the first held-out prompts (reward in brackets):",
        "",
        "| before | after |",
        "|---|---|",
        *(
            f"| {a['prompt']}**{a['completion']}** [{a['reward']:.2f}] | {b['prompt']}**{b['completion']}** "
            f"[{b['reward']:.2f}] |"
            for a, b in pairs
        ),
        "",
        f"Machine: {platform.machine()}, {os.cpu_count()} cores, no GPU; torch {torch.__version__}. Commit {commit}. "
        "Command: `python examples/tiny/five_seeds.py`.",
    ]
    (ROOT / "docs" / "tiny.md").write_text("\n".join(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
