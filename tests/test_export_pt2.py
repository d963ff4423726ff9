"""Export to a program of torch.export: it runs where there is neither cbpq nor the code of the network."""

import copy
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
import torchvision
from c_networks import constrained, mobile, write_digits
from small_job import ROOT, command, one_line
from torch import Tensor, nn

from cbpq.errors import CbpqError, UsageError
from cbpq.exports import Exported, export
from cbpq.exports import pt2 as pt2_export
from cbpq.exports.pt2 import export_pt2
from cbpq.fileformat import CbpqFile, ConstrainedTensor
from cbpq.inputs import InputSpec
from cbpq.model_file import load
from cbpq.models import logits

pytestmark = pytest.mark.medium  # translates networks

TINY = InputSpec(3, 4, 4)
# what runs a program in a process of its own, where only torch can be imported
ALONE = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("cbpq", "timm", "torchvision", "safetensors", "c_networks"):
            raise ImportError(name + " is not here")

sys.meta_path.insert(0, Nothing())
import torch

torch.set_num_threads(1)
for path in sys.argv[1:]:
    images = torch.load(path + ".in", weights_only=True)
    with torch.no_grad():
        run = torch.export.load(path).module()
        torch.save([run(images), run(images[:1])], path + ".out")
assert not {"cbpq", "timm", "torchvision"} & sys.modules.keys()
"""


def pictures(spec: InputSpec, count: int = 3) -> Tensor:
    return torch.randn(count, spec.channels, spec.height, spec.width, generator=torch.Generator().manual_seed(1))


def program(path: Path) -> Any:
    return torch.export.load(path)


def check(path: Path, model: nn.Module, file: CbpqFile, spec: InputSpec) -> dict[str, Tensor]:
    """Logits equal for several numbers of pictures; codes and steps in the place of every constrained weight."""
    loaded = program(path)
    for count in (1, 2, 5):
        with torch.no_grad():
            ours, theirs = logits(model(pictures(spec, count))), loaded.module()(pictures(spec, count))
        assert theirs.dtype == torch.float32
        assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()
    state: dict[str, Tensor] = {name.removeprefix("network."): value for name, value in loaded.state_dict.items()}
    for name, tensor in file.constrained.items():
        codes, step = state[f"{name}_codes"], state[f"{name}_step"]
        assert name not in state
        assert codes.dtype == torch.int8
        assert np.array_equal(codes.numpy(), tensor.codes)
        assert step.numel() == tensor.scale.size
        assert (codes * step).numpy().tobytes() == tensor.weight().tobytes(), name
    return state


class Mine(nn.Module):
    """A user's own module, with attention, whose code is nowhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)
        self.token = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.stem(images)).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return {"logits": self.head(x[:, 0])}


NETWORKS: dict[str, tuple[Callable[[], nn.Module], InputSpec]] = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=7), InputSpec(3, 32, 32)),
    "depthwise": (mobile, InputSpec(3, 24, 32)),
    "mine": (Mine, TINY),
    "vit": (lambda: timm.create_model("test_vit", num_classes=9, img_size=32), InputSpec(3, 32, 32)),
}


class Written(NamedTuple):
    path: Path
    model: nn.Module
    file: CbpqFile
    spec: InputSpec
    result: Exported


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    made = {}
    folder = tmp_path_factory.mktemp("programs")
    for name, (build, spec) in NETWORKS.items():
        torch.manual_seed(0)
        model, path = build().eval(), folder / f"{name}.pt2"
        file = constrained(model, "two-bit-shift", "ternary", keep=("token", "cls_token", "pos_embed", "reg_token"))
        made[name] = Written(path, model, file, spec, export_pt2(model, file, spec, path))
    return made


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_are_codes_and_logits_are_equal(programs: dict[str, Written], name: str) -> None:
    path, model, file, spec, result = programs[name]
    state = check(path, model, file, spec)
    assert result.facts["integer_weights"] == len(file.constrained)
    assert result.facts["batch"] == "any"
    assert result.facts["max_difference"] <= 1e-5 * result.facts["max_logit"]
    assert result.size == path.stat().st_size
    # a byte for each constrained weight, and the text of the program
    content = sum(value.numel() * value.element_size() for value in state.values())
    assert content < result.size < content + 4000 * len(state)


def test_they_run_where_there_is_nothing_but_torch(programs: dict[str, Written]) -> None:
    for path, _, _, spec, _ in programs.values():
        torch.save(pictures(spec), f"{path}.in")
    paths = [str(written.path) for written in programs.values()]
    subprocess.run([sys.executable, "-I", "-c", ALONE, *paths], check=True, timeout=300)
    for path, model, _, spec, _ in programs.values():
        several, one = torch.load(f"{path}.out", weights_only=True)
        with torch.no_grad():
            expected = logits(model(pictures(spec)))
        assert (several - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (one - expected[:1]).abs().max() <= 1e-5 * expected.abs().max()


class Linears(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(48, 48))

    def forward(self, images: Tensor) -> Any:
        values = images.flatten(1)
        for name, layer in self.named_children():
            if not name.startswith("aux"):
                values = layer(values).relu()
        return values - 0.1


def linears(*names: str, kind: type[Linears] = Linears) -> Linears:
    torch.manual_seed(0)
    return kind(*names).eval()


def test_weights_are_decoded_where_they_are_needed(tmp_path: Path) -> None:
    model = linears("a", "b", "aux")
    file = constrained(model)
    export_pt2(model, file, TINY, tmp_path / "x.pt2")
    check(tmp_path / "x.pt2", model, file, TINY)
    nodes = [str(node.target) for node in program(tmp_path / "x.pt2").graph.nodes if node.op == "call_function"]
    decoding = ["aten.mul.Tensor", "aten.linear.default", "aten.relu.default"]
    assert [name for name in nodes if name in decoding] == decoding * 2


def test_levels_beyond_eight_bits(tmp_path: Path) -> None:
    model = linears("a")
    levels = (-(2**24), 129, 2**24)
    codes = torch.tensor(levels)[torch.randint(3, (48, 48))].numpy().astype("int32")
    tensor = ConstrainedTensor(codes, np.float32(0.3), levels, 2**23, "made up")  # type: ignore[arg-type]
    model.get_parameter("a.weight").data.copy_(torch.from_numpy(tensor.weight()))
    file = CbpqFile({"a.weight": tensor}, {"a.bias": model.get_parameter("a.bias").detach().numpy()}, {}, {}, {})
    export_pt2(model, file, TINY, tmp_path / "x.pt2")
    state = program(tmp_path / "x.pt2").state_dict
    codes_back, step = state["network.a.weight_codes"], state["network.a.weight_step"]
    assert codes_back.dtype == torch.int32
    assert (codes_back * step).numpy().tobytes() == tensor.weight().tobytes()


def test_a_shared_weight_is_stored_once(tmp_path: Path) -> None:
    model = linears("a", "b", "c")
    model.get_submodule("c").weight = model.get_parameter("a.weight")
    file = constrained(model)
    first = file.constrained["a.weight"]
    both = CbpqFile(file.constrained | {"c.weight": first}, {}, {}, {}, {})
    moved = CbpqFile({"b.weight": file.constrained["b.weight"], "c.weight": first}, {}, {}, {}, {})
    for content, named in ((file, "a"), (both, "a"), (moved, "c")):
        export_pt2(model, content, TINY, tmp_path / "x.pt2")
        state = check(tmp_path / "x.pt2", model, CbpqFile({f"{named}.weight": first}, {}, {}, {}, {}), TINY)
        assert sum(name.endswith("_codes") for name in state) == 2
        assert not any(name.endswith(".weight") for name in state)


class OneAtATime(Linears):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images) + torch.zeros(len(images), 1)


class Choosing(Linears):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images if images.sum() > 0 else -images)


def test_a_network_for_one_picture_at_a_time(tmp_path: Path) -> None:
    model = linears("a", kind=OneAtATime)
    result = export_pt2(model, constrained(model), TINY, tmp_path / "x.pt2")
    assert result.facts["batch"] == 1
    assert "one picture at a time" in result.notes[-1]
    with torch.no_grad():
        images = pictures(TINY, 1)
        assert torch.equal(program(tmp_path / "x.pt2").module()(images), model(images))


def test_a_network_that_torch_cannot_follow_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = linears("a", kind=Choosing)
    with pytest.raises(CbpqError, match="cannot follow the code of Choosing") as caught:
        export_pt2(model, constrained(model), TINY, tmp_path / "x.pt2")
    assert "\n" not in str(caught.value)
    assert tuple(capfd.readouterr()) == ("", "")
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_taken_is_told(tmp_path: Path) -> None:
    model = linears("a")
    model.get_submodule("a").register_buffer("weight_codes", torch.zeros(1))
    with pytest.raises(CbpqError, match=r"a\.weight: the network has something named weight_codes"):
        export_pt2(model, constrained(model), TINY, tmp_path / "x.pt2")
    assert not list(tmp_path.iterdir())


def test_operators_of_others_are_named(tmp_path: Path) -> None:
    library = torch.library.Library("cbpq_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")

    class Foreign(Linears):
        def forward(self, images: Tensor) -> Any:
            return torch.ops.cbpq_test.twice(super().forward(images))

    torch.library.register_fake("cbpq_test::twice", lambda x: torch.empty_like(x), lib=library)
    model = linears("a", kind=Foreign)
    result = export_pt2(model, constrained(model), TINY, tmp_path / "x.pt2")
    assert "operators of cbpq_test" in result.notes[-1]


def test_equal_content_gives_equal_bytes_that_tell_nothing_of_this_machine(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = linears("a", "b").train()
    file = constrained(model)
    turned = CbpqFile(dict(reversed(file.constrained.items())), dict(reversed(file.others.items())), {}, {}, {})
    before = copy.deepcopy(model.state_dict())
    export_pt2(model, file, TINY, tmp_path / "a.pt2")
    export_pt2(copy.deepcopy(model), turned, TINY, tmp_path / "b.pt2")
    assert tuple(capfd.readouterr()) == ("", "")
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    data = (tmp_path / "a.pt2").read_bytes()
    assert data == (tmp_path / "b.pt2").read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        whole = b"".join(map(archive.read, archive.namelist()))
    for trace in (b".py", str(ROOT).encode(), b"site-packages"):
        assert trace not in whole
    extra = {"input_spec.json": ""}
    torch.export.load(tmp_path / "a.pt2", extra_files=extra)
    assert InputSpec.from_dict(json.loads(extra["input_spec.json"])) == TINY


def another_bias(loaded: Any) -> None:
    loaded.state_dict["network.a.bias"].add_(1)


def another_code(loaded: Any) -> None:
    loaded.state_dict["network.a.weight_codes"][0, :] += 3


@pytest.mark.parametrize("change", [another_bias, another_code])
def test_what_computes_something_else_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]
) -> None:
    model = linears("a", "b")
    file = constrained(model)
    forget = pt2_export._forget_origin

    def spoilt(made: Any) -> None:
        forget(made)
        change(made)

    monkeypatch.setattr(pt2_export, "_forget_origin", spoilt)
    (tmp_path / "x.pt2").write_bytes(b"old")
    with pytest.raises(CbpqError, match="computes other logits"):
        export_pt2(model, file, TINY, tmp_path / "x.pt2")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
    export_pt2(model, file, TINY, tmp_path / "x.pt2", check=False)  # nobody looked


def test_what_torch_does_not_load_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*arguments: Any, **options: Any) -> None:
        arguments[1].write(b"PK nothing")

    monkeypatch.setattr(torch.export, "save", cut)
    model = linears("a")
    with pytest.raises(CbpqError, match=r"torch .* rejects the network: .") as caught:
        export_pt2(model, constrained(model), TINY, tmp_path / "x.pt2")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


# The dispatcher and the command.


def test_the_command(tmp_path: Path) -> None:
    path = write_digits(tmp_path)
    out = tmp_path / "digits.pt2"
    done = command("export", path, "-o", out, "--json")  # the ending is enough
    assert done.code == 0, done.err
    assert (done.document()["format"], done.document()["size"]) == ("pt2", out.stat().st_size)
    loaded = load(path)
    images = pictures(loaded.info.input_spec)
    with torch.no_grad():
        expected = loaded.model(images)
        assert torch.allclose(program(out).module()(images), expected, rtol=0, atol=1e-5)
    one_line(command("export", path, "-o", out), 2, "exists")
    one_line(command("export", path, "--format", "pt2", "-o", tmp_path / "x.pt"), 2, "end in .pt2, not 'x.pt'")
    one_line(command("export", path, "-o", tmp_path / "missing" / "x.pt2"), 2, "missing does not exist")
    one_line(command("export", path, "-o", tmp_path / "x.pt2", "--fold-bn"), 2, "pt2 has no option 'fold_bn'")


def test_the_dispatcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = linears("a")
    file = constrained(model)
    monkeypatch.setattr(pt2_export, "compare_logits", lambda *_, **__: pytest.fail("it ran"))
    result = export(file, "pt2", tmp_path / "x.pt2", model=model, spec=TINY, check=False)
    assert "max_difference" not in result.to_dict()
    with pytest.raises(UsageError, match="pt2 has no option 'opset'"):
        export(file, "pt2", tmp_path / "y.pt2", model=model, spec=TINY, opset=21)
    other = copy.deepcopy(model)
    other.get_parameter("a.weight").data[0] += 1
    with pytest.raises(CbpqError, match=r"does not hold the file's a\.weight"):
        export(file, "pt2", tmp_path / "y.pt2", model=other, spec=TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt2"]
