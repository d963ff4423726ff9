"""Bad input to the main job: one clear line, the documented exit code, and nothing half-written."""

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_job import (
    ALL_FOUR,
    ARGUMENTS,
    RESULTS,
    SPEC,
    Outcome,
    command,
    contents,
    one_line,
    refused,
    write_arrays,
    write_folder,
    write_network,
)

from cbpq import training


class Code:
    """What a pickle may hold: a call that leaves a trace when the pickle is loaded in full."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("the-code-ran",)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of what people give by mistake, beside good files and a finished run."""
    root = tmp_path_factory.mktemp("pristine")
    network = write_network(root / "net.safetensors")
    data = write_arrays(root / "data.npz")
    (root / "folder").mkdir()

    state = load_file(network)
    metadata = {"architecture": "timm:test_resnet", "arguments": json.dumps(ARGUMENTS), "input_spec": json.dumps(SPEC)}
    torch.save(state, root / "good.pth")
    (root / "empty.pth").write_bytes(b"")
    (root / "empty.safetensors").write_bytes(b"")
    (root / "text.pth").write_text("these are no weights\n")
    (root / "page.pth").write_text("<!doctype html><title>404</title>")
    (root / "cut.safetensors").write_bytes(network.read_bytes()[:-100])
    (root / "cut-header.safetensors").write_bytes(network.read_bytes()[:100])
    (root / "cut.pth").write_bytes((root / "good.pth").read_bytes()[:5000])
    torch.save({"state_dict": state, "extra": Code()}, root / "code.pth", _use_new_zipfile_serialization=False)
    (root / "code-alone.pth").write_bytes(pickle.dumps(Code()))
    torch.save({"state_dict": state, "extra": Code()}, root / "code-in-zip.pth")
    save_file(state, root / "resnet18.safetensors")  # a name that is not true
    save_file({name: state[name] for name in state if name != "conv1.0.weight"}, root / "missing.safetensors", metadata)
    for name, value in (("nan", float("nan")), ("infinite", float("inf"))):
        damaged = {**state, "conv1.3.weight": state["conv1.3.weight"].clone()}
        damaged["conv1.3.weight"][0, 0, 0, 0] = value
        save_file(damaged, root / f"{name}.safetensors", metadata)

    with np.load(data) as arrays:
        good = dict(arrays)
    np.savez(root / "label.npz", **{**good, "train_labels": good["train_labels"] + np.uint8(1)})
    np.savez(root / "negative.npz", **{**good, "val_labels": good["val_labels"].astype(int) - 1})
    np.savez(root / "one-class.npz", **{**good, "train_labels": good["train_labels"] * 0})
    colour = {name: array[..., None].repeat(3, -1) if "images" in name else array for name, array in good.items()}
    np.savez(root / "colour.npz", **colour)
    np.savez(root / "only-val.npz", **{name: array for name, array in good.items() if "val" in name})
    np.savez(root / "no-labels.npz", train_images=good["train_images"], val_images=good["val_images"])
    np.savez(root / "labels.npz", train_labels=good["train_labels"])
    np.savez(root / "objects.npz", train_images=np.array([Code()], dtype=object), train_labels=np.zeros(1, int))
    (root / "cut.npz").write_bytes(data.read_bytes()[:500])
    (root / "data.txt").write_text("no data")

    write_folder(root / "pictures", train=24, val=12)
    (root / "nothing" / "train").mkdir(parents=True)
    (root / "no-pictures" / "train" / "class0").mkdir(parents=True)
    (root / "no-pictures" / "train" / "class1").mkdir(parents=True)
    shutil.copytree(root / "pictures" / "train" / "class0", root / "one-class" / "train" / "only")
    shutil.copytree(root / "pictures" / "train" / "class0", root / "two-classes" / "a")
    shutil.copytree(root / "pictures" / "train" / "class1", root / "two-classes" / "b")
    shutil.copytree(root / "pictures", root / "unreadable")
    (root / "unreadable" / "val" / "class2" / "002.png").write_bytes(b"no picture")
    shutil.copytree(root / "pictures", root / "coloured")
    Image.new("RGB", (8, 8)).save(root / "coloured" / "val" / "class2" / "002.png")
    shutil.copytree(root / "pictures" / "train" / "class0", root / "flat")
    shutil.copytree(root / "two-classes", root / "mixed")
    (root / "mixed" / "a").rename(root / "mixed" / "other")
    Image.new("L", (8, 8)).save(root / "mixed" / "a.png")
    (root / "flat-coloured").mkdir()
    Image.new("RGB", (8, 8)).save(root / "flat-coloured" / "a.png")
    (root / "too-many.txt").write_text("".join(f"class{number}\n" for number in range(9)))

    (root / "unknown-key.toml").write_text("epochs = 1\nleraning_rate = 0.1\n")
    (root / "broken.toml").write_text("epochs = = 1\n")
    (root / "wrong-type.toml").write_text('epochs = "many"\n')
    (root / "infinite.toml").write_text("epochs = inf\n")
    (root / "wrong-list.toml").write_text("include = [1]\n")
    (root / "binary.toml").write_bytes(b"\xff\xfe\x00")

    outcome = command(
        *("quantize", network, "--data", data, "--epochs", "0", "-b", "16", "--device", "cpu", "-o", root / "result")
    )
    assert outcome.code == 0, outcome.err
    assert set(contents(root / "result")) == RESULTS
    return root


@pytest.fixture
def world(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """That folder as the current one, and a check that nothing in it was touched."""
    monkeypatch.chdir(pristine)
    before = contents(pristine)
    yield pristine
    after = contents(pristine)
    for name in after.keys() - before.keys():  # so that one failure does not bring about the next
        shutil.rmtree(name, ignore_errors=True)
    assert after == before


@dataclass(frozen=True)
class Case:
    """``cbpq quantize`` with all as it should be but for what is named here."""

    code: int
    says: tuple[str, ...]
    source: str = "net.safetensors"
    data: str | None = "data.npz"
    flags: tuple[str, ...] = ()
    output: str | None = "out"

    def run(self) -> Outcome:
        data = () if self.data is None else ("--data", self.data)
        output = () if self.output is None else ("-o", self.output)
        device = () if "--device" in self.flags else ("--device", "cpu")
        return command("quantize", self.source, *data, "-b", "16", *device, *output, *self.flags)


CASES = {
    # the network
    "no such file": Case(2, ("no such file", "nett.safetensors", "'net.safetensors'"), source="nett.safetensors"),
    "no such folder": Case(2, ("no such file",), source="nowhere/net.pth"),
    "a directory": Case(2, ("is a directory",), source="./folder"),
    "an empty source": Case(2, ("unknown network",), source=""),
    "an empty file": Case(1, ("empty.pth is empty",), source="empty.pth"),
    "an empty safetensors file": Case(1, ("empty.safetensors is empty",), source="empty.safetensors"),
    "a text file": Case(1, ("text file",), source="text.pth"),
    "a web page": Case(1, ("web page",), source="page.pth"),
    "a truncated safetensors file": Case(1, ("cut.safetensors",), source="cut.safetensors"),
    "a truncated header": Case(1, ("cut-header.safetensors",), source="cut-header.safetensors"),
    "a truncated zip": Case(1, ("cut.pth", "damaged or cut short"), source="cut.pth"),
    "a pickle with code in it": Case(1, ("code.pth", "could run code"), source="code.pth"),
    "nothing but code": Case(1, ("code-alone.pth", "not from torch.save"), source="code-alone.pth"),
    "code in a zip": Case(1, ("code-in-zip.pth", "could run code"), source="code-in-zip.pth"),
    "weights of another architecture": Case(1, ("resnet18.safetensors", "missing"), source="resnet18.safetensors"),
    "weights that are not all there": Case(1, ("1 missing: conv1.0.weight",), source="missing.safetensors"),
    "another architecture asked for": Case(
        1, ("good.pth", "do not fit"), source="good.pth", flags=("--arch", "squeezenet1_1")
    ),
    "an architecture nobody told": Case(2, ("--arch",), source="good.pth"),
    "an unknown architecture": Case(
        2, ("unknown network 'resnet81'", "'resnet18'"), source="good.pth", flags=("--arch", "resnet81")
    ),
    "an unknown network": Case(2, ("unknown network 'resnet81'", "'resnet18'"), source="resnet81"),
    "an unknown timm network": Case(2, ("unknown network",), source="timm:resnet1818"),
    "an unknown tag": Case(2, ("a1_in1k",), source="timm:resnet18.a1_in2k", flags=("--pretrained",)),
    "a name without weights": Case(2, ("--weights", "--pretrained"), source="resnet18"),
    "no such weights": Case(
        2, ("no such file: nett.safetensors",), source="resnet18", flags=("--weights", "nett.safetensors")
    ),
    "no such module": Case(2, ("cannot import 'nets'",), source="nets:make", flags=("--weights", "good.pth")),
    "a value that is not a number": Case(1, ("nan.safetensors", "'conv1.3.weight'"), source="nan.safetensors"),
    "an infinite value": Case(1, ("infinite.safetensors", "not finite"), source="infinite.safetensors"),
    "pretrained, but a file": Case(2, ("--pretrained",), flags=("--pretrained",)),
    "weights for a file": Case(2, ("leave out --weights",), flags=("--weights", "good.pth")),
    "arch for a name": Case(2, ("--arch is for files",), source="resnet18", flags=("--arch", "resnet18")),
    "an input size that is none": Case(2, ("--input-size 'large'",), flags=("--input-size", "large")),
    "an input size of nothing": Case(2, ("input height 0",), flags=("--input-size", "0")),
    "a mean that is none": Case(2, ("--mean 'a'",), flags=("--mean", "a")),
    "a mean for three channels": Case(2, ("3 values for 1 channel",), flags=("--mean", "0.1,0.2,0.3")),
    "a deviation of nothing": Case(2, ("std",), flags=("--std", "0")),
    "an unknown interpolation": Case(2, ("'bicubic'",), flags=("--interpolation", "bicubik")),
    # what is to be done
    "an unknown constraint": Case(2, ("unknown constraint 'ternery'", "'ternary'"), flags=("-c", "ternery")),
    "a shift that is none": Case(2, ("shift:K",), flags=("-c", "shift:0")),
    "levels that are none": Case(2, ("levels:a,b",), flags=("-c", "levels:a,b")),
    "one level": Case(2, ("levels:1",), flags=("-c", "levels:1")),
    "an unknown method": Case(2, ("'cpb'", "'cbp'"), flags=("--method", "cpb")),
    "an unknown preset": Case(2, ("unknown preset 'papper'", "'paper'"), flags=("--preset", "papper")),
    "an unknown setting": Case(2, ("unknown setting 'epoch'", "'epochs'"), flags=("--set", "epoch=1")),
    "no setting at all": Case(2, ("key=value",), flags=("--set", "epochs")),
    "a value that does not fit": Case(2, ("setting epochs", "no whole number"), flags=("--set", "epochs=x")),
    "a choice that is none": Case(2, ("sgd, adamw",), flags=("--set", "optimizer=adam")),
    "negative epochs": Case(2, ("setting epochs: -1", "at least 0"), flags=("--epochs", "-1")),
    "no epochs at all": Case(2, ("--epochs",), flags=("--epochs", "ten")),
    "an empty batch": Case(2, ("batch_size",), flags=("-b", "0")),
    "a learning rate that is no number": Case(2, ("setting lr",), flags=("--lr", "nan")),
    "a seed that is too large": Case(2, ("setting seed",), flags=("--seed", "9" * 30)),
    "a negative seed": Case(2, ("setting seed",), flags=("--seed", "-1")),
    "no time": Case(2, ("time limit",), flags=("--max-time", "0")),
    "a glob that matches nothing": Case(2, ("--include 'lyer1*'", "'layer"), flags=("--include", "lyer1*")),
    "nothing left to constrain": Case(2, ("no weight is left to constrain",), flags=("--exclude", "*")),
    "an unknown flag": Case(2, ("--epoch",), flags=("--epoch", "1")),
    "resume and overwrite": Case(2, ("contradict",), flags=("--resume", "--overwrite")),
    "two numbers of epochs": Case(2, ("contradict",), flags=("--epochs", "3", "--set", "epochs=4")),
    "two values of a setting": Case(2, ("contradict",), flags=("--set", "clamp=1", "--set", "clamp=2")),
    "a configuration with an unknown key": Case(
        2, ("unknown-key.toml", "'leraning_rate'"), flags=("--config", "unknown-key.toml")
    ),
    "a configuration that is no TOML": Case(2, ("broken.toml", "no valid TOML"), flags=("--config", "broken.toml")),
    "a configuration of other bytes": Case(2, ("binary.toml", "no valid TOML"), flags=("--config", "binary.toml")),
    "a configuration with a wrong type": Case(2, ("setting epochs",), flags=("--config", "wrong-type.toml")),
    "a configuration with infinity": Case(2, ("setting epochs",), flags=("--config", "infinite.toml")),
    "a configuration with a wrong list": Case(2, ("include",), flags=("--config", "wrong-list.toml")),
    "no such configuration": Case(2, ("cannot read", "none.toml"), flags=("--config", "none.toml")),
    "a configuration that is a folder": Case(2, ("cannot read",), flags=("--config", "folder")),
    "an unknown device": Case(2, ("unknown device 'tpu'", "cpu, cuda"), flags=("--device", "tpu")),
    "an absent device": Case(4, ("cuda",), flags=("--device", "cuda:77")),
    "an unknown augmentation": Case(2, ("unknown augmentation 'flip'",), flags=("--augment", "flip")),
    "workers that are none": Case(2, ("--workers",), flags=("-j", "-1")),
    "a gate that is none": Case(2, ("--min-top1",), flags=("--min-top1", "120")),
    # the data
    "no data for a limit": Case(2, ("--limit-train", "--data PATH"), data=None, flags=("--limit-train", "5")),
    "no such data": Case(2, ("no such data: dat.npz",), data="dat.npz"),
    "data of another kind": Case(2, ("data.txt", "no .npz"), data="data.txt"),
    "an empty folder": Case(1, ("folder has no class folders",), data="folder"),
    "an empty train folder": Case(1, ("nothing has no pictures in it", ".jpg"), data="nothing"),
    "class folders without pictures": Case(1, ("no-pictures has 2 class folders", "6 classes"), data="no-pictures"),
    "one class folder only": Case(1, ("one class only",), data="one-class"),
    "fewer class folders than classes": Case(1, ("2 class folders", "6 classes", "--class-map"), data="two-classes"),
    "one class in the labels": Case(1, ("all pictures have label 0",), data="one-class.npz"),
    "a label out of range": Case(1, ("label 6", "6 classes"), data="label.npz"),
    "a negative label": Case(1, ("label -1", "6 classes"), data="negative.npz"),
    "colour for a grey network": Case(1, ("3 channels", "takes 1"), data="colour.npz"),
    "no training pictures": Case(1, ("no training pictures",), data="only-val.npz"),
    "labels without pictures": Case(1, ("labels.npz holds train_labels", "expected"), data="labels.npz"),
    "no labels for a loss that needs them": Case(
        2, ("no labels", "distillation = 0.5"), data="no-labels.npz", flags=("--set", "distillation=0.5")
    ),
    "no labels for the published recipe": Case(
        2, ("no labels", "distillation = 0"), data="no-labels.npz", flags=("--preset", "paper")
    ),
    "no labels for a top-1": Case(2, ("--min-agreement",), data="no-labels.npz", flags=("--min-top1", "90")),
    "no labels for a drop": Case(2, ("--min-agreement",), data="no-labels.npz", flags=("--max-drop", "1")),
    "pictures beside class folders": Case(1, ("mixed has pictures directly in it (a.png)", "(b)"), data="mixed"),
    "a class map without classes": Case(2, ("class map",), data="flat", flags=("--class-map", "too-many.txt")),
    "no pictures to calibrate with": Case(2, ("--calibration",), data="flat", flags=("--calibration", "0")),
    "an agreement that is none": Case(2, ("--min-agreement",), flags=("--min-agreement", "101")),
    "pickled arrays": Case(1, ("Python objects",), data="objects.npz"),
    "a truncated .npz": Case(1, ("cut.npz",), data="cut.npz"),
    "no such class map": Case(2, ("no such class map",), data="pictures", flags=("--class-map", "none.txt")),
    "a class map that is too long": Case(1, ("label 8",), data="pictures", flags=("--class-map", "too-many.txt")),
    "a class map without folders": Case(2, ("class map",), flags=("--class-map", "too-many.txt")),
    "too little training data": Case(2, ("--limit-train",), flags=("--limit-train", "0")),
    "more than all held out": Case(2, ("hold",), flags=("--val-from-train", "1.5")),
    # the output
    "an output that exists": Case(2, ("already holds", "--overwrite"), output="result"),
    "a finished run": Case(2, ("is finished",), output="result", flags=("--resume",)),
    "an output that is a file": Case(2, ("data.txt is a file",), output="data.txt"),
    "an output below a file": Case(1, ("cannot write", "Not a directory"), output="data.txt/out"),
    "an output nobody can write": Case(1, ("cannot write /proc/out",), output="/proc/out"),
    "an output with too long a name": Case(2, ("too long",), output="x" * 300),
    "a name that says nothing of the output": Case(
        2, ("no such file",), source="nett.safetensors", output=None, flags=("-c", "binary")
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(world: Path, name: str) -> None:
    case = CASES[name]
    one_line(case.run(), case.code, *case.says)


@pytest.mark.parametrize("name", ["no such file", "a truncated zip", "an unknown constraint", "a label out of range"])
def test_a_result_to_be_overwritten_stays(world: Path, name: str) -> None:
    case = CASES[name]
    bad = Case(case.code, case.says, case.source, case.data, (*case.flags, "--overwrite"), "result")
    one_line(bad.run(), case.code, *case.says)


@pytest.mark.parametrize(
    "data, part",
    [
        ("unreadable", "val/class2/002.png"),
        ("coloured", "val/class2/002.png has 3 channels"),
        ("flat-coloured", "a.png has 3 channels"),
    ],
)
def test_a_picture_that_cannot_be_used(world: Path, data: str, part: str) -> None:
    for workers in ("0", "2"):
        refused(Case(1, (), data=data, flags=("-j", workers)).run(), 1, part)


def test_a_training_picture_that_cannot_be_read(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(pristine / "net.safetensors", tmp_path)
    shutil.copytree(pristine / "pictures", "pictures")
    bad = tmp_path / "pictures" / "train" / "class3" / "003.png"
    good = bad.read_bytes()
    bad.write_bytes(good[:40])
    case = Case(1, (), data="pictures", flags=("-j", "0", "--epochs", "1"))
    refused(case.run(), 1, "class3/003.png", "--skip-bad-images")
    # mend it, and the run goes on
    bad.write_bytes(good)
    assert command("quantize", "net.safetensors", "--data", "pictures", *_flags(case), "--resume").code == 0
    assert set(contents(tmp_path / "out")) == RESULTS


def _flags(case: Case) -> tuple[str, ...]:
    return ("-b", "16", "--device", "cpu", "-o", "out", *case.flags)


def test_the_code_in_a_pickle_did_not_run(world: Path) -> None:
    """The cases above ran; had anything been executed, this folder would be there."""
    assert not (world / "the-code-ran").exists()
    assert not Path("the-code-ran").exists()
    # it would have been: this is what loading such a file in full does
    with (world / "code-alone.pth").open("rb") as stream:
        pickle.load(stream)
    (world / "the-code-ran").rmdir()


@pytest.mark.parametrize(
    "message",
    [
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 1099511627776 bytes. Error code 12 (Cannot allocate memory)",
        "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 1.00 GiB",
        "",
    ],
)
def test_out_of_memory(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    def loss_of(*arguments: Any) -> torch.Tensor:
        raise RuntimeError(message) if message else MemoryError

    monkeypatch.setattr(training, "loss_of", loss_of)
    refused(Case(1, (), output=str(tmp_path / "out")).run(), 1, "out of memory", "lower --batch-size")
    assert contents(tmp_path / "out", leave_out=["checkpoint"]) == {}


@pytest.mark.parametrize("flags", [("-b", "1"), ("--limit-train", "1")])
def test_batches_too_small_for_batchnorm(world: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    source = write_network(tmp_path / "deep.safetensors", **ALL_FOUR)  # one pixel is left at its end
    case = Case(1, (), source=str(source), output=str(tmp_path / "out"), flags=(*flags, "--rounding", "nearest"))
    refused(case.run(), 1, "batches of 1", "raise --batch-size")


def test_memory_that_really_is_not_there() -> None:
    """The allocator's own words, for a batch nobody has room for."""
    from cbpq.cli import explain

    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    line, code = explain(caught.value)
    assert code == 1
    assert line.startswith("out of memory; lower --batch-size")


def test_an_environment_variable_that_does_not_fit(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CBPQ_EPOCHS", "ten")
    one_line(Case(2, ()).run(), 2, "setting epochs: 'ten' from environment")
    monkeypatch.setenv("CBPQ_EPOCHS", "1")
    monkeypatch.setenv("CBPQ_AMP", "perhaps")
    one_line(Case(2, ()).run(), 2, "amp: 'perhaps' from environment")


def test_a_missing_reader_exits_4(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)  # what Python does for a package that cannot be imported
    one_line(Case(4, (), data="hfds/mnist").run(), 4, "pip install")
