"""Several processes of a run, started once: each case is what all of them do at the same time.

A case is a function of this module's callers, at the top level of its module, and its arguments; it is called in every
process with the environment that torchrun would give it.
"""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from rlhf_fast.algorithms import ALGORITHMS

LIMIT = 120.0  # seconds in which a case ends
# What one process imports, from which all the others are forked.
LOADED = [f"rlhf_fast.algorithms.{name}" for name in sorted({preset.module for preset in ALGORITHMS.values()})]
LOADED += ["transformers.models.llama.modeling_llama", "tests.distributed.runs"]


class Processes:
    """`count` processes with one thread each."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LOADED)
        self.count, self.pipes, self.running = count, [], []
        for number in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, number, count), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.running.append(process)

    def run(self, case: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        """What the case gives in each process; AssertionError with the traceback of the first one that fails."""
        port = _free_port()
        for pipe in self.pipes:
            pipe.send((case, args, options, port))
        answers = []
        for number, pipe in enumerate(self.pipes):
            assert pipe.poll(LIMIT), f"process {number} of {self.count} hangs in {case.__name__}"
            answers.append(pipe.recv())
        for number, (worked, answer) in enumerate(answers):
            assert worked, f"process {number} of {self.count}:\n{answer}"
        return [answer for _, answer in answers]

    def close(self) -> None:
        for process in self.running:
            process.terminate()
            process.join()


def _serve(pipe: Connection, number: int, count: int) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    while True:
        try:
            case, args, options, port = pipe.recv()
        except EOFError:
            return
        os.environ["MASTER_PORT"] = str(port)
        try:
            pipe.send((True, case(*args, **options)))
        except (Exception, SystemExit):  # noqa: BLE001 - whatever a case raises is its answer
            pipe.send((False, traceback.format_exc()))


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
