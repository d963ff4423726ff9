"""``cbpq inspect``: what is in a cbpq file."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from cbpq import sections
from cbpq.cli import common
from cbpq.sections import Section
from cbpq.tables import pairs_section, size_section

if TYPE_CHECKING:
    from cbpq.inspection import Inspection, LayerInspection

_BARS = "▁▂▃▄▅▆▇█"
_BAR_WIDTH = 24
_MANY_LEVELS = 32  # a histogram of more bars than this says nothing on a line
_WIDE = 110  # columns from which the percentages of every layer fit


def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A cbpq file, such as out/model.safetensors.")],
    json: common.Json = False,
) -> None:
    """Show the layers, codes, scales and sizes of a cbpq file; no data and no network needed.

    Examples:

      cbpq inspect out/model.safetensors
      cbpq inspect out/model.safetensors --json
    """
    from cbpq.inspection import inspect_file  # which imports NumPy

    inspection = inspect_file(file)
    if json:
        common.print_json(inspection.to_dict())
    else:
        _render(common.stdout(), inspection)


def _render(console: Console, inspection: "Inspection") -> None:
    source = inspection.source.get("architecture", "network")
    constraints = ", ".join(dict.fromkeys(layer.constraint for layer in inspection.layers)) or "no constrained weight"
    console.print(Text(sections.printable(f"{inspection.path}: {source}, {constraints}"), style="bold"), soft_wrap=True)
    console.print()
    sections.render(console, size_section(inspection.sizes))
    for layers in _by_level_table(inspection.layers):
        sections.render(console, _codes_section(layers))
        sections.render(console, _layers_section(layers, console.width >= _WIDE))
    for title in ("source", "run", "metrics"):
        section = pairs_section(title.capitalize(), getattr(inspection, title))
        if section.rows:
            sections.render(console, section)


def _by_level_table(layers: "Sequence[LayerInspection]") -> "list[list[LayerInspection]]":
    tables: dict[object, list[LayerInspection]] = {}
    for layer in layers:
        tables.setdefault((layer.constraint, layer.codes, layer.denominator), []).append(layer)
    return list(tables.values())


def _codes_section(layers: "Sequence[LayerInspection]") -> Section:
    """The histogram of the codes over all layers with one level table."""
    counts = [sum(column) for column in zip(*(layer.counts for layer in layers), strict=True)]
    total, most = sum(counts), max(counts)
    shown = counts if len(counts) <= _MANY_LEVELS else []
    rows = [
        (
            str(code),
            str(Fraction(code, layers[0].denominator)),
            sections.count(count),
            sections.share(count / total),
            "█" * round(_BAR_WIDTH * count / most) or ("▏" if count else ""),
        )
        for code, count in zip(layers[0].codes, shown, strict=False)
    ]
    numeric = ("code", "level", "weights", "share")
    used = "" if shown else f"{sum(map(bool, counts))} of {len(counts)} levels are used; --json has the histogram. "
    notes = (f"{used}A weight is its level times its scale.",)
    return Section(
        f"Codes of the {layers[0].constraint} weights", (*numeric, ""), rows, frozenset(numeric), notes=notes
    )


def _layers_section(layers: "Sequence[LayerInspection]", wide: bool) -> Section:
    suffix = ".weight" if all(layer.name.endswith(".weight") for layer in layers) else ""
    numeric = ("bits", "entropy", "zeros", "scale")
    columns = ("layer", "shape", *numeric, "codes", *(["codes in %"] if wide else []))
    rows = []
    for layer in layers:
        row = [
            layer.name.removesuffix(suffix),
            sections.shape(layer.shape),
            sections.significant(layer.bits_per_weight),
            sections.significant(layer.entropy),
            sections.share(layer.zeros),
            _scales(layer),
            bars(layer.counts),
        ]
        if wide:
            many = len(layer.counts) > _MANY_LEVELS
            row.append("" if many else " ".join(f"{100 * count / layer.parameters:.0f}" for count in layer.counts))
        rows.append(row)
    dense = sum(layer.packing == "dense" for layer in layers)
    densely = f", {'all' if dense == len(layers) else f'{dense} layers'} densely packed" if dense else ""
    per = sorted({layer.scale_per for layer in layers})
    notes = (f"One scale per {' or '.join(per)}. Bits and entropy are per weight, the bits as stored{densely}.",)
    plural = "s" if len(layers) > 1 else ""
    title = f"{len(layers)} {layers[0].constraint} layer{plural}"
    return Section(title, columns, rows, frozenset(numeric), frozenset(("layer",)), notes)


def _scales(layer: "LayerInspection") -> str:
    if layer.scale_min == layer.scale_max:
        return sections.significant(layer.scale_min)
    return f"{sections.significant(layer.scale_min)}–{sections.significant(layer.scale_max)}"


def bars(counts: Sequence[int]) -> str:
    """A histogram as one character per level, the highest one full; empty levels are blank."""
    if len(counts) > _MANY_LEVELS:
        return f"{sum(map(bool, counts))} of {len(counts)} levels used"
    most = max(counts)
    return "".join(_BARS[min(7, 8 * count // most)] if count else " " for count in counts)
