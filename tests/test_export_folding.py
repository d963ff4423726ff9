"""Export to a state dict without BatchNorm layers: torch's own fused networks take it and compute the same."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from c_networks import constrained, mobile, write_digits
from small_job import command, one_line
from torch import Tensor, nn
from torch.fx.experimental import optimization
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cbpq.errors import CbpqError, UsageError
from cbpq.exports import export, folding
from cbpq.exports.folding import Fold, export_folded, find_folds, folded_state, without_norms
from cbpq.fileformat import read, write
from cbpq.inputs import InputSpec
from cbpq.model_file import load

SPEC = InputSpec(3, 32, 32)
TINY = InputSpec(3, 4, 4)


def experienced(model: nn.Module, seed: int = 0) -> nn.Module:
    """BatchNorm layers as after training, so that folding changes something."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                *((module.running_mean, -0.2, 0.2), (module.running_var, 0.3, 2.0)),
                *((module.weight, -1.5, 1.5), (module.bias, -0.3, 0.3)),
            ):
                if tensor is not None:
                    tensor.data.uniform_(low, high, generator=generator)
    return model.eval()


def pictures(spec: InputSpec = SPEC, count: int = 3) -> Tensor:
    return torch.randn(count, spec.channels, spec.height, spec.width, generator=torch.Generator().manual_seed(1))


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def fused_resnet(model: nn.Module) -> nn.Module:
    """torchvision's ResNet with basic blocks, fused pair by pair as its code runs them."""
    fused: Any = copy.deepcopy(model)
    blocks = [block for number in range(1, 5) for block in getattr(fused, f"layer{number}")]
    for owner, pairs in [(fused, ["1"]), *((block, ["1", "2"]) for block in blocks)]:
        for number in pairs:
            convolution, norm = getattr(owner, f"conv{number}"), getattr(owner, f"bn{number}")
            setattr(owner, f"conv{number}", fuse_conv_bn_eval(convolution, norm))
            setattr(owner, f"bn{number}", nn.Identity())
        if getattr(owner, "downsample", None) is not None:
            owner.downsample = nn.Sequential(fuse_conv_bn_eval(*owner.downsample), nn.Identity())
    whole: nn.Module = fused
    return whole


@torch.no_grad()
def test_a_resnet_fused_by_torch_loads_it_strictly_and_computes_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = experienced(torchvision.models.resnet18(num_classes=7))
    file = constrained(model)
    result = export_folded(model, file, SPEC, tmp_path / "x.pth")
    state = torch.load(tmp_path / "x.pth", weights_only=True)

    other = fused_resnet(model)
    for name, tensor in other.state_dict().items():
        assert torch.equal(state[name], tensor), name  # torch's own arithmetic, to the bit
    for parameter in other.parameters():
        parameter.zero_()
    other.load_state_dict(state, strict=True)
    assert_close(other(pictures()), model(pictures()))
    assert not torch.equal(other.get_parameter("conv1.weight"), model.get_parameter("conv1.weight"))
    assert result.facts["folded_batch_norms"] == 20
    assert result.facts["batch_norms_left"] == []
    assert 0 <= result.facts["max_difference"] <= 1e-4 * result.facts["max_logit"]
    assert result.size == (tmp_path / "x.pth").stat().st_size


@torch.no_grad()
@pytest.mark.parametrize("extension", [".pth", ".safetensors"])
def test_depthwise_convolutions(tmp_path: Path, extension: str) -> None:
    torch.manual_seed(0)
    model = experienced(mobile())
    out = tmp_path / f"x{extension}"
    result = export_folded(model, constrained(model, "ternary"), SPEC, out)
    state = torch.load(out, weights_only=True) if extension == ".pth" else safetensors.torch.load_file(out)
    fused = optimization.fuse(experienced(mobile(), seed=9))
    fused.load_state_dict(state, strict=True)
    assert_close(fused(pictures()), model(pictures()))
    assert result.facts["folded_batch_norms"] == 10


@torch.no_grad()
def test_a_folded_weight_is_a_level_times_a_factor_of_its_channel(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = experienced(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5 * 36, 2)))
    file = constrained(model, "two-bit-shift")
    spec = InputSpec(3, 8, 8)
    export_folded(model, file, spec, tmp_path / "x.pth")
    state = torch.load(tmp_path / "x.pth", weights_only=True)
    assert state.keys() == {"0.weight", "0.bias", "3.weight", "3.bias"}
    for weight, codes in zip(state["0.weight"], file.constrained["0.weight"].codes, strict=True):
        assert len(weight.unique()) <= 7
        factor = (weight / torch.from_numpy(codes))[torch.from_numpy(codes) != 0]
        np.testing.assert_allclose(factor, factor[0], rtol=1e-6)
    assert state["3.weight"].numpy().tobytes() == file.constrained["3.weight"].weight().tobytes()


class Shape(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, values: Tensor) -> Tensor:
        return values.reshape(len(values), *self.sizes)


class Branching(nn.Module):
    """One of each kind of BatchNorm that stays, and of each that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.pre_norm = nn.BatchNorm2d(3)  # at the input
        self.stem, self.stem_norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.twice, self.twice_norm = nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6)  # the layer is used twice
        self.one, self.two, self.shared_norm = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.read, self.read_norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)  # its output is used elsewhere too
        self.late, self.late_norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)  # an activation between
        self.batch, self.batch_norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6, track_running_stats=False)
        self.plain, self.plain_norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6, affine=False)
        self.changed, self.changed_norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)  # its weight is not what it multiplies
        # as many tokens as channels: BatchNorm looks at the tokens
        self.tokens, self.tokens_norm = nn.Linear(6, 36), nn.BatchNorm1d(36)
        self.line, self.line_norm = nn.Conv1d(36, 4, 1), nn.BatchNorm1d(4)
        self.hidden, self.hidden_norm = nn.Linear(144, 8, bias=False), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(self.pre_norm(x))).relu_()
        x = self.twice(self.twice_norm(self.twice(x)))
        x = self.shared_norm(self.one(x)) + self.shared_norm(self.two(x))
        y = self.read(x)
        x = self.read_norm(y) + y
        x = self.late_norm(self.late(x).relu())
        x = x + self.batch_norm(self.batch(x)) + self.plain_norm(self.plain(x))
        x = self.changed_norm(nn.functional.conv2d(x, self.changed.weight * 2, self.changed.bias))
        tokens = self.tokens_norm(self.tokens(x.flatten(2).transpose(1, 2)))
        lines = self.line_norm(self.line(tokens)).flatten(1)
        scores: Tensor = self.head(self.hidden_norm(self.hidden(lines)).tanh())
        return scores


@torch.no_grad()
def test_what_cannot_be_folded_stays_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = InputSpec(3, 6, 6)
    model = experienced(Branching())
    file = constrained(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert find_folds(model, spec) == [
        Fold("stem", "stem_norm"),
        Fold("plain", "plain_norm"),
        Fold("line", "line_norm"),
        Fold("hidden", "hidden_norm"),
    ]
    result = export_folded(model, file, spec, tmp_path / "x.pth")
    left = [f"{name}_norm" for name in ("pre", "twice", "shared", "read", "late", "batch", "changed", "tokens")]
    left[5] = "batch_norm"
    assert result.facts["batch_norms_left"] == left
    assert result.facts["folded_batch_norms"] == 4
    state = torch.load(tmp_path / "x.pth", weights_only=True)
    gone = {"stem_norm", "plain_norm", "line_norm", "hidden_norm"}
    expected = {name for name in before if name.partition(".")[0] not in gone} | {"hidden.bias"}
    assert state.keys() == expected
    for name in expected - {
        f"{layer}.{key}" for layer in ("stem", "plain", "line", "hidden") for key in ("weight", "bias")
    }:
        assert torch.equal(state[name], before[name]), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    other: Any = Branching().eval()
    for name in gone:
        setattr(other, name, nn.Identity())
    other.hidden.bias = nn.Parameter(torch.zeros(8))
    other.load_state_dict(state, strict=True)
    assert_close(other(pictures(spec)), model(pictures(spec)))


@torch.no_grad()
def test_batch_norms_with_an_activation_inside(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = experienced(timm.create_model("test_efficientnet", num_classes=5))
    result = export_folded(model, constrained(model), SPEC, tmp_path / "x.pth")
    assert result.facts["folded_batch_norms"] == 13
    other = without_norms(timm.create_model("test_efficientnet", num_classes=5).eval(), find_folds(model, SPEC))
    other.load_state_dict(torch.load(tmp_path / "x.pth", weights_only=True), strict=True)
    assert_close(other(pictures()), model(pictures()))


class WithSlope(nn.BatchNorm2d):
    """Has an activation inside, with a parameter of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.PReLU()

    def forward(self, values: Tensor) -> Tensor:
        slope: Tensor = self.act(super().forward(values))
        return slope


@torch.no_grad()
def test_what_a_batch_norm_has_inside_stays(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = experienced(nn.Sequential(nn.Conv2d(3, 4, 3), WithSlope(4), nn.Flatten(), nn.Linear(16, 2)))
    export_folded(model, constrained(model), TINY, tmp_path / "x.pth")
    state = torch.load(tmp_path / "x.pth", weights_only=True)
    assert state.keys() == {"0.weight", "0.bias", "1.act.weight", "3.weight", "3.bias"}
    other = without_norms(model, find_folds(model, TINY))
    other.load_state_dict(state, strict=True)
    assert_close(other(pictures(TINY)), model(pictures(TINY)))


def test_a_network_without_batch_norm_is_written_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=5, img_size=32).eval()
    file = constrained(model)
    result = export_folded(model, file, SPEC, tmp_path / "x.pth")
    assert (result.facts["folded_batch_norms"], result.facts["batch_norms_left"]) == (0, [])
    export(file, "state-dict", tmp_path / "plain.pth")
    assert (tmp_path / "x.pth").read_bytes() == (tmp_path / "plain.pth").read_bytes()


def tiny() -> nn.Module:
    return experienced(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)))


def spoil_a_bias(state: dict[str, Tensor]) -> None:
    state["0.bias"] = state["0.bias"] + 1


def spoil_a_name(state: dict[str, Tensor]) -> None:
    state["1.weight"] = state["0.bias"].clone()


@pytest.mark.parametrize(
    "spoil, message", [(spoil_a_bias, "other logits"), (spoil_a_name, "rejects the network: .*Unexpected key")]
)
def test_what_computes_something_else_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    def spoilt(*arguments: Any) -> dict[str, Tensor]:
        state = folded_state(*arguments)
        spoil(state)
        return state

    monkeypatch.setattr(folding, "folded_state", spoilt)
    model = tiny()
    (tmp_path / "x.pth").write_bytes(b"old")
    with pytest.raises(CbpqError, match=message):
        export_folded(model, constrained(model), TINY, tmp_path / "x.pth")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
    export_folded(model, constrained(model), TINY, tmp_path / "x.pth", check=False)  # nobody looked
    assert (tmp_path / "x.pth").read_bytes() != b"old"


def test_a_value_too_large_for_float32_is_named(tmp_path: Path) -> None:
    model: Any = tiny()
    model[1].weight.data[1] = 1e38
    model[1].running_var[1] = 0.0
    with pytest.raises(CbpqError, match=r"1 folded into 0\.weight is too large for float32"):
        export_folded(model, constrained(model), TINY, tmp_path / "x.pth", check=False)
    assert not list(tmp_path.iterdir())


def test_a_network_that_torch_cannot_follow_is_one_line(tmp_path: Path) -> None:
    class Choosing(nn.Linear):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.flatten(1) if images.sum() > 0 else -images.flatten(1))

    model = Choosing(48, 2).eval()
    with pytest.raises(CbpqError, match="cannot follow the code of Choosing") as caught:
        export_folded(model, constrained(model), TINY, tmp_path / "x.pth")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


# The dispatcher and the command.


def test_the_network_is_needed_for_folding_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    file = constrained(model)  # does not say which network it is
    export(file, "state-dict", tmp_path / "a.pth", fold_bn=False)
    result = export(file, "state-dict", tmp_path / "b.pth", fold_bn=True, model=model, spec=TINY)
    assert result.to_dict()["folded_batch_norms"] == 1
    with pytest.raises(CbpqError, match="source"):
        export(file, "state-dict", tmp_path / "c.pth", fold_bn=True)
    other = copy.deepcopy(model)
    other.get_parameter("0.weight").data[0] += 1
    with pytest.raises(CbpqError, match=r"does not hold the file's 0\.weight"):
        export(file, "state-dict", tmp_path / "c.pth", fold_bn=True, model=other, spec=TINY)
    with pytest.raises(UsageError, match="c has no option 'fold_bn'"):
        export(file, "c", tmp_path / "c", fold_bn=True, model=model, spec=TINY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "b.pth"]


@torch.no_grad()
def test_the_command(tmp_path: Path) -> None:
    path = write_digits(tmp_path)
    out = tmp_path / "folded.safetensors"
    done = command("export", path, "--fold-bn", "-o", out, "--json")
    assert done.code == 0, done.err
    facts = done.document()
    assert (facts["format"], facts["batch_norms_left"]) == ("state-dict", [])
    loaded = load(path)
    fused = without_norms(loaded.model, find_folds(loaded.model, loaded.info.input_spec))
    fused.load_state_dict(safetensors.torch.load_file(out), strict=True)
    images = pictures(loaded.info.input_spec)
    assert_close(fused(images), loaded.model(images))
    assert sum(isinstance(module, nn.BatchNorm2d) for module in loaded.model.modules()) == facts["folded_batch_norms"]

    one_line(command("export", path, "--fold-bn", "-o", tmp_path / "x.onnx"), 2, "onnx has no option 'fold_bn'")
    one_line(command("export", path, "--fold-bn", "-o", out), 2, "exists")
    mine = replace(read(path), source={**read(path).source, "library": "callable", "architecture": "nets:make"})
    write(tmp_path / "mine.safetensors", mine)
    asked = one_line(command("export", tmp_path / "mine.safetensors", "--fold-bn", "-o", tmp_path / "x.pth"), 2)
    assert "--arch nets:make" in asked
    assert not (tmp_path / "x.pth").exists()
