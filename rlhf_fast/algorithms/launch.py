"""From a YAML file and flags to finished runs: one algorithm, or `stages` in order.

All of it is checked before anything is written.
"""

import tempfile
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from huggingface_hub.utils import logging as hub_logging
from rich.console import Console
from rich.text import Text
from safetensors import SafetensorError

from rlhf_fast import signals
from rlhf_fast.algorithms import ALGORITHMS, load_algorithm
from rlhf_fast.data.encoding import quiet_libraries
from rlhf_fast.data.layouts import infer_algorithm, rename_columns
from rlhf_fast.data.notes import forget, say
from rlhf_fast.data.sources import read_rows
from rlhf_fast.errors import UserError, first_line, short
from rlhf_fast.rewards.functions import begun
from rlhf_fast.rewards.sources import is_function
from rlhf_fast.training import core_yaml, memory_plan, ranks
from rlhf_fast.training.config import (
    Config,
    FromStage,
    folded,
    keys_of,
    listed,
    means_something,
    merged,
    parse,
    read_yaml,
    unknown_key,
)
from rlhf_fast.training.files import WriteError, refusal, replace_file
from rlhf_fast.training.folder import (
    CONFIG_FILE,
    DATA,
    SUMMARY_FILE,
    check_folder,
    claim_folder,
    forget_replaced,
    saving,
    take_folder,
    write_rows,
)
from rlhf_fast.training.halving import TO_SET, is_out_of_memory
from rlhf_fast.training.inputs import inputs_of
from rlhf_fast.training.job import Job, seed_everything
from rlhf_fast.training.optim import check_progress
from rlhf_fast.training.report import print_report
from rlhf_fast.training.rounds import (
    Planned,
    in_its_round,
    planned,
    record_rounds,
    references,
    rounds_table,
    with_references,
)
from rlhf_fast.training.run import Run, write_summary


@dataclass(frozen=True)
class Stage:
    """One algorithm with its config. `name` is "" when it is the whole run."""

    name: str
    module: ModuleType
    config: Any
    aliases: list[str] = field(default_factory=list)
    plan: Planned = field(default_factory=lambda: Planned("", "", {}))

    def say_aliases(self, console: Console) -> None:
        """One line for the names of other trainers, and the keys that they were taken for."""
        if self.aliases:
            console.print(Text(f"{self.name or self.config.algorithm}: {', '.join(self.aliases)}"), soft_wrap=True)


def launch(path: str | None, overrides: dict[str, Any], *, dry_run: bool, resume: str | None, overwrite: bool) -> None:
    """Run what the file `path` and the flags `overrides` describe. Every mistake of the user is a UserError."""
    quiet_libraries()
    hub_logging.set_verbosity_error()  # it tells of every retry; what fails in the end is one line of ours
    forget()
    if ranks.started_again():
        resume, overwrite = resume or "auto", False
    # Outside too: a signal may come while the processes find each other, or part.
    with signals.listening(), _stopping(), ranks.processes(), _stopping():
        launch_here(path, overrides, dry_run=dry_run, resume=resume, overwrite=overwrite)


@contextmanager
def _stopping() -> Iterator[None]:
    """A signal that ends what is inside is one line."""
    try:
        yield
    except signals.Interrupted as signal:
        raise signals.Stopped.by(signal, "while getting ready", "saved: what was finished") from None


def launch_here(
    path: str | None, overrides: dict[str, Any], *, dry_run: bool, resume: str | None, overwrite: bool
) -> None:
    """The part of this process in `launch`."""
    values = read_yaml(path) if path else {}
    if path is None and resume not in (None, "auto"):
        values, overrides = _of_run(Path(resume), overrides)
    console = Console(markup=False, emoji=False)  # names in brackets are names
    read = [Path(path)] if path else []
    if "stages" not in values:
        stage = single_stage(values, overrides)
        stage.say_aliases(console)
        inputs = [*read, *inputs_of(stage.config)]
        ranks.from_first(lambda: check_folder(
            Path(stage.config.output_dir), resume=resume is not None, overwrite=overwrite, inputs=inputs
        ))  # fmt: skip
        if dry_run:
            print_plan(console, stage, prepare(stage))
        else:
            run_stage(console, stage, resume=resume, overwrite=overwrite)
        return
    stages = all_stages(values, overrides)
    for stage in stages:
        if stage.plan.round < 2:
            stage.say_aliases(console)
    names = [stage.name for stage in stages]
    folder = Path(stages[0].config.output_dir).parents[stages[0].name.count("/")]
    for stage in stages:
        if not Path(stage.config.output_dir).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"stage {stage.name}: {stage.config.output_dir} is a link out of output_dir {folder}")
    read += [place for stage in stages for place in inputs_of(stage.config)]
    if resume not in (None, "auto") and Path(resume).resolve() != folder.resolve():
        raise UserError(f"--resume {resume}: a run of stages goes on in its own folder, {folder}: say --resume auto")
    ranks.from_first(lambda: check_folder(folder, resume=resume is not None, overwrite=overwrite, inputs=read))
    if resume is not None:
        ranks.from_first(lambda: _check_finished(stages))
    check_stages(console, stages, dry_run=dry_run)
    if dry_run:
        return
    with ExitStack() as held:

        def take() -> None:
            lock = take_folder(folder, resume=resume is not None, overwrite=overwrite, inputs=read)
            held.callback(lock.release)
            claim_folder(folder, {**values, **overrides}, resume=resume is not None, overwrite=overwrite, stages=names)

        ranks.from_first(take)
        for stage in stages:
            if resume is not None and ranks.from_first(partial(_is_finished, stage)):
                console.print(f"{stage.name}: finished before")
                continue
            run_stage(console, resolved(stage, stages), resume=resume and "auto", overwrite=False, whole=folder)
            if stage.plan.round and stage.plan.own == stage.plan.block[-1]:
                console.print(rounds_table(ranks.from_first(lambda: record_rounds(folder, [s.plan for s in stages]))))


def _is_finished(stage: Stage) -> bool:
    """Whether the stage has made all the steps that it is to make."""
    folder, config = Path(stage.config.output_dir), stage.config
    if not (folder / SUMMARY_FILE).is_file() or not (folder / CONFIG_FILE).is_file():
        return (folder / SUMMARY_FILE).is_file()
    key = "steps" if config.epochs is None else "epochs"
    made = read_yaml(folder / CONFIG_FILE).get(key)
    return not isinstance(made, (int, float)) or made >= getattr(config, key)


def _check_finished(stages: list[Stage]) -> None:
    """UserError where a stage that is finished was made of one that is to go on, and would stay as it is."""
    changing = {stage.name for stage in stages if not _is_finished(stage)}
    first, stale = "", []
    for stage in stages:
        made_of = [reference.stage for _, reference in references(stage.config) if reference.stage in changing]
        if made_of and stage.name not in changing and not stage.config.allow_changed_inputs:
            first = first or made_of[0]
            stale.append(stage)
            changing.add(stage.name)
    if stale:
        names = " and ".join(stage.name for stage in stale)
        folders = " and ".join(stage.config.output_dir for stage in stale)
        raise UserError(f"{first} is to go on, but {names}, made of it, finished before: remove {folders} to make that "
                        "anew, or keep what is there by allow_changed_inputs: true")  # fmt: skip


def _of_run(place: Path, overrides: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys and the flags of the run in the folder `place`, or of the one whose checkpoint that is, to go on there
    unless a flag says elsewhere."""
    folder = next((path for path in (place, *place.absolute().parents[:2]) if (path / CONFIG_FILE).is_file()), None)
    if folder is None:
        raise UserError(f"--resume {place}: no run is there; it has no {CONFIG_FILE}")
    saved = read_yaml(folder / CONFIG_FILE)
    flags = {key: value for key, value in saved.items() if "." in key}  # of single stages
    keys = {key: value for key, value in saved.items() if key not in flags}
    return {**keys, "output_dir": str(folder)}, {**flags, **overrides}


def check_stages(console: Console, stages: list[Stage], *, dry_run: bool) -> None:
    """Prepare every stage once before the first one runs: a typing error in the last must not cost the others.

    Later rounds do what the second does. Where an earlier stage has yet to make a model, the one that it starts from
    stands for it, and rows like those that it will write for its data. dry_run: print what would run.
    """
    with tempfile.TemporaryDirectory() as place:
        for stage in stages:
            if stage.plan.round > 2:
                if dry_run:
                    console.print(f"{stage.name}: as {stage.plan.own} of round 2")
                continue
            job = prepare(on_its_first_model(stage, stages, Path(place)))
            if "data" in stage.config.gives:
                target = Path(place) / stage.name
                target.mkdir(parents=True)
                write_rows(target, 0, stage.module.example_rows(job, stage.config))
            if dry_run:
                print_plan(console, stage, job)


def single_stage(*layers: dict[str, Any]) -> Stage:
    """The stage of a run without `stages`, later layers above; the algorithm is inferred from the data where that is
    unambiguous."""
    values = folded(merged(Config, None, *layers)[0])
    if "algorithm" not in values:
        if not isinstance(values.get("data"), str):
            raise UserError("missing key 'algorithm' (or 'data', from whose columns it could be inferred)")
        columns = values.get("columns") or {}
        if not isinstance(columns, dict) or not all(isinstance(name, str) for name in columns.values()):
            raise UserError(f"columns must map our names to those of the data, {{prompt: question}}, got {columns!r}")
        rows = rename_columns(read_rows(values["data"])[:1], columns)
        values["algorithm"] = infer_algorithm(rows, values["data"])
    algorithm = values["algorithm"]
    module = load_algorithm(algorithm)
    values, aliases = merged(module.AlgorithmConfig, algorithm, ALGORITHMS[algorithm].defaults, *layers)
    return Stage("", module, parse(module.AlgorithmConfig, {**values, "algorithm": algorithm}), aliases)


def all_stages(values: dict[str, Any], overrides: dict[str, Any]) -> list[Stage]:
    """The stages of a pipeline: shared keys, then the stage's own, then flags (`key` for all, `stage.key` for one)."""
    plans = planned({**values, **{key: overrides[key] for key in ("repeat",) if key in overrides}})
    top, _ = merged(Config, None, values, overrides)
    folder = top.get("output_dir", "run")
    if not isinstance(folder, str):
        raise UserError(f"output_dir: Input should be a valid string, got {short(folder)}")
    shared, flags = ({k: v for k, v in layer.items() if k not in ("stages", "repeat", "output_dir", "save_path")}
                     for layer in (values, overrides))  # fmt: skip
    modules = [load_algorithm(plan.values["algorithm"]) for plan in plans]
    _check_keys(plans, modules, [*shared, *flags])
    stages = []
    for plan, module in zip(plans, modules, strict=True):
        config_class, algorithm, prefix = module.AlgorithmConfig, plan.values["algorithm"], f"{plan.own}."
        layers = [
            ALGORITHMS[algorithm].defaults,
            {key: value for key, value in shared.items() if means_something(key, config_class, algorithm)},
            {key: value for key, value in plan.values.items() if key != "name"},
            {key: value for key, value in flags.items() if means_something(key, config_class, algorithm)},
            {key.removeprefix(prefix): value for key, value in flags.items() if key.startswith(prefix)},
        ]
        of_stage, aliases = merged(config_class, algorithm, *layers)
        if "output_dir" in of_stage:
            raise UserError(
                f"stage {plan.own}: output_dir {short(of_stage['output_dir'])}: a stage's folder is its name"
            )
        of_stage["output_dir"] = str(Path(folder) / plan.name)
        config = in_its_round(parse(config_class, of_stage, where=f"stage {plan.own}: "), plan, plans)
        stages.append(Stage(plan.name, module, config, aliases, plan))
    given = {stage.name: stage.config.gives for stage in stages}
    for stage in stages:
        for key, reference in references(stage.config):
            wanted = "data" if key == "data" else "model"
            if wanted not in given[reference.stage]:
                raise UserError(f"stage {stage.plan.own}: {key}: {{from: {reference.stage}}} makes no {wanted}")
    return stages


def _check_keys(plans: list[Planned], modules: list[ModuleType], given: list[str]) -> None:
    """UserError for a shared key or a flag that means nothing to any stage."""
    known: set[str] = set()
    for plan, module in zip(plans, modules, strict=True):
        keys, own = keys_of(module.AlgorithmConfig), {key: key.removeprefix(f"{plan.own}.") for key in given}
        known |= {*keys, *(f"{plan.own}.{key}" for key in keys)}
        known |= {key for key in given if means_something(own[key], module.AlgorithmConfig, plan.values["algorithm"])}
    for key in given:
        if key not in known:
            raise UserError(unknown_key(key, known))


def resolved(stage: Stage, stages: list[Stage]) -> Stage:
    """The stage with every `{from: NAME}` replaced by that stage's folder, or the folder of its data."""
    folders = {s.name: Path(s.config.output_dir) for s in stages}

    def resolve(key: str, reference: FromStage) -> list[str]:
        folder = folders[reference.stage]
        return [str(folder / DATA if key == "data" else folder)]

    return replace(stage, config=with_references(stage.config, resolve))


def on_its_first_model(stage: Stage, stages: list[Stage], place: Path) -> Stage:
    """The stage on the model that its chain of stages starts from, and on the rows in `place` that stand for those of
    earlier stages, so that it can be checked before they ran."""
    configs: dict[str, Config] = {s.name: s.config for s in stages}

    def stand_in(key: str, reference: FromStage) -> list[Any]:
        if key == "data":
            return [str(place / reference.stage / DATA)]
        if key == "model":
            model = configs[reference.stage].model
            return stand_in(key, model) if isinstance(model, FromStage) else [model]
        return [{"judge.by": "backbone", "judge.adapter": None}.get(key, reference)]

    return replace(stage, config=with_references(stage.config, stand_in))


def prepare(stage: Stage) -> Job:
    seed_everything(stage.config.seed)
    specs = [spec for key in ("reward", "cost") for spec in listed(getattr(stage.config, key, None))]
    with begun(spec for spec in specs if isinstance(spec, str) and is_function(spec)):
        return stage.module.prepare(stage.config)


def run_stage(
    console: Console, stage: Stage, *, resume: str | None, overwrite: bool, whole: Path | None = None
) -> None:
    """Prepare, evaluate, train, evaluate, save, report. whole: the folder of the run that has the stage."""
    if ranks.world() > 1 and not stage.config.divides:
        if stage.config.shards > 1:
            raise UserError(f"{stage.config.algorithm} is the work of one process: shards is {stage.config.shards}")
        say(f"{stage.name or stage.config.algorithm}: the first of {ranks.world()} processes works alone")
        ranks.first_alone(lambda: run_stage(console, stage, resume=resume, overwrite=overwrite, whole=whole))
        return
    job = prepare(stage)
    config = memory_plan.fitted(job, stage.config.for_data(len(job.train)))
    module, folder = stage.module, Path(stage.config.output_dir)
    with Run(config, job, resume=resume, overwrite=overwrite, evaluate=module.evaluate, whole=whole) as run:
        try:
            if run.start == 0:
                run.evaluate(0)
            module.train(job, config, run)
            check_progress(job)
            run.evaluate(config.steps)
            with saving(folder) as place:
                module.save(job, config, place)
                # Beside the adapter too, so that the folder is enough to use it, wherever it is.
                job.encoder.tokenizer.save_pretrained(place)
            ranks.from_first(lambda: write_summary(folder))
            ranks.from_first(lambda: forget_replaced(run.whole))
            run.progress.stop()
            ranks.from_first(lambda: print_report(console, stage.name or config.algorithm, folder))
        except UserError as error:
            said = run.rescue(error)
            if error.__cause__ is not None:
                said = _with_log(folder / "error.log", error.__cause__) + said
            raise UserError(f"{error}{said}") from None
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"out of memory: {TO_SET}, or rollout_rows; {first_line(error)}{run.rescue(error)}"
            ) from None
        except (OSError, SafetensorError) as error:
            refused = getattr(error, "filename", None) or folder
            raise UserError(f"{refused}: {refusal(error) or first_line(error)}{run.rescue(error)}") from None


def _with_log(path: Path, error: BaseException) -> str:
    """Where the traceback is; where it cannot be written, that."""
    try:
        replace_file(path, "".join(traceback.format_exception(error)))
    except WriteError as refused:
        return f"; {refused}"
    return f"; traceback in {path}"


def print_plan(console: Console, stage: Stage, job: Job) -> None:
    """What would run, and the memory that it takes."""
    config = stage.config.for_data(len(job.train))
    sources = [reference.stage for key, reference in references(stage.config) if key == "data"]
    examples = f"the examples of {', '.join(sources)}" if sources else f"{len(job.train)} examples"
    console.print(f"{stage.name or config.algorithm}: {examples}, {len(job.held_out)} held out, "
                  f"{config.steps} steps of {config.batch_size}, into {config.output_dir}")  # fmt: skip
    memory_plan.print_plan(console, job, config)
    console.print(core_yaml.dump(config.model_dump(mode="json", by_alias=True)))
