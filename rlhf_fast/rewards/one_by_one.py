"""Reward functions that judge each completion by itself: they run while other completions are still generated."""

from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

Arguments = dict[str, list[Any]]
ANEW = ("completions", "completion_ids")  # decoded or read out again for the batch; the rest are the data's own objects


class Call(NamedTuple):
    arguments: Arguments  # of one row
    values: Future[Any]


class OneByOne:
    """A function with the attribute `one_by_one`, called like it, with the rows in turn.

    The calls are made in a thread of its own, one at a time, each with lists of one row. `submit` begins with a row
    that is there before its batch is; a call of the batch takes what was submitted. What the function raises, the call
    of the batch raises, for the first such row.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = self.__wrapped__ = function  # inspect.signature follows the second
        self._begun: dict[int, Call] = {}
        self._queue: SimpleQueue[Call] = SimpleQueue()
        self._thread: Thread | None = None

    def submit(self, row: int, arguments: Arguments) -> Call:
        """Begin with one row. row: its number in the batch."""
        begun = self._begun.get(row)
        if begun is None or not _same(begun.arguments, arguments):
            begun = self._begun[row] = Call(arguments, Future())
            self._queue.put(begun)
        if self._thread is None:
            self._thread = Thread(target=self._work, daemon=True)  # a function that hangs keeps no process alive
            self._thread.start()
        return begun

    def __call__(self, **arguments: list[Any]) -> Any:
        count = len(next(iter(arguments.values()), []))
        calls = [self.submit(i, {name: [values[i]] for name, values in arguments.items()}) for i in range(count)]
        try:
            values = [call.values.result() for call in calls]
        finally:
            self._begun.clear()
        values = [value.tolist() if hasattr(value, "tolist") else value for value in values]
        wrong = next((value for value in values if not isinstance(value, (list, tuple))), None)
        return [paid for value in values for paid in value] if wrong is None else wrong

    def _work(self) -> None:
        while True:
            call = self._queue.get()
            try:
                call.values.set_result(self.function(**call.arguments))
            except BaseException as error:  # noqa: BLE001 - whoever waits for the batch raises it
                call.values.set_exception(error)


def _same(first: Arguments, second: Arguments) -> bool:
    """Whether both are of one row. The data's columns are known by their identity: any object can be in them."""
    return all(
        values[0] is second[name][0] or (name in ANEW and values == second[name]) for name, values in first.items()
    )
