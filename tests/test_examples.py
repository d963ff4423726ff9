"""The examples and the README, followed as a user would."""

import importlib
import json
import math
import re
import runpy
import shlex
import shutil
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from small_job import RESULTS, ROOT, command, contents, write_folder
from torch import nn
from torch.distributed.run import get_args_parser

import cbpq
from cbpq.inputs import InputSpec
from cbpq.layers import choose_layers
from cbpq.levels import level_set
from cbpq.models import load_model
from cbpq.transforms import EvalTransform

EXAMPLES = ROOT / "examples"
DOCUMENTS = (ROOT / "README.md", *sorted(EXAMPLES.rglob("*.md")))


def script(name: str) -> ModuleType:
    """An example as a module, its ``main`` not run; found as from the top of the repository."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        return importlib.import_module(f"examples.{name}")


def commands_in(path: Path) -> list[list[str]]:
    """The ``cbpq`` commands in a document's console blocks and a workflow's steps, as words."""
    text = path.read_text()
    if path.suffix == ".md":
        text = "\n".join(re.findall(r"```console\n(.*?)```", text, re.DOTALL))
    lines = re.sub(r"\s*\n\s+--", " --", text).splitlines()
    found = [part for line in lines for part in line.split("&&") if part.strip().startswith("cbpq ")]
    return [shlex.split(part) for part in found]


# What documents say


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_documents_exist(document: Path) -> None:
    commands = commands_in(document)
    if document.parent in (ROOT, EXAMPLES / "imagenet", EXAMPLES / "ci"):
        assert commands
    for words in commands:
        known = command(words[1], "--help").out
        for word in words[2:]:
            if word.startswith("-"):
                assert re.search(rf"(^|[\s│,]){re.escape(word)}\b", known), f"{document}: {shlex.join(words)}: {word}"


def test_flags_named_in_documents_exist() -> None:
    """Also those in running text."""
    helps = "".join(
        command(name, "--help").out for name in ("quantize", "evaluate", "compare", "inspect", "export", "models")
    )
    helps += script("deploy.table").command_line().format_help()
    known = set(re.findall(r"--[a-z][a-z0-9-]+", helps)) | {"--install-completion", "--strict", "--version"}
    for path in EXAMPLES.rglob("*.py"):
        known |= set(re.findall(r"add_argument\(\s*\"(--[a-z0-9-]+)\"", path.read_text()))
    known |= {flag for action in get_args_parser()._actions for flag in action.option_strings}  # torchrun's
    known |= {"--nodes", "--ntasks-per-node", "--gpus-per-node"}  # Slurm's srun's
    for document in DOCUMENTS:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", document.read_text()))
        assert named <= known, f"{document}: {named - known}"


def test_links_in_documents_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert target.startswith("https://") or (document.parent / target).exists(), f"{document}: {target}"


def test_the_constraints_in_the_readme_are_known() -> None:
    row = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| constraints"))
    names = [name.replace("K", "3") for name in re.findall(r"`([^`]+)`", row)]
    assert {"binary", "ternary", "one-bit-shift", "two-bit-shift", "shift:3"} < set(names)
    for name in names:
        level_set(name)


@pytest.mark.medium
def test_the_commands_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as they stand there; all that differs is a smaller budget."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CBPQ_EPOCHS", "1")
    monkeypatch.setenv("CBPQ_DEVICE", "cpu")
    shutil.copytree(EXAMPLES / "digits", tmp_path / "examples" / "digits")
    ran = []
    for words in commands_in(ROOT / "README.md"):
        if words[2].startswith(("examples/digits", "resnet-two-bit-shift")) and not {"onnx", "torchao"} & {*words}:
            monkeypatch.setattr(sys, "argv", words)
            outcome = command(*words[1:])
            assert outcome.code == 0, outcome.err
            ran.append(words[1])
            if words[1] == "quantize":  # the exact command is in the report
                assert shlex.join(words) in (tmp_path / "resnet-two-bit-shift" / "report.md").read_text()
    assert ran == ["quantize", "inspect", "evaluate", *["export"] * 8]
    plain, original = load_file(EXAMPLES / "digits" / "resnet.safetensors"), torch.load("resnet.pth", weights_only=True)
    assert {name: tensor.shape for name, tensor in plain.items()} == {n: t.shape for n, t in original.items()}


# examples/digits


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    return script("digits.digits")


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    pytest.importorskip("sklearn")
    return script("digits.prepare")


def test_digits_are_what_prepare_writes(prepare: ModuleType, tmp_path: Path) -> None:
    prepare.write_data(tmp_path / "digits.npz")
    with np.load(tmp_path / "digits.npz") as made, np.load(EXAMPLES / "digits" / "digits.npz") as kept:
        assert set(made) == set(kept) == {"train_images", "train_labels", "val_images", "val_labels"}
        for name in made:
            assert made[name].dtype == kept[name].dtype == np.uint8
            assert np.array_equal(made[name], kept[name])


def test_the_network_of_digits_is_as_prepare_says(prepare: ModuleType, digits: ModuleType) -> None:
    path = EXAMPLES / "digits" / "resnet.safetensors"
    loaded = load_model(str(path))
    assert (loaded.info.library, loaded.info.architecture) == ("timm", prepare.RESNET.architecture)
    assert loaded.info.arguments == prepare.RESNET.arguments
    spec = loaded.info.input_spec
    assert (spec.channels, spec.height, spec.width) == (1, 8, 8)
    assert (spec.mean, spec.std) == ((digits.MEAN,), (digits.STD,))
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["architecture"] == f"timm:{prepare.RESNET.architecture}"
    assert sum(file.stat().st_size for file in (EXAMPLES / "digits").iterdir() if file.is_file()) < 2_000_000
    # the same pictures through its script and through the library
    measured = cbpq.evaluate(path, EXAMPLES / "digits" / "digits.npz", device="cpu")
    assert measured.result.top1 is not None
    assert measured.result.top1 > 97
    shown = digits.describe_accuracy(loaded.model, *digits.read(EXAMPLES / "digits" / "digits.npz", "val"))
    assert f" {measured.result.top1:.2f} % " in shown


@pytest.mark.slow
def test_prepare_trains_a_network_as_good(prepare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "HERE", tmp_path)
    prepare.main()
    assert set(contents(tmp_path)) == {"digits.npz", "resnet.safetensors"}
    # another machine may round otherwise, so the weights need not be the same bits
    assert load_file(tmp_path / "resnet.safetensors").keys() == load_file(EXAMPLES / "digits/resnet.safetensors").keys()
    top1 = cbpq.evaluate(tmp_path / "resnet.safetensors", tmp_path / "digits.npz", device="cpu").result.top1
    assert top1 is not None
    assert top1 > 96


@pytest.mark.medium
def test_the_small_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("digits.small_networks")
    monkeypatch.setattr(sys, "argv", ["small_networks.py", "-o", str(tmp_path / "networks"), "--epochs", "1"])
    module.main()
    assert set(contents(tmp_path / "networks")) == {f"{name}.safetensors" for name in module.RECIPES}
    constrained = {}
    for name, recipe in module.RECIPES.items():
        loaded = load_model(str(tmp_path / "networks" / f"{name}.safetensors"))
        assert (loaded.info.architecture, loaded.info.arguments) == (recipe.architecture, recipe.arguments)
        assert loaded.num_classes == 10
        layers = choose_layers(loaded.model, input_spec=loaded.info.input_spec)
        constrained[name] = {name: loaded.model.get_parameter(name).shape for name in layers.constrained}
    assert [shape[0] for shape in constrained["depthwise"].values() if shape[1:] == (1, 3, 3)] == [64, 96, 96, 128]
    for part in ("qkv", "proj"):
        assert {f"blocks.{block}.attn.{part}.weight" for block in range(3)} <= constrained["transformer"].keys()


def test_an_original_to_tune_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, generator = script("cifar10.original"), np.random.default_rng(0)
    images = generator.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    labels = generator.integers(0, 10, (60, 1))
    np.savez(tmp_path / "all.npz", train_images=images, train_labels=labels)
    monkeypatch.setattr(module, "TRAIN", 48)
    arguments = ["original.py", "--data", str(tmp_path / "all.npz"), "--epochs", "1", "-o", str(tmp_path / "tuning")]
    monkeypatch.setattr(sys, "argv", arguments)
    module.main()
    assert set(contents(tmp_path / "tuning")) == {"cifar10.npz", "resnet20.safetensors"}
    with np.load(tmp_path / "tuning" / "cifar10.npz") as split:
        assert np.array_equal(np.concatenate([split["train_images"], split["val_images"]]), images)
        assert np.array_equal(np.concatenate([split["train_labels"], split["val_labels"]]), labels)
        assert len(split["val_images"]) == 12
    network = script("cifar10.resnet").resnet20()
    before = network.state_dict()["layer1.0.conv1.weight"].clone()
    network.load_state_dict(load_file(tmp_path / "tuning" / "resnet20.safetensors"), strict=True)
    assert not torch.equal(network.state_dict()["layer1.0.conv1.weight"], before)


def test_an_original_that_was_interrupted_ends_where_one_that_was_not_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("cifar10.original")
    images = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "all.npz", train_images=images, train_labels=np.arange(60)[:, None] % 10)
    monkeypatch.setattr(module, "TRAIN", 48)
    answers, calls = module.answers, 0

    def interrupted(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:  # an epoch is one batch to train on and one to measure on
            raise KeyboardInterrupt
        return answers(*given)

    def trained(name: str, *flags: str) -> dict[str, torch.Tensor]:
        folder = tmp_path / name
        arguments = ["original.py", "--data", str(tmp_path / "all.npz"), "--epochs", "2", "-o", str(folder), *flags]
        monkeypatch.setattr(sys, "argv", arguments)
        module.main()
        assert set(contents(folder)) == {"cifar10.npz", "resnet20.safetensors"}
        return load_file(folder / "resnet20.safetensors")

    whole = trained("whole")
    monkeypatch.setattr(module, "answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained("halves")
    assert "training.pt" in contents(tmp_path / "halves")
    with pytest.raises(SystemExit, match="of another --epochs or --lr"):
        trained("halves", "--lr", "0.1")
    halves = trained("halves")
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    further = trained("further", "--weights", str(tmp_path / "whole" / "resnet20.safetensors"), "--lr", "1e-9")
    torch.testing.assert_close(further["layer1.0.conv1.weight"], whole["layer1.0.conv1.weight"])


def test_trials_stand_in_the_table_as_they_were_measured() -> None:
    folder = EXAMPLES / "cifar10"
    text = (folder / "TRIALS.md").read_text()
    for run in json.loads((folder / "results" / "tuning-trials.json").read_text())["runs"]:
        held_out = run["held_out"]
        row = f"| {held_out['top1']:.2f} % | {held_out['agreement']:.2f} % | {held_out['cross_entropy']:.3f} |"
        row += f" {run['kl']['held_out']:.4f} | {run['kl']['seen']:.4f} |"
        assert row in text, run["what"]
    for run in json.loads((folder / "results" / "memorised-trials.json").read_text())["runs"]:
        title = f"| `{run['constraint']}` | {run['what']}" + (r" \*" if run["by_hand"] else "")
        held_out = run["held_out"]
        row = f"{title} | {held_out['agreement']:.2f} % | {held_out['cross_entropy']:.4f} | "
        assert f"{row}{run['loss_of_last_steps']:.4f} |" in text
    for run in json.loads((folder / "results" / "holding-trials.json").read_text())["runs"]:
        title = f"| {run['epochs']} | {run['what']}" + (r" \*" if run["by_hand"] else "")
        held_out, kl = run["held_out"], run["kl"]
        row = f"{title} | {held_out['agreement']:.2f} % | {held_out['cross_entropy']:.4f} | "
        assert f"{row}{run['loss_of_last_steps']:.4f} | {kl['held_out']:.3f} | {kl['seen']:.3f} |" in text
    for name in ("soft-window", "variety", "labels", "rivals"):
        for run in json.loads((folder / "results" / f"{name}-trials.json").read_text())["runs"]:
            title = f"| {run['epochs']} | {run['what']}" + (r" \*" if run["by_hand"] else "")
            held_out, kl = run["held_out"], run["kl"]
            row = f"{title} | {held_out['agreement']:.2f} % | {held_out['cross_entropy']:.4f} | "
            row += f"{kl['held_out']:.4f} | {kl['seen']:.4f} |"
            assert (f"{row} {held_out['top1']:.2f} % |" if name == "labels" else row) in text
    names = ("fading-ten-epochs-bfloat16-cbp", "former-ten-epochs-bfloat16-cbp", "hard-ten-epochs-cbp-binary")
    for name in (*names, "former-ten-epochs-bfloat16-straight-through", "linear-ten-epochs-cbp-binary"):
        (run,) = json.loads((folder / "results" / f"{name}.json").read_text())["runs"]
        assert f"| 1 | {run['score']:.2f} % | {run['agreement']:.2f} % |" in text


def test_the_small_networks_depend_on_the_seed_alone(digits: ModuleType) -> None:
    recipe = script("digits.small_networks").RECIPES["transformer"]
    images, labels = digits.read(EXAMPLES / "digits" / "digits.npz", "train", recipe.side)
    one, same, other = (
        digits.train(replace(recipe, epochs=1), images[:130], labels[:130], seed=seed).state_dict()
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])


def test_pictures_of_another_size_are_those_that_cbpq_feeds(digits: ModuleType) -> None:
    path = EXAMPLES / "digits" / "digits.npz"
    images, _ = digits.read(path, "val", 12)
    transform = EvalTransform(InputSpec(1, 12, 12, (digits.MEAN,), (digits.STD,)))
    with np.load(path) as arrays:
        fed = torch.cat([transform(Image.fromarray(image)) for image in arrays["val_images"]])
    assert torch.equal(images, fed)


# examples/plain_loop.py


def test_the_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plain_loop.py", "--epochs", "1", "--constraint", "ternary"])
    runpy.run_path(str(EXAMPLES / "plain_loop.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    accuracies = [float(line.split(": ")[1].split(" %")[0]) for line in lines[:2]]
    assert accuracies[0] > 97
    assert accuracies[1] > 85
    assert lines[-1].startswith("wrote digits-plain-loop.safetensors")
    assert set(contents(tmp_path)) == {"digits-plain-loop.safetensors"}
    inspected = cbpq.inspect(tmp_path / "digits-plain-loop.safetensors")
    assert {layer.constraint for layer in inspected.layers} == {"ternary"}
    assert len(inspected.layers) == 15


def test_the_loop_in_the_readme() -> None:
    """The snippet runs as it is, given the names that it takes for granted."""
    text = (ROOT / "README.md").read_text()
    snippet = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "constrain(" in block)
    assert "cbpq.save(" in snippet
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    scope = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "criterion": torch.nn.CrossEntropyLoss(),
        "loader": [(torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 0, 1]))],
    }
    saved: list[Any] = []
    exec(snippet.replace("cbpq.save(", "saved.append(").replace('"model.safetensors", ', ""), scope | {"saved": saved})
    weight = saved[0].model[2].weight.detach()
    assert all(len(channel.unique()) <= 7 for channel in weight)


# examples/serve.py


def serve(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the script; its exit code."""
    monkeypatch.setattr(sys, "argv", ["serve.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / "serve.py"), run_name="__main__")
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the digits network, its weights rounded, and a picture of a digit."""
    folder = tmp_path_factory.mktemp("served")
    source, data = EXAMPLES / "digits" / "resnet.safetensors", EXAMPLES / "digits" / "digits.npz"
    flags = ("--epochs", 0, "--rounding", "nearest", "--device", "cpu", "--pack", "dense")
    outcome = command("quantize", source, "--data", data, *flags, "-o", folder / "out")
    assert outcome.code == 0, outcome.err
    with np.load(data) as arrays:
        Image.fromarray(arrays["val_images"][0]).save(folder / "digit.png")
        Image.fromarray(arrays["val_images"][0]).convert("RGB").save(folder / "colours.png")
    return folder


def test_serving(served: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = served / "out" / "model.safetensors"
    loaded = cbpq.load(model)
    digits_module = script("digits.digits")
    images, _ = digits_module.read(EXAMPLES / "digits" / "digits.npz", "val")
    spec = loaded.info.input_spec
    fed = (images[:1, None].float() / 255 - spec.mean[0]) / spec.std[0]
    assert torch.equal(loaded.preprocess(served / "digit.png"), fed)
    assert torch.equal(loaded.preprocess(Image.open(served / "digit.png")), fed)
    with torch.no_grad():
        probabilities = loaded.model(fed)[0].softmax(0)
    expected = [f"class {number}: {probabilities[number]:.2%}" for number in probabilities.argsort(descending=True)]
    for flags in ((), ("--packed",), ("--top", "2"), ("--top", "99")):
        assert serve(monkeypatch, model, served / "digit.png", *flags) == 0
        shown = capsys.readouterr().out.splitlines()
        assert shown == expected[: {"2": 2, "99": 10}.get(flags[-1] if flags else "", 5)]


def test_serving_what_it_cannot(
    served: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, picture = served / "out" / "model.safetensors", served / "digit.png"
    cut = served / "cut.png"
    cut.write_bytes(picture.read_bytes()[:60])
    cases = [
        (model, served / "none.png", 1, "none.png cannot be opened (No such file or directory)"),
        (model, served, 1, "cannot be opened"),
        (model, cut, 1, "give another one"),
        (model, model, 1, "is not a picture"),
        (model, served / "colours.png", 1, "the network takes 1"),
        (picture, picture, 1, "no cbpq file"),
        (served / "none", picture, 2, "no such file"),
        (EXAMPLES / "digits" / "resnet.safetensors", picture, 1, "no cbpq file"),
    ]
    for file, shown, code, words in cases:
        assert serve(monkeypatch, file, shown) == code
        output = capsys.readouterr()
        assert output.out == ""
        assert words in output.err
        assert output.err.startswith("serve.py: ")
        assert output.err.count("\n") == 1


# examples/ci


@pytest.mark.medium
def test_the_ci_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (words,) = commands_in(EXAMPLES / "ci" / "quantize.yml")
    assert {"--max-drop", "--max-size", "--seed"} <= set(words)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(EXAMPLES / "digits", tmp_path / "examples" / "digits")
    monkeypatch.setenv("CBPQ_EPOCHS", "1")  # for a test; the job takes the preset's ten
    monkeypatch.setenv("CBPQ_DEVICE", "cpu")
    outcome = command(*words[1:])
    assert outcome.code == 0, outcome.err
    assert set(contents(tmp_path / "out")) == RESULTS

    tight = [{"1.0": "-5", "out": "tight"}.get(word, word) for word in words[1:]]
    monkeypatch.setenv("CBPQ_EPOCHS", "0")
    monkeypatch.setenv("CBPQ_ROUNDING", "nearest")
    assert command(*tight).code == 3  # the job turns red, and what it keeps is there
    assert set(contents(tmp_path / "tight")) == RESULTS


# examples/imagenet


@pytest.mark.medium
def test_the_imagenet_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands, with a network and pictures that stand in for those of ImageNet."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(num_classes=6).state_dict(), "resnet18-f37072fd.pth")
    write_folder(tmp_path / "imagenet", train=12, val=6)
    before = contents(tmp_path)
    shown = 0
    for words in commands_in(EXAMPLES / "imagenet" / "README.md"):
        if words[1] != "quantize" or "--pretrained" in words:  # those weights would have to be fetched
            continue
        outcome = command(*words[1:], *(() if "--dry-run" in words else ("--dry-run",)), "--json", "--device", "cpu")
        assert outcome.code == 0, outcome.err
        settings = outcome.document()["settings"]
        assert settings["constraint"]["value"] == "binary"
        if "paper" in words:
            assert settings["lr"] == {"value": 1e-3, "from": "preset paper, model resnet18"}
            assert settings["batch_size"] == {"value": 256, "from": "preset paper, model resnet18"}
        assert len(outcome.document()["constrained"]) == 19
        shown += 1
    assert shown == 2
    assert contents(tmp_path) == before


# examples/cifar10


def test_the_cifar10_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parameters = {}
    for name in ("resnet20", "resnet56"):
        loaded = load_model(f"examples.cifar10.resnet:{name}", random=True)
        assert loaded.num_classes == 10
        assert (loaded.info.input_spec.height, loaded.info.input_spec.crop_pct) == (32, 1.0)
        parameters[name] = sum(parameter.numel() for parameter in loaded.model.parameters())
    assert parameters == {"resnet20": 269_722, "resnet56": 853_018}  # 0.27 and 0.85 million in the paper


def test_the_presets_table_is_that_of_the_raw_results() -> None:
    folder, over_seeds = EXAMPLES / "cifar10", script("runs").over_seeds
    rows = (folder / "README.md").read_text().splitlines()
    for constraint in ("binary", "ternary", "one-bit-shift", "two-bit-shift"):
        document = json.loads((folder / "results" / f"two-epochs-cbp-{constraint}.json").read_text())
        top1, same = (over_seeds([run[key] for run in document["runs"]]) for key in ("score", "agreement"))
        size = f"{document['runs'][0]['file_bytes'] / 1000:.1f} kB"
        assert any(
            row.startswith(f"| `{constraint}` | 3 | {top1} |") and f"| {same} |" in row and f"| {size} |" in row
            for row in rows
        )


@pytest.mark.parametrize(
    ("budget", "document"),
    [
        ("two-epochs", "README.md"),
        ("ten-epochs", "README.md"),
        ("sixty-epochs", "README.md"),
        ("former-two-epochs", "TRIALS.md"),
    ],
)
def test_the_methods_table_is_that_of_the_raw_results(
    budget: str,
    document: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    methods = script("cifar10.methods")
    monkeypatch.setattr(sys, "argv", ["methods", budget, "-o", str(tmp_path / "picture.png")])
    methods.main()
    assert capsys.readouterr().out in (EXAMPLES / "cifar10" / document).read_text()
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_in_two_comparisons_counts_once() -> None:
    runs = [
        {"method": method, "constraint": "binary", "seed": seed, "score": score, "agreement": score}
        for method, seed, score in (("cbp", 0, 80.0), ("adaste", 0, 70.0), ("cbp", 0, 80.0), ("cbp", 1, 90.0))
    ]
    methods = script("cifar10.methods")
    assert methods.table(methods.distinct(runs)).splitlines()[2:] == [
        "| `binary` | `cbp` | 2 | 85.00 ± 7.07 % | 85.00 ± 7.07 % |",
        "|  | `adaste` | 1 | 70.00 % | 70.00 % |",
    ]


def test_the_distance_of_files_from_the_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, network = script("cifar10.divergence"), script("cifar10.resnet").resnet20()
    torch.save(network.state_dict(), tmp_path / "resnet20.th")
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(12) % 10
    train, val = slice(7), slice(7, None)
    np.savez(
        tmp_path / "cifar10.npz",
        train_images=images[train],
        train_labels=labels[train],
        val_images=images[val],
        val_labels=labels[val],
    )
    files = ("--weights", str(tmp_path / "resnet20.th"), "--data", str(tmp_path / "cifar10.npz"))
    quantize = ("quantize", module.NETWORK, *files, "-c", "ternary", "--epochs", "0", "-o", str(tmp_path / "out"))
    assert command(*quantize).code == 0
    original = load_model(module.NETWORK, weights=tmp_path / "resnet20.th")
    quantized = cbpq.load(tmp_path / "out" / "model.safetensors", arch=module.NETWORK)
    expected, same = {"val": 0.0, "seen": 0.0}, {"val": 0, "seen": 0}
    for name, pictures in {"seen": images[train], "val": images[val]}.items():
        for picture in pictures:
            p, q = ([float(value) for value in net.model.eval()(one(picture, net))[0]] for net in (original, quantized))
            total_p, total_q = sum(map(math.exp, p)), sum(map(math.exp, q))
            logs = [(a - math.log(total_p), b - math.log(total_q)) for a, b in zip(p, q, strict=True)]
            expected[name] += sum(math.exp(a) * (a - b) for a, b in logs) / len(pictures)
            same[name] += p.index(max(p)) == q.index(max(q))
    for name, found in module.Measure(tmp_path / "resnet20.th", tmp_path / "cifar10.npz")(
        tmp_path / "out" / "model.safetensors"
    ).items():
        assert found.kl == pytest.approx(expected[name], rel=1e-4)
        assert found.agreement == pytest.approx(100 * same[name] / {"val": 5, "seen": 7}[name])
    monkeypatch.setattr(sys, "argv", ["divergence.py", *files, str(tmp_path / "out" / "model.safetensors")])
    capsys.readouterr()
    module.main()
    assert f"| {expected['val']:.4f} | {100 * same['val'] / 5:.2f} % |" in capsys.readouterr().out


def one(picture: np.ndarray[Any, Any], network: Any) -> torch.Tensor:
    """A picture as the network's input, by hand."""
    spec = network.info.input_spec
    channels = [(picture[..., c] / 255 - spec.mean[c]) / spec.std[c] for c in range(3)]
    return torch.tensor(np.stack(channels), dtype=torch.float32)[None]


def test_the_ablation_halves_the_learning_rate_of_constraint_and_budget() -> None:
    ablation = script("cifar10.ablation")
    assert ablation.replaced("learning rate halved", "two-bit-shift", 1) == ["--lr", "0.00025"]
    assert ablation.replaced("learning rate doubled", "binary", 1) == ["--lr", "0.004"]
    assert ablation.replaced("learning rate doubled", "binary", 2) == ["--lr", "0.0034"]  # of √(480 · 128 / 90,000)
    assert ablation.replaced("learning rate of a short budget", "binary", 10) == ["--lr", "0.002"]
    assert ablation.replaced("scales fixed", "binary", 1) == ["--set", "learn_scales=false"]


def test_the_ablation_replaces_what_the_preset_does_not_have_already() -> None:
    ablation = script("cifar10.ablation")
    same = {c: {part for part in ablation.PARTS if ablation.as_it_is(part, c, 2)} for c in ("binary", "two-bit-shift")}
    assert same["binary"] == {ablation.WHOLE, "latent weights start at the original ones"}
    assert same["two-bit-shift"] == {
        ablation.WHOLE,
        "as ternary weights are led: on levels all along, from compensated rounding",
        "on levels from the first step on",
        "latent weights start where compensated rounding put them",
    }


def test_a_row_of_the_ablation_is_made_of_its_own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row's name begins with another's."""
    ablation = script("cifar10.ablation")
    monkeypatch.setattr(ablation, "RESULTS", tmp_path)
    for seed, loss in ((0, 1.0), (1, 3.0)):
        test = {"comparison": {"agreement": 90.0 + seed}, "loss": loss}
        name = ablation.stem(1, "binary", "learning rate constant, no multipliers, no window")
        kl = {"val": 0.2 + seed, "seen": 0.1}
        (tmp_path / f"{name}-{seed}.json").write_text(json.dumps({"test": test, "kl": kl}))
    assert ablation.table(1, ["binary"]).splitlines()[2:] == [
        "| learning rate constant, no multipliers, no window | 90.50 ± 0.71 % | 2.0000 | 0.7000 | 0.1000 |"
    ]
    assert len({ablation.stem(1, "binary", part) for part in ablation.PARTS}) == len(ablation.PARTS)


def test_the_ablation_stands_in_the_study_as_it_was_measured() -> None:
    text = (EXAMPLES / "cifar10" / "README.md").read_text()
    for epochs, constraint in product((2, 10), ("binary", "two-bit-shift")):
        assert script("cifar10.ablation").table(epochs, [constraint]) in text


@pytest.mark.medium
def test_float16_with_sums_in_float32(small_job: Path) -> None:
    """Products are those of the rounded factors, rounded once; the command line runs on them, and overflow is seen."""
    float16 = script("cifar10.float16")
    torch.manual_seed(0)
    images, weight = torch.randn(3, 4, 6, 6).half(), torch.randn(5, 4, 3, 3).half().requires_grad_()
    exact = weight.detach().double().requires_grad_()
    with float16.SumsInFloat32():
        products = nn.functional.conv2d(images, weight)
        products.backward(torch.ones_like(products))
        vectors = nn.functional.linear(images.flatten(1), images.flatten(1))
        assert nn.functional.linear(torch.full((1, 2), 300.0).half(), torch.full((1, 2), 300.0).half()).isinf()
        assert nn.functional.linear(torch.full((1, 2), 300.0), torch.full((1, 2), 300.0)).item() == 180_000
    expected = nn.functional.conv2d(images.double(), exact)
    expected.backward(torch.ones_like(expected))
    for found, wanted in (
        (products, expected),
        (weight.grad, exact.grad),
        (vectors, nn.functional.linear(images.flatten(1).double(), images.flatten(1).double())),
    ):
        assert found is not None
        assert wanted is not None
        assert found.dtype == torch.float16
        torch.testing.assert_close(found.double(), wanted, rtol=2**-11 * 1.01, atol=1e-5)

    flags = ("--amp", "--set", "amp_dtype=float16", "-b", "16", "--epochs", "1", "--device", "cpu", "-o", "out")
    with float16.SumsInFloat32():
        outcome = command("quantize", "net.safetensors", "--data", "a.npz", *flags)
    assert outcome.code == 0, outcome.err
    assert (small_job / "out" / "model.safetensors").exists()
