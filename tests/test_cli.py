"""The commands as users run them: what they print where, and the exit code each failure ends with."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

import cbpq
from cbpq.cli import common, doctor, explain, main
from cbpq.devices import resolve_device
from cbpq.errors import CbpqError, DataError, GateError, MissingPartError, UsageError
from cbpq.fileformat import CbpqFile, ConstrainedTensor, write
from cbpq.inputs import InputSpec
from cbpq.models import SourceInfo, load_model

NETWORK = """
from torch import nn


def make():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
    )
"""
FLAGS = ("--input-size", "8", "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25")
RUN = tuple[int, str, str]


def built() -> nn.Sequential:
    scope: dict[str, Any] = {}
    exec(NETWORK, scope)
    made: nn.Sequential = scope["make"]()
    return made


class World:
    """A folder with a network, its weights, a cbpq file made from them, and images that the original gets all right."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "cli_nets.py").write_text(NETWORK)
        rng = np.random.default_rng(0)
        colours = rng.integers(20, 236, (60, 1, 1, 3))
        images = (colours + rng.integers(-20, 20, (60, 8, 8, 3))).astype(np.uint8)
        self.inputs = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
        torch.manual_seed(0)
        original = built().eval()
        with torch.no_grad():
            for parameter in original.parameters():
                parameter.mul_(4)
            self.labels = original(self.inputs).argmax(1)
        self.weights = folder / "weights.pth"
        torch.save(original.state_dict(), self.weights)
        self.data = folder / "data.npz"
        np.savez(
            self.data,
            train_images=images[:20],
            train_labels=self.labels[:20].numpy(),
            val_images=images,
            val_labels=self.labels.numpy(),
        )
        weight = original.state_dict()["2.weight"]
        scale = weight.abs().mean().numpy()
        codes = np.where(weight.numpy() < 0, -1, 1).astype(np.int32)
        codes[: len(codes) // 2] *= -1  # so that the quantized network is clearly worse
        tensor = ConstrainedTensor(codes, scale, (-1, 1), 1, "binary")
        others = {name: value.numpy() for name, value in original.state_dict().items() if name != "2.weight"}
        spec = InputSpec(3, 8, 8, mean=(0.5,) * 3, std=(0.25,) * 3)
        info = SourceInfo("callable", "cli_nets:make", {}, spec, None)
        self.file = folder / "model.safetensors"
        write(self.file, CbpqFile({"2.weight": tensor}, others, info.to_dict(), {"seed": 0}, {}))
        quantized = built().eval()
        state = {
            name: torch.from_numpy(array.copy()) for name, array in {**others, "2.weight": tensor.weight()}.items()
        }
        quantized.load_state_dict(state)
        with torch.no_grad():
            self.quantized_says = quantized(self.inputs).argmax(1)
        self.top1 = 100 * float((self.quantized_says == self.labels).float().mean())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = World(tmp_path_factory.mktemp("world"))
    assert len(made.labels.unique()) > 1
    assert made.top1 < 95
    return made


@pytest.fixture
def run(world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., RUN]:
    monkeypatch.chdir(world.folder)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("CBPQ_DEBUG", raising=False)

    def invoke(*arguments: object) -> RUN:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return invoke


def failure(result: RUN, code: int, *parts: str) -> str:
    """Check that a command failed as every failure should: nothing on stdout, one line on stderr, its exit code."""
    found, out, err = result
    assert found == code, err
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err
    return err


# evaluate


def test_evaluate_counts_as_a_plain_loop_does(run: Callable[..., RUN], world: World) -> None:
    code, out, err = run(
        *("evaluate", "model.safetensors", "--arch", "cli_nets:make", "--data", "data.npz", "--batch-size", 7),
        *("--against", "cli_nets:make", "--weights", "weights.pth", "--json", "--device", "cpu"),
    )
    assert code == 0, err
    document = json.loads(out)
    assert document["images"] == 60
    assert document["top1"] == pytest.approx(world.top1)
    low, high = document["top1_interval"]
    assert low < world.top1 < high
    assert document["original"]["top1"] == 100
    same = 100 * float((world.quantized_says == world.labels).float().mean())
    assert document["comparison"]["agreement"] == pytest.approx(same)
    assert document["comparison"]["drop"] == pytest.approx(100 - world.top1)
    assert 0 <= document["comparison"]["mcnemar_p"] < 1
    assert document["network"]["architecture"] == "cli_nets:make"
    assert document["device"].startswith("cpu")


def test_evaluate_shows_intervals_and_the_difference(run: Callable[..., RUN], world: World) -> None:
    code, out, err = run(
        *("evaluate", world.file, "--arch", "cli_nets:make", "--data", world.data, "--quiet"),
        *("--against", "cli_nets:make", "--weights", world.weights),
    )
    assert (code, err) == (0, "")
    assert "100.00 % [93.98, 100.00]" in out  # Wilson's interval of 60 of 60
    assert f"{world.top1:.2f} % [" in out
    assert f"{world.top1 - 100:+.2f} points" in out
    assert "Same answer as the original" in out
    assert max(map(len, out.splitlines()[2:])) <= 80


def test_evaluate_takes_any_source(run: Callable[..., RUN]) -> None:
    code, out, err = run(
        "evaluate", "cli_nets:make", "--weights", "weights.pth", *FLAGS, "--data", "data.npz", "--json"
    )
    assert code == 0, err
    document = json.loads(out)
    assert document["top1"] == 100
    assert document["original"] is document["comparison"] is None
    assert document["network"]["input_spec"]["std"] == [0.25] * 3


def test_the_library_twin_gives_the_same(run: Callable[..., RUN], world: World) -> None:
    measured = cbpq.evaluate(world.file, world.data, arch="cli_nets:make")
    document = json.loads(run("evaluate", world.file, "--arch", "cli_nets:make", "--data", world.data, "--json")[1])
    assert {**measured.to_dict(), "images_per_second": 0} == {**document, "images_per_second": 0}


def test_the_original_is_fed_as_the_file_says_if_it_was_made_from_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = tmp_path / "test_resnet.pth"
    network = timm.create_model("test_resnet", num_classes=10)
    torch.save(network.state_dict(), weights)
    source = load_model(str(weights), input_overrides={"input_size": 32})
    others = {name: value.numpy() for name, value in source.model.state_dict().items()}
    file = tmp_path / "model.safetensors"
    write(file, CbpqFile({}, others, source.info.to_dict(), {}, {}))
    data = tmp_path / "data.npz"
    images, labels = np.zeros((3, 8, 8, 3), np.uint8), np.arange(3)
    np.savez(data, train_images=images, train_labels=labels, val_images=images, val_labels=labels)
    measured = cbpq.evaluate(file, data, against=weights)
    assert measured.notes == ()
    assert measured.original == measured.info
    assert measured.result.reference is not None
    assert measured.result.loss == measured.result.reference.loss

    # of other weights nobody asked for another preprocessing, so they keep their own
    torch.save({name: value + 1 for name, value in network.state_dict().items()}, weights)
    measured = cbpq.evaluate(file, data, against=weights)
    assert measured.original is not None
    assert (measured.info.input_spec.height, measured.original.input_spec.height) == (32, 160)
    assert any("differ" in note for note in measured.notes)
    assert any("same original weights" in note for note in measured.notes)


def test_arch_is_refused_for_a_name(run: Callable[..., RUN]) -> None:
    arguments = ("evaluate", "cli_nets:make", "--weights", "weights.pth", *FLAGS, "--data", "data.npz")
    failure(run(*arguments, "--arch", "cli_nets:make"), 2, "--arch is for files")


@pytest.mark.parametrize(
    "gates, code",
    [
        (("--min-top1", "0"), 0),
        (("--min-top1", "96"), 3),
        (("--max-drop", "100"), 0),
        (("--max-drop", "5"), 3),
        (("--min-top1", "1", "--max-drop", "5"), 3),
    ],
)
def test_gates_come_after_the_result(run: Callable[..., RUN], world: World, gates: tuple[str, ...], code: int) -> None:
    against = ("--against", "cli_nets:make", "--weights", "weights.pth")
    arguments = ("evaluate", "model.safetensors", "--arch", "cli_nets:make", "--data", "data.npz", *against, *gates)
    found, out, err = run(*arguments, "--json")
    assert found == code
    assert json.loads(out)["top1"] == pytest.approx(world.top1)
    if code:
        assert err.count("\n") == 1
        assert f"{world.top1:.2f} %" in err
        assert gates[-2] in err


def test_gates_are_inclusive_and_refuse_what_is_no_number() -> None:
    common.check_gates(90.0, 91.0, min_top1=90.0, max_drop=1.0)
    common.check_gates(float("nan"))
    with pytest.raises(GateError, match=r"90\.00 %, below --min-top1 90\.5"):
        common.check_gates(90.0, min_top1=90.5)
    with pytest.raises(GateError, match=r"fell by 1\.00 points \(91\.00 % to 90\.00 %\)"):
        common.check_gates(90.0, 91.0, max_drop=0.9)
    with pytest.raises(GateError):
        common.check_gates(float("nan"), min_top1=0)
    common.check_gates(90.0, file_bytes=1_000_000, max_megabytes=1.0)
    with pytest.raises(GateError, match=r"1\.001 MB, more than --max-size 1 MB"):
        common.check_gates(90.0, file_bytes=1_001_000, max_megabytes=1.0)


@pytest.mark.parametrize(
    "arguments, code, part",
    [
        (("model.safetensors", "--data", "data.npz", "--max-drop", "1"), 2, "--against"),
        (("model.safetensors", "--data", "data.npz"), 2, "--arch cli_nets:make"),
        (("nothing.safetensors", "--data", "data.npz"), 2, "nothing.safetensors"),
        (("resnet19", "--data", "data.npz"), 2, "resnet18"),
        (("model.safetensors", "--arch", "cli_nets:make", "--data", "nothing.npz"), 2, "nothing.npz"),
        (("cli_nets.py", "--data", "data.npz"), None, "cli_nets.py"),
        (("weights.pth", "--data", "data.npz", "--input-size", "big"), 2, "--input-size 'big'"),
        (("weights.pth", "--data", "data.npz", "--mean", "a,b"), 2, "--mean 'a,b'"),
        (("weights.pth", "--data", "data.npz", "--device", "tpu"), 2, "auto, cpu, cuda, cuda:N, mps"),
        (("weights.pth", "--data", "data.npz", "--device", "cuda:x"), 2, "unknown device"),
        (("weights.pth", "--data", "data.npz", "--batch-size", "0"), 2, "--batch-size"),
        (("weights.pth",), 2, "--data"),
        (("model.safetensors", "--data", "data.npz", "--against", "resnet18"), 2, ""),
    ],
)
def test_evaluate_refuses_in_one_line(
    run: Callable[..., RUN], arguments: tuple[str, ...], code: int | None, part: str
) -> None:
    result = run("evaluate", *arguments)
    failure(result, result[0] if code is None else code, part)
    assert result[0] in (1, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_exits_4(run: Callable[..., RUN]) -> None:
    failure(run("evaluate", "weights.pth", "--data", "data.npz", "--device", "cuda"), 4, "--device cpu")


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == resolve_device("CUDA") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(MissingPartError, match="cuda:0 to cuda:1"):
        resolve_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    for absent in ("cuda", "cuda:0", "mps"):
        with pytest.raises(MissingPartError, match="--device cpu"):
            resolve_device(absent)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == resolve_device("mps") == torch.device("mps")
    for unknown in ("", "gpu", "cpu:0", "cuda:", "cuda:-1", "mps:0"):
        with pytest.raises(UsageError, match="unknown device"):
            resolve_device(unknown)


@pytest.mark.parametrize(
    "text, size", [("224", (224, 224)), ("3x224x192", (3, 224, 192)), ("96X64", (96, 64)), ("1,28,28", (1, 28, 28))]
)
def test_input_sizes(text: str, size: tuple[int, ...]) -> None:
    assert common.input_overrides(text, None, None, None, None) == {"input_size": size}


def test_input_overrides_leave_out_what_is_not_given() -> None:
    assert common.input_overrides(None, None, None, None, None) == {}
    given = common.input_overrides(None, "0.5", "0.1 0.2 0.3", "bicubic", 0.9)
    assert given == {"mean": (0.5,), "std": (0.1, 0.2, 0.3), "interpolation": "bicubic", "crop_pct": 0.9}


# load


def test_load_decodes_the_very_weights(run: Callable[..., RUN], world: World) -> None:
    loaded = cbpq.load(world.file, arch="cli_nets:make")
    assert not loaded.model.training
    assert loaded.num_classes == 10
    assert (loaded.info.input_spec.height, loaded.info.input_spec.mean) == (8, (0.5, 0.5, 0.5))
    with torch.no_grad():
        assert torch.equal(loaded.model(world.inputs).argmax(1), world.quantized_says)
    with pytest.raises(UsageError, match="--arch cli_nets:make"):
        cbpq.load(world.file)


# inspect


@pytest.mark.parametrize("width", [80, 120])
def test_inspect_fits_the_terminal(run: Callable[..., RUN], monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, err = run("inspect", "model.safetensors")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= width
    for part in ("cli_nets:make", "binary", "8×8×3×3", "1 bit per constrained weight", "0.0 %", "█", "in FP32"):
        assert part in out
    assert ("codes in %" in out) == (width == 120)


def test_inspect_json(run: Callable[..., RUN], world: World) -> None:
    code, out, _ = run("inspect", "model.safetensors", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["layers"][0]["name"] == "2.weight"
    assert sum(document["layers"][0]["counts"]) == 8 * 8 * 3 * 3
    assert document["sizes"]["file_bytes"] == world.file.stat().st_size


def test_inspect_refuses_other_files(run: Callable[..., RUN], tmp_path: Path) -> None:
    failure(run("inspect", "no such file"), 2, "no such file")
    failure(run("inspect", tmp_path), 1, "folder")
    failure(run("inspect", "weights.pth"), 1, "weights.pth")
    (tmp_path / "cut.safetensors").write_bytes(Path("model.safetensors").read_bytes()[:-1])
    failure(run("inspect", tmp_path / "cut.safetensors"), 1, "cut.safetensors")


def test_a_file_with_many_levels(run: Callable[..., RUN], tmp_path: Path) -> None:
    levels = tuple(range(-50, 50))
    tensor = ConstrainedTensor(np.zeros((2, 3), np.int32), np.ones((), np.float32), levels, 1, "levels")
    write(tmp_path / "many", CbpqFile({"w": tensor}, {}, {}, {}, {}))
    code, out, _ = run("inspect", tmp_path / "many")
    assert code == 0
    assert "1 of 100 levels" in out
    write(tmp_path / "none", CbpqFile({}, {"w": np.ones(3, np.float32)}, {}, {}, {}))
    assert run("inspect", tmp_path / "none")[0] == 0


# export


def test_export_a_state_dict(run: Callable[..., RUN], world: World, tmp_path: Path) -> None:
    out = tmp_path / "plain.pth"
    code, printed, err = run("export", world.file, "-o", out)
    assert code == 0, err
    assert "state-dict" in printed
    network = built()
    network.load_state_dict(torch.load(out, weights_only=True), strict=True)
    with torch.no_grad():
        assert torch.equal(network.eval()(world.inputs).argmax(1), world.quantized_says)
    failure(run("export", world.file, "-o", out), 2, "exists")
    code, printed, _ = run("export", world.file, "-o", out, "--overwrite", "--json", "--format", "state-dict")
    assert code == 0
    assert json.loads(printed)["size"] == out.stat().st_size


def test_export_onnx_of_a_network_of_ones_own(run: Callable[..., RUN], world: World, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    failure(run("export", world.file, "-o", tmp_path / "net.onnx"), 2, "--arch cli_nets:make")
    code, printed, err = run("export", world.file, "-o", tmp_path / "net.onnx", "--arch", "cli_nets:make")
    assert code == 0, err
    assert "onnx" in printed
    assert (tmp_path / "net.onnx").stat().st_size > 0


@pytest.mark.parametrize(
    "arguments, part",
    [
        (("-o", "x.tar"), "--format"),
        (("-o", "x"), "--format"),
        (("-o", "x.pth", "--format", "onnxx"), "onnx"),
        (("-o", "x.pth", "--format", "onnx"), "x.pth"),
        (("-o", "x.pth", "--opset", "21"), "opset"),
        (("-o", "x.pth", "--arch", "cli_nets:make"), "--arch"),
        (("-o", "nowhere/x.pth"), "nowhere"),
        ((), "--output"),
    ],
)
def test_export_refuses_in_one_line(
    run: Callable[..., RUN], world: World, arguments: tuple[str, ...], part: str
) -> None:
    before = sorted(world.folder.rglob("*"))
    failure(run("export", "model.safetensors", *arguments), 2, part)
    assert [path for path in sorted(world.folder.rglob("*")) if "__pycache__" not in path.parts] == [
        path for path in before if "__pycache__" not in path.parts
    ]


def test_a_missing_extra_exits_4(run: Callable[..., RUN], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)  # what Python does for a package that cannot be imported
    result = run("export", "model.safetensors", "-o", "x.onnx", "--arch", "cli_nets:make")
    failure(result, 4, 'pip install "cbpq[onnx]"')


# models


def test_models(run: Callable[..., RUN]) -> None:
    code, out, _ = run("models", "resnet18")
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [["resnet18", "torchvision"], ["timm:resnet18", "timm"]]
    code, out, _ = run("models", "timm:resnet5?", "--json")
    found = json.loads(out)
    assert {"name": "timm:resnet50", "library": "timm"} in found
    assert {entry["library"] for entry in found} == {"timm"}
    failure(run("models", "resnett18"), 2, "'resnet18'")


# doctor


def test_doctor(run: Callable[..., RUN]) -> None:
    code, out, _ = run("doctor")
    assert code == 0
    assert "torch with torchvision" in out
    assert max(map(len, out.splitlines())) <= 80
    document = json.loads(run("doctor", "--json")[1])
    assert document["ok"] is True
    parts = {check["part"]: check for check in document["checks"]}
    assert parts["torch"]["found"] == torch.__version__.split("+")[0]
    assert parts["file format"]["ok"] is True
    assert "thread" in parts["devices"]["found"]


def test_doctor_reports_what_is_broken(run: Callable[..., RUN], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor, "_import_pair", broken)
    code, out, err = run("doctor", "--json")
    assert code == 4
    checks = json.loads(out)["checks"]
    assert len({check["part"] for check in checks}) == len(checks)
    check = next(check for check in checks if check["ok"] is False)
    assert "nms does not exist" in check["found"]
    assert "pip install torch torchvision" in check["advice"]
    assert err == "error: not in order: torch with torchvision\n"


def test_a_missing_extra_is_no_failure(run: Callable[..., RUN], monkeypatch: pytest.MonkeyPatch) -> None:
    known = doctor._version_of
    monkeypatch.setattr(doctor, "_version_of", lambda package: None if package == "onnxruntime" else known(package))
    code, out, _ = run("doctor")
    assert code == 0
    assert 'pip install "cbpq[onnx]"' in " ".join(out.split())
    monkeypatch.setattr(doctor, "_version_of", lambda package: None if package == "timm" else known(package))
    assert run("doctor")[0] == 4


# what all commands share


@pytest.mark.parametrize(
    "error, code, parts",
    [
        (DataError("no images in x; give another folder"), 1, ("no images in x; give another folder",)),
        (UsageError("u"), 2, ("u",)),
        (GateError("g"), 3, ("g",)),
        (MissingPartError("m"), 4, ("m",)),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/x"), 1, ("out/x", "No space left", "free some space")),
        (OSError(errno.EACCES, os.strerror(errno.EACCES), "out"), 1, ("out", "ermission denied")),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), 1, ("ead-only file system",)),
        (MemoryError(), 1, ("out of memory", "--batch-size")),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB."), 1, ("out of memory", "--batch-size")),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            1,
            ("out of memory", "--batch-size"),
        ),
        (ValueError("odd"), 1, ("bug in cbpq", "ValueError: odd", "CBPQ_DEBUG=1")),
        (RuntimeError("odd"), 1, ("bug in cbpq", "RuntimeError: odd")),
    ],
)
def test_every_exception_has_its_line_and_code(error: Exception, code: int, parts: tuple[str, ...]) -> None:
    text, found = explain(error)
    assert found == code
    for part in parts:
        assert part in text


def test_a_bug_is_one_line_unless_debugging(run: Callable[..., RUN], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> None:
        raise ValueError("two\nlines \x1b[31m")

    monkeypatch.setattr("cbpq.inspection.inspect_file", broken)
    line = failure(run("inspect", "model.safetensors"), 1, "bug in cbpq: ValueError: two lines")
    assert "\x1b" not in line
    monkeypatch.setenv("CBPQ_DEBUG", "1")
    code, _, err = run("inspect", "model.safetensors")
    assert code == 1
    assert "Traceback" in err


def test_a_message_that_is_far_too_long_keeps_its_ends(
    run: Callable[..., RUN], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise CbpqError(f"no such network: {'x' * 5000}; install a version that has it")

    monkeypatch.setattr("cbpq.inspection.inspect_file", refuse)
    line = failure(run("inspect", "model.safetensors"), 1, "no such network: xxx", "x … x", "a version that has it")
    assert len(line) < 1600


def test_an_interruption_exits_130(run: Callable[..., RUN], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cbpq.inspection.inspect_file", interrupted)
    code, out, err = run("inspect", "model.safetensors")
    assert (code, out, err.strip()) == (130, "", "interrupted")


@pytest.mark.parametrize(
    "arguments, part",
    [
        (("evalute",), "'evaluate'"),
        (("inspect", "--jsno", "x"), "--jsno"),
        (("inspect",), "Missing argument"),
        (("inspect", "a", "b"), "cbpq inspect --help"),
    ],
)
def test_usage_errors_are_one_line(run: Callable[..., RUN], arguments: tuple[str, ...], part: str) -> None:
    failure(run(*arguments), 2, part)


def test_help_and_version(run: Callable[..., RUN]) -> None:
    code, out, err = run("--version")
    assert (code, out, err) == (0, f"cbpq {cbpq.__version__}\n", "")
    bare = run()
    assert bare == run("--help") == run("-h")
    assert bare[0] == 0
    for command in ("evaluate", "export", "inspect", "models", "doctor"):
        assert command in bare[1]
        code, out, _ = run(command, "-h")
        assert code == 0
        assert f"cbpq {command}" in out
        assert "Examples" in out


def launch(world: World, *arguments: str, **variables: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "cbpq", *arguments],
        cwd=world.folder,
        env={**os.environ, "PYTHONPATH": str(Path(cbpq.__file__).parents[1]), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_python_m_cbpq(world: World) -> None:
    with launch(world, "inspect", "model.safetensors", "--json") as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert json.loads(out)["layers"]
    with launch(world, "inspect", "nothing") as process:
        assert process.communicate(timeout=60)[0] == ""
    assert process.returncode == 2


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_reader_that_stops_reading_is_no_error(world: World, flags: tuple[str, ...]) -> None:
    with launch(world, "inspect", "model.safetensors", *flags) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
    assert err == ""


def test_shell_completion_knows_the_commands(world: World) -> None:
    asked = {"_CBPQ_COMPLETE": "complete_bash", "COMP_WORDS": "cbpq ev", "COMP_CWORD": "1"}
    with launch(world, **asked) as process:
        out, _ = process.communicate(timeout=60)
    assert "evaluate" in out
