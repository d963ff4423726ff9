"""What a loaded network is, and what its forward pass returns."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn

from cbpq.architectures import checked_arguments
from cbpq.errors import DataError, FileFormatError, SourceError, UsageError, one_line
from cbpq.inputs import InputSpec
from cbpq.pictures import decode
from cbpq.transforms import preprocess


@dataclass(frozen=True)
class SourceInfo:
    """Everything needed to build a network again, and what it was fed and filled with."""

    library: str  #: torchvision, timm or callable
    architecture: str  #: the name within the library; for a callable ``package.module:function``
    arguments: dict[str, Any]  #: for the constructor; JSON types
    input_spec: InputSpec
    weights_sha256: str | None  #: over the state dict, see ``checkpoints.content_sha256``; None for random weights

    def to_dict(self) -> dict[str, Any]:
        """The information as JSON types."""
        return dataclasses.asdict(self) | {"input_spec": self.input_spec.to_dict()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "SourceInfo":
        """The information of ``to_dict``.

        Raises:
            FileFormatError: fields are missing, unknown or of the wrong kind.
        """
        kinds = {"library": str, "architecture": str, "arguments": dict, "input_spec": dict}
        if set(fields) != {*kinds, "weights_sha256"}:
            raise FileFormatError(f"the source has the fields {sorted(fields)}; it was not written by cbpq")
        for name, kind in kinds.items():
            if not isinstance(fields[name], kind):
                raise FileFormatError(f"the source's {name} is {fields[name]!r}; it was not written by cbpq")
        if fields["library"] not in ("torchvision", "timm", "callable"):
            raise FileFormatError(f"the source's library is {fields['library']!r}; a newer cbpq may know it")
        if not isinstance(fields["weights_sha256"], str | None):
            raise FileFormatError("the source's weights_sha256 is no text; it was not written by cbpq")
        try:
            spec = InputSpec.from_dict(fields["input_spec"])
            checked_arguments(fields["arguments"])
        except (UsageError, SourceError) as error:
            raise FileFormatError(f"the source is not usable: {error}") from error
        return cls(**{**fields, "input_spec": spec})


@dataclass
class LoadedModel:
    """A network ready for use: float32, evaluation mode, on the CPU. ``notes`` tell what was decided for the user."""

    model: nn.Module
    info: SourceInfo
    num_classes: int
    notes: tuple[str, ...] = ()

    def preprocess(self, picture: str | Path | Image.Image) -> Tensor:
        """A picture, or the file of one, as the network takes it: resized, cropped and normalised, (1, C, H, W).

        Raises:
            DataError: it cannot be read, or has colours where the network takes grey pictures.
        """
        if isinstance(picture, Image.Image):
            return preprocess(picture, self.info.input_spec)
        name = one_line(picture)
        try:
            with Path(picture).open("rb") as stream:
                return preprocess(decode(stream, name, "give another one"), self.info.input_spec, name)
        except (OSError, ValueError) as error:  # ValueError: a null character
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(f"{name} cannot be opened ({reason}); give another picture") from error


def logits(output: Any) -> Tensor:
    """The class scores (B, classes) in what a network returns; of several heads the main one.

    Raises:
        SourceError: no scores in it.
    """
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif not isinstance(output, Tensor):
        output = getattr(output, "logits", output)
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if isinstance(output, Tensor):
        return output
    raise SourceError(f"the network returns a {type(output).__name__}; it must return the class scores as a tensor")


def auxiliary_logits(output: Any) -> tuple[Tensor, ...]:
    """The scores of the other heads, which some networks return while training (GoogLeNet, Inception, DeiT)."""
    if isinstance(output, (Tensor, Mapping)) or not isinstance(output, (tuple, list)):
        return ()
    main = logits(output)
    return tuple(o for o in output if isinstance(o, Tensor) and o is not main and o.shape == main.shape)
