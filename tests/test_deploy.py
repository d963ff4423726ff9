"""examples/deploy: the script on the digits, every command of its README, and the table that stands there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from c_networks import needs_gcc, write_digits
from environments import environment
from small_job import ROOT, command
from test_examples import commands_in, script

import cbpq

HERE = ROOT / "examples" / "deploy"
DIGITS = ROOT / "examples" / "digits" / "digits.npz"
README = (HERE / "README.md").read_text()


def results() -> list[dict[str, Any]]:
    return [json.loads((HERE / "results" / f"{name}.json").read_text()) for name in ("resnet20", "resnet18")]


def table(folder: Path, *arguments: object) -> dict[str, Any]:
    """What the script measures, run as a user runs it, but with few pictures."""
    out = folder / "table.json"
    few = ("--pictures", 12, "--few", 3, "--repetitions", 2, "--work", folder / "work", "-o", out)
    run = [sys.executable, "-m", "examples.deploy.table", *map(str, (*arguments, *few))]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    measured: dict[str, Any] = json.loads(out.read_text())
    assert done.stdout == script("deploy.table").markdown([measured]) + "\n"
    return measured


def check(measured: dict[str, Any], file: Path) -> None:
    """Every row but integers and half precision computes what the network does, the reference as the library does."""
    with np.load(DIGITS) as arrays:
        labels = arrays["val_labels"].ravel()[:12]
        images = torch.from_numpy(arrays["val_images"][:12, None])
    loaded = cbpq.load(file)
    spec = loaded.info.input_spec
    with torch.no_grad():
        logits = loaded.model((images / 255 - spec.mean[0]) / spec.std[0])
    right = logits.argmax(1).numpy() == labels
    assert measured["pytorch"]["top1"] == pytest.approx(right.mean() * 100)
    for row in measured["rows"]:
        exact = not {"int8", "--half"} & {*row["command"].split()} and row["consumer"][:8] != "OpenVINO"
        count = row["pictures"]
        assert row["max_logit"] == pytest.approx(float(logits[:count].abs().max()), rel=1e-5)
        assert row["max_difference"] <= (1e-5 if exact else 0.2) * row["max_logit"]
        if exact:
            assert row["same_answer"] == 100
            assert row["top1"] == pytest.approx(right[:count].mean() * 100)
        assert row["bytes"] > 0
        assert (row["seconds"] is None) == (row["float32_seconds"] is None) == ("coreml" in row["command"])
    differences = {row["command"]: row["max_difference"] for row in measured["rows"]}
    assert differences["--format state-dict"] == 0


@pytest.mark.slow  # every export in its consumer
@needs_gcc
def test_the_table_of_the_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Consumers that can be here, in this process: each by itself imports torch again, as in the test below."""
    for name in ("onnxruntime", "onnxscript", "torchao"):
        pytest.importorskip(name)
    module, consumers = script("deploy.table"), script("deploy.consumers")

    def run(_: str, what: str, *arguments: object) -> str:
        if what == "cbpq":
            outcome = command(*arguments)
            assert outcome.code == 0, outcome.err
            return outcome.out
        monkeypatch.setattr(sys, "argv", [what, *map(str, arguments)])
        consumers.main()
        return ""

    monkeypatch.setattr(module, "run", run)
    file, out = write_digits(tmp_path, "two-bit-shift"), tmp_path / "table.json"
    only = ("cbpq", "state-dict", "folded", "torchao", "pt2", "onnxruntime", "c", "qonnx")
    given = (
        "table",
        file,
        "--data",
        DIGITS,
        "--pictures",
        12,
        "--few",
        3,
        "--repetitions",
        2,
        "--work",
        tmp_path / "w",
    )
    monkeypatch.setattr(sys, "argv", [*map(str, given), "-o", str(out), "--only", *only])
    module.main()
    measured = json.loads(out.read_text())
    said = capsys.readouterr()
    assert said.out == module.markdown([measured]) + "\n"
    assert "left out: --format qonnx in qonnx, for want of --qonnx-python" in said.err
    assert len(measured["rows"]) == 9
    assert measured["rows"][6]["bytes"] == (tmp_path / "w" / "network.onnx").stat().st_size
    check(measured, file)


@needs_gcc
@pytest.mark.slow
def test_every_row_in_environments_of_their_own(tmp_path: Path) -> None:
    """Three environments of up to 350 MB, and every format, on the digits; ternary, so that INT2 is among them."""
    pythons = {
        "openvino": environment("openvino", "openvino==2026.4.1", "numpy"),
        "qonnx": environment("qonnx", "qonnx>=1,<2", "onnx<1.23"),
        "coreml": environment("coreml", "coremltools==9.0", beside=True),
    }
    file = write_digits(tmp_path, "ternary")
    flags = [part for tool, python in pythons.items() for part in (f"--{tool}-python", python)]
    measured = table(tmp_path, file, "--data", DIGITS, *flags)
    assert len(measured["rows"]) == len(script("deploy.formats").FORMATS)
    assert not measured["left_out"]
    check(measured, file)


# the README


def test_the_table_in_the_readme_is_that_of_the_results() -> None:
    assert script("deploy.table").markdown(results()) in README


def test_the_commands_of_the_readme_are_those_of_the_script() -> None:
    """Each ``cbpq export`` of the text, word for word, and none is missing."""
    formats = script("deploy.formats").FORMATS
    source, arch = Path("out/model.safetensors"), "examples.cifar10.resnet:resnet20"
    ours = [
        ["cbpq", *row.command(source, arch, "cifar10.npz", Path(f"resnet20{row.ending}"))]
        for row in formats
        if not row.two_bits
    ]
    told = [words for words in commands_in(HERE / "README.md") if words[1] == "export"]
    assert {tuple(words) for words in ours} == {tuple(words) for words in told}


@needs_gcc
@pytest.mark.slow
def test_the_commands_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, in their order, for a ResNet-20 with random weights and few pictures; Core ML where it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    torch.save(script("cifar10.resnet").resnet20().state_dict(), "resnet20.th")
    rng = np.random.default_rng(0)
    sizes = {"train": 64, "val": 20}
    arrays = {f"{split}_images": rng.integers(0, 256, (n, 32, 32, 3), np.uint8) for split, n in sizes.items()}
    labels = {f"{split}_labels": (np.arange(n) % 10).astype(np.uint8)[:, None] for split, n in sizes.items()}
    np.savez("cifar10.npz", **arrays, **labels)  # type: ignore[arg-type]  # numpy's own type wants them one by one
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(code, {})
    ran = 0
    for words in commands_in(HERE / "README.md"):
        if "coreml" not in words:
            outcome = command(*words[1:])
            assert outcome.code == 0, outcome.err
            ran += 1
    assert ran == 12
    for line in re.findall(r"^python -m examples.deploy.table (.*)$", README, re.MULTILINE):
        words = re.sub(r"--\w+-python \S+|--beside \S+|-o \S+", "", line).split()
        table(tmp_path, *words, "--only", "state-dict", "onnxruntime")
