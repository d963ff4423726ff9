"""The main job, from source to file: ``execute`` does what a ``Plan`` says, ``quantize`` makes the plan as well.

Files of a run, in its output folder: ``model.safetensors``, ``report.json``, ``report.md``, ``events.jsonl`` and
``settings.toml``. Until the run is finished, its state and events are in ``checkpoint/``; an earlier result stays as it
is up to that moment.
"""

import contextlib
import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cbpq import distributed, stages
from cbpq.agreement import check_same_plan, check_same_weights
from cbpq.atomic import atomic_write, remove_leftovers
from cbpq.checkpoint import load_checkpoint, save_checkpoint, understood
from cbpq.compensation import Rounding, Start, round_network
from cbpq.data import Data, synthetic_data
from cbpq.devices import PeakMemory
from cbpq.errors import DataError, TrainingError, UsageError
from cbpq.evaluation import Predictions, predict, summarize
from cbpq.events import Evaluated, Event, Interrupted, Phase, Resumed, Saved
from cbpq.journal import Journal
from cbpq.loaders import deaths_explained
from cbpq.model_file import halve, save
from cbpq.noise import signal_to_noise
from cbpq.outputs import claim_output, publish, state_file, working_folder, working_in
from cbpq.planning import Plan, check_labels_for_loss, plan
from cbpq.reconstruction import Reconstruction, reconstruct, reconstructible
from cbpq.report import Report
from cbpq.settling import finish, settling_batches, share_statistics
from cbpq.summary import HALVED, build_report, metric_facts, run_facts, settings_toml, stage_row
from cbpq.synthesis import save_pictures, steps_in_all, synthesize
from cbpq.tables import Stage
from cbpq.training import EpochEnd, Run, prepare, train

SYNTHESIS = "synthesis"
NEAREST, COMPENSATED, RECONSTRUCTED, TRAINED = "nearest rounding", "compensated rounding", "reconstruction", "training"
STAGES = (NEAREST, COMPENSATED, RECONSTRUCTED, TRAINED)
LAYER_PICTURES = 128  # that the layers' outputs are compared on


def quantize(
    source: str, data: str | None, output: str | Path, *, resume: bool = False, overwrite: bool = False, **choices: Any
) -> Report:
    """The whole job: load, measure, constrain, train, measure again, write. The library's twin of ``cbpq quantize``.

    Args:
        source: what to quantize, see ``cbpq.models.load_model``.
        data: what to train and measure with, see ``cbpq.data.load_data``; None synthesises pictures.
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
    job = plan(source, data=data, resume=resume, **choices)
    return execute(job, Path(output), resume=resume, overwrite=overwrite)


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
    check_labels_for_loss(job)
    if job.data is not None and job.data.train is None:
        raise UsageError("quantizing needs pictures to train on: give --data a folder or .npz file with such")
    if distributed.is_main():
        claim_output(output, resume=resume, overwrite=overwrite)
    check_same_plan(job)
    if job.data is not None:
        stages.training_batches(job.data, job.resolved.settings)  # what is wrong with them is to be known at once
    writes = (
        working_in(output, resume=resume, overwrite=overwrite) if distributed.is_main() else contextlib.nullcontext()
    )
    with deaths_explained(), writes:
        return _Execution(job, output, resume, listener, should_stop).run()


class _Execution:
    """One call of ``execute``: the plan, where it writes, and what it knows so far."""

    def __init__(
        self,
        job: Plan,
        output: Path,
        resume: bool,
        listener: Callable[[Event], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.job, self.output, self.resume = job, output, resume
        self.should_stop = should_stop
        self.work, self.state_path = working_folder(output), state_file(output)
        self.journal = Journal(self.work / "events.jsonl", listener, should_stop)
        self.measured = 0  # the last epoch after which the network was measured
        self.data = job.data  # or made of synthesised pictures
        self.pictures: Tensor | None = None  # those
        self.original: Predictions | None = None
        self.stages: list[Stage] = []  # what is done before training
        self.starts: dict[str, Start] = {}  # where training starts
        self.training_memory: int | None = None

    def run(self) -> Report:
        """The job, from the first measurement to the last file."""
        state = distributed.from_main(self._load)
        network = self.job.loaded.model.to(self.job.device)
        teacher = copy.deepcopy(network).eval().requires_grad_(False)
        if state:
            with understood(self.state_path):
                self._take_back(state, network)
        self.journal.start()
        self._get_pictures(teacher)
        if self.original is None:
            self.original = self._measure("original", teacher)
            self._save(network)
        if state is None or state["run"] is None:
            self._before_training(network, teacher)
        run = self._prepare(network, teacher)
        if state and state["run"] is not None:
            with understood(self.state_path):
                run.load_state_dict(state["run"])
            self.journal.emit(Resumed(run.epoch + 1, run.step))
        else:
            self._save(network, run)
        self._train(run)
        return self._conclude(run, teacher)

    def _load(self) -> dict[str, Any] | None:
        remove_leftovers(self.work)
        return load_checkpoint(self.state_path, self.job.identity()) if self.state_path.exists() else None

    def _take_back(self, state: Mapping[str, Any], network: nn.Module) -> None:
        self.journal.lines, self.journal.seconds = list(state["log"]), dict(state["seconds"])
        self.measured = state["measured"]
        self.original = Predictions.from_state(state["original"]) if state["original"] else None
        self.pictures = state["pictures"]
        self.stages = [Stage(**values) for values in state["stages"]]
        self.starts = {name: Start(*(t.to(self.job.device) for t in pair)) for name, pair in state["starts"].items()}
        if state["network"]:
            network.load_state_dict(state["network"])

    def _get_pictures(self, teacher: nn.Module) -> None:
        """Where there is no data: synthesise some, once."""
        if self.data is not None:
            return
        job, settings = self.job, self.job.resolved.settings
        spec, classes = job.loaded.info.input_spec, job.loaded.num_classes
        if self.pictures is None:
            with self.journal.phase(SYNTHESIS, steps_in_all(teacher, job.synthesis)):
                self.pictures = synthesize(
                    teacher,
                    spec,
                    classes,
                    job.synthesis,
                    seed=settings.seed,
                    device=job.device,
                    on_step=self.journal.tick,
                )
            distributed.take_from_main([self.pictures])
            if job.save_synthetic is not None and distributed.is_main():
                save_pictures(self.pictures, job.save_synthetic, self.resume)
            self._save(job.loaded.model)
        self.data = synthetic_data(
            self.pictures,
            spec,
            classes,
            batch_size=settings.batch_size,
            seed=settings.seed,
            augment=job.choices.get("augment", "auto"),
        )

    def _before_training(self, network: nn.Module, teacher: nn.Module) -> None:
        """Rounding, and reconstruction block by block; what was done before an interruption is not done again."""
        job, settings, data = self.job, self.job.resolved.settings, self._data()
        names = job.layers.constrained
        done = {stage.name for stage in self.stages}

        def rounding(rule: str) -> Rounding:
            return Rounding(job.levels, rule, settings.scale_rule, settings.scale_granularity)

        def nearest() -> dict[str, Start]:
            return round_network(network, teacher, names, rounding("nearest"))

        def compensated() -> dict[str, Start]:
            network.load_state_dict(teacher.state_dict())
            images = stages.calibration_images(data, job.device)
            return round_network(
                network, teacher, names, rounding("compensated"), images, self.journal.tick, job.layers.after
            )

        def reconstructed() -> dict[str, Start]:
            images = stages.augmented_images(data, settings, job.device)
            plan = Reconstruction(job.levels, job.method, settings, self._seconds_left() / 2)
            return reconstruct(network, teacher, self.starts, plan, images, self.journal.tick)

        if NEAREST not in done:
            self._stage(NEAREST, 0, network, nearest)
        if settings.rounding == "compensated" and COMPENSATED not in done:
            self._stage(COMPENSATED, len(names), network, compensated)
        if settings.epochs == 0:
            return
        if RECONSTRUCTED not in done:
            self.starts = stages.handed_on(network, teacher, self.starts, job.levels, settings.latent_weights)
            if settings.reconstruction_steps:
                blocks = len(reconstructible(network, names, stages.calibration_images(data, job.device, most=1)[0]))
                self._stage(RECONSTRUCTED, blocks * settings.reconstruction_steps, network, reconstructed)

    def _stage(self, name: str, steps: int, network: nn.Module, work: Callable[[], dict[str, Start]]) -> None:
        memory = PeakMemory(self.job.device)
        with self.journal.phase(name, steps):
            self.starts = work()
            own = [tensor for start in self.starts.values() for tensor in (start.latent, start.scale)]
            distributed.take_from_main([*network.state_dict().values(), *own])
        peak = memory.bytes()
        predictions = self._measure(name, network) if self.job.resolved.settings.evaluate_every else None
        self.stages.append(stage_row(name, predictions, self._original(), self.journal.seconds[name], peak))
        self._save(network)

    def _seconds_left(self) -> float:
        """Of --max-time, which counts from the beginning of synthesis or rounding; those two are never cut short."""
        minutes = self.job.max_minutes
        if minutes is None:
            return math.inf
        spent = sum(self.journal.seconds.get(name, 0.0) for name in (SYNTHESIS, *STAGES))
        return distributed.from_main(lambda: max(60 * minutes - spent, 1.0))

    def _data(self) -> Data:
        if self.data is None:
            raise TrainingError("there are no pictures")
        return self.data

    def _original(self) -> Predictions:
        if self.original is None:
            raise TrainingError("the original network was not measured")
        return self.original

    def _prepare(self, network: nn.Module, teacher: nn.Module) -> Run:
        job = self.job
        return prepare(
            network,
            stages.training_batches(self._data(), job.resolved.settings),
            levels=job.levels,
            method=job.method,
            settings=job.resolved.settings,
            layers=job.layers,
            device=job.device,
            autocast=job.autocast,
            max_seconds=self._seconds_left(),
            teacher=teacher,
            starts=self.starts or None,
        )

    def _train(self, run: Run) -> None:
        settings = self.job.resolved.settings
        memory = PeakMemory(self.job.device)
        saved_at = run.seconds
        training = Phase(TRAINED, settings.epochs * len(run.loader))
        self._measure_epoch(run)  # what was interrupted before it could
        if settings.epochs:
            self.journal.emit(training)
        try:
            for event in train(run):
                self.journal.emit(event)
                stop = distributed.any_of(self.should_stop())
                if stop or isinstance(event, EpochEnd) or run.seconds - saved_at >= 60 * settings.checkpoint_minutes:
                    self._save(run.model, run)
                    saved_at = run.seconds
                if stop:
                    raise Interrupted(f"stopped in epoch {run.epoch + 1}; everything is saved, go on with --resume")
                if self._measure_epoch(run):
                    self.journal.emit(training)
        except DataError:  # between two steps: pictures that vanished, say, may be back for --resume
            if distributed.world_size() == 1:  # else the others are in the middle of a step
                self._save(run.model, run)
            raise
        self.journal.seconds[TRAINED] = run.seconds
        self.training_memory = memory.bytes()

    def _measure_epoch(self, run: Run) -> bool:
        """Measure after an epoch that is not the last, if the settings say so and it was not done yet."""
        every = self.job.resolved.settings.evaluate_every
        if run.done or run.step or run.epoch == self.measured or not every or run.epoch % every:
            return False
        share_statistics(run)
        with run.constrained.projected():
            self._measure(f"epoch {run.epoch}", run.model)
        self.measured = run.epoch
        return True

    def _conclude(self, run: Run, teacher: nn.Module) -> Report:
        """Settle, measure, write everything into the working folder, and only then put it in its place."""
        with self.journal.phase("settling the weights", settling_batches(run)):
            finish(run, self.journal.tick)
        check_same_weights(run)
        half = self.job.choices["half"]
        final = self._measure(f"before {HALVED}" if half else "quantized", run.model)
        if run.steps:
            row = stage_row(TRAINED, final, self._original(), self.journal.seconds[TRAINED], self.training_memory)
            self.stages.append(row)
        if half:
            final = self._halve(run, final)
        return distributed.from_main(lambda: self._write(run, teacher, final))

    def _write(self, run: Run, teacher: nn.Module, final: Predictions) -> Report:
        job, original = self.job, self._original()
        with self.journal.phase("measuring layers", 0):
            noise = signal_to_noise(teacher, run.model, run.constrained.names, self._layer_images())
        save(
            self.work / "model.safetensors",
            run.constrained,
            job.loaded.info,
            run=run_facts(job),
            metrics=metric_facts(original, final),
            packing=job.choices["pack"],
            half=job.choices["half"],
        )
        report = build_report(
            job,
            run,
            teacher.state_dict(),
            original,
            final,
            self.work / "model.safetensors",
            self.journal.seconds,
            data=self._data(),
            stages=self.stages,
            noise=noise,
        )
        texts = {
            "report.json": json.dumps(report.to_dict(), indent=2),
            "report.md": report.to_markdown(),
            "events.jsonl": "".join(self.journal.lines),
            "settings.toml": settings_toml(self.job),
        }
        for name, text in texts.items():
            atomic_write(self.work / name, text.encode())
        publish(self.output)
        return report

    def _halve(self, run: Run, before: Predictions) -> Predictions:
        """Round what stays float to half precision, and measure again; what that costs is a stage of its own."""
        last = summarize(before, self._original())
        agreement = last.comparison.agreement if last.comparison else None
        self.stages[-1] = replace(self.stages[-1], top1=last.top1, agreement=agreement)  # not every stage is measured
        with self.journal.phase(HALVED, 0):
            left = halve(run.model, run.constrained.names)
        if left:
            self.job.warnings.append(f"half precision cannot hold {', '.join(left)}, which stayed in float32")
        after = self._measure("quantized", run.model)
        self.stages.append(stage_row(HALVED, after, self._original(), self.journal.seconds[HALVED], None))
        return after

    def _layer_images(self) -> list[Tensor]:
        """A few pictures to compare the layers' outputs on."""
        return stages.calibration_images(self._data(), self.job.device, LAYER_PICTURES)

    def _measure(self, which: str, network: nn.Module) -> Predictions:
        val = self._data().val
        with self.journal.phase("measuring", distributed.largest_share(len(val))):
            predictions = predict(network, val, self.job.device, autocast=self.job.autocast, on_batch=self.journal.tick)
        compared = None if predictions.labelled or which == "original" else self.original
        self.journal.emit(Evaluated(which, summarize(predictions, compared).to_dict()))
        return predictions

    def _save(self, network: nn.Module, run: Run | None = None) -> None:
        if run is not None and not is_finite(run):
            raise TrainingError(
                f"a weight is not finite any more after step {run.step} of epoch {run.epoch + 1}; "
                f"lower --lr (now {run.settings.lr:g}) or run without --amp"
            )
        if run is not None:
            check_same_weights(run)
            share_statistics(run)
        state = {
            "run": run.state_dict() if run is not None else None,
            "network": network.state_dict() if run is None else None,
            "starts": {name: (start.latent, start.scale) for name, start in self.starts.items()} if run is None else {},
            "pictures": self.pictures,
            "stages": [asdict(stage) for stage in self.stages],
            "log": self.journal.lines,
            "measured": self.measured,
            "seconds": self.journal.seconds,
            "original": self.original.state_dict() if self.original is not None else None,
        }
        if distributed.is_main():
            save_checkpoint(self.state_path, self.job.identity(), state)
        self.journal.emit(Saved(run.epoch, run.step) if run is not None else Saved(0, 0))


def is_finite(run: Run) -> bool:
    """Whether everything the run has learned is. The loss alone does not tell: a latent weight that is NaN has a
    nearest level all the same.
    """
    kept: list[Tensor] = list(run.model.parameters())
    kept += [tensor for weight in run.constrained.state_dict()["weights"].values() for tensor in weight.values()]
    return all(bool(tensor.isfinite().all()) for tensor in kept)
