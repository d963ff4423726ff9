"""Where each value of a network lives: one block of working memory, in which values that are needed at different times
share their place.
"""

from dataclasses import dataclass

from cbpq.exports.c.operations import Affine, Binary, Network, Operation, Unary, View

_IN_PLACE = (Affine, Binary, Unary)  # each output value depends on the input value of its own place alone


@dataclass(frozen=True)
class Plan:
    """``home`` says for each value in whose place it is: its own name, or that of the value it is a view of or written
    over. ``offsets`` has the place of each home, in values from the start of a block of ``size`` values. The homes of
    the network's input and output are not in it: they belong to the caller.
    """

    home: dict[str, str]
    offsets: dict[str, int]
    size: int


@dataclass
class _Life:
    """A home: from the step that writes it first to the last step that reads it."""

    size: int
    first: int
    last: int


def plan(network: Network, *, own_output: bool = False) -> Plan:
    """Place all values, the largest first, each as low as the others that live at the same time allow.

    Args:
        network: its operations are the steps of time.
        own_output: whether the output is in the block too.
    """
    last = {name: step for step, operation in enumerate(network.operations) for name in operation.inputs}
    last[network.output] = len(network.operations)
    home = {network.input: network.input}
    lives: dict[str, _Life] = {}
    for step, operation in enumerate(network.operations):
        shared = _shared(operation, step, network, home, lives, last)
        name = home[operation.output] = shared if shared is not None else operation.output
        life = lives.setdefault(name, _Life(network.size(operation.output), step, step))
        life.last = max(life.last, last.get(operation.output, step))
    outside = {network.input} if own_output else {network.input, home[network.output]}
    offsets: dict[str, int] = {}
    for name in sorted(lives.keys() - outside, key=lambda name: (-lives[name].size, lives[name].first, name)):
        offsets[name] = _lowest(lives[name], [(offsets[other], lives[other]) for other in offsets])
    size = max((offset + lives[name].size for name, offset in offsets.items()), default=0)
    return Plan(home, offsets, size)


def _shared(
    operation: Operation,
    step: int,
    network: Network,
    home: dict[str, str],
    lives: dict[str, _Life],
    last: dict[str, int],
) -> str | None:
    """The home that the output of ``operation`` takes over from its first input, or None."""
    first = home[operation.inputs[0]]
    if isinstance(operation, View):
        return first
    same_size = network.size(operation.inputs[0]) == network.size(operation.output)
    free = first != network.input and lives[first].last <= step and last[operation.inputs[0]] <= step
    # a second input in the same place would be overwritten while it is still read, unless it is read in step
    others = {home[name] for name in operation.inputs[1:]}
    if isinstance(operation, _IN_PLACE) and same_size and free and first not in others:
        return first
    return None


def _lowest(life: _Life, placed: list[tuple[int, _Life]]) -> int:
    """The lowest offset where ``life`` overlaps with nothing that lives at the same time."""
    offset = 0
    for start, other in sorted(placed, key=lambda entry: entry[0]):
        apart = other.last < life.first or life.last < other.first
        if not apart and offset < start + other.size and start < offset + life.size:
            offset = start + other.size
    return offset
