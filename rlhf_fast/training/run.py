"""The run folder: configuration, metrics, samples, checkpoints, and how a run is started, stopped and resumed.

config.yaml  metrics.jsonl  samples.jsonl  eval.jsonl  warnings.jsonl  self_test.json  curves.png  tensorboard/
checkpoints/step-N/
and the adapters in PEFT's format: the policy at the top, critic/ reward/ reference/ beside it
"""

import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from rlhf_fast.data.reading import read_jsonl, split_lines
from rlhf_fast.errors import UserError
from rlhf_fast.training import ranks
from rlhf_fast.training.best import keep_best
from rlhf_fast.training.checkpoint import load_checkpoint, newest_good_checkpoint, newest_of, save_checkpoint
from rlhf_fast.training.config import Config, RolloutConfig
from rlhf_fast.training.detectors import Watch
from rlhf_fast.training.explosions import Explosions
from rlhf_fast.training.folder import claim_folder, inputs_of, replace_file
from rlhf_fast.training.job import Job, capture, random_state, restore
from rlhf_fast.training.self_test import SelfTest

T = TypeVar("T")
SHOWN = ("loss", "policy_loss", "accuracy", "reward", "kl", "tokens_per_second")


class Stopped(Exception):
    """The run was asked to end by a signal, and saved itself first."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Run:
    """An open run folder. As a context manager it also owns the signal handlers and the progress bar."""

    def __init__(
        self,
        config: Config,
        job: Job,
        *,
        resume: str | None,
        overwrite: bool,
        evaluate: Callable[[Any, Any], dict[str, Any]] | None = None,
    ) -> None:
        """evaluate: (job, config) -> the metrics and samples of the held-out data, without a trace in the job."""
        self._evaluate = evaluate
        self.config, self.job, self.folder = config, job, Path(config.output_dir)
        checkpoint = _find_checkpoint(self.folder, resume)
        ranks.check_alike(f"the newest checkpoint in {self.folder}", None if checkpoint is None else checkpoint[0])
        if checkpoint is not None and checkpoint[0] > config.steps:
            raise UserError(f"cannot resume: the checkpoint is at step {checkpoint[0]}, steps is {config.steps}")
        ranks.from_first(lambda: claim_folder(
            self.folder, config.values(), resume=resume is not None, overwrite=overwrite, inputs=inputs_of(config)
        ))  # fmt: skip
        self.start = 0
        if checkpoint is not None:
            self.start, state = checkpoint
            restore(job, state)
        for name in ("metrics.jsonl", "samples.jsonl", "warnings.jsonl"):
            _forget_after(self.folder / name, self.start)
        # An evaluation at the start itself, unless one was due there, was the last of a run that is now continued.
        due = self._evaluation_is_due(self.start)
        _forget_after(self.folder / "eval.jsonl", self.start if due else self.start - 1)
        self.watch = ranks.from_first(lambda: Watch.of(
            read_jsonl(self.folder / "metrics.jsonl"), read_jsonl(self.folder / "eval.jsonl"),
            [warning["cause"] for warning in read_jsonl(self.folder / "warnings.jsonl")],
        ))  # fmt: skip
        self.explosions = ranks.from_first(lambda: Explosions(config, read_jsonl(self.folder / "metrics.jsonl")))
        reports = config.report_to == "tensorboard" and ranks.is_first()
        self.writer = _tensorboard(self.folder, self.start) if reports else None
        self.signal = 0
        self.self_test: SelfTest | None = None  # of a run from its first step, until it is finished
        self._begun: tuple[int, dict[str, Any], dict[str, float]] | None = None
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeRemainingColumn(), TextColumn("{task.fields[shown]}"), disable=not sys.stdout.isatty(),
        )  # fmt: skip
        self.task: TaskID = self.progress.add_task(config.algorithm, total=config.steps, completed=self.start, shown="")
        self.clock = time.perf_counter()

    def __enter__(self) -> "Run":
        # A first signal ends the run after its current step; a second one is the default: at once.
        numbers = (int(signal.SIGINT), int(signal.SIGTERM))
        self.handlers = {number: signal.signal(number, self._stop) for number in numbers}
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.progress.stop()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.writer is not None:
            self.writer.close()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, self.handlers[number])

    def _hear_all(self) -> None:
        """A signal to one process is one to all."""
        self.signal = int(ranks.all_max(torch.tensor(self.signal)))

    def steps(self) -> Iterator[int]:
        """The steps still to do, from 0; saves a checkpoint where one is due, and when a signal ends the run."""
        for step in range(self.start, self.config.steps):
            self.clock = time.perf_counter()
            if step == 0 and self.config.self_test:
                self.self_test = SelfTest(self.job, self.config, self.folder)
            self._begun = step, random_state(), dict(self.job.counters)
            yield step
            done = step + 1
            self._hear_all()
            if self._evaluation_is_due(done):
                self.evaluate(done)
            if done % self.config.save_every == 0 or done == self.config.steps or self.signal:
                self._save(done, capture(self.job))
            if self.signal and done < self.config.steps:
                raise Stopped(
                    f"stopped after step {done} of {self.config.steps}; the checkpoint is saved: "
                    "the same command with --resume auto continues",
                    128 + self.signal,
                )

    def rescue(self) -> str:
        """Save a checkpoint of the steps before one that failed, where that has changed nothing yet (a reward failed).

        What there is to say of it, else the last checkpoint before what went wrong, or nothing.
        """
        done, random, counters = self._begun or (0, {}, {})
        if not ranks.is_first():
            return ""
        if done == 0 or counters != self.job.counters:
            good = newest_of(self.folder / "checkpoints", done + 1 - self.explosions.streak)
            return "" if good is None else f"; the last good checkpoint is {good}"
        self._save(done, {**capture(self.job), "random": random})
        return f"; the checkpoint of step {done} is saved: --resume auto continues"

    def _save(self, done: int, state: dict[str, Any]) -> None:
        """A checkpoint after `done` steps; the last one before metrics became suspect stays."""
        good = done - self.explosions.streak
        save_checkpoint(self.folder / "checkpoints", done, state, keep=self.config.keep_checkpoints, good=good)

    def track(self, what: str, parts: Sequence[T]) -> Iterator[T]:
        """The parts, under a progress bar of their own; a signal ends the run behind the one that it came in."""
        task = self.progress.add_task(what, total=len(parts), shown="")
        for part in parts:
            yield part
            self.progress.advance(task)
            self._hear_all()
            if self.signal:
                raise Stopped(f"stopped at {what}: the same command with --resume auto goes on", 128 + self.signal)
        self.progress.remove_task(task)

    def log(self, step: int, metrics: dict[str, float], *, tokens: int) -> None:
        """Record the metrics of a finished step (from 0), which worked on `tokens` tokens.

        UserError where they have exploded.
        """
        seconds = time.perf_counter() - self.clock
        self._test_itself(step + 1, metrics)
        self._warn(self.watch.step(step + 1, metrics))
        metrics = {**metrics, "seconds": seconds, "tokens_per_second": tokens / seconds}
        metrics["warnings"] = len(self.watch.told)
        _append(self.folder / "metrics.jsonl", {"step": step + 1, **metrics})
        if self.writer is not None:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step + 1)
        shown = "  ".join(f"{name} {metrics[name]:.4g}" for name in SHOWN if name in metrics)
        self.progress.update(self.task, completed=step + 1, shown=shown)
        last = step + 1 == self.config.steps
        if self.progress.disable and (last or step == self.start or (step + 1) % self.config.log_every == 0):
            print(f"{self.config.algorithm} {step + 1}/{self.config.steps}  {shown}", flush=True)
        self.explosions.add(metrics)
        if self.explosions.seen is not None:
            raise UserError(f"{self.explosions.seen}: lower learning_rate or look at the data")

    def _test_itself(self, done: int, metrics: dict[str, float]) -> None:
        """The learning self-test, a line for what fails."""
        if self.self_test is not None:
            for line in self.self_test.step(done, metrics):
                print(f"self-test: {line}", file=sys.stderr)
            if self.self_test.finished:
                self.self_test = None

    def _warn(self, warnings: list[dict[str, Any]]) -> None:
        """Record what the detectors found, and say it in a line each."""
        for warning in warnings:
            _append(self.folder / "warnings.jsonl", warning)
            print("warning: {cause} at step {step}: {seen}; {means}; try {try}".format_map(warning), file=sys.stderr)

    def samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        for sample in samples:
            _append(self.folder / "samples.jsonl", {"step": step + 1, **sample})

    def _evaluation_is_due(self, done: int) -> bool:
        """Between the first and the last step, both of which have one anyway."""
        every = self.config.eval_every
        return every is not None and done % every == 0 and 0 < done < self.config.steps

    def evaluate(self, done: int) -> None:
        """Evaluate after `done` steps and record it."""
        if self._evaluate is not None:
            result = self._evaluate(self.job, self.config)
            self.evaluation(done, result)
            if isinstance(self.config, RolloutConfig):
                keep_best(self.job, self.config, self.folder, done, result["metrics"])

    def evaluation(self, done: int, result: dict[str, Any]) -> None:
        """Record an evaluation made after `done` steps. Raises UserError for a metric that is not finite."""
        for name, value in result["metrics"].items():
            if not math.isfinite(value):
                raise UserError(f"{name} of the held-out data is {value} after {done} steps: look at model and data")
        _append(self.folder / "eval.jsonl", {"step": done, **result})
        self._warn(self.watch.evaluation(done, result["metrics"]))
        if self.writer is not None:
            for name, value in result["metrics"].items():
                self.writer.add_scalar(f"eval/{name}", value, done)


def _find_checkpoint(folder: Path, resume: str | None) -> tuple[int, dict[str, Any]] | None:
    if resume is None:
        return None
    if resume == "auto":
        return newest_good_checkpoint(folder / "checkpoints")
    path = Path(resume)
    if (path / "manifest.json").is_file():
        return load_checkpoint(path)
    newest = newest_good_checkpoint(path / "checkpoints")
    if newest is None:
        raise UserError(f"--resume {resume}: no checkpoint there")
    return newest


def _forget_after(path: Path, step: int) -> None:
    """Drop what an interrupted run recorded past its checkpoint, and a last line that was cut off."""
    if not path.exists() or not ranks.is_first():
        return
    lines = []
    for line in split_lines(path):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        lines.append(line)
    replace_file(path, "".join(lines))


def _append(path: Path, values: dict[str, Any]) -> None:
    if not ranks.is_first():
        return
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(values, ensure_ascii=False) + "\n")


def _tensorboard(folder: Path, start: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)


def write_summary(folder: Path) -> None:
    """summary.json: the last evaluation. Its presence says that the run finished."""
    replace_file(folder / "summary.json", json.dumps(read_jsonl(folder / "eval.jsonl")[-1], indent=1) + "\n")
