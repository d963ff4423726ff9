"""The main job, from source to file: ``execute`` does what a ``Plan`` says, ``quantize`` makes the plan as well.

Files of a run, in its output folder: ``model.safetensors``, ``report.json``, ``report.md``, ``events.jsonl`` and
``settings.toml``. Until the run is finished, its state and events are in ``checkpoint/``; an earlier result stays as it
is up to that moment.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cbpq.atomic import atomic_write, remove_leftovers
from cbpq.checkpoint import load_checkpoint, save_checkpoint
from cbpq.data import EvalLoader, TrainLoader
from cbpq.errors import CbpqError, TrainingError, UsageError
from cbpq.evaluation import Predictions, predict, summarize
from cbpq.model_file import save
from cbpq.outputs import claim_output, publish, state_file, working_folder, working_in, writing
from cbpq.planning import Plan, plan
from cbpq.report import Report, plain
from cbpq.summary import build_report, metric_facts, run_facts, settings_toml
from cbpq.training import EpochEnd, Run, Step, finish, prepare, train


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

    exit_code = 130


def quantize(
    source: str, data: str, output: str | Path, *, resume: bool = False, overwrite: bool = False, **choices: Any
) -> Report:
    """The whole job: load, measure, constrain, train, measure again, write. The library's twin of ``cbpq quantize``.

    Args:
        source: what to quantize, see ``cbpq.models.load_model``.
        data: what to train and measure with, see ``cbpq.data.load_data``.
        output: folder for the results.
        resume: go on with an unfinished run in ``output``.
        overwrite: replace what is in ``output``.
        **choices: see ``cbpq.planning.plan``; for example ``constraint="ternary"``, ``settings=[("here", {"epochs":
        3})]``.

    Returns:
        The report that is also in ``output``.

    Raises:
        CbpqError: what went wrong, and what to do.
    """
    claim_output(Path(output), resume=resume, overwrite=overwrite)
    return execute(plan(source, data=data, **choices), Path(output), resume=resume, overwrite=overwrite)


def execute(
    job: Plan,
    output: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    listener: Callable[[Event], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Report:
    """Do what the plan says; the result is in ``output``.

    Args:
        job: from ``plan``, with data.
        output: folder for the results.
        resume: go on with the unfinished run in ``output``; if it had saved nothing yet, start.
        overwrite: replace a result or an unfinished run that is there.
        listener: called with every event.
        should_stop: asked at every event; True saves a checkpoint and ends with Interrupted.

    Raises:
        CbpqError: what went wrong. The last checkpoint and an earlier result are intact.
        Interrupted: ``should_stop`` said so.
    """
    if job.data is None or job.data.train is None or job.data.val is None:
        raise UsageError("quantizing needs data to train on: give --data a folder or .npz file with training pictures")
    claim_output(output, resume=resume, overwrite=overwrite)
    return _Execution(job, job.data.train, job.data.val, output, listener, should_stop).run(resume)


class _Execution:
    """One call of ``execute``: the plan, where it writes, and what it knows so far."""

    def __init__(
        self,
        job: Plan,
        loader: TrainLoader,
        val: EvalLoader,
        output: Path,
        listener: Callable[[Event], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.job, self.loader, self.val, self.output = job, loader, val, output
        self.listener, self.should_stop = listener, should_stop
        self.work, self.state_path = working_folder(output), state_file(output)
        self.log: list[str] = []  # lines of events.jsonl; part of the checkpoint, so that no event comes twice
        self.seconds: dict[str, float] = {}
        self.measured = 0  # the last epoch after which the network was measured
        self.original: Predictions

    def run(self, resume: bool) -> Report:
        """The job, from the first measurement to the last file."""
        if not resume:
            shutil.rmtree(self.work, ignore_errors=True)
        state = load_checkpoint(self.state_path, self.job.identity()) if self.state_path.exists() else None
        with working_in(self.output):
            remove_leftovers(self.work)
            self._start_log(state["log"] if state else [])
            network = self.job.loaded.model.to(self.job.device)
            before = {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}
            if state:
                self.original = Predictions.from_state(state["original"])
                self.seconds, self.measured = state["seconds"], state["measured"]
            else:
                self.original = self._measure("original", network)
            run = self._prepare(network)
            if state:
                run.load_state_dict(state["run"])
                self._emit(Resumed(run.epoch + 1, run.step))
            else:
                self._save(run)
            self._train(run)
            return self._conclude(run, before)

    def _prepare(self, network: nn.Module) -> Run:
        job = self.job
        return prepare(
            network,
            self.loader,
            levels=job.levels,
            method=job.method,
            settings=job.resolved.settings,
            layers=job.layers,
            device=job.device,
            amp=job.amp,
            max_seconds=60 * job.max_minutes if job.max_minutes else float("inf"),
        )

    def _train(self, run: Run) -> None:
        settings = self.job.resolved.settings
        saved_at = run.seconds
        training = Phase("training", settings.epochs * len(self.loader))
        self._measure_epoch(run)  # what was interrupted before it could
        self._emit(training)
        for event in train(run):
            self._emit(event)
            stop = self.should_stop()
            if stop or isinstance(event, EpochEnd) or run.seconds - saved_at >= 60 * settings.checkpoint_minutes:
                self._save(run)
                saved_at = run.seconds
            if stop:
                raise Interrupted(f"stopped in epoch {run.epoch + 1}; everything is saved, go on with --resume")
            if self._measure_epoch(run):
                self._emit(training)
        self.seconds["training"] = run.seconds

    def _measure_epoch(self, run: Run) -> bool:
        """Measure after an epoch that is not the last, if the settings say so and it was not done yet."""
        every = self.job.resolved.settings.evaluate_every
        if run.done or run.step or run.epoch == self.measured or not every or run.epoch % every:
            return False
        self._measure(f"epoch {run.epoch}", run.model)
        self.measured = run.epoch
        return True

    def _conclude(self, run: Run, before: Mapping[str, Tensor]) -> Report:
        """Settle, measure, write everything into the working folder, and only then put it in its place."""
        batches = min(self.job.resolved.settings.batchnorm_batches, len(self.loader))
        with self._phase("settling the weights", batches):
            finish(run, self._tick)
        final = self._measure("quantized", run.model)
        save(
            self.work / "model.safetensors",
            run.constrained,
            self.job.loaded.info,
            run=run_facts(self.job),
            metrics=metric_facts(self.original, final),
        )
        report = build_report(
            self.job, run, before, self.original, final, self.work / "model.safetensors", self.seconds
        )
        texts = {
            "report.json": json.dumps(report.to_dict(), indent=2),
            "report.md": report.to_markdown(),
            "events.jsonl": "".join(self.log),
            "settings.toml": settings_toml(self.job),
        }
        for name, text in texts.items():
            atomic_write(self.work / name, text.encode())
        publish(self.output)
        return report

    def _measure(self, which: str, network: nn.Module) -> Predictions:
        with self._phase("measuring", len(self.val)):
            predictions = predict(network, self.val, self.job.device, amp=self.job.amp, on_batch=self._tick)
        compared = None if predictions.labelled or which == "original" else self.original
        self._emit(Evaluated(which, summarize(predictions, compared).to_dict()))
        return predictions

    @contextlib.contextmanager
    def _phase(self, name: str, steps: int) -> Iterator[None]:
        self._emit(Phase(name, steps))
        started = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    def _tick(self) -> None:
        self.listener(Tick())
        if self.should_stop():  # outside training: the last checkpoint is where the run goes on
            raise Interrupted("stopped; go on with --resume")

    def _emit(self, event: Event) -> None:
        self.listener(event)
        if isinstance(event, Phase | Tick) or (isinstance(event, Step) and event.cfs is None):
            return
        line = json.dumps({"event": type(event).__name__, **plain(asdict(event))}) + "\n"
        self.log.append(line)
        path = self.work / "events.jsonl"
        with writing(path), path.open("a") as stream:
            stream.write(line)

    def _start_log(self, lines: list[str]) -> None:
        self.log = list(lines)
        atomic_write(self.work / "events.jsonl", "".join(lines).encode())

    def _save(self, run: Run) -> None:
        if not is_finite(run):
            raise TrainingError(
                f"a weight is not finite any more after step {run.step} of epoch {run.epoch + 1}; "
                f"lower --lr (now {run.settings.lr:g}) or run without --amp"
            )
        state = {
            "run": run.state_dict(),
            "log": self.log,
            "measured": self.measured,
            "seconds": self.seconds,
            "original": self.original.state_dict(),
        }
        save_checkpoint(self.state_path, self.job.identity(), state)
        self._emit(Saved(run.epoch, run.step))


def is_finite(run: Run) -> bool:
    """Whether everything the run has learned is. The loss alone does not tell: a latent weight that is NaN has a
    nearest level all the same.
    """
    kept: list[Tensor] = list(run.model.parameters())
    kept += [tensor for weight in run.constrained.state_dict()["weights"].values() for tensor in weight.values()]
    return all(bool(tensor.isfinite().all()) for tensor in kept)
