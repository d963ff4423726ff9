"""The scripts that measure cost: that they measure what they say, not how much it is."""

import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_examples import script

from cbpq import fused


@pytest.fixture(scope="module")
def step_cost() -> ModuleType:
    return script("benchmarks.step_cost")


@pytest.fixture(scope="module")
def run_cost() -> ModuleType:
    return script("benchmarks.run_cost")


def job_arguments(step_cost: ModuleType, *more: str) -> Any:
    return step_cost.parser().parse_args(
        ["timm:test_resnet", "--size", "32", "--batch-size", "2", "--steps", "3", *more]
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_both_jobs_train_the_same_network(step_cost: ModuleType, optimizer: str) -> None:
    arguments = job_arguments(step_cost, "--channels-last", "--amp", "--optimizer", optimizer, "--constraint", "binary")
    plain, ours = (step_cost.Job(arguments, constrain) for constrain in (False, True))
    assert torch.equal(plain.images, ours.images)
    assert plain.weights() == 0
    assert ours.weights() == sum(ours.network.get_parameter(name).numel() for name in ours.constrained.names)
    for job in (plain, ours):
        before = {name: p.detach().clone() for name, p in job.network.named_parameters()}
        job.step()
        assert all(not torch.equal(p, before[name]) for name, p in job.network.named_parameters() if "fc" in name)
    # every part of the constraint is at work: multipliers, and a window that is neither open nor shut
    assert 1 < ours.constrained.method.describe()["window"] < 10
    assert all(ours.constrained.state(name)["multiplier"].any() for name in ours.constrained.names)


def test_step_cost(
    step_cost: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps: list[bool] = []

    def taken(work: Any, device: torch.device) -> tuple[float, float]:
        steps.append(work.__self__.constrained is not None)
        return (4.0, 3.0) if steps[-1] else (2.0, 1.0)

    monkeypatch.setattr(step_cost, "memory_of", {"plain": 200, "constrained": 220}.__getitem__)
    monkeypatch.setattr(step_cost, "bandwidth", lambda device: 1e9)
    monkeypatch.setattr(step_cost.Job, "step", lambda job: None)
    monkeypatch.setattr(step_cost, "seconds", taken)
    monkeypatch.setattr(fused, "ENOUGH", fused.ENOUGH)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    command = ["timm:test_resnet", "--size", "32", "--compiled", "--json", str(tmp_path / "cost.json")]
    monkeypatch.setattr(sys, "argv", ["step_cost.py", *command])
    step_cost.main()
    assert fused.ENOUGH == 0
    result = json.loads((tmp_path / "cost.json").read_text())
    assert result["seconds"]["clock"] == {"plain": [2] * 6, "constrained": [4] * 6}
    assert steps == [False, True] * 6
    assert result["ratio"] == {"clock": 2, "processor": 3}
    assert result["memory_ratio"] == pytest.approx(1.1)
    assert result["floor"] == 28 * result["weights"] / 1e9
    shown = capsys.readouterr().out
    assert "timm:test_resnet, 32 px, batch 32, sgd" in shown
    assert "preset default, compiled; cpu" in shown
    assert "2.000" in shown
    assert "1.100" in shown


@pytest.mark.slow
def test_run_cost(
    run_cost: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but the programs, which take long to start: some ten seconds without them."""
    for name, value in {"IMAGES": 32, "PHOTOS": 20, "BATCH": 8}.items():
        monkeypatch.setattr(run_cost, name, value)
    started: list[tuple[str, ...]] = []

    def start(*words: Any) -> None:
        started.append(tuple(map(str, words)))
        time.sleep(0.001)

    monkeypatch.setattr(run_cost, "program", lambda *words: lambda: start(*words))
    monkeypatch.setattr(run_cost, "_of_children", lambda: float(len(started)))
    monkeypatch.setattr(sys, "argv", ["run_cost.py", "--repeats", "2", "--json", str(tmp_path / "cost.json")])
    run_cost.main()
    assert [words[:3] for words in started[:2]] == [("-m", "cbpq", "--help"), (started[1][0], "--help")]
    assert len(started) == 4 * 3
    result = json.loads((tmp_path / "cost.json").read_text())["seconds"]
    assert len(result) == 5
    for clocks in result.values():
        assert all(len(times) == 2 for found in clocks.values() for times in found.values())
    assert "loading a file, and a state dict" in capsys.readouterr().out


@pytest.mark.slow
def test_the_bare_evaluation_counts(run_cost: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what cbpq is held against, so it has to work. Some five seconds."""
    monkeypatch.setattr(run_cost, "IMAGES", 32)
    monkeypatch.setattr(run_cost, "PHOTOS", 10)
    network = run_cost.prepare(tmp_path).model
    plain = run_cost.plain_network(tmp_path)
    assert all(torch.equal(ours, plain.state_dict()[name]) for name, ours in network.state_dict().items())
    printed: list[int] = []
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path / "model.pth"), str(tmp_path / "images.npz")])
    exec(run_cost.BARE_EVALUATION, {"print": printed.append})
    measured = run_cost.cbpq.evaluate(tmp_path / "model.safetensors", tmp_path / "images.npz").result
    assert printed == [round(measured.top1 / 100 * 32)]
