"""What a run tells while it goes on: its events, to whoever listens and into a file, and how long each phase took."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from cbpq import distributed
from cbpq.atomic import atomic_write, writing
from cbpq.events import Event, Interrupted, Phase, Tick
from cbpq.plain import plain
from cbpq.training import Step


class Journal:
    """The events of one run. Of several processes all tell their listeners, and the main one writes.

    Args:
        path: the file, a line of JSON for each event that is worth keeping.
        listener: called with every event.
        should_stop: asked at every tick.

    Attributes:
        lines: the file's, so far; part of the checkpoint, so that no event comes twice.
        seconds: of each phase.
    """

    def __init__(self, path: Path, listener: Callable[[Event], None], should_stop: Callable[[], bool]) -> None:
        self.path, self.listener, self.should_stop = path, listener, should_stop
        self.lines: list[str] = []
        self.seconds: dict[str, float] = {}

    def start(self) -> None:
        """Write the file anew, with the lines that there are."""
        if distributed.is_main():
            atomic_write(self.path, "".join(self.lines).encode())

    def emit(self, event: Event) -> None:
        """Tell an event, and write it down if it is worth keeping."""
        self.listener(event)
        if isinstance(event, Phase | Tick) or (isinstance(event, Step) and event.cfs is None):
            return
        line = json.dumps({"event": type(event).__name__, **plain(asdict(event))}) + "\n"
        self.lines.append(line)
        if distributed.is_main():
            with writing(self.path), self.path.open("a") as stream:
                stream.write(line)

    @contextlib.contextmanager
    def phase(self, name: str, steps: int) -> Iterator[None]:
        """The time spent within is that of the phase ``name``, which takes so many ticks."""
        self.emit(Phase(name, steps))
        started = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    def tick(self) -> None:
        """A step of a phase is done.

        Raises:
            Interrupted: the run is to stop; the last checkpoint is where it goes on.
        """
        self.listener(Tick())
        if self.should_stop():
            raise Interrupted("stopped; go on with --resume")
