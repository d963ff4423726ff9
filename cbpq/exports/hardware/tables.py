"""The hardware report as Markdown."""

from cbpq import sections
from cbpq.exports.hardware.energy import LEFT_OUT, METHOD, SOURCE, Energy, energy
from cbpq.exports.hardware.layers import Layer
from cbpq.exports.hardware.report import HardwareReport
from cbpq.exports.hardware.scales import PowerScale
from cbpq.exports.hardware.widths import INPUT_BITS
from cbpq.sections import Section

_LAYER = frozenset(("layer",))
_WORK = {
    "weights": "weights",
    "macs": "multiply-accumulates (MACs)",
    "products": "products that need a multiplier",
    "additions": "additions",
    "shifts": "shifts, if each product is shifted",
    "doublings": "or doublings, if sums are",
    "outputs": "outputs, each scaled once",
    "zero_weights": "zero weights",
    "skipped_macs": "MACs that these save",
}


def markdown(report: HardwareReport) -> str:
    """The content of ``hardware.md``: GitHub Markdown."""
    name = str(report.source.get("architecture") or "network")
    tensors = (part.layer.tensor for part in report.layers)
    constraints = ", ".join(dict.fromkeys(tensor.constraint for tensor in tensors if tensor)) or "float"
    parts = [f"# {sections.escape(f'Hardware report: {name}, {constraints} weights')}\n"]
    parts += [f"> {sections.escape(note)}\n" for note in report.notes]
    made = (_totals(report), _work(report), _widths(report), _scales(report), _energy(report))
    parts += [sections.markdown(section) for section in made if section.rows]
    return "\n".join(parts)


def _totals(report: HardwareReport) -> Section:
    totals = report.totals()
    rows = [["layers", *(str(count) for count, _ in totals.values())]]
    for key, label in _WORK.items():
        rows.append([label, *(sections.count(getattr(done, key)) for _, done in totals.values())])
    notes = (
        "All counts are for one picture; the padding of convolutions counts as if it were inside, biases do not.",
        "An input is added or subtracted once for each power of two that a code is a sum of (once for 1, −2, 4, twice "
        "for 3, never for 0). It is shifted first unless that power is 1. Where inputs are summed by power of two "
        "instead, as in cbpq's C code, the sums are doubled and added up at the end.",
    )
    return Section("One picture", ("", *totals), rows, frozenset(totals), notes=notes)


def _work(report: HardwareReport) -> Section:
    numeric = ("MACs", "additions", "shifts", "doublings", "zero weights", "share")
    rows = [
        [
            part.layer.name,
            _shapes(part.layer),
            sections.count(part.work.macs),
            *(
                sections.count(getattr(part.work, key)) if part.layer.tensor else sections.UNKNOWN
                for key in ("additions", "shifts", "doublings", "zero_weights")
            ),
            sections.share(part.work.zero_weights / part.work.weights) if part.layer.tensor else "float",
        ]
        for part in report.layers
    ]
    return Section("Layers", ("layer", "input → output", *numeric), rows, frozenset(numeric), _LAYER)


def _shapes(layer: Layer) -> str:
    first = layer.sites[0]
    times = f", used {len(layer.sites)} times" if len(layer.sites) > 1 else ""
    return f"{sections.shape(first.input)} → {sections.shape(first.output)}{times}"


def _widths(report: HardwareReport) -> Section:
    numeric = ("weight bits", "least input", "largest input", "integer bits", "accumulator bits", "seen")
    rows = [
        [
            part.layer.name,
            str(part.layer.tensor.bits if part.layer.tensor else 32),
            sections.significant(part.ranges.input_min),
            sections.significant(part.ranges.input_max),
            str(part.ranges.input_integer_bits),
            *map(_or_unknown, (part.accumulator_bits, part.ranges.accumulator_bits_seen)),
        ]
        for part in report.layers
    ]
    notes = (
        f"Inputs are those seen on {sections.count(report.pictures)} pictures. Integer bits: before the binary point, "
        "sign apart.",
        f"Accumulator bits: two's complement, enough for any {INPUT_BITS}-bit signed inputs in any order, sign "
        "included, before scale and bias; one more is enough for unsigned inputs. Seen: what the finished sums took on "
        f"these pictures, had inputs of {INPUT_BITS} bits been scaled to the largest.",
    )
    return Section("Bits", ("layer", *numeric), rows, frozenset(numeric), _LAYER, notes)


def _or_unknown(value: int | None) -> str:
    return sections.UNKNOWN if value is None else str(value)


def _scales(report: HardwareReport) -> Section:
    scaled = [(part.layer, part.scale) for part in report.layers if part.scale]
    rows = [
        [
            layer.name,
            str(scale.scales),
            _from_to(*map(sections.significant, (scale.scale_min, scale.scale_max))),
            _powers(scale),
            sections.share(scale.power_error),
        ]
        for layer, scale in scaled
    ]
    effect = report.effect
    notes = (
        "Sums of codes are multiplied by scale / denominator. Powers: of two, the nearest to that. Error: ‖w′ − w‖ / "
        "‖w‖ of the layer's weights with these powers.",
        f"With these powers everywhere the network gives the same class for "
        f"{sections.percent(effect.agreement_percent)} of the {sections.count(report.pictures)} pictures; logits "
        f"change by up to {sections.significant(effect.max_logit_difference)}, where the largest is "
        f"{sections.significant(effect.max_logit)}. A BatchNorm behind a layer, or a multiplication per output channel "
        "in its place, can take up the difference exactly; this is the cost where nothing does.",
    )
    numeric = ("scales", "error")
    columns = ("layer", "scales", "from – to", "powers", "error")
    return Section("Scales", columns, rows, frozenset(numeric), _LAYER, notes)


def _powers(scale: PowerScale) -> str:
    if scale.exponent_min is None:
        return sections.UNKNOWN
    return _from_to(f"2^{scale.exponent_min}", f"2^{scale.exponent_max}")


def _from_to(low: str, high: str) -> str:
    return low if low == high else f"{low} – {high}"


def _energy(report: HardwareReport) -> Section:
    numeric = ("FP32", "INT8", "shift-add", "of FP32", "of INT8")
    rows = [[part.layer.name, *_nanojoules(part.energy)] for part in report.layers]
    rows.append(["all layers", *_nanojoules(energy(report.totals()["all"][1]))])
    notes = (
        f"Nanojoules for one picture, a rough estimate from one table: {SOURCE}.",
        f"{METHOD}.",
        f"Left out: {LEFT_OUT}.",
    )
    return Section("Energy (estimate)", ("layer", *numeric), rows, frozenset(numeric), _LAYER, notes)


def _nanojoules(part: Energy) -> list[str]:
    fp32, int8, own = part.fp32_picojoules, part.int8_picojoules, part.shift_add_picojoules
    shares = [sections.share(own / other) if other else sections.UNKNOWN for other in (fp32, int8)]
    return [*(sections.number(value / 1000, 2) for value in (fp32, int8, own)), *shares]
