"""Scales and biases behind a layer become the layer's own."""

import dataclasses

from cbpq.exports.c.operations import Affine, Layer, Network, Operation


def folded(network: Network) -> Network:
    """``network`` with each `Affine` folded into the layer, or the `Affine`, whose output it alone reads. The rest
    stays.
    """
    operations: list[Operation] = []
    made: dict[str, int] = {}  # where in `operations` a value is made
    for operation in network.operations:
        if isinstance(operation, Affine) and network.uses(operation.inputs[0]) == 1:
            before = operations[made[operation.inputs[0]]] if operation.inputs[0] in made else None
            if isinstance(before, Layer | Affine) and len(before.scale) == len(operation.scale):
                operations[made[operation.inputs[0]]] = dataclasses.replace(
                    before,
                    output=operation.output,
                    scale=before.scale * operation.scale,
                    bias=before.bias * operation.scale + operation.bias,
                )
                made[operation.output] = made[operation.inputs[0]]
                continue
        made[operation.output] = len(operations)
        operations.append(operation)
    return dataclasses.replace(network, operations=tuple(operations))
