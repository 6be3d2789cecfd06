"""Passes over many rows, in as many processes as there are processors."""

import os
import pickle
import signal
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from typing import Any, Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")
MOST = 16


def in_order(work: Callable[[T], U], items: Sequence[T], *, alone: bool = False) -> Iterator[U]:
    """`work` of every item, in their order. What it raises is raised here, when its item comes.

    Forks of this process do it, to which nothing has to be sent: work must need no GPU and no other thread, and what it
    changes besides its result is lost. alone: this process does it, as it does where there is but one processor for it.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # processes of torchrun that share the processors
    count = min(len(os.sched_getaffinity(0)) // local, len(items), MOST)
    if alone or count < 2:
        yield from map(work, items)
        return
    children: list[tuple[int, Any]] = []
    try:
        for number in range(count):
            ours, theirs = Pipe(duplex=False)
            child = os.fork()
            if not child:
                ours.close()
                _serve(work, items[number::count], theirs)
            theirs.close()
            children.append((child, ours))
        for number in range(len(items)):
            try:
                fine, value = children[number % count][1].recv()
            except EOFError:
                raise RuntimeError(f"process {children[number % count][0]}, which reads rows, has died") from None
            if not fine:
                raise value
            yield value
    finally:
        for child, ours in children:
            _ended(child, ours)


class Ahead(Generic[T, U]):
    """A fork of this process that does `work` of items which this one will ask for: it is there when they are needed.

    What it changes besides its result is lost. Where it dies, or its work raises, `get` does the work.
    """

    def __init__(self, work: Callable[[T], U]) -> None:
        self._work = work
        self._asked: dict[T, None] = {}  # in the order in which they will come
        self._done: dict[T, tuple[bool, U]] = {}
        self._before: set[T] = set()
        self._pipe, theirs = Pipe()
        child = os.fork()
        if not child:
            self._pipe.close()
            _serve(work, _sent(theirs), theirs)
        theirs.close()
        weakref.finalize(self, _ended, child, self._pipe)

    def ask(self, items: Sequence[T]) -> None:
        """Begin with these. What was asked for before the last time and not fetched is forgotten."""
        wanted = {*items}
        with suppress(OSError, EOFError):  # then it has died
            while self._pipe.poll():
                self._receive()
            self._done = {item: done for item, done in self._done.items() if item in wanted | self._before}
            new = [item for item in items if item not in self._asked and item not in self._done]
            self._pipe.send(new)
            self._asked |= dict.fromkeys(new)
        self._before = wanted

    def get(self, item: T) -> U:
        """`work` of the item."""
        try:
            while item in self._asked:
                self._receive()
        except (OSError, EOFError):
            self._asked.clear()
        fine, value = self._done.pop(item, (False, None))
        return value if fine else self._work(item)  # type: ignore[return-value]

    def _receive(self) -> None:
        reply = self._pipe.recv()
        item = next(iter(self._asked))
        del self._asked[item]
        self._done[item] = reply


def _ended(child: int, pipe: Any) -> None:
    pipe.close()
    with suppress(OSError):
        os.kill(child, signal.SIGKILL)
    with suppress(OSError):
        os.waitpid(child, 0)


def _sent(pipe: Any) -> Iterator[Any]:
    """The items that come through the pipe, until the parent has ended."""
    parent = os.getppid()
    while True:
        while not pipe.poll(1):
            if os.getppid() != parent:
                return
        yield from pipe.recv()


def _serve(work: Callable[[T], U], items: Iterable[T], pipe: Any) -> None:
    """Send (whether it went well, the result or what was raised) of each item; the process then ends. So it does when
    its parent has ended: nobody reads from the pipe."""
    try:
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        for item in items:
            try:
                reply: tuple[bool, Any] = True, work(item)
            except Exception as error:  # noqa: BLE001 - the parent raises it
                reply = False, _portable(error)
            pipe.send(reply)
    except (OSError, EOFError):
        pass
    finally:
        os._exit(0)


def _portable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - an exception may be made of anything
        return RuntimeError("".join(traceback.format_exception(error)))
    return error
