"""python -m benchmarks, or rlhf_fast bench: times our ops, what they replace and other libraries, and writes JSON.

    python -m benchmarks --out out/cpu.json                      groups bars, ops and ragged, on the GPU if there is one
    python -m benchmarks --group bars --out out/bars.json        the cases with bars alone
    python -m benchmarks --group products --out out/products.json  products of few rows, as in generation
    python -m benchmarks --group scaling --out out/scaling.json  contexts to 128k tokens, vocabularies to 262k
    python -m benchmarks --out out/new.json --compare out/old.json
    python -m benchmarks report out/cpu.json --out out/report    tables and plots; also with --compare

Every contender is checked against float64 before it is timed. Exit status 1: slower than OLD, beyond the spread; 2: it
cannot run, one line says why.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.cases import GROUPS, selected
from benchmarks.harness import limits
from benchmarks.harness import report as measure_all
from benchmarks.results_file import ResultsError, load, regressions, source


def bench(arguments: argparse.Namespace) -> int:
    device = arguments.device
    sized_by_gpu = "scaling" in arguments.group  # what fits there
    if device == "cuda" and not torch.cuda.is_available() and (sized_by_gpu or not arguments.dry_run):
        raise ResultsError("PyTorch finds no GPU here")
    old = load(arguments.compare) if arguments.compare else None
    cases = selected(
        arguments.group, device, arguments.quick, arguments.case, arguments.compile, arguments.peer, arguments.shape
    )
    if not cases:
        reason = peers.absent().get(arguments.peer)
        shaped = f" and {arguments.shape!r} in its shape" if arguments.shape else ""
        beside = f" and {arguments.peer} beside it" if arguments.peer else ""
        raise ResultsError(
            f"{arguments.peer}: {reason}"
            if reason
            else f"no case of {', '.join(arguments.group)} has {arguments.case!r} in its name{beside}{shaped}"
        )
    if arguments.dry_run:
        for case in cases:
            print(f"{case.name}, {case.shape}: {', '.join(case.everyone)}")
        return 0
    if arguments.out is None:
        raise ResultsError("--out is missing: the JSON file to write")
    size = (1 << 20, 256) if arguments.quick else (1 << 28, 2048) if device == "cpu" else (1 << 31, 8192)
    repeats = arguments.repeats or (3 if arguments.quick else 15)
    head = {"peers": peers.versions(), "absent": peers.absent(), "limits": limits(device, *size)}
    measure_all(cases, device, repeats, arguments.out, **head)
    return compared(load(arguments.out), old) if old else 0


def compared(new: dict, old: dict) -> int:
    slower, lines = regressions(new, old)
    print("\n".join(lines))
    return 1 if slower else 0


def render(arguments: argparse.Namespace) -> int:
    from benchmarks import plots, tables

    results = load(arguments.result)
    arguments.out.mkdir(parents=True, exist_ok=True)
    pictures = plots.draw(results, arguments.out, source(arguments.result))
    page = arguments.out / "report.md"
    page.write_text(tables.page(results, pictures), encoding="utf-8")
    print("\n".join(f"-> {path}" for path in (page, *pictures)))
    return compared(results, load(arguments.compare)) if arguments.compare else 0


def parsed(words: list[str]) -> argparse.Namespace:
    if words[:1] == ["report"]:
        parser = argparse.ArgumentParser(
            prog="python -m benchmarks report", description="Markdown tables and PNG plots."
        )
        parser.add_argument("result", type=Path, help="a JSON file of an earlier run")
        parser.add_argument("--out", type=Path, required=True, help="folder")
        parser.add_argument("--compare", type=Path, metavar="OLD", help="JSON file of an older run")
        parser.set_defaults(run=render)
        return parser.parse_args(words[1:])
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=form)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--group", choices=GROUPS, action="append", help="default: bars, ops and ragged")
    parser.add_argument("--case", default="", help="only cases whose name holds this")
    parser.add_argument("--shape", default="", help="only cases whose shape holds this, such as V=151936")
    parser.add_argument("--peer", default="", help="only cases in which this other implementation takes part")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes, three repeats: a trial, no measurement")
    parser.add_argument("--repeats", type=int, help="default: 15")
    parser.add_argument("--compile", action="store_true", help="torch.compile of eager as a contender: slow to start")
    parser.add_argument("--compare", type=Path, metavar="OLD", help="JSON file of an older run")
    parser.add_argument("--dry-run", action="store_true", help="list cases and contenders")
    parser.set_defaults(run=bench)
    arguments = parser.parse_args(words)
    arguments.group = arguments.group or ["bars", "ops", "ragged"]
    return arguments


def main() -> None:
    arguments = parsed(sys.argv[1:])
    try:
        sys.exit(arguments.run(arguments))
    except ResultsError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
