"""Whose a run folder is: how a run takes it, continues in it, and replaces an earlier run.

A file of its own, MARKER, says that a folder is a run's and what was saved into it. Only what a run made is moved or
removed. The run that another one replaces waits in the folder REPLACED, whole, until that one has a checkpoint:

1. The files of the earlier run move to REPLACED one by one, its marker last.
2. The marker of the new run is written, then its config.
3. With the first checkpoint REPLACED becomes REMOVED, and goes.

So a folder that was left between 1 and 2, or inside of 1, holds the earlier run, and `--resume` brings it back.
"""

import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rlhf_fast.data.reading import read_jsonl
from rlhf_fast.errors import UserError
from rlhf_fast.training import core_yaml, ranks
from rlhf_fast.training.checkpoint import ASIDE, MANIFEST, STATE, list_checkpoints
from rlhf_fast.training.config import read_yaml
from rlhf_fast.training.files import flush, replace_file, staged, writing
from rlhf_fast.training.lock import LOCK, FolderLock

MARKER = ".rlhf_fast_run"
REPLACED, REMOVED, SAVING = ".rlhf_fast_replaced", ".rlhf_fast_removed", ".rlhf_fast_saving"
CONFIG_FILE = "config.yaml"
INPUTS_FILE = "inputs.json"
SUMMARY_FILE = "summary.json"  # its presence says that the run finished
REFERENCE_FILE = "reference_logprobs.jsonl"
RECORDS = ("metrics.jsonl", "samples.jsonl", "eval.jsonl", "warnings.jsonl")
DATA = "data"  # the folder of rows that a run writes, a file for each of its steps
DROPPED = "dropped"  # rows that it made and left out
KEPT = "kept"  # the folder of what steps have made that no checkpoint has yet
# What every run writes besides what it saves at its end, which the marker lists.
_WHOLE = (
    CONFIG_FILE, INPUTS_FILE, *RECORDS, "self_test.json", SUMMARY_FILE, "rounds.jsonl", "curves.png", "frontier.png",
    REFERENCE_FILE, "best/best.json", f"{DATA}/step-*.jsonl", f"{DROPPED}/step-*.jsonl",
)  # fmt: skip
FILES = (
    *_WHOLE, *(str(staged(Path(name))) for name in (*_WHOLE, MARKER)), "error.log", "best/adapter_*", "best/.new/*",
    f"{KEPT}/step-*/*.pt", "tensorboard/events.out.tfevents*", f"{SAVING}/**/*",
    *(f"checkpoints/{step}/{name}" for step in ("step-*", ".step-*.tmp", ".step-*.old", f"{ASIDE}/step-*")
      for name in (STATE, MANIFEST)),
)  # fmt: skip
# The folders of these, of which a kill may leave empty ones.
FOLDERS = (
    SAVING, "checkpoints/.step-*", f"checkpoints/{ASIDE}", "checkpoints", "best/.new", "best", "tensorboard", DATA,
    DROPPED, f"{KEPT}/step-*", KEPT,
)  # fmt: skip
# What may differ between a run and its continuation.
FREE_KEYS = {
    "steps", "epochs", "eval_every", "log_every", "save_every", "save_minutes", "keep_checkpoints", "report_to",
    "output_dir", "micro_batch_size", "padding_free", "repeat", "self_test", "allow_changed_inputs", "shards",
    "whole_rollouts", "data_cache", "memory", "head_chunk_tokens", "rollout_rows",
}  # fmt: skip


def check_folder(
    folder: Path, *, resume: bool, overwrite: bool, inputs: Iterable[Path] = (), stage: bool = False
) -> None:
    """UserError when a run that reads `inputs` may not use `folder`. Touches nothing.

    stage: it is one of a run whose folder was taken; what no run made may lie in it.
    """
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"output_dir {folder}: {there} " + ("cannot be written" if there.is_dir() else "is a file"))
    if _is_free(folder) or (stage and not (folder / MARKER).is_file()):
        return
    if not resume and not overwrite:
        raise UserError(
            f"output_dir {folder} is not empty: continue with --resume auto, replace it with --overwrite, "
            "or choose another output_dir"
        )
    if overwrite:
        _check_replaceable(folder, inputs)
    elif not any((folder / name).is_file() for name in (CONFIG_FILE, MARKER, f"{REPLACED}/{MARKER}")):
        raise UserError(f"output_dir {folder} has no {CONFIG_FILE}, so it is no run folder; it is left as it is")


def _is_free(folder: Path) -> bool:
    """Whether nothing is in the folder but what a run leaves that was killed before it had a marker."""
    left = {LOCK, REMOVED, staged(Path(MARKER)).name}
    return not folder.exists() or all(path.name in left for path in folder.iterdir())


def _check_replaceable(folder: Path, inputs: Iterable[Path]) -> None:
    """UserError unless `folder` is a run's, and neither a place of the user's nor one that this run reads from."""
    real = folder.resolve()
    for place, what in ((Path.cwd(), "the working directory"), (Path.home(), "the home directory")):
        if place.resolve().is_relative_to(real):
            raise UserError(f"output_dir {folder} is {what} or a folder above it: --overwrite does not replace that")
    for path in inputs:
        if os.path.exists(path) and (path.resolve().is_relative_to(real) or real.is_relative_to(path.resolve())):
            raise UserError(f"output_dir {folder} holds, or lies in, {path}, which this run reads: choose another one")
    if not (folder / MARKER).is_file() and not (folder / REPLACED / MARKER).is_file():
        raise UserError(
            f"output_dir {folder} has no {MARKER}, so it is no run folder, or one of an earlier version; it is left as "
            "it is: remove it yourself, or choose another output_dir"
        )
    for place in (folder, folder / REPLACED):
        if (place / MARKER).is_file():
            _read_marker(place)


def take_folder(
    folder: Path, *, resume: bool, overwrite: bool, inputs: Iterable[Path] = (), stage: bool = False
) -> FolderLock:
    """Lock the folder for a run, and bring back an earlier one that was about to be replaced where this one resumes.

    UserError where the run may not use it.
    """
    check_folder(folder, resume=resume, overwrite=overwrite, inputs=inputs, stage=stage)
    lock = FolderLock(folder)
    try:
        # By now it may be another's.
        check_folder(folder, resume=resume, overwrite=overwrite, inputs=inputs, stage=stage)
        with writing(folder):
            shutil.rmtree(folder / REMOVED, ignore_errors=True)
            if resume:
                bring_back(folder)
    except BaseException:
        lock.release()
        raise
    return lock


def claim_folder(
    folder: Path,
    values: dict[str, Any],
    *,
    resume: bool,
    overwrite: bool,
    stages: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> str:
    """Make `folder`, which was taken, hold this run: with `overwrite` an earlier one is put into REPLACED, with
    `resume` it is compared by config. Returns the id of the run.

    stages: the folders in it that are those of the run's stages. defaults: of the keys, for a config that lacks some.
    """
    path = folder / CONFIG_FILE
    if resume and path.is_file():
        check_same(read_yaml(path), values, path, defaults or {})
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            put_away(folder)
        marker = _read_marker(folder) if (folder / MARKER).is_file() else {}
        run = marker.get("run") or uuid.uuid4().hex
        _write_marker(folder, {"rlhf_fast": version("rlhf_fast"), "algorithm": values.get("algorithm"), "run": run,
                               "stages": list(stages), "saved": marker.get("saved", [])})  # fmt: skip
        replace_file(path, core_yaml.dump(values))
        if _has_work(folder):
            forget_replaced(folder)
    return run


def id_of_run(folder: Path) -> str:
    """The id of the run in `folder`; nothing where there is none, or one of an earlier version."""
    return _read_marker(folder).get("run", "") if (folder / MARKER).is_file() else ""


def check_same(old: dict[str, Any], new: dict[str, Any], path: Path, defaults: Mapping[str, Any]) -> None:
    """UserError where a run with the keys `new` is not the one of the file `path`, which has `old`."""
    for key in sorted({*old, *new}):
        added = key not in old and key in defaults and new[key] == defaults[key]  # by a later version
        if key.rpartition(".")[2] in FREE_KEYS or added:
            continue
        if old.get(key) != new.get(key):
            waits = path.parent / REPLACED
            there = f"; the run that it replaced is in {waits}" if (waits / MARKER).is_file() else ""
            raise UserError(f"cannot resume: {key} is {new.get(key)!r}, but {path} has {old.get(key)!r}{there}")


def _has_work(folder: Path) -> bool:
    """Whether the run in `folder`, or one of its stages, has a checkpoint or is finished."""
    places = [folder, *(folder / name for name in _read_marker(folder)["stages"])]
    return any((place / SUMMARY_FILE).is_file() or list_checkpoints(place / "checkpoints") for place in places)


def put_away(folder: Path) -> None:
    """Move the run in `folder`, its stages included, into REPLACED. Files that no run made stay, and stderr names them.

    A run that has neither a checkpoint nor an end is removed, where another one waits there.
    """
    place = folder / REPLACED
    if (folder / MARKER).is_file() and (place / MARKER).is_file():
        if _has_work(folder):
            forget_replaced(folder)
        else:
            _remove_files(folder)
    locks = _stage_locks(folder)
    if (folder / MARKER).is_file():
        for path in run_files(folder):
            _move(path, folder, place)
        flush(place)
    for stage, lock in locks.items():
        lock.release(remove=True)
        _drop_empty(stage, folder)
    for path in (path for name in FOLDERS for path in folder.glob(name)):
        if path.is_dir() and not _linked(path, folder):
            _drop_empty(path, folder)
    ours = {LOCK, REPLACED, REMOVED, staged(Path(MARKER)).name}
    left = sorted(path.name for path in folder.iterdir() if path.name not in ours)
    if left:
        print(f"left in {folder}, because no run made it: {', '.join(left[:5])}", file=sys.stderr)


def bring_back(folder: Path) -> None:
    """Move the run in REPLACED back into `folder`, unless another one has taken its place."""
    place = folder / REPLACED
    if not place.is_dir() or place.is_symlink():
        return
    if (place / MARKER).is_file():
        if (folder / MARKER).is_file() and (folder / CONFIG_FILE).is_file():
            return
        if (folder / MARKER).is_file():
            _remove_files(folder)
        _move(place / MARKER, place, folder)  # first: from here on it is not whole there
    for path in sorted(place.rglob("*")):
        if path.is_file() or path.is_symlink():
            _move(path, place, folder)
    shutil.rmtree(place)


def forget_replaced(folder: Path) -> None:
    """Remove the run that waits in REPLACED: the new one has a checkpoint."""
    place = folder / REPLACED
    if (place / MARKER).is_file() and not place.is_symlink():
        shutil.rmtree(folder / REMOVED, ignore_errors=True)
        os.replace(place, folder / REMOVED)  # so that half of it is never taken for a run
        shutil.rmtree(folder / REMOVED, ignore_errors=True)


def replaced_by(folder: Path) -> str:
    """Where the run is that the one in `folder` would replace with its first checkpoint, for an error; or nothing."""
    waits = folder / REPLACED
    return f"; the run that it was to replace is in {waits}" if (waits / MARKER).is_file() else ""


def run_files(folder: Path) -> list[Path]:
    """Every file that the run in `folder` made, those of its stages before its own, a marker behind all that it says.

    Behind links nothing is a run's.
    """
    marker, found = _read_marker(folder), []
    for name in marker["stages"]:
        if (folder / name / MARKER).is_file() and not _linked(folder / name, folder):
            waits = [path for place in (REPLACED, REMOVED) for path in (folder / name / place).rglob("*")]
            found += [path for path in waits if path.is_file() and not _linked(path.parent, folder)]
            found += run_files(folder / name)
    names = [folder / name for name in marker["saved"]] + [path for name in FILES for path in folder.glob(name)]
    # The config first: a marker without one is a run that is being removed.
    own = sorted({path for path in names if os.path.lexists(path)}, key=lambda path: (path.name != CONFIG_FILE, path))
    own = [path for path in own if not _linked(path.parent, folder) and (path.is_symlink() or not path.is_dir())]
    return [*found, *own, folder / MARKER]


def _linked(path: Path, folder: Path) -> bool:
    """Whether one reaches `path` from `folder` through a link."""
    return any(place.is_symlink() for place in (path, *path.parents) if place != folder and folder in place.parents)


def _remove_files(folder: Path) -> None:
    for path in run_files(folder):
        path.unlink(missing_ok=True)
        _drop_empty(path.parent, folder)


def _move(path: Path, source: Path, target: Path) -> None:
    new = target / path.relative_to(source)
    new.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, new)
    _drop_empty(path.parent, source)


def _drop_empty(place: Path, above: Path) -> None:
    """Remove the folders from `place` up to that below `above` that hold nothing any more."""
    while place != above and not any(place.iterdir()):
        place.rmdir()
        place = place.parent


def _stage_locks(folder: Path) -> dict[Path, FolderLock]:
    """The folders of the stages that are, or were, in `folder`, locked. UserError where another process has one."""
    markers = [place for place in (folder, folder / REPLACED) if (place / MARKER).is_file()]
    stages = {folder / name for place in markers for name in _read_marker(place)["stages"]}
    return {stage: FolderLock(stage) for stage in sorted(stages) if stage.is_dir() and not _linked(stage, folder)}


@contextmanager
def saving(folder: Path) -> Iterator[Path]:
    """Where to write what the run saves at its end: all of it comes into `folder` when it is whole, and is noted in the
    marker before it does."""
    with writing(folder), ranks.place_to_save(folder / SAVING) as place:
        if not ranks.is_first():
            yield place
            return
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        yield place
        names = sorted(_files(place))
        marker = _read_marker(folder)
        _write_marker(folder, {**marker, "saved": sorted({*marker["saved"], *names})})
        for name in names:
            flush(place / name)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(place / name, folder / name)
        shutil.rmtree(place)
        flush(folder)


def step_file(folder: Path, step: int, name: str = DATA) -> Path:
    """Where `write_rows` puts the rows of a step (from 0)."""
    return folder / name / f"step-{step + 1:06d}.jsonl"


def write_rows(folder: Path, step: int, rows: Iterable[dict[str, Any]], name: str = DATA) -> None:
    """The rows that a step (from 0) of the run in `folder` made, in a file of their own, which the same step replaces
    when it is done again after a kill."""
    path = step_file(folder, step, name)
    with writing(path):
        path.parent.mkdir(exist_ok=True)
    replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


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
        strange = [name for name in names if not _is_below(name)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error!r}); {folder} is left as it is") from None
    if strange:
        raise UserError(f"{path} names {strange[0]!r}, which is not in that folder; it is left as it is")
    return marker


def _is_below(name: str) -> bool:
    """Whether the name is of something in the folder that it is looked for in."""
    path = Path(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _write_marker(folder: Path, marker: dict[str, Any]) -> None:
    replace_file(folder / MARKER, json.dumps(marker, indent=1) + "\n")
