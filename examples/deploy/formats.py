"""The rows of the table: how each format is written, what reads it, and what it is compared with there."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cbpq.fileformat import CbpqFile
from examples.deploy.consumers import NETWORK


@dataclass(frozen=True)
class Format:
    """A row.

    Attributes:
        options: of ``cbpq export``.
        ending: of the name of what it writes.
        consumer: which of ``consumers.CONSUMERS`` reads it.
        words: what the table says of the consumer beside its version.
        python: the option that names the interpreter of the consumer, empty for the one that runs this.
        exported_there: whether ``cbpq export`` needs that interpreter too.
        like: how the FP32 network gets there: by the same ``export``, as the ``network`` itself, or not at all.
        slow: whether it takes so long that few pictures have to do.
        ranged: whether it needs pictures to find the ranges of activations.
        code: whether ``cbpq export`` needs the network's code.
        two_bits: whether it is for levels from -2 to 1 alone.
    """

    options: tuple[str, ...]
    ending: str
    consumer: str
    words: str = ""
    python: str = ""
    exported_there: bool = False
    like: str = "export"
    slow: bool = False
    ranged: bool = False
    code: bool = True
    two_bits: bool = False

    def suits(self, file: CbpqFile) -> bool:
        """Whether the levels of the file fit."""
        levels = [level for tensor in file.constrained.values() for level in tensor.levels]
        return not self.two_bits or (min(levels) >= -2 and max(levels) <= 1)

    def command(self, source: Path, arch: str | None, data: str, out: Path) -> list[str]:
        """The arguments of ``cbpq``."""
        given = ["export", str(source), *(("--arch", arch) if arch and self.code else ()), *self.options]
        return [*given, *(("--data", data) if self.ranged else ()), "-o", str(out)]


_ONNX = ("--format", "onnx")
FORMATS: Sequence[Format] = (
    Format(("--format", "cbpq", "--pack", "dense"), "-dense.safetensors", "cbpq", "packed", like=NETWORK, code=False),
    Format(
        ("--format", "cbpq", "--pack", "dense", "--half"),
        "-half.safetensors",
        "cbpq",
        "packed",
        like=NETWORK,
        code=False,
    ),
    Format(("--format", "state-dict"), ".pth", "state-dict", like=NETWORK, code=False),
    Format(("--format", "state-dict", "--fold-bn"), "-folded.pth", "folded", like=NETWORK),
    Format(("--format", "torchao"), "-torchao.safetensors", "torchao", like=NETWORK),
    Format(("--format", "pt2"), ".pt2", "pt2"),
    Format(_ONNX, ".onnx", "onnxruntime"),
    Format((*_ONNX, "--opset", "25"), "-int2.onnx", "onnxruntime", two_bits=True),
    Format(_ONNX, ".onnx", "openvino", python="openvino"),
    Format(_ONNX, ".onnx", "openvino-accuracy", "`ACCURACY`", "openvino"),
    Format(("--format", "qonnx"), "-qonnx.onnx", "qonnx", python="qonnx", slow=True),
    Format(("--format", "coreml"), ".mlpackage", "coreml", "computed by torch", "coreml", True, like="", slow=True),
    Format(("--format", "c"), "_c", "c", slow=True),
    Format(("--format", "c", "--activations", "int8"), "_int8", "c", slow=True, ranged=True),
)
