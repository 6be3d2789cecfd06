"""Measure one algorithm: see benchmarks/steps/__init__.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.steps import compare
from benchmarks.steps.ours import OWN
from benchmarks.steps.setting import Setting

TRL_1_12 = compare.ROOT / ".cache" / "trl-1.12.0"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps")
    parser.add_argument("--algorithm", choices=tuple(OWN), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="tiny", help="a local folder, or tiny: a small Llama made here")
    parser.add_argument("--steps", type=int, default=10, help="per repeat; the first is not timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8, help="completions; pairs of dpo")
    parser.add_argument("--num-generations", type=int, default=4, help="completions per prompt of grpo and rloo")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--checkpointing", dest="gradient_checkpointing", action="store_true", help="of both")
    parser.add_argument("--trl112", type=Path, default=TRL_1_12, help="folder with TRL 1.12 alone, for ppo")
    options = vars(parser.parse_args())
    repeats, trl112, out = (options.pop(name) for name in ("repeats", "trl112", "out"))
    compare.write(Setting(**options), repeats, trl112, out)


if __name__ == "__main__":
    main()
