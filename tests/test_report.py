"""The report: one record, three renderings with the same content."""

import io
import json
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from cbpq import sections
from cbpq.plain import plain
from cbpq.report import Report
from cbpq.sections import Section
from cbpq.tables import LayerRow, SkippedRow, accuracy_section, size_section


def evaluation(top1: float) -> dict[str, Any]:
    return {
        "images": 10_000,
        "top1": top1,
        "top1_interval": [top1 - 0.55, top1 + 0.52],
        "top5": 99.5,
        "top5_interval": [99.3, 99.6],
        "loss": 0.3124,
        "loss_interval": [0.3, 0.32],
    }


def report(layers: int = 3, **changes: Any) -> Report:
    rows = tuple(
        LayerRow(f"layer{i}.conv.weight", "two-bit-shift", (64, 64, 3, 3), 36_864, 3.06, 0.2 + 0.001 * i, 0.31, 1.2e-5)
        for i in range(layers)
    )
    whole = Report(
        command="cbpq quantize resnet20 --data cifar10.npz -o OUT",
        source={"library": "callable", "architecture": "nets:resnet20", "arguments": {"num_classes": 10}},
        constraint="two-bit-shift",
        method="cbp",
        preset="default",
        settings={"lr": {"value": 0.01, "from": "preset default"}, "amp": {"value": False, "from": "flag"}},
        data={"path": "cifar10.npz", "classes": 10, "bad": []},
        original=evaluation(91.73),
        quantized=evaluation(90.92),
        comparison={"agreement": 95.123, "agreement_interval": [94.6, 95.6], "mcnemar_p": 0.00031, "drop": 0.81},
        sizes={
            "float32_bytes": 1_084_000,
            "file_bytes": 112_000,
            "codes_bytes": 98_000,
            "entropy_bytes": 87_000,
            "bits_per_weight": 3.05,
            "constrained_share": 0.983,
        },
        layers=rows,
        skipped=(SkippedRow("linear.weight", (10, 64), 640, "the classifier | head"),),
        training={"epochs": 10, "window": math.inf},
        versions={"cbpq": "0.1.0"},
        seconds={"training": 83.1},
        warnings=("two `odd` *things*",),
    )
    return replace(whole, **changes)


def on_terminal(record: Report, width: int = 120) -> str:
    stream = io.StringIO()
    record.render(Console(file=stream, width=width))
    return stream.getvalue()


def markdown_tables(text: str) -> list[list[list[str]]]:
    """Read GitHub tables by their rules: cells end at pipes without a backslash before them."""
    tables: list[list[list[str]]] = []
    previous = ""
    for line in text.splitlines():
        if line.startswith("|"):
            if not previous.startswith("|"):
                tables.append([])
            tables[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        previous = line
    return tables


def test_json_is_plain_and_says_what_the_record_says() -> None:
    document = report().to_dict()
    again = json.loads(json.dumps(document, allow_nan=False))
    assert again == document
    assert document["original"]["top1"] == 91.73
    assert document["training"] == {"epochs": 10, "window": None}  # JSON has no infinity
    assert document["layers"][0] == {
        "name": "layer0.conv.weight",
        "constraint": "two-bit-shift",
        "shape": [64, 64, 3, 3],
        "parameters": 36_864,
        "bits_per_weight": 3.06,
        "relative_error": 0.2,
        "zeros": 0.31,
        "cfs": 1.2e-5,
        "snr": None,
    }
    assert document["skipped"][0]["reason"] == "the classifier | head"


def test_plain_converts_whatever_a_run_may_hold() -> None:
    found = plain({1: (np.float32(0.5), np.int64(3), float("nan")), "a": np.array([1.0, math.inf]), "b": {2, 1}})
    assert found == {"1": [0.5, 3, None], "a": [1.0, None], "b": [1, 2]}
    assert plain(True) is True
    assert plain(len) == str(len)


def test_markdown_tables_are_rectangular_and_complete() -> None:
    record = report(layers=50)
    text = record.to_markdown()
    tables = markdown_tables(text)
    assert len(tables) == 10  # accuracy, size, layers, left in float, settings, data, source, training, time, versions
    for table in tables:
        assert len({len(row) for row in table}) == 1
        assert all(set(cell) <= set("-:") for cell in table[1])
    assert tables[0][2] == ["top-1", "91.73 % [91.18, 92.25]", "90.92 % [90.37, 91.44]", "-0.81 points"]
    assert len(tables[2]) == 52  # all layers, however many
    assert tables[2][2][:3] == ["`layer0.conv.weight`", "two-bit-shift", "64×64×3×3"]
    assert tables[3][2][-1] == r"the classifier \| head"
    assert "```console\ncbpq quantize resnet20 --data cifar10.npz -o OUT\n```\n" in text
    assert r"> **Warning:** two \`odd\` \*things\*" in text
    assert "95.12 % [94.60, 95.60]" in text
    # GitHub reads a table only after a blank line
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("|") and not lines[i - 1].startswith("|")]
    assert all(lines[i - 1] == "" for i in starts)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=20), st.text(max_size=20))
def test_no_text_breaks_a_markdown_table(first: str, second: str) -> None:
    text = sections.markdown(Section("t", ("a", "b"), [(first, second)], code=frozenset("b")))
    assert len(text.split("\n")) == 6  # title, blank, header, rule, row, blank
    assert markdown_tables(text)[0][0] == ["a", "b"]
    assert len(text.split("\n")[4].replace("\\\\", "").replace("\\|", "").split("|")) == 4


def test_a_markdown_reader_sees_tables_code_and_text() -> None:
    reader = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    tokens = reader.parse(report().to_markdown())
    assert sum(token.type == "table_open" for token in tokens) == 10
    assert [token.content for token in tokens if token.type == "fence"] == [report().command + "\n"]
    inline = [child for token in tokens for child in token.children or ()]
    spans = [child.content for child in inline if child.type == "code_inline"]
    assert "layer0.conv.weight" in spans
    text = [token.content for token in tokens if token.type == "inline"]
    shown = ["".join(child.content for child in token.children) for token in tokens if token.type == "inline"]
    assert "the classifier | head" in shown, text
    assert "Warning: two `odd` *things*" in shown
    assert "3.05 bits per constrained weight; 98.3 % of all parameters are constrained." in shown


def test_terminal_shows_the_same_numbers() -> None:
    text = on_terminal(report())
    for part in (
        "91.73 % [91.18, 92.25]",
        "90.92 % [90.37, 91.44]",
        "-0.81 points",
        "95.12 % [94.60, 95.60]",
        "p = 0.00031",
        "1.08 MB",
        "9.7×",
        "3.05 bits per constrained weight; 98.3 % of all parameters are constrained",
        "layer2.conv",
        "the classifier | head",
        "preset default",
        "warning: two `odd` *things*",
        "cbpq quantize resnet20 --data cifar10.npz -o OUT",
    ):
        assert part in text


def test_long_layer_tables_are_abbreviated_on_the_terminal_only() -> None:
    record = report(layers=50)
    text = on_terminal(record)
    assert "layer49.conv" in text  # the largest error
    assert "layer0.conv" not in text
    assert "38 more in report.md and report.json" in text
    assert len(record.to_dict()["layers"]) == 50


def test_what_stays_float_is_grouped_on_the_terminal_only() -> None:
    rows = (
        SkippedRow("conv1.weight", (8, 3, 3, 3), 216, "first convolution"),
        *(SkippedRow(f"bn{i}.weight", (8,), 1000, "normalization") for i in range(5)),
    )
    record = report(skipped=rows)
    text = on_terminal(record)
    assert "conv1 " in text
    assert "5 of them" in text
    assert "5,000" in text
    assert "bn3" not in text
    assert f"Together {100 * 5216 / (5216 + 3 * 36_864):.1f} % of the parameters." in text
    assert len(markdown_tables(record.to_markdown())[3]) == 2 + 6


@pytest.mark.parametrize("width", [60, 80, 120])
def test_terminal_lines_keep_to_the_width(width: int) -> None:
    record = report(command="cbpq quantize x")
    assert max(map(len, on_terminal(record, width).splitlines())) <= max(width, len(record._title()))


def test_a_name_cannot_steer_the_terminal() -> None:
    evil = SkippedRow("x\x1b]0;title\x07.weight", (1,), 1, "\x1b[2J")
    text = on_terminal(report(skipped=(evil,), warnings=("\x1b[31m",)))
    assert "\x1b" not in text
    assert "\\x1b[2J" in text


def test_parts_that_are_missing_are_left_out() -> None:
    record = report(
        original=None, quantized=None, comparison=None, layers=0, skipped=(), training={}, seconds={}, warnings=()
    )
    record = replace(record, layers=())
    text = record.to_markdown()
    assert "## Accuracy" not in text
    assert "## Layers" not in text
    assert "## Size" in text
    assert "Layers" not in on_terminal(record)


def test_one_network_alone_has_no_difference_column() -> None:
    section = accuracy_section(evaluation(90.0), name="resnet18")
    assert section.columns == ("", "resnet18")
    assert section.rows[0] == ["top-1", "90.00 % [89.45, 90.52]"]
    unknown = evaluation(90.0) | {"loss": None, "top5": float("nan")}
    assert accuracy_section(unknown).rows[1] == ["top-5", sections.UNKNOWN]


def test_sizes_that_are_unknown_are_left_out() -> None:
    assert [row[0] for row in size_section({"file_bytes": 1000}).rows] == ["this file"]


@pytest.mark.parametrize(
    "bytes_, shown",
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_999, "1.00 MB"), (67_300, "67.3 kB"), (1.5e9, "1.50 GB")],
)
def test_sizes(bytes_: float, shown: str) -> None:
    assert sections.size(bytes_) == shown


@pytest.mark.parametrize(
    "seconds, shown", [(8.44, "8.4 s"), (59.96, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (None, "–")]
)
def test_durations(seconds: float | None, shown: str) -> None:
    assert sections.duration(seconds) == shown


def test_numbers_that_are_not_there_show_a_dash() -> None:
    for spell in (
        sections.percent,
        sections.share,
        sections.number,
        sections.significant,
        sections.points,
        sections.count,
    ):
        assert spell(None) == spell(math.nan) == sections.UNKNOWN
    assert sections.p_value(1e-9) == "p < 0.0001"
    assert sections.p_value(0.031) == "p = 0.031"
    assert sections.ratio(None, 3) == sections.ratio(3, 0) == sections.UNKNOWN


def test_notes_never_turn_into_other_markdown() -> None:
    notes = ("3.05 bits", "1. one", "# head", "- item", "> quote", "--- rule", "[a](b) <i>")
    text = sections.markdown(Section("", (), [], notes=notes))
    assert text == "3.05 bits\n\n1\\. one\n\n\\# head\n\n\\- item\n\n\\> quote\n\n\\--- rule\n\n[a]\\(b) \\<i>\n"
    assert sections.fenced("a```b") == "````\na```b\n````\n"
