"""Networks that keep their weights packed: the same bits as plain networks, little memory, and only predictions."""

import copy
import mmap
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
import torchvision
from small_job import ROOT
from torch import Tensor, nn

import cbpq
from cbpq import packed
from cbpq.content import CbpqFile, ConstrainedTensor
from cbpq.errors import UsageError
from cbpq.fileformat import read, read_packed, write
from cbpq.inputs import InputSpec
from cbpq.sources import LoadedModel, SourceInfo

CONSTRAINTS: dict[str, tuple[tuple[int, ...], int]] = {
    "binary": ((-1, 1), 1),
    "ternary": ((-1, 0, 1), 1),
    "one-bit-shift": ((-2, -1, 0, 1, 2), 2),
    "two-bit-shift": ((-4, -2, -1, 0, 1, 2, 4), 4),
    "shift:4": ((-16, -8, -4, -2, -1, 0, 1, 2, 4, 8, 16), 16),
    "levels": (tuple(range(-40, 60)), 10),
}


def constrained(model: nn.Module, constraint: str, packing: str = "bits") -> CbpqFile:
    """A file of this network with random codes in every matrix and kernel, scales per channel and per layer in turn."""
    generator = np.random.default_rng(0)
    levels, denominator = CONSTRAINTS[constraint]
    tensors = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.dim() > 1 and name.endswith("weight"):
            codes = np.array(levels, dtype=np.int16)[generator.integers(0, len(levels), parameter.shape)]
            size = (len(codes),) if number % 2 else ()
            scale = np.asarray(generator.uniform(0.01, 0.05, size), dtype=np.float32)
            tensor = ConstrainedTensor(codes, scale, levels, denominator, constraint)
            tensors[name] = tensor.packed_as(packing)
    others = {name: value.numpy() for name, value in model.state_dict().items() if name not in tensors}
    return CbpqFile(tensors, others, {}, {}, {})


def saved(
    path: Path, library: str, name: str, arguments: dict[str, Any], constraint: str = "ternary", packing: str = "bits"
) -> Path:
    """A cbpq file of a network with random weights."""
    torch.manual_seed(0)
    side = arguments.get("image_size") or arguments.get("img_size") or 64
    if library == "torchvision":
        model = torchvision.models.get_model(name, weights=None, **arguments)
    else:
        model = timm.create_model(name, **arguments)
    for buffer_name, buffer in model.named_buffers():
        if "running" in buffer_name:
            buffer.uniform_(0.5, 1.5)
    file = constrained(model, constraint, packing)
    source = SourceInfo(library, name, arguments, InputSpec(3, side, side), None).to_dict()
    write(path, CbpqFile(file.constrained, file.others, source, {}, {}))
    return path


def both(path: Path) -> tuple[LoadedModel, LoadedModel]:
    return cbpq.load(path), cbpq.load(path, packed=True)


def images(batch: int, side: int = 64) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(batch))


NETWORKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "squeezenet": ("torchvision", "squeezenet1_1", {"num_classes": 7}),
    "groups": ("torchvision", "shufflenet_v2_x0_5", {"num_classes": 7}),
    "transformer": ("timm", "test_vit", {"num_classes": 7, "img_size": 64}),
    "attention that reads its parts' weights": (
        "timm",
        "swin_tiny_patch4_window7_224",
        {"num_classes": 7, "img_size": 64, "embed_dim": 24, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    ),
    "batch norm": ("timm", "test_resnet", {"num_classes": 7}),
    "weights standardised in the forward pass": ("timm", "test_nfnet", {"num_classes": 7}),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_logits_are_the_same_bits(tmp_path: Path, network: str) -> None:
    plain, small = both(saved(tmp_path / "a.safetensors", *NETWORKS[network]))
    kept = {name for name, part in small.model.named_modules() if isinstance(part, packed.PackedWeight)}
    assert len(kept) == len(read_packed(tmp_path / "a.safetensors").constrained)
    assert not any(tensor.is_meta for tensor in (*small.model.parameters(), *small.model.buffers()))
    assert (small.info, small.num_classes) == (plain.info, plain.num_classes)
    for batch in (1, 3):
        with torch.no_grad():
            assert torch.equal(plain.model(images(batch)), small.model(images(batch)))


@pytest.mark.parametrize("packing", ["bits", "dense"])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_every_kind_of_words(tmp_path: Path, constraint: str, packing: str) -> None:
    network = ("timm", "test_resnet", {"num_classes": 7})
    plain, small = both(saved(tmp_path / "a.safetensors", *network, constraint, packing))
    expected = plain.model.state_dict()
    found = small.model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype


Maker = Callable[[nn.Module, str], nn.Module]


@pytest.fixture
def packed_copy(tmp_path: Path) -> Maker:
    """Gives a network random constrained weights, and returns a packed copy of it."""

    def make(plain: nn.Module, constraint: str) -> nn.Module:
        file = constrained(plain.eval(), constraint)
        write(tmp_path / "copy.safetensors", file)
        plain.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in file.state().items()})
        small = copy.deepcopy(plain)
        packed.pack(small, read_packed(tmp_path / "copy.safetensors").constrained)
        return small

    return make


@torch.no_grad()
@pytest.mark.parametrize("constraint", ["binary", "two-bit-shift"])
def test_layers_of_torch(packed_copy: Maker, constraint: str) -> None:
    torch.manual_seed(0)
    cases: list[tuple[nn.Module, tuple[int, ...]]] = [
        (nn.Conv1d(6, 9, 3, groups=3), (2, 6, 8)),
        (nn.Conv2d(6, 6, 3, groups=6, padding="same", bias=False), (2, 6, 5, 5)),
        (nn.Conv3d(2, 3, 2, stride=2), (1, 2, 4, 4, 4)),
        (nn.Linear(7, 5, bias=False), (4, 7)),
        (nn.Bilinear(3, 3, 2), (4, 3)),
        (nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), (2, 5, 16)),  # reads the weights of its parts
        (nn.MultiheadAttention(16, 2, kdim=8, vdim=12), (5, 2, 16)),  # three weights of its own
    ]
    for plain, shape in cases:
        small = packed_copy(plain, constraint)
        inputs = [torch.randn(shape)]
        if isinstance(plain, nn.Bilinear):
            inputs *= 2
        if isinstance(plain, nn.MultiheadAttention):
            inputs += [torch.randn(5, 2, 8), torch.randn(5, 2, 12)]
        expected, found = plain(*inputs), small(*inputs)
        if isinstance(plain, nn.MultiheadAttention):
            expected, found = expected[0], found[0]
        assert torch.equal(expected, found), type(plain)


@torch.no_grad()
@pytest.mark.skipif(sys.platform != "linux", reason="layers are decoded whole elsewhere")
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_in_parts(packed_copy: Maker, monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    """Where a product with a part of the rows alone would give other bits, for some batches and numbers of threads."""
    torch.manual_seed(0)
    plain = nn.Linear(777, 2000, bias)
    small = packed_copy(plain, "two-bit-shift")
    monkeypatch.setattr(packed, "AT_ONCE", 4 * 777 * 150)
    parts: list[int] = []
    forget = packed._forget

    def counted(memory: mmap.mmap, begin: int, end: int) -> None:
        parts.append(begin)
        forget(memory, begin, end)

    monkeypatch.setattr(packed, "_forget", counted)
    threads, other_bits = torch.get_num_threads(), 0
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            for shape in [(777,), (1, 777), (2, 777), (16, 777), (100, 777), (2, 3, 777)]:
                input = torch.randn(shape)
                parts.clear()
                expected = plain(input)
                assert torch.equal(expected, small(input)), (count, shape)
                assert len(parts) == 14
                rows = [nn.functional.linear(input, weight) for weight in plain.weight.split(150)]
                other_bits += not bias and not torch.equal(expected, torch.cat(rows, -1))
    finally:
        torch.set_num_threads(threads)
    assert bias or other_bits or not torch.backends.mkl.is_available()  # what the detour is for


def test_only_predicts(packed_copy: Maker) -> None:
    plain = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Sequential(nn.Linear(5, 4)))
    small = packed_copy(plain, "ternary")
    state = plain.state_dict()
    for forbidden in (
        small.train,
        small.requires_grad_,
        lambda: small.load_state_dict(state),
        lambda: small[2].train(),  # type: ignore[index]  # a Sequential
    ):
        with pytest.raises(UsageError, match="only predicts"):
            forbidden()
    assert not any(module.training for module in (small, small[1], small[2][0]))  # type: ignore[index]
    small.eval().train(False).requires_grad_(False)
    output = small(torch.randn(3, 6, requires_grad=True))
    assert not output.requires_grad
    assert not any(parameter.requires_grad for parameter in small.parameters())


def test_a_part_passes_gradients_to_its_input(packed_copy: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """For pictures of what a layer looks at; a linear layer is then decoded whole, since autograd keeps its weight."""
    plain = nn.Sequential(nn.Linear(6, 50))
    small = packed_copy(plain, "ternary")
    monkeypatch.setattr(packed, "AT_ONCE", 100)
    gradients = []
    for network in (plain, small):
        input = torch.ones(3, 6, requires_grad=True)
        network[0](input).square().sum().backward()  # type: ignore[index]
        gradients.append(input.grad)
    assert torch.equal(*gradients)  # type: ignore[arg-type]


def test_copies_and_casts(tmp_path: Path) -> None:
    plain, small = both(saved(tmp_path / "a.safetensors", *NETWORKS["batch norm"], "shift:4"))
    copied = copy.deepcopy(small.model)
    with torch.no_grad():
        assert torch.equal(copied(images(2)), plain.model(images(2)))
        for kind in (torch.float64, torch.bfloat16, torch.float32):  # casting back gives the float32 weights again
            cast = copied.to(kind)
            if kind != torch.float32:
                assert torch.equal(cast(images(2).to(kind)), copy.deepcopy(plain.model).to(kind)(images(2).to(kind)))
        weights = [name for name in plain.model.state_dict() if name.endswith("conv1.weight")]
        assert weights
        for name in weights:
            assert torch.equal(copied.state_dict()[name], plain.model.state_dict()[name])
        assert torch.equal(small.model(images(2)), plain.model(images(2)))
    assert isinstance(small.model, type(plain.model))


def test_with_autocast_and_channels_last(tmp_path: Path) -> None:
    plain, small = both(saved(tmp_path / "a.safetensors", *NETWORKS["batch norm"]))
    input = images(2).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(small.model(input), plain.model(input))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(small.model(images(2)), plain.model(images(2)))


def test_a_network_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch.nn import Flatten, Linear, Sequential\n\n\n"
        "def make():\n    return Sequential(Flatten(), Linear(12, 4), Linear(4, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    file = constrained(nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 3)), "binary")
    source = SourceInfo("callable", "mine:make", {}, InputSpec(3, 2, 2), None).to_dict()
    write(tmp_path / "a.safetensors", CbpqFile(file.constrained, file.others, source, {}, {}))
    with pytest.raises(UsageError, match="--arch mine:make"):
        cbpq.load(tmp_path / "a.safetensors", packed=True)
    plain = cbpq.load(tmp_path / "a.safetensors", arch="mine:make")
    small = cbpq.load(tmp_path / "a.safetensors", arch="mine:make", packed=True)
    with torch.no_grad():
        assert torch.equal(plain.model(images(2, 2)), small.model(images(2, 2)))


def test_what_was_read_already_cannot_stay_packed(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", *NETWORKS["batch norm"])
    with pytest.raises(UsageError, match="path"):
        cbpq.load(read(path), packed=True)


# Memory, of a process of its own: VmHWM is the most that was ever resident, and starts anew when asked to

PEAK = """
import sys, torch

def resident(name):
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

def start():
    open("/proc/self/clear_refs", "w").write("5")
    return resident("VmRSS")
"""
LARGE_LAYER = """
import numpy as np
from torch import nn
from cbpq import packed
from cbpq.content import PackedTensor
torch.set_num_threads(1)
torch.rand(8, 64) @ torch.rand(64, 64)
with torch.device("meta"):
    model = nn.Sequential(nn.Linear(4096, 4096, bias=False)).eval()
before = start()
rows = np.random.default_rng(0).integers(0, 256, (4096, 512), dtype=np.uint8)
tensor = PackedTensor(rows, (4096, 4096), np.ones((), dtype=np.float32), (-1, 1), 1, "binary", "bits")
packed.pack(model, {"0.weight": tensor})
model(torch.rand(2, 4096))
print(resident("VmHWM") - before)
"""
ALEXNET = """
import cbpq, cbpq.model_file
from cbpq.architectures import known_names
known_names("torchvision"), known_names("timm")
# once, so that the libraries' own code is in memory already: it is not the network's
with torch.no_grad():
    torch.nn.Linear(64, 64)(torch.nn.Conv2d(3, 64, 11, stride=4)(torch.ones(1, 3, 224, 224)).mean((2, 3)))
before = start()
loaded = cbpq.load(sys.argv[1], packed=True)
with torch.no_grad():
    loaded.model(torch.ones(1, 3, 224, 224))
tensors = sum(t.nbytes for t in (*loaded.model.parameters(), *loaded.model.buffers()))
print(resident("VmHWM") - before, tensors)
"""


def peak(program: str, *arguments: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", PEAK + program, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


def resets_its_peak() -> bool:
    return os.access("/proc/self/clear_refs", os.W_OK)


@pytest.mark.skipif(not resets_its_peak(), reason="the kernel does not tell how much was resident")
def test_a_large_layer_takes_little_memory() -> None:
    (most,) = peak(LARGE_LAYER)
    assert most < 4 * 4096 * 4096 / 4  # 2 MB of codes, where the matrix has 67


@pytest.mark.slow  # a minute for making AlexNet's file; it must fit into a quarter of its float32 weights
@pytest.mark.skipif(not resets_its_peak(), reason="the kernel does not tell how much was resident")
@pytest.mark.parametrize("constraint", ["binary", "two-bit-shift"])
def test_alexnet_takes_less_than_a_quarter(tmp_path: Path, constraint: str) -> None:
    model = torchvision.models.alexnet(weights=None)
    file = constrained(model, constraint)
    tensors = dict(file.constrained)
    others = dict(file.others)
    for name in ("features.0.weight", "classifier.6.weight"):  # as is the custom, the first and the last stay float
        del tensors[name]
        others[name] = model.get_parameter(name).detach().numpy()
    source = SourceInfo("torchvision", "alexnet", {}, InputSpec(3, 224, 224), None).to_dict()
    write(tmp_path / "alexnet.safetensors", CbpqFile(tensors, others, source, {}, {}))
    float32 = sum(4 * parameter.numel() for parameter in model.parameters())
    del model, file, tensors, others
    most, held = peak(ALEXNET, str(tmp_path / "alexnet.safetensors"))
    assert held < most < float32 / 4
    plain, small = both(tmp_path / "alexnet.safetensors")
    with torch.no_grad():
        for batch in (1, 2, 9):
            assert torch.equal(plain.model(images(batch, 224)), small.model(images(batch, 224)))
