"""From a YAML file and flags to finished runs: one algorithm, or `stages` in order.

All of it is checked before anything is written.
"""

import os
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from huggingface_hub.utils import logging as hub_logging
from rich.console import Console
from rich.table import Table

from rlhf_fast.algorithms import load_algorithm
from rlhf_fast.data.encoding import quiet_libraries
from rlhf_fast.data.layouts import infer_algorithm, rename_columns
from rlhf_fast.data.notes import forget
from rlhf_fast.data.sources import read_rows
from rlhf_fast.errors import UserError
from rlhf_fast.training.config import Config, FromStage, field_of, fold_columns, parse, read_yaml, unknown_key
from rlhf_fast.training.job import Job, seed_everything
from rlhf_fast.training.report import print_report
from rlhf_fast.training.run import Run, check_folder, claim_folder, write_summary

REFERRING_KEYS = ("model", "reward")


@dataclass(frozen=True)
class Stage:
    """One algorithm with its config. `name` is "" when it is the whole run."""

    name: str
    module: ModuleType
    config: Any


def launch(path: str | None, overrides: dict[str, Any], *, dry_run: bool, resume: str | None, overwrite: bool) -> None:
    """Run what the file `path` and the flags `overrides` describe. Every mistake of the user is a UserError."""
    quiet_libraries()
    hub_logging.set_verbosity_error()  # it tells of every retry; what fails in the end is one line of ours
    forget()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("training runs in one process so far; start it without torchrun or accelerate launch")
    values = read_yaml(path) if path else {}
    console = Console()
    if "stages" not in values:
        stage = single_stage({**values, **overrides})
        check_folder(Path(stage.config.output_dir), resume=resume is not None, overwrite=overwrite)
        if dry_run:
            print_plan(console, stage, prepare(stage))
        else:
            run_stage(console, stage, resume=resume, overwrite=overwrite)
        return
    stages = all_stages(values, overrides)
    folder = Path(overrides.get("output_dir", values.get("output_dir", "run")))
    check_folder(folder, resume=resume is not None, overwrite=overwrite)
    # Every stage is prepared once before the first one runs: a typing error in the last must not cost the others.
    for stage in stages:
        job = prepare(before_its_time(stage, stages))
        if dry_run:
            print_plan(console, stage, job)
    if dry_run:
        return
    claim_folder(folder, {**values, **overrides}, resume=resume is not None, overwrite=overwrite)
    for stage in stages:
        if resume is not None and (Path(stage.config.output_dir) / "summary.json").is_file():
            console.print(f"{stage.name}: finished before")
            continue
        run_stage(console, resolved(stage, stages), resume=resume and "auto", overwrite=False)


def single_stage(values: dict[str, Any]) -> Stage:
    """The stage of a run without `stages`; the algorithm is inferred from the data where that is unambiguous."""
    values = fold_columns(values)
    if "algorithm" not in values:
        if not isinstance(values.get("data"), str):
            raise UserError("missing key 'algorithm' (or 'data', from whose columns it could be inferred)")
        columns = values.get("columns") or {}
        if not isinstance(columns, dict) or not all(isinstance(name, str) for name in columns.values()):
            raise UserError(f"columns must map our names to those of the data, {{prompt: question}}, got {columns!r}")
        rows = rename_columns(read_rows(values["data"]), columns)
        values = {**values, "algorithm": infer_algorithm(rows, values["data"])}
    module = load_algorithm(values["algorithm"])
    return Stage("", module, parse(module.AlgorithmConfig, values))


def all_stages(values: dict[str, Any], overrides: dict[str, Any]) -> list[Stage]:
    """The stages of a pipeline: shared keys, then the stage's own, then flags (`key` for all, `stage.key` for one)."""
    listed = values["stages"]
    if not isinstance(listed, list) or not all(isinstance(s, dict) and "algorithm" in s for s in listed) or not listed:
        raise UserError("stages must be a list of mappings, each with an algorithm")
    names = [str(s.get("name", s["algorithm"])) for s in listed]
    if len(set(names)) < len(names):
        raise UserError(f"stages need different names, got {', '.join(names)}; give them a `name`")
    shared = {key: value for key, value in values.items() if key not in ("stages", "output_dir")}
    flags = {key: value for key, value in overrides.items() if key != "output_dir"}
    folder = overrides.get("output_dir", values.get("output_dir", "run"))
    modules = [load_algorithm(s["algorithm"]) for s in listed]
    known = {key for module in modules for key in module.AlgorithmConfig.model_fields}
    known |= {f"{name}.{key}" for name, m in zip(names, modules, strict=True) for key in m.AlgorithmConfig.model_fields}
    for key in [*shared, *flags]:
        place, dot, own_key = key.partition(".")
        if key not in known and field_of(key) not in known and f"{place}{dot}{field_of(own_key)}" not in known:
            raise UserError(unknown_key(key, known))
    stages = []
    for name, module, own in zip(names, modules, listed, strict=True):
        fields = module.AlgorithmConfig.model_fields
        merged = {key: value for key, value in shared.items() if field_of(key) in fields}
        merged |= {key: value for key, value in own.items() if key != "name"}
        merged |= {key: value for key, value in flags.items() if field_of(key) in fields}
        prefix = f"{name}."
        merged |= {key.removeprefix(prefix): value for key, value in flags.items() if key.startswith(prefix)}
        merged["output_dir"] = str(Path(folder) / name)
        stages.append(Stage(name, module, parse(module.AlgorithmConfig, merged, where=f"stage {name}: ")))
        for reference in _references(stages[-1].config):
            if reference not in names[: len(stages) - 1]:
                raise UserError(f"stage {name}: from: {reference} is no earlier stage")
    return stages


def resolved(stage: Stage, stages: list[Stage]) -> Stage:
    """The stage with every `{from: NAME}` replaced by that stage's folder."""
    folders = {s.name: s.config.output_dir for s in stages}

    def resolve(value: Any) -> Any:
        if isinstance(value, list):
            return [resolve(item) for item in value]
        return folders[value.stage] if isinstance(value, FromStage) else value

    changes = {key: resolve(getattr(stage.config, key, None)) for key in REFERRING_KEYS if hasattr(stage.config, key)}
    return Stage(stage.name, stage.module, stage.config.model_copy(update=changes))


def before_its_time(stage: Stage, stages: list[Stage]) -> Stage:
    """The stage on the model that its chain of stages starts from, so that it can be checked before they ran."""
    configs: dict[str, Config] = {s.name: s.config for s in stages}
    model = stage.config.model
    while isinstance(model, FromStage):
        model = configs[model.stage].model
    return Stage(stage.name, stage.module, stage.config.model_copy(update={"model": model}))


def _references(config: Config) -> list[str]:
    values = [getattr(config, key, None) for key in REFERRING_KEYS]
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return [item.stage for item in flat if isinstance(item, FromStage)]


def prepare(stage: Stage) -> Job:
    seed_everything(stage.config.seed)
    return stage.module.prepare(stage.config)


def run_stage(console: Console, stage: Stage, *, resume: str | None, overwrite: bool) -> None:
    """Prepare, evaluate, train, evaluate, save, report."""
    module, config, folder = stage.module, stage.config, Path(stage.config.output_dir)
    job = prepare(stage)
    with Run(config, job, resume=resume, overwrite=overwrite) as run:
        try:
            if run.start == 0:
                run.evaluation(0, module.evaluate(job, config))
            module.train(job, config, run)
            run.evaluation(config.steps, module.evaluate(job, config))
            module.save(job, config, folder)
            write_summary(folder)
        except UserError as error:
            if error.__cause__ is not None:
                text = "".join(traceback.format_exception(error.__cause__))
                (folder / "error.log").write_text(text, encoding="utf-8")
                raise UserError(f"{error}; traceback in {folder / 'error.log'}") from None
            raise
    print_report(console, stage.name or config.algorithm, folder)


def print_plan(console: Console, stage: Stage, job: Job) -> None:
    """What would run, and the bytes that stay resident while it does."""
    config = stage.config
    console.print(f"{stage.name or config.algorithm}: {len(job.train)} examples, {len(job.held_out)} held out, "
                  f"{config.steps} steps of {config.batch_size}, into {config.output_dir}")  # fmt: skip
    sizes = job.backbone.bytes()
    for role, optimizer in job.optimizers.items():
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        sizes[f"AdamW:{role}"] = sum(2 * p.numel() * p.element_size() for p in parameters)
    table = Table("resident", "bytes", "of the base")
    table.columns[1].justify = table.columns[2].justify = "right"
    for name, size in [*sizes.items(), ("all", sum(sizes.values()))]:
        table.add_row(name, f"{size:,}", f"{size / sizes['base']:.4f}")
    console.print(table)
    console.print(yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False), markup=False)
