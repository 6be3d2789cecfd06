"""The processes of one run, by the environment of `torchrun` or `accelerate launch`, and all that passes between them.

Every process runs the same program on the same global batch, and so comes to the same decisions. What is divided is the
work: each computes its share of the rows; then their sums, or what was made of them, reach all. Counts, means and
controllers are those of one process, on any number of them. The first process alone writes and prints.

In one process each function is the identity, and there is no process group.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_fast import signals
from rlhf_fast.errors import UserError, first_line

T = TypeVar("T")
GRACE = 3.0  # seconds that another process leaves the first one to say what went wrong, before it does so itself
LISTEN = 0.5  # seconds after which a process knows of a signal that another has caught
MEET = 25.0  # seconds that processes which a signal ends wait for each other, of the 30 that torchrun leaves them
# How long a process waits for another, whose reward may take hours; one that has ended is seen at once.
PATIENCE = timedelta(days=1)
LOST = ("peer", "broken pipe", "socket", "timed out", "connection")  # in what a collective says of a process that ended


class _Group:
    """What the processes of a launch say to each other outside of collectives. lost: a collective has failed."""

    def __init__(self, store: dist.Store) -> None:
        self.store = store
        self.lost = False

    def stop(self, number: int) -> None:
        """A signal ends the run: all processes shall know."""
        with suppress(RuntimeError):  # the store has ended, with the first
            self.store.set("stop", str(number))

    def stopped(self) -> int:
        """The number of the signal that ends the run; 0 while there is none."""
        return int(self.store.get("stop")) if self.store.check(["stop"]) else 0

    def leave(self, number: int) -> None:
        """This process ends by a signal, and is not lost."""
        self.stop(number)
        with suppress(RuntimeError):
            self.store.set("left by", str(number))

    def left_by(self) -> int:
        """By what signal another process has ended; 0 where none has, or where it is not known."""
        with suppress(RuntimeError):  # the store has ended, with the first
            return int(self.store.get("left by")) if self.store.check(["left by"]) else 0
        return 0

    def meet(self, number: int) -> None:
        """All processes leave together: a launcher kills the others when one has ended, and the first may hold the
        store. They wait for it to save what there is, and it waits for those that still live."""
        others = int(os.environ["WORLD_SIZE"]) - 1
        with suppress(RuntimeError):  # the store has ended, with the first
            if number:
                self.store.add("here", 1)
                self._until(lambda: self.store.check(["leave"]), MEET)
                self.store.add("left", 1)
            else:
                self._until(lambda: self.store.add("here", 0) == others, MEET / 3)
                self.store.set("leave", "")
                self._until(lambda: self.store.add("left", 0) == others, GRACE)

    def why(self) -> str:
        """Why another process has ended: what it said, where it could."""
        self.lost = True
        said = ""
        with suppress(RuntimeError):  # the store has ended, with a first process that could say nothing
            said = self.store.get("error").decode() if self.store.check(["error"]) else ""
        return said or "a process of the run was lost: killed, out of memory, or its machine is gone"

    def tell(self) -> None:
        """The first process says what went wrong. It waits for the others to hear that where it holds the store."""
        self.store.set("told", "0")
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            self._until(lambda: self.store.add("heard", 0) == dist.get_world_size() - 1, GRACE)

    def is_told(self, number: int) -> bool:
        """Whether somebody else than process `number` says what went wrong, or does so within GRACE."""
        try:
            told = self._until(lambda: self.store.check(["told"]), GRACE)
            if not told:
                return self.store.compare_set("told", "", str(number)).decode() != str(number)
            self.store.add("heard", 1)
        except RuntimeError:  # the store has ended, with a first process that could say nothing
            return False
        return True

    def _until(self, holds: Callable[[], bool], seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True


_group: _Group | None = None


def world() -> int:
    """How many processes the run has."""
    return 1 if _group is None else dist.get_world_size()


def rank() -> int:
    """The number of this one, from 0."""
    return 0 if _group is None else dist.get_rank()


def is_first() -> bool:
    return rank() == 0


def started_again() -> bool:
    """Whether `torchrun --max-restarts` has started the processes anew because one was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def processes() -> Iterator[None]:
    """The process group of a launch: gloo for tensors on the CPU and, where there are GPUs, nccl for those on the one
    of LOCAL_RANK.

    The first process speaks for all. What another one fails with is said by the first, in one line, or by that other
    one where the first does not answer within GRACE. A signal to one is a signal to all.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    global _group
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {missing[0]} is not set: start the processes "
                        "with torchrun or accelerate launch")  # fmt: skip
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % gpus)
    try:
        with signals.unheard():
            shared, number, count = next(iter(dist.rendezvous("env://")))
            # The store of torchrun outlives its processes: what an earlier attempt left there is not for these.
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", shared)
            backends = "cpu:gloo,cuda:nccl" if gpus else "gloo"
            dist.init_process_group(backends, store=store, rank=number, world_size=count, timeout=PATIENCE)
    except RuntimeError as error:
        raise UserError(f"the processes of the run do not find each other: {first_line(error)}") from None
    _group = group = _Group(store)
    stdout, stderr = sys.stdout, sys.stderr
    try:
        with open(os.devnull, "w") as nowhere, _hearing(group):
            if number:
                sys.stdout = sys.stderr = nowhere
            yield
    except Exception as error:
        signals.hold(lambda: False)  # torchrun ends what is left of the processes: what went wrong is said before
        if isinstance(error, signals.Stopped):
            group.leave(error.number)
            dist.destroy_process_group()  # those that wait for this one in a collective go on to their end
            group.meet(number)
            if number:
                raise SystemExit(error.exit_code) from None
        elif number == 0:
            group.tell()
        else:
            if not group.lost:
                with suppress(RuntimeError):  # the first process has ended too, and the store with it
                    store.compare_set("error", "", f"process {number}: {first_line(error)}")
            dist.destroy_process_group()  # the others see at once that this one is gone
            if group.is_told(number):
                raise SystemExit(getattr(error, "exit_code", 2)) from None
        raise
    finally:
        sys.stdout, sys.stderr, _group = stdout, stderr, None
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def _hearing(group: _Group) -> Iterator[None]:
    """What signal one of the processes catches reaches all of them, also while they wait for each other.

    A handler runs when Python does: while this process waits in a collective, a thread passes its signals on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, theirs = socket.socketpair()
    ours.settimeout(LISTEN)
    theirs.setblocking(False)

    def listen() -> None:
        with suppress(RuntimeError):  # the store has ended, with the process that held it
            while (number := group.stopped()) == 0:
                with suppress(TimeoutError):
                    caught = ours.recv(1)
                    if not caught:
                        return
                    if caught[0] in signals.ENDING:
                        group.stop(caught[0])
            signals.hear(number)

    thread = threading.Thread(target=listen, daemon=True)
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    signals.with_others()
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        theirs.close()
        thread.join()
        ours.close()


@contextmanager
def _together() -> Iterator[None]:
    """Where another process has ended, and this collective with it: Interrupted, if by a signal, or UserError."""
    try:
        yield
    except RuntimeError as error:
        if _group is None or not any(word in str(error).lower() for word in LOST):
            raise
        number = _group.left_by()
        if number:
            signals.catch(number)
            raise signals.Interrupted(number) from None
        raise UserError(_group.why()) from None


def all_sum(values: Tensor) -> Tensor:
    """The sum over the processes, in place; it has the same bits in each."""
    if _group is not None:
        with _together():
            dist.all_reduce(values)
    return values


def all_max(values: Tensor) -> Tensor:
    """The greatest of the processes, elementwise, in place."""
    if _group is not None:
        with _together():
            dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def all_gather_objects(value: T) -> list[T]:
    """What each process has, in their order. Tensors in it must be on the CPU."""
    if _group is None:
        return [value]
    gathered: list[Any] = [None] * world()
    with _together():
        dist.all_gather_object(gathered, value)
    return gathered


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives in the first process, where alone it is called; its UserError is raised in all."""
    if _group is None:
        return make()
    given: list[Any] = [None, None]
    if is_first():
        try:
            given[0] = make()
        except UserError as error:
            given[1] = str(error)
    with _together():
        dist.broadcast_object_list(given)
    if given[1] is not None:
        raise UserError(given[1])
    return given[0]


def first_alone(make: Callable[[], T]) -> T:
    """As `from_first`, for work that is not divided: meanwhile the first process is the only one that it knows of."""

    def alone() -> T:
        global _group
        group, _group = _group, None
        try:
            return make()
        finally:
            _group = group

    return from_first(alone)


def check_alike(what: str, value: Any) -> None:
    """UserError where the processes have not all the same of `what`, which the folders they see should hold."""
    seen = all_gather_objects(value)
    for number, other in enumerate(seen):
        if other != seen[0]:
            raise UserError(f"{what} is {seen[0]} for the first process and {other} for process {number}: output_dir "
                            "must be one folder that all of them see")  # fmt: skip


def heed() -> None:
    """End the program here, where a signal has asked any of its processes for it; they are all here."""
    if _group is not None:
        signals.catch(int(all_max(torch.tensor(signals.caught()))))
    signals.stop()


def barrier() -> None:
    """Returns when every process is here."""
    all_sum(torch.zeros(1))


@contextmanager
def place_to_save(folder: Path) -> Iterator[Path]:
    """`folder` for the first process; for the others, whose copies nobody needs, one that is removed at the end."""
    if is_first():
        yield folder
    else:
        with TemporaryDirectory() as other:
            yield Path(other)
    barrier()


def shares(costs: Sequence[float], count: int, *, together: int = 1) -> list[list[int]]:
    """The rows of each of `count` processes: as many groups for each, but for one, and about the same cost.

    costs: of every row, such as its tokens. together: the rows of a group, which follow each other and stay in one
    process. Groups are dealt from the most expensive down, to and fro; each process has its own in their order.
    """
    groups = [sum(costs[i : i + together]) for i in range(0, len(costs), together)]
    order = sorted(range(len(groups)), key=lambda group: -groups[group])
    dealt: list[list[int]] = [[] for _ in range(count)]
    for turn in range(0, len(order), count):
        to_and_fro = dealt if turn // count % 2 == 0 else dealt[::-1]
        for own, group in zip(to_and_fro, order[turn : turn + count], strict=False):
            own.append(group)
    rows = range(len(costs))
    return [[row for group in sorted(own) for row in rows[group * together :][:together]] for own in dealt]


class Part(NamedTuple):
    """Rows of one pass. idle: they are another process's, computed here without effect, so that every process takes
    part in as many passes."""

    rows: list[int]
    idle: bool = False


def share(costs: Sequence[float], *, size: int | None = None, together: int = 1) -> list[Part]:
    """This process's rows of a batch in parts of at most `size`, as many parts in every process; see `shares`."""
    of_all = shares(costs, world(), together=together)
    step = size or max(1, *map(len, of_all))
    own = of_all[rank()]
    parts = [Part(own[i : i + step]) for i in range(0, len(own), step)]
    missing = -(-max(map(len, of_all)) // step) - len(parts)
    return parts + [Part(list(range(min(together, len(costs)))), idle=True)] * missing


def in_order(parts: Sequence[tuple[Sequence[int] | Tensor, Tensor]]) -> Tensor:
    """What the processes have computed of their rows, as one tensor in the order of the rows.

    parts: this one's, (numbers of rows, values), in any order; values of one number stay in a row. The result has the
    device of the values, and of several processes that of the CPU.
    """
    if _group is not None:
        own = [(torch.as_tensor(numbers), values.cpu()) for numbers, values in parts]
        parts = [part for of_one in all_gather_objects(own) for part in of_one]
    numbers = torch.cat([torch.as_tensor(numbers) for numbers, _ in parts])
    return torch.cat([values for _, values in parts])[numbers.argsort(stable=True)]


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """One all-reduce of a role's gradients as one flat tensor: 4 bytes for each number, in fp32."""
    if _group is None:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    for dtype in sorted({g.dtype for g in gradients}, key=str):
        alike = [g for g in gradients if g.dtype == dtype]
        flat = all_sum(torch.cat([g.flatten() for g in alike]))
        for gradient, summed in zip(alike, flat.split([g.numel() for g in alike]), strict=True):
            gradient.copy_(summed.view_as(gradient))
