"""What exports that translate the network have in common."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import numpy as np
import torch
from torch import Tensor, nn

from cbpq.errors import CbpqError
from cbpq.fileformat import CbpqFile
from cbpq.models import logits

PREFIX = "network."  # of every name inside `Logits`


class Logits(nn.Module):
    """The network with the logits as its only output."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to logits (B, classes)."""
        return logits(self.network(images))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's progress lines, log records and warnings to itself."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


def one_line(error: Exception) -> str:
    """The message of a foreign exception, shortened to one line."""
    text = " ".join(str(error).split())
    return text[:300] if text else type(error).__name__


def check_weights(network: nn.Module, file: CbpqFile) -> None:
    """Make sure that ``network`` is the one ``file`` holds.

    Raises:
        CbpqError: a tensor of the file is missing or different.
    """
    state = network.state_dict()
    arrays = file.others | {name: tensor.weight() for name, tensor in file.constrained.items()}
    for name, array in arrays.items():
        expected = torch.from_numpy(np.array(array))  # a copy, because arrays from a file may be read-only
        if name not in state or state[name].dtype != expected.dtype or not torch.equal(state[name], expected):
            raise CbpqError(f"the network does not hold the file's {name}; load it from the file to be exported")


def all_names(network: nn.Module) -> dict[str, list[str]]:
    """For each state-dict name all names of its tensor: layers may share one, and the translation may use any name."""
    names: dict[int, list[str]] = {}
    state = network.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return {name: names[id(tensor)] for name, tensor in state.items()}
