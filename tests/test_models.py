"""Sources: names, files told by metadata, name or fit, and functions; built again with the same logits."""

import argparse
import dataclasses
import json
import sys
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import WeightsEnum

from cbpq import fileformat
from cbpq.architectures import Architecture, build, imported, parse_architecture
from cbpq.checkpoints import content_sha256
from cbpq.errors import CbpqError, FileFormatError, SourceError, UsageError
from cbpq.fileformat import CbpqFile
from cbpq.identification import fit, identify
from cbpq.inputs import IMAGENET_MEAN, IMAGENET_STD, InputSpec
from cbpq.models import (
    LoadedModel,
    SourceInfo,
    auxiliary_logits,
    available_models,
    build_model,
    from_cbpq_file,
    load_model,
    logits,
)
from cbpq.published import recognised, torchvision_entry


def refused(error: type[CbpqError], *args: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        load_model(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def tiny(arguments: dict[str, Any] | None = None) -> nn.Module:
    """timm's 8-layer test ResNet with its statistics stirred up."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("test_resnet", **({"num_classes": 7} | (arguments or {}))).eval()
    return model


def save(folder: Path, name: str, content: Any) -> Path:
    torch.save(content, folder / name)
    return folder / name


def same_logits(one: nn.Module, other: nn.Module, *shape: int) -> bool:
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        first, second = logits(one(images)), logits(other(images))
    return torch.equal(first, second) and bool(first.std() > 0)


# file name, library, architecture in it, constructor arguments, side of the pictures
FILES = [
    ("alexnet-2.pth", "torchvision", "alexnet", {}, 64),
    ("resnet18.pth", "torchvision", "resnet18", {}, 32),
    ("resnet50_best.pt", "torchvision", "resnet50", {}, 32),
    ("googlenet-mine.pth", "torchvision", "googlenet", {"aux_logits": True, "init_weights": False}, 64),
    ("googlenet.bin", "torchvision", "googlenet", {"aux_logits": False, "init_weights": False}, 64),
    ("mobilenet_v2.pth.tar", "torchvision", "mobilenet_v2", {}, 32),
    ("mobilenet_v3_small.th", "torchvision", "mobilenet_v3_small", {}, 32),
    ("efficientnet_b0.safetensors", "torchvision", "efficientnet_b0", {}, 32),
    ("densenet121 (copy).pth", "torchvision", "densenet121", {}, 32),
    ("squeezenet1_1-imagenet.pth", "torchvision", "squeezenet1_1", {}, 32),
    ("mnasnet0_5.safetensors", "torchvision", "mnasnet0_5", {}, 32),
    ("resnet18.a1_in1k.safetensors", "timm", "resnet18.a1_in1k", {}, 32),
    ("mobilenetv2_035.pth", "timm", "mobilenetv2_035", {}, 32),
    ("mobilenetv3_small_050.lamb_in1k.pth", "timm", "mobilenetv3_small_050.lamb_in1k", {}, 32),
    ("test_efficientnet.pth", "timm", "test_efficientnet", {"in_chans": 1}, 32),
    ("convnext_atto-x.pth", "timm", "convnext_atto", {}, 32),
    ("vit_tiny_patch16_224.augreg_in21k.safetensors", "timm", "vit_tiny_patch16_224.augreg_in21k", {}, 224),
    ("deit_tiny_patch16_224.pth", "timm", "deit_tiny_patch16_224", {"img_size": 64}, 64),
    ("deit_tiny_distilled_patch16_224.pth", "timm", "deit_tiny_distilled_patch16_224", {"img_size": 32}, 32),
    ("swin_tiny_patch4_window7_224-x.pth", "timm", "swin_tiny_patch4_window7_224", {"img_size": 64}, 64),
]


@pytest.mark.medium
@pytest.mark.parametrize("name, library, architecture, arguments, side", FILES)
def test_files_are_told_by_name_and_loaded_exactly(
    tmp_path: Path, name: str, library: str, architecture: str, arguments: dict[str, Any], side: int
) -> None:
    torch.manual_seed(3)
    create = torchvision.models.get_model if library == "torchvision" else timm.create_model
    model: nn.Module = create(architecture, num_classes=5, **arguments).eval()
    channels = arguments.get("in_chans", 3)
    path = tmp_path / name
    if name.endswith(".safetensors"):
        save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, path)
    else:
        torch.save({"state_dict": {f"module.{key}": t for key, t in model.state_dict().items()}}, path)
    loaded = load_model(str(path), input_overrides={"input_size": (channels, side, side)})
    path.unlink()  # some are large
    assert (loaded.info.library, loaded.info.architecture) == (library, architecture)
    assert loaded.num_classes == loaded.info.arguments["num_classes"] == 5
    assert not any(module.training for module in loaded.model.modules())
    assert same_logits(loaded.model, model, channels, side, side)
    assert loaded.info.weights_sha256 == content_sha256(model.state_dict())
    assert (loaded.info.input_spec.channels, loaded.info.input_spec.height) == (channels, side)
    if architecture == "alexnet":
        return  # 57 million weights need seconds to be made once more
    # and once more from what the metadata of a file keeps
    info = SourceInfo.from_dict(json.loads(json.dumps(loaded.info.to_dict())))
    assert info == loaded.info
    again = build_model(info)
    again.load_state_dict(loaded.model.state_dict())
    assert same_logits(again, model, channels, side, side)


def meta_state(source: str, **arguments: Any) -> dict[str, Tensor]:
    return dict(build(parse_architecture(source), arguments, meta=True).state_dict())


# networks too large to be saved in a test, by shape alone
@pytest.mark.parametrize(
    "source, arguments, expected",
    [
        ("vit_b_16", {"num_classes": 4}, {"num_classes": 4, "image_size": 224}),
        ("vit_b_16", {"num_classes": 4, "image_size": 384}, {"num_classes": 4, "image_size": 384}),
        ("swin_t", {"num_classes": 4}, {"num_classes": 4}),
        ("convnext_tiny", {"num_classes": 4}, {"num_classes": 4}),
        ("inception_v3", {"aux_logits": True}, {"num_classes": 1000, "aux_logits": True}),
        ("inception_v3", {"aux_logits": False}, {"num_classes": 1000, "aux_logits": False}),
        ("regnet_y_400mf", {"num_classes": 4}, {"num_classes": 4}),
        ("maxvit_t", {"num_classes": 4}, {"num_classes": 4}),
        ("timm:vit_base_patch16_224", {"img_size": 384, "in_chans": 1}, None),
        ("timm:efficientnet_b0", {"num_classes": 4, "in_chans": 5}, {"num_classes": 4, "in_chans": 5}),
        ("timm:levit_128s", {"num_classes": 4}, {"num_classes": 4}),
        ("timm:vgg11", {"num_classes": 4}, {"num_classes": 4}),
        ("timm:eva02_tiny_patch14_224", {"num_classes": 4}, {"num_classes": 4}),  # without classifier by default
    ],
)
def test_arguments_are_read_from_the_shapes(
    source: str, arguments: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    found = fit(parse_architecture(source), meta_state(source, **arguments), {})
    assert found.problem == ""
    assert found.arguments == (expected if expected is not None else {"num_classes": 1000} | arguments)


def test_a_network_of_another_shape_does_not_fit() -> None:
    assert "missing" in fit(parse_architecture("resnet34"), meta_state("resnet18"), {}).problem
    assert "unexpected" in fit(parse_architecture("resnet18"), meta_state("resnet34"), {}).problem
    wide = meta_state("wide_resnet50_2")
    assert "of another shape" in fit(parse_architecture("resnet50"), wide, {}).problem


def test_old_names_of_published_files_are_known() -> None:
    state = meta_state("densenet121")
    old = {name.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): tensor for name, tensor in state.items()}
    assert old.keys() != state.keys()
    found = fit(parse_architecture("densenet121"), old, {})
    assert found.problem == ""
    assert found.state.keys() == state.keys()
    state = meta_state("vit_b_16")
    old = {n.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): t for n, t in state.items()}
    assert fit(parse_architecture("vit_b_16"), old, {}).problem == ""
    # the names of Swin's authors, which timm translates
    state = meta_state("timm:swin_tiny_patch4_window7_224")
    old = {name.replace("layers.1.downsample", "layers.0.downsample"): tensor for name, tensor in state.items()}
    old = {n.replace("layers.2.downsample", "layers.1.downsample"): t for n, t in old.items()}
    old = {
        n.replace("layers.3.downsample", "layers.2.downsample").replace("head.fc", "head"): t for n, t in old.items()
    }
    found = fit(parse_architecture("timm:swin_tiny_patch4_window7_224"), old, {"num_classes": 1000})
    assert found.problem == ""
    assert found.state.keys() == state.keys()


def test_a_name_both_libraries_know_is_torchvisions_and_says_so(tmp_path: Path) -> None:
    state = meta_state("resnet18")
    path = save(tmp_path, "resnet18.pth", {})
    found, notes = identify(path, state, {})
    assert found.architecture == Architecture("torchvision", "resnet18")
    assert "--arch timm:resnet18" in notes[0]
    # where only one of the two fits, the weights decide
    found, notes = identify(save(tmp_path, "vgg11.pth", {}), meta_state("timm:vgg11"), {})
    assert (found.architecture, notes) == (Architecture("timm", "vgg11"), ())


def test_the_longest_name_that_fits_wins(tmp_path: Path) -> None:
    for source, name in (("timm:resnet50_gn", "resnet50_gn-best.pth"), ("resnet50", "resnet50_gn.pth")):
        found, _ = identify(save(tmp_path, name, {}), meta_state(source), {})
        assert str(found.architecture) == source


def test_a_name_that_is_none(tmp_path: Path) -> None:
    path = save(tmp_path, "model_best.pth", tiny().state_dict())
    message = refused(UsageError, str(path))
    assert "--arch" in message
    assert str(path) in message
    path = save(tmp_path, "resnet18x.pth", tiny().state_dict())
    assert "did you mean 'resnet18" in refused(UsageError, str(path))


def test_a_checkpoint_of_another_architecture(tmp_path: Path) -> None:
    path = save(tmp_path, "resnet18.pth", tiny().state_dict())
    message = refused(SourceError, str(path))
    assert "does not fit resnet18, timm:resnet18" in message
    assert "missing" in message
    assert "--arch" in message
    assert "missing" in refused(SourceError, str(path), arch="resnet34")
    assert "missing" in refused(SourceError, "resnet18", weights=path)


def test_arch_names_the_network(tmp_path: Path) -> None:
    path = save(tmp_path, "model_best.pth", tiny().state_dict())
    for source, options in ((str(path), {"arch": "timm:test_resnet"}), ("timm:test_resnet", {"weights": path})):
        loaded = load_model(source, **options)
        assert (loaded.info.library, loaded.info.architecture, loaded.num_classes) == ("timm", "test_resnet", 7)
        assert same_logits(loaded.model, tiny(), 3, 32, 32)
    # torchvision lacks the name, so it needs no prefix
    assert load_model(str(path), arch="test_resnet").info.library == "timm"


def test_a_wrong_library_in_arch_is_told(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "a.safetensors"
    save_file({name: torch.zeros(tensor.shape) for name, tensor in meta_state("timm:densenet121").items()}, path)
    assert load_model(str(path), arch="densenet121", input_overrides={"input_size": 32}).info.library == "torchvision"
    state = timm.create_model("efficientnet_b0").state_dict()
    assert "timm:efficientnet_b0" in refused(SourceError, str(save(tmp_path, "b.pth", state)), arch="efficientnet_b0")


def test_metadata_of_safetensors_names_everything(tmp_path: Path) -> None:
    model = tiny({"in_chans": 1, "num_classes": 10})
    spec = InputSpec(1, 8, 8, (0.3,), (0.35,), "nearest", 1.0)
    header = {
        "architecture": "timm:test_resnet",
        "arguments": '{"num_classes":10,"in_chans":1}',
        "input_spec": json.dumps(spec.to_dict()),
    }
    save_file(model.state_dict(), tmp_path / "digits.safetensors", header)
    loaded = load_model(str(tmp_path / "digits.safetensors"))
    assert loaded.info == SourceInfo(
        "timm", "test_resnet", {"num_classes": 10, "in_chans": 1}, spec, content_sha256(model.state_dict())
    )
    assert loaded.notes == ()
    assert same_logits(loaded.model, model, 1, 8, 8)
    changed = load_model(str(tmp_path / "digits.safetensors"), input_overrides={"input_size": 16, "mean": [0.5]})
    assert changed.info.input_spec == dataclasses.replace(spec, height=16, width=16, mean=(0.5,))


@pytest.mark.parametrize(
    "header, error, word",
    [
        ({"architecture": "timm:test_resnet", "input_spec": '{"height":8}'}, SourceError, "input size is not known"),
        ({"architecture": "timm:test_resnet", "input_spec": '{"size":8,"std":[0,0,0]}'}, SourceError, "std"),
        ({"architecture": "timm:test_resnet", "arguments": '{"checkpoint_path":"/etc/x"}'}, SourceError, "not allowed"),
        ({"architecture": "timm:test_resnet", "arguments": '{"depth_of":3}'}, SourceError, "depth_of"),
        ({"architecture": "timm:no_such"}, UsageError, "unknown network"),
        ({"architecture": "os:system"}, UsageError, "--arch os:system"),
        ({"architecture": "MyNet"}, UsageError, "'MyNet', which is no known network"),
    ],
)
def test_metadata_that_cannot_be_used(
    tmp_path: Path, header: dict[str, str], error: type[CbpqError], word: str
) -> None:
    save_file(tiny().state_dict(), tmp_path / "a.safetensors", header)
    assert word in refused(error, str(tmp_path / "a.safetensors"))


def test_training_scripts_leave_names_and_inputs(tmp_path: Path) -> None:
    args = argparse.Namespace(model="test_resnet", img_size=48, crop_pct=0.8, mean=None, interpolation="bilinear")
    content = {"epoch": 1, "arch": "test_resnet", "state_dict": tiny().state_dict(), "version": 2, "args": args}
    loaded = load_model(str(save(tmp_path, "last.pth", content)))
    assert loaded.info.architecture == "test_resnet"
    spec = loaded.info.input_spec
    assert (spec.height, spec.width, spec.crop_pct, spec.interpolation) == (48, 48, 0.8, "bilinear")
    assert spec.mean == tiny().pretrained_cfg["mean"]  # type: ignore[index] # timm's attribute
    # a name that both know, in a checkpoint only timm writes
    torch.manual_seed(0)
    content |= {"arch": "resnet18", "state_dict": meta_state("resnet18")}
    found, _ = identify(tmp_path / "last.pth", meta_state("resnet18"), {"architecture": "resnet18", "saver": "timm"})
    assert str(found.architecture) == "timm:resnet18"
    found, _ = identify(tmp_path / "last.pth", meta_state("resnet18"), {"architecture": "resnet18"})
    assert str(found.architecture) == "resnet18"


def test_input_of_torchvisions_training_script(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = torchvision.models.mobilenet_v3_small(num_classes=3).state_dict()
    args = argparse.Namespace(model="mobilenet_v3_small", val_crop_size=64, val_resize_size=72)
    spec = load_model(str(save(tmp_path, "checkpoint.pth", {"model": state, "args": args}))).info.input_spec
    assert (spec.height, spec.resize) == (64, 72)


@pytest.mark.parametrize(
    "name, architecture, entry, known",
    [
        ("resnet18-f37072fd.pth", "resnet18", "IMAGENET1K_V1", True),
        ("resnet18-5c106cde.pth", "resnet18", "IMAGENET1K_V1", True),  # an earlier release
        ("resnet50-0676ba61.pth", "resnet50", "IMAGENET1K_V1", True),
        ("resnet50-19c8e357.pth", "resnet50", "IMAGENET1K_V1", True),  # an earlier release
        ("resnet50-11ad3fa6.pth", "resnet50", "IMAGENET1K_V2", True),
        ("resnet50.pth", "resnet50", "IMAGENET1K_V2", False),
        ("resnet50-best.pth", "resnet50", "IMAGENET1K_V2", False),
        ("vit_b_16_swag-9ac1b537.pth", "vit_b_16", "IMAGENET1K_SWAG_E2E_V1", True),
    ],
)
def test_which_of_torchvisions_weights_a_file_is(
    tmp_path: Path, name: str, architecture: str, entry: str, known: bool
) -> None:
    (tmp_path / name).write_bytes(b"anything")
    found, sure = torchvision_entry(architecture, tmp_path / name)
    assert (found.name, sure) == (entry, known)


def test_published_files_are_known_by_bytes_or_full_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mnasnet0.5_top1_67.823-3ffadce67e.pth").write_bytes(b"x")
    found = recognised(tmp_path / "mnasnet0.5_top1_67.823-3ffadce67e.pth")
    assert found is not None
    assert str(found[0]) == "mnasnet0_5"
    (tmp_path / "model.pth").write_bytes(b"x")
    assert recognised(tmp_path / "model.pth") is None
    monkeypatch.setattr("cbpq.published.file_sha256", lambda path: "0676ba61" + "0" * 56)
    found = recognised(tmp_path / "model.pth")
    assert found is not None
    assert (str(found[0]), found[1].name) == ("resnet50", "IMAGENET1K_V1")


@pytest.mark.parametrize("name", ["resnet18d.ra2_in1k", "deit_tiny_patch16_224.fb_in1k"])
def test_file_names_of_timms_releases(tmp_path: Path, name: str) -> None:
    config = timm.get_pretrained_cfg(name)
    assert config is not None
    path = tmp_path / str(config.url).rpartition("/")[2]
    path.write_bytes(b"x")
    assert recognised(path) == (Architecture("timm", name), None)


def test_preprocessing_is_that_of_the_weights(tmp_path: Path) -> None:
    spec = InputSpec(3, 224, 224, IMAGENET_MEAN, IMAGENET_STD, "bilinear", 224 / 256)
    assert load_model("resnet18", random=True).info.input_spec == spec
    assert spec.resize == 256
    spec = load_model("mobilenet_v2", random=True).info.input_spec
    assert (spec.height, spec.resize, spec.interpolation) == (224, 232, "bilinear")
    spec = load_model("timm:test_vit", random=True).info.input_spec
    assert (spec.height, spec.interpolation, spec.crop_pct) == (160, "bicubic", 0.95)
    overrides = {"input_size": (1, 32, 48), "mean": None, "interpolation": "bilinear", "crop_pct": 0.5}
    spec = load_model("timm:test_resnet", random=True, input_overrides=overrides).info.input_spec
    average = sum(IMAGENET_MEAN) / 3
    assert (spec.channels, spec.height, spec.width, spec.interpolation) == (1, 32, 48, "bilinear")
    assert spec.mean == pytest.approx((average,)) or spec.mean == pytest.approx((0.5,))


def test_unsure_preprocessing_is_noted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = torchvision.models.mobilenet_v2().state_dict()
    notes = load_model(str(save(tmp_path, "mobilenet_v2.pth", state))).notes
    assert any("MobileNet_V2_Weights.IMAGENET1K_V2" in note and "--crop-pct" in note for note in notes)
    loaded = load_model(str(save(tmp_path, "mobilenet_v2-b0353104.pth", state)))
    assert loaded.notes == ()
    assert loaded.info.input_spec.resize == 256


def test_googlenet_scales_its_input_where_its_weights_are_published(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = torchvision.models.googlenet(init_weights=False, num_classes=3).state_dict()
    plain = load_model(str(save(tmp_path, "googlenet.pth", state)), input_overrides={"input_size": 64})
    assert plain.info.arguments.get("transform_input") is None
    assert not plain.model.transform_input
    assert any("googlenet-1378be20.pth" in note for note in plain.notes)
    known = load_model(str(save(tmp_path, "googlenet-1378be20.pth", state)), input_overrides={"input_size": 64})
    assert known.model.transform_input
    assert known.info.arguments["transform_input"] is True
    assert known.notes == ()
    assert build_model(known.info).transform_input


def test_names_need_weights_or_a_word() -> None:
    for source in ("resnet18", "timm:test_resnet", "math:sqrt"):
        message = refused(UsageError, source)
        assert "--pretrained" in message
        assert "--weights" in message
    assert "--pretrained" in refused(UsageError, "hf-hub:timm/resnet18.a1_in1k")


@pytest.mark.parametrize(
    "options", [{"pretrained": True, "random": True}, {"weights": Path("a"), "pretrained": True}, {"arch": "resnet18"}]
)
def test_contradictory_requests(options: dict[str, Any]) -> None:
    refused(UsageError, "resnet18", **options)


def test_a_file_needs_no_other_weights(tmp_path: Path) -> None:
    path = save(tmp_path, "test_resnet.pth", tiny().state_dict())
    for options in ({"weights": path}, {"pretrained": True}, {"random": True}):
        assert "itself a file" in refused(UsageError, str(path), **options)


def test_names_that_do_not_exist() -> None:
    assert "did you mean 'resnet18'" in refused(UsageError, "resnet81", random=True)
    assert "did you mean 'test_resnet" in refused(UsageError, "timm:test_resnt", random=True)
    assert "did you mean 'r160_in1k'" in refused(UsageError, "timm:test_resnet.r161_in1k", random=True)
    assert "unknown network" in refused(UsageError, "torchvision:test_resnet", random=True)
    assert "unknown network" in refused(UsageError, "timm:", random=True)
    assert "unknown network" in refused(UsageError, "", random=True)


def test_paths_that_do_not_exist(tmp_path: Path) -> None:
    save(tmp_path, "mine.pth", tiny().state_dict())
    assert "did you mean 'mine.pth'" in refused(UsageError, str(tmp_path / "mime.pth"))
    assert "no such file" in refused(UsageError, "nowhere.safetensors")
    assert "no such file" in refused(UsageError, "timm:test_resnet", weights=tmp_path / "nowhere.pth")
    assert "is a directory" in refused(UsageError, str(tmp_path))
    assert "is a directory" in refused(UsageError, "timm:test_resnet", weights=tmp_path)


def test_random_networks() -> None:
    torch.manual_seed(4)
    one = load_model("timm:test_resnet", random=True, num_classes=6)
    torch.manual_seed(4)
    assert same_logits(one.model, timm.create_model("test_resnet", num_classes=6).eval(), 3, 32, 32)
    assert one.num_classes == 6
    assert one.info.weights_sha256 is None
    vit = load_model("timm:vit_tiny_patch16_224", random=True, input_overrides={"input_size": 32})
    assert vit.info.arguments == {"img_size": [32, 32], "num_classes": 1000}
    assert load_model("googlenet", random=True, input_overrides={"input_size": 64}).info.arguments["aux_logits"]


def test_the_number_of_classes_is_the_weights(tmp_path: Path) -> None:
    path = save(tmp_path, "test_resnet.pth", tiny().state_dict())
    assert load_model(str(path), num_classes=7).num_classes == 7
    assert "7 classes, not 10" in refused(UsageError, str(path), num_classes=10)


def test_a_network_without_classifier_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, num_classes=0))
    assert "no classifier" in refused(SourceError, "timm:test_resnet", random=True)
    with pytest.raises(SourceError, match="1 up"):
        build(Architecture("timm", "test_resnet"), {"num_classes": 0})


def test_input_that_the_network_does_not_take() -> None:
    message = refused(UsageError, "alexnet", random=True, input_overrides={"input_size": 16})
    assert "3×16×16" in message
    assert "--input-size" in message
    message = refused(UsageError, "resnet18", random=True, input_overrides={"input_size": (1, 32, 32)})
    assert "1×32×32" in message


@pytest.mark.parametrize(
    "overrides",
    [
        {"input_size": 0},
        {"input_size": (3, 4, 5, 6)},
        {"input_size": "32"},
        {"mean": [0.5]},
        {"std": [1.0, 0.0, 1.0]},
        {"mean": [float("nan")] * 3},
        {"interpolation": "bicubik"},
        {"crop_pct": 0.0},
        {"crop": 0.9},
    ],
)
def test_impossible_overrides(overrides: dict[str, Any]) -> None:
    refused(UsageError, "resnet18", random=True, input_overrides=overrides)


NETS = """
import torch
from torch import nn

def make(num_classes=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, num_classes))

make.input_spec = {"channels": 1, "size": 12, "mean": [0.1], "std": [0.9]}

def sizeless():
    return make()

def odd():
    return make()

odd.input_spec = {"size": 12, "mean": "grey"}

class Made(nn.Module):
    input_spec = {"channels": 1, "size": 9}

    def __init__(self):
        super().__init__()
        self.net = make()

    def forward(self, x):
        return self.net(x)

def no_module():
    return 3

def failing():
    raise ValueError("first line\\nsecond line")

def no_scores():
    return nn.Conv2d(1, 2, 3)

no_scores.input_spec = make.input_spec

def renamed(source="x"):
    return make(3)

renamed.input_spec = make.input_spec
value = 3
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the current directory, which is not on the path; its name is new each time."""
    name = f"nets_{abs(hash(tmp_path)) % 10**9}"
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / f"{name}.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield f"own.{name}"
    assert sys.path == before
    for module in [module for module in sys.modules if module.startswith("own")]:
        del sys.modules[module]


def test_functions(nets: str, tmp_path: Path) -> None:
    make = imported(f"{nets}:make")
    path = save(tmp_path, "a.pth", make(4).state_dict())
    for source, options in ((f"{nets}:make", {"weights": path}), (str(path), {"arch": f"{nets}:make"})):
        loaded = load_model(source, **options)
        assert (loaded.info.library, loaded.info.architecture) == ("callable", f"{nets}:make")
        assert loaded.info.arguments == {}
        assert loaded.num_classes == 4
        assert loaded.info.input_spec == InputSpec(1, 12, 12, (0.1,), (0.9,))
        assert same_logits(loaded.model, make(4), 1, 12, 12)


def test_functions_take_the_number_of_classes_from_the_weights(nets: str, tmp_path: Path) -> None:
    path = save(tmp_path, "a.pth", imported(f"{nets}:make")(9).state_dict())
    loaded = load_model(f"{nets}:make", weights=path)
    assert (loaded.num_classes, loaded.info.arguments) == (9, {"num_classes": 9})
    assert "of another shape" in refused(SourceError, f"{nets}:renamed", weights=path)
    assert load_model(f"{nets}:make", random=True, num_classes=5).num_classes == 5
    assert "3 classes, not 5" in refused(UsageError, f"{nets}:renamed", random=True, num_classes=5)


def test_functions_that_return_trained_networks(nets: str) -> None:
    loaded = load_model(f"{nets}:make", pretrained=True)
    assert loaded.info.weights_sha256 == content_sha256(imported(f"{nets}:make")().state_dict())


def test_the_input_of_functions(nets: str) -> None:
    assert "--input-size" in refused(UsageError, f"{nets}:sizeless", random=True)
    overrides: dict[str, Any] = {"input_size": (1, 16, 20), "mean": [0.2], "std": [0.3]}
    spec = load_model(f"{nets}:sizeless", random=True, input_overrides=overrides).info.input_spec
    assert spec == InputSpec(1, 16, 20, (0.2,), (0.3,))
    assert load_model(f"{nets}:Made", random=True).info.input_spec.height == 9
    assert "input_spec" in refused(SourceError, f"{nets}:odd", random=True)


def test_functions_that_go_wrong(nets: str) -> None:
    assert "did you mean 'make'" in refused(UsageError, f"{nets}:mak", random=True)
    assert "name a function" in refused(UsageError, f"{nets}:value", random=True)
    assert "returns a int" in refused(SourceError, f"{nets}:no_module", random=True)
    assert "first line" in refused(SourceError, f"{nets}:failing", random=True)
    assert "returns (1, 2, 10, 10)" in refused(SourceError, f"{nets}:no_scores", random=True)
    assert "cannot import 'nowhere_at_all'" in refused(UsageError, "nowhere_at_all:make", random=True)
    assert "package.module:function" in refused(UsageError, "a-b:make", random=True)


def test_a_module_that_fails_on_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_nets.py").write_text("raise RuntimeError('one\\ntwo')")
    monkeypatch.chdir(tmp_path)
    assert "RuntimeError: one" in refused(SourceError, "broken_nets:make", random=True)


def as_cbpq_file(loaded: LoadedModel) -> CbpqFile:
    arrays = {name: tensor.numpy() for name, tensor in loaded.model.state_dict().items()}
    return CbpqFile({}, arrays, loaded.info.to_dict(), {}, {})


def test_a_cbpq_file_is_a_source(tmp_path: Path) -> None:
    torch.manual_seed(0)
    loaded = load_model("timm:test_resnet", random=True, num_classes=3, input_overrides={"input_size": 40})
    path = tmp_path / "model.safetensors"
    fileformat.write(path, as_cbpq_file(loaded))
    again = load_model(str(path))
    assert again.info == loaded.info
    assert again.num_classes == 3
    assert same_logits(again.model, loaded.model, 3, 40, 40)
    assert load_model(str(path), arch="timm:test_resnet").info == loaded.info
    assert load_model(str(path), input_overrides={"crop_pct": 0.5}).info.input_spec.crop_pct == 0.5
    assert "contradicts" in refused(UsageError, str(path), arch="resnet18")
    assert "cbpq file" in refused(UsageError, "timm:test_resnet", weights=path)


def test_a_cbpq_file_runs_code_only_when_told(nets: str) -> None:
    loaded = load_model(f"{nets}:make", random=True)
    file = as_cbpq_file(loaded)
    with pytest.raises(UsageError, match=f"--arch {nets}:make"):
        from_cbpq_file(file)
    with pytest.raises(UsageError, match="contradicts"):
        from_cbpq_file(file, arch=f"{nets}:Made")
    assert same_logits(from_cbpq_file(file, arch=f"{nets}:make").model, loaded.model, 1, 12, 12)


def test_a_cbpq_file_loads_strictly() -> None:
    file = as_cbpq_file(load_model("timm:test_resnet", random=True, num_classes=3))
    others = dict(file.others)
    del others["fc.bias"]
    with pytest.raises(SourceError, match=r"1 missing: fc\.bias"):
        from_cbpq_file(dataclasses.replace(file, others=others))
    with pytest.raises(SourceError, match="1 unexpected: more"):
        from_cbpq_file(dataclasses.replace(file, others=file.others | {"more": np.zeros(2, np.float32)}))


@pytest.mark.parametrize(
    "change, error",
    [
        ({"library": "keras"}, FileFormatError),
        ({"library": 3}, FileFormatError),
        ({"architecture": ["resnet18"]}, FileFormatError),
        ({"arguments": []}, FileFormatError),
        ({"arguments": {"pretrained": True}}, FileFormatError),
        ({"arguments": {"num_classes": 10**12}}, FileFormatError),
        ({"arguments": {"num_classes": True}}, FileFormatError),
        ({"arguments": {"num_classes": 3, "img_sizes": 3}}, SourceError),
        ({"arguments": {"num_classes": 5_000_000}}, SourceError),  # other shapes than the file's, told before building
        ({"input_spec": {"height": 32}}, FileFormatError),
        ({"input_spec": {"height": 32, "width": 1e9}}, FileFormatError),
        ({"input_spec": {"height": 32, "width": 32, "mean": [1, 2]}}, FileFormatError),
        ({"input_spec": {"height": 32, "width": 32, "mean": [[1], 2, 3]}}, FileFormatError),
        ({"input_spec": {"height": 32, "width": 32, "interpolation": None}}, FileFormatError),
        ({"weights_sha256": 5}, FileFormatError),
        ({"more": 5}, FileFormatError),
        ({"architecture": "hf-hub:owner/name"}, SourceError),
        ({"architecture": "local-dir:/tmp"}, SourceError),
        ({"architecture": "no_such_network"}, SourceError),
        ({"library": "torchvision", "architecture": "fcn_resnet50"}, SourceError),
    ],
)
def test_hostile_sources_in_a_cbpq_file(change: dict[str, Any], error: type[CbpqError]) -> None:
    file = as_cbpq_file(load_model("timm:test_resnet", random=True, num_classes=3))
    with pytest.raises(error) as caught:
        from_cbpq_file(dataclasses.replace(file, source=file.source | change))
    assert "\n" not in str(caught.value)
    with pytest.raises(FileFormatError, match="not written by cbpq"):
        from_cbpq_file(dataclasses.replace(file, source={}))


def test_torchvision_weights_are_fetched_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    state = torchvision.models.mobilenet_v3_small().state_dict()

    def fetch(self: WeightsEnum, **options: Any) -> dict[str, Tensor]:
        asked.append(f"{self} {options['check_hash']}")
        return dict(state)

    monkeypatch.setattr(WeightsEnum, "get_state_dict", fetch)
    loaded = load_model("mobilenet_v3_small", pretrained=True)
    assert asked == ["MobileNet_V3_Small_Weights.IMAGENET1K_V1 True"]
    assert loaded.info.weights_sha256 == content_sha256(state)
    assert loaded.info.input_spec.resize == 256

    def fail(self: WeightsEnum, **options: Any) -> dict[str, Tensor]:
        raise urllib.error.URLError("no route\nto host")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", fail)
    message = refused(SourceError, "mobilenet_v3_small", pretrained=True)
    assert "could not be fetched" in message
    assert "--weights" in message


def test_published_googlenet_is_built_as_torchvision_does(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torchvision.models.googlenet(init_weights=False).state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **options: dict(state))
    loaded = load_model("googlenet", pretrained=True, input_overrides={"input_size": 64})
    assert loaded.info.arguments == {"num_classes": 1000, "aux_logits": True, "transform_input": True}


def test_timm_weights_are_fetched_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    create, asked = timm.create_model, []

    def fetch(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        if pretrained:
            asked.append(name)
        model: nn.Module = create(name.removeprefix("hf-hub:me/"), pretrained=False, **options)
        return model

    monkeypatch.setattr(timm, "create_model", fetch)
    loaded = load_model("timm:test_resnet.r160_in1k", pretrained=True)
    assert asked == ["test_resnet.r160_in1k"]
    assert loaded.info.architecture == "test_resnet.r160_in1k"
    assert loaded.info.arguments == {"num_classes": 1000}
    assert loaded.info.weights_sha256 == content_sha256(loaded.model.state_dict())


def test_networks_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    create, asked = timm.create_model, []

    def fetch(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        asked.append((name, pretrained))
        hub = {"in_chans": 1, "num_classes": 6} if name == "hf-hub:me/mine" else {}
        model: nn.Module = create("test_resnet", **hub | options)
        return model

    monkeypatch.setattr(timm, "create_model", fetch)
    config: tuple[dict[str, Any], str, dict[str, Any]] = ({}, "test_resnet", {"in_chans": 1})
    monkeypatch.setattr(timm.models, "load_model_config_from_hf", lambda name: config)
    loaded = load_model("hf-hub:me/mine", pretrained=True)
    assert asked[0] == ("hf-hub:me/mine", True)
    # without the hub from here on
    assert (loaded.info.library, loaded.info.architecture) == ("timm", "test_resnet")
    assert loaded.info.arguments == {"in_chans": 1, "num_classes": 6}
    assert loaded.info.input_spec.channels == 1
    again = build_model(loaded.info)
    again.load_state_dict(loaded.model.state_dict())
    assert same_logits(again, loaded.model, 1, 32, 32)
    assert all(name == "test_resnet" and not pretrained for name, pretrained in asked[1:])


def test_failing_downloads_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise OSError("cannot reach the hub\nat all")

    monkeypatch.setattr(timm.models, "load_model_config_from_hf", fail)
    assert "could not be fetched" in refused(SourceError, "hf-hub:me/mine", pretrained=True)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **o: fail() if o.get("pretrained") else create(*a, **o))
    message = refused(SourceError, "timm:test_resnet", pretrained=True)
    assert "cannot reach the hub" in message
    assert "names its own weights" in refused(UsageError, "hf-hub:me/mine", random=True)


def test_available_models() -> None:
    names = available_models()
    assert ("torchvision", "googlenet") in names
    assert ("timm", "test_resnet") in names
    assert len(names) == len(set(names)) > 1000
    assert available_models("squeezenet*") == [("torchvision", "squeezenet1_0"), ("torchvision", "squeezenet1_1")]
    assert {library for library, _ in available_models("resnet18")} == {"torchvision", "timm"}
    assert available_models("nothing*") == []
    assert not any("quantized" in name or "fcn" in name for library, name in names if library == "torchvision")


def test_logits_of_all_kinds_of_output() -> None:
    main, other, third = torch.ones(2, 3), torch.zeros(2, 3), torch.full((2, 3), 2.0)
    assert logits(main) is main
    assert auxiliary_logits(main) == ()
    googlenet = torchvision.models.GoogLeNetOutputs(main, other, third)
    assert logits(googlenet) is main
    assert [tensor.sum() for tensor in auxiliary_logits(googlenet)] == [0, 12]
    assert auxiliary_logits(torchvision.models.GoogLeNetOutputs(main, None, None)) == ()
    inception = torchvision.models.InceptionOutputs(main, other)
    assert logits(inception) is main
    assert auxiliary_logits(inception)[0] is other
    assert logits((main, other)) is main
    assert auxiliary_logits((main, other, torch.ones(4))) == (other,)
    assert logits({"logits": main, "loss": other}) is main
    for nothing in (None, (), {"scores": main}, "text"):
        with pytest.raises(SourceError, match="class scores"):
            logits(nothing)


def test_training_outputs_of_networks_with_several_heads() -> None:
    with torch.device("meta"):
        googlenet = torchvision.models.googlenet(init_weights=False).train()
        deit = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32).train()
        set_training: Any = deit.set_distilled_training
        set_training(True)
        for model, side, heads in ((googlenet, 64, 2), (deit, 32, 1)):
            output = model(torch.zeros(2, 3, side, side))
            assert logits(output).shape == (2, 1000)
            assert len(auxiliary_logits(output)) == heads


def test_input_spec_dictionaries() -> None:
    spec = InputSpec(1, 8, 9, (0.1,), (0.2,), "nearest", 0.9, "squash")
    assert InputSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert InputSpec.from_dict({"size": 8}) == InputSpec(3, 8, 8, IMAGENET_MEAN, IMAGENET_STD)
    assert InputSpec.from_dict({"size": [8, 9]}).width == 9
    assert InputSpec.from_dict({"size": 8, "channels": 1}).mean == pytest.approx((0.449,))
    with pytest.raises(UsageError, match="did you mean 'mean'"):
        InputSpec.from_dict({"size": 8, "meen": [0.5]})
    with pytest.raises(UsageError, match="input size is not known"):
        InputSpec.from_dict({})


def test_resize_gives_back_the_side_before_the_crop() -> None:
    for crop in range(16, 520):
        for resize in (crop, crop + 8, crop + 32, 2 * crop - 1):
            assert InputSpec(3, crop, crop, crop_pct=crop / resize).resize == resize
    assert InputSpec(3, 224, 224, crop_pct=0.95).resize == 235  # timm rounds 235.8 down
