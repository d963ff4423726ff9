"""The output folder of a run: who may write there, and that nothing half-made stays.

Files of a finished run are RESULTS. Until it is finished, its state and events are in ``checkpoint/``.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cbpq.atomic import writing
from cbpq.errors import UsageError
from cbpq.locking import check_free, held

RESULTS = ("model.safetensors", "report.json", "report.md", "events.jsonl", "settings.toml")


def working_folder(output: Path) -> Path:
    """Where an unfinished run keeps everything."""
    return output / "checkpoint"


def state_file(output: Path) -> Path:
    """The checkpoint: where it is, there is an unfinished run."""
    return working_folder(output) / "state.pt"


def is_finished(output: Path) -> bool:
    """Whether there is a result, and no unfinished run."""
    return (output / RESULTS[0]).exists() and not state_file(output).exists()


def claim_output(output: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Make sure that a run may write into ``output``, before any work is done. Leaves nothing behind.

    Raises:
        UsageError: another run is writing to it; or it holds a result or an unfinished run, and neither ``resume`` nor
            ``overwrite`` was asked for.
        CbpqError: it cannot be written to.
    """
    if resume and overwrite:
        raise UsageError("--resume and --overwrite contradict each other: go on with the run, or start again?")
    check_free(output)
    _check_content(output, resume, overwrite)


def _check_content(output: Path, resume: bool, overwrite: bool) -> None:
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
def working_in(output: Path, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Keep ``output`` for this run and make the working folder, an empty one unless ``resume``. If the run fails before
    it has saved anything, whatever was made is taken back.

    Raises:
        UsageError: as ``claim_output``.
        CbpqError: as ``claim_output``.
    """
    work = working_folder(output)
    with held(output):
        _check_content(output, resume, overwrite)  # again: another run may have ended meanwhile
        if not resume:
            shutil.rmtree(work, ignore_errors=True)
        try:
            with writing(work):
                work.mkdir(exist_ok=True)
            yield
        except BaseException:
            if not state_file(output).exists():
                shutil.rmtree(work, ignore_errors=True)
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
