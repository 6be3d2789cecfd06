"""Answers of an endpoint on disk, by the content of the question: what was paid for once is never asked again."""

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_fast.errors import UserError

Answer = dict[str, Any]


class Cache:
    """One SQLite file, which several threads and several runs may use at once, and which a kill leaves whole."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        with self._using():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(path, timeout=60, check_same_thread=False, isolation_level=None)
            self._base.execute("PRAGMA journal_mode=WAL")
            self._base.execute("CREATE TABLE IF NOT EXISTS answers (question TEXT PRIMARY KEY, answer TEXT NOT NULL)")

    @contextmanager
    def _using(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except (OSError, ValueError, sqlite3.Error) as error:
            raise UserError(f"judge.cache {self.path} cannot be used: {error}") from None

    def get(self, request: Answer) -> Answer | None:
        """The answer to a request; None where it was never answered."""
        with self._using():
            row = self._base.execute("SELECT answer FROM answers WHERE question = ?", (_key(request),)).fetchone()
            return None if row is None else json.loads(row[0])

    def put(self, request: Answer, answer: Answer) -> None:
        """Keep an answer; it is on disk when this returns."""
        with self._using():
            self._base.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (_key(request), json.dumps(answer)))


def _key(request: Answer) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
