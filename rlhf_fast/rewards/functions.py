"""Reward functions in Python: `fn(prompts, completions, **columns) -> what each completion is paid`.

For each completion one number, paid at its last token; or a list with one number for each of its sampled tokens (the
argument `completion_ids` has them); or a list of steps, `(end, reward)` each, paid at the token that completes the
first `end` characters of the completion. One that a file or a module names runs in a process of its own (worker.py), a
callable in this one. A function is called once for all rows of a batch, unless its attribute `one_by_one` says that it
judges each by itself (one_by_one.py).
"""

import inspect
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.data.reading import Row
from rlhf_fast.data.rows import take, unlike
from rlhf_fast.errors import UserError
from rlhf_fast.rewards.one_by_one import OneByOne, RowFailed
from rlhf_fast.rewards.worker import Failed, Other, Worker

Function = Callable[..., Any]
OURS = ("prompts", "completions", "completion_ids")


class Payment(NamedTuple):
    """A reward inside of a completion: at its token number `token`, or at the one that completes its first `end`
    characters; the other is None."""

    reward: float
    token: int | None = None
    end: int | None = None


class Answer(NamedTuple):
    """scores: (B,) fp32, the sum that each completion is paid. payments: those of each that are inside of it; None
    where every score is one number."""

    scores: Tensor
    payments: list[list[Payment]] | None = None


def load_function(spec: str, timeout: float | None = None) -> Function:
    """The function named by 'pkg.mod:function' or 'path/file.py:function' in a process of its own: a Worker, or a
    OneByOne of it where its `one_by_one` is true. UserError when it cannot be had in `timeout` seconds."""
    worker = _begun.pop(spec, None) or Worker(spec)
    worker.ready(timeout)
    return OneByOne(worker) if worker.one_by_one else worker


_begun: dict[str, Worker] = {}


@contextmanager
def begun(specs: Iterable[str]) -> Iterator[None]:
    """The functions begin to be imported; inside, `load_function` takes those and waits for what is left to do."""
    _begun.update({spec: Worker(spec) for spec in specs})
    try:
        yield
    finally:
        _begun.clear()


def check_rows(name: str, function: Function, rows: Sequence[Row]) -> None:
    """UserError when a row lacks a column that `function` has as a required parameter."""
    for parameter in _parameters(function):
        required = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        if required and parameter.name not in OURS:
            check_column(f"reward {name} needs", parameter.name, rows)


def check_column(needs: str, column: str, rows: Sequence[Row]) -> None:
    """UserError, which begins with `needs`, when a row lacks the column."""
    rows = take(rows, unlike(rows))
    lacking = next((row for row in rows if column not in row.values), None)
    if lacking is None:
        return
    there = ", ".join(lacking.values)
    if any(column in row.values for row in rows):
        raise UserError(f"{needs} {column!r}, which {lacking.where} lacks ({there})")
    raise UserError(f"{needs} {column!r}, which is no column of the data ({there})")


def call(
    name: str,
    function: Function,
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: dict[str, list[Any]],
    timeout: float | None = None,
) -> Answer:
    """What the function pays. It gets the columns that it names, or all with **kwargs.

    UserError, with the function's name and the example's index, when it raises, exits, takes more than `timeout`
    seconds, or returns anything but what the head of this file says, of numbers that are finite in fp32.
    """
    arguments = arguments_of(function, prompts, completions, columns)
    try:
        values = _ask(function, arguments, timeout)
    except RowFailed as failed:
        where = _example(arguments, failed.row)
        raise UserError(f"reward {name} {_what(failed.error)} ({where})") from failed.error
    except (Exception, SystemExit) as error:
        where = _failing_example(function, arguments, len(completions), timeout)
        raise UserError(f"reward {name} {_what(error)} ({where})") from error
    return _checked(name, values, completions, columns.get("completion_ids"))


def _ask(function: Function, arguments: dict[str, Any], timeout: float | None) -> Any:
    if isinstance(function, (Worker, OneByOne)):
        return function.ask(arguments, timeout)
    with _alarm(timeout):
        return function(**arguments)


def _checked(name: str, values: Any, completions: Sequence[str], ids: Sequence[Sequence[int]] | None) -> Answer:
    values, expected = _plain(values), len(completions)
    if not isinstance(values, (list, tuple)):
        got = values.type if isinstance(values, Other) else type(values).__name__
        raise UserError(f"reward {name} must return a list of {expected} numbers, got {got}")
    if len(values) != expected:
        raise UserError(f"reward {name} returned {len(values)} values for {expected} completions")
    rows = [_plain(value) for value in values]
    payments = [
        _payments(f"reward {name}", i, row, completions[i], None if ids is None else len(ids[i]))
        if isinstance(row, (list, tuple)) else None
        for i, row in enumerate(rows)
    ]  # fmt: skip
    scores = torch.tensor([
        _number(f"reward {name}", i, row if paid is None else sum(payment.reward for payment in paid))
        for i, (row, paid) in enumerate(zip(rows, payments, strict=True))
    ], dtype=torch.float32)  # fmt: skip
    if all(paid is None for paid in payments):
        return Answer(scores)
    return Answer(scores, [paid or [] for paid in payments])


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _payments(who: str, i: int, row: Sequence[Any], completion: str, tokens: int | None) -> list[Payment]:
    """A list of steps, or one number for each token."""
    if row and all(isinstance(step, (list, tuple)) and len(step) == 2 for step in row):
        for end, _ in row:
            if not isinstance(end, int) or not 0 <= end <= len(completion):
                raise UserError(f"{who} ends a step of example {i} at character {end!r} of {len(completion)}")
        return [Payment(_number(who, i, reward), end=end) for end, reward in row]
    rewards = [_number(who, i, reward) for reward in row]
    if rewards and len(rewards) != tokens:
        raise UserError(f"{who} returned {len(rewards)} numbers for example {i}, which has {tokens} tokens; a step is "
                        "a pair of its end, in characters, and its reward")  # fmt: skip
    return [Payment(reward, token=t) for t, reward in enumerate(rewards)]


def _number(who: str, i: int, value: Any) -> float:
    try:
        fine = value is not None and abs(value) <= torch.finfo(torch.float32).max
    except TypeError:
        fine = False
    if not fine:
        raise UserError(f"{who} returned {value!r} for example {i}; it must be a finite float32 number")
    return float(value)


@contextmanager
def _alarm(seconds: float | None) -> Iterator[None]:
    """TimeoutError inside after so many seconds. Python raises it between two of its own instructions, so a call into C
    ends first; and in the main thread only: in another there is no time-out."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no answer in {seconds:g} s (reward_timeout)")

    handler = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def _failing_example(function: Function, arguments: dict[str, Any], size: int, timeout: float | None) -> str:
    """Which example fails on its own. The batch is small and the run is over, so trying each is cheap; together they
    have the time that the batch had."""
    end = time.monotonic() + (math.inf if timeout is None else timeout)
    for row in range(size):
        left = end - time.monotonic()
        if left <= 0:
            break
        alone, limit = {key: [values[row]] for key, values in arguments.items()}, None if timeout is None else left
        try:
            if isinstance(function, Worker):
                function.ask(alone, limit, tries=1)
            else:
                _ask(function, alone, limit)
        except (Exception, SystemExit):  # noqa: BLE001 - a user's function may raise anything, and that is the question here
            return _example(arguments, row)
    else:
        return f"in a batch of {size}; every example alone is fine"
    return f"in a batch of {size}"


def _example(arguments: dict[str, Any], row: int) -> str:
    if "completions" not in arguments:
        return f"example {row}"
    return f"example {row}: completion {arguments['completions'][row][:60]!r}"


def arguments_of(
    function: Function, prompts: Sequence[Any], completions: Sequence[str], columns: dict[str, list[Any]]
) -> dict[str, Any]:
    everything = {**columns, "prompts": list(prompts), "completions": list(completions)}
    parameters = _parameters(function)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return everything
    return {p.name: everything[p.name] for p in parameters if p.name in everything}


def _parameters(function: Function) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _what(error: BaseException) -> str:
    """What happened, behind the name of the reward."""
    return error.line if isinstance(error, Failed) else f"raised {_line(error)}"


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
