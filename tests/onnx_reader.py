"""What OpenVINO makes of an ONNX file on a CPU; run in an environment with it, without cbpq.

``python onnx_reader.py FILE.onnx PICTURES.npy OUT.npz``: into OUT go ``logits`` as it computes them by itself, and
``exact`` with the hint to be accurate, and ``constants``, the types of the constants in its own graph.
"""

import sys

import numpy as np
import openvino


def main(file: str, pictures: str, out: str) -> None:
    core, images = openvino.Core(), np.load(pictures)
    model = core.read_model(file)
    constants = [str(node.get_output_element_type(0)) for node in model.get_ops() if node.get_type_name() == "Constant"]
    found = {}
    for name, hint in (("logits", "PERFORMANCE"), ("exact", "ACCURACY")):
        found[name] = core.compile_model(model, "CPU", {"EXECUTION_MODE_HINT": hint})({"input": images})["logits"]
    np.savez(out, constants=np.array(constants), logits=found["logits"], exact=found["exact"])


if __name__ == "__main__":
    main(*sys.argv[1:])
