"""Weight files: from whatever people saved to one plain state dict, and from a state dict strictly into a network.

Read are what ``torch.save`` writes (zip and the older format) and safetensors, told apart by content, not by name.
Nothing in a file is ever executed: pickles are read with ``weights_only=True``.
"""

import argparse
import hashlib
import json
import mmap
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from cbpq.errors import SourceError, UsageError, brief, did_you_mean

# Where savers put the network, most telling first; the moving average only where nothing else is.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "module", "network", "state_dict_ema", "model_ema")
_WRAPPING_PREFIXES = ("_orig_mod.", "module.")  # torch.compile; data parallel
_NAME_KEYS = ("architecture", "arch", "model_name", "model")
_DICTIONARIES = ("arguments", "input_spec")
_BYTES = re.compile(rb"c(builtins|__builtin__)\nbytearray\n")  # in a pickle: torch would allocate as many as it says
_LARGEST_METADATA = 10_000  # values; a pickle of a few hundred bytes can nest its lists to billions
_RESAVE = "re-save only its weights, torch.save(model.state_dict(), ...), where the code that made it is trusted"


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a weight file.

    Returns:
        The state dict, on the CPU, every float as float32 and finite, wrapper prefixes such as ``module.`` removed; and
        what the file says of itself, where it does: ``architecture`` (str), ``arguments`` and ``input_spec`` (dicts),
        ``args`` (dict, the command line that timm's and torchvision's training scripts keep), ``saver``.

    Raises:
        UsageError: no such file, or a directory.
        SourceError: not a weight file, a damaged one, one that would have to run code, or values that cannot be used.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a directory; name the weight file in it")
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(256)
    except FileNotFoundError as error:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UsageError(f"no such file: {path}{did_you_mean(path.name, siblings)}") from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
    content, metadata = _reader(path, head, size)(path)
    state = _plain_names(_find_state(path, content, metadata))
    return {name: _checked(path, name, tensor, size) for name, tensor in state.items()}, metadata


def _reader(path: Path, head: bytes, size: int) -> Callable[[Path], tuple[Any, dict[str, Any]]]:
    """Choose by the first bytes; say plainly what else the file may be."""
    if size == 0:
        raise SourceError(f"{path} is empty; copy or download it again")
    if head.startswith(b"PK"):
        return _read_zip
    if head.startswith(b"\x80"):
        return _read_pickle
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return _read_safetensors
    if head.startswith(b"version https://git-lfs"):
        raise SourceError(f"{path} is a Git LFS pointer, not the weights themselves; run: git lfs pull")
    if head.lstrip()[:1] == b"<":
        raise SourceError(f"{path} is a web page, not a weight file; the download went wrong, repeat it")
    kind = "a text file" if not re.search(rb"[^\t\n\r\x20-\x7e]", head) else "no weight file that cbpq knows"
    raise SourceError(f"{path} is {kind}; expected is what torch.save wrote, or safetensors")


def _read_zip(path: Path) -> tuple[Any, dict[str, Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.rpartition("/")[2] for name in archive.namelist()}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise SourceError(f"{path} is damaged or cut short; copy or download it again") from error
    if "constants.pkl" in members:
        raise SourceError(f"{path} is a TorchScript program, not weights; {_RESAVE}")
    if "data.pkl" not in members:
        raise SourceError(f"{path} is a zip archive, but none that torch.save wrote; name the weight file itself")
    return _read_pickle(path)


def claims_more_memory(data: bytes | mmap.mmap, file: IO[bytes]) -> bool:
    """Whether ``torch.load`` would take more memory than a file has bytes, which what ``torch.save`` writes never does.

    ``data`` is the whole file, and ``file`` the same, open.

    Raises:
        zipfile.BadZipFile: it begins as an archive, but is none.
    """
    if _BYTES.search(data):
        return True
    if data[:2] != b"PK":
        return False
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    return compressed or sum(entry.file_size for entry in entries) > len(data)


def _read_pickle(path: Path) -> tuple[Any, dict[str, Any]]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        more = claims_more_memory(data, file)
    if more:
        raise SourceError(f"{path} is compressed or claims bytes that it has not, as torch.save never does; {_RESAVE}")
    try:
        # timm's and torchvision's training scripts keep their command line as a Namespace, which is plain data
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True), {}
    except Exception as error:  # the unpickler raises nearly every kind of exception on damaged input
        found = re.search(r"GLOBAL (\S+)|(?:class|global|function) (\S+\.\S+)", str(error))
        if "weights_only" in str(error) and found:
            raise SourceError(
                f"{path} holds the Python object {found[1] or found[2]} beside or around its weights; loading it could "
                f"run code, so it is refused; {_RESAVE}"
            ) from error
        raise SourceError(f"{path} is damaged, cut short or not from torch.save; copy or save it again") from error


def _read_safetensors(path: Path) -> tuple[Any, dict[str, Any]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    except Exception as error:  # safetensors raises its own error, but also ValueError, KeyError and torch's
        raise SourceError(f"{path} is no intact safetensors file ({brief(error)}); copy it again") from error
    if not content:
        raise SourceError(f"{path} is a safetensors file without any tensor")
    metadata: dict[str, Any] = {}
    for key in _DICTIONARIES:
        if key in header:
            try:
                metadata[key] = json.loads(header[key])
            except (ValueError, RecursionError) as error:
                raise SourceError(f"{path}: its metadata key {key!r} is not JSON; write it again") from error
            if not isinstance(metadata[key], dict):
                raise SourceError(f"{path}: its metadata key {key!r} is no JSON object; write it again")
    if name := next((header[key] for key in _NAME_KEYS if header.get(key)), None):
        metadata["architecture"] = name
    return content, metadata


def _find_state(path: Path, content: Any, metadata: dict[str, Any], depth: int = 0) -> dict[str, Tensor]:
    """The state dict in a checkpoint, and in passing what the checkpoint says of itself."""
    if not isinstance(content, Mapping):
        raise SourceError(f"{path} holds a {type(content).__name__}, no state dict; {_RESAVE}")
    _note_metadata(content, metadata)
    for key in _WRAPPERS:
        inner = content.get(key)
        if depth < 3 and isinstance(inner, Mapping) and any(_is_entry(i) or i[0] in _WRAPPERS for i in inner.items()):
            return _find_state(path, inner, metadata, depth + 1)
    state = {name: value for name, value in content.items() if _is_entry((name, value))}
    if not state:
        keys = ", ".join(repr(key) for key in list(content)[:5]) or "nothing at all"
        raise SourceError(f"{path} holds no state dict, only {keys}; expected is torch.save(model.state_dict(), ...)")
    return state


def _is_entry(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _note_metadata(content: Mapping[Any, Any], metadata: dict[str, Any]) -> None:
    args = content.get("args")
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    if isinstance(args, dict) and _is_small(args):
        metadata["args"] = args
        if {"arch", "version", "state_dict"} <= set(content):  # the three that timm's saver always writes
            metadata["saver"] = "timm"
    for place in (content, metadata.get("args", {})):
        for key in _NAME_KEYS:
            if isinstance(place.get(key), str):
                metadata.setdefault("architecture", place[key])
    for key in _DICTIONARIES:
        if isinstance(content.get(key), dict) and _is_small(content[key]):
            metadata.setdefault(key, content[key])


def _is_small(value: Any) -> bool:
    """Whether it can be walked through, and shown, in no time."""
    left = [value]
    for _ in range(_LARGEST_METADATA):
        if not left:
            return True
        inner = left.pop()
        if isinstance(inner, Mapping):
            left += [*inner.keys(), *inner.values()]
        elif isinstance(inner, (list, tuple, set)):
            left += inner
    return False


def _plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo what wrappers around the network did to its names."""
    while prefix := next((p for p in _WRAPPING_PREFIXES if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    # torch.compile of a part of the network; PyTorch's ImageNet example, which parallelises AlexNet's features only
    return {
        name.replace("._orig_mod.", ".").replace("features.module.", "features."): tensor
        for name, tensor in state.items()
    }


def _checked(path: Path, name: str, tensor: Tensor, file_size: int) -> Tensor:
    if tensor.is_quantized or tensor.layout != torch.strided or tensor.is_complex():
        kind = "quantized" if tensor.is_quantized else "complex" if tensor.is_complex() else "sparse"
        raise SourceError(f"{path}: tensor {name!r} is {kind}; cbpq needs plain floats, save the float network")
    # a view with stride 0 can claim any size; a real tensor takes at least one byte per element
    if tensor.device.type != "cpu" or tensor.numel() > file_size:
        raise SourceError(f"{path}: tensor {name!r} has no values of its own in the file; save the network again")
    if not tensor.is_floating_point():
        return tensor.detach().clone()
    values = tensor.detach().to(torch.float32, copy=True).contiguous()
    if bad := int((~torch.isfinite(values)).sum()):
        raise SourceError(
            f"{path}: tensor {name!r} holds {bad} of {values.numel()} values that are not finite; "
            "use a checkpoint from before training diverged"
        )
    return values


def misfit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """What keeps ``state`` from being exactly what a network expects, in one line; empty if it fits.

    A missing ``num_batches_tracked`` is no misfit: checkpoints from before PyTorch 0.4.1 lack it, and it is not used.
    """
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in expected]
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    groups = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    return "; ".join(
        f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for what, names in groups
        if names
    )


def check_fit(model: nn.Module, state: Mapping[str, Tensor], what: str, remedy: str) -> None:
    """Compare names and shapes alone; the message names model and state as ``what``, then a remedy.

    Raises:
        SourceError: entries are missing, unexpected or of another shape; the message names the first few of each.
    """
    if problem := misfit(model.state_dict(), state):
        raise SourceError(f"{what} do not fit together: {problem}; {remedy}")


def load_strictly(
    model: nn.Module, state: Mapping[str, Tensor], what: str, remedy: str, *, assign: bool = False
) -> None:
    """Copy ``state`` into ``model``, every entry and nothing else; ``what`` and ``remedy`` as in ``check_fit``.

    With ``assign`` its tensors take the place of the model's own, where they are of the same type.

    Raises:
        SourceError: they do not fit.
    """
    check_fit(model, state, what, remedy)
    expected = model.state_dict()
    complete = OrderedDict((name, state.get(name, tensor).to(tensor.dtype)) for name, tensor in expected.items())
    # The names were checked against this very network, so they are of its own version. A state dict without version
    # numbers, such as one from safetensors, would be taken for an old one and altered (torchvision's MNASNet).
    complete._metadata = getattr(expected, "_metadata", {})  # type: ignore[attr-defined] # where torch keeps versions
    try:
        model.load_state_dict(complete, assign=assign)
    except Exception as error:  # a network may override loading
        raise SourceError(f"{what} do not fit together: {brief(error)}; {remedy}") from error


def content_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values, by name: the same for the same weights in any kind of file."""
    digest = hashlib.sha256()
    for name in sorted(state):
        array = state[name].detach().cpu().contiguous().numpy()
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(f"{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes; torchvision's published files carry its beginning in their names."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
