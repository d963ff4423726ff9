"""How large each value of a network becomes on pictures."""

from typing import Any

import torch
from torch import Tensor, fx

from cbpq.exports.c.lowering import stored
from cbpq.inputs import InputSpec
from cbpq.transforms import Normalize


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
