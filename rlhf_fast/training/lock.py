"""One process at a time in a run folder."""

import errno
import fcntl
import os
import sys
from contextlib import suppress
from pathlib import Path

from rlhf_fast.errors import UserError

LOCK = ".rlhf_fast_lock"


class FolderLock:
    """The lock of a folder, which is made where it is not there. The file holds the number of the process.

    It is a record lock of POSIX: the system takes it back when the process ends, however that ends, and a child process
    (of a reward, say) that outlives it does not hold it. Of one process a second lock is the same one.
    """

    def __init__(self, folder: Path) -> None:
        """UserError where another process has it."""
        self.path = folder / LOCK
        self.descriptor: int | None = None
        for _ in range(100):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            except FileNotFoundError:
                continue  # somebody removes the folder
            except OSError as error:
                raise UserError(f"output_dir {folder} cannot be written: {error.strerror}") from None
            self._lock(folder, descriptor)
            if _same_file(self.path, descriptor):
                self.descriptor = descriptor
                return
            os.close(descriptor)  # that one was removed meanwhile, and another may be there
        raise UserError(f"output_dir {folder} cannot be made: it is gone again and again")

    def _lock(self, folder: Path, descriptor: int) -> None:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                print(f"warning: output_dir {folder}: its file system has no locks ({error.strerror}), so nothing "
                      "keeps a second run out", file=sys.stderr)  # fmt: skip
                return
            owner = os.read(descriptor, 32).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise UserError(f"output_dir {folder} is in use by another run{owner and f', process {owner}'}") from None
        with suppress(OSError):  # the number is for the message alone, and the disk may be full
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self, *, remove: bool = False) -> None:
        """Let others in. remove: and leave no file."""
        if self.descriptor is not None:
            with suppress(OSError):
                os.ftruncate(self.descriptor, 0)
                if remove:
                    self.path.unlink(missing_ok=True)
            os.close(self.descriptor)
            self.descriptor = None

    def holds(self) -> bool:
        """Whether it still is the lock of that folder, which may have been removed, or made anew by another process."""
        return self.descriptor is not None and _same_file(self.path, self.descriptor)


def _same_file(path: Path, descriptor: int) -> bool:
    try:
        there, ours = path.stat(), os.fstat(descriptor)
    except OSError:
        return False
    return (there.st_ino, there.st_dev) == (ours.st_ino, ours.st_dev)
