"""Measure one algorithm, or write the page of what was measured: see benchmarks/steps/__init__.py."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.steps import compare, report
from benchmarks.steps.setting import Setting

TRL_1_12 = compare.ROOT / ".cache" / "trl-1.12.0"


def main() -> None:
    if sys.argv[1:2] == ["report"]:
        parser = argparse.ArgumentParser(prog="python -m benchmarks.steps report")
        parser.add_argument("results", type=Path, nargs="+", help="files that the measurements wrote")
        parser.add_argument("--out", type=Path, required=True, help="the page; its curves go beside it as .png")
        options = parser.parse_args(sys.argv[2:])
        report.write(options.results, options.out)
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps")
    parser.add_argument("--algorithm", choices=("ppo", "grpo", "dpo"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="tiny", help="a local folder, or tiny: a small Llama made here")
    parser.add_argument("--steps", type=int, default=10, help="per repeat; the first is not timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8, help="completions; pairs of dpo")
    parser.add_argument("--num-generations", type=int, default=4, help="completions per prompt of grpo")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--checkpointing", action="store_true", help="both recompute activations in backward")
    parser.add_argument("--trl112", type=Path, default=TRL_1_12, help="folder with TRL 1.12 alone, for ppo")
    options = parser.parse_args()
    setting = Setting(
        algorithm=options.algorithm, model=options.model, steps=options.steps, batch_size=options.batch_size,
        num_generations=options.num_generations, max_new_tokens=options.max_new_tokens,
        learning_rate=options.learning_rate, gradient_checkpointing=options.checkpointing,
    )  # fmt: skip
    compare.write(setting, options.repeats, options.trl112, options.out)


if __name__ == "__main__":
    main()
