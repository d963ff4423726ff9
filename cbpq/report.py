"""What a quantization cost: one record, shown alike on the terminal, in ``report.json`` and in ``report.md``."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.text import Text

from cbpq import sections
from cbpq.sections import Section

TERMINAL_ROWS = 20  # a layer table longer than this is abbreviated on the terminal
ABBREVIATED_ROWS = 12


@dataclass(frozen=True)
class LayerRow:
    """One constrained weight; ``relative_error`` is ‖w_c − w_0‖/‖w_0‖ against the original, ``zeros`` a share 0..1.

    ``snr`` is the signal-to-noise ratio of its layer's outputs in dB, see ``cbpq.noise``; None if it was not measured.
    """

    name: str
    constraint: str
    shape: tuple[int, ...]
    parameters: int
    bits_per_weight: float
    relative_error: float
    zeros: float
    cfs: float
    snr: float | None = None


@dataclass(frozen=True)
class Stage:
    """How good the network was after a part of the run: accuracy and agreement in percent, time, most memory in use."""

    name: str
    top1: float | None
    agreement: float | None
    seconds: float
    peak_bytes: int | None = None


@dataclass(frozen=True)
class SkippedRow:
    """One weight that stays float, and why in plain words."""

    name: str
    shape: tuple[int, ...]
    parameters: int
    reason: str


@dataclass(frozen=True)
class Report:
    """The whole record of one run. Accuracies are in percent, sizes in bytes, times in seconds.

    ``settings`` maps a setting to ``{"value": …, "from": …}``; ``original`` and ``quantized`` are evaluations
    (``images``, ``top1``, ``top1_interval``, ``top5`` …), ``comparison`` holds ``agreement``, ``agreement_interval``,
    ``mcnemar_p`` and ``drop`` in points of top-1; for pictures without labels only the agreement is known. ``sizes``
    are those of ``cbpq.inspection.sizes_of``.
    """

    command: str
    source: Mapping[str, Any]
    constraint: str
    method: str
    preset: str
    settings: Mapping[str, Mapping[str, Any]]
    data: Mapping[str, Any]
    original: Mapping[str, Any] | None
    quantized: Mapping[str, Any] | None
    comparison: Mapping[str, Any] | None
    sizes: Mapping[str, Any]
    layers: tuple[LayerRow, ...]
    skipped: tuple[SkippedRow, ...]
    training: Mapping[str, Any]
    versions: Mapping[str, Any]
    seconds: Mapping[str, float]
    warnings: tuple[str, ...] = field(default=())
    stages: tuple[Stage, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """The content of ``report.json``: plain JSON types, None for a number that is not finite."""
        return {item.name: plain(getattr(self, item.name)) for item in dataclasses.fields(self)}

    def to_markdown(self) -> str:
        """The content of ``report.md``: GitHub Markdown."""
        parts = [f"# {sections.escape(self._title())}\n"]
        if self.command:
            parts.append(sections.fenced(self.command, "console"))
        parts += [f"> **Warning:** {sections.escape(warning)}\n" for warning in self.warnings]
        parts += [sections.markdown(section) for section in self._sections()]
        return "\n".join(parts)

    def render(self, console: Console, files_hint: str = "report.md and report.json") -> None:
        """Print the report, what matters most last, where the eye is when a command ends.

        A long table of layers shows only those that hurt most and points to ``files_hint``.
        """
        console.print(Text(sections.printable(self._title()), style="bold"))
        if self.command:
            console.print(Text(sections.printable(self.command), style="dim"), soft_wrap=True)
        console.print()
        for section in reversed(self._sections(abbreviated=True)):
            more = len(self.layers) - len(section.rows) if section.title == "Layers" else 0
            sections.render(console, section, f"{more} more in {files_hint}" if more else "")
        for warning in self.warnings:
            console.print(Text(sections.printable(f"warning: {warning}"), style="yellow"), soft_wrap=True)

    def _title(self) -> str:
        name = self.source.get("architecture") or self.source.get("name") or "network"
        return f"{name}: {self.constraint} weights by {self.method}, preset {self.preset}"

    def _sections(self, abbreviated: bool = False) -> list[Section]:
        total = sum(row.parameters for row in self.layers) + sum(row.parameters for row in self.skipped)
        times = {name: sections.duration(value) for name, value in self.seconds.items()}
        facts = {
            "Data": self.data,
            "Source": self.source,
            "Training": self.training,
            "Time": times,
            "Versions": self.versions,
        }
        parts = [
            accuracy_section(self.quantized, self.original, self.comparison, pictures=self.data.get("val_split") or ""),
            stage_section(self.stages),
            size_section(self.sizes),
            _layer_section(self.layers, total, abbreviated),
            _skipped_section(self.skipped, total, abbreviated),
            _settings_section(self.settings),
        ]
        if abbreviated:
            parts.append(pairs_section("Run", facts))
        else:
            parts += [pairs_section(title, values) for title, values in facts.items()]
        return [part for part in parts if part.rows or part.notes]


def accuracy_section(
    quantized: Mapping[str, Any] | None,
    original: Mapping[str, Any] | None = None,
    comparison: Mapping[str, Any] | None = None,
    name: str = "quantized",
    pictures: str = "",
) -> Section:
    """Top-1, top-5 and loss with their intervals, the network called ``name`` beside the original; for pictures without
    labels, the agreement of the two, with what ``pictures`` it was measured on in words.
    """
    if quantized and "top1" in quantized and quantized["top1"] is None:
        return _agreement_section(quantized, comparison, pictures)
    results = {label: result for label, result in (("original", original), (name, quantized)) if result}
    rows = []
    for key, label in (("top1", "top-1"), ("top5", "top-5"), ("loss", "loss")):
        show = sections.number if key == "loss" else sections.percent
        shown = [result for result in results.values() if result.get(key) is not None]
        if not shown:
            continue
        row = [label, *(show(result.get(key), interval=result.get(f"{key}_interval")) for result in results.values())]
        if len(results) == 2:
            row.append(_difference(key, *results.values()))
        rows.append(row)
    columns = ("", *results, *(["difference"] if len(results) == 2 else []))
    notes = [_images_note(results)] if results else []
    return Section("Accuracy", columns, rows, frozenset(columns[1:]), notes=(*notes, *_comparison_notes(comparison)))


def _agreement_section(result: Mapping[str, Any], comparison: Mapping[str, Any] | None, pictures: str) -> Section:
    agreement = sections.percent((comparison or {}).get("agreement"), (comparison or {}).get("agreement_interval"))
    which = f" ({pictures})" if pictures else ""
    notes = (
        f"{sections.count(result.get('images'))} images{which}; in brackets the 95 % interval.",
        "Accuracy is not known, since the pictures have no labels.",
    )
    rows = [("same answer as the original", agreement)]
    return Section("Agreement", ("", "share"), rows, frozenset(("share",)), notes=notes)


def stage_section(stages: Sequence[Stage]) -> Section:
    """Which part of the run won what."""
    labelled = any(stage.top1 is not None for stage in stages)
    rows = [
        [
            stage.name,
            *([sections.percent(stage.top1)] if labelled else []),
            sections.percent(stage.agreement),
            sections.duration(stage.seconds),
            sections.size(stage.peak_bytes) if stage.peak_bytes is not None else sections.UNKNOWN,
        ]
        for stage in stages
    ]
    numeric = (*(["top-1"] if labelled else []), "agreement", "time", "peak memory")
    notes = ("agreement: same answer as the original. Each row goes on from the one before.",) if rows else ()
    return Section("Stages", ("after", *numeric), rows, frozenset(numeric), notes=notes)


def size_section(sizes: Mapping[str, Any]) -> Section:
    """The bytes of the file and its parts against the network in FP32, and the bits that its weights take."""
    whole, file = sizes.get("float32_bytes"), sizes.get("file_bytes")
    rows = []
    for key, label in (
        ("float32_bytes", "the network in FP32"),
        ("file_bytes", "this file"),
        ("codes_bytes", "its codes"),
        ("scale_bytes", "its scales"),
        ("others_bytes", "what stays float"),
        ("header_bytes", "names and metadata"),
        ("entropy_bytes", "its codes at their entropy"),
    ):
        if (value := sizes.get(key)) is not None:
            part = key in ("codes_bytes", "scale_bytes", "others_bytes", "header_bytes") and file
            smaller = sections.ratio(whole, value) if key == "file_bytes" else ""
            rows.append([label, sections.size(value), smaller, sections.share(value / file) if part else ""])
    return Section(
        "Size",
        ("", "bytes", "smaller", "of the file"),
        rows,
        frozenset(("bytes", "smaller", "of the file")),
        notes=_bits_notes(sizes),
    )


def _bits_notes(sizes: Mapping[str, Any]) -> tuple[str, ...]:
    notes = []
    if (bits := sizes.get("bits_per_weight")) is not None:
        entropy, constrained = sizes.get("entropy"), sizes.get("constrained_share")
        beside = f" (entropy {sections.significant(entropy)})" if entropy is not None else ""
        of = f"; {sections.share(constrained)} of all parameters are constrained" if constrained is not None else ""
        unit = "bit" if bits == 1 else "bits"
        notes.append(f"{sections.significant(bits)} {unit} per constrained weight{beside}{of}.")
    if (bits := sizes.get("bits_per_parameter")) is not None:
        notes.append(f"The whole file: {sections.significant(bits)} bits per parameter.")
    if sizes.get("half_share"):
        notes.append(f"{sections.share(sizes['half_share'])} of what stays float is in half precision.")
    return tuple(notes)


def pairs_section(title: str, values: Mapping[str, Any]) -> Section:
    """Names and values of any kind, empty ones left out."""
    rows = [
        (name.replace("_", " "), sections.anything(value))
        for name, value in values.items()
        if not sections.is_empty(value)
    ]
    return Section(title, ("", "value"), rows)


def plain(value: Any) -> Any:
    """A value as JSON types: tuples as lists, what JSON cannot say (NaN, infinity) as None, the rest as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if value is None or isinstance(value, (bool, str)):
        return value
    if hasattr(value, "tolist"):  # a NumPy or torch scalar or array
        return plain(value.tolist())
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return str(value)


def _difference(key: str, original: Mapping[str, Any], quantized: Mapping[str, Any]) -> str:
    before, after = original.get(key), quantized.get(key)
    if before is None or after is None or not math.isfinite(after - before):
        return sections.UNKNOWN
    return f"{after - before:+.4f}" if key == "loss" else sections.points(after - before)


def _images_note(results: Mapping[str, Mapping[str, Any]]) -> str:
    images = next(iter(results.values())).get("images")
    return f"{sections.count(images)} images; in brackets the 95 % interval."


def _comparison_notes(comparison: Mapping[str, Any] | None) -> list[str]:
    if not comparison:
        return []
    notes = []
    if comparison.get("agreement") is not None:
        agreement = sections.percent(comparison["agreement"], comparison.get("agreement_interval"))
        notes.append(f"Same answer as the original: {agreement} of the images.")
    if comparison.get("mcnemar_p") is not None:
        gained, lost = comparison.get("only_model_right"), comparison.get("only_reference_right")
        counts = "" if gained is None or lost is None else f"; {lost} right only in the original, {gained} only here"
        notes.append(f"Exact McNemar test: {sections.p_value(comparison['mcnemar_p'])}{counts}.")
    return notes


_LAYER_NOTE = (
    "error: ‖w − w₀‖ / ‖w₀‖, the constrained weight against the original one. SNR: signal to noise in the layer's "
    "outputs, against the original's; the layers with the least hurt most."
)


def _harm(row: LayerRow) -> tuple[float, float]:
    """What layers are ordered by: noise in the outputs, then change of the weights."""
    known = row.snr is not None and not math.isnan(row.snr)
    return (-(row.snr or 0.0) if known else -math.inf, row.relative_error)


def _decibels(snr: float | None) -> str:
    return sections.UNKNOWN if snr is None or not math.isfinite(snr) else f"{snr:.1f} dB"


def _layer_section(layers: Sequence[LayerRow], total: int, abbreviated: bool) -> Section:
    shown = list(layers)
    notes = [_LAYER_NOTE] if layers else []
    if abbreviated and len(shown) > TERMINAL_ROWS:
        shown = sorted(shown, key=_harm, reverse=True)[:ABBREVIATED_ROWS]
        notes.append(f"The {len(shown)} layers that hurt most, of {len(layers)}.")
    numeric = ("weights", "share", "bits", "error", "SNR", "zeros", "CFS")
    columns = ["layer", "constraint", "shape", *numeric]
    rows = [
        [
            row.name.removesuffix(".weight") if abbreviated else row.name,
            row.constraint,
            sections.shape(row.shape),
            sections.count(row.parameters),
            sections.share(row.parameters / total),
            sections.significant(row.bits_per_weight),
            sections.number(row.relative_error, 3),
            _decibels(row.snr),
            sections.share(row.zeros),
            sections.significant(row.cfs, 2),
        ]
        for row in shown
    ]
    if abbreviated and len({row.constraint for row in layers}) == 1:  # it stands in the title, and space is short
        for cells in (columns, *rows):
            del cells[1]
    return Section("Layers", tuple(columns), rows, frozenset(numeric), frozenset(("layer",)), tuple(notes))


def _skipped_section(skipped: Sequence[SkippedRow], total: int, abbreviated: bool) -> Section:
    def numbers(parameters: int) -> tuple[str, str]:
        return sections.count(parameters), sections.share(parameters / total)

    rows: list[tuple[str, ...]] = []
    for reason, group in _by_reason(skipped).items() if abbreviated else [("", list(skipped))]:
        if reason and len(group) > 2:
            rows.append((f"{len(group)} of them", "", *numbers(sum(row.parameters for row in group)), reason))
            continue
        rows += [
            (
                row.name.removesuffix(".weight") if abbreviated else row.name,
                sections.shape(row.shape),
                *numbers(row.parameters),
                row.reason,
            )
            for row in group
        ]
    left = sum(row.parameters for row in skipped)
    notes = (f"Together {sections.share(left / total)} of the parameters.",) if left else ()
    columns = ("layer", "shape", "weights", "share", "reason")
    return Section("Left in float", columns, rows, frozenset(("weights", "share")), frozenset(("layer",)), notes)


def _by_reason(skipped: Sequence[SkippedRow]) -> dict[str, list[SkippedRow]]:
    groups: dict[str, list[SkippedRow]] = {}
    for row in skipped:
        groups.setdefault(row.reason, []).append(row)
    return groups


def _settings_section(settings: Mapping[str, Mapping[str, Any]]) -> Section:
    rows = [
        (name, sections.anything(entry.get("value")), sections.anything(entry.get("from")))
        for name, entry in settings.items()
    ]
    return Section("Settings", ("setting", "value", "from"), rows, code=frozenset(("setting",)))
