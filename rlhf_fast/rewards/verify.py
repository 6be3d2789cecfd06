"""Verifiable rewards: 1 for a completion that a program finds right, 0 for one that is wrong or takes too long.

The checks run in processes of their own, while the policy generates: a completion is judged as soon as it is finished.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.data.notes import say
from rlhf_fast.data.reading import Row
from rlhf_fast.data.rows import chunks, take
from rlhf_fast.errors import UserError, first_line
from rlhf_fast.rewards import checks
from rlhf_fast.rewards.sandbox import Limits, Test, check_sandbox, parse_tests, passed
from rlhf_fast.training.entries import VerifyConfig

BLOCK = r"```(?:python|py)?\n([\s\S]*?)```"


class Verifier:
    """Called like a reward function: completions and columns -> (B,) fp32 of 0 and 1 (of code with partial, shares).

    `submit` begins with a completion that is there before its batch is; a call takes what was submitted.
    """

    def __init__(self, options: VerifyConfig) -> None:
        self.options, self.name = options, f"verify_{options.kind}"
        self.gold = _fixed_gold(options)
        self._pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix=self.name)
        self._of_thread = threading.local()  # `process`: the one that checks for it
        self._begun: dict[tuple[str, str], Future[float]] = {}
        self._parsed: dict[str, list[Test]] = {}
        if options.kind == "code":
            check_sandbox()
        module = checks.NEEDS.get(options.kind)
        if module is not None and find_spec(module) is None:
            raise UserError(f"verify {options.kind} needs {module}: pip install 'rlhf_fast[verify]'")

    def check_rows(self, rows: Sequence[Row]) -> None:
        """UserError, with the row, for an answer that nothing could be compared with."""
        column = self.options.column
        if self.gold is None and rows and column not in rows[0].values:
            raise UserError(f"verify {self.options.kind} needs the column {column!r}; the data has "
                            f"{', '.join(rows[0].values)}")  # fmt: skip
        seen: set[bytes] = set()
        for places in chunks(rows) if self.gold is None else [range(min(1, len(rows)))]:
            new: list[Row] = []
            for row in take(rows, places):
                digest = hashlib.blake2b(_key(self._gold(row.values)).encode(), digest_size=16).digest()
                new += [] if digest in seen else [row]
                seen.add(digest)
            problems = [self._pool.submit(self._problem, self._gold(row.values)) for row in new]
            for row, problem in zip(new, problems, strict=True):
                if (reason := problem.result()) is not None:
                    raise UserError(f"{row.where}: {column} {str(self._gold(row.values))[:80]!r} {reason}")

    def submit(self, completion: str, columns: Mapping[str, Any]) -> Future[float]:
        """Begin to check it. columns: those of its row."""
        gold = self._gold(columns)
        key = completion, _key(gold)
        if key not in self._begun:
            self._begun[key] = self._pool.submit(self._score, completion, gold)
        return self._begun[key]

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: list[Any]) -> Tensor:
        rows = [{name: values[i] for name, values in columns.items()} for i in range(len(completions))]
        scores = [self.submit(*row) for row in zip(completions, rows, strict=True)]
        try:
            return torch.tensor([score.result() for score in scores])
        finally:
            self._begun.clear()

    def _gold(self, columns: Mapping[str, Any]) -> Any:
        return columns.get(self.options.column) if self.gold is None else self.gold

    def _problem(self, gold: Any) -> str | None:
        """What is wrong with the data's answer."""
        if self.options.kind == "code":
            try:
                self._tests(gold)
            except ValueError as error:
                return str(error)
            return None
        reply = self._ask("", gold)
        return f"takes longer than {self.options.timeout:g} s to read" if reply is None else reply.get("bad_gold")

    def _tests(self, gold: Any) -> list[Test]:
        key = _key(gold)
        if key not in self._parsed:
            self._parsed[key] = parse_tests(gold)
        return self._parsed[key]

    def _score(self, completion: str, gold: Any) -> float:
        if self.options.kind == "code":
            return self._run(completion, gold)
        reply = self._ask(completion, gold)
        if reply is None:
            say(f"{self.name}: a completion took longer than {self.options.timeout:g} s to check, and counts as wrong")
            return 0.0
        if "bad_gold" in reply:
            raise UserError(f"{self.name}: the answer {str(gold)[:80]!r} {reply['bad_gold']}")
        return float(reply["right"])

    def _run(self, completion: str, gold: Any) -> float:
        """The tests' share, of the program in the completion's last fenced block, or of the whole."""
        options = self.options
        blocks = re.findall(BLOCK, completion)
        program = blocks[-1] if blocks else completion
        limits = Limits(seconds=options.timeout, memory=options.memory, processes=options.processes)
        verdicts = passed(program, self._tests(gold), limits)
        return sum(verdicts) / len(verdicts) if options.partial else float(all(verdicts))

    def _ask(self, completion: str, gold: Any) -> dict[str, Any] | None:
        """The reply of this thread's process; None where the check took too long, which ended the process."""
        process: subprocess.Popen[str] | None = getattr(self._of_thread, "process", None)
        if process is None or process.poll() is not None:
            process = self._of_thread.process = _checking_process(self.options.kind)
        request = {
            "kind": self.options.kind, "text": completion, "gold": gold, "seconds": self.options.timeout,
            "options": self.options.model_dump(include={"extract", "normalize", "choices"}),
        }  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(request, default=str) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()  # none: an alarm has ended it
        if not line:
            process.wait()
        return json.loads(line) if line else None


def _checking_process(kind: str) -> "subprocess.Popen[str]":
    """In a session of its own: a Ctrl-C lets the run finish its step, which needs the checks."""
    needed = [checks.NEEDS[kind]] if kind in checks.NEEDS else []
    return subprocess.Popen(
        [sys.executable, checks.__file__, *needed], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        encoding="utf-8", start_new_session=True,
    )  # fmt: skip


def _fixed_gold(options: VerifyConfig) -> Any:
    """What counts for every row; None where the column says it."""
    if options.schema_file is None:
        return options.pattern
    try:
        return json.loads(Path(options.schema_file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"verify.schema_file {options.schema_file} cannot be read: {first_line(error)}") from None


def _key(gold: Any) -> str:
    return json.dumps(gold, default=str)
