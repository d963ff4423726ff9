"""What a quantization cost: one record, shown alike on the terminal, in ``report.json`` and in ``report.md``."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.text import Text

from cbpq import sections, tables
from cbpq.plain import plain
from cbpq.sections import Section
from cbpq.tables import LayerRow, SkippedRow, Stage


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
            tables.accuracy_section(
                self.quantized, self.original, self.comparison, pictures=self.data.get("val_split") or ""
            ),
            tables.stage_section(self.stages),
            tables.size_section(self.sizes),
            tables.layer_section(self.layers, total, abbreviated),
            tables.skipped_section(self.skipped, total, abbreviated),
            tables.settings_section(self.settings),
        ]
        if abbreviated:
            parts.append(tables.pairs_section("Run", facts))
        else:
            parts += [tables.pairs_section(title, values) for title, values in facts.items()]
        return [part for part in parts if part.rows or part.notes]
