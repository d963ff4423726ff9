"""Several processes: starting them, joining the others, and saying once for all of them why a run failed.

``--nproc-per-node N`` hands over to PyTorch's elastic launcher, which starts this command N times with the variables
that ``torchrun`` sets, ends all when one dies, and starts them again. A failure that would only happen again, such as
wrong usage or a full disk, is no reason to: the process that has it writes down the exit code and has the launcher end
the others.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from cbpq.errors import CbpqError, MissingPartError, UsageError

MAX_RESTARTS = 3
VERDICT = "CBPQ_VERDICT_FILE"  # names the file in which a process leaves the exit code of all of them
LOST = "lost contact with another process of this run, which was killed, or whose machine is gone"


def are_several() -> bool:
    """Whether a launcher or scheduler has started this command more than once."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def launch(count: int) -> int:
    """Run this command ``count`` times on this machine, and return the exit code of all of them together.

    Raises:
        UsageError: this process has been started by a launcher itself.
        MissingPartError: this PyTorch cannot do it.
        CbpqError: a process died again and again.
    """
    if "WORLD_SIZE" in os.environ:
        raise UsageError("--nproc-per-node starts the processes itself; leave it out under torchrun or a scheduler")
    from torch import distributed

    if not distributed.is_available():
        raise MissingPartError("this build of PyTorch has no torch.distributed; leave out --nproc-per-node")
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # what there is to say, the processes say
    # else a process that is started again may read what an earlier one has left in the store that both are given
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    with tempfile.TemporaryDirectory() as folder:
        verdict = Path(folder) / "verdict"
        os.environ[VERDICT] = str(verdict)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            run_id=str(uuid.uuid4()),
            max_restarts=MAX_RESTARTS,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "cbpq", *sys.argv[1:])
        except SignalException as signalled:  # sent on to the processes, which end
            return int(verdict.read_text()) if verdict.exists() else 128 + signalled.sigval
        except ChildFailedError as error:
            number, failure = error.get_first_failure()
            why = failure.signal_name() if failure.exitcode < 0 else f"exit code {failure.exitcode}"
            raise CbpqError(
                f"process {number} died ({why}), after {MAX_RESTARTS} restarts; what was saved is whole, go on with "
                "--resume"
            ) from error
    return 0


def is_launched() -> bool:
    """Whether ``launch`` has started this process."""
    return VERDICT in os.environ


def calm() -> None:
    """Keep PyTorch's own warnings off the terminal, which every process would print; before it is imported."""
    if are_several() and not os.environ.get("CBPQ_DEBUG"):
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def finish() -> None:
    """The end of a run that has not failed."""
    if are_several() and (joined := sys.modules.get("cbpq.distributed")):
        joined.leave()


def restarts() -> int:
    """How often the launcher has started the processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def most_restarts() -> int:
    """How often it may."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))


@contextlib.contextmanager
def last_word(error: BaseException, message: str, code: int) -> Iterator[str | None]:
    """What this process is to say of an error; nothing if another says it. Afterwards all processes may end."""
    if not are_several():
        yield message
        return
    joined = sys.modules.get("cbpq.distributed")
    lost = joined is not None and joined.is_lost_contact(error)
    if joined is not None and joined.world_size() > 1:
        speaks = joined.first_to_say()
    else:  # before they have met, all fail in the same way, but for one that does not find the others
        speaks = os.environ.get("RANK", "0") == "0" or (joined is not None and isinstance(error, joined.ContactError))
    said = (LOST if lost else message) if speaks else None
    yield said
    if said:
        _tell_launcher(said, None if lost or code > 128 else code)
    if joined is not None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        joined.wait_for_others()


def _tell_launcher(message: str, code: int | None) -> None:
    """Let torchrun's summary hold the message; have our own launcher end the run, unless the code is None."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))
    if is_launched() and code is not None:
        Path(os.environ[VERDICT]).write_text(str(code))
        os.kill(os.getppid(), signal.SIGHUP)  # which the launcher sends on
