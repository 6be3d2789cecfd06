"""PNG plots of a run: speed, memory, error, roofline, and times and memory over the context and the vocabulary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks.results_file import OURS, best_of, floor_ms

Run = dict[str, Any]
OWN = dict(zip(OURS, ("black", "crimson", "navy"), strict=True))
COLOURS = 64  # of a picture
LEAST_ERROR = 1e-10  # where an exact result is drawn on a logarithmic axis


def draw(results: Run, folder: Path, source: str) -> list[Path]:
    """Writes the plots for which the run has cases; returns their paths. source: what they say they are made of."""
    paths = []
    for name, picture in pictures(results).items():
        paths.append(folder / f"{name}.png")
        save(picture(), paths[-1], source)
    return paths


def pictures(results: Run) -> dict[str, Callable[[], Any]]:
    """Name -> function that makes the figure, for the plots for which the run has cases."""
    single = [case for case in results["cases"] if case["group"] != "scaling"]
    growing = [case for case in results["cases"] if case["group"] == "scaling"]
    figures: dict[str, Callable[[], Any]] = {}
    if single:
        figures["speed"] = lambda: dots(single, speed, "time of eager / time (bars: p10 to p90)", line=1.0)
        figures["memory"] = lambda: dots(single, memory, "MiB held at a time beside inputs and results")
        figures["error"] = lambda: dots(single, error, f"greatest error against float64 (at least {LEAST_ERROR:g})")
    if any(floor_ms(results, case) for case in single):
        figures["roofline"] = lambda: roofline(results, single)
    for axis, title in (("context", "tokens"), ("vocabulary", "vocabulary")):
        chosen = {name: cases for name, cases in curves(growing, axis).items() if len(cases) > 1}
        if chosen:
            figures[f"scaling_{axis}"] = partial(scaling, chosen, axis, title)
    return figures


Value = Callable[[Run, Run], tuple[float, float, float] | None]  # (case, row) -> low, middle, high


def speed(case: Run, row: Run) -> tuple[float, float, float] | None:
    eager = case["contenders"].get("eager")
    return None if eager is None else tuple(eager["median_ms"] / row[key] for key in ("p90_ms", "median_ms", "p10_ms"))


def memory(case: Run, row: Run) -> tuple[float, float, float] | None:
    return (max(row["scratch_bytes"], 2**10) / 2**20,) * 3


def error(case: Run, row: Run) -> tuple[float, float, float] | None:
    return None if row["max_error"] is None else (max(row["max_error"], LEAST_ERROR),) * 3


def colours(cases: list[Run]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for case in cases for name in case["contenders"]))
    palette = pyplot.get_cmap("tab20").colors
    return {name: palette[i % len(palette)] for i, name in enumerate(names)} | OWN


def dots(cases: list[Run], value: Value, label: str, line: float | None = None) -> Any:
    """A row for each case, a dot for each contender."""
    figure, axes = pyplot.subplots(figsize=(11, 1.5 + 0.24 * len(cases)))
    for name, colour in colours(cases).items():
        there = [(i, case) for i, case in enumerate(cases) if name in case["contenders"]]
        valued = [(i, value(case, case["contenders"][name])) for i, case in there]
        points = [(i, values) for i, values in valued if values is not None]
        if not points:
            continue
        rows, values = zip(*points, strict=True)
        low, middle, high = (list(part) for part in zip(*values, strict=True))
        reach = [[m - a for m, a in zip(middle, low, strict=True)], [b - m for m, b in zip(middle, high, strict=True)]]
        marker = "D" if name in OURS else "o"
        axes.errorbar(middle, rows, xerr=reach, fmt=marker, color=colour, label=name, markersize=5, alpha=0.85)
    if line is not None:
        axes.axvline(line, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(cases)), labels(cases), fontsize=7)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def labels(cases: list[Run]) -> list[str]:
    """Names, with the shape where one name stands for several cases."""
    times = Counter(case["case"] for case in cases)
    return [case["case"] + (f", {case['shape']}" if times[case["case"]] > 1 else "") for case in cases]


def roofline(results: Run, cases: list[Run]) -> Any:
    """FLOP/s over FLOPs per byte: the machine's two limits, our best and the others' best of every case."""
    bandwidth = results["limits"]["copy_bytes_per_second"]
    peak = next(rate for name, rate in results["limits"].items() if name.endswith("flops_per_second"))
    cases = [case for case in cases if case["flops"] and case["bytes"]]
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for ours, marker, label in ((True, "D", "ours"), (False, "o", "the fastest other one")):
        points = [
            (case["flops"] / case["bytes"], 1e3 * case["flops"] / case["contenders"][name]["median_ms"])
            for case in cases
            if (name := best_of(case, ours)) is not None
        ]
        axes.plot(*zip(*points, strict=True), marker, label=label, alpha=0.7)
    intensities = sorted({peak / bandwidth, *(case["flops"] / case["bytes"] for case in cases)})
    axes.plot(intensities, [min(peak, bandwidth * x) for x in intensities], "k-", linewidth=1, label="measured limit")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="FLOP/s")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def curves(cases: list[Run], axis: str) -> dict[str, list[Run]]:
    """Cases of one name in the order of what grows, the other size at its least."""
    families: dict[str, list[Run]] = {}
    for case in cases:
        families.setdefault(case["case"], []).append(case)
    other = "vocabulary" if axis == "context" else "context"
    for name, family in families.items():
        least = min(size(case, other) for case in family)
        families[name] = sorted((c for c in family if size(c, other) == least), key=lambda case: size(case, axis))
    return families


def size(case: Run, axis: str) -> int:
    """Tokens of one sequence, or of the batch where it has no time; ids in the vocabulary, 0 without one."""
    sizes = case["sizes"]
    return sizes.get("T", sizes["N"]) if axis == "context" else sizes.get("V", 0)


def scaling(families: dict[str, list[Run]], axis: str, title: str) -> Any:
    """A column for each case: time with its spread above, memory below."""
    figure, grid = pyplot.subplots(
        2, len(families), figsize=(4.2 * len(families), 7), squeeze=False, layout="constrained"
    )
    shades = colours([case for family in families.values() for case in family])
    for column, (name, family) in enumerate(families.items()):
        above, below = grid[0][column], grid[1][column]
        for contender in dict.fromkeys(who for case in family for who in case["contenders"]):
            there = [case for case in family if contender in case["contenders"]]
            rows = [case["contenders"][contender] for case in there]
            sizes = [size(case, axis) for case in there]
            style = {"color": shades[contender], "marker": "D" if contender in OURS else "o", "markersize": 4}
            above.plot(sizes, [row["median_ms"] for row in rows], label=contender, **style)
            spread = ([row[key] for row in rows] for key in ("p10_ms", "p90_ms"))
            above.fill_between(sizes, *spread, color=shades[contender], alpha=0.2)
            below.plot(sizes, [max(row["scratch_bytes"], 2**10) / 2**20 for row in rows], **style)
        above.set_title(name, fontsize=9)
        above.set_ylabel("median ms")
        below.set_ylabel("MiB beside results")
        below.set_xlabel(title)
        above.legend(fontsize=7)
        for axes in (above, below):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.grid(alpha=0.3)
    return figure


def save(figure: Any, path: Path, source: str) -> None:
    """A PNG of few colours and few bytes, whose text `Source` is `source`."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=80, bbox_inches="tight")
    pyplot.close(figure)
    text = PngInfo()
    text.add_text("Source", source)
    Image.open(drawn).convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE).save(
        path, optimize=True, pnginfo=text
    )
