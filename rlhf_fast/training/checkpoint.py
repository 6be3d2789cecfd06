"""Checkpoints that are either whole or absent: written beside, flushed, checked, renamed."""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from rlhf_fast.errors import UserError
from rlhf_fast.training import ranks


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], *, keep: int, good: int | None = None) -> Path:
    """Write `folder`/step-N, then remove all but the newest `keep` and the newest of at most `good` steps (default: N).
    A kill at any moment loses nothing older."""
    target, staging = folder / f"step-{step}", folder / f".step-{step}.tmp"
    if not ranks.is_first():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir()
    torch.save(state, staging / "state.pt")
    manifest = {"step": step, "sha256": _sha256(staging / "state.pt")}
    (staging / "manifest.json").write_text(json.dumps(manifest))
    for path in (staging / "state.pt", staging / "manifest.json", staging):
        _flush(path)
    if target.exists():
        shutil.rmtree(target)
    os.replace(staging, target)
    _flush(folder)
    last_good = newest_of(folder, step if good is None else good)
    for old in list_checkpoints(folder)[keep:]:
        if old != last_good:
            shutil.rmtree(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    return sorted(folder.glob("step-*"), key=_step, reverse=True)


def newest_of(folder: Path, steps: int) -> Path | None:
    """The newest checkpoint in `folder` of at most so many steps."""
    return next((path for path in list_checkpoints(folder) if _step(path) <= steps), None)


def load_checkpoint(path: Path) -> tuple[int, dict[str, Any]]:
    """(step, state) of one checkpoint; UserError when it is incomplete or its checksum is wrong."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        step, expected = manifest["step"], manifest["sha256"]
        actual = _sha256(path / "state.pt")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {path} is incomplete: {error!r}") from None
    if actual != expected:
        raise UserError(f"checkpoint {path} is damaged: its checksum does not match")
    return step, torch.load(path / "state.pt", map_location="cpu", weights_only=True)


def newest_good_checkpoint(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """The newest checkpoint that is whole, telling on stderr which ones were skipped; None when there is none at all.

    UserError when there are some and each is damaged: to start anew is for the user to say.
    """
    paths = list_checkpoints(folder)
    for path in paths:
        try:
            return load_checkpoint(path)
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr)
    if paths:
        raise UserError(f"no checkpoint in {folder} is whole; --overwrite starts again")
    return None


def _step(path: Path) -> int:
    number = path.name.removeprefix("step-")
    return int(number) if number.isdigit() else -1


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
