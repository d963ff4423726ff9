"""What a finished run leaves behind, put together from its parts: the file's content, the report, the settings."""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

import cbpq
from cbpq import distributed
from cbpq.constrained import Constrained
from cbpq.data import Data
from cbpq.devices import describe_device
from cbpq.evaluation import Predictions, compare, summarize
from cbpq.fileformat import ConstrainedTensor, read
from cbpq.inspection import sizes_of
from cbpq.lazy import Lazy
from cbpq.levels import total
from cbpq.planning import FREE_SETTINGS, Plan
from cbpq.report import Report
from cbpq.tables import LayerRow, SkippedRow, Stage
from cbpq.training import Run

timm, torchvision = Lazy("timm"), Lazy("torchvision")

HALVED = "half precision"


def run_facts(job: Plan) -> dict[str, Any]:
    """How the network was made, for the file: everything that decides the result, nothing that differs between equal
    runs. How the file is written can be seen of the file itself.
    """
    settings = job.resolved.settings.to_dict()
    return {
        "constraint": job.levels.name,
        "method": job.method,
        "preset": job.resolved.preset,
        "settings": {name: value for name, value in settings.items() if name not in FREE_SETTINGS},
        **{name: value for name, value in job.choices.items() if name not in ("pack", "half")},
        "device": job.device.type,
        "versions": {"cbpq": cbpq.__version__, "torch": torch.__version__},
    }


def metric_facts(original: Predictions, final: Predictions) -> dict[str, Any]:
    """How good the network is beside the original, for the file."""
    return {
        "original": summarize(original).to_dict(timing=False),
        "quantized": summarize(final).to_dict(timing=False),
        "comparison": compare(final, original).to_dict(),
    }


def build_report(
    job: Plan,
    run: Run,
    before: Mapping[str, Tensor],
    original: Predictions,
    final: Predictions,
    path: Path,
    seconds: Mapping[str, float],
    *,
    data: Data,
    stages: Sequence[Stage],
    noise: Mapping[str, float],
) -> Report:
    """The report of a finished run.

    ``before`` is the original state dict, ``path`` the file that was written, ``noise`` the layers' signal-to-noise
    ratio in dB.
    """
    content = read(path)
    window = run.constrained.method.describe().get("window")
    return Report(
        command=job.command,
        source=job.loaded.info.to_dict(),
        constraint=job.levels.name,
        method=job.method,
        preset=job.resolved.preset,
        settings=job.resolved.to_dict(),
        data=data.describe,
        original=summarize(original).to_dict(),
        quantized=summarize(final).to_dict(),
        comparison=compare(final, original).to_dict(),
        sizes=sizes_of(content, path.stat().st_size),
        layers=tuple(
            layer_row(name, content.constrained[name], before[name].cpu(), run.constrained, noise.get(name))
            for name in run.constrained.names
        ),
        skipped=tuple(
            SkippedRow(name, tuple(before[name].shape), before[name].numel(), reason)
            for name, reason in job.layers.skipped.items()
        ),
        training={
            "epochs": run.epoch,
            "steps": run.steps,
            "cfs": run.constrained.cfs(),
            "window": window if window is None or math.isfinite(window) else "shut",
            "seconds": run.seconds,
            "images_per_second": run.images_seen / run.seconds if run.seconds else None,
        },
        versions=versions(job.device),
        seconds=seconds,
        warnings=(*job.warnings, *setbacks(stages, final, original)),
        stages=tuple(stages),
    )


def stage_row(
    name: str, predictions: Predictions | None, original: Predictions, seconds: float, peak_bytes: int | None
) -> Stage:
    """The row of a stage, from what the network said after it, if it was asked."""
    if predictions is None:
        return Stage(name, None, None, seconds, peak_bytes)
    measured = summarize(predictions, original)
    agreement = measured.comparison.agreement if measured.comparison else None
    return Stage(name, measured.top1, agreement, seconds, peak_bytes)


def setbacks(stages: Sequence[Stage], final: Predictions, original: Predictions) -> list[str]:
    """What to say where a stage before the last had reached more than chance can explain."""
    measured = summarize(final, original)
    agreement = measured.comparison.agreement_interval if measured.comparison else None
    interval, name = (measured.top1_interval, "top1") if measured.top1_interval else (agreement, "agreement")
    earlier = [(score, stage.name) for stage in stages[:-1] if (score := getattr(stage, name)) is not None]
    if interval is None or not earlier or max(earlier)[0] <= interval[1]:
        return []
    best, stage_name = max(earlier)
    advice = "--epochs 0 stops after rounding, and a lower --lr or more --epochs may keep what it won"
    if stages[-1].name == HALVED and stage_name == stages[-2].name:
        advice = "leave out --half"
    return [f"after {stage_name} the network was better ({best:.2f} %) than at the end; {advice}"]


def layer_row(
    name: str, tensor: ConstrainedTensor, before: Tensor, constrained: Constrained, snr: float | None
) -> LayerRow:
    """How one constrained weight came out: error relative to the original, zeros, and what is left of its CFS."""
    after = torch.from_numpy(tensor.weight())
    distance = constrained.grid(name).distance(constrained.latent(name)).detach()
    return LayerRow(
        name=name,
        constraint=tensor.constraint,
        shape=tuple(before.shape),
        parameters=before.numel(),
        bits_per_weight=8 * tensor.packed_bytes / before.numel(),
        relative_error=float((after - before).norm() / before.norm().clamp_min(1e-30)),
        zeros=tensor.sparsity,
        cfs=total(distance) / distance.numel(),
        snr=snr,
    )


def versions(device: torch.device) -> dict[str, Any]:
    """What ran, and on what."""
    return {
        "cbpq": cbpq.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": describe_device(device),
        "threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
    }


def settings_toml(job: Plan) -> str:
    """All choices of a run as a configuration file: ``--config settings.toml`` makes the same run."""
    choices = {
        "constraint": job.levels.name,
        "method": job.method,
        "preset": job.resolved.preset,
        **{name: value for name, value in job.choices.items() if name != "calibration"},  # it goes with --data
        **job.resolved.settings.to_dict(),
    }
    # JSON's strings, numbers, truth values and lists of strings are TOML's as well
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in choices.items()]
    return "# cbpq quantize SOURCE [--data PATH] --config settings.toml\n" + "".join(lines)
