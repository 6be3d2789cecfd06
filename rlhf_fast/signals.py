"""Signals that a run obeys: SIGINT, SIGTERM and SIGHUP end it, SIGUSR1 asks for a checkpoint.

Where a signal can lose nothing it ends the program at once. Inside of a step it waits until `heed` is called, which
whatever takes long does between its parts: the tokens of a rollout, the micro-batches of a pass. A second signal has
its default action. Where a run has several processes, training/ranks tells all of them of a signal that one has caught.
"""

import _thread
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Launchers hand on to their processes what these were sent as well, by a terminal or a scheduler: the same signal.
REPEATED = 3.0  # seconds


class Interrupted(BaseException):
    """A signal ends the program. No Exception, because nothing on its way may take it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stopped(Exception):
    """A signal has ended the program, and nothing that was to be saved is lost."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number, self.exit_code = number, 128 + number

    @classmethod
    def by(cls, signal: Interrupted, where: str, saved: str = "") -> "Stopped":
        """where: what the program was at. saved: what it saved for that."""
        again = "the same command with --resume auto continues"
        return cls("; ".join(filter(None, [f"stopped {where} by {signal}", saved, again])), signal.number)


class _State:
    """caught: the signal that ends the program, 0 for none. checkpoint: one was asked for. held: inside of a step.
    ready: whether the step can be left as it is. alone: whether this process decides that by itself. heard: the
    signals that come here. several: whether the program has several processes, with a launcher."""

    def __init__(self) -> None:
        self.caught, self.since = 0, 0.0
        self.heard: dict[int, Any] = {}
        self.several = False
        self.checkpoint = False
        self.held = False
        self.alone = True
        self.ready: Callable[[], bool] = lambda: True


_state: _State | None = None


@contextmanager
def listening() -> Iterator[None]:
    """The signals are heard inside. Those that the program was started to ignore stay ignored, as nohup wants it."""
    global _state
    if _state is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _state = state = _State()
    before = {number: signal.getsignal(number) for number in (*ENDING, signal.SIGUSR1)}
    state.heard = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}

    def put_back() -> None:
        for number, handler in state.heard.items():
            signal.signal(number, handler)

    def end(number: int, frame: FrameType | None) -> None:
        again = state.caught > 0
        if again and state.several and time.monotonic() - state.since < REPEATED:
            return
        if again or not state.several:
            put_back()
        if again:
            signal.raise_signal(number)
        state.caught, state.since = number, time.monotonic()
        if not state.held:
            raise Interrupted(number)

    def ask(number: int, frame: FrameType | None) -> None:
        state.checkpoint = True

    for number in state.heard:
        signal.signal(number, ask if number == signal.SIGUSR1 else end)
    try:
        yield
    finally:
        put_back()
        _state = None


@contextmanager
def unheard() -> Iterator[None]:
    """Inside an ending signal has its default action, for what waits in a library, where no handler of Python is
    called, and can lose nothing."""
    before = {number: signal.getsignal(number) for number in ENDING} if _state is not None else {}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def with_others() -> None:
    """The program is one of several processes from here on."""
    if _state is not None:
        _state.several = True


def caught() -> int:
    """The number of the signal that ends the program; 0 while there is none."""
    return 0 if _state is None else _state.caught


def catch(number: int) -> None:
    """Take a signal, if any, that another process of the run has caught for one to this process."""
    if _state is not None and number and not _state.caught:
        _state.caught, _state.since = number, time.monotonic()


def hear(number: int) -> None:
    """As `catch`, from another thread: what ends the program at once does so."""
    if _state is None or _state.caught:
        return
    if number in _state.heard:
        _thread.interrupt_main(signal.Signals(number))
    else:
        catch(number)


def checkpoint_wanted() -> bool:
    """Whether a checkpoint was asked for since the last call."""
    wanted = _state is not None and _state.checkpoint
    if _state is not None:
        _state.checkpoint = False
    return wanted


def hold(ready: Callable[[], bool], *, alone: bool = True) -> None:
    """From here on an ending signal waits for `heed`, and that until ready(). alone: False where this process ends only
    together with others, in `stop`."""
    if _state is not None:
        _state.held, _state.ready, _state.alone = True, ready, alone


@contextmanager
def apart() -> Iterator[None]:
    """What this process does inside it does by itself, and may leave it so."""
    before = _state is not None and _state.alone
    if _state is not None:
        _state.alone = True
    try:
        yield
    finally:
        if _state is not None:
            _state.alone = before


def release() -> None:
    """From here on an ending signal ends the program at once, one that waits right now."""
    if _state is not None:
        _state.held, _state.alone = False, True
        if _state.caught:
            raise Interrupted(_state.caught)


def heed() -> None:
    """End the program here if a signal asked for it and this process alone decides."""
    if _state is not None and _state.alone:
        stop()


def stop() -> None:
    """End the program here if a signal asked for it."""
    if _state is None or not _state.caught or threading.current_thread() is not threading.main_thread():
        return
    if _state.ready():
        raise Interrupted(_state.caught)
