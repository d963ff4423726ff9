"""The lock of an output folder. That a killed run gives it back is tested in test_faults."""

import errno
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest

from cbpq import locking
from cbpq.errors import CbpqError, UsageError
from cbpq.locking import LOCK, check_free, held


def test_one_at_a_time(tmp_path: Path) -> None:
    check_free(tmp_path)
    with held(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]
        with pytest.raises(UsageError, match=r"another run is writing to .*-o"):
            check_free(tmp_path)
        with pytest.raises(UsageError, match="another run is writing to"), held(tmp_path):
            pass
        with held(tmp_path / "below"):  # that is another folder
            pass
    assert list(tmp_path.iterdir()) == []
    with held(tmp_path):
        pass


def test_folders_are_made_and_those_that_stay_empty_removed(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), held(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with held(tmp_path / "a" / "b"):
        (tmp_path / "a" / "result").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "result"]
    with pytest.raises(CbpqError, match="cannot write"), held(tmp_path / "a" / "result"):
        pass


def test_a_file_that_a_killed_run_left_locks_nothing(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    check_free(tmp_path)
    with held(tmp_path), pytest.raises(UsageError):
        check_free(tmp_path)
    assert not (tmp_path / LOCK).exists()


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run opens the file, and gets its lock when its holder has just removed it."""
    true, removals = locking._lock, iter((True, True))

    def lock(descriptor: int) -> bool:
        if next(removals, False):
            (tmp_path / LOCK).unlink()
        return true(descriptor)

    monkeypatch.setattr(locking, "_lock", lock)
    with held(tmp_path), pytest.raises(UsageError):
        check_free(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
def test_forked_processes_do_not_hold_it(tmp_path: Path) -> None:
    with held(tmp_path):
        (descriptor,) = locking._held
        child = os.fork()
        if not child:
            try:
                os.fstat(descriptor)
            except OSError:
                os._exit(0 if not locking._held else 2)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(UsageError):
            check_free(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Runs go on as if alone."""

    def flock(*arguments: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with held(tmp_path):
        check_free(tmp_path)
