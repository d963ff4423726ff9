"""Weight files: every form people save, and everything that is none."""

import argparse
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from cbpq.checkpoints import content_sha256, file_sha256, load_strictly, misfit, read_weights
from cbpq.errors import CbpqError, SourceError, UsageError


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def small_state() -> dict[str, Tensor]:
    return dict(small_net().state_dict())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def refused(path: Path, error: type[CbpqError] = SourceError) -> str:
    with pytest.raises(error) as caught:
        read_weights(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("name", ["net.pth", "net.pt", "net.th", "net.bin", "net.safetensors", "net.weights"])
def test_formats_are_told_by_content_not_by_name(tmp_path: Path, name: str) -> None:
    state = small_state()
    assert same(read_weights(saved(tmp_path / name, state))[0], state)
    assert same(read_weights(saved(tmp_path / name, state, _use_new_zipfile_serialization=False))[0], state)
    save_file(state, tmp_path / name)
    found, metadata = read_weights(tmp_path / name)
    assert same({key: found[key] for key in state}, state)
    assert set(found) == set(state)
    assert metadata == {}


@pytest.mark.parametrize(
    "key", ["state_dict", "model", "model_state_dict", "net", "module", "network", "state_dict_ema", "model_ema"]
)
def test_wrappers(tmp_path: Path, key: str) -> None:
    state = small_state()
    optimizer = torch.optim.SGD(small_net().parameters(), lr=0.1, momentum=0.9)
    content = {"epoch": 3, "best_acc": 91.5, "optimizer": optimizer.state_dict(), key: OrderedDict(state)}
    assert same(read_weights(saved(tmp_path / "a.pth", content))[0], state)


def test_wrapper_in_a_wrapper(tmp_path: Path) -> None:
    content = {"model": {"state_dict": small_state()}, "epoch": 1}
    assert same(read_weights(saved(tmp_path / "a.pth", content))[0], small_state())


def test_the_moving_average_only_if_nothing_else(tmp_path: Path) -> None:
    state = small_state()
    other = {name: tensor + 1 for name, tensor in state.items()}
    content = {"state_dict_ema": other, "model_ema": other, "state_dict": state}
    assert same(read_weights(saved(tmp_path / "a.pth", content))[0], state)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module.module."]
)
def test_prefixes(tmp_path: Path, prefix: str) -> None:
    state = small_state()
    path = saved(tmp_path / "a.pth", {"state_dict": {prefix + name: tensor for name, tensor in state.items()}})
    assert same(read_weights(path)[0], state)


def test_inner_prefixes_of_partly_wrapped_networks(tmp_path: Path) -> None:
    names = {"features.module.0.weight": "features.0.weight", "classifier.1.weight": "classifier.1.weight"}
    state = {name: torch.ones(1) for name in names}
    assert list(read_weights(saved(tmp_path / "a.pth", state))[0]) == list(names.values())
    state = {"layer1._orig_mod.0.weight": torch.ones(1), "fc.weight": torch.ones(1)}
    assert list(read_weights(saved(tmp_path / "b.pth", state))[0]) == ["layer1.0.weight", "fc.weight"]


def test_a_name_that_only_some_entries_share_stays(tmp_path: Path) -> None:
    state = {"module.weight": torch.ones(1), "head.weight": torch.ones(1)}
    assert list(read_weights(saved(tmp_path / "a.pth", state))[0]) == list(state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_becomes_float32_and_integers_stay(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {"w": torch.tensor([0.1, -2.0, 3.5], dtype=dtype), "n": torch.tensor(7), "m": torch.tensor([True])}
    expected = {"w": state["w"].float(), "n": state["n"], "m": state["m"]}
    assert same(read_weights(saved(tmp_path / "a.pth", state))[0], expected)
    save_file(state, tmp_path / "a.safetensors")
    found = read_weights(tmp_path / "a.safetensors")[0]
    assert same({name: found[name] for name in expected}, expected)


def test_the_result_is_contiguous_and_free_of_the_file(tmp_path: Path) -> None:
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    save_file({"w": weight.contiguous()}, tmp_path / "a.safetensors")
    loaded = read_weights(tmp_path / "a.safetensors")[0]["w"]
    (tmp_path / "a.safetensors").write_bytes(b"")
    assert torch.equal(loaded, weight)
    assert read_weights(saved(tmp_path / "a.pth", {"w": weight}))[0]["w"].is_contiguous()


def test_metadata_of_safetensors(tmp_path: Path) -> None:
    header = {
        "architecture": "timm:test_resnet",
        "arguments": '{"num_classes":10,"in_chans":1}',
        "input_spec": '{"height":8,"width":8}',
        "format": "pt",
    }
    save_file(small_state(), tmp_path / "a.safetensors", header)
    assert read_weights(tmp_path / "a.safetensors")[1] == {
        "architecture": "timm:test_resnet",
        "arguments": {"num_classes": 10, "in_chans": 1},
        "input_spec": {"height": 8, "width": 8},
    }


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, ""])
def test_metadata_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    save_file(small_state(), tmp_path / "a.safetensors", {"arguments": text})
    assert "'arguments'" in refused(tmp_path / "a.safetensors")


def test_metadata_of_training_scripts(tmp_path: Path) -> None:
    state = small_state()
    args = argparse.Namespace(model="resnet18", crop_pct=0.9, lr=0.1)
    timm_like = {"epoch": 1, "arch": "resnet18", "state_dict": state, "version": 2, "args": args}
    metadata = read_weights(saved(tmp_path / "a.pth", timm_like))[1]
    assert (metadata["architecture"], metadata["saver"], metadata["args"]["crop_pct"]) == ("resnet18", "timm", 0.9)
    metadata = read_weights(saved(tmp_path / "a.pth", {"model": state, "args": args}))[1]
    assert (metadata["architecture"], metadata.get("saver")) == ("resnet18", None)
    assert read_weights(saved(tmp_path / "a.pth", {"arch": "alexnet", "state_dict": state}))[1] == {
        "architecture": "alexnet"
    }


def test_no_such_file_names_the_nearest(tmp_path: Path) -> None:
    saved(tmp_path / "resnet18.pth", small_state())
    assert "did you mean 'resnet18.pth'" in refused(tmp_path / "resnet81.pth", UsageError)
    refused(tmp_path / "no" / "folder.pth", UsageError)


def test_a_directory(tmp_path: Path) -> None:
    assert "is a directory" in refused(tmp_path, UsageError)


@pytest.mark.parametrize(
    "content, word",
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"  \n<html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n", "git lfs pull"),
        (b"learning rate: 0.1\n", "text file"),
        (b"\x00\x01\x02\xff" * 20, "no weight file"),
        (b"PK\x03\x04 and then nothing of a zip", "damaged or cut short"),
        (b"\x80\x02 no pickle", "damaged"),
        (b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", "safetensors"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00{}", "without any tensor"),
    ],
)
def test_what_is_no_weight_file(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "net.pth"
    path.write_bytes(content)
    assert word in refused(path)


def test_text_named_safetensors(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_text("not at all")
    assert "safetensors" in refused(tmp_path / "a.safetensors")


def test_other_zip_archives(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "zip archive" in refused(tmp_path / "a.pth")
    np.savez(tmp_path / "b.npz", w=np.ones(3))
    assert "zip archive" in refused(tmp_path / "b.npz")


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated, which is no reason not to meet its files
def test_torchscript(tmp_path: Path) -> None:
    torch.jit.trace(small_net().eval(), torch.zeros(1, 1, 4, 4)).save(str(tmp_path / "a.pt"))
    assert "TorchScript" in refused(tmp_path / "a.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_module_is_refused_with_the_remedy(tmp_path: Path, zipped: bool) -> None:
    for content in (small_net(), {"model": small_net(), "epoch": 1}):
        message = refused(saved(tmp_path / "a.pth", content, _use_new_zipfile_serialization=zipped))
        assert "torch.nn.modules.container.Sequential" in message
        assert "torch.save(model.state_dict()" in message


class _Bomb:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.witness),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, zipped: bool) -> None:
    content = {"state_dict": small_state(), "extra": _Bomb(tmp_path / "witness")}
    message = refused(saved(tmp_path / "a.pth", content, _use_new_zipfile_serialization=zipped))
    assert "posix.mkdir" in message or "nt.mkdir" in message
    assert not (tmp_path / "witness").exists()


def test_a_plain_pickle_of_code_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(pickle.dumps(_Bomb(tmp_path / "witness")))
    refused(tmp_path / "a.bin")
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize(
    "content, word",
    [
        ([torch.ones(1)], "holds a list"),
        (torch.ones(3), "holds a Tensor"),
        ({}, "nothing at all"),
        ({"epoch": 3, "lr": 0.1}, "'epoch', 'lr'"),
        ({"model": {}, "optimizer": {"state": {}}}, "'model', 'optimizer'"),
    ],
)
def test_checkpoints_without_a_state_dict(tmp_path: Path, content: Any, word: str) -> None:
    assert word in refused(saved(tmp_path / "a.pth", content))


def test_a_wrapper_that_contains_itself(tmp_path: Path) -> None:
    endless: dict[str, Any] = {}
    endless["model"] = endless
    assert "no state dict" in refused(saved(tmp_path / "a.pth", endless))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_that_are_not_finite(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    weight = torch.ones(5, dtype=dtype)
    weight[2] = value
    message = refused(saved(tmp_path / "a.pth", {"a.weight": torch.ones(3), "layer1.0.conv1.weight": weight}))
    assert "'layer1.0.conv1.weight' holds 1 of 5" in message


def test_doubles_beyond_float32(tmp_path: Path) -> None:
    assert "not finite" in refused(saved(tmp_path / "a.pth", {"w": torch.tensor([1e300], dtype=torch.float64)}))


@pytest.mark.filterwarnings("ignore")  # sparse and quantized tensors announce changes to come
def test_tensors_that_are_no_plain_floats(tmp_path: Path) -> None:
    assert "sparse" in refused(saved(tmp_path / "a.pth", {"w": torch.eye(2).to_sparse()}))
    assert "complex" in refused(saved(tmp_path / "a.pth", {"w": torch.ones(2, dtype=torch.complex64)}))
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    assert "quantized" in refused(saved(tmp_path / "a.pth", {"w": quantized}))


def test_a_view_that_claims_more_than_the_file_holds(tmp_path: Path) -> None:
    huge = torch.ones(1).expand(2**40)
    assert "no values of its own" in refused(saved(tmp_path / "a.pth", {"w": huge}))
    assert "no values of its own" in refused(saved(tmp_path / "a.pth", {"w": torch.ones(3, device="meta")}))


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("intact")
    saved(folder / "zip", small_state())
    saved(folder / "old", small_state(), _use_new_zipfile_serialization=False)
    save_file(small_state(), folder / "safetensors")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("form", ["zip", "old", "safetensors"])
def test_truncated_anywhere(tmp_path: Path, intact: dict[str, bytes], form: str) -> None:
    data = intact[form]
    path = tmp_path / "net.pth"
    for length in {0, 1, 7, 8, 9, *range(20, len(data), max(1, len(data) // 60)), len(data) - 1}:
        path.write_bytes(data[:length])
        refused(path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("form", ["zip", "old", "safetensors"])
def test_damage_never_ends_in_a_foreign_exception(
    tmp_path_factory: pytest.TempPathFactory, intact: dict[str, bytes], form: str, data: st.DataObject
) -> None:
    content = bytearray(intact[form])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / f"damaged-{form}"
    path.write_bytes(content)
    try:
        read_weights(path)
    except CbpqError as error:
        assert "\n" not in str(error)  # noqa: PT017 (undamaged values are a good outcome too)


def test_misfit_names_keys_shapes_and_counts() -> None:
    state = small_state()
    assert misfit(state, state) == ""
    other = {f"x{index}": torch.ones(1) for index in range(5)} | {"0.weight": torch.ones(2, 3, 3, 3)}
    message = misfit({"0.weight": state["0.weight"], "0.bias": state["0.bias"]}, other)
    assert "1 missing: 0.bias" in message
    assert "5 unexpected: x0, x1, x2, ..." in message
    assert "1 of another shape: 0.weight (2, 3, 3, 3) instead of (2, 1, 3, 3)" in message


def test_loading_is_strict() -> None:
    state = small_state()
    for wrong in (
        {name: tensor for name, tensor in state.items() if name != "3.bias"},
        state | {"extra": torch.ones(1)},
        state | {"3.bias": torch.ones(1)},
    ):
        with pytest.raises(SourceError, match=r"a file and a net do not fit together: .*; try again"):
            load_strictly(small_net(), wrong, "a file and a net", "try again")
    net = small_net()
    changed = {name: tensor + 1 for name, tensor in state.items()}
    load_strictly(net, changed, "", "")
    assert same(dict(net.state_dict()), changed)


def test_checkpoints_from_before_batch_counters_load() -> None:
    state = {name: t + 1 for name, t in small_state().items() if not name.endswith("num_batches_tracked")}
    net = small_net()
    load_strictly(net, state, "", "")
    assert same({name: t for name, t in net.state_dict().items() if name in state}, state)
    assert int(net.state_dict()["1.num_batches_tracked"]) == 0


def test_content_hash_sees_names_shapes_types_and_values_but_not_order() -> None:
    state = small_state()
    base = content_sha256(state)
    assert content_sha256(dict(reversed(state.items()))) == base
    assert content_sha256({name: tensor.clone() for name, tensor in state.items()}) == base
    weight = state["0.weight"].clone()
    weight[0, 0, 0, 0] = torch.nextafter(weight[0, 0, 0, 0], torch.tensor(9.0))
    others = [
        state | {"0.weight": weight},
        state | {"0.weight": state["0.weight"].reshape(2, 9)},
        state | {"3.bias": state["3.bias"].double()},
        {name.replace("3.", "4."): tensor for name, tensor in state.items()},
    ]
    assert len({base, *map(content_sha256, others)}) == 5


def test_file_hash(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_metadata_is_read_as_data(tmp_path: Path) -> None:
    save_file(small_state(), tmp_path / "a.safetensors", {"arguments": json.dumps({"num_classes": 3})})
    assert read_weights(tmp_path / "a.safetensors")[1] == {"arguments": {"num_classes": 3}}
