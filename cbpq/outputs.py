"""The output folder of a run: who may write there, and that nothing half-made stays.

Files of a finished run are RESULTS. Until it is finished, its state and events are in ``checkpoint/``.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cbpq.errors import CbpqError, UsageError

RESULTS = ("model.safetensors", "report.json", "report.md", "events.jsonl", "settings.toml")


def working_folder(output: Path) -> Path:
    """Where an unfinished run keeps everything."""
    return output / "checkpoint"


def state_file(output: Path) -> Path:
    """The checkpoint: where it is, there is an unfinished run."""
    return working_folder(output) / "state.pt"


def claim_output(output: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Make sure that a run may write into ``output``, before any work is done. Leaves nothing behind.

    Raises:
        UsageError: it holds a result or an unfinished run, and neither ``resume`` nor ``overwrite`` was asked for.
        CbpqError: it cannot be written to.
    """
    if resume and overwrite:
        raise UsageError("--resume and --overwrite contradict each other: go on with the run, or start again?")
    try:
        if output.exists() and not output.is_dir():
            raise UsageError(f"the output {output} is a file; name a folder")
        unfinished = state_file(output).exists()
        finished = [name for name in RESULTS if (output / name).exists()]
        existing = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    except (OSError, ValueError) as error:  # a name that is too long, or holds a null byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"the output {str(output)!r} cannot be used ({reason}); choose another with -o") from error
    if unfinished and not (resume or overwrite):
        raise UsageError(
            f"{output} holds an unfinished run; use --resume to go on with it or --overwrite to start again"
        )
    if finished and resume and not unfinished:
        raise UsageError(f"the run in {output} is finished, nothing is left to resume; use --overwrite to start again")
    if finished and not (resume or overwrite):
        raise UsageError(f"{output} already holds {finished[0]}; use --overwrite, or name another folder with -o")
    with writing(output), tempfile.TemporaryFile(dir=existing):
        pass


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one line what keeps ``path`` from being written."""
    try:
        yield
    except OSError as error:
        raise CbpqError(
            f"cannot write {path} ({error.strerror}); make room for it, or choose another place with -o"
        ) from error


@contextlib.contextmanager
def working_in(output: Path) -> Iterator[None]:
    """Make the working folder; if the run fails before it has saved anything, take back whatever was made."""
    work = working_folder(output)
    made = [folder for folder in (work, *work.absolute().parents) if not folder.exists()]
    try:
        with writing(work):
            work.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        if not state_file(output).exists():
            shutil.rmtree(work, ignore_errors=True)
            for folder in made[1:]:
                with contextlib.suppress(OSError):
                    folder.rmdir()
        raise


def publish(output: Path) -> None:
    """Put the results in their place, and end the unfinished run.

    A process killed in between leaves an unfinished run that, resumed, does this again.
    """
    work = working_folder(output)
    with writing(output):
        for name in RESULTS:
            os.replace(work / name, output / name)
        state_file(output).unlink()  # before the rest: without it, what is left of the folder is no unfinished run
    shutil.rmtree(work, ignore_errors=True)
