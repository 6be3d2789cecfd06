"""The run folder: configuration, metrics, samples, checkpoints, and how a run is started, stopped and resumed.

config.yaml  metrics.jsonl  samples.jsonl  eval.jsonl  warnings.jsonl  self_test.json  curves.png  tensorboard/
checkpoints/step-N/  kept/step-N/
and the adapters in PEFT's format: the policy at the top, critic/ reward/ reference/ beside it
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from rlhf_fast import signals
from rlhf_fast.data.reading import read_jsonl
from rlhf_fast.errors import UserError, first_line, refusing
from rlhf_fast.training import ranks
from rlhf_fast.training.best import keep_best
from rlhf_fast.training.checkpoint import (
    MANIFEST,
    is_whole,
    last_good,
    load_checkpoint,
    newest_good_checkpoint,
    resume_from,
    save_checkpoint,
)
from rlhf_fast.training.config import Config, RolloutConfig, read_yaml
from rlhf_fast.training.detectors import Watch
from rlhf_fast.training.explosions import Explosions
from rlhf_fast.training.files import WriteError, append_record, cut_records, flush, replace_file, writing
from rlhf_fast.training.folder import (
    CONFIG_FILE,
    RECORDS,
    SUMMARY_FILE,
    check_same,
    claim_folder,
    forget_replaced,
    id_of_run,
    replaced_by,
    take_folder,
)
from rlhf_fast.training.inputs import check_inputs, hashes, inputs_of, read_inputs, write_inputs
from rlhf_fast.training.job import Job, capture, restore
from rlhf_fast.training.kept import Kept
from rlhf_fast.training.lock import FolderLock
from rlhf_fast.training.self_test import SelfTest

T = TypeVar("T")
SHOWN = ("loss", "policy_loss", "accuracy", "reward", "kl", "tokens_per_second")


class Run:
    """An open run folder. As a context manager it also listens to signals and owns the progress bar."""

    def __init__(
        self,
        config: Config,
        job: Job,
        *,
        resume: str | None,
        overwrite: bool,
        evaluate: Callable[[Any, Any], dict[str, Any]] | None = None,
        whole: Path | None = None,
    ) -> None:
        """evaluate: (job, config) -> the metrics and samples of the held-out data, without a trace in the job.
        whole: the folder of the run that this one is a stage of."""
        self._evaluate = evaluate
        self.config, self.job, self.folder = config, job, Path(config.output_dir)
        self.whole = whole or self.folder
        self._inputs = inputs_of(config)
        self.lock: FolderLock | None = None  # of the first process
        try:
            ranks.from_first(lambda: self._take(resume, overwrite=overwrite))
            self._open(resume, overwrite=overwrite)
        except BaseException:
            self._release()
            raise
        with refusing(f"the records in {self.folder} are damaged"):
            self.watch = ranks.from_first(lambda: Watch.of(
                read_jsonl(self.folder / "metrics.jsonl"), read_jsonl(self.folder / "eval.jsonl"),
                [warning["cause"] for warning in read_jsonl(self.folder / "warnings.jsonl")],
            ))  # fmt: skip
            self.explosions = ranks.from_first(lambda: Explosions(config, read_jsonl(self.folder / "metrics.jsonl")))
        reports = config.report_to == "tensorboard" and ranks.is_first()
        self.writer = _tensorboard(self.folder, self.start) if reports else None
        self.self_test: SelfTest | None = None  # of a run from its first step, until it is finished
        self.kept = Kept(job, self.folder)
        with writing(self.whole):
            self.kept.forget(self.start)  # where a kill came between the checkpoint and that
        self._done, self._in_step = self.start, False
        self._tracked = ""  # what `track` is at
        self._unwritten: WriteError | None = None  # the first record of a step that the system refused
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeRemainingColumn(), TextColumn("{task.fields[shown]}"), disable=not sys.stdout.isatty(),
        )  # fmt: skip
        self.task: TaskID = self.progress.add_task(config.algorithm, total=config.steps, completed=self.start, shown="")
        self.clock = self.saved_at = time.perf_counter()
        self._listening = ExitStack()
        # Processes that share a model need each other in every layer, and stop in the same place.
        self._shares_model = ranks.world() > 1 and job.backbone.shards is not None

    def _take(self, resume: str | None, *, overwrite: bool) -> None:
        self.lock = take_folder(
            self.folder, resume=resume is not None, overwrite=overwrite, inputs=self._inputs,
            stage=self.whole != self.folder,
        )  # fmt: skip

    def _release(self) -> None:
        if self.lock is not None:
            self.lock.release()

    def _open(self, resume: str | None, *, overwrite: bool) -> None:
        """Make the folder, which is locked, this run's, and put the job where the run is to go on."""
        config = self.config
        source, checkpoint = _find_checkpoint(self.folder, resume)
        self.start, state = checkpoint or (0, {})
        ranks.check_alike(f"the newest checkpoint in {self.folder}", self.start)
        if self.start > config.steps:
            raise UserError(f"cannot resume: the checkpoint is at step {self.start}, steps is {config.steps}")
        if resume is not None:
            ranks.from_first(lambda: self._compare(source))
        if checkpoint is not None:
            _restore(self.job, state, self.start)
        self.id = ranks.from_first(lambda: self._claim(resume=resume is not None, overwrite=overwrite))

    def _compare(self, source: Path) -> None:
        """UserError where this run is not the one in `source`, from which it is to go on."""
        path = source / CONFIG_FILE
        if path.is_file():
            check_same(read_yaml(path), self.config.values(), path, self._defaults())
        before = read_inputs(source) if self.start else None
        if before is not None:
            allowed = self.config.allow_changed_inputs
            for line in check_inputs(before, hashes(self._inputs), self.start, allowed=allowed):
                print(f"warning: {line}", file=sys.stderr)

    def _defaults(self) -> dict[str, Any]:
        return {name: field.default for name, field in type(self.config).model_fields.items()}

    def _claim(self, *, resume: bool, overwrite: bool) -> str:
        """Write what says that the folder is this run's, and cut what is behind its checkpoint. The id of the run."""
        run = claim_folder(
            self.folder, self.config.values(), resume=resume, overwrite=overwrite, defaults=self._defaults()
        )
        write_inputs(self.folder, hashes(self._inputs))
        if resume:
            resume_from(self.folder / "checkpoints", self.start)
        # An evaluation at the start itself is made again where one is due, since the checkpoint is from before it; else
        # it was the last of a run that is now continued.
        for name in RECORDS:
            cut_records(self.folder / name, self.start - (name == "eval.jsonl"))
        return run

    def __enter__(self) -> "Run":
        self._listening.enter_context(signals.listening())
        if self._shares_model:
            signals.hold(lambda: True, alone=False)
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.progress.stop()
        try:
            if self.writer is not None:
                self.writer.close()
        except OSError as refused:
            print(f"warning: {self.folder / 'tensorboard'} cannot be written: {refused.strerror}", file=sys.stderr)
        self.job.kept = None
        try:
            if isinstance(error, signals.Interrupted):
                raise self._stopped(error) from None
        finally:
            self._listening.close()
            self._release()
        if error is None:
            signals.release()

    def steps(self) -> Iterator[int]:
        """The steps still to do, from 0; saves a checkpoint where one is due or asked for."""
        if self._evaluation_is_due(self.start):
            self.evaluate(self.start)
        for step in range(self.start, self.config.steps):
            self.clock = time.perf_counter()
            if step == 0 and self.config.self_test:
                self.self_test = SelfTest(self.job, self.config, self.folder)
            self.kept.begin(step)
            signals.hold(self.kept.can_stop, alone=ranks.world() == 1)
            self._in_step = True
            yield step
            self.kept.end()
            self._in_step, self._done = False, step + 1
            if self._unwritten is not None:
                raise self._unwritten
            if self._checkpoint_is_due():
                self._save()
            if self._evaluation_is_due(self._done):
                self.evaluate(self._done)

    def _checkpoint_is_due(self) -> bool:
        """After a step; ends the run where a signal asks for it in any of the processes."""
        asked, minutes = signals.checkpoint_wanted(), self.config.save_minutes
        late = ranks.is_first() and minutes is not None and time.perf_counter() - self.saved_at >= 60 * minutes
        heard = ranks.all_max(torch.tensor([signals.caught(), int(asked), int(late)])).tolist()
        signals.catch(heard[0])
        self._outside_of_steps()
        if heard[1]:
            print(f"SIGUSR1: the checkpoint of step {self._done} is saved", file=sys.stderr)
        return self._done % self.config.save_every == 0 or self._done == self.config.steps or any(heard[1:])

    def _outside_of_steps(self) -> None:
        """Outside of a step a signal ends the run at once, or here."""
        if self._shares_model:
            signals.hold(lambda: True, alone=False)
            ranks.heed()
        else:
            signals.release()

    def _stopped(self, signal: signals.Interrupted) -> signals.Stopped:
        """Save what there is to save when a signal ends the run."""
        steps, done = self.config.steps, self._done
        whole = ranks.is_first() and is_whole(self._checkpoint)
        if done and not whole and (not self._in_step or self.kept.can_stop()):
            self._save()
            whole = True
        if self._in_step:
            saved = [f"the checkpoint of step {done}"] * whole + ["what was made in it"] * self.kept.stop()
            said = f"saved: {' and '.join(saved)}" if saved else ""
            return signals.Stopped.by(signal, f"in step {done + 1} of {steps}", said)
        if self._tracked:
            return signals.Stopped.by(signal, f"at {self._tracked}", "saved: what was made")
        if done:
            return signals.Stopped.by(signal, f"after step {done} of {steps}", f"saved: the checkpoint of step {done}")
        return signals.Stopped.by(signal, "before the first step")

    @property
    def _checkpoint(self) -> Path:
        """Where that of the steps done is, or would be."""
        return self.folder / "checkpoints" / f"step-{self._done}"

    def _save(self) -> None:
        """A checkpoint of the steps done; the last one before updates were skipped or metrics became suspect stays.
        From the first one on a run that this one replaces is gone."""
        if not ranks.is_first():
            return
        self._hold_folder()
        for path in (self.folder / name for name in RECORDS):
            if path.exists():
                with writing(path):
                    flush(path)
        good = not self.job.counters["bad_steps"] and not self.explosions.streak
        state = self.kept.state_of_begin() if self._in_step else capture(self.job)
        save_checkpoint(
            self.folder / "checkpoints", self._done, state, keep=self.config.keep_checkpoints, run=self.id, good=good
        )
        self.saved_at = time.perf_counter()
        with writing(self.whole):
            self.kept.forget(self._done)
            forget_replaced(self.whole)

    def rescue(self, error: Exception) -> str:
        """Save a checkpoint of the steps before one that failed, where that has changed nothing yet (a reward failed).

        What there is to say of it: otherwise which checkpoint is the last good one, and what would have been replaced.
        """
        if not ranks.is_first():
            return ""
        unchanged = not self.kept.changed if self._in_step else isinstance(error, WriteError)
        if self._done > 0 and unchanged and not self.job.counters["bad_steps"]:
            try:
                if not is_whole(self._checkpoint):
                    self._save()
                return f"; the checkpoint of step {self._done} is saved: --resume auto continues"
            except (UserError, OSError) as error:
                print(f"warning: {error}", file=sys.stderr)
        good = last_good(self.folder / "checkpoints", self.id)
        return (f"; the last good checkpoint is {good}" if good else "") + replaced_by(self.whole)

    def _hold_folder(self) -> None:
        """Make the folder anew where it was removed. UserError where it is another run's by now."""
        if self.lock is None or not self.lock.holds():
            self.lock = FolderLock(self.folder)
        owner = id_of_run(self.folder)
        if owner not in ("", self.id):
            raise UserError(f"output_dir {self.folder} is another run's by now")
        if not owner:
            print(f"warning: output_dir {self.folder} was removed, and is made anew", file=sys.stderr)
            self.id = claim_folder(self.folder, self.config.values(), resume=False, overwrite=False)
            write_inputs(self.folder, hashes(self._inputs))

    def track(self, what: str, parts: Sequence[T]) -> Iterator[T]:
        """The parts, under a progress bar of their own."""
        task = self.progress.add_task(what, total=len(parts), shown="")
        self._tracked = what
        for part in parts:
            yield part
            self.progress.advance(task)
            if self._shares_model:
                ranks.heed()
        self._tracked = ""
        self.progress.remove_task(task)

    def log(self, step: int, metrics: dict[str, float], *, tokens: int) -> None:
        """Record the metrics of a finished step (from 0), which worked on `tokens` tokens.

        UserError where they have exploded.
        """
        seconds = time.perf_counter() - self.clock
        with self._recording():
            self._test_itself(step + 1, metrics)
        with self._recording():
            self._warn(self.watch.step(step + 1, metrics))
        metrics = {**metrics, "seconds": seconds, "tokens_per_second": tokens / seconds}
        metrics["warnings"] = len(self.watch.told)
        with self._recording():
            self._append("metrics.jsonl", {"step": step + 1, **metrics})
            self._draw(metrics, step + 1)
        shown = "  ".join(f"{name} {metrics[name]:.4g}" for name in SHOWN if name in metrics)
        self.progress.update(self.task, completed=step + 1, shown=shown)
        last = step + 1 == self.config.steps
        if self.progress.disable and (last or step == self.start or (step + 1) % self.config.log_every == 0):
            print(f"{self.config.algorithm} {step + 1}/{self.config.steps}  {shown}", flush=True)
        self.explosions.add(metrics)
        if self.explosions.seen is not None:
            raise UserError(f"{self.explosions.seen}: lower learning_rate or look at the data")

    def _append(self, name: str, values: dict[str, Any]) -> None:
        if ranks.is_first():
            append_record(self.folder / name, values)

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """What cannot be written inside ends the run behind the step, which is whole then, and not within it."""
        try:
            yield
        except WriteError as error:
            self._unwritten = self._unwritten or error

    def _draw(self, metrics: dict[str, float], step: int, prefix: str = "") -> None:
        if self.writer is not None:
            with writing(self.folder / "tensorboard"):
                for name, value in metrics.items():
                    self.writer.add_scalar(prefix + name, value, step)

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
            self._append("warnings.jsonl", warning)
            print("warning: {cause} at step {step}: {seen}; {means}; try {try}".format_map(warning), file=sys.stderr)

    def samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        with self._recording():
            for sample in samples:
                self._append("samples.jsonl", {"step": step + 1, **sample})

    def _evaluation_is_due(self, done: int) -> bool:
        """Between the first and the last step, both of which have one anyway."""
        every = self.config.eval_every
        return every is not None and done % every == 0 and 0 < done < self.config.steps

    def evaluate(self, done: int) -> None:
        """Evaluate after `done` steps and record it."""
        if self._evaluate is not None:
            result = self._evaluate(self.job, self.config)
            self._outside_of_steps()
            self.evaluation(done, result)
            if isinstance(self.config, RolloutConfig):
                keep_best(self.job, self.config, self.folder, done, result["metrics"])

    def evaluation(self, done: int, result: dict[str, Any]) -> None:
        """Record an evaluation made after `done` steps. Raises UserError for a metric that is not finite."""
        for name, value in result["metrics"].items():
            if not math.isfinite(value):
                raise UserError(f"{name} of the held-out data is {value} after {done} steps: look at model and data")
        self._append("eval.jsonl", {"step": done, **result})
        self._warn(self.watch.evaluation(done, result["metrics"]))
        self._draw(result["metrics"], done, "eval/")


def _find_checkpoint(folder: Path, resume: str | None) -> tuple[Path, tuple[int, dict[str, Any]] | None]:
    """(run folder, (step, state) of its newest whole checkpoint, or of the one that is named). None: from the start."""
    if resume is None:
        return folder, None
    path = folder if resume == "auto" else Path(resume)
    if (path / MANIFEST).is_file():
        run = path.absolute().parents[1]
        if not (run / CONFIG_FILE).is_file():
            raise UserError(f"--resume {resume}: it lies in no run folder, so its config is not known")
        return _same_as(run, folder), load_checkpoint(path)
    newest = newest_good_checkpoint(path / "checkpoints", id_of_run(path))
    if newest is None and resume != "auto":
        raise UserError(f"--resume {resume}: no checkpoint there")
    return _same_as(path, folder), newest


def _same_as(path: Path, folder: Path) -> Path:
    return folder if path.resolve() == folder.resolve() else path


def _restore(job: Job, state: dict[str, Any], step: int) -> None:
    try:
        restore(job, state)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise UserError(f"the checkpoint of step {step} is of another model or version: {first_line(error)}") from None


def _tensorboard(folder: Path, start: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    with writing(folder / "tensorboard"):
        return SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)


def write_summary(folder: Path) -> None:
    """summary.json: the last evaluation. Its presence says that the run finished."""
    replace_file(folder / SUMMARY_FILE, json.dumps(read_jsonl(folder / "eval.jsonl")[-1], indent=1) + "\n")
