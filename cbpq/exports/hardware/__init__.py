"""What hardware engineers need beside the weights, as a folder of four files.

- ``hardware.json``: per layer and in total. ``work.Work`` (MACs, additions, shifts, zero weights), ``ranges.Ranges``
  (how large inputs are), ``widths.accumulator_bits``, ``scales.PowerScale`` (powers of two instead of scales, and what
  they would cost) and ``energy.Energy`` say what each number means. Names carry their unit: ``_bits``, ``_percent``,
  ``_picojoules``; what has none is a count or a value as the network computes it.
- ``hardware.md``: the same as tables.
- ``histogram.png``: how often each code occurs, layer by layer. It needs matplotlib and is left out without it.
- ``golden.npz``: pictures, what every layer makes of them, and the logits; ``golden.golden`` says how they are named.

Layers are the convolutions, linear layers and attention projections of a forward pass, in its order, those that stayed
float too.
"""

import copy
import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from cbpq.atomic import atomic_write_folder
from cbpq.errors import MissingPartError
from cbpq.exports import Exported
from cbpq.exports.hardware.energy import energy
from cbpq.exports.hardware.golden import golden
from cbpq.exports.hardware.histogram import histogram
from cbpq.exports.hardware.layers import Layer, traced
from cbpq.exports.hardware.ranges import observed
from cbpq.exports.hardware.report import HardwareLayer, HardwareReport, PowerEffect
from cbpq.exports.hardware.scales import on_powers
from cbpq.exports.hardware.tables import markdown
from cbpq.exports.sample import agreement, pictures
from cbpq.exports.translation import check_weights
from cbpq.fileformat import CbpqFile
from cbpq.inputs import InputSpec
from cbpq.models import logits
from cbpq.transforms import Normalize

_BATCH = 32  # pictures at a time


def hardware_report(
    model: nn.Module,
    file: CbpqFile,
    spec: InputSpec,
    out: Path,
    *,
    data: str | None = None,
    class_map: Path | None = None,
) -> Exported:
    """Write the report of ``model`` to the folder ``out``.

    Args:
        model: the network with the weights of ``file``; it is left as it is.
        file: gives the codes and scales.
        spec: the size and the normalisation of the input.
        out: the folder; one that is there is replaced.
        data: pictures that tell how large activations become, as ``cbpq.data.load_data`` takes them. Without them,
            pictures are made of the network.
        class_map: as ``cbpq.data.load_data`` takes it.

    Raises:
        CbpqError: ``model`` does not hold the weights of ``file``, cannot be run or gives no finite logits, the
            pictures cannot be used, or ``out`` cannot be written. Nothing was written.
    """
    network = copy.deepcopy(model).cpu().eval()
    check_weights(network, file)
    found = traced(network, file, spec)
    chosen = pictures(data, network, spec, found.classes, class_map)
    batches = [Normalize(spec)(part) for part in chosen.calibration.split(_BATCH)]
    ranges, scores = observed(network, found.layers, batches)
    layers = tuple(HardwareLayer.of(layer, ranges[layer.weight]) for layer in found.layers)
    files = {"golden.npz": golden(network, found.layers, chosen.calibration, spec)}
    notes = [chosen.note] if chosen.note else []
    if found.unseen:
        notes.append(f"not in the report, since no layer multiplies with them as they are: {', '.join(found.unseen)}")
    effect = _effect(network, found.layers, batches, scores)
    report = HardwareReport(file.source, layers, effect, len(chosen.calibration), tuple(notes))
    files["hardware.json"] = (json.dumps(report.to_dict(), indent=2) + "\n").encode()
    files["hardware.md"] = markdown(report).encode()
    try:
        if file.constrained.keys() - set(found.unseen):
            files["histogram.png"] = histogram(found.layers)
    except MissingPartError as error:  # the numbers are there: no reason to fail
        notes.append(f"the plot is left out: {error}")
    atomic_write_folder(out, files)
    size = sum(map(len, files.values()))
    return Exported("hardware-report", out, size, file.float32_bytes, _facts(report), tuple(notes))


@torch.no_grad()
def _effect(network: nn.Module, layers: tuple[Layer, ...], batches: list[Tensor], scores: Tensor) -> PowerEffect:
    """Of powers of two for all scales; changes ``network``."""
    parameters = dict(network.named_parameters())
    for layer in layers:
        if layer.tensor is not None:
            parameters[layer.weight].copy_(torch.from_numpy(on_powers(layer.tensor).weight()))
    changed = torch.cat([logits(network(batch)) for batch in batches])
    return PowerEffect(agreement(scores, changed), float((changed - scores).abs().max()), float(scores.abs().max()))


def _facts(report: HardwareReport) -> dict[str, object]:
    """What the command shows of it."""
    totals = report.totals()
    whole = totals["all"][1]
    return {
        "constrained_layers": totals["constrained"][0],
        "float_layers": totals["float"][0],
        **asdict(whole),
        **{name.replace("pico", "micro"): value / 1e6 for name, value in asdict(energy(whole)).items()},
        "power_of_two_agreement_percent": report.effect.agreement_percent,
    }
