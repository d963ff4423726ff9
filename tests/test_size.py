"""Smaller files: dense packing and half precision, from the command line and the library, with what they cost."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_job import command, contents, one_line, refused, report_of, write_arrays, write_network
from torch import nn

import cbpq
from cbpq.content import CbpqFile, ConstrainedTensor, halved
from cbpq.errors import FileFormatError
from cbpq.events import Interrupted
from cbpq.fileformat import read, write
from cbpq.model_file import halve
from cbpq.pipeline import execute
from cbpq.planning import plan
from cbpq.summary import HALVED, setbacks
from cbpq.tables import Stage

FLAGS = ("-b", "24", "--epochs", "1", "--device", "cpu", "-c", "ternary", "--rounding", "nearest")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network, its pictures, and a file made of them as ever: ``plain/``."""
    folder = tmp_path_factory.mktemp("job")
    write_network(folder / "net.safetensors", steps=40)
    write_arrays(folder / "data.npz")
    assert quantize(folder, "plain").code == 0
    return folder


def quantize(job: Path, output: str, *flags: object) -> Any:
    return command("quantize", job / "net.safetensors", "--data", job / "data.npz", *FLAGS, "-o", job / output, *flags)


def file_of(job: Path, output: str) -> Path:
    return job / output / "model.safetensors"


# Quantizing


def test_packing_changes_nothing_but_the_bytes(job: Path) -> None:
    assert quantize(job, "dense", "--pack", "dense").code == 0
    plain, dense = read(file_of(job, "plain")), read(file_of(job, "dense"))
    assert {tensor.packing for tensor in plain.constrained.values()} == {"bits"}
    assert {tensor.packing for tensor in dense.constrained.values()} == {"dense"}
    assert (plain.run, plain.source, plain.metrics) == (dense.run, dense.source, dense.metrics)
    state = plain.state()
    for name, array in dense.state().items():
        assert array.tobytes() == state[name].tobytes()
    write(job / "again", plain.packed_as("dense"))
    assert (job / "again").read_bytes() == file_of(job, "dense").read_bytes()
    sizes = report_of(job / "dense")["sizes"]
    assert sizes["file_bytes"] == file_of(job, "dense").stat().st_size
    for tensor in dense.constrained.values():
        count = tensor.codes[0].size
        bits = 8 * tensor.packed_bytes / len(tensor.codes)
        assert 1.6 * count <= bits < 1.6 * count + 8
    rows = report_of(job / "dense")["layers"]
    assert max(row["bits_per_weight"] for row in rows if math.prod(row["shape"][1:]) == 72) == 8 * 15 / 72


def test_half_precision_is_measured(job: Path) -> None:
    assert quantize(job, "half", "--half", "--pack", "dense").code == 0
    report = report_of(job / "half")
    plain = report_of(job / "plain")
    *before, trained, half = report["stages"]
    assert [stage["name"] for stage in report["stages"]] == [*(row["name"] for row in plain["stages"]), HALVED]
    assert trained["top1"] == plain["quantized"]["top1"]
    assert half["top1"] == report["quantized"]["top1"]
    assert before
    file, reference = read(file_of(job, "half")), read(file_of(job, "plain"))
    for name, array in file.others.items():
        other = reference.others[name]
        wanted = other.astype(np.float16) if other.dtype == np.float32 else other
        assert (array.dtype, array.tobytes()) == (wanted.dtype, wanted.tobytes())
    assert {tensor.scale.dtype.name for tensor in file.constrained.values()} == {"float32"}
    assert report["sizes"]["half_share"] == 1
    # what was measured is what is in the file
    measured = cbpq.evaluate(file_of(job, "half"), job / "data.npz", device="cpu").result
    assert measured.loss == pytest.approx(report["quantized"]["loss"], abs=1e-6)
    assert read(file_of(job, "half")).metrics["quantized"]["loss"] == report["quantized"]["loss"]
    assert report["quantized"]["loss"] != plain["quantized"]["loss"]


def test_the_stage_before_half_precision_is_measured_even_where_stages_are_not(job: Path) -> None:
    made = plan(
        str(job / "net.safetensors"),
        data=str(job / "data.npz"),
        settings=[("the test", {"epochs": 0, "rounding": "nearest", "evaluate_every": 0})],
        device="cpu",
        half=True,
    )
    report = execute(made, job / "unmeasured")
    assert [stage.name for stage in report.stages] == ["nearest rounding", HALVED]
    assert all(stage.top1 is not None and stage.agreement is not None for stage in report.stages)


def test_a_resumed_run_keeps_its_packing_and_precision(job: Path, tmp_path: Path) -> None:
    def planned(**choices: Any) -> Any:
        settings = [("the test", {"epochs": 1, "batch_size": 24, "rounding": "nearest", "checkpoint_minutes": 0.0})]
        chosen = {"constraint": "ternary", **choices}
        return plan(str(job / "net.safetensors"), data=str(job / "data.npz"), settings=settings, device="cpu", **chosen)

    asked = [0]

    def stop() -> bool:
        asked[0] += 1
        return asked[0] == 9

    with pytest.raises(Interrupted):
        execute(planned(pack="dense", half=True), tmp_path / "out", should_stop=stop)
    with pytest.raises(cbpq.errors.UsageError, match=r"pack was dense, now bits; half was True, now False"):
        execute(planned(), tmp_path / "out", resume=True)
    execute(planned(pack="dense", half=True), tmp_path / "out", resume=True)
    execute(planned(pack="dense", half=True), tmp_path / "whole")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    text = (tmp_path / "out" / "settings.toml").read_text()
    assert 'pack = "dense"\nhalf = true\n' in text


def test_packing_from_a_file_and_a_variable(job: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text('pack = "dense"\nhalf = true\n')
    document = quantize(job, "none", "--config", tmp_path / "settings.toml", "--dry-run", "--json").document()
    assert "pack" in json.dumps(document)
    monkeypatch.setenv("CBPQ_PACK", "zip")
    one_line(quantize(job, "none"), 2, "unknown packing 'zip'", "bits or dense")
    assert not (job / "none").exists()


def test_advice_where_half_precision_costs_much() -> None:
    from cbpq.evaluation import Predictions

    labels = torch.arange(1000) % 4
    wrong = torch.where(torch.arange(1000) < 500, labels, (labels + 1) % 4)
    original = Predictions(labels, labels, None, torch.zeros(1000).double(), 1.0)
    final = Predictions(labels, wrong, None, torch.zeros(1000).double(), 1.0)
    rows = [Stage("training", 99.0, 99.0, 1.0), Stage(HALVED, 50.0, 50.0, 1.0)]
    assert "leave out --half" in setbacks(rows, final, original)[0]
    rows = [Stage("nearest rounding", 99.0, 99.0, 1.0), Stage("training", 51.0, 51.0, 1.0), rows[1]]
    assert "--epochs 0" in setbacks(rows, final, original)[0]


# Half precision itself


def test_halved_as_one_rounds() -> None:
    values = np.array([0.1, -2.5e-8, 3e-8, 65504, 65519, 1 / 3], dtype=np.float32)
    half = halved(values)
    assert half.dtype == np.float16
    assert half.tolist() == [float(torch.tensor(value).half()) for value in values]
    large = np.array([1, 65520], dtype=np.float32)
    assert halved(large) is large
    for other in (np.array(3), np.array([1e300]), np.array([True])):
        assert halved(other) is other


def test_a_network_is_rounded_as_its_file_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, 3))
    model[1].running_var.fill_(1e6)  # type: ignore[operator]  # a Sequential's parts have no types
    model[1].running_mean.uniform_(-1, 1)  # type: ignore[operator]
    constrained = cbpq.constrain(model, torch.optim.SGD(model.parameters(), lr=0.1), "ternary")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cbpq.save(tmp_path / "half", constrained, half=True, packing="dense")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    file = read(tmp_path / "half")
    assert file.others["1.running_var"].dtype == np.float32
    assert file.others["1.running_mean"].dtype == np.float16
    assert file.others["1.num_batches_tracked"].dtype == np.int64
    constrained.finish()
    assert halve(model, constrained.names) == ["1.running_var"]
    for name, array in file.state().items():
        assert array.dtype in (np.float32, np.int64)
        assert torch.equal(torch.from_numpy(array), model.state_dict()[name]), name


# Exporting


def export(path: Path, *flags: object) -> Any:
    return command("export", path, "--format", "cbpq", *flags)


@pytest.mark.parametrize("flags", [("--pack", "dense"), ("--half",), ("--pack", "dense", "--half")])
def test_export_is_what_quantize_would_have_written(job: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    outcome = export(file_of(job, "plain"), *flags, "-o", tmp_path / "a.safetensors", "--json")
    assert outcome.code == 0, outcome.err
    document = outcome.document()
    size = (tmp_path / "a.safetensors").stat().st_size
    assert document["size"] == size == sum(document["bytes"].values()) < file_of(job, "plain").stat().st_size
    found, plain = read(tmp_path / "a.safetensors"), read(file_of(job, "plain"))
    expected = plain.packed_as("dense") if "dense" in flags else plain
    expected = expected.halved() if "--half" in flags else expected
    assert found.state().keys() == expected.state().keys()
    for name, array in expected.state().items():
        assert found.state()[name].tobytes() == array.tobytes()
    assert found.metrics == ({"before_half_precision": plain.metrics} if "--half" in flags else plain.metrics)
    loaded = cbpq.load(tmp_path / "a.safetensors")
    assert {tensor.dtype for tensor in loaded.model.state_dict().values()} == {torch.float32, torch.int64}
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, torch.from_numpy(expected.state()[name]))
    packed = cbpq.load(tmp_path / "a.safetensors", packed=True).model
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(packed(images), loaded.model(images))


def test_back_to_bits_is_the_file_it_was(job: Path, tmp_path: Path) -> None:
    assert export(file_of(job, "plain"), "--pack", "dense", "-o", tmp_path / "a.safetensors").code == 0
    assert export(tmp_path / "a.safetensors", "--pack", "bits", "-o", tmp_path / "b.safetensors").code == 0
    assert (tmp_path / "b.safetensors").read_bytes() == file_of(job, "plain").read_bytes()


def test_export_measures_what_half_precision_costs(job: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    outcome = export(file_of(job, "plain"), "--half", "-o", out, "--data", job / "data.npz", "--json")
    measured = outcome.document()["measured"]
    assert measured["original"]["top1"] == report_of(job / "plain")["quantized"]["top1"]
    assert measured["comparison"]["agreement"] > 80
    shown = export(file_of(job, "plain"), "--half", "-o", out, "--data", job / "data.npz", "--overwrite").out
    assert "half precision" in shown
    assert "Same answer as the original" in shown
    unmeasured = export(file_of(job, "plain"), "--half", "-o", out, "--overwrite")
    assert "not measured" in unmeasured.err


def test_a_state_dict_of_a_smaller_file_is_float32(job: Path, tmp_path: Path) -> None:
    export(file_of(job, "plain"), "--half", "--pack", "dense", "-o", tmp_path / "a.safetensors")
    assert command("export", tmp_path / "a.safetensors", "-o", tmp_path / "state.safetensors").code == 0
    state = load_file(tmp_path / "state.safetensors")
    for name, tensor in cbpq.load(tmp_path / "a.safetensors").model.state_dict().items():
        assert torch.equal(state[name], tensor)
        assert state[name].dtype == tensor.dtype


def test_export_refuses_in_one_line(job: Path, tmp_path: Path) -> None:
    plain, out = file_of(job, "plain"), tmp_path / "a.safetensors"
    one_line(export(plain, "-o", out), 2, "would be the same", "--pack dense")
    one_line(export(plain, "-o", out, "--pack", "zip"), 2, "unknown packing 'zip'")
    one_line(export(plain, "-o", tmp_path / "a.pth", "--half"), 2, ".safetensors")
    one_line(export(plain, "-o", out, "--pack", "dense", "--data", job / "data.npz"), 2, "no option 'data'")
    one_line(export(plain, "-o", out, "--half", "--opset", "21"), 2, "no option 'opset'")
    one_line(export(plain, "-o", plain, "--half"), 2, "exists")
    one_line(export(job / "net.safetensors", "-o", out, "--half"), 1, "plain safetensors file")
    one_line(command("export", plain, "-o", out, "--pack", "dense"), 2, "state-dict has no option 'pack'")
    assert contents(tmp_path) == {}
    refused(export(plain, "-o", out, "--half", "--data", tmp_path / "nothing"), 2, "nothing")


def test_halving_twice_is_halving_once(job: Path, tmp_path: Path) -> None:
    for source, name in ((file_of(job, "plain"), "a"), (tmp_path / "a.safetensors", "b")):
        assert export(source, "--half", "-o", tmp_path / f"{name}.safetensors").code == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_export_over_its_own_source(job: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_of(job, "plain").read_bytes())
    assert export(path, "--pack", "dense", "-o", path, "--overwrite").code == 0
    assert read(path).constrained.keys() == read(file_of(job, "plain")).constrained.keys()
    assert path.stat().st_size < file_of(job, "plain").stat().st_size


# Inspecting


def test_inspect_shows_the_whole_file(job: Path, tmp_path: Path) -> None:
    export(file_of(job, "plain"), "--half", "--pack", "dense", "-o", tmp_path / "a.safetensors")
    outcome = command("inspect", tmp_path / "a.safetensors")
    for words in ("its codes", "its scales", "what stays float", "names and metadata", "densely packed", "entropy"):
        assert words in outcome.out
    document = command("inspect", tmp_path / "a.safetensors", "--json").document()
    sizes = document["sizes"]
    parts = [sizes[f"{part}_bytes"] for part in ("codes", "scale", "others", "header")]
    assert sum(parts) == sizes["file_bytes"] == (tmp_path / "a.safetensors").stat().st_size
    for layer in document["layers"]:
        total = sum(layer["counts"])
        counted = Counter(dict(zip(layer["codes"], layer["counts"], strict=True)))
        entropy = -sum(n / total * math.log2(n / total) for n in counted.values() if n)
        assert layer["entropy"] == pytest.approx(entropy)
        assert layer["bits_per_weight"] == 8 * layer["codes_bytes"] / total
        assert layer["packing"] == "dense"
    assert sizes["entropy"] <= sizes["bits_per_weight"] < 2


def test_binary_weights_gain_nothing(tmp_path: Path) -> None:
    tensor = ConstrainedTensor(np.ones((3, 5), np.int8), np.ones((), np.float32), (-1, 1), 1, "binary")
    file = CbpqFile({"w": tensor}, {}, {}, {}, {})
    write(tmp_path / "bits.safetensors", file)
    assert export(tmp_path / "bits.safetensors", "--pack", "dense", "-o", tmp_path / "dense.safetensors").code == 0
    assert (tmp_path / "dense.safetensors").read_bytes() == (tmp_path / "bits.safetensors").read_bytes()
    with pytest.raises(FileFormatError, match="impossible packing"):
        write(
            tmp_path / "no", CbpqFile({"w": ConstrainedTensor(**(vars(tensor) | {"packing": "dense"}))}, {}, {}, {}, {})
        )
