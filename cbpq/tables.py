"""The tables of a report, and the rows they are made of."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


def layer_section(layers: Sequence[LayerRow], total: int, abbreviated: bool) -> Section:
    """Every constrained weight, of ``total`` parameters; abbreviated, those that hurt most."""
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


def skipped_section(skipped: Sequence[SkippedRow], total: int, abbreviated: bool) -> Section:
    """Every weight that stays float, of ``total`` parameters; abbreviated, several of one reason in one row."""

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


def settings_section(settings: Mapping[str, Mapping[str, Any]]) -> Section:
    """Every setting's value, and where it comes from."""
    rows = [
        (name, sections.anything(entry.get("value")), sections.anything(entry.get("from")))
        for name, entry in settings.items()
    ]
    return Section("Settings", ("setting", "value", "from"), rows, code=frozenset(("setting",)))
