"""A reward function in a process of its own: whatever it does there, the process that trains goes on or ends by itself.

Its working directory, random numbers, signals, threads, memory and standard input are not the run's; what it prints is
shown. One process lives as long as its `Worker`, and the function's module keeps what it knows between calls. Where the
process ends or does not answer in time it is started anew, without what its module knew.
"""

import inspect
import json
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from array import array
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, NamedTuple

from rlhf_fast import signals
from rlhf_fast.errors import UserError
from rlhf_fast.rewards import worker_main
from rlhf_fast.rewards.worker_main import IDS

KINDS = (
    inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL,
    inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD,
)  # fmt: skip
LOOK = 0.5  # seconds after which a process that does not answer is looked at: its children may hold its socket open
PATIENCE = 2.0  # seconds for a process that is no longer needed to end by itself


class Failed(Exception):
    """What went wrong in a worker, in a line. traceback: the function's, where it raised."""

    def __init__(self, line: str, traceback: str = "") -> None:
        super().__init__(traceback or line)
        self.line = line


@dataclass(frozen=True, repr=False)
class Other:
    """What a function returned and is no number: its type, and how it looks."""

    type: str
    shown: str

    def __repr__(self) -> str:
        return self.shown


class _Process(NamedTuple):
    """One that runs worker_main. life: it ends when this is closed."""

    popen: "subprocess.Popen[bytes]"
    connection: Connection
    life: int

    def kill(self) -> None:
        """With all that it started and that is still in its session."""
        with suppress(ProcessLookupError, PermissionError):  # none is left
            os.killpg(self.popen.pid, signal.SIGKILL)

    def end(self) -> None:
        """Let it end by itself, or kill it where that takes long."""
        self.connection.close()
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(PATIENCE)
        self.kill()
        self.popen.wait()
        os.close(self.life)


class Worker:
    """The function `spec` ('pkg.mod:function' or 'path/file.py:function'), called with the keywords that it takes.

    The process starts at once, and imports while others load; `ready` waits for it. Calls may come from several
    threads, and are made one at a time.
    """

    def __init__(self, spec: str) -> None:
        place, _, self.__name__ = spec.rpartition(":")
        self.spec, self.place = spec, place
        if place.endswith(".py"):
            if not Path(place).is_file():
                raise UserError(f"reward file {place} does not exist")
            self.place = str(Path(place).absolute())
        self.one_by_one = False
        self._turn = threading.Lock()
        self._folder = os.getcwd()  # that of the run, also for a process that is started later
        self._described = False
        self._stopped_for: str | None = None
        self._process: _Process | None = None
        self._start()

    def ready(self, timeout: float | None = None) -> "Worker":
        """Itself, when the function is imported. UserError where that fails or takes more than `timeout` seconds."""
        with self._turn:
            try:
                self._describe(timeout)
            except (Failed, TimeoutError) as error:
                line = error.line if isinstance(error, Failed) else str(error)
                raise UserError(f"reward {self.spec}: {line}") from error
        return self

    def __call__(self, **arguments: Any) -> Any:
        return self.ask(arguments)

    def ask(self, arguments: dict[str, Any], timeout: float | None = None, *, tries: int = 2) -> Any:
        """What the function returns: numbers, lists of them, and an Other for anything else.

        A call that fails is repeated, and where that helps, a line on stderr says so. Raises Failed, or TimeoutError
        where the last try has no answer after `timeout` seconds.
        """
        if IDS in arguments:  # as arrays, which take a tenth of the time
            arguments = {**arguments, IDS: [array("q", ids) for ids in arguments[IDS]]}
        request = pickle.dumps(arguments, protocol=pickle.HIGHEST_PROTOCOL)
        failed = ""
        for left in reversed(range(tries)):
            try:
                with self._turn:
                    self._describe(timeout)
                    values = _values(self._exchange(request, timeout)["values"])
                break
            except (Failed, TimeoutError) as error:
                if not left:
                    raise
                failed = error.line if isinstance(error, Failed) else f"had {error}"
        if failed:
            print(f"warning: reward {self.spec} {failed}; asked again, it answered", file=sys.stderr)
        return values

    def stop(self, why: str) -> None:
        """End the process. What waits for it in another thread raises Failed, which says why; the next try starts
        another."""
        if self._process is not None:
            self._stopped_for = why
            self._process.kill()

    def _describe(self, timeout: float | None) -> None:
        """Wait for the function of a process that was just started, and look at what it takes."""
        if self._process is None:
            self._start()
        if self._described:
            return
        told = self._exchange(None, timeout)
        self._described, self.one_by_one = True, told["one_by_one"]
        self.__signature__ = inspect.Signature([
            inspect.Parameter(name, KINDS[kind], default=None if default else inspect.Parameter.empty)
            for name, kind, default in told["parameters"]
        ])  # fmt: skip

    def _exchange(self, request: bytes | None, timeout: float | None) -> dict[str, Any]:
        """The answer to a request; None: what the process says first. Where there is none, the process is gone."""
        assert self._process is not None
        connection = self._process.connection
        try:
            if request is not None:
                connection.send_bytes(request)
            if not self._comes(timeout):
                self._drop(ended=False)
                what = "importing it took more than" if request is None else "no answer in"
                raise TimeoutError(f"{what} {timeout:g} s (reward_timeout)")
            answer = json.loads(connection.recv_bytes())
        except (EOFError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise
            raise Failed(self._drop(ended=True) + (" while it was imported" if request is None else "")) from None
        if request is None and answer.keys() & {"absent", "error"}:
            self._drop(ended=False)  # it would answer nothing more
        if "absent" in answer:
            raise Failed(f"{self.spec.rpartition(':')[0]} has no function {self.__name__!r}")
        if "error" in answer:
            what = "could not be imported:" if request is None else "raised"
            raise Failed(f"{what} {answer['error']}", answer["traceback"])
        return dict(answer)

    def _comes(self, timeout: float | None) -> bool:
        """Wait for an answer. EOFError where the process has ended without one."""
        assert self._process is not None
        end = math.inf if timeout is None else time.monotonic() + timeout
        while (left := end - time.monotonic()) > 0:
            signals.heed()
            if self._process.connection.poll(min(left, LOOK)):
                return True
            if self._process.popen.poll() is not None and not self._process.connection.poll(0):
                raise EOFError
        return False

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        ends, life = os.pipe()
        popen = subprocess.Popen(
            [sys.executable, worker_main.__file__, str(theirs.fileno()), str(ends)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=self._folder,
            pass_fds=[theirs.fileno(), ends], start_new_session=True,
        )  # fmt: skip
        theirs.close()
        os.close(ends)
        for pipe, name in ((popen.stdout, "stdout"), (popen.stderr, "stderr")):
            threading.Thread(target=_show, args=(pipe, name), daemon=True).start()
        self._process, self._described = _Process(popen, Connection(ours.detach()), life), False
        self._finalizer = weakref.finalize(self, self._process.end)
        path = sys.path if "" in sys.path or self._folder in sys.path else [self._folder, *sys.path]
        with suppress(BrokenPipeError):  # it ended already, which the first answer tells
            self._process.connection.send_bytes(pickle.dumps((self.place, self.__name__, path)))

    def _drop(self, *, ended: bool) -> str:
        """Part with the process, which has ended or is killed; how it ended."""
        assert self._process is not None
        if not ended:
            self._process.kill()
        self._finalizer()
        status, why = self._process.popen.returncode, self._stopped_for
        self._process = self._stopped_for = None
        if why is not None:
            return why
        if status >= 0:
            return f"ended its process with exit status {status}"
        hint = " (out of memory?)" if status == -signal.SIGKILL else ""
        return f"ended its process: {signal.Signals(-status).name}{hint}"


def _values(value: Any) -> Any:
    if isinstance(value, dict):
        return Other(value["type"], value["repr"])
    return [_values(entry) for entry in value] if isinstance(value, list) else value


def _show(pipe: IO[bytes], name: str) -> None:
    """Write what comes to the standard stream of that name, whatever stands in its place at that time, by lines."""
    with pipe:
        for line in iter(lambda: pipe.readline(1 << 16), b""):
            with suppress(OSError, ValueError):  # it is closed, and the process must be able to go on
                stream = getattr(sys, name)
                stream.write(line.decode(errors="replace"))
                stream.flush()
