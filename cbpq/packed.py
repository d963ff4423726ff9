"""Networks whose constrained weights stay packed in memory: a layer decodes its weight when it runs, and lets it go.

A layer's weight becomes a property, so whatever uses it (convolutions with groups, attention, a parent that reads the
weight of its part) gets the very tensor that an ordinary network holds, and computes the very same. Only linear layers
larger than ``AT_ONCE`` are decoded in parts. There each part takes the whole multiplication, with zeros for the other
rows, and only its own outputs are kept: matrix libraries choose kernels, and with them the order of their sums, by the
size of the matrix, so that a smaller one would give other bits. The zeros take no memory: Linux lets all pages that
were never written share one. Elsewhere such a layer is decoded whole.

Packed networks only predict. ``state_dict`` gives the plain network's, decoded.
"""

import mmap
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cbpq.architectures import Architecture, build
from cbpq.checkpoints import check_fit, load_strictly
from cbpq.content import PackedFile, PackedTensor, step_of
from cbpq.errors import UsageError

AT_ONCE = 2**21  # bytes of a linear layer's float32 weight that are decoded at a time
_STRETCH = 2**15  # weights decoded by one call: little in between, and too few for torch to start its threads over


class PackedWeight(nn.Module):
    """A weight as it is in the file; calling it decodes it. Its buffers are integers, so that no cast touches them."""

    codes: Tensor
    scale: Tensor
    table: Tensor
    kind: Tensor

    def __init__(self, tensor: PackedTensor) -> None:
        super().__init__()
        self.shape, self.count, self.word = tensor.shape, tensor.count, tensor.word
        levels = np.zeros(self.word.base, dtype=np.float32)
        levels[: len(tensor.levels)] = tensor.levels
        step = np.broadcast_to(step_of(tensor.scale, tensor.denominator), tensor.shape[:1])
        buffers = {
            "codes": tensor.rows,
            "scale": step.astype(np.float32).view(np.int32),
            "table": levels[self.word.table].view(np.int32),
            "kind": np.empty(0, dtype=np.float32),  # takes part in .to(), and then says of which type weights are
        }
        for name, array in buffers.items():
            self.register_buffer(name, torch.from_numpy(array), persistent=False)

    def forward(self) -> Tensor:
        """The weight, in its own shape."""
        rows, device = len(self.codes), self.codes.device
        weight = _matrix(rows, self.count)[0] if device.type == "cpu" else torch.empty(rows, self.count, device=device)
        self._decode(weight, 0)
        return weight.reshape(self.shape).to(self.kind.dtype)

    def linear(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """``functional.linear`` with this weight, bit for bit."""
        if not self._in_parts(input):
            return functional.linear(input, self(), bias)
        rows, columns = self.shape
        matrix, memory = _matrix(rows, columns)
        output = input.new_empty(*input.shape[:-1], rows)
        most = max(1, AT_ONCE // (4 * columns))
        for begin in range(0, rows, most):
            part = slice(begin, min(rows, begin + most))
            self._decode(matrix[part], begin)
            output[..., part] = functional.linear(input, matrix, bias)[..., part]
            _forget(memory, 4 * columns * part.start, 4 * columns * part.stop)
        return output

    def _in_parts(self, input: Tensor) -> bool:
        return (
            sys.platform == "linux"
            and 4 * self.shape[0] * self.count > AT_ONCE
            and input.device.type == self.codes.device.type == "cpu"
            and input.dtype == self.kind.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")  # it would cast the whole matrix
            and not (torch.is_grad_enabled() and input.requires_grad)  # it would be kept for the way back
        )

    @torch.no_grad()
    def _decode(self, out: Tensor, first: int) -> None:
        """Decode the rows from ``first`` on into ``out`` (rows, count) of float32."""
        step, table = self.scale.view(torch.float32), self.table.view(torch.float32)
        most = max(1, _STRETCH // self.count)
        for begin in range(0, len(out), most):
            part = slice(begin, min(len(out), begin + most))
            rows = slice(first + part.start, first + part.stop)
            levels = [functional.embedding(index, table) for index in self._indices(self.codes[rows], len(table))]
            joined = torch.cat(levels, dim=-1)[..., : self.word.digits] if len(levels) > 1 else levels[0]
            torch.mul(joined.flatten(1)[:, : self.count], step[rows, None], out=out[part])

    def _indices(self, rows: Tensor, entries: int) -> list[Tensor]:
        """Where the digits of each word stand in the table: one tensor (rows, words) for each stretch of digits."""
        words, digits = -(-self.count // self.word.digits), self.table.shape[1]
        if self.word.width == 1:
            values = rows.int()
        else:
            kind = torch.int32 if self.word.width < 4 else torch.int64
            padded = functional.pad(rows, (0, words * self.word.width - rows.shape[1]))
            places = padded.view(len(rows), words, self.word.width).to(kind).unbind(-1)
            values = sum((place << 8 * number for number, place in enumerate(places[1:], 1)), places[0])
        found = []
        for _ in range(0, self.word.digits - digits, digits):
            higher = values // entries
            found.append(values - higher * entries)
            values = higher
        return [*found, values]


def _matrix(rows: int, columns: int) -> tuple[Tensor, mmap.mmap]:
    """Zeros in memory of their own: the system gets it back at once, where an allocator would keep some of it."""
    size = 4 * rows * columns
    private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    memory = mmap.mmap(-1, size, **private)
    return torch.frombuffer(memory, dtype=torch.float32).view(rows, columns), memory


def _forget(memory: mmap.mmap, begin: int, end: int) -> None:
    """Give pages back; what is read there afterwards is zero again."""
    start = begin // mmap.PAGESIZE * mmap.PAGESIZE
    memory.madvise(mmap.MADV_DONTNEED, start, end - start)


class _OnlyPredicts(nn.Module):
    def train(self, mode: bool = True) -> "_OnlyPredicts":
        return super().train(False) if not mode else _refuse()

    def requires_grad_(self, requires_grad: bool = True) -> "_OnlyPredicts":
        return super().requires_grad_(False) if not requires_grad else _refuse()

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse()


class _Network(_OnlyPredicts):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():  # else the decoded weights would be kept for a way back that there is not
            return super().__call__(*args, **kwargs)


def _refuse() -> NoReturn:
    raise UsageError("a packed network only predicts; load the file without packed=True to train it or change it")


def _layer_class(base: type[nn.Module], attribute: str) -> type[nn.Module]:
    """``base`` with the parameter ``attribute`` decoded from the part ``packed_…`` whenever it is read."""
    part = f"packed_{attribute}"

    def weight(layer: nn.Module) -> Any:
        return getattr(layer, part)()

    def save(layer: Any, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        base._save_to_state_dict(layer, destination, prefix, keep_vars)
        destination[prefix + attribute] = weight(layer)

    def linear(layer: Any, input: Tensor) -> Any:
        return getattr(layer, part).linear(input, layer.bias)

    members: dict[str, Any] = {attribute: property(weight), "_save_to_state_dict": save}
    if base.forward is nn.Linear.forward:
        members["forward"] = linear
    return _subclass((base,) if issubclass(base, _OnlyPredicts) else (_OnlyPredicts, base), members)


def _network_class(base: type[nn.Module]) -> type[nn.Module]:
    return _subclass((_Network, base), {})


def _subclass(bases: tuple[type[nn.Module], ...], members: dict[str, Any]) -> type[nn.Module]:
    name = f"Packed{bases[-1].__name__.removeprefix('Packed')}"
    return type(name, bases, {"__doc__": bases[-1].__doc__, "__module__": __name__, **members})


def pack(model: nn.Module, tensors: Mapping[str, PackedTensor]) -> None:
    """Put packed weights, by their names in the state dict, in the place of a network's parameters."""
    for name, tensor in tensors.items():
        path, _, attribute = name.rpartition(".")
        layer = model.get_submodule(path)
        del layer._parameters[attribute]
        layer.add_module(f"packed_{attribute}", PackedWeight(tensor))
        layer.__class__ = _layer_class(type(layer), attribute)
    model.requires_grad_(False)
    model.__class__ = _network_class(type(model))


def packed_network(
    file: PackedFile, architecture: Architecture, arguments: Mapping[str, Any], what: str, remedy: str
) -> nn.Module:
    """The network of a file, on the CPU and in evaluation mode, never as large as its float32 weights on the way.

    But the user's own functions, and networks that compute some of their tensors when they are built, are built in
    float32 first.

    Raises:
        SourceError: it cannot be built, or its weights are others than the file's; see ``load_strictly``.
    """
    for meta in (True, False):  # without values first
        model = build(architecture, arguments, meta=meta)
        state = {name: torch.empty(tensor.shape, device="meta") for name, tensor in file.constrained.items()}
        state |= {name: torch.from_numpy(array) for name, array in file.others.items()}
        check_fit(model, state, what, remedy)
        load_strictly(model, state, what, remedy, assign=True)
        pack(model, file.constrained)
        if not _unfilled(model):
            break
    return model


def _unfilled(model: nn.Module) -> bool:
    """Whether a tensor has no values: one that is not in the state dict, left by building without values."""
    kept = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers(), *kept))
