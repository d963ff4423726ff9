"""A rough estimate of the energy that the arithmetic of a layer takes."""

from dataclasses import dataclass

from cbpq.exports.hardware.work import Work

SOURCE = (
    "M. Horowitz, Computing's energy problem (and what we can do about it), ISSCC 2014: energy per operation in a "
    "45 nm process at 0.9 V"
)
PICOJOULES = {
    "float32_multiply": 3.7,
    "float32_add": 0.9,
    "int8_multiply": 0.2,
    "int32_multiply": 3.1,
    "int32_add": 0.1,
}
LEFT_OUT = (
    "memory traffic (which often costs more than arithmetic), control, activation functions, normalisation that is not "
    "folded into scales, pooling, and products of activations with each other, as in attention"
)
METHOD = (
    "fp32: a float multiplication and addition per MAC; int8: an int8 multiplication and an int32 addition per MAC, "
    "and an int32 multiplication per output for its scale; shift-add: an int32 addition per addition, two per "
    "doubling, the same multiplication per output, and int8 MACs in layers that stayed float"
)


@dataclass(frozen=True)
class Energy:
    """Picojoules for one picture: with FP32 multipliers, with INT8 multipliers, and as shifts and additions."""

    fp32_picojoules: float
    int8_picojoules: float
    shift_add_picojoules: float


def energy(work: Work) -> Energy:
    """The estimate for a layer, or for several together."""
    of = PICOJOULES
    float_mac, integer_mac = of["float32_multiply"] + of["float32_add"], of["int8_multiply"] + of["int32_add"]
    scaling = work.outputs * of["int32_multiply"]
    additions = (work.additions + 2 * work.doublings) * of["int32_add"]
    return Energy(  # one decimal is all that there is: the table has no finer numbers
        fp32_picojoules=round(work.macs * float_mac, 1),
        int8_picojoules=round(work.macs * integer_mac + scaling, 1),
        shift_add_picojoules=round(additions + work.products * integer_mac + scaling, 1),
    )
