"""Passes of few rows, and what becomes of one that does not fit the memory: its rows are taken in two halves.

What a loss divides by are the numbers of the whole batch, so that halves add up to the same. Gradients of a pass that
failed on its way back are taken away again: those before it stay as they were.
"""

from __future__ import annotations

import gc
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from rlhf_fast.errors import UserError, first_line
from rlhf_fast.training import ranks

if TYPE_CHECKING:
    from rlhf_fast.training.job import Job

R = TypeVar("R")
T = TypeVar("T")
P = TypeVar("P", bound=Sequence[int] | Tensor)
# What allocators say: PyTorch's on the CPU, and the one of C++.
SAID = ("can't allocate memory", "not enough memory", "bad_alloc", "out of memory")
TO_SET = "set memory, or micro_batch_size, gradient_checkpointing, top_layers or max_tokens"


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SAID)


def why_not_halved(rows: int) -> str | None:
    """Why a pass of so many rows cannot be taken in two."""
    if rows < 2:
        return "of one row"
    if ranks.world() > 1:
        return f"of {rows} rows, which several processes would have to halve together"
    return None


def smaller(job: Job, what: str, rows: int, said: str, *, whole: bool = False) -> int:
    """Half of `rows`, from now on the most of a pass of this kind. UserError where they stay together.

    whole: the loss compares them with each other.
    """
    reason = f"of {rows} rows that the loss compares" if whole and rows > 1 else why_not_halved(rows)
    if reason is not None:
        raise UserError(f"out of memory in a pass {reason} ({what}): {TO_SET}; {said}")
    half = -(-rows // 2)
    job.most_rows[what] = half
    print(f"warning: out of memory in a pass of {rows} rows ({what}); from here on they are {half}", file=sys.stderr)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return half


class Parts(Generic[P, R]):
    """The micro-batches of a batch, each made when it is its turn."""

    def __init__(
        self,
        job: Job,
        what: str,
        deal: Callable[[], Iterable[tuple[P, bool]]],
        make: Callable[[P, bool], R],
        *,
        together: int = 1,
        whole: bool = False,
        before: Callable[[int], int] | None = None,
        learnt: Callable[[R], None] = lambda rows: None,
        end: Callable[[], None] = lambda: None,
    ) -> None:
        """what: the kind of pass. deal: (rows, idle) of every micro-batch. make: what the model says of one.

        together: of the rows of a micro-batch come the first ones of all its units of so many, then the second ones,
        and so on. whole: micro-batches stay as they are. before: of so many rows, how many were done before. learnt: is
        told of each micro-batch that is over, end of the last.
        """
        self.job, self.what, self.deal, self.make, self.together, self.whole = job, what, deal, make, together, whole
        self.before, self.learnt, self.end = before, learnt, end
        self.left: deque[tuple[P, bool]] = deque()
        self.done = 0  # rows

    def begin(self) -> None:
        self.left, self.done = deque(self.deal()), 0
        before = 0 if self.before is None else self.before(sum(len(part) for part, _ in self.left))
        while self.done < before:
            part, idle = self.left.popleft()
            missing = min(before - self.done, len(part))
            if missing < len(part):  # its rows were taken in halves
                self.left.appendleft((self._units(part, missing // self.together, None), idle))
            self.done += missing

    def __iter__(self) -> Iterator[R]:
        self.begin()
        while self.left:
            rows = self.make(*self._next())
            yield rows
            self._over(rows)
        self.end()

    def each(self, work: Callable[[R], T]) -> Iterator[T | None]:
        """What `work` makes of every micro-batch. None: all that was made so far is void, and made again."""
        self.begin()
        while self.left:
            held = self._set_aside()
            made, said = self._tried(work)
            if not said:
                self._add(held)
                yield made
                continue
            part, _ = self.left[0]
            smaller(self.job, self.what, len(part) // self.together, said, whole=self.whole)
            if not self._put_back(held):
                self.before = None
                self.begin()
                yield None
        self.end()

    def _tried(self, work: Callable[[R], T]) -> tuple[T | None, str]:
        """`_tried` of the first micro-batch."""

        def made() -> T:
            rows = self.make(*self._next())
            result = work(rows)
            self._over(rows)
            return result

        return _tried(made)

    def _next(self) -> tuple[P, bool]:
        """The first micro-batch, with no more rows than a pass may have."""
        part, idle = self.left[0]
        most = self.job.most_rows.get(self.what)
        if most is not None and len(part) // self.together > most and not self.whole:
            self.left[0] = (self._units(part, 0, most), idle)
            self.left.insert(1, (self._units(part, most, None), idle))
        return self.left[0]

    def _over(self, rows: R) -> None:
        part, _ = self.left.popleft()
        self.done += len(part)
        self.learnt(rows)

    def _units(self, part: P, start: int, stop: int | None) -> P:
        """So many of its units, in its order."""
        if self.together == 1:
            return part[start:stop]  # type: ignore[return-value]
        assert isinstance(part, Tensor)
        return part.view(self.together, -1)[:, start:stop].flatten()  # type: ignore[return-value]

    # Gradients. Where all weights of a model train, there is no room for two: then a backward adds to those before it.

    def _set_aside(self) -> list[Tensor | None] | None:
        if not torch.is_grad_enabled() or self.job.trains_all:
            return None
        held = [parameter.grad for parameter in self.job.trained_parameters]
        self._put_back([None] * len(held))
        return held

    def _add(self, held: list[Tensor | None] | None) -> None:
        pairs = zip(self.job.trained_parameters, held or (), strict=False)
        known = [(parameter, before) for parameter, before in pairs if before is not None]
        both = [(before, parameter.grad) for parameter, before in known if parameter.grad is not None]
        if both:
            torch._foreach_add_([before for before, _ in both], [new for _, new in both])
        for parameter, before in known:
            parameter.grad = before

    def _put_back(self, held: list[Tensor | None] | None) -> bool:
        """Whether the gradients are what they were before the pass."""
        if held is None and torch.is_grad_enabled():
            for parameter in self.job.trained_parameters:
                parameter.grad = None
            return False
        for parameter, gradient in zip(self.job.trained_parameters, held or (), strict=False):
            parameter.grad = gradient
        return True


def each(parts: Iterable[R], work: Callable[[R], T]) -> Iterator[T | None]:
    """`work` of every micro-batch; of `Parts` as these do it."""
    if isinstance(parts, Parts):
        return parts.each(work)
    return map(work, parts)


def in_passes(job: Job, what: str, count: int, size: int, make: Callable[[int, int], T]) -> Iterator[T]:
    """make(start, size) of `count` rows, at most `size` at a time, and half as many where they do not fit."""
    start = 0
    while start < count:
        some = min(size, job.most_rows.get(what, size))
        made, said = _tried(lambda start=start, some=some: make(start, some))  # type: ignore[misc]
        if said:
            smaller(job, what, min(some, count - start), said)
        else:
            yield made  # type: ignore[misc]
            start += some


def _tried(make: Callable[[], T]) -> tuple[T | None, str]:
    """What `make` gives, or how it said that memory is out. Nothing else of it is left: an exception holds the tensors
    of its frames."""
    try:
        return make(), ""
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None, first_line(error)
