"""How large each value of a network becomes on pictures, and which pictures those are."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from cbpq.data import EvalLoader, load_data
from cbpq.exports.c.lowering import stored
from cbpq.inputs import InputSpec
from cbpq.pictures import NO_LABEL
from cbpq.synthesis import SynthesisChoices, remembering, synthesize, to_bytes
from cbpq.transforms import Normalize

PICTURES = 256  # to calibrate with
_SYNTHESISED = 64
_MOST_VALIDATED = 2000


@dataclass(frozen=True)
class Pictures:
    """``calibration`` uint8 (N, C, H, W), and if there are labels ``validation`` of them with ``labels`` (M,)."""

    calibration: Tensor
    validation: Tensor | None
    labels: Tensor | None
    note: str


def pictures(data: str | None, network: nn.Module, spec: InputSpec, classes: int) -> Pictures:
    """From ``data``, as ``cbpq.data.load_data`` takes it, or made of the network alone.

    Raises:
        CbpqError: the data cannot be used.
    """
    if data is None:
        choices = replace(SynthesisChoices.for_input(spec), count=_SYNTHESISED, batch_size=_SYNTHESISED)
        kind = "synthesised pictures" if remembering(network) else "pictures of noise"
        note = f"the ranges of the activations are those on {_SYNTHESISED} {kind}; give --data for real ones"
        return Pictures(synthesize(network, spec, classes, choices), None, None, note)
    opened = load_data(data, spec, classes, batch_size=64, calibration=PICTURES)
    chosen, _ = _read(opened.calibration or opened.val, spec, PICTURES)
    if not opened.val_labelled:
        return Pictures(chosen, None, None, "")
    images, labels = _read(opened.val, spec, _MOST_VALIDATED)
    return Pictures(chosen, images, labels, "")


def _read(loader: EvalLoader, spec: InputSpec, most: int) -> tuple[Tensor, Tensor]:
    """At most so many pictures of a loader, spread over all of it."""
    every = max(1, -(-loader.images // most))
    parts, labels = list[Tensor](), list[Tensor]()
    for batch in loader:
        parts.append(to_bytes(batch.images[::every], spec))
        labels.append(batch.labels[::every])
    return torch.cat(parts)[:most], torch.cat(labels)[:most]


class _Ranges(fx.Interpreter):
    """Runs torch's graph and remembers the largest magnitude of everything."""

    def __init__(self, program: "torch.export.ExportedProgram") -> None:
        super().__init__(program.graph_module)
        self.found: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        """One node, by the names that the operations have."""
        result = super().run_node(n)
        parts = result if isinstance(result, list | tuple) else [result]
        for number, part in enumerate(parts):
            if isinstance(part, Tensor) and part.is_floating_point() and part.numel():
                largest = float(part.abs().max())
                for name in (n.name, f"{n.name}_{number}") if part is not result else (n.name,):
                    self.found[name] = max(self.found.get(name, 0.0), largest)
        return result


def ranges(program: "torch.export.ExportedProgram", pixels: Tensor, spec: InputSpec) -> dict[str, float]:
    """The largest magnitude of each value of ``program`` on uint8 pictures (N, C, H, W)."""
    known, interpreter = stored(program), _Ranges(program)
    names = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    with torch.no_grad():
        for picture in Normalize(spec)(pixels).split(1):
            interpreter.run(*(known.get(name, picture) for name in names))
    return interpreter.found


def agreement(first: Tensor, second: Tensor) -> float:
    """In percent, how often two (N, classes) say the same class."""
    return float((first.argmax(1) == second.argmax(1)).double().mean() * 100)


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Top-1 of (N, classes) in percent."""
    known = labels != NO_LABEL
    return float((outputs.argmax(1) == labels)[known].double().mean() * 100)
