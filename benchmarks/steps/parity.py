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
ENDED, PAID_LATER = "ppo, ended", "ppo, paid later"
# What a row's setting has apart from the others'. The seeds are ones with which no padding token is sampled.
CHANGES: dict[str, dict[str, Any]] = {
    "ppo": {"seed": 0},  # with so few tokens no completion ends early
    ENDED: {"seed": 7, "max_new_tokens": 6, "paid_at_end": True},
    PAID_LATER: {"seed": 7, "max_new_tokens": 6},
}
# What TRL logs or does otherwise, and what was set on either side so that the rest is the same.
REMAINS = {
    "dpo": "",
    "grpo": "TRL's `loss_type` is `bnpo` here, whose mean over the batch's tokens is ours.",
    "kto": "TRL pairs prompts with other answers in the order of the data, which it must not shuffle; ours in each "
    "batch, here the same ones.",
    "ppo": "TRL logs no gradient norm. It scores a completion that is cut off without an end, here with one as ours.",
    ENDED: "One line of TRL's is changed: it pays at the last token of a completion that ends early too, see below.",
    "reward_model": "",
    "rloo": "Ours is set to `aggregation: seq_mean_token_sum`, TRL's weighting. TRL logs the loss as -ratio x "
    "advantage, which is 0 in the mean; ours is -log-probability x advantage, with the same gradient.",
    "sft": "",
}  # fmt: skip
NOT_COMPARED = {("rloo", "losses")}
PAYMENT = (
    "**Where PPO's score is paid.** Both pay a completion that is cut off at its last token. One that ends early TRL "
    "{trl} pays at the padding behind its end (`sequence_lengths + 1`, reported as "
    "[trl#3750](https://github.com/huggingface/trl/issues/3750)), and trains the critic there too. But the end is the"
    " last action, behind which the episode is over (Ouyang et al. 2022, 2203.02155: a response, then its reward): "
    "the state there is worth 0. In TRL the advantage of the end has lam times the score, and for the rest what the "
    "critic makes of that state. Ours is paid at the end. With `sequence_lengths_p1 = sequence_lengths` in TRL's "
    "source, and nothing else changed, the row of completions that end agrees; with TRL's own line its loss is off by"
    " {loss}. TRL also takes a sampled padding token for the end of a completion, which for us is a token like any "
    "other: the runs of PPO sample none."
)


def algorithm_of(name: str) -> str:
    """That of a row of the table."""
    return name.partition(",")[0]


def setting(name: str) -> Setting:
    """Of a row of the table."""
    values: dict[str, Any] = {
        "model": "tiny", "batch_size": 4, "num_generations": 2, "max_new_tokens": 4, "learning_rate": 5e-4,
        "gradient_checkpointing": False, "seed": 3,
    }  # fmt: skip
    return Setting(algorithm=algorithm_of(name), steps=STEPS, **values | CHANGES.get(name, {}))


def compared(name: str, steps: int = STEPS) -> dict[str, Any]:
    """The largest difference of each series over the steps; None where TRL has none, or another quantity. ended: the
    share of our completions that end by themselves."""
    algorithm = algorithm_of(name)
    with tempfile.TemporaryDirectory() as folder:
        workspace, flags = build(Path(folder), setting(name)).folder, ("--steps", str(steps))
        ours, theirs = (compare.run(workspace, side, algorithm, TRL_1_12, *flags) for side in ("rlhf_fast", "trl"))
    finished = ours["finished"]
    row: dict[str, Any] = {
        "trl": theirs["version"], "steps": steps, "ended": sum(finished) / len(finished) if finished else None
    }  # fmt: skip
    for series in SERIES:
        row[series] = None
        if theirs[series] and (algorithm, series) not in NOT_COMPARED:
            pairs = list(zip(ours[series], theirs[series], strict=True))
            assert len(pairs) == steps, (algorithm, series, pairs)
            row[series] = max(abs(a - b) for a, b in pairs)
    return row


def table(results: dict[str, Any]) -> str:
    """The table of docs/methods.md."""
    lines = [
        "| trainer | TRL | loss | reward | gradient norm | completions that end | what remains |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for name, row in results["rows"].items():
        cells = ["" if row[series] is None else f"{row[series]:.0e}" for series in SERIES]
        cells.append("" if row["ended"] is None else f"{row['ended']:.1%}")
        lines.append(f"| {name.replace(algorithm_of(name), f'`{algorithm_of(name)}`')} | {row['trl']} | "
                     f"{' | '.join(cells)} | {REMAINS[name]} |")  # fmt: skip
    later = results["paid_later"]
    where = results["machine"]
    lines += [
        "", f"The largest difference over the first {STEPS} steps, in float32; losses of on-policy methods are sums of "
        "terms around 1 that nearly cancel, all other values are around 1.", "",
        PAYMENT.format(trl=later["trl"], loss=f"{later['losses']:.0e}"), "",
        f"{where['cpu']}, torch {where['torch']}, commit {(where['commit'] or '')[:7]}. Command: `{where['command']}`.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    rows = {}
    for name in [*sorted([*OWN, ENDED]), PAID_LATER]:
        rows[name] = compared(name)
        print(name, rows[name], flush=True)
    later = rows.pop(PAID_LATER)
    where = machine("cpu") | {"command": " ".join(["python -m benchmarks.steps.parity", *sys.argv[1:]])}
    out.write_text(json.dumps({"machine": where, "rows": rows, "paid_later": later}, indent=1) + "\n")


if __name__ == "__main__":
    main()
