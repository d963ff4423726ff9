"""What exports that translate the network have in common."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import numpy as np
import torch
from torch import Tensor, nn

from cbpq.errors import CbpqError, brief
from cbpq.fileformat import CbpqFile
from cbpq.inputs import InputSpec
from cbpq.models import logits
from cbpq.tracing import unfused_attention

PREFIX = "network."  # of every name inside `Logits`


class Logits(nn.Module):
    """The network with the logits as its only output."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to logits (B, classes)."""
        return logits(self.network(images))


def program_of(network: nn.Module, spec: InputSpec, *, free_batch: bool) -> "torch.export.ExportedProgram":
    """torch's graph of ``network`` within `Logits`: for any number of pictures, or for one. Raises what torch and the
    network's code raise, so it belongs into `exporting`.
    """
    # with a free batch of 1, the 1 would become a constant
    example = torch.zeros(2 if free_batch else 1, spec.channels, spec.height, spec.width)
    shapes = ({0: torch.export.Dim.DYNAMIC},) if free_batch else None
    whole = network if isinstance(network, Logits) else Logits(network)
    return torch.export.export(whole, (example,), dynamic_shapes=shapes, strict=False)


def own_names(program: "torch.export.ExportedProgram") -> dict[str, str]:
    """The state-dict name of each input of the graph that stands for a parameter or a buffer of the network."""
    signature = program.graph_signature
    own = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return {node: name.removeprefix(PREFIX) for node, name in own.items()}


@contextmanager
def exporting(doing: str) -> Iterator[None]:
    """Let torch's exporter work in silence, without gradients and without fused operators for attention.

    Raises:
        CbpqError: it fails; ``doing`` says at what.
    """
    try:
        with quiet(), torch.no_grad(), unfused_attention():
            yield
    except Exception as error:  # torch raises whatever the network's code and the handling of each operator raise
        raise CbpqError(f"torch {torch.__version__} cannot {doing}: {brief(error)}") from error


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


def check_weights(network: nn.Module, file: CbpqFile) -> None:
    """Make sure that ``network`` is the one ``file`` holds.

    Raises:
        CbpqError: a tensor of the file is missing or different.
    """
    state = network.state_dict()
    for name, array in file.state().items():
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
