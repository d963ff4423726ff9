"""One run at a time in an output folder: a lock that the system takes back when its holder ends, however it ends."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from cbpq.atomic import writing
from cbpq.errors import UsageError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK = ".cbpq-lock"
_BUSY = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)  # what the systems call a lock that somebody else has
_held: set[int] = set()  # descriptors of the locks that this process has


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep ``folder`` for this run, and make it if it is not there. Folders that were made and stayed empty are removed
    again at the end, and so is the file that carries the lock; only a killed process leaves it behind, unlocked.

    Raises:
        UsageError: another run has it.
        CbpqError: it cannot be written to.
    """
    made = [place for place in (folder, *folder.absolute().parents) if not place.exists()]
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = _acquire(folder / LOCK)
        if descriptor is None:
            raise _in_use(folder)
        _held.add(descriptor)
        try:
            yield
        finally:
            _held.discard(descriptor)
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()  # while it is locked: see _acquire
            os.close(descriptor)
    finally:
        for place in made:
            with contextlib.suppress(OSError):
                place.rmdir()


def check_free(folder: Path) -> None:
    """Look without taking the lock or leaving anything behind.

    Raises:
        UsageError: a run is writing to ``folder`` at this moment.
    """
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR)
    except (OSError, ValueError):  # no lock, so nobody has it
        return
    try:
        if not _lock(descriptor):
            raise _in_use(folder)
    finally:
        os.close(descriptor)


def _in_use(folder: Path) -> UsageError:
    return UsageError(f"another run is writing to {folder}; wait until it has ended, or name another folder with -o")


def _acquire(path: Path) -> int | None:
    """A descriptor of the file at ``path``, locked; None if another process has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not _lock(descriptor):
            os.close(descriptor)
            return None
        # who had the lock may have removed the file between our two steps; then it is no longer the one others find
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open file; False if another process has it. Where a file system knows no locks, nobody ever has it."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _BUSY
    return True


def _leave_to_parent() -> None:
    """A forked process has the locks too, and those that read pictures live on for seconds after a killed run."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
