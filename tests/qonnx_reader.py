"""Run in an environment of its own, with qonnx: clean an exported network up, count its cost, execute it.

``python qonnx_reader.py NETWORK.onnx IMAGES.npy RESULT.json [--whole-batch]``; the images are float32 (N, C, H, W).
They go through the network one by one, or with ``--whole-batch`` all at once, the batch size changed by qonnx itself.
"""

import argparse
import json
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx
from qonnx.transformation.infer_datatypes import InferDataTypes
from qonnx.transformation.infer_shapes import InferShapes
from qonnx.util.cleanup import cleanup
from qonnx.util.inference_cost import inference_cost


def layers(model: Any) -> list[tuple[str, int]]:
    """Type and size of every weight that a convolution or linear layer gets directly."""
    names = [node.input[1] for node in model.graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]
    weights = {name: model.get_initializer(name) for name in names}
    return [(model.get_tensor_datatype(name).name, array.size) for name, array in weights.items() if array is not None]


def main() -> None:
    """Everything, in the order in which a user of qonnx would do it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("network", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--whole-batch", action="store_true")
    given = parser.parse_args()
    images = np.load(given.images)
    batch = len(images) if given.whole_batch else 1
    clean = str(given.network.with_suffix(".clean.onnx"))

    warnings.filterwarnings("error", message=".*datatype annotation")  # values that are not what they are said to be
    cleanup(str(given.network), out_file=clean, override_inpsize=batch if given.whole_batch else None)
    model = ModelWrapper(clean).transform(InferShapes()).transform(InferDataTypes())
    cost = inference_cost(str(given.network), discount_sparsity=False)["total_cost"]
    parts = [images[start : start + batch] for start in range(0, len(images), batch)]
    logits = np.concatenate([execute_onnx(model, {model.graph.input[0].name: part})["global_out"] for part in parts])
    result = {
        "versions": {name: metadata.version(name) for name in ("qonnx", "onnx", "onnxruntime")},
        "layers": layers(model),
        "cost": {name: value for name, value in cost.items() if name.startswith(("mem_w", "op_mac", "total"))},
        "unsupported": cost["unsupported"],
        "logits": logits.tolist(),
    }
    given.result.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
