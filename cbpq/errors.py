"""One family of exceptions. Every message is one line: what is wrong, where, and what to do next.

``exit_code`` is what the command line exits with: 1 failed, 2 usage, 3 a gate not met, 4 an optional part missing.
"""

import difflib
import importlib
import logging
from collections.abc import Iterable
from types import ModuleType

LONGEST_FOREIGN = 300  # characters of what another library says


class CbpqError(Exception):
    """Anything cbpq refuses to do or could not do. The message is one line meant for the user."""

    exit_code = 1


class UsageError(CbpqError):
    """The request itself makes no sense: an unknown name, a path that does not exist, flags that contradict."""

    exit_code = 2


class SourceError(CbpqError):
    """A model or checkpoint that cannot be read, recognised or fitted together."""


class DataError(CbpqError):
    """Images or labels that cannot be used."""


class FileFormatError(CbpqError):
    """A cbpq file that is damaged, or no cbpq file at all."""


class TrainingError(CbpqError):
    """A training run that cannot go on: a loss that is not finite, a checkpoint that does not fit."""


class GateError(CbpqError):
    """The result is there, but it misses a bound the user set (``--min-top1``, ``--max-drop``)."""

    exit_code = 3


class MissingPartError(CbpqError):
    """An optional package or a device that this machine does not have."""

    exit_code = 4


def one_line(text: object) -> str:
    """Text for a message: without line breaks, and without the stray bytes that a file name may hold."""
    return " ".join(str(text).encode("utf-8", "backslashreplace").decode().split())


def brief(error: BaseException) -> str:
    """What an exception of another library says, on one line, the beginning of it if it is long."""
    text = one_line(error) or type(error).__name__
    return text if len(text) <= LONGEST_FOREIGN else text[:LONGEST_FOREIGN] + "…"


def did_you_mean(name: str, known: Iterable[str], count: int = 3) -> str:
    """A hint such as ``; did you mean 'ternary'?`` for a mistyped name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(match) for match in close)}?" if close else ""


def require_extra(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, without what it logs meanwhile.

    Raises:
        MissingPartError: it is not installed; the message holds the install command.
    """
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))  # torch logs what it will not let torchao do in a later version
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPartError(f'{module} is not installed; run: pip install "cbpq[{extra}]"') from error
    finally:
        logging.disable(disabled)
