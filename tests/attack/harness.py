"""Runs that are killed, refused and raced: each in a forked process, so that nothing is imported twice.

A command of the line runs in a child as it would by itself, less what has no bearing on the folder (`_stand_ins`).
Before each of its effects on the file system below one folder something can be done to it: `Fault` counts the effects,
and kills, or refuses, at one of them; `Snapshots` copies what kills at any of them would leave.
"""

from __future__ import annotations

import builtins
import errno
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch

from rlhf_fast.cli import app
from rlhf_fast.models import peft_io
from rlhf_fast.training import kept, report
from rlhf_fast.training.files import replaced
from rlhf_fast.training.folder import LOCK
from tests.training.interruptions import contents

EFFECTS = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
KILLED = 137
LIMIT = 120.0  # seconds in which a command ends


class Outcome(NamedTuple):
    """How a command ended. status: of the process, 128 and the signal where that ended it. text: all that it said."""

    status: int
    text: str

    @property
    def is_said(self) -> bool:
        """Whether it finished, or ended with a line of its own."""
        return self.status == 0 or (self.status == 2 and "Traceback" not in self.text and "error: " in self.text)

    @property
    def last(self) -> str:
        lines = self.text.strip().splitlines()
        return f"status {self.status}: {lines[-1][:300] if lines else ''}"


@dataclass
class Fault:
    """Something that happens at the effect `at` (from 1) below `folder`: the process is killed before it, or, of a
    write, when half of it is done; with an `error` the system refuses it, and all that follow.

    seen: the effects so far. listed: a file for them at the end.
    """

    folder: Path
    at: int = 0
    error: int = 0
    seen: list[str] = field(default_factory=list)
    listed: Path | None = None

    def effect(self, name: str, path: Any, half: Callable[[], object] | None = None) -> bool:
        """To be called before each effect. half: does a part of it. Whether that was called, and the rest is to do."""
        try:
            real = Path(os.fsdecode(os.path.realpath(os.fspath(path))))
        except TypeError:  # a descriptor
            return False
        if not real.is_relative_to(self.folder.resolve()):
            return False
        self.seen.append(f"{name} {real.relative_to(self.folder.resolve())}")
        return self.happens(real, half)

    def happens(self, path: Path, half: Callable[[], object] | None) -> bool:
        """What is done at the effect that was just counted."""
        if self.error and 0 < self.at <= len(self.seen):
            raise OSError(self.error, os.strerror(self.error), str(path))
        if len(self.seen) == self.at:
            if half is not None:
                half()
            os._exit(KILLED)
        return False

    def end(self) -> None:
        """The command has ended."""
        if self.listed is not None:
            self.listed.write_text("\n".join(self.seen))

    @contextmanager
    def armed(self) -> Iterator[None]:
        """In this process, for good where it is one of a command: hooks of the interpreter cannot be taken away."""
        live = [True]

        def heard(event: str, args: tuple[Any, ...]) -> None:
            if not live[0]:
                return
            live[0] = False  # what is done here is no effect
            try:
                if event in EFFECTS:
                    path = _at(args[1] if event == "os.rename" else args[0], args[-1])
                    if event != "os.mkdir" or not os.path.exists(path):
                        self.effect(event, path)
                elif event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
                    self.effect(event, args[0])
            finally:
                live[0] = True

        opened, serialize = io.open, safetensors.torch.serialize_file

        def watched(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            file = opened(path, mode, *rest, **options)
            return _Watched(file, path, self) if set(mode) & set("wax+") else file

        def serialized(tensors: Any, path: Any, **rest: Any) -> None:
            def half() -> None:
                serialize(tensors, path, **rest)
                os.truncate(path, os.path.getsize(path) // 2)

            live[0] = False
            try:
                self.effect("save", path)
                self.effect("half of save", path, half)
                serialize(tensors, path, **rest)
            finally:
                live[0] = True

        sys.addaudithook(heard)
        io.open = builtins.open = watched  # type: ignore[assignment]
        safetensors.torch.serialize_file = serialized
        try:
            yield
        finally:
            live[0] = False
            io.open = builtins.open = opened
            safetensors.torch.serialize_file = serialize


def _at(path: Any, descriptor: Any) -> Any:
    """The path, which may be a descriptor, or relative to a folder that is open."""
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    inside = isinstance(descriptor, int) and descriptor >= 0 and not os.path.isabs(path)
    return os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), path) if inside else path


@dataclass
class Snapshots(Fault):
    """What kills at each of the effects `points` would leave: a copy in `kept` of each state of the folder, less those
    that are the same as the one before. `kept`/states has (name of the copy, first effect, last effect) of each."""

    points: frozenset[int] = frozenset()
    kept: Path = Path()
    states: list[tuple[str, int, int]] = field(default_factory=list)
    last: str = ""

    def happens(self, path: Path, half: Callable[[], object] | None) -> bool:
        number = len(self.seen)
        if number in self.points:
            if half is not None:
                half()
            state = state_of(self.folder)
            if state != self.last:
                self.states.append((f"{number:06d}", number, number))
                copy(self.folder, self.kept / self.states[-1][0])
            self.last, self.states[-1] = state, (*self.states[-1][:2], number)
        return number in self.points and half is not None

    def end(self) -> None:
        super().end()
        (self.kept / "states").write_text(json.dumps(self.states))


def state_of(folder: Path) -> str:
    """A hash of all that is in the folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        what = os.readlink(path) if path.is_symlink() else "folder" if path.is_dir() else path.read_bytes()
        digest.update(repr((str(path.relative_to(folder)), what)).encode())
    return digest.hexdigest() if folder.exists() else "none"


class _Watched:
    """A file whose writes are effects: before each, and when half of it is on the disk."""

    def __init__(self, file: Any, path: Any, fault: Fault) -> None:
        self._file, self._path, self._fault = file, path, fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def write(self, data: Any) -> int:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        done = self._fault.effect("half of write", self._path, half)
        self._file.write(data[len(data) // 2 :] if done else data)
        return len(data)


class Child:
    """`rlhf_fast WORDS` in a child process. fault: what is done to it, which is `armed()` inside, and told of the
    `end()`. environment: what it has besides ours."""

    def __init__(self, words: list[str], *, fault: Any = None, environment: dict[str, str] | None = None) -> None:
        self.said = tempfile.TemporaryFile()  # noqa: SIM115 - until `ended`
        self.number = os.fork()
        if self.number == 0:
            os.environ |= environment or {}
            _run(words, self.said.fileno(), fault)
        self.deadline = time.monotonic() + LIMIT

    def ended(self) -> Outcome:
        """Wait for it. A process that does not end in LIMIT seconds is killed, and its outcome is no status."""
        while True:
            done, status = os.waitpid(self.number, os.WNOHANG)
            if done:
                break
            if time.monotonic() > self.deadline:
                self.kill()
            time.sleep(0.003)
        code = os.waitstatus_to_exitcode(status)
        with self.said as said:
            said.seek(0)
            text = said.read().decode(errors="replace")
        if time.monotonic() > self.deadline:
            return Outcome(-1, f"{text}\nhangs")
        return Outcome(128 - code if code < 0 else code, text)

    def kill(self) -> None:
        os.kill(self.number, 9)  # nobody has waited for it, so the number is its own


def command(words: list[str], *, fault: Any = None) -> Outcome:
    """Run `rlhf_fast WORDS` in a child."""
    return Child(words, fault=fault).ended()


def _stand_ins() -> None:
    """What takes most of the time of a tiny run and has no bearing on its folder is left out: how the pictures look,
    and that PEFT reads what was saved. What has, but depends on the clock, is always done: the weights between updates
    are written after each."""

    def curves(folder: Path) -> Path:
        return draw([folder], folder / "curves.png")

    def draw(runs: Sequence[Path], out: Path) -> Path:
        with replaced(out) as path, open(path, "wb") as file:
            file.write(b"a picture")
        return out

    report.plot_curves, report.plot_frontier = curves, draw  # type: ignore[assignment]
    peft_io.check_reload = lambda *_: None  # type: ignore[assignment]
    kept.PATIENCE = 0.0


def _run(words: list[str], said: int, fault: Any) -> None:
    """The child: never returns."""
    status = 1
    try:
        _stand_ins()
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        if fault is None:
            app(words)
        else:
            try:
                with fault.armed():
                    app(words)
            finally:
                fault.end()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - what reaches the interpreter is a traceback
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def effects(words: list[str], fault: Fault) -> list[str]:
    """Every effect of a command below the folder of `fault`, which is afterwards as an uninterrupted run leaves it."""
    with tempfile.TemporaryDirectory() as place:
        fault.listed = Path(place) / "effects"
        ended = command(words, fault=fault)
        if ended.status:
            raise RuntimeError(f"{' '.join(words)} fails by itself: {ended.text}")
        return fault.listed.read_text().split("\n")


def points(seen: list[str]) -> list[int]:
    """The numbers of the effects. Of writes that follow each other into one file the first, the middle and the last
    stand for all: each leaves a part of that file, longer or shorter."""
    found, start = [], 0
    for end in range(1, len(seen) + 1):
        if end == len(seen) or seen[end] != seen[start]:
            found += sorted({start + 1, (start + 1 + end) // 2, end})
            start = end
    return found


def same_as(whole: Path, folder: Path, *, files: bool = True) -> str | None:
    """What of a run is another than of an uninterrupted one; None where it is the same, bit for bit.

    files: it must have no others either.
    """
    ours, theirs = contents(folder), contents(whole)
    differ = [name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)]
    if differ:
        return f"{min(differ)} differs"
    left = names_in(folder) ^ names_in(whole) if files else set()
    return f"{min(left)} is left, or missing" if left else None


def names_in(folder: Path) -> set[str]:
    """The files of a run, but for locks, and for what a rotation may keep longer."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")
            if path.is_file() and path.name != LOCK and not path.is_relative_to(folder / "checkpoints")}  # fmt: skip


def copy(source: Path, target: Path) -> Path:
    """A folder as it is, links as links."""
    shutil.rmtree(target, ignore_errors=True)
    if source.exists():
        shutil.copytree(source, target, symlinks=True)
    return target


REFUSALS = {"full": errno.ENOSPC, "read-only": errno.EROFS, "gone": errno.ENOENT, "no permission": errno.EACCES}
