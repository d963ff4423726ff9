"""Titled tables that render alike on a terminal (Rich) and as GitHub Markdown, and one spelling for every number."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

UNKNOWN = "–"
WIDEST = 10_000  # columns, more than any table takes


@dataclass(frozen=True)
class Section:
    """A table under a title; ``numbers`` names the right-aligned columns, ``code`` those of literal names."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    numbers: frozenset[str] = field(default_factory=frozenset)
    code: frozenset[str] = field(default_factory=frozenset)
    notes: tuple[str, ...] = ()


def render(console: Console, section: Section, hint: str = "") -> None:
    """Print the section on a terminal, the table first, then its notes and ``hint``."""
    # without a title row the first line would be blank
    if section.title:
        console.print(Text(printable(section.title), style="bold"))
    if section.rows:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="dim")
        for column in section.columns:
            number = column in section.numbers
            # a name cut short cannot be looked up, so everything folds rather than ends in an ellipsis
            table.add_column(column, justify="right" if number else "left", no_wrap=number, overflow="fold")
        for row in section.rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        # one blank between columns instead of two does less harm than a name that is broken
        if console.measure(table, options=console.options.update(max_width=WIDEST)).maximum > console.width:
            table.padding = 0
        console.print(table)
    for note in (*section.notes, hint):
        if note:
            console.print(Text(printable(note), style="dim"))
    console.print()


def markdown(section: Section) -> str:
    """The section as GitHub Markdown, ending with a newline."""
    lines = [f"## {escape(section.title)}", ""] if section.title else []
    if section.rows:
        rule = ("---:" if column in section.numbers else "---" for column in section.columns)
        lines.append(_row(map(escape, section.columns)))
        lines.append(_row(rule))
        for row in section.rows:
            cells = zip(section.columns, row, strict=True)
            lines.append(_row(_code(cell) if column in section.code else escape(cell) for column, cell in cells))
        lines.append("")
    for note in section.notes:
        lines += [_paragraph(note), ""]
    return "\n".join(lines)


def printable(text: str) -> str:
    """Text without control characters: a name in a file of unknown origin could steer the terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def fenced(text: str, language: str = "") -> str:
    """Text as a fenced code block; the fence is longer than any run of backticks inside."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}\n"


def percent(value: float | None, interval: Sequence[float] | None = None) -> str:
    """A percentage given in percent, with its interval: ``91.73 % [91.18, 92.25]``."""
    if not _known(value):
        return UNKNOWN
    return f"{value:.2f} %{_interval(interval, 2)}"


def share(value: float | None) -> str:
    """A share given from 0 to 1 as a percentage with one decimal: ``31.4 %``."""
    return f"{100 * value:.1f} %" if value is not None and math.isfinite(value) else UNKNOWN


def number(value: float | None, decimals: int = 4, interval: Sequence[float] | None = None) -> str:
    """A plain number with fixed decimals and its interval: ``0.3124 [0.3011, 0.3237]``."""
    return f"{value:.{decimals}f}{_interval(interval, decimals)}" if _known(value) else UNKNOWN


def significant(value: float | None, digits: int = 3) -> str:
    """A number with a few significant digits: ``0.0123``, ``1.2e-05``."""
    return f"{value:.{digits}g}" if _known(value) else UNKNOWN


def points(value: float | None) -> str:
    """A difference of two percentages: ``-0.81 points``."""
    return f"{value:+.2f} points" if _known(value) else UNKNOWN


def count(value: float | None) -> str:
    """A whole number with thousands separators: ``10,000``."""
    return f"{round(value):,}" if value is not None and math.isfinite(value) else UNKNOWN


def size(value: float | None) -> str:
    """A number of bytes in decimal units: ``67.3 kB``."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        # 999,999 bytes are 1.00 MB, not 1e+03 kB
        if value >= 0.9995 * 10**power:
            scaled = value / 10**power
            return (
                f"{scaled:.2f} {unit}"
                if scaled < 10
                else f"{scaled:.1f} {unit}"
                if scaled < 100
                else f"{scaled:.0f} {unit}"
            )
    return f"{value:.0f} B"


def ratio(whole: float | None, part: float | None) -> str:
    """How many times smaller ``part`` is: ``14.2×``."""
    return f"{whole / part:.1f}×" if whole and part else UNKNOWN


def duration(seconds: float | None) -> str:
    """A time: ``8.4 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60:02} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02} min"


def p_value(value: float | None) -> str:
    """A p-value: ``p = 0.031``, ``p < 0.0001``."""
    if not _known(value):
        return UNKNOWN
    return "p < 0.0001" if value is not None and value < 1e-4 else f"p = {significant(value, 2)}"


def shape(dimensions: Sequence[int]) -> str:
    """A shape: ``64×3×7×7``."""
    return "×".join(map(str, dimensions)) or "scalar"


def is_empty(value: Any) -> bool:
    """Whether there is nothing to show."""
    return value is None or (isinstance(value, (str, Mapping, list, tuple)) and not value)


def anything(value: Any) -> str:
    """Any JSON value as people write it, nested ones as ``name value`` pairs."""
    nested = (Mapping, list, tuple)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return significant(value, 6)
    if isinstance(value, Mapping):
        items = [
            (str(name).replace("_", " "), anything(item), isinstance(item, nested))
            for name, item in value.items()
            if not is_empty(item)
        ]
        return ", ".join(f"{name} ({text})" if inner else f"{name} {text}" for name, text, inner in items)
    if isinstance(value, (list, tuple)):
        return ", ".join(f"({anything(item)})" if isinstance(item, nested) else anything(item) for item in value)
    return UNKNOWN if value is None else str(value)


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _interval(interval: Sequence[float] | None, decimals: int) -> str:
    return f" [{interval[0]:.{decimals}f}, {interval[1]:.{decimals}f}]" if interval else ""


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def escape(text: str) -> str:
    """Keep Markdown's own characters literal, and the text on one line."""
    text = re.sub(r"([\\`*_<|~])", r"\\\1", text)
    return " ".join(text.replace("](", "]\\(").split())


def _paragraph(text: str) -> str:
    """A paragraph that no leading character turns into a heading, a list, a rule or a quote."""
    text = escape(text)
    return f"\\{text}" if text.startswith(tuple("#>+-=")) else re.sub(r"^(\d+)(?=[.)] )", r"\1\\", text)


def _code(text: str) -> str:
    """A code span; a pipe would end the table's cell even inside one."""
    ticks = "`" * (_longest_run(text) + 1)
    pad = " " if "`" in text else ""
    return f"{ticks}{pad}{' '.join(text.split())}{pad}{ticks}".replace("|", "\\|") if text else ""


def _longest_run(text: str) -> int:
    longest = run = 0
    for character in text:
        run = run + 1 if character == "`" else 0
        longest = max(longest, run)
    return longest
