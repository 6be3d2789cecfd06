"""What `make attack` tries: a row of the table of docs/reliability.md for each kind of attack.

A row has cases; a case is (name, attack), and an attack is given an empty folder and returns why the run did not
survive it, or None. A new kind is one more `@row` function in a module of this folder that `ROWS` is imported with.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_fast.cli import app
from rlhf_fast.training.folder import LOCK, MARKER, REPLACED, SAVING, claim_folder, take_folder
from tests.attack.harness import REFUSALS, Child, Fault, Snapshots, command, copy, effects, points, same_as
from tests.training.tiny_runs import ALGORITHMS, folder, values_of

Attack = Callable[[Path], str | None]
Cases = Iterator[tuple[str, Attack]]


class Row(NamedTuple):
    """survived: what is asked of a run that is attacked so."""

    name: str
    survived: str
    cases: Callable[[], Cases]


ROWS: list[Row] = []


def row(name: str, survived: str) -> Callable[[Callable[[], Cases]], Callable[[], Cases]]:
    """Make a row of a function that gives the cases."""

    def kept(cases: Callable[[], Cases]) -> Callable[[], Cases]:
        ROWS.append(Row(name, survived, cases))
        return cases

    return kept


def words(algorithm: str, place: Path, *flags: str, **changes: Any) -> list[str]:
    """The command of a small run into `place`/run, with a checkpoint after each of three steps."""
    values = values_of(algorithm, steps=3, save_every=1, output_dir=str(place / "run"), **changes)
    return ["train", *(f"{key}={json.dumps(value)}" for key, value in values.items()), *flags]


@cache
def whole(algorithm: str) -> Path:
    """An uninterrupted run."""
    return _made(algorithm, "whole", 3)


@cache
def stopped(algorithm: str) -> Path:
    """The same run, which has made two of its steps."""
    return _made(algorithm, "stopped", 2)


@cache
def warm(algorithm: str) -> None:
    """One run in this process: its children need not import again what a run imports on its way."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), suppress(SystemExit):
        app(words(algorithm, folder() / "runs" / algorithm / "warm"))


def _made(algorithm: str, name: str, steps: int) -> Path:
    warm(algorithm)
    place = folder() / "runs" / algorithm / name
    place.mkdir(parents=True)
    ended = command([*words(algorithm, place), f"steps={steps}"])
    if ended.status:
        raise RuntimeError(f"{algorithm} fails by itself: {ended.text}")
    return place / "run"


def prepared(*algorithms: str) -> None:
    """Make what the cases of these share, before several processes need it."""
    for algorithm in algorithms:
        whole(algorithm), stopped(algorithm), seconds_of(algorithm)


# How a run begins that is then killed: flag -> the folder that it finds.
STARTS: dict[str, Callable[[str], Path] | None] = {"": None, "--resume=auto": stopped, "--overwrite": whole}


def begun(algorithm: str, flag: str, place: Path) -> list[str]:
    """The command that is attacked, whose folder is as it finds it."""
    make = STARTS[flag]
    if make is not None:
        copy(make(algorithm), place / "run")
    return words(algorithm, place, *filter(None, [flag]))


def recovers(algorithm: str, place: Path) -> str | None:
    """Why not both of `--resume auto` and `--overwrite` take the run folder in `place`; the first must end as an
    uninterrupted run does."""
    spare = copy(place / "run", place / "spare")
    resumed = command(words(algorithm, place, "--resume=auto"))
    if resumed.status:
        return f"--resume auto: {resumed.last}"
    another = same_as(whole(algorithm), place / "run")
    if another is not None:
        return f"after --resume auto {another}"
    try:
        take_folder(spare, resume=False, overwrite=True).release()
        claim_folder(spare, {"algorithm": algorithm}, resume=False, overwrite=True)
    except Exception as error:  # noqa: BLE001 - whatever it is, the folder is not taken
        return f"--overwrite: {error!r}"
    return None


def left_as(algorithm: str, left: Path, place: Path) -> str | None:
    """Why a run does not recover whose folder is as a kill left it."""
    copy(left, place / "run")
    return recovers(algorithm, place)


def crash_points(algorithm: str) -> Cases:
    for flag in STARTS:
        yield from crash_points_of(algorithm, flag)


RECOVERED = "`--resume auto` ends with the bits of an uninterrupted run, and `--overwrite` takes the folder"
for name in ALGORITHMS:
    row(f"crash points, {name}", RECOVERED)(partial(crash_points, name))


def crash_points_of(algorithm: str, flag: str) -> Cases:
    """Each state in which a kill before, or within, an effect of a command leaves its run folder."""
    kept = states_of(algorithm, flag)
    for name, first, last in json.loads((kept / "states").read_text()):
        yield f"{algorithm} {flag} effects {first} to {last}", partial(left_as, algorithm, kept / name)


@cache
def states_of(algorithm: str, flag: str) -> Path:
    """Copies of the run folder, see Snapshots."""
    found, place = points_of(algorithm, flag), _counted(algorithm, flag, "copied")
    kept = place / "states"
    kept.mkdir()
    seen = effects(begun(algorithm, flag, place), Snapshots(place / "run", points=frozenset(found), kept=kept))
    if points(seen) != found:
        raise RuntimeError(f"the effects of {algorithm} {flag} differ from run to run")
    return kept


@cache
def points_of(algorithm: str, flag: str) -> list[int]:
    """Which effects of a command there are."""
    place = _counted(algorithm, flag, "counted")
    return points(effects(begun(algorithm, flag, place), Fault(place / "run")))


def _counted(algorithm: str, flag: str, name: str) -> Path:
    whole(algorithm)
    place = folder() / "runs" / algorithm / f"{name} {flag}"
    place.mkdir(parents=True)
    return place


def killed_after(algorithm: str, flag: str, share: float, place: Path) -> str | None:
    seconds = seconds_of(algorithm) * share
    child = Child(begun(algorithm, flag, place))
    time.sleep(seconds)
    child.kill()
    child.ended()
    return recovers(algorithm, place)


@cache
def seconds_of(algorithm: str) -> float:
    """That a run takes here and now."""
    whole(algorithm)
    with tempfile.TemporaryDirectory() as place:
        start = time.monotonic()
        command(words(algorithm, Path(place)))
        return time.monotonic() - start


@row("kills at random times", RECOVERED)
def kills() -> Cases:
    draw = random.Random(0)
    prepared(*ALGORITHMS)
    for number in range(1000):
        algorithm, flag = ALGORITHMS[number % len(ALGORITHMS)], list(STARTS)[number // 8 % 3]
        share = draw.random()
        yield f"{number} {algorithm} {flag} at {share:.3f}", partial(killed_after, algorithm, flag, share)


def refused_at(algorithm: str, flag: str, why: str, at: int, place: Path) -> str | None:
    ended = command(begun(algorithm, flag, place), fault=Fault(place / "run", at, REFUSALS[why]))
    return recovers(algorithm, place) if ended.is_said else ended.last


@row("writes that the system refuses", f"one line; then {RECOVERED}")
def refusals() -> Cases:
    """A disk that is full, read-only or gone from one effect on."""
    prepared("sft", "grpo")
    for algorithm in ("sft", "grpo"):
        for flag in STARTS:
            for at in points_of(algorithm, flag):
                for why in REFUSALS:
                    name = f"{algorithm} {flag} {why} from effect {at}"
                    yield name, partial(refused_at, algorithm, flag, why, at)


def raced(flags: tuple[str, str], share: float, place: Path) -> str | None:
    """Two processes start on one folder. One at least finishes, with the bits of a run by itself; the other finishes
    or is refused in a line."""
    first = Child(begun("sft", flags[0], place))
    time.sleep(share * seconds_of("sft"))
    second = Child(words("sft", place, *filter(None, [flags[1]])))
    ended = [first.ended(), second.ended()]
    said = next((one for one in ended if not one.is_said), None)
    if said is not None:
        return said.last
    if all(one.status for one in ended):
        return f"both are refused: {ended[0].last}; {ended[1].last}"
    return same_as(whole("sft"), place / "run")


RACES = (
    ("", ""), ("", "--resume=auto"), ("--resume=auto", "--resume=auto"), ("--overwrite", "--overwrite"),
    ("--overwrite", "--resume=auto"), ("", "--overwrite"),
)  # fmt: skip


@row("races of two processes", "one finishes with the bits of a run by itself; the other does too, or says a line")
def races() -> Cases:
    draw = random.Random(1)
    prepared("sft")
    for number in range(20):
        for flags in RACES:
            share = draw.random()
            yield f"{number} {flags} after {share:.3f} of the first", partial(raced, flags, share)


def _project(place: Path) -> None:
    """A folder of the user's own in the place of a run folder."""
    run = place / "run"
    (run / "src").mkdir(parents=True)
    (run / "config.yaml").write_text("name: mine\n")
    for name in ("metrics.jsonl", "src/main.py", "checkpoints.txt"):
        (run / name).write_text(f"mine: {name}\n")


def _forged(text: str, place: Path) -> None:
    _project(place)
    (place / "precious").write_text("mine\n")
    (place / "run" / MARKER).write_text(text)


def _linked(name: str, place: Path) -> None:
    """A run with a link in the place of a file or folder of it, to something of the user's."""
    copy(stopped("sft"), place / "run")
    (place / "elsewhere" / "step-9").mkdir(parents=True)
    (place / "elsewhere" / "mine").write_text("mine\n")
    target = place / "run" / name
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)
    target.symlink_to(place / "elsewhere" / ("mine" if "." in name.lstrip(".") else ""))


def _foreign(place: Path) -> None:
    """A run with files and folders of the user's in it, under names like the run's."""
    copy(stopped("sft"), place / "run")
    for name in ("notes.txt", "checkpoints/step-2.bak/x", "checkpoints/best/x", "checkpoints/step-02/x", "data/my.csv",
                 "best/x", "adapter_model.bin", "tensorboard/x"):  # fmt: skip
        path = place / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine\n")


HOSTILE: dict[str, Callable[[Path], None]] = {
    "a project": _project, "files of the user's in a run": _foreign,
    **{f"{name} is a link": partial(_linked, name) for name in (
        "metrics.jsonl", "eval.jsonl", "config.yaml", "checkpoints", "inputs.json", "adapter_model.safetensors",
        "curves.png", "summary.json", MARKER, LOCK, REPLACED, SAVING,
    )},
    **{f"marker {text[:30]}": partial(_forged, text) for text in (
        "", "[]", "{}", '{"stages": [], "saved": ["../precious"]}', '{"stages": [".."], "saved": []}', "[" * 100_000,
        '{"stages": ["", "."], "saved": []}', '{"stages": [], "saved": [3]}', '{"stages": {"a": 1}, "saved": null}',
    )},
}  # fmt: skip


def mine(place: Path) -> dict[str, str]:
    """Every file of the user's."""
    found = {}
    for path in place.rglob("*"):
        if path.is_file() and not path.is_symlink():
            text = path.read_bytes()
            if text.startswith((b"mine", b"name: mine")):
                found[str(path.relative_to(place))] = text.decode()
    return found


def hosted(prepare: Callable[[Path], None], flag: str, place: Path) -> str | None:
    prepare(place)
    before = mine(place)
    ended = command(words("sft", place, *filter(None, [flag])))
    lost = [name for name, text in before.items() if mine(place).get(name) != text]
    if lost:
        return f"{lost[0]} of the user's is gone or another"
    return None if ended.is_said else ended.last


@row("hostile folders", "no file of the user's is touched; the run finishes, or says a line")
def hostile() -> Cases:
    prepared("sft")
    for name, prepare in HOSTILE.items():
        for flag in STARTS:
            yield f"{name} {flag}", partial(hosted, prepare, flag)


def _half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes(byte ^ 0x55 for byte in data[middle : middle + 1]) + data[middle + 1 :])


def _nuls(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def _in_a_character(path: Path) -> None:
    path.write_bytes(path.read_bytes() + '{"step": 9, "text": "ü'.encode()[:-1])


def _a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut in half": _half, "empty": lambda path: path.write_bytes(b""), "a flipped bit": _flip, "NULs": _nuls,
    "cut in a character": _in_a_character, "gone": lambda path: path.unlink(), "a folder": _a_folder,
    "a deep list": lambda path: path.write_text("[" * 100_000),
}  # fmt: skip


def damaged(name: str, damage: str, place: Path) -> str | None:
    run = copy(stopped("sft"), place / "run")
    DAMAGES[damage](run / name)
    ended = command(words("sft", place, "--resume=auto"))
    if not ended.is_said:
        return ended.last
    records = name.endswith(".jsonl") and damage != "a folder"
    if ended.status or records:  # records before the damage are all that is left of them
        return None
    return same_as(whole("sft"), run, files=False)


@row("damaged files", "`--resume auto` ends with the bits of an uninterrupted run, or says a line")
def damages() -> Cases:
    prepared("sft")
    files = sorted(str(path.relative_to(stopped("sft"))) for path in stopped("sft").rglob("*") if path.is_file())
    for name in files:
        for damage in DAMAGES:
            yield f"{name} {damage}", partial(damaged, name, damage)
