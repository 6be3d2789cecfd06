"""The first steps of every trainer beside TRL's on the same tokens: how far apart losses, rewards and gradients are.

    python -m benchmarks.steps.parity --out benchmarks/results/parity.json

Needs TRL, see benchmarks/steps/__init__.py. The model is the tiny one in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.steps import compare
from benchmarks.steps.__main__ import TRL_1_12
from benchmarks.steps.ours import OWN
from benchmarks.steps.setting import Setting, build

STEPS = 10
SERIES = ("losses", "rewards", "grad_norms")
# What TRL logs or does otherwise, and what was set on either side so that the rest is the same.
REMAINS = {
    "dpo": "",
    "grpo": "TRL's `loss_type` is `bnpo` here, whose mean over the batch's tokens is ours.",
    "kto": "TRL pairs prompts with other answers in the order of the data, which it must not shuffle; ours in each "
    "batch, here the same ones.",
    "ppo": "TRL logs no gradient norm. It scores a completion that is cut off without an end, here with one as ours, "
    "and pays the score of one that ends a token later: the loss differs from the first step on in which one ends.",
    "reward_model": "",
    "rloo": "Ours is set to `aggregation: seq_mean_token_sum`, TRL's weighting. TRL logs the loss as -ratio x "
    "advantage, which is 0 in the mean; ours is -log-probability x advantage, with the same gradient.",
    "sft": "",
}  # fmt: skip
NOT_COMPARED = {("rloo", "losses")}


def setting(algorithm: str, steps: int = STEPS) -> Setting:
    """With this seed and so few tokens no completion ends early, which TRL's PPO pays differently."""
    return Setting(
        algorithm=algorithm, model="tiny", steps=steps, batch_size=4, num_generations=2, max_new_tokens=4,
        learning_rate=5e-4, gradient_checkpointing=False, seed=3,
    )  # fmt: skip


def compared(algorithm: str, steps: int = STEPS) -> dict[str, Any]:
    """The largest difference of each series over the steps; None where TRL has none, or another quantity."""
    with tempfile.TemporaryDirectory() as folder:
        workspace = build(Path(folder), setting(algorithm, steps)).folder
        ours, theirs = (compare.run(workspace, name, algorithm, TRL_1_12) for name in ("rlhf_fast", "trl"))
    row: dict[str, Any] = {"trl": theirs["version"], "steps": steps}
    for series in SERIES:
        row[series] = None
        if theirs[series] and (algorithm, series) not in NOT_COMPARED:
            pairs = list(zip(ours[series], theirs[series], strict=True))
            assert len(pairs) == steps, (algorithm, series, pairs)
            row[series] = max(abs(a - b) for a, b in pairs)
    return row


def table(results: dict[str, Any]) -> str:
    """The table of docs/methods.md."""
    lines = ["| trainer | TRL | loss | reward | gradient norm | what remains |", "|---|---|---:|---:|---:|---|"]
    for name, row in results["rows"].items():
        cells = ["" if row[series] is None else f"{row[series]:.0e}" for series in SERIES]
        lines.append(f"| `{name}` | {row['trl']} | {' | '.join(cells)} | {REMAINS[name]} |")
    where = results["machine"]
    lines += [
        "", f"The largest difference over the first {STEPS} steps, in float32; losses of on-policy methods are sums of "
        "terms around 1 that nearly cancel, all other values are around 1.", "",
        f"{where['cpu']}, torch {where['torch']}, commit {(where['commit'] or '')[:7]}. Command: `{where['command']}`.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    rows = {}
    for algorithm in sorted(OWN):
        rows[algorithm] = compared(algorithm)
        print(algorithm, rows[algorithm], flush=True)
    where = machine("cpu") | {"command": " ".join(["python -m benchmarks.steps.parity", *sys.argv[1:]])}
    out.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
