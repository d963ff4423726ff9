"""The histogram of codes of every layer as a picture."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cbpq.errors import require_extra
from cbpq.exports.hardware.layers import Layer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_COLUMNS = 6
_MANY_LEVELS = 9  # more than these cannot all be labelled
_LONGEST_NAME = 26
_WIDTH, _HEIGHT, _MARGIN = 2.2, 1.6, 0.45  # inches: of a panel, and what the labels of the axes take


def histogram(layers: Sequence[Layer]) -> bytes:
    """A PNG with one panel for each of the constrained layers, at least one: the share of weights that each code has.

    Raises:
        MissingPartError: matplotlib is not installed.
    """
    require_extra("matplotlib", "compare")
    buffer = io.BytesIO()
    figure_of(layers).savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def figure_of(layers: Sequence[Layer]) -> "Figure":
    """The picture before it is one."""
    from matplotlib.figure import Figure

    tensors = [(layer, layer.tensor) for layer in layers if layer.tensor]
    columns = min(len(tensors), _MOST_COLUMNS)
    rows = -(-len(tensors) // columns)
    width, height = _MARGIN + _WIDTH * columns, _MARGIN + _HEIGHT * rows
    figure = Figure(figsize=(width, height))
    # matplotlib's own layouts would draw everything twice
    grid = {"left": _MARGIN / width, "right": 1 - 0.1 / width, "bottom": _MARGIN / height, "top": 1 - 0.25 / height}
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True, gridspec_kw={**grid, "hspace": 0.45}).ravel()
    for panel, (layer, tensor) in zip(panels, tensors, strict=False):
        shares = [100 * count / tensor.codes.size for count in tensor.histogram]
        # one shape instead of a bar each: a bar in every second place, none of which is moved to whole pixels
        edges = [place + side for place in range(len(shares)) for side in (-0.4, 0.4)]
        heights = [part for share in shares for part in (share, 0.0)][:-1]
        panel.stairs(heights, edges, fill=True, color="#4477aa", snap=False)
        labelled = range(len(shares)) if len(shares) <= _MANY_LEVELS else (0, len(shares) // 2, len(shares) - 1)
        panel.set_xticks(list(labelled), [str(tensor.levels[place]) for place in labelled])
        panel.set_title(_short(layer.name), fontsize=8, pad=3)
        panel.tick_params(labelsize=7, length=2)
        panel.grid(axis="y", alpha=0.3)
    for panel in panels[len(tensors) :]:
        panel.set_visible(False)
    figure.supylabel("weights in %", fontsize=8, x=0.05 / width, ha="left")
    figure.supxlabel("code", fontsize=8, y=0.05 / height, va="bottom")
    return figure


def _short(name: str) -> str:
    """The end of a name, which tells layers apart, with every character as it is."""
    return (name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}").replace("$", r"\$")
