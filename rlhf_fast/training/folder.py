"""Whose a run folder is: how a run takes it, continues in it, and replaces an earlier run.

A file of its own, MARKER, says that a folder is a run's and what was saved into it. Only what a run made is removed.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rlhf_fast.data.reading import read_jsonl
from rlhf_fast.errors import UserError
from rlhf_fast.models.peft_io import CONFIG_NAME
from rlhf_fast.training import core_yaml, ranks
from rlhf_fast.training.config import Config, read_yaml

MARKER = ".rlhf_fast_run"
CONFIG_FILE = "config.yaml"
REFERENCE_FILE = "reference_logprobs.pt"
DATA = "data"  # the folder of rows that a run writes, a file for each of its steps
DROPPED = "dropped"  # rows that it made and left out
# What every run writes besides what it saves at its end, which the marker lists.
FILES = (
    CONFIG_FILE, "metrics.jsonl", "samples.jsonl", "eval.jsonl", "warnings.jsonl", "self_test.json", "summary.json",
    "rounds.jsonl", "curves.png", "frontier.png", "error.log", REFERENCE_FILE, "best/adapter_*", "best/best.json",
    "best/.new/*", "tensorboard/events.out.tfevents*", f"{DATA}/step-*.jsonl", f"{DROPPED}/step-*.jsonl",
    *(f"checkpoints/{step}/{name}" for step in ("step-*", ".step-*.tmp") for name in ("state.pt", "manifest.json")),
)  # fmt: skip
# What may differ between a run and its continuation.
FREE_KEYS = {
    "steps", "epochs", "eval_every", "log_every", "save_every", "keep_checkpoints", "report_to", "output_dir",
    "micro_batch_size", "repeat", "self_test",
}  # fmt: skip


def check_folder(folder: Path, *, resume: bool, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """UserError when a run that reads `inputs` may not use `folder`. Touches nothing."""
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"output_dir {folder}: {there} " + ("cannot be written" if there.is_dir() else "is a file"))
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not resume and not overwrite:
        raise UserError(
            f"output_dir {folder} is not empty: continue with --resume auto, replace it with --overwrite, "
            "or choose another output_dir"
        )
    if overwrite:
        _check_replaceable(folder, inputs)
    elif not (folder / CONFIG_FILE).is_file() and not (folder / MARKER).is_file():
        raise UserError(f"output_dir {folder} has no {CONFIG_FILE}, so it is no run folder; it is left as it is")


def _check_replaceable(folder: Path, inputs: Iterable[Path]) -> None:
    """UserError unless `folder` is a run's, and neither a place of the user's nor one that this run reads from."""
    real = folder.resolve()
    for place, what in ((Path.cwd(), "the working directory"), (Path.home(), "the home directory")):
        if place.resolve().is_relative_to(real):
            raise UserError(f"output_dir {folder} is {what} or a folder above it: --overwrite does not replace that")
    for path in inputs:
        if path.exists() and (path.resolve().is_relative_to(real) or real.is_relative_to(path.resolve())):
            raise UserError(f"output_dir {folder} holds, or lies in, {path}, which this run reads: choose another one")
    if not (folder / MARKER).is_file():
        raise UserError(
            f"output_dir {folder} has no {MARKER}, so it is no run folder, or one of an earlier version; it is left as "
            "it is: remove it yourself, or choose another output_dir"
        )
    _read_marker(folder)


def claim_folder(
    folder: Path,
    values: dict[str, Any],
    *,
    resume: bool,
    overwrite: bool,
    inputs: Iterable[Path] = (),
    stages: Sequence[str] = (),
) -> None:
    """Make `folder` hold this run: an earlier one is removed with `overwrite`, compared by config with `resume`.

    stages: the folders in it that are those of the run's stages.
    """
    check_folder(folder, resume=resume, overwrite=overwrite, inputs=inputs)
    path = folder / CONFIG_FILE
    if resume and path.is_file():
        _check_same(read_yaml(path), values, path)
    try:
        if overwrite and folder.exists():
            remove_run(folder)
        folder.mkdir(parents=True, exist_ok=True)
        saved = _read_marker(folder)["saved"] if (folder / MARKER).is_file() else []
        _write_marker(folder, {"rlhf_fast": version("rlhf_fast"), "algorithm": values.get("algorithm"),
                               "stages": list(stages), "saved": saved})  # fmt: skip
        replace_file(path, core_yaml.dump(values))
    except OSError as error:
        raise UserError(f"output_dir {folder} cannot be written: {error.strerror}") from None


def _check_same(old: dict[str, Any], new: dict[str, Any], path: Path) -> None:
    for key in sorted({*old, *new} - FREE_KEYS):
        if old.get(key) != new.get(key):
            raise UserError(f"cannot resume: {key} is {new.get(key)!r}, but {path} has {old.get(key)!r}")


def remove_run(folder: Path) -> None:
    """Remove the run in `folder`, its stages included. Files that no run made stay, and stderr names them."""
    marker = _read_marker(folder)
    for name in marker["stages"]:
        if (folder / name / MARKER).is_file() and not (folder / name).is_symlink():
            remove_run(folder / name)
    paths = [folder / name for name in marker["saved"]] + [path for name in FILES for path in folder.glob(name)]
    for path in paths:
        path.unlink(missing_ok=True)
    # Last, so that a kill before leaves a folder that is known to be a run's.
    (folder / MARKER).unlink()
    paths += [folder / name / MARKER for name in marker["stages"]]
    places = {place for path in paths for place in path.parents if place.is_relative_to(folder)} - {folder}
    for place in sorted(places, reverse=True):
        if place.is_dir() and not place.is_symlink() and not any(place.iterdir()):
            place.rmdir()
    left = sorted(path.name for path in folder.iterdir())
    if left:
        print(f"left in {folder}, because no run made it: {', '.join(left[:5])}", file=sys.stderr)


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """What appears in `folder` inside is what the run saved, and is noted in its marker."""
    if not ranks.is_first():
        yield
        return
    before = _files(folder)
    yield
    marker = _read_marker(folder)
    marker["saved"] = sorted({*marker["saved"], *(_files(folder) - before)})
    _write_marker(folder, marker)


def inputs_of(config: Config) -> list[Path]:
    """The files and folders that the run reads, and the base models under adapters among them."""
    keys = ("reward", "cost", "ptx_data", "helpful_data", "principles", "teacher")
    judge = getattr(config, "judge", None)
    named = [config.model, config.data, config.eval_data, *(getattr(config, key, None) for key in keys)]
    named += [judge.by, judge.adapter, judge.prompt, judge.principles] if judge is not None else []
    flat = [item for value in named for item in (value if isinstance(value, list) else [value])]
    paths = [Path(item) for item in flat if isinstance(item, str) and item]
    for item in flat:
        place = item.rpartition(":")[0] if isinstance(item, str) else ""
        if place:  # of a function: a file, or a module that is looked for from the working directory
            paths += [Path(place)] if "/" in place else [Path(place), Path(f"{place.replace('.', '/')}.py")]
    return [*paths, *(base for path in paths for base in _base(path))]


def _base(folder: Path) -> list[Path]:
    try:
        name = json.loads((folder / CONFIG_NAME).read_text()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return []  # no adapter, or one that will be refused when it is loaded
    return [Path(name)] if isinstance(name, str) else []


def replace_file(path: Path, text: str) -> None:
    """Give the file another content; a kill leaves the old one or the new one, never a part."""
    staging = path.with_name(f".{path.name}.tmp")
    staging.write_text(text, encoding="utf-8", newline="\n")
    os.replace(staging, path)


def step_file(folder: Path, step: int, name: str = DATA) -> Path:
    """Where `write_rows` puts the rows of a step (from 0)."""
    return folder / name / f"step-{step + 1:06d}.jsonl"


def write_rows(folder: Path, step: int, rows: Iterable[dict[str, Any]], name: str = DATA) -> None:
    """The rows that a step (from 0) of the run in `folder` made, in a file of their own, which the same step replaces
    when it is done again after a kill."""
    (folder / name).mkdir(exist_ok=True)
    replace_file(step_file(folder, step, name), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def written_rows(folder: Path, name: str = DATA, *, steps: int | None = None) -> list[dict[str, Any]]:
    """What `write_rows` wrote, in the order of the steps; only of the first `steps`, where a number is given."""
    return [row for path in sorted((folder / name).glob("step-*.jsonl"))[:steps] for row in read_jsonl(path)]


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def _read_marker(folder: Path) -> dict[str, Any]:
    path = folder / MARKER
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
        names: Sequence[str] = [*marker["stages"], *marker["saved"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); {folder} is left as it is") from None
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{path} names {name!r}, which is not in that folder; it is left as it is")
    return marker


def _write_marker(folder: Path, marker: dict[str, Any]) -> None:
    replace_file(folder / MARKER, json.dumps(marker, indent=1) + "\n")
