"""What a run shows at its end: curves as a PNG and a before/after table."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_fast.data.reading import read_jsonl
from rlhf_fast.errors import UserError, first_line, refusing
from rlhf_fast.training import reward_report
from rlhf_fast.training.files import replaced

PANELS = {
    "reward": ("reward",),
    "KL to the reference, nats per completion": ("kl",),
    "loss": ("loss", "policy_loss", "value_loss"),
    "accuracy": ("accuracy",),
    "entropy, nats per token": ("entropy",),
    "completion length, tokens": ("completion_length",),
}


def plot_curves(folder: Path) -> Path | None:
    """Write curves.png from metrics.jsonl; None when no step was logged."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_jsonl(folder / "metrics.jsonl")
    panels = {title: [n for n in names if any(n in row for row in rows)] for title, names in PANELS.items()}
    panels = {title: names for title, names in panels.items() if names}
    if not panels:
        return None
    columns = min(2, len(panels))
    height = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(height, columns, figsize=(5 * columns, 3 * height), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=False):
        for name in names:
            told = [row for row in rows if name in row]  # a step without a pair has no loss
            axis.plot([row["step"] for row in told], [row[name] for row in told], label=name)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8)
    figure.tight_layout()
    with replaced(folder / "curves.png") as path:
        figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return folder / "curves.png"


def plot_frontier(runs: Sequence[Path], out: Path) -> Path:
    """Plot the held-out reward of each evaluation, with its standard error, against the square root of its KL: what a
    run paid for its reward (Gao et al. 2023, arXiv 2210.10760, section 3).

    Raises UserError for a run that has no evaluation with both.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = {run: frontier(run) for run in runs}
    empty = next((run for run in runs if not points[run]), None)
    if empty is not None:
        raise UserError(f"{empty} has no evaluations with a reward and a KL")
    figure, axis = pyplot.subplots(figsize=(5, 3.5))
    for run, found in points.items():
        steps, distances, rewards, errors = zip(*found, strict=True)
        axis.errorbar(distances, rewards, yerr=errors, marker="o", markersize=3, linewidth=1, label=str(run))
        for step, x, y in zip(steps, distances, rewards, strict=True):
            axis.annotate(str(step), (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
    axis.set_xlabel("square root of KL to the reference, nats per completion")
    axis.set_ylabel("held-out reward")
    axis.grid(alpha=0.3)
    if len(points) > 1:
        axis.legend(fontsize=7)
    figure.tight_layout()
    try:
        with replaced(out) as path:
            figure.savefig(path, dpi=110)
    except ValueError as error:
        raise UserError(f"{out} cannot be written: {first_line(error)}") from None
    finally:
        pyplot.close(figure)
    return out


def frontier(run: Path) -> list[tuple[int, float, float, float]]:
    """(step, sqrt KL, reward, its standard error) of each evaluation that has them. An estimate of KL below 0 is 0."""
    with refusing(f"{run / 'eval.jsonl'} is damaged"):
        found = [(row["step"], row["metrics"]) for row in read_jsonl(run / "eval.jsonl")]
        points = [
            (int(step), max(0.0, metrics["kl"]) ** 0.5, float(metrics["reward"]), float(metrics.get("reward_se", 0.0)))
            for step, metrics in found
            if {"kl", "reward"} <= metrics.keys()
        ]
        strange = [point for point in points if not (all(map(math.isfinite, point)) and point[3] >= 0)]
        if strange:
            raise ValueError(f"step {strange[0][0]} has a reward of {strange[0][2]} +- {strange[0][3]}")
    return points


def print_report(console: Console, title: str, folder: Path) -> None:
    """The held-out evaluations before and after training, side by side, and where everything is."""
    evaluations = read_jsonl(folder / "eval.jsonl")
    if len(evaluations) >= 2:
        before, after = evaluations[0], evaluations[-1]
        table = Table(title=f"{title}: held-out data, before and after {after['step']} steps")
        for column in ("", "before", "after"):
            table.add_column(column, justify="left" if not column else "right")
        for name in {**before["metrics"], **after["metrics"]}:
            if not name.endswith("_se"):
                table.add_row(name, _value(before["metrics"], name), _value(after["metrics"], name))
        console.print(table)
        if after["samples"]:
            console.print(_samples(before["samples"], after["samples"]))
    for table in reward_report.tables(folder):
        console.print(table)
    curves = plot_curves(folder)
    if len(frontier(folder)) > 1:
        plot_frontier([folder], folder / "frontier.png")
    if curves is not None:
        console.print(Text(f"curves: {curves}    run folder: {folder}"), soft_wrap=True)


def _value(metrics: dict[str, float], name: str) -> str:
    if name not in metrics:
        return "-"
    error = metrics.get(f"{name}_se")
    return f"{metrics[name]:.3f}" + (f" +- {error:.3f}" if error is not None else "")


def _samples(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> Table:
    table = Table(title="samples", show_lines=True)
    for column in ("prompt", "before", "after"):
        table.add_column(column, overflow="fold")
    for old, new in zip(before, after, strict=True):
        table.add_row(*(Text(s) for s in (old["prompt"], _scored(old), _scored(new))))
    return table


def _scored(sample: dict[str, Any]) -> str:
    return f"{sample['completion']}  [{sample['reward']:.2f}]"
