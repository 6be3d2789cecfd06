"""The page of whole steps: a table for each algorithm, where rlhf_fast is worse, and the curves."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.harness import spread
from benchmarks.memory import MIB
from benchmarks.plots import pyplot
from benchmarks.steps.recorder import STAGES

OURS, THEIRS = "rlhf_fast", "trl"
BYTES = {
    "held": "held_bytes", "resident": "resident_bytes", "process peak": "peak_bytes", "tensor peak": "tensor_peak_bytes"
}  # fmt: skip
CURVES = {
    "dpo": "can be equal to rounding: both see the same pairs in the same order.",
    "grpo": "can be equal to rounding until a rounding difference changes a sampled token: before every generation the "
    "random state is set to the number of the step.",
    "ppo": "can be equal to rounding as long as no completion ends early. TRL pays the score one token after the end "
    "and takes a sampled padding token for an end; from the first such completion on they are only alike.",
}
DIFFERENCES = {
    "dpo": "TRL scores the reference of a pair in each step; rlhf_fast scores all pairs before the first.",
    "grpo": "With one update per rollout both score the reference alone, since the policy's old log-probabilities are "
    "those of the update.",
    "ppo": "TRL takes the policy's old log-probabilities from the sampler and holds critic and reward as two more "
    "models (the critic with the same LoRA, the reward's merged); rlhf_fast scores four roles on one.",
}
LEGEND = """rlhf_fast beside TRL on the same model, data, batch, LoRA, optimizer settings and random numbers, each in a
process of its own, in turn. The first step of every repeat warms up and is not timed.

- *generation*: sampling the completions. *scoring*: what is computed of them, or of the pairs, without gradients before
  the update. *update*: the rest of the step. What was scored ahead of the first step is spread over all of them.
- *held*: weights, adapters, heads and optimizer states, unique storages. *resident* and *process peak*: the memory of
  the process between two steps and its high-water mark after the first, above the process that has only imported the
  libraries. *tensor peak*: the most bytes of tensors alive at a time in two steps, beside the weights that were there
  before.
"""


def section(result: dict[str, Any]) -> str:
    setting, machine = result["setting"], result["machine"]
    algorithm, rows = setting["algorithm"], {name: row_of(c) for name, c in result["contenders"].items()}
    sampled = "" if algorithm == "dpo" else f", at most {setting['max_new_tokens']} sampled tokens"
    lines = [
        f"### {algorithm.upper()}", "",
        f"Model `{setting['model']}` in float32, batch of {setting['batch_size']}, {setting['steps']} steps, LoRA rank "
        f"{setting['lora_rank']}{sampled}, activation checkpointing "
        f"{'on' if setting['gradient_checkpointing'] else 'off'}.", "",
        f"| contender | whole step, ms | {' | '.join(STAGES)} | {', MiB | '.join(BYTES)}, MiB |",
        "|---|" + "---:|" * (1 + len(STAGES) + len(BYTES)),
        *(line_of(name, result["contenders"][name]["version"], row) for name, row in rows.items()), "",
        "Times: median (10th to 90th percentile).", "",
    ]  # fmt: skip
    lines += [f"{name} did not run: {reason}.\n" for name, reason in result["absent"].items()]
    if THEIRS in rows:
        same = f"The loss curves {CURVES[algorithm]} {distance(result)}"
        lines += [verdict(rows[OURS], rows[THEIRS]), "", DIFFERENCES[algorithm], "", same, ""]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    changed = " with uncommitted changes" if machine["uncommitted_changes"] else ""
    lines += [
        f"{machine['cpu']}, {machine['threads']} threads; Python {machine['python']}, torch {machine['torch']}, "
        f"{versions}; commit {(machine['commit'] or 'unknown')[:7]}{changed}; `{machine['command']}`.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def row_of(contender: dict[str, Any]) -> dict[str, Any]:
    """The columns of the table: spreads of milliseconds over all timed steps, and bytes as medians of the repeats."""
    steps = [step for repeat in contender["repeats"] for step in repeat["seconds"][1:]]
    row: dict[str, Any] = {"whole step": spread([1e3 * sum(step.values()) for step in steps])}
    row |= {stage: spread([1e3 * step[stage] for step in steps]) for stage in STAGES}
    for column, key in BYTES.items():
        values = [contender[key]] if key in contender else [repeat[key] for repeat in contender["repeats"]]
        row[column] = statistics.median(values)
    return row


def line_of(name: str, version: str, row: dict[str, Any]) -> str:
    times = [row[column] for column in ("whole step", *STAGES)]
    cells = [f"{t['median_ms']:.1f} ({t['p10_ms']:.1f} to {t['p90_ms']:.1f})" if t["max_ms"] else "" for t in times]
    return f"| {name} {version} | {' | '.join(cells)} | {' | '.join(f'{row[c] / MIB:,.1f}' for c in BYTES)} |"


def ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Our figure over theirs in every column where they have one."""

    def ratio(column: str) -> float | None:
        a, b = (row[column]["median_ms"] if isinstance(row[column], dict) else row[column] for row in (ours, theirs))
        return a / b if b else None

    return {column: r for column in ours if (r := ratio(column)) is not None}


def summary(results: list[dict[str, Any]]) -> str:
    """One line per algorithm: our figures over theirs; those above 1 stand out."""
    columns = ("whole step", *STAGES, *BYTES)
    lines = [f"| rlhf_fast / TRL | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for result in results:
        contenders = result["contenders"]
        if THEIRS not in contenders:
            continue
        shares = ratios(row_of(contenders[OURS]), row_of(contenders[THEIRS]))
        cells = {column: f"**{r:.2f}**" if r > 1 else f"{r:.2f}" for column, r in shares.items()}
        title = f"{result['setting']['algorithm'].upper()}, TRL {contenders[THEIRS]['version']}"
        lines.append(f"| {title} | {' | '.join(cells.get(column, '') for column in columns)} |")
    return "\n".join(lines) + "\n"


def verdict(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Our figure over theirs in every column, the worse ones first."""
    shares = ratios(ours, theirs)
    worse = [f"{column} {r:.2f} x" for column, r in shares.items() if r > 1]
    better = [f"{column} {r:.2f} x" for column, r in shares.items() if r <= 1]
    return "\n".join(
        f"- {what}: {', '.join(columns)}."
        for what, columns in (("**rlhf_fast takes more**", worse), ("rlhf_fast takes as much or less", better))
        if columns
    )


def distance(result: dict[str, Any]) -> str:
    """How far apart the losses of the first repeats are."""
    ours, theirs = (result["contenders"][name]["repeats"][0]["losses"] for name in (OURS, THEIRS))
    apart = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    return f"Here they differ by {max(apart):.1e} at most, {apart[0]:.1e} at the first step; loss {ours[0]:.3g} there."


def curves(results: list[dict[str, Any]]) -> Any:
    """One panel for the loss and one for the reward of each algorithm, the contenders on top of each other."""
    panels = []
    for result in results:
        for what, key in (("loss", "losses"), ("mean reward", "rewards")):
            series = {name: c["repeats"][0][key] for name, c in result["contenders"].items()}
            if any(series.values()):
                panels.append((f"{result['setting']['algorithm'].upper()}: {what}", series))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), squeeze=False, layout="constrained")
    styles = {OURS: {"linewidth": 5, "alpha": 0.4}, THEIRS: {"linewidth": 1.5, "linestyle": "--", "color": "black"}}
    for axis, (title, series) in zip(axes[0], panels, strict=True):
        for name, values in series.items():
            axis.plot(range(1, len(values) + 1), values, label=name, **styles[name])
        axis.set(title=title, xlabel="step")
        axis.legend(frameon=False)
    return figure
