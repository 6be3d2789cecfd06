"""Files that outlive a kill and a power loss: replaced whole, or appended to and cut behind the last whole record."""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter
from safetensors import SafetensorError

from rlhf_fast.errors import UserError, first_line


class WriteError(UserError):
    """The system refused to write: the disk is full, the folder is read-only or gone."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses inside is one line, WriteError, that names `path`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = refusal(error)
        if reason is None:
            raise
        raise WriteError(f"{path} cannot be written: {reason}") from None


def refusal(error: BaseException) -> str | None:
    """Why the system refused, from the error or one that it followed; None where it was not the system.

    torch.save raises RuntimeError in the place of the OSError of its file, safetensors an error with the number in it.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause.strerror or first_line(cause)
        number = re.search(r"\(os error (\d+)\)", str(cause)) if isinstance(cause, SafetensorError) else None
        if number:
            return os.strerror(int(number[1]))
        cause = cause.__cause__ or cause.__context__
    return None


def replace_file(path: Path, text: str) -> None:
    """Give the file another content; a kill or a power loss leaves the old one or the new one, never a part."""
    with replaced(path) as staging:
        staging.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Where to write what takes the place of the file `path` at the end."""
    with writing(path):
        yield staged(path)
        flush(staged(path))
        os.replace(staged(path), path)
        flush(path.parent)


def staged(path: Path) -> Path:
    """What `replaced` writes before it takes the place of `path`; it ends as that does."""
    return path.with_name(f".new.{path.name}")


def append_record(path: Path, values: dict[str, Any]) -> None:
    """Write one more line of JSON."""
    with writing(path), path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(values, ensure_ascii=False) + "\n")


def cut_records(path: Path, step: int) -> None:
    """Drop the records of steps after `step`, and all behind the first damaged one: a line that is cut off, is not
    UTF-8, holds NULs, or is no record of a step with the entries that are read again."""
    if not os.path.lexists(path):
        return
    kept: list[bytes] = []
    with writing(path):
        lines = path.read_bytes().split(b"\n") if path.is_file() else []
        for number, line in enumerate(lines[:-1], start=1):
            found = _step_of(line, _ENTRIES.get(path.name))
            if found is None:
                print(f"warning: {path} is damaged in line {number}, and cut there", file=sys.stderr)
            if found is None or found > step:
                break
            kept.append(line + b"\n")
        # Behind a link there is a file of somebody else.
        if path.is_symlink() or b"".join(kept) != path.read_bytes():
            replace_file(path, b"".join(kept).decode())


class _Sample(BaseModel):
    prompt: str
    completion: str = ""
    reward: float = 0.0


class _Evaluation(BaseModel):
    metrics: dict[str, float]
    samples: list[_Sample] = []


class _Warning(BaseModel):
    cause: str


# What the lines of a file have, as far as the run, its detectors and its report read them.
_ENTRIES: dict[str, TypeAdapter[Any]] = {
    "metrics.jsonl": TypeAdapter(dict[str, float]), "eval.jsonl": TypeAdapter(_Evaluation),
    "warnings.jsonl": TypeAdapter(_Warning),
}  # fmt: skip


def _step_of(line: bytes, entries: TypeAdapter[Any] | None) -> int | None:
    """The step of a whole record, else None."""
    try:
        record = json.loads(line.decode())
        if entries is not None:
            entries.validate_python(record, strict=True)
        step = record["step"]
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def flush(path: Path) -> None:
    """Wait until the file, or what a folder lists, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
