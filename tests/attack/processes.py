"""Processes of a job that are lost: one of two is killed at every place where they meet, and at random times."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from rlhf_fast.training import ranks
from tests.attack.harness import Child, Outcome, same_as
from tests.attack.rows import Cases, row, warm, words
from tests.distributed.test_equal_to_one import STEADY, assert_same_run
from tests.training.tiny_runs import ALGORITHMS, folder

SECONDS = 20.0  # in which the other process has ended too
TERMINATED = 128 + signal.SIGTERM
# As test_equal_to_one has them, so that another number of processes makes the same run.
CHANGES = {key: value for key, value in STEADY.items() if key != "steps"}
OF = {"online_dpo": {"reference_refresh_every": None}}


class Meetings:
    """Counts where the processes meet, in each; process `lost` is killed before the one with the number `at`."""

    def __init__(self, lost: int = 0, at: int = 0, listed: Path | None = None) -> None:
        self.lost, self.at, self.listed, self.seen = lost, at, listed, 0

    @contextmanager
    def armed(self) -> Iterator[None]:
        together = ranks._together

        def counted() -> object:
            self.seen += 1
            if self.seen == self.at and ranks.rank() == self.lost and not ranks.started_again():
                os.kill(os.getpid(), signal.SIGKILL)
            return together()

        ranks._together = counted  # type: ignore[assignment]
        yield

    def end(self) -> None:
        if self.listed is not None and os.environ["RANK"] == "0":
            self.listed.write_text(str(self.seen))


class Job(NamedTuple):
    """Two processes of one run."""

    first: Child
    second: Child

    @classmethod
    def of(cls, words: list[str], fault: Meetings | None = None) -> Job:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return cls(*(Child(words, fault=fault, environment={**place, "RANK": n, "LOCAL_RANK": n}) for n in "01"))

    def ended(self) -> list[Outcome]:
        return [child.ended() for child in self]


def command_of(algorithm: str, place: Path, *flags: str) -> list[str]:
    return words(algorithm, place, *flags, **CHANGES, **OF.get(algorithm, {}))


@cache
def whole(algorithm: str) -> Path:
    """A run of two processes that is left alone; beside it stands how often they meet."""
    warm(algorithm)
    place = folder() / "runs" / algorithm / "two"
    place.mkdir(parents=True)
    ended = Job.of(command_of(algorithm, place), Meetings(listed=place / "meetings")).ended()
    if any(one.status for one in ended):
        raise RuntimeError(f"{algorithm} fails in two processes: {ended}")
    return place / "run"


def resumes(algorithm: str, processes: int, place: Path) -> str | None:
    """Why the run in `place` does not go on to what one that is left alone ends with: in two processes with its bits,
    in one to rounding."""
    again = command_of(algorithm, place, "--resume=auto")
    ended = Job.of(again).ended() if processes == 2 else [Child(again).ended()]
    failed = next((one for one in ended if one.status), None)
    if failed is not None:
        return f"--resume auto in {processes}: {failed.last}"
    if processes == 2:
        return same_as(whole(algorithm), place / "run")
    try:
        assert_same_run(place / "run", whole(algorithm))
    except AssertionError as error:
        return f"--resume auto in one: {' '.join(str(error).split())[:300]}"
    return None


def lost_at(algorithm: str, lost: int, at: int, processes: int, place: Path) -> str | None:
    job = Job.of(command_of(algorithm, place), Meetings(lost, at))
    job[lost].ended()
    start = time.monotonic()
    left = job[1 - lost].ended()
    seconds = time.monotonic() - start
    if not left.is_said or left.status == 0 or left.text.count("error: ") != 1:
        return left.last
    return f"the other ends {seconds:.0f} s later" if seconds > SECONDS else resumes(algorithm, processes, place)


def lost_after(algorithm: str, lost: int, share: float, processes: int, place: Path) -> str | None:
    """As torchrun does it: what is left is asked to end."""
    job = Job.of(command_of(algorithm, place))
    time.sleep(share * seconds_of(algorithm))
    job[lost].kill()
    job[lost].ended()
    start = time.monotonic()
    time.sleep(0.1)
    os.kill(job[1 - lost].number, signal.SIGTERM)
    left = job[1 - lost].ended()
    seconds = time.monotonic() - start
    if "Traceback" in left.text or not (left.is_said or left.status == TERMINATED):
        return left.last
    return f"the other ends {seconds:.0f} s later" if seconds > SECONDS else resumes(algorithm, processes, place)


@cache
def seconds_of(algorithm: str) -> float:
    """That a run in two processes takes here and now."""
    whole(algorithm)
    with tempfile.TemporaryDirectory() as place:
        start = time.monotonic()
        Job.of(command_of(algorithm, Path(place))).ended()
        return time.monotonic() - start


AS_ALONE = (
    "`--resume auto` ends with the bits of the job that was left alone, in another number of processes to rounding"
)


@row("ranks lost", f"the other process ends with one line within 20 s; {AS_ALONE}")
def meetings() -> Cases:
    """Each of two processes, before each collective."""
    for algorithm in ALGORITHMS:
        for at in range(1, int((whole(algorithm).parent / "meetings").read_text()) + 1):
            for lost in (0, 1):
                # In turn, so that both processes are lost in runs that go on in two, and in one.
                processes = 1 + (at // 2 + lost) % 2
                name = f"{algorithm} process {lost} at {at}, then {processes}"
                yield name, partial(lost_at, algorithm, lost, at, processes)


@row("ranks lost at random times", "as of ranks lost, where the launcher ends the other process")
def times() -> Cases:
    draw = random.Random(2)
    for algorithm in ALGORITHMS:
        seconds_of(algorithm)
    for number in range(200):
        algorithm, lost, share = ALGORITHMS[number % len(ALGORITHMS)], number // 8 % 2, draw.random()
        processes = 1 + number // 16 % 2
        name = f"{algorithm} process {lost} after {share:.3f}, then {processes}"
        yield name, partial(lost_after, algorithm, lost, share, processes)


# What torchrun starts: a process is killed in the first attempt.
STARTED = """
import sys
from rlhf_fast.__main__ import main
from tests.attack.processes import Meetings

with Meetings(int(sys.argv.pop(1)), int(sys.argv.pop(1))).armed():
    main()
"""


def started_again(algorithm: str, lost: int, at: int, place: Path) -> str | None:
    (place / "job.py").write_text(STARTED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ended = subprocess.run(
        [*launch, str(place / "job.py"), str(lost), str(at), *command_of(algorithm, place)],
        capture_output=True, text=True, env=environment, timeout=500, check=False,
    )  # fmt: skip
    if ended.returncode:
        return ended.stderr[-300:]
    return same_as(whole(algorithm), place / "run")


@row("jobs that torchrun starts again", "the second attempt ends with the bits of the job that was left alone")
def restarts() -> Cases:
    for algorithm in ("sft", "grpo"):
        count = int((whole(algorithm).parent / "meetings").read_text())
        for lost in (0, 1):
            for at in range(1, count + 1):
                yield f"{algorithm} process {lost} at {at}", partial(started_again, algorithm, lost, at)
