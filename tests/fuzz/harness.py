"""Feeds one input after the other to the command, each in a forked child with limits, and judges what came of it."""

import contextlib
import gc
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from huggingface_hub import constants

from rlhf_fast.models.tiny import tiny
from tests.fuzz.answers import endpoint
from tests.fuzz.folders import RAN
from tests.fuzz.inputs import KINDS, RUNS, base, rows_of
from tests.fuzz.values import word
from tests.training.tiny_runs import folder, write_jsonl

SECONDS = 20  # of the processor; and three times as long by the clock, of which other work takes its part
GROWTH = 1 << 30  # bytes
LINES = 8  # of stderr; a word that is no option stands in a box of its own size


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
    outcome = judged(arguments, *ran(arguments, place, plots=kind in ("run", "commands")))
    if (place / RAN).exists():
        outcome.finding = "foreign code ran"
    return outcome


def ran(arguments: list[str], place: Path, *, plots: bool = True) -> tuple[int, str, float, int]:
    """(status, stderr, seconds, bytes of growth) of the command in a forked child, which reads place/stdin.

    plots: without, a run draws no curves, which take as long as all else.
    """
    before = resident()
    start = time.monotonic()
    log = place.parent / f"{place.name}.log"
    child = os.fork()
    if child == 0:
        _child(arguments, place, log, plots)
    ended = os.pidfd_open(child)
    if not select.select([ended], [], [], 3 * SECONDS)[0]:
        os.kill(child, signal.SIGKILL)
    os.close(ended)
    _, status, usage = os.wait4(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it started
    text = log.read_bytes().decode("utf-8", "replace")
    log.unlink()
    own = place.parent / f"{place.name}.size"  # of the run, without what a reward function takes in its own process
    size = int(own.read_text() or 0) if own.exists() else usage.ru_maxrss
    own.unlink(missing_ok=True)
    return os.waitstatus_to_exitcode(status), text, time.monotonic() - start, size * 1024 - before


def _child(arguments: list[str], place: Path, log: Path, plots: bool) -> None:
    status = 70
    try:
        os.setsid()
        os.chdir(place)
        stdin = place / "stdin"
        for number, path in enumerate([stdin if stdin.is_file() else os.devnull, os.devnull, log]):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
        sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2 * GROWTH, size + 2 * GROWTH))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 28, 1 << 28))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.environ |= {**ENVIRONMENT, "HOME": str(place), "TMPDIR": str(place)}
        tempfile.tempdir = None
        constants.HF_HUB_OFFLINE = True  # which was read when it was imported
        sys.argv = ["rlhf_fast", *arguments]
        from rlhf_fast.__main__ import main
        from rlhf_fast.training import report

        if not plots:
            report.plot_curves = report.plot_frontier = lambda *_: None

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
            size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            (place.parent / f"{place.name}.size").write_text(str(size))
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
    elif (len(stderr.strip().splitlines()) > LINES and not stderr.startswith("Usage:")) or len(stderr) > 6000:
        finding = f"{len(stderr.splitlines())} lines, {len(stderr)} characters on stderr"
    return Outcome(arguments, status, stderr, seconds, growth, finding)


def resident() -> int:
    """Bytes of this process that a child begins with: what it mapped from files is not among them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) << 10


@contextlib.contextmanager
def valid_things() -> Iterator[Path]:
    """A folder with what every input begins from: models, data, a reward function, the URL of an endpoint, and a
    finished run of each of RUNS."""
    with tempfile.TemporaryDirectory() as name, endpoint() as url:
        source = Path(name) / "valid"
        shutil.copytree(folder(), source)
        (source / "url").write_text(url)
        for made in ("chat", "checked"):
            write_jsonl(source / f"{made}.jsonl", rows_of(Random(0), source, made))
        # Room for the questions to a judge.
        path = source / "model" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 512}))
        shutil.copytree(source / "model", source / "sharded")
        (source / "sharded" / "model.safetensors").unlink()
        tiny(0, hidden_size=32, layers=2, heads=2, max_length=128)[0].save_pretrained(
            source / "sharded", max_shard_size="20KB"
        )
        for run, (kind, keys) in RUNS.items():
            values = base(kind, source, output_dir=str(source / run), **keys)
            status, text, _, _ = ran(["train", *(f"{key}={word(value)}" for key, value in values.items())], source)
            if status != 0:
                raise RuntimeError(f"the valid run {run} fails: {text}")
        yield source


def warm_up() -> None:
    """Import in the parent what the children would, each by itself."""
    import PIL.PngImagePlugin
    import rlhf_fast._native
    import torch
    import torch.utils.serialization
    import transformers.models.llama.modeling_llama  # noqa: F401

    import rlhf_fast.algorithms.launch
    import rlhf_fast.cli
    import rlhf_fast.commands.chat
    import rlhf_fast.commands.export
    import rlhf_fast.commands.sample
    import rlhf_fast.commands.soup
    import rlhf_fast.rewards.probe
    import rlhf_fast.training.run  # noqa: F401
    from rlhf_fast.algorithms import ALGORITHMS, load_algorithm

    PIL.Image.preinit()
    torch.set_num_threads(1)
    for name in ALGORITHMS:
        load_algorithm(name)
    gc.freeze()
