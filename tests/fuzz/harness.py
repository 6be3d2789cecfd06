"""Feeds one input after the other to the command, each in a forked child with limits, and judges what came of it."""

import contextlib
import gc
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

from huggingface_hub import constants

from tests.fuzz.inputs import KINDS

SECONDS = 20  # of the processor; and three times as long by the clock, of which other work takes its part
GROWTH = 1 << 30  # bytes
LINES = 8  # of stderr with exit status 2


@dataclass
class Outcome:
    """finding: what is wrong with it; None where it was accepted, or refused in a few lines."""

    arguments: list[str]
    status: int
    stderr: str
    seconds: float
    growth: int
    finding: str | None = None


# No network, and one thread: children are forked.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1",
    "RUST_BACKTRACE": "0",
}  # fmt: skip


def tried(kind: str, random: Random, place: Path, source: Path) -> Outcome:
    """One input of a kind, made in the empty folder `place` from what is valid in `source`."""
    arguments = KINDS[kind](random, place, source)
    return judged(arguments, *ran(arguments, place))


def ran(arguments: list[str], place: Path) -> tuple[int, str, float, int]:
    """(status, stderr, seconds, bytes of growth) of the command in a forked child."""
    before = resident()
    start = time.monotonic()
    log = place.parent / f"{place.name}.log"
    child = os.fork()
    if child == 0:
        _child(arguments, place, log)
    deadline = start + 3 * SECONDS
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it started
    text = log.read_bytes().decode("utf-8", "replace")
    log.unlink()
    return os.waitstatus_to_exitcode(status), text, time.monotonic() - start, usage.ru_maxrss * 1024 - before


def _child(arguments: list[str], place: Path, log: Path) -> None:
    status = 70
    try:
        os.setsid()
        os.chdir(place)
        for number, path in ((0, os.devnull), (1, os.devnull), (2, str(log))):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
        sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2 * GROWTH, size + 2 * GROWTH))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 28, 1 << 28))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.environ |= ENVIRONMENT
        constants.HF_HUB_OFFLINE = True  # which was read when it was imported
        sys.argv = ["rlhf_fast", *arguments]
        from rlhf_fast.__main__ import main

        main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter would end
        import traceback

        traceback.print_exc()
        status = 1
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def judged(arguments: list[str], status: int, stderr: str, seconds: float, growth: int) -> Outcome:
    finding = None
    if "Traceback (most recent call last)" in stderr:
        finding = "traceback: " + stderr.strip().splitlines()[-1][:200]
    elif status in (-signal.SIGXCPU, -signal.SIGKILL) or seconds > 3 * SECONDS:
        finding = "hang"
    elif status not in (0, 2):
        finding = f"status {status}: {stderr.strip()[-200:]}"
    elif growth > GROWTH:
        finding = f"growth of {growth >> 20} MiB"
    elif status == 2 and not stderr.strip():
        finding = "refused without a word"
    elif len(stderr.strip().splitlines()) > LINES or len(stderr) > 6000:
        finding = f"{len(stderr.splitlines())} lines, {len(stderr)} characters on stderr"
    return Outcome(arguments, status, stderr, seconds, growth, finding)


def resident() -> int:
    """Bytes of this process that a child begins with: what it mapped from files is not among them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) << 10


@contextlib.contextmanager
def valid_things():
    """A folder with models, data, a reward function and two finished runs, which every input begins from."""
    from tests.fuzz.inputs import rows_of
    from tests.training.tiny_runs import folder, values_of, write_jsonl

    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "valid"
        shutil.copytree(folder(), source)
        write_jsonl(source / "chat.jsonl", rows_of(Random(0), source, "chat"))
        for algorithm, run in (("sft", "sft_run"), ("reward_model", "reward_run")):
            values = values_of(algorithm, steps=1, self_test=False, output_dir=str(source / run))
            values = {k: v.replace(str(folder()), str(source)) if isinstance(v, str) else v for k, v in values.items()}
            status, text, _, _ = ran(["train", *(f"{key}={value}" for key, value in values.items())], source)
            if status != 0:
                raise RuntimeError(f"the valid {algorithm} run fails: {text}")
        yield source


def warm_up() -> None:
    """Import in the parent what every child would."""
    import peft  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import rlhf_fast.algorithms.launch
    import rlhf_fast.cli
    import rlhf_fast.commands.export
    import rlhf_fast.commands.sample
    import rlhf_fast.commands.soup
    import rlhf_fast.rewards.probe
    import rlhf_fast.training.run  # noqa: F401
    from rlhf_fast.algorithms import ALGORITHMS, load_algorithm

    torch.set_num_threads(1)
    for name in ALGORITHMS:
        load_algorithm(name)
    gc.freeze()
