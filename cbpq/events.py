"""What a run tells whoever listens: ``cbpq.pipeline.execute`` calls its listener with these, one after the other."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cbpq.errors import CbpqError
from cbpq.training import EpochEnd, Step


@dataclass(frozen=True)
class Phase:
    """A part of the run begins; ``steps`` ticks follow, or 0 if it is not counted."""

    name: str
    steps: int = 0


@dataclass(frozen=True)
class Tick:
    """One step of the present phase is done."""


@dataclass(frozen=True)
class Evaluated:
    """A network was measured: ``original``, ``epoch N`` or ``quantized``."""

    which: str
    result: Mapping[str, Any]


@dataclass(frozen=True)
class Saved:
    """A checkpoint was written, with ``step`` steps of the epoch after ``epoch`` done."""

    epoch: int
    step: int


@dataclass(frozen=True)
class Resumed:
    """An unfinished run goes on after ``step`` steps of ``epoch``."""

    epoch: int
    step: int


Event = Phase | Tick | Evaluated | Saved | Resumed | Step | EpochEnd


class Interrupted(CbpqError):
    """The run was asked to stop."""

    exit_code = 130  # 143 where SIGTERM asked
