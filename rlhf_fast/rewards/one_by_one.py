"""Reward functions that judge each completion by itself: they run while other completions are still generated."""

from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

from rlhf_fast.rewards.worker import Worker

Arguments = dict[str, list[Any]]
ANEW = ("completions", "completion_ids")  # decoded or read out again for the batch; the rest are the data's own objects


class Call(NamedTuple):
    arguments: Arguments  # of one row
    values: Future[Any]


class RowFailed(Exception):
    """A row's call raised an error."""

    def __init__(self, row: int, error: BaseException) -> None:
        super().__init__(row, error)
        self.row, self.error = row, error


class OneByOne:
    """A function with the attribute `one_by_one`, called like it, with the rows in turn.

    The calls are made in a thread of its own, one at a time, each with lists of one row. `submit` begins with a row
    that is there before its batch is; a call of the batch takes what was submitted. What the function raises, the call
    of the batch raises, for the first such row.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = self.__wrapped__ = function  # inspect.signature follows the second
        self._begun: dict[int, Call] = {}
        self._queue: SimpleQueue[Call | None] | None = None  # of the thread, while there is one

    def submit(self, row: int, arguments: Arguments) -> Call:
        """Begin with one row. row: its number in the batch."""
        begun = self._begun.get(row)
        if begun is None or not _same(begun.arguments, arguments):
            begun = self._begun[row] = Call(arguments, Future())
            if self._queue is None:
                self._queue = SimpleQueue()
                # A function that hangs keeps no process alive.
                Thread(target=_work, args=(self.function, self._queue), daemon=True).start()
            self._queue.put(begun)
        return begun

    def __call__(self, **arguments: list[Any]) -> Any:
        return self.ask(arguments)

    def ask(self, arguments: Arguments, timeout: float | None = None) -> Any:
        """What it returns for the batch. Raises RowFailed for a row; so where there is no answer in `timeout` seconds,
        those of a worker twice."""
        count = len(next(iter(arguments.values()), []))
        calls = [self.submit(i, {name: [values[i]] for name, values in arguments.items()}) for i in range(count)]
        tries = 2 if isinstance(self.function, Worker) else 1
        try:
            for left in reversed(range(tries)):
                done = wait([call.values for call in calls], timeout, return_when=FIRST_EXCEPTION).done
                late: int | None = None
                for row, call in enumerate(calls):
                    if call.values not in done:
                        late = row if late is None else late
                    elif (raised := call.values.exception()) is not None:
                        raise RowFailed(row, raised)
                if late is None:
                    break
                error = TimeoutError(f"no answer in {timeout:g} s (reward_timeout)")
                if isinstance(self.function, Worker):
                    self.function.stop(str(error))
                if not left:
                    raise RowFailed(late, error)
            values = [call.values.result() for call in calls]
        finally:
            for call in calls:
                call.values.cancel()
            self._begun.clear()
            if self._queue is not None:
                self._queue.put(None)
            self._queue = None
        values = [value.tolist() if hasattr(value, "tolist") else value for value in values]
        wrong = next((value for value in values if not isinstance(value, (list, tuple))), None)
        return [paid for value in values for paid in value] if wrong is None else wrong


def _work(function: Callable[..., Any], queue: "SimpleQueue[Call | None]") -> None:
    while (call := queue.get()) is not None:
        if not call.values.set_running_or_notify_cancel():
            continue
        try:
            call.values.set_result(function(**call.arguments))
        except BaseException as error:  # noqa: BLE001 - whoever waits for the batch raises it
            call.values.set_exception(error)


def _same(first: Arguments, second: Arguments) -> bool:
    """Whether both are of one row. The data's columns are known by their identity: any object can be in them."""
    return all(
        values[0] is second[name][0] or (name in ANEW and values == second[name]) for name, values in first.items()
    )
