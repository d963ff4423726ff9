"""What README's "Security and safety" promises of files from strangers: no code of theirs runs, no path of theirs is
followed, sizes are checked before anything is allocated, and only code that the user named is imported.
"""

import hashlib
import io
import itertools
import json
import os
import pickle
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_job import ARGUMENTS, SPEC, Outcome, command, contents, refused, write_arrays, write_folder, write_network
from test_fuzzing import guarded, resident

from cbpq import fileformat
from cbpq.fileformat import CbpqFile

FEW = ("--device", "cpu", "-b", "12", "--rounding", "nearest", "--epochs", "1")
TRACE = "the-code-ran"


class Code:
    """What a pickle may hold: a call that leaves a trace when the pickle is loaded in full."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (TRACE,)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network, data, a result, and an unfinished run."""
    folder = tmp_path_factory.mktemp("sound")
    write_network(folder / "net.safetensors", steps=1)
    write_arrays(folder / "data.npz", train=24, val=12)
    given = ("quantize", folder / "net.safetensors", "--data", folder / "data.npz", *FEW)
    assert command(*given, "-o", folder / "result").code == 0
    return folder


@pytest.fixture
def world(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the current folder."""
    shutil.copytree(sound, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


# No pickle is ever executed


def hostile_pickles(world: Path) -> dict[str, tuple[object, ...]]:
    """Commands that meet code in a pickle."""
    state = load_file("net.safetensors")
    torch.save({"state_dict": state, "extra": Code()}, "zip.pth")
    torch.save({"state_dict": state, "extra": Code()}, "old.pth", _use_new_zipfile_serialization=False)
    Path("plain.pth").write_bytes(pickle.dumps(Code()))
    np.savez("objects.npz", train_images=np.array([Code()], object), train_labels=np.zeros(1, int))
    with np.load("data.npz") as arrays:
        np.savez("labels.npz", **{**arrays, "val_labels": np.array([Code()] * 12, object)})
    Path("disguised.npz").write_bytes(pickle.dumps(Code()))
    content = io.BytesIO()
    torch.save({"version": 1, "identity": {}, "state": {"run": Code()}}, content)
    Path("unfinished/checkpoint").mkdir(parents=True)
    digest = hashlib.sha256(content.getvalue()).digest()
    Path("unfinished/checkpoint/state.pt").write_bytes(digest + content.getvalue())
    arch, data = ("--arch", "timm:test_resnet"), ("--data", "data.npz")
    quantize, evaluate = ("quantize", "net.safetensors"), ("evaluate", "result/model.safetensors")
    commands: dict[str, tuple[object, ...]] = {
        f"{what} {name}": (what, name, *data, *arch, *(("-o", "out") if what == "quantize" else ()))
        for what, name in itertools.product(("quantize", "evaluate"), ("zip.pth", "old.pth", "plain.pth"))
    }
    return commands | {
        "inspect": ("inspect", "old.pth"),
        "export": ("export", "zip.pth", "--format", "state-dict", "-o", "x.pth"),
        "compare": ("compare", "zip.pth", *arch, *data, "-o", "out"),
        "as the original": (*evaluate, *data, "--against", "old.pth", *arch),
        "as weights": ("quantize", "timm:test_resnet", "--weights", "zip.pth", *data, "-o", "out"),
        "images": (*quantize, "--data", "objects.npz", *FEW, "-o", "out"),
        "labels": (*quantize, "--data", "labels.npz", *FEW, "-o", "out"),
        "no arrays at all": (*evaluate, "--data", "disguised.npz"),
        "an unfinished run": (*quantize, *data, *FEW, "-o", "unfinished", "--resume"),
    }


def test_pickles_are_never_executed(world: Path) -> None:
    for name, arguments in hostile_pickles(world).items():
        outcome = command(*arguments)
        assert outcome.code in (1, 2), name
        refused(outcome, outcome.code)
        assert not Path(TRACE).exists(), name
    # it would have been: this is what loading such a file in full does
    pickle.loads(Path("plain.pth").read_bytes())
    assert Path(TRACE).exists()


def test_what_is_fetched_is_not_executed_either(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash in the name of a published file tells that it came whole, not that it is harmless."""
    content = pickle.dumps(Code(), protocol=2)
    file = world / f"evil-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    file.write_bytes(content)
    fetch = torch.hub.load_state_dict_from_url

    def fetched(url: str, **options: Any) -> Any:
        return fetch(file.as_uri(), **options, model_dir=str(world / "hub"))

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetched)
    refused(command("quantize", "squeezenet1_1", "--pretrained", "--data", "data.npz", "-o", "out"), 1, "be fetched")
    assert (world / "hub" / file.name).exists()
    assert not Path(TRACE).exists()


# No path in a file is followed

PATHS = ("../../evil", "/evil", "..\\evil", "~/evil", "file:///evil", "a/../../../evil")
written: list[str] | None = None  # what this process opens for writing, makes or renames, while anybody wants to know


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if written is None:
        return
    if event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        written.append(os.fsdecode(arguments[0]))
    elif event in ("os.mkdir", "os.rename", "os.symlink", "os.link", "os.remove", "os.rmdir"):
        written.extend(os.fsdecode(path) for path in arguments if isinstance(path, (str, bytes)))


sys.addaudithook(watch)


def test_only_the_output_is_written_to(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever files call their tensors, members, architectures and classes."""
    with np.load("data.npz") as arrays:
        members = {**arrays, **{path: np.zeros(3, np.uint8) for path in PATHS}}
    np.savez("paths.npz", **members)
    content = fileformat.read(Path("result/model.safetensors"))
    more = {path: np.zeros(3, np.float32) for path in PATHS}
    constrained = {f"../{name}": tensor for name, tensor in content.constrained.items()}
    fileformat.write(Path("names.safetensors"), CbpqFile(constrained, more, {}, {"output": "/evil"}, {"top1": "../x"}))
    said = dict.fromkeys(("architecture", "output", "checkpoint"), "../../evil")
    save_file(load_file("net.safetensors"), "said.safetensors", said)
    before = contents(world.parent)
    out, given = world / "out", ("quantize", "net.safetensors", "--data", "paths.npz", *FEW)
    commands: list[tuple[tuple[object, ...], int]] = [
        ((*given, "-o", out), 0),
        (("inspect", "names.safetensors"), 0),
        (("export", "names.safetensors", "--format", "state-dict", "-o", out / "a.pth"), 0),
        (("export", "names.safetensors", "--format", "c", "-o", out / "c"), 1),
        (("quantize", "said.safetensors", "--data", "data.npz", *FEW, "-o", out / "b"), 2),
        (("evaluate", "said.safetensors", "--data", "paths.npz"), 2),
    ]
    for arguments, code in commands:
        global written
        opened: list[str] = []
        written = opened
        try:
            outcome = command(*arguments)
        finally:
            written = None
        assert outcome.code == code, (arguments, outcome.err)
        # a file without a name in the folder tells whether it can be written to; and so the system counts memory anew
        allowed = (os.devnull, str(world), "/proc/self/clear_refs")
        strangers = [path for path in opened if not Path(path).resolve().is_relative_to(out) and path not in allowed]
        assert strangers == [], arguments
        assert code or "-o" not in arguments or str(out) in "".join(opened)
    shutil.rmtree(out)
    assert contents(world.parent) == before


# Sizes are checked before allocation

HUGE = 2**40
MUCH = 2**27  # bytes of zeros that really come, in a few of compressed ones


def gigabyte(method: int) -> bytes:
    """An archive with an empty array, whose header and directory say that it has a gigabyte."""
    header = npy("(65536, 128, 128)")
    changed, claimed = bytearray(npz(header, method)), struct.pack("<I", len(header) + 2**30)
    entry = changed.index(b"PK\x01\x02")
    changed[entry + 24 : entry + 28] = claimed
    if method == zipfile.ZIP_STORED:
        changed[entry + 20 : entry + 24] = claimed
    return bytes(changed)


def npz(content: bytes, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("val_images.npy", content)
    return buffer.getvalue()


def npy(shape: str, values: bytes = b"", version: int = 1) -> bytes:
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY" + bytes((version, 0)) + len(text).to_bytes(2 * version, "little") + text + values


def safetensors_file(**entry: Any) -> bytes:
    whole = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **entry}
    text = json.dumps({"__metadata__": {"cbpq": "{}"}, "a": whole}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(4)


def old_torch_file(numel: int) -> bytes:
    """A tensor in torch's older format, whose storage is said to hold so many values."""
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(255)}, buffer, _use_new_zipfile_serialization=False)
    assert buffer.getvalue().count(b"K\xff") == 2  # of the storage, and of the tensor
    return buffer.getvalue().replace(b"K\xff", b"\x8a\x06" + numel.to_bytes(6, "little"))


def torch_archive() -> bytes:
    """A torch file whose values are compressed, which torch reads but never writes."""
    original, buffer = io.BytesIO(), io.BytesIO()
    torch.save({"w": torch.zeros(255)}, original)
    with zipfile.ZipFile(original) as archive, zipfile.ZipFile(buffer, "w") as other:
        for entry in archive.infolist():
            content, method = archive.read(entry), zipfile.ZIP_STORED
            if entry.filename.endswith("data.pkl"):
                content = content.replace(b"K\xff", b"J" + struct.pack("<i", MUCH // 4))
            elif entry.filename.endswith("data/0"):
                content, method = bytes(MUCH), zipfile.ZIP_DEFLATED
            other.writestr(entry.filename, content, method)
    return buffer.getvalue()


def picture(side: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


def as_source(name: str) -> tuple[object, ...]:
    return "evaluate", name, "--data", "data.npz", "--device", "cpu"


def as_data(name: str) -> tuple[object, ...]:
    return "evaluate", "result/model.safetensors", "--data", name, "--device", "cpu"


CLAIMS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a header of 2⁶³ bytes": ("a.safetensors", lambda: struct.pack("<Q", 2**63) + b"{}"),
    "a tensor of 4 TB": ("a.safetensors", lambda: safetensors_file(shape=[HUGE], data_offsets=[0, 4 * HUGE])),
    "a tensor of no bytes and any shape": (
        "a.safetensors",
        lambda: safetensors_file(shape=[0, HUGE, HUGE], data_offsets=[0, 0])[:-4],
    ),
    "an array of 1 GB, by its directory": ("a.npz", lambda: gigabyte(zipfile.ZIP_DEFLATED)),
    "an array of 1 GB, by its directory, stored": ("a.npz", lambda: gigabyte(zipfile.ZIP_STORED)),
    "an array by its header alone": ("a.npz", lambda: npz(npy(f"({HUGE}, 28, 28)"))),
    "an array with more behind it": ("a.npz", lambda: npz(npy("(6, 8, 8)") + bytes(MUCH))),
    "an array that NumPy would not compress so": (
        "a.npz",
        lambda: npz(npy("(32768, 64, 64)", bytes(MUCH)), zipfile.ZIP_BZIP2),
    ),
    "an array with a header of 128 MB": (
        "a.npz",
        lambda: npz(b"\x93NUMPY\x02\x00" + MUCH.to_bytes(4, "little") + b" " * MUCH),
    ),
    "a storage of 4 TB": ("a.pth", lambda: old_torch_file(HUGE)),
    "compressed weights": ("a.pth", torch_archive),
    "a bytearray of 128 MB": (
        "a.pth",
        lambda: old_torch_file(255).replace(
            b"}q\x00", b"}q\x00cbuiltins\nbytearray\nJ" + struct.pack("<i", MUCH) + b"\x85R0", 1
        ),
    ),
    "a picture of 10 gigapixels": ("pictures", lambda: picture(100_000)),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_sizes_are_checked_before_allocation(world: Path, name: str) -> None:
    file, make = CLAIMS[name]
    if file == "pictures":
        write_folder(world / file, train=12, val=12)
        (world / file / "val" / "class0" / "000.png").write_bytes(make())
    else:
        (world / file).write_bytes(make())
    arguments = as_data(file) if file in ("pictures", "a.npz") else as_source(file)
    command(*as_source("result/model.safetensors"))  # imports and caches are no part of the measurement
    with guarded():
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        before = resident("VmRSS")
        outcome = command(*arguments)
        grown = resident("VmHWM") - before
    assert outcome.code in (1, 2)
    assert "memory" not in refused(outcome, outcome.code)
    assert grown < 2**26, f"{grown} bytes"


def test_a_pickle_cannot_unfold_in_what_it_says_of_itself(world: Path) -> None:
    """Lists of lists of the same lists: a few hundred bytes, but billions of values to who walks through them."""
    nested: list[Any] = []
    for _ in range(40):
        nested = [nested, nested]
    content = {"state_dict": load_file("net.safetensors"), "architecture": "timm:test_resnet"}
    content |= {
        "arguments": {**ARGUMENTS, "x": nested},
        "input_spec": {**SPEC, "mean": nested},
        "args": {"mean": nested},
    }
    torch.save(content, "a.pth")
    with guarded():
        outcome = command(*as_source("a.pth"))
    assert outcome.code in (0, 1, 2)
    assert "memory" not in outcome.err
    assert "bug in cbpq" not in outcome.err


# Only code that the user named is imported


def test_only_code_that_the_user_named_is_imported(world: Path) -> None:
    Path("evil.py").write_text(f"import os\n\nos.mkdir({TRACE!r})\n\n\ndef make():\n    pass\n")
    Path("good.py").write_text("def make():\n    pass\n")
    content = fileformat.read(Path("result/model.safetensors"))
    names = ("evil:make", "os:mkdir")
    for number, name in enumerate(names):
        source = content.source | {"library": "callable", "architecture": name, "arguments": {"name": TRACE}}
        hostile = CbpqFile(content.constrained, content.others, source, content.run, content.metrics)
        fileformat.write(Path(f"{number}.safetensors"), hostile)
        save_file(load_file("net.safetensors"), f"plain{number}.safetensors", {"architecture": name})
        torch.save({"state_dict": load_file("net.safetensors"), "arch": name}, f"{number}.pth")
    sources = [f"{prefix}{number}{end}" for number in (0, 1) for prefix, end in KINDS]
    attempts: list[Outcome] = []
    for source_name in sources:
        attempts += [command(*as_source(source_name)), command(*as_source(source_name), "--arch", "good:make")]
        attempts.append(command("quantize", source_name, "--data", "data.npz", *FEW, "-o", "out"))
        attempts.append(command("evaluate", "result/model.safetensors", "--data", "data.npz", "--against", source_name))
    for form in ("state-dict", "c"):
        attempts.append(command("export", "0.safetensors", "--format", form, "-o", f"out.{form}"))
    command("inspect", "0.safetensors")
    assert not Path(TRACE).exists()
    assert "evil" not in sys.modules
    assert all(attempt.code in (0, 1, 2) and "bug in cbpq" not in attempt.err for attempt in attempts)
    assert "--arch evil:make if you trust it" in command(*as_source("0.safetensors")).err
    command(*as_source("0.safetensors"), "--arch", "evil:make")
    assert Path(TRACE).exists()
    del sys.modules["evil"]


KINDS = (("", ".safetensors"), ("plain", ".safetensors"), ("", ".pth"))
