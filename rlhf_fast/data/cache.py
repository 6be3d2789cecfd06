"""What reading found of data, kept for the next start: by the content of the files, the settings, and the code.

An entry is a file of arrays behind their checksum, written beside and renamed. One that is damaged is made again. Of
processes that want the same entry at a time, one makes it while the others wait.
"""

import fcntl
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_fast.errors import first_line

Entry = dict[str, NDArray[Any]]
BYTES = 4 << 30  # of all entries; those that were not used for longest go
_SAMPLED = 1 << 30  # bytes of a file above which parts of it, its size and its time stand for it
_BLOCKS, _BLOCK = 64, 1 << 20
_STALE = 3600  # seconds after which nobody is writing a file any more


class Cache:
    """folder: where entries are; None: nothing is kept. settings: all keys of a run that may change what is found."""

    def __init__(self, folder: Path | None, settings: str = "", most: int = BYTES) -> None:
        self.folder, self.settings, self.most = folder, settings, most

    def entry(self, parts: Any, make: Callable[[], Entry]) -> Entry:
        """What is kept under `parts`, else what `make` returns, which is then kept.

        parts: whatever it depends on besides settings and code, told apart by its repr.
        """
        if self.folder is None:
            return make()
        key = hashlib.sha256(repr((code(), self.settings, parts)).encode(errors="surrogatepass")).hexdigest()
        path = self.folder / key
        found = _read(path)
        if found is not None:
            return found
        with _alone(path):
            found = _read(path)
            if found is None:
                found = make()
                self._write(path, found)
        return found

    def _write(self, path: Path, entry: Entry) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **entry)  # type: ignore[arg-type]
        data = buffer.getbuffer()
        if len(data) > self.most:
            return
        new = path.with_name(f"{path.name}.{os.getpid()}.new")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with new.open("wb") as file:
                file.write(hashlib.sha256(data).digest())
                file.write(data)
            new.replace(path)
            self._prune(path)
        except OSError as error:
            with suppress(OSError):
                new.unlink()
            print(f"what was found in the data is not kept in {path.parent}: {error.strerror or first_line(error)}")

    def _prune(self, newest: Path) -> None:
        """Less what is too much. Files that are no entries are left alone."""
        found = []
        for path in newest.parent.iterdir():
            name, _, rest = path.name.partition(".")
            if len(name) != 64 or path == newest:
                continue
            with suppress(OSError):
                stat = path.stat()
                if not rest:
                    found.append((stat.st_mtime, stat.st_size, path))
                elif time.time() - stat.st_mtime > _STALE and rest != "lock":
                    path.unlink()
        room = self.most - newest.stat().st_size
        for _, size, path in sorted(found, reverse=True):
            room -= size
            if room < 0:
                path.unlink(missing_ok=True)


NONE = Cache(None)


def _read(path: Path) -> Entry | None:
    try:
        data = path.read_bytes()
        if hashlib.sha256(memoryview(data)[32:]).digest() != data[:32]:
            return None
        with np.load(io.BytesIO(data[32:]), allow_pickle=False) as arrays:
            entry = dict(arrays)
    except (OSError, ValueError, EOFError):
        return None
    with suppress(OSError):
        os.utime(path)  # it was used
    return entry


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """No other process is here with the same path, where the file system has locks. The system takes the lock back
    from a process that dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:
        yield  # what is made will not be written either, and that is said
        return
    try:
        with suppress(OSError):
            fcntl.lockf(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):
            os.unlink(f"{path}.lock")
        os.close(descriptor)


def packed(value: Any) -> NDArray[np.uint8]:
    """A value of JSON as an array."""
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


def unpacked(array: NDArray[np.uint8]) -> Any:
    return json.loads(array.tobytes())


@lru_cache
def code() -> str:
    """A hash of this package and of the libraries that read and render rows."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)} ".encode() + path.read_bytes())
    digest.update(" ".join(map(version, ("transformers", "tokenizers", "jinja2", "numpy"))).encode())
    return digest.hexdigest()


def digest_of(path: Path) -> str:
    """A hash of a file's content; of a large one, of parts of it, its size and when it was written."""
    stat = path.stat()
    return _digest(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=1024)
def _digest(path: Path, size: int, written: int, inode: int) -> str:
    with path.open("rb") as file:
        if size <= _SAMPLED:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(f"{size} {written}".encode())
        for number in range(_BLOCKS):
            file.seek(number * (size - _BLOCK) // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK))
        return digest.hexdigest()
