"""The script that trains with torchao's PARQ: what it writes, keeps and refuses. Most of it needs torchao."""

import json
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from small_job import ROOT

from cbpq.standings import read_comparison

SCRIPT = runpy.run_path(str(ROOT / "examples" / "cifar10" / "parq.py"))
# looked for, not imported: what importing it has to say is for the script to keep quiet
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
LEVELS = {"binary": 2, "ternary": 3, "four-levels": 4}


def parq(*arguments: object) -> int:
    fixed = ("net.safetensors", "--data", "a.npz", "--device", "cpu", "-o", "out", "--epochs", 1)
    code: int = SCRIPT["main"]([str(word) for word in (*fixed, *arguments)])
    return code


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line there is."""
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    return line


def document(name: str) -> Any:
    return json.loads(Path("out", f"{name}.json").read_text())


@needs_torchao
def test_runs_are_made_once(small_job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parq("--constraint", *LEVELS, "--seeds", 1, "--set", "batch_size=32") == 0
    shown = capsys.readouterr()
    assert [line.split(":")[0] for line in shown.err.splitlines()] == [f"parq-{name}-0" for name in LEVELS]
    assert document("parq")["command"].startswith("python -m examples.cifar10.parq")  # and no path of this machine
    assert "four levels (2 bit)" in " ".join(shown.out.split())
    for name, count in LEVELS.items():
        run = document(f"parq-{name}-0")
        assert run["parq"]["levels"] == count
        assert run["training"]["steps"] == 3
        assert run["versions"].keys() >= {"cbpq", "torch", "torchao"}
    summary = read_comparison(small_job / "out" / "parq.json")
    rows = [(row["method"], row["constraint"], len(row["scores"])) for row in summary["rows"]]
    assert rows == [("parq", title, 1) for title in ("binary", "ternary", "four levels (2 bit)")]
    assert (summary["budget"]["epochs"], summary["settings"]["batch_size"]) == (1, 32)

    # what is there is kept, and what is not is made
    before = {path: path.read_bytes() for path in (small_job / "out").glob("parq-*.json")}
    assert parq("--constraint", "binary", "--seeds", 2, "--set", "batch_size=32") == 0
    assert capsys.readouterr().err.startswith("parq-binary-1: epoch 1 of 1, loss ")
    assert {path: path.read_bytes() for path in before} == before
    assert [len(row["scores"]) for row in document("parq")["rows"]] == [2]
    assert parq("--constraint", "binary", "--seeds", 1, "--first-seed", 1, "--set", "batch_size=32") == 0
    assert [run["seed"] for run in document("parq")["runs"]] == [1]
    capsys.readouterr()
    assert parq("--constraint", "binary", "--set", "batch_size=16", "--steepness", 10) == 2
    assert "differs in batch_size, steepness; name another folder" in refusal(capsys)


@needs_torchao
def test_a_weight_that_is_not_on_its_levels_is_told(small_job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # the one step there is comes before the end of the annealing
    settings = ("batch_size=96", "distillation_loss=features")
    assert parq("--constraint", "ternary", "--seeds", 1, "--start", "compensated", "--set", *settings) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "where 3 are allowed" in warnings[0]
    assert document("parq-ternary-0")["parq"]["levels"] > 3


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--constraint", "binary", "two-bit-shift"), "PARQ has no quantizer for 'two-bit-shift'; choose from binary,"),
        (("--seeds", 0), "too few"),
        (("--first-seed", -1), "0 or more, not -1"),
        (("--anneal-end", 2), "share of the budget"),
    ],
)
def test_refusals(flags: tuple[object, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parq("-o", tmp_path / "out", *flags) == 2
    assert words in refusal(capsys)
    assert not (tmp_path / "out").exists()


def test_without_torchao(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for module in ("torchao", "torchao.prototype.parq"):
        monkeypatch.setitem(sys.modules, module, None)
    assert parq("-o", tmp_path / "out") == 4
    assert refusal(capsys).endswith('is not installed; run: pip install "cbpq[torchao]"')
    assert not (tmp_path / "out").exists()
