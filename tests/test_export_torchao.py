"""Export to torchao's layout, loaded by torchao's own functions: the same bits and the same logits."""

import copy
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from c_networks import constrained, mobile, resnet20, write_digits
from safetensors import safe_open
from small_job import command, one_line
from torch import Tensor, nn
from torch.nn import functional

from cbpq.errors import CbpqError, MissingPartError, UsageError, require_extra
from cbpq.exports import export
from cbpq.exports import torchao as torchao_export
from cbpq.exports.torchao import export_torchao
from cbpq.fileformat import CbpqFile, ConstrainedTensor
from cbpq.inputs import InputSpec
from cbpq.model_file import load

pytestmark = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
TINY = InputSpec(3, 4, 4)


def loaded_by_torchao(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """As the documentation says: tensors, those that torchao leaves alone, metadata."""
    layout: Any = require_extra("torchao.prototype.safetensors.safetensors_support", "torchao")
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
        metadata = file.metadata()
    state, rest = layout.unflatten_tensor_state_dict(tensors, metadata)
    return state, rest, metadata


def pictures(spec: InputSpec, count: int = 3) -> Tensor:
    return torch.randn(count, spec.channels, spec.height, spec.width, generator=torch.Generator().manual_seed(1))


def check(path: Path, model: nn.Module, file: CbpqFile, spec: InputSpec, integers: dict[str, str]) -> None:
    """Every tensor equal to the bit, codes and types as expected, logits equal."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    state, rest, metadata = loaded_by_torchao(path)
    found = state | rest
    assert found.keys() == model.state_dict().keys()
    assert {name for name, value in found.items() if type(value) is not Tensor} == integers.keys()
    for name, expected in model.state_dict().items():
        value = found[name]
        if name in integers:
            tensor = file.constrained[name]
            assert type(value) is IntxUnpackedToInt8Tensor
            assert value.target_dtype == getattr(torch, integers[name])
            assert value.qdata.dtype == torch.int8
            assert (value.qdata.numpy() == tensor.codes).all()
            assert value.scale.numel() == tensor.scale.size
            assert not value.zero_point.any()
            assert value.dequantize().numpy().tobytes() == tensor.weight().tobytes(), name
            value = value.dequantize()
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected), name
    assert metadata["format"] == "pt"
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(found, assign=True)
    assert all(type(other.get_parameter(name).data) is IntxUnpackedToInt8Tensor for name in integers)
    with torch.no_grad():
        ours, theirs = model(pictures(spec)), other(pictures(spec))
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], InputSpec]] = {
    "torchvision resnet18": (lambda: torchvision.models.resnet18(num_classes=7), InputSpec(3, 32, 32)),
    "depthwise": (mobile, InputSpec(3, 24, 32)),
    "resnet20 with its classifier": (resnet20, InputSpec(3, 32, 32)),
    "timm vision transformer": (
        lambda: timm.create_model("test_vit", num_classes=9, img_size=32),
        InputSpec(3, 32, 32),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_the_libraries(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    build, spec = NETWORKS[name]
    model = build().eval()
    # tokens and positions of a transformer are no layer's weight
    file = constrained(model, "two-bit-shift", "ternary", keep=("cls_token", "pos_embed", "reg_token"))
    result = export_torchao(model, file, spec, tmp_path / "x.safetensors")
    integers = {name: "int2" if tensor.constraint == "ternary" else "int4" for name, tensor in file.constrained.items()}
    check(tmp_path / "x.safetensors", model, file, spec, integers)
    assert result.facts["integer_weights"].keys() == {"int2", "int4"}
    assert sum(result.facts["integer_weights"].values()) == len(file.constrained)
    assert result.facts["float_weights"] == []
    assert result.facts["max_difference"] <= 1e-5 * result.facts["max_logit"]
    assert result.size == (tmp_path / "x.safetensors").stat().st_size
    weights = sum(tensor.codes.size for tensor in file.constrained.values())
    others = sum(array.nbytes for array in file.others.values())
    assert weights + others < result.size < weights + others + 600 * len(model.state_dict())
    assert "not faster" in result.notes[0]


class Linears(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(48, 48))

    def forward(self, images: Tensor) -> Any:
        values = images.flatten(1)
        for layer in self.children():
            values = layer(values).relu()
        return values - 0.1


def linears(*names: str) -> Linears:
    torch.manual_seed(0)
    return Linears(*names).eval()


@pytest.mark.parametrize(
    "levels, kind",
    [
        *(((-1, 0), "int1"), ((-1, 1), "int2"), ((-2, 1), "int2"), ((-2, 2), "int3"), ((-8, 7), "int4")),
        *(((1, 8), "int5"), ((0, 63), "int7"), ((-64, 0, 64), "int8"), ((-128, 127), "int8")),
    ],
)
def test_levels_decide_the_type(tmp_path: Path, levels: tuple[int, ...], kind: str) -> None:
    model = linears("a", "b")
    file = constrained(model)
    codes = torch.tensor(levels)[torch.randint(len(levels), (48, 48))].numpy().astype("int32")
    tensor = file.constrained["a.weight"] = ConstrainedTensor(
        codes, file.constrained["a.weight"].scale, levels, 3, "made up"
    )
    model.get_parameter("a.weight").data.copy_(torch.from_numpy(tensor.weight()))
    result = export_torchao(model, file, TINY, tmp_path / "x.safetensors")
    check(tmp_path / "x.safetensors", model, file, TINY, {"a.weight": kind, "b.weight": "int4"})
    assert result.facts["integer_weights"] == ({"int4": 2} if kind == "int4" else {kind: 1, "int4": 1})


@pytest.mark.parametrize("levels", [(-129, 0), (0, 128)])
def test_levels_beyond_eight_bits_stay_float(tmp_path: Path, levels: tuple[int, ...]) -> None:
    model = linears("a", "b")
    file = constrained(model)
    codes = torch.tensor(levels)[torch.randint(2, (48, 48))].numpy()
    scale = file.constrained["a.weight"].scale
    tensor = file.constrained["a.weight"] = ConstrainedTensor(codes, scale, levels, 128, "made up")
    model.get_parameter("a.weight").data.copy_(torch.from_numpy(tensor.weight()))
    result = export_torchao(model, file, TINY, tmp_path / "x.safetensors")
    assert result.facts["float_weights"] == ["a.weight"]
    check(tmp_path / "x.safetensors", model, file, TINY, {"b.weight": "int4"})


class Unusual(nn.Module):
    """Weights that torchao's tensor cannot be used as: each in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.line = nn.Conv1d(8, 8, 1)
        self.turned, self.named, self.both = (nn.Linear(8, 8) for _ in range(3))
        self.spare = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)
        self.token = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2) + self.token
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.line(x.transpose(1, 2)).transpose(1, 2)
        x = x @ self.turned.weight.T + self.turned.bias
        x = functional.linear(x, self.named.weight, bias=self.named.bias)
        x = self.both(x) * self.both.weight.sum()
        scores: Tensor = self.head(x.mean(1))
        return scores


def test_what_torchao_cannot_compute_with_stays_float_and_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Unusual().eval()
    file = constrained(model)
    result = export_torchao(model, file, TINY, tmp_path / "x.safetensors")
    floats = ("attention.in_proj", "attention.out_proj.", "line.", "turned.", "named.", "both.", "spare.")
    names = [f"{name}_weight" if name.endswith("proj") else f"{name}weight" for name in floats]
    assert result.facts["float_weights"] == sorted([*names, "token"])
    check(tmp_path / "x.safetensors", model, file, TINY, {"stem.weight": "int4", "head.weight": "int4"})


def test_a_network_of_such_weights_alone_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(48, 2)  # its weight is called just that
    whole = nn.Sequential(nn.Flatten(), nn.MultiheadAttention(48, 2)).eval()
    for network in (model, whole):
        network.forward = lambda images, n=network: images.flatten(1) @ next(n.parameters()).T[:48]  # type: ignore
        with pytest.raises(CbpqError, match="none of the constrained weights; export as state-dict"):
            export_torchao(network, constrained(network), TINY, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_shared_weight_is_an_integer_under_all_its_names(tmp_path: Path) -> None:
    model = linears("a", "b", "c")
    model.get_submodule("c").weight = model.get_parameter("a.weight")
    file = constrained(model)
    assert file.others.keys() >= {"c.weight"}
    export_torchao(model, file, TINY, tmp_path / "x.safetensors")
    both = CbpqFile(file.constrained | {"c.weight": file.constrained["a.weight"]}, {}, {}, {}, {})
    check(tmp_path / "x.safetensors", model, both, TINY, dict.fromkeys(("a.weight", "b.weight", "c.weight"), "int4"))


def test_equal_content_gives_equal_bytes_and_nothing_else_changes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = linears("a", "b", "c").train()
    file = constrained(model)
    turned = CbpqFile(dict(reversed(file.constrained.items())), dict(reversed(file.others.items())), {}, {}, {})
    before = copy.deepcopy(model.state_dict())
    export_torchao(model, file, TINY, tmp_path / "a.safetensors")
    export_torchao(copy.deepcopy(model), turned, TINY, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert tuple(capfd.readouterr()) == ("", "")
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(list(tmp_path.iterdir())) == 2


def flattened(change: Callable[[dict[str, Any], dict[str, str]], None]) -> Callable[..., bytes]:
    """What `_with_metadata` writes, changed."""
    plain = torchao_export._with_metadata

    def spoilt(data: bytes, metadata: dict[str, str]) -> bytes:
        from safetensors.torch import load as tensors_of
        from safetensors.torch import save

        tensors, texts = tensors_of(data), dict(metadata)
        change(tensors, texts)
        return plain(save(tensors), texts)

    return spoilt


def another_code(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    tensors["b._weight_qdata"][3, 3] += 1


def another_scale(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    tensors["b._weight_scale"] *= 1.0000002


def another_bias(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    tensors["b.bias"] += 1


def no_codes(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    del tensors["b._weight_qdata"]


def another_class(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    metadata["b.weight"] = json.dumps(json.loads(metadata["b.weight"]) | {"_type": "Int99Tensor"})


@pytest.mark.parametrize(
    "change, message",
    [
        (another_code, r"b\.weight does not read back"),
        (another_scale, r"b\.weight does not read back"),
        (another_bias, r"b\.bias does not read back"),
        (no_codes, "other names"),
        (another_class, r"torchao .* does not load its own layout: .*Int99Tensor"),
    ],
)
def test_what_torchao_does_not_load_equally_is_not_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, Any], dict[str, str]], None],
    message: str,
) -> None:
    model = linears("a", "b")
    file = constrained(model)
    monkeypatch.setattr(torchao_export, "_with_metadata", flattened(change))
    (tmp_path / "x.safetensors").write_bytes(b"old")
    with pytest.raises(CbpqError, match=message) as caught:
        export_torchao(model, file, TINY, tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
    export_torchao(model, file, TINY, tmp_path / "x.safetensors", check=False)  # nobody looked


def test_names_that_torchao_confuses_are_found_by_the_check(tmp_path: Path) -> None:
    model = linears("a", "b")
    model.get_submodule("a").register_buffer("weight_2", torch.zeros(3))
    model.get_submodule("a").register_buffer("_weight_x", torch.zeros(3))  # torchao takes it for a part of a.weight
    with pytest.raises(CbpqError, match="other names"):
        export_torchao(model, constrained(model), TINY, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


# The dispatcher and the command.


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_digits(tmp_path)
    out = tmp_path / "digits.safetensors"
    done = command("export", path, "--format", "torchao", "-o", out, "--json")
    assert done.code == 0, done.err
    facts = done.document()
    assert (facts["format"], facts["float_weights"], facts["size"]) == ("torchao", [], out.stat().st_size)
    loaded = load(path)
    state, rest, _ = loaded_by_torchao(out)
    images = pictures(loaded.info.input_spec)
    with torch.no_grad():
        expected = loaded.model(images)
        loaded.model.load_state_dict(state | rest, assign=True)
        assert torch.allclose(loaded.model(images), expected, rtol=0, atol=1e-5)

    # without the format's name it is a plain state dict
    assert command("export", path, "-o", tmp_path / "plain.safetensors", "--json").document()["format"] == "state-dict"
    one_line(command("export", path, "--format", "torchao", "-o", tmp_path / "x.pth"), 2, "end in .safetensors")
    one_line(command("export", path, "--format", "torchao", "-o", out), 2, "exists")
    monkeypatch.setitem(sys.modules, "torchao", None)  # what Python does for a package that cannot be imported
    arguments = ("export", path, "--format", "torchao", "-o", tmp_path / "x.safetensors")
    one_line(command(*arguments), 4, 'torchao is not installed; run: pip install "cbpq[torchao]"')
    assert not (tmp_path / "x.safetensors").exists()


def test_the_dispatcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = linears("a")
    file = constrained(model)
    monkeypatch.setattr(torchao_export, "_checked", lambda *_: pytest.fail("it ran"))
    result = export(file, "torchao", tmp_path / "x.safetensors", model=model, spec=TINY, check=False)
    assert "max_difference" not in result.to_dict()
    with pytest.raises(UsageError, match="torchao has no option 'opset'"):
        export(file, "torchao", tmp_path / "y.safetensors", model=model, spec=TINY, opset=21)
    monkeypatch.setitem(sys.modules, "torchao.prototype.safetensors.safetensors_support", None)
    with pytest.raises(MissingPartError, match=r"cbpq\[torchao\]"):
        export(file, "torchao", tmp_path / "y.safetensors", model=model, spec=TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
