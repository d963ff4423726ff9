"""An exported network in the tool that it is for, picture by picture on one thread; `table` runs this.

``python -m examples.deploy.consumers CONSUMER EXPORT DATA.npz OUT.npz``: DATA holds ``inputs``, normalised float32
(N, C, H, W), and ``pixels``, uint8 (N, H, W, C). Into OUT go ``logits`` (N, classes), ``version``, and with
``--repetitions`` the CPU seconds that single pictures took, as ``seconds``, and as ``float32_seconds`` with the network
that ``--float32`` names.

At the top only numpy is imported, since the interpreter may be that of an environment with one of these tools alone.
"""

import argparse
import ctypes
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# from one picture, as inputs (1, C, H, W) and as pixels (H, W, C), to logits (classes)
Runs = Callable[[NDArray[np.float32], NDArray[np.uint8]], NDArray[np.float32]]
NETWORK = "network"
_COMPILE = ("cc", "-std=c99", "-O2", "-shared", "-fPIC")


def _by_torch(network: Any) -> Runs:
    import torch

    torch.set_num_threads(1)

    def run(inputs: NDArray[np.float32], _: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.no_grad():
            logits: NDArray[np.float32] = network(torch.from_numpy(inputs)).numpy()[0]
        return logits

    return run


def _rebuilt(source: Path, arch: str | None) -> Any:
    import cbpq

    return cbpq.load(source, arch=arch)


def network(export: Path, source: Path, arch: str | None) -> Runs:
    """The network that cbpq loads, which every format is compared with."""
    return _by_torch(_rebuilt(export, arch).model)


def packed(export: Path, source: Path, arch: str | None) -> Runs:
    """A cbpq file whose weights stay packed in memory and are decoded whenever they are used."""
    import cbpq

    return _by_torch(cbpq.load(export, arch=arch, packed=True).model)


def state_dict(export: Path, source: Path, arch: str | None) -> Runs:
    """A state dict in the code of the network."""
    import torch

    model = _rebuilt(source, arch).model
    model.load_state_dict(torch.load(export, weights_only=True))
    return _by_torch(model)


def folded(export: Path, source: Path, arch: str | None) -> Runs:
    """A state dict in the code of the network without the folded BatchNorm layers."""
    import torch

    from cbpq.exports.folding import find_folds, without_norms

    loaded = _rebuilt(source, arch)
    model = without_norms(loaded.model, find_folds(loaded.model, loaded.info.input_spec))
    model.load_state_dict(torch.load(export, weights_only=True))
    return _by_torch(model)


def torchao(export: Path, source: Path, arch: str | None) -> Runs:
    """Torchao's tensors as the weights of the network."""
    from safetensors import safe_open
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    with safe_open(export, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
        state, rest = unflatten_tensor_state_dict(tensors, file.metadata())
    model = _rebuilt(source, arch).model
    model.load_state_dict({**state, **rest}, assign=True)
    return _by_torch(model)


def pt2(export: Path, source: Path, arch: str | None) -> Runs:
    """A program of torch.export."""
    import torch

    return _by_torch(torch.export.load(export).module())


def onnxruntime(export: Path, source: Path, arch: str | None) -> Runs:
    """An ONNX file in onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(export, options, providers=["CPUExecutionProvider"])
    return lambda inputs, _: session.run(["logits"], {"input": inputs})[0][0]


def openvino(export: Path, source: Path, arch: str | None, hint: str = "PERFORMANCE") -> Runs:
    """An ONNX file in OpenVINO; the hint says whether speed comes first, as by itself, or exactness."""
    import openvino

    settings = {"EXECUTION_MODE_HINT": hint, "INFERENCE_NUM_THREADS": 1}
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(export), "CPU", settings)
    return lambda inputs, _: compiled({"input": inputs})["logits"][0]


def qonnx(export: Path, source: Path, arch: str | None) -> Runs:
    """An annotated ONNX file, cleaned up and executed by qonnx."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.util.cleanup import cleanup

    clean = str(export.with_suffix(".clean.onnx"))
    cleanup(str(export), out_file=clean)
    model = ModelWrapper(clean)
    name, output = model.graph.input[0].name, model.graph.output[0].name
    return lambda inputs, _: execute_onnx(model, {name: inputs})[output][0]


def coreml(export: Path, source: Path, arch: str | None) -> Runs:
    """A Core ML package as coremltools reads it, its operators computed by torch: Core ML itself is Apple's."""
    from examples.deploy import coreml_reader

    return _by_torch(partial(coreml_reader.run, coreml_reader.read(export)))


def compiled_c(export: Path, source: Path, arch: str | None) -> Runs:
    """A folder of C code, compiled to a library; scores in integers are turned into logits."""
    header = (export / "network.h").read_text()
    found = dict(re.findall(r"#define CBPQ_(CLASSES|CHANNELS|HEIGHT|WIDTH|LOGIT_SCALE) ([\d.e+-]+)", header))
    integers, scale = "LOGIT_SCALE" in found, np.float32(found.get("LOGIT_SCALE", 1))
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "network.so"
        subprocess.run([*_COMPILE, str(export / "network.c"), "-lm", "-o", str(target)], check=True)
        library = ctypes.CDLL(str(target))
    values = np.zeros(
        int(found["CHANNELS"]) * int(found["HEIGHT"]) * int(found["WIDTH"]), np.int8 if integers else np.float32
    )
    scores = np.zeros(int(found["CLASSES"]), np.int32 if integers else np.float32)

    def run(_: NDArray[np.float32], pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        library.cbpq_normalize(ctypes.c_void_p(pixels.ctypes.data), ctypes.c_void_p(values.ctypes.data))
        library.cbpq_run(ctypes.c_void_p(values.ctypes.data), ctypes.c_void_p(scores.ctypes.data))
        logits: NDArray[np.float32] = (scores * scale).astype(np.float32)
        return logits

    return run


CONSUMERS: Mapping[str, Callable[[Path, Path, str | None], Runs]] = {
    NETWORK: network,
    "cbpq": packed,
    "state-dict": state_dict,
    "folded": folded,
    "torchao": torchao,
    "pt2": pt2,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "openvino-accuracy": partial(openvino, hint="ACCURACY"),
    "qonnx": qonnx,
    "coreml": coreml,
    "c": compiled_c,
}
_PACKAGES = {
    "cbpq": "cbpq",
    "onnxruntime": "onnxruntime",
    "openvino": "OpenVINO",
    "openvino-accuracy": "OpenVINO",
    "qonnx": "qonnx",
    "coreml": "coremltools",
    "torchao": "torchao",
}


def version_of(consumer: str) -> str:
    """Name and version of the tool."""
    if consumer == "c":
        told = subprocess.run([_COMPILE[0], "--version"], stdout=subprocess.PIPE, text=True, check=True).stdout
        return told.splitlines()[0]
    package = _PACKAGES.get(consumer, "torch")
    return f"{package} {version(package.lower()).split('+')[0]}"


def cpu_seconds(run: Runs, inputs: NDArray[np.float32], pixels: NDArray[np.uint8]) -> float:
    """CPU time of this process for one picture; other processes make the clock on the wall useless."""
    start = time.process_time()
    run(inputs, pixels)
    return time.process_time() - start


def main() -> None:
    """Run the consumer and write what it gives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("consumer", choices=CONSUMERS)
    parser.add_argument("export", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--network", type=Path, help="the cbpq file, for formats that need the network's code")
    parser.add_argument("--arch", help="the function that builds it")
    parser.add_argument("--float32", nargs=2, metavar=("CONSUMER", "EXPORT"))
    parser.add_argument("--pictures", type=int, required=True)
    parser.add_argument("--repetitions", type=int, default=0)
    args = parser.parse_args()

    with np.load(args.data) as data:
        inputs, pixels = data["inputs"][: args.pictures, None], data["pixels"][: args.pictures]
    run = CONSUMERS[args.consumer](args.export, args.network, args.arch)
    logits = np.stack([run(*picture).copy() for picture in zip(inputs, pixels, strict=True)])
    seconds: list[list[float]] = [[], []]
    if args.repetitions:
        runs = [run]
        if args.float32:
            runs.append(CONSUMERS[args.float32[0]](Path(args.float32[1]), args.network, args.arch))
            runs[1](inputs[0], pixels[0])
        for number in range(args.repetitions):  # in turn, so that both see the same load of the machine
            at = number % len(inputs)
            for one, times in zip(runs, seconds, strict=False):
                times.append(cpu_seconds(one, inputs[at], pixels[at]))
    measured: dict[str, Any] = {"seconds": seconds[0], "float32_seconds": seconds[1]}
    np.savez(args.out, logits=logits, version=version_of(args.consumer), **measured)


if __name__ == "__main__":
    main()
