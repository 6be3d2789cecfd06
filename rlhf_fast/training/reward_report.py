"""How good a reward model is on held-out judgements, and what it goes by: calibration, length, margins, annotators.

Definitions. A comparison is a pair of answers that was told apart, with lead d = r_better - r_worse. It is right where
d > 0; a tie is half right. Its probability is sigmoid(d / T), with the temperature T that fits the same held-out
comparisons best (Guo et al. 2017, 1706.04599). ece: over 15 equal bins of the confidence, from a half to 1, the mean
distance of confidence and share of right ones, weighed by their numbers. brier: mean of (probability - label)^2. Likes
and steps are told the same way, d their score itself and the label what was said.
"""

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from rlhf_fast.data.reading import read_json
from rlhf_fast.errors import refusing
from rlhf_fast.training.reward_data import Judgement

BINS = 15
REPORT_FILE, PLOT_FILE = "reward_report.json", "reliability.png"


class Comparisons(NamedTuple):
    """(N,) fp64 each: the lead, the chance in [0, 1] that it should be positive, the margin that people gave (0 where
    they gave none), by how many tokens the better answer is longer (0 for one answer). annotators: N names or None."""

    leads: Tensor
    labels: Tensor
    margins: Tensor
    longer: Tensor
    annotators: list[str | None]

    @property
    def right(self) -> Tensor:
        """1, 0, or a half for a tie; with soft labels the chance that the choice is right."""
        first = (self.leads > 0).double() + 0.5 * (self.leads == 0).double()
        return first * self.labels + (1 - first) * (1 - self.labels)


def comparisons_of(scores: Tensor, judged: Sequence[Judgement]) -> Comparisons:
    """scores: (S,), of all answers or steps of `judged` in order."""
    rows, first = [], 0
    for one in judged:
        values = scores[first : first + len(one.ends)].double().tolist()
        first += len(one.ends)
        if one.form in ("likes", "steps"):
            rows += [(v, y, 0.0, 0, one.annotator) for v, y in zip(values, one.targets, strict=True)]
        margin, label = one.targets if one.form == "pairs" else (0.0, 1.0)
        rows += [
            (values[i] - values[j], label, margin, one.lengths[i] - one.lengths[j], one.annotator)
            for i, j in one.comparisons
        ]
    columns = list(zip(*rows, strict=True)) if rows else [()] * 5
    leads, labels, margins, longer = (torch.tensor(column, dtype=torch.float64) for column in columns[:4])
    return Comparisons(leads, labels, margins, longer, list(columns[4]))


def fitted_temperature(leads: Tensor, labels: Tensor) -> float:
    """The T in [1e-3, 1e3] for which sigmoid(leads / T) has the least cross-entropy with the labels, which is convex in
    1 / T: by bisection of its slope. 1 where no lead tells anything."""
    if not leads.any():
        return 1.0
    low, high = -3.0, 3.0  # log10 of 1 / T
    for _ in range(60):
        middle = (low + high) / 2
        slope = (leads * (torch.sigmoid(leads * 10**middle) - labels)).mean()
        low, high = (middle, high) if slope <= 0 else (low, middle)
    return float(10 ** -((low + high) / 2))


class Bin(NamedTuple):
    """Comparisons of about the same value: its range, their number, mean confidence (or value), share of right ones."""

    low: float
    high: float
    size: int
    confidence: float
    accuracy: float


def reliability(leads: Tensor, right: Tensor, temperature: float) -> list[Bin]:
    """The bins of ece that have comparisons."""
    confidence = torch.sigmoid(leads.abs() / temperature)
    edges = torch.linspace(0.5, 1, BINS + 1, dtype=torch.float64)
    place = torch.bucketize(confidence, edges[1:-1], right=True)
    return [
        Bin(float(edges[b]), float(edges[b + 1]), int(inside.sum()), float(confidence[inside].mean()),
            float(right[inside].mean()))
        for b in range(BINS) if (inside := place == b).any()
    ]  # fmt: skip


def calibration(comparisons: Comparisons) -> tuple[dict[str, float], list[Bin]]:
    """temperature, brier and ece; and the bins."""
    leads, labels = comparisons.leads, comparisons.labels
    temperature = fitted_temperature(leads, labels)
    bins = reliability(leads, comparisons.right, temperature)
    ece = sum(b.size * abs(b.confidence - b.accuracy) for b in bins) / len(leads)
    brier = float((torch.sigmoid(leads / temperature) - labels).square().mean())
    return {"temperature": temperature, "brier": brier, "ece": ece}, bins


def by_value(values: Tensor, right: Tensor, count: int = 5) -> list[Bin]:
    """Accuracy in `count` groups of equal size, in the order of `values`; equal values are in one group."""
    edges = torch.quantile(values, torch.linspace(0, 1, count + 1, dtype=values.dtype)).unique()
    place = torch.bucketize(values, edges[1:-1], right=True)
    return [
        Bin(float(values[inside].min()), float(values[inside].max()), int(inside.sum()), float(values[inside].mean()),
            float(right[inside].mean()))
        for b in range(max(1, len(edges) - 1)) if (inside := place == b).any()
    ]  # fmt: skip


def spearman(x: Tensor, y: Tensor) -> float | None:
    """Spearman's correlation, equal values with their mean rank; None where one of the two is constant."""
    ranks = torch.stack([_ranks(x), _ranks(y)])
    if bool((ranks.std(1, correction=0) == 0).any()):
        return None
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(x: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def best_of_four(scores: Tensor, judged: Sequence[Judgement]) -> float | None:
    """How often, of four answers of one prompt, the one with the greatest score has the best rank: the mean over the
    prompts of all their sets of four that a rank tells apart, of the first 12 answers. None without such a set."""
    shares, first = [], 0
    for one in judged:
        values, ranks = scores[first : first + len(one.ends)].tolist(), one.targets
        first += len(one.ends)
        sets = combinations(range(min(len(values), 12)), 4) if one.form == "rankings" else ()
        hits = [
            ranks[max(four, key=lambda i: values[i])] == min(ranks[i] for i in four)
            for four in sets if len({ranks[i] for i in four}) > 1
        ]  # fmt: skip
        shares += [sum(hits) / len(hits)] if hits else []
    return sum(shares) / len(shares) if shares else None


def measures(scores: Tensor, judged: Sequence[Judgement]) -> tuple[dict[str, float], dict[str, Any]]:
    """The numbers that a run follows; and the report: those, and tables by margin, lead, confidence and annotator.

    scores: (S, M), of which ratings have a column for each criterion and the other forms one. What the data do not tell
    (best of four without rankings) is left out.
    """
    numbers: dict[str, float | None] = {}
    report: dict[str, Any] = {}
    if judged[0].form == "ratings":
        ratings = torch.tensor([one.targets for one in judged])
        for number, column in enumerate(scores.T):
            name = "spearman_rating" if scores.shape[1] == 1 else f"spearman_rating_{number + 1}"
            numbers[name] = spearman(column, ratings[:, number])
    else:
        compared = comparisons_of(scores[:, 0], judged)
        right = compared.right
        fitted, bins = calibration(compared)
        numbers |= {"accuracy": float(right.mean()), "accuracy_se": float(right.std(correction=0)) / len(right) ** 0.5}
        if judged[0].form in ("pairs", "rankings"):
            numbers["margin"] = float(compared.leads.mean())
            shorter = compared.longer < 0
            numbers["accuracy_shorter_chosen"] = float(right[shorter].mean()) if shorter.any() else None
            numbers["best_of_4"] = best_of_four(scores[:, 0], judged)
        numbers |= fitted
        report = {"by_confidence": bins, "by_lead": by_value(compared.leads.abs(), right)}
        if compared.margins.any():
            report["by_margin"] = by_value(compared.margins.abs(), right)
        report["by_annotator"] = {
            who: {"size": len(theirs), "accuracy": float(right[theirs].mean())}
            for who in sorted({name for name in compared.annotators if name is not None})
            if (theirs := [i for i, name in enumerate(compared.annotators) if name == who])
        }
    if judged[0].form != "steps":
        lengths = torch.tensor([length for one in judged for length in one.lengths], dtype=torch.float64)
        numbers["spearman_length"] = spearman(scores.mean(1), lengths)
    told_numbers = {name: value for name, value in numbers.items() if value is not None}
    return told_numbers, {**told_numbers, **report}


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """reward_report.json, and the reliability plot where there are probabilities."""
    plain = {key: [b._asdict() for b in x] if key in TABLES else x for key, x in report.items()}
    (folder / REPORT_FILE).write_text(json.dumps(plain, indent=1) + "\n")
    if "by_confidence" in report:
        _plot(folder / PLOT_FILE, report)


TABLES = {"by_margin": "margin", "by_lead": "lead |r1 - r2|", "by_confidence": "confidence"}


def tables(folder: Path) -> list[Table]:
    """What `write_report` wrote, as tables; none where it wrote nothing."""
    path = folder / REPORT_FILE
    if not path.is_file():
        return []
    with refusing(f"{path} is damaged"):
        report, made = read_json(path), []
        for key, what in TABLES.items():
            rows = [(f"{b['low']:.3g} to {b['high']:.3g}", b) for b in report.get(key, [])]
            made += [_table(what, rows)] if rows else []
        groups = list(report.get("by_annotator", {}).items())
        return [*made, _table("annotator", groups)] if groups else made


def _table(what: str, rows: Sequence[tuple[str, dict[str, float]]]) -> Table:
    table = Table(what, "comparisons", "accuracy", title=f"held-out accuracy by {what}")
    for name, values in rows:
        table.add_row(name, str(values["size"]), f"{values['accuracy']:.3f}")
    return table


def _plot(path: Path, report: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bins: list[Bin] = report["by_confidence"]
    figure, axis = pyplot.subplots(figsize=(4, 4))
    axis.plot([0.5, 1], [0.5, 1], color="grey", linewidth=1)
    most = max(b.size for b in bins)
    axis.scatter([b.confidence for b in bins], [b.accuracy for b in bins], s=[20 + 180 * b.size / most for b in bins])
    axis.set(xlabel="confidence", ylabel="share right", xlim=(0.48, 1.02), ylim=(-0.02, 1.02))
    axis.set_title(f"T {report['temperature']:.3g}, ECE {report['ece']:.3f}, Brier {report['brier']:.3f}", fontsize=10)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
