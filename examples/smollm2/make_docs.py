"""Write docs/smollm2.md and its curves from finished runs.

python examples/smollm2/make_docs.py runs/smollm2-ppo runs/smollm2-grpo runs/smollm2-dpo
"""

import argparse
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch
import transformers
import yaml

from rlhf_fast.data.reading import read_jsonl

ROOT = Path(__file__).parents[2]
TITLES = {"ppo": "PPO", "grpo": "GRPO", "dpo": "DPO"}


def cell(metrics: dict[str, float], name: str) -> str:
    return f"{metrics[name]:.3f} ± {metrics[name + '_se']:.3f}"


def quoted(sample: dict) -> str:
    text = " ".join(f"**{sample['prompt']}**{sample['completion']}".split())
    return text.replace("|", "\\|") + f" [{sample['reward']:.2f}]"


def minutes(folder: Path) -> float:
    """From the claimed folder to the written summary: evaluations before and after included, not the imports."""
    return ((folder / "summary.json").stat().st_mtime - (folder / "config.yaml").stat().st_mtime) / 60


def commit_of(folder: Path) -> str:
    """The commit that was checked out when the run started."""
    started = int((folder / "config.yaml").stat().st_mtime)
    command = ["git", "rev-list", "-1", "--abbrev-commit", f"--before={started}", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def section(title: str, folder: Path, before: dict, after: dict) -> list[str]:
    image = f"smollm2_{folder.name.split('-')[-1]}.png"
    shutil.copyfile(folder / "curves.png", ROOT / "docs" / image)
    lines = [f"## {title}", "", f"![curves of the {title} run]({image})", "", "| before | after |", "|---|---|"]
    pairs = zip(before["samples"], after["samples"], strict=True)
    return [*lines, *(f"| {quoted(old)} | {quoted(new)} |" for old, new in pairs), ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    rows, sections = [], []
    for folder in parser.parse_args().runs:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        evaluations = read_jsonl(folder / "eval.jsonl")
        before, after = evaluations[0], evaluations[-1]
        title = TITLES[config["algorithm"]]
        old, new = before["metrics"], after["metrics"]
        rise = new["reward"] - old["reward"]
        steps, took = f"{config['steps']} x {config['batch_size']}", f"{minutes(folder):.1f} min"
        rows.append(
            f"| {title} | {steps} | {cell(old, 'reward')} | {cell(new, 'reward')} | {rise:+.3f} | {cell(new, 'kl')} "
            f"| {took} | {commit_of(folder)} |"
        )
        sections += section(title, folder, before, after)
    page = [
        "# SmolLM2-135M-Instruct learns a kinder tone",
        "",
        "The model continues everyday sentences; the reward is the compound sentiment score of `vaderSentiment`, from "
        "-1 to 1. Adapters of rank 8 on the top 10 of 30 layers, temperature 0.7, 28 new tokens at most. Reward and KL "
        "to the reference (nats per completion, k1 estimate) are means ± standard errors over 64 held-out prompts, "
        "sampled once each before and after; time is the whole run on the machine below, evaluations included.",
        "",
        "| algorithm | steps x sequences | reward before | reward after | rise | KL after | time | commit |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"Machine: {platform.machine()}, {os.cpu_count()} cores, no GPU. torch {torch.__version__}, transformers "
        f"{transformers.__version__}. Commands: `make smollm2`, `make smollm2-grpo`, "
        "`make smollm2-dpo`, then `python examples/smollm2/make_docs.py runs/smollm2-ppo runs/smollm2-grpo "
        "runs/smollm2-dpo`.",
        "",
        "The samples below are the first five held-out prompts, not chosen; the bracket is the reward.",
        "",
        *sections,
    ]
    (ROOT / "docs" / "smollm2.md").write_text("\n".join(page).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
