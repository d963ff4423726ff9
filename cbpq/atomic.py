"""Files and folders that appear whole or not at all."""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from cbpq.errors import CbpqError

_PREFIX, _SUFFIX = ".cbpq-", ".tmp"

_ADVICE = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EDQUOT: "free some space or choose another folder",
    errno.ENOENT: "create the folder first or choose another",
    errno.ENOTDIR: "its parent is a file; choose another folder",
    errno.EISDIR: "a folder has this name; choose another name",
}


def atomic_write(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``: whoever looks sees the old content or the new one, never a part.

    The bytes go to a temporary file in the same folder, which then takes the place of ``path``; a symbolic link stays
    a link and its target is replaced. On any failure ``path`` is as before and the temporary file is gone. Only a
    process killed in the middle leaves one behind: see `remove_leftovers`.

    Raises:
        CbpqError: the folder is missing or not writable, the disk is full, or ``path`` is no regular file.
    """
    with writing(path):
        target = path.resolve()
        if target.is_symlink() or (target.exists() and not target.is_file()):
            # a loop of links; or a device, and root replacing /dev/null by a file would be a disaster
            raise OSError(errno.EISDIR if target.is_dir() else errno.EINVAL, "not a regular file")
        _replace(target, data)


def atomic_write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Make the folder ``path`` with exactly these files, by their paths in it. A folder of that name is replaced, with
    all that is in it: whoever calls has made sure that it may be.

    The files go to a temporary folder beside it, which then takes its place. On any failure ``path`` is as before and
    the temporary folder is gone; only a process killed in the middle leaves one behind.

    Raises:
        CbpqError: the place cannot be written to, the disk is full, or ``path`` is no folder.
    """
    with writing(path):
        target = path.resolve()
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise OSError(errno.EEXIST, "a file has this name")
        temporary, old = (target.with_name(f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}") for _ in range(2))
        temporary.mkdir()
        try:
            for name, data in files.items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                _replace(temporary / name, data)
            if target.exists():
                os.rename(target, old)  # a folder that is not empty cannot be replaced in one step
            try:
                os.rename(temporary, target)
            except BaseException:
                if old.exists():
                    os.rename(old, target)
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one line what keeps ``path`` from being written.

    Raises:
        CbpqError: an operation inside failed; the message has the system's reason.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        # resolve() raises ValueError for a null byte and, before Python 3.13, RuntimeError for a loop of links
        reason, number = (error.strerror, error.errno) if isinstance(error, OSError) else (str(error), None)
        advice = _ADVICE.get(number or 0, "choose a place that can be written to")
        raise CbpqError(f"cannot write {path} ({reason}); {advice}") from error


def _replace(target: Path, data: bytes) -> None:
    temporary = target.with_name(f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}")
    # mode 0o666 lets the umask decide, as for any other file; tempfile would make it private
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())  # else a crash of the machine could leave the new name with empty content
        os.replace(temporary, target)
    except BaseException:  # also for Ctrl-C: no temporary file stays
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    # The new name is durable once its folder is; some systems cannot sync a folder, and the file is whole either way.
    with contextlib.suppress(OSError):
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that killed processes left in ``folder``; only for a folder nobody is writing to."""
    for leftover in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            leftover.unlink()
