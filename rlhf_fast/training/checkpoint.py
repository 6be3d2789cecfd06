"""Checkpoints that are either whole or absent: written beside, flushed, checked, renamed.

step-N/          one checkpoint; a name that is not exactly that is nobody's business here
.step-N.tmp/     one that is being written
.step-N.old/     one that is being removed
aside/step-N/    of steps after the one that the run was resumed from
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from rlhf_fast.errors import UserError, first_line
from rlhf_fast.training.files import WriteError, flush, sha256, writing

ASIDE = "aside"
STATE, MANIFEST = "state.pt", "manifest.json"
_NAME = re.compile(r"step-(0|[1-9]\d{0,17})")
_LEFT = re.compile(r"\.step-\d+\.(tmp|old)")
_whole: dict[Path, tuple[int, int, int]] = {}  # what of a file the system says -> its checksum was right then


def save_checkpoint(
    folder: Path, step: int, state: dict[str, Any], *, keep: int, run: str = "", good: bool = True
) -> Path:
    """Write `folder`/step-N, then remove all but the newest `keep`. A kill at any moment loses nothing older.

    run: the id of the run, whose checkpoints alone are removed. good: no update was just skipped; the newest that is
    good stays, however old. Where the disk is full, those that would be removed afterwards go first.
    """
    try:
        target = _write(folder, step, state, run, good)
    except WriteError:
        old = _superfluous(folder, keep - 1, run)
        if keep < 2 or not old:
            raise
        for path in old:
            with writing(path):
                _remove(path)
        target = _write(folder, step, state, run, good)
    for path in _superfluous(folder, keep, run):
        with writing(path):
            _remove(path)
    return target


def _write(folder: Path, step: int, state: dict[str, Any], run: str, good: bool) -> Path:
    target, staging = folder / f"step-{step}", folder / f".step-{step}.tmp"
    try:
        with writing(target):
            folder.mkdir(parents=True, exist_ok=True)
            if staging.exists():
                shutil.rmtree(staging)
            staging.mkdir()
            with (staging / STATE).open("wb") as file:
                torch.save(state, file)
            manifest = {"step": step, "sha256": sha256(staging / STATE), "run": run, "good": good}
            (staging / MANIFEST).write_text(json.dumps(manifest))
            for path in (staging / STATE, staging / MANIFEST, staging):
                flush(path)
            if target.exists():
                put_aside(target)
            os.replace(staging, target)
            flush(folder)
    except WriteError:
        shutil.rmtree(staging, ignore_errors=True)  # half of one fills the disk further
        raise
    return target


def _superfluous(folder: Path, keep: int, run: str) -> list[Path]:
    """The run's checkpoints older than its `keep` newest whole ones, less the newest good one."""
    whole = [path for path in list_checkpoints(folder, run) if is_whole(path)]
    good = [path for path in whole if _manifest(path).get("good", True)]
    return [path for path in whole[keep:] if path not in good[:1]]


def _remove(path: Path) -> None:
    # Renamed first: half of a checkpoint never has the name of one.
    gone = path.with_name(f".{path.name}.old")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def list_checkpoints(folder: Path, run: str = "") -> list[Path]:
    """The checkpoints in `folder`, newest first: those of `run` where it is given, and such as do not say whose."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    found = [path for path in found if not path.is_symlink()]
    own = [path for path in found if not run or _manifest(path).get("run", "") in ("", run)]
    return sorted(own, key=step_of, reverse=True)


def load_checkpoint(path: Path) -> tuple[int, dict[str, Any]]:
    """(step, state) of one checkpoint; UserError when it is incomplete or its checksum is wrong."""
    _check(path)
    try:
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise UserError(f"checkpoint {path} cannot be read: {first_line(error)}") from None
    if not isinstance(state, dict):
        raise UserError(f"checkpoint {path} holds no state but {type(state).__name__}")
    return _manifest(path)["step"], state


def is_whole(path: Path) -> bool:
    try:
        _check(path)
    except UserError:
        return False
    return True


def _check(path: Path) -> None:
    """UserError for a checkpoint that is incomplete or damaged."""
    manifest = _manifest(path)
    try:
        step, expected = manifest["step"], manifest["sha256"]
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"step {step!r}")
        if _NAME.fullmatch(path.name) and step != step_of(path):
            raise ValueError(f"its manifest is of step {step}")
        stat = (path / STATE).stat()
        seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        key = (path / STATE).absolute()
        actual = expected if _whole.get(key) == seen else sha256(path / STATE)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"checkpoint {path} is incomplete: {error!r}") from None
    if actual != expected:
        raise UserError(f"checkpoint {path} is damaged: its checksum does not match")
    _whole[key] = seen


def _manifest(path: Path) -> dict[str, Any]:
    """What the manifest says; nothing where it is absent or damaged."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def newest_good_checkpoint(folder: Path, run: str = "") -> tuple[int, dict[str, Any]] | None:
    """The newest checkpoint that is whole, telling on stderr which ones were skipped; None when there is none at all.

    UserError when there are some and each is damaged: to start anew is for the user to say.
    """
    paths = list_checkpoints(folder, run)
    for path in paths:
        try:
            return load_checkpoint(path)
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr)
    if paths:
        raise UserError(f"no checkpoint in {folder} is whole; --overwrite starts again")
    return None


def last_good(folder: Path, run: str = "") -> Path | None:
    """The newest whole checkpoint that was not saved while updates were skipped; else the newest whole one."""
    whole = [path for path in list_checkpoints(folder, run) if is_whole(path)]
    good = [path for path in whole if _manifest(path).get("good", True)]
    return next(iter([*good, *whole]), None)


def resume_from(folder: Path, step: int) -> None:
    """Put aside what is newer than `step`, from which the run goes on, and remove what a kill left half made."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if _LEFT.fullmatch(path.name) and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            print(f"warning: {path} is newer than step {step} and is now {put_aside(path)}", file=sys.stderr)


def put_aside(path: Path) -> Path:
    """Rename a checkpoint to one that nobody looks at; what it is now."""
    folder = path.parent / ASIDE
    folder.mkdir(exist_ok=True)
    number = sum(other.name.partition("~")[0] == path.name for other in folder.iterdir())
    target = folder / (f"{path.name}~{number}" if number else path.name)
    os.replace(path, target)
    return target


def step_of(path: Path) -> int:
    """The N of step-N."""
    return int(path.name.removeprefix("step-"))
