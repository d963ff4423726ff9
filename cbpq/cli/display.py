"""What ``cbpq quantize`` shows while it works: a live display on a terminal, plain lines elsewhere. And what it does
when it is asked to stop.
"""

import contextlib
import math
import signal
import time
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from cbpq.cli import processes
from cbpq.cli.common import note, print_json, warn
from cbpq.events import Evaluated, Event, Interrupted, Phase, Resumed, Saved, Tick
from cbpq.planning import Plan
from cbpq.sections import percent
from cbpq.training import EpochEnd, Step

PLAIN_SECONDS = 20  # between two lines of progress where there is no terminal


class Display:
    """Shows events; a context manager, so that the terminal is always given back as it was.

    The first Ctrl-C asks the run to save and stop, the second ends it at once. SIGTERM, which schedulers send before
    they kill, asks for the same; more of them change nothing, since some send it to several processes.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: TaskID | None = None
        self._numbers: dict[str, str] = {}
        self._announced: set[str] = set()
        self.above: RenderableType | None = None  # shown over the progress on a terminal
        self._live = Live(self._screen(), console=console, refresh_per_second=4, transient=True)
        self._interactive = console.is_terminal and not console.quiet
        self._said_at = time.monotonic()
        self._signal = 0  # that asked to stop
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> "Display":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous_handlers[number] = signal.signal(number, self._on_signal)
        if self._interactive:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._interactive:
            self._live.stop()
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        if isinstance(error, Interrupted) and self._signal:
            error.exit_code = 128 + self._signal  # as shells say it

    def should_stop(self) -> bool:
        """Whether Ctrl-C was pressed, or SIGTERM came."""
        return bool(self._signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        several = processes.are_several()  # one of which could not end the others at once
        if not self._signal:
            self._signal = number
            at_once = "" if several else "; Ctrl-C again to stop at once"
            with contextlib.suppress(RuntimeError, OSError):  # in the middle of another line; nobody listens
                note(self._console, f"stopping after this step{at_once}")
        elif number == signal.SIGINT and not several:
            raise KeyboardInterrupt

    def show(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Phase):
            self._begin(event)
        elif isinstance(event, Tick) and self._task is not None:
            self._progress.advance(self._task)
        elif isinstance(event, Step):
            self._step(event)
        elif isinstance(event, EpochEnd):
            text = f"epoch {event.epoch}/{event.epochs}: loss {event.loss:.4f}, CFS {event.cfs:.4f}, lr {event.lr:.2g}"
            window = f", window {_window(event.window)}" if event.window is not None else ""
            note(self._console, f"{text}{window}, {event.seconds:.0f} s")
        elif isinstance(event, Evaluated):
            note(self._console, f"{event.which}: {_goodness(event.result)}")
        elif isinstance(event, Resumed):
            note(self._console, f"going on after {event.step} steps of epoch {event.epoch}")
        elif isinstance(event, Saved):
            self._numbers["saved"] = time.strftime("%H:%M:%S")
        if self._interactive:
            self._live.update(self._screen())

    def _begin(self, phase: Phase) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._numbers = {}
        self._task = self._progress.add_task(phase.name, total=phase.steps or None)
        if not self._interactive and phase.name not in self._announced:
            note(self._console, f"{phase.name} …")
            self._announced.add(phase.name)

    def _step(self, event: Step) -> None:
        assigned = {
            "epoch": str(event.epoch),
            "loss": f"{event.loss:.4f}",
            "lr": f"{event.lr:.2e}",
            "window": _window(event.window) if event.window is not None else "",
            "images/s": f"{event.images_per_second:.0f}",
            "Lagrangian": f"{event.lagrangian:.4f}" if event.lagrangian is not None else "",
            "CFS": f"{event.cfs:.5f}" if event.cfs is not None else "",
        }
        self._numbers.update({name: text for name, text in assigned.items() if text})
        if self._task is not None:
            self._progress.update(self._task, completed=(event.epoch - 1) * event.steps_per_epoch + event.step)
        if not self._interactive and time.monotonic() - self._said_at >= PLAIN_SECONDS:
            self._said_at = time.monotonic()
            numbers = ", ".join(f"{name} {text}" for name, text in self._numbers.items())
            note(self._console, f"{event.progress:.0%}: step {event.step}/{event.steps_per_epoch}, {numbers}")

    def _screen(self) -> Group:
        numbers = Text("   ".join(f"{name} {text}" for name, text in self._numbers.items()), style="dim")
        return Group(*([self.above] if self.above is not None else []), self._progress, numbers)


def _goodness(result: Mapping[str, Any]) -> str:
    """How good a measured network is, in a few words."""
    if result["top1"] is not None:
        return f"top-1 {percent(result['top1'], interval=result['top1_interval'])}"
    comparison = result.get("comparison")
    if comparison is None:
        return f"{result['images']} pictures without labels"
    return f"agreement {percent(comparison['agreement'], interval=comparison['agreement_interval'])}"


def _window(window: float) -> str:
    return "shut" if math.isinf(window) else f"{window:.3g}"


def show_plan(job: Plan, origins: dict[str, str], console: Console, *, as_json: bool) -> None:
    """Print what would be done: every setting with its origin, and which weights are constrained."""
    chosen = {
        "constraint": job.levels.name,
        "method": job.method,
        "preset": job.resolved.preset,
        "device": str(job.device),
        **job.choices,
    }
    settings = {
        **{name: {"value": value, "from": origins.get(name, "default")} for name, value in chosen.items()},
        **job.resolved.to_dict(),
    }
    if as_json:
        document: dict[str, Any] = {"settings": settings, "source": job.loaded.info.to_dict()}
        document |= {"constrained": job.layers.constrained, "skipped": job.layers.skipped, "warnings": job.warnings}
        print_json(document)
        return
    table = Table(title="Settings", title_justify="left")
    for column in ("setting", "value", "from"):
        table.add_column(column, overflow="fold")
    for name, entry in settings.items():
        value = ", ".join(entry["value"]) if isinstance(entry["value"], list) else str(entry["value"])
        table.add_row(name, Text(value), Text(entry["from"]))
    console.print(table)
    parameters = dict(job.loaded.model.named_parameters())
    total = sum(parameter.numel() for parameter in parameters.values())
    layers = Table(title="Weights", title_justify="left")
    for column in ("weight", "shape", "share", "is"):
        layers.add_column(column, overflow="fold")
    for name in (*job.layers.constrained, *(n for n in job.layers.skipped if parameters[n].dim() > 1)):
        parameter = parameters[name]
        share = f"{100 * parameter.numel() / total:.2f} %"
        fate = "constrained" if name in job.layers.constrained else f"float: {job.layers.skipped[name]}"
        layers.add_row(name, "×".join(map(str, parameter.shape)), share, fate)
    console.print(layers)
    for warning in job.warnings:
        warn(console, warning)
