"""The ONNX export in OpenVINO, in an environment with it: 4-bit integers, and the logits of PyTorch and onnxruntime."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from c_networks import constrained, lived, mobile, pictures
from environments import environment, run_in
from numpy.typing import NDArray
from small_job import ROOT
from torch import nn

from cbpq.exports.onnx import export_onnx
from cbpq.inputs import InputSpec
from cbpq.models import load_model

DIGITS = ROOT / "examples" / "digits" / "resnet.safetensors"
NETWORKS: dict[str, Callable[[], tuple[nn.Module, InputSpec]]] = {
    "digits": lambda: (load_model(str(DIGITS)).model, load_model(str(DIGITS)).info.input_spec),
    "mobile": lambda: (lived(mobile()), InputSpec(3, 24, 32)),
    "transformer": lambda: (timm.create_model("test_vit", num_classes=9, img_size=32).eval(), InputSpec(3, 32, 32)),
}


def read_by_openvino(path: Path, images: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    python = environment("openvino", "openvino==2026.4.1", "numpy")
    np.save(path.with_suffix(".npy"), images)
    script = ROOT / "tests" / "onnx_reader.py"
    run_in(python, script, path, path.with_suffix(".npy"), path.with_suffix(".npz"))
    with np.load(path.with_suffix(".npz")) as found:
        return dict(found)


@pytest.mark.slow
@pytest.mark.parametrize("constraint", ["binary", "two-bit-shift"])
@pytest.mark.parametrize("name", NETWORKS)
def test_openvino_computes_the_same(tmp_path: Path, name: str, constraint: str) -> None:
    torch.manual_seed(0)
    model, spec = NETWORKS[name]()
    file = constrained(model, constraint)
    result = export_onnx(model, file, spec, tmp_path / "x.onnx")
    images = pictures(spec, 20)
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    by_onnxruntime = session.run(["logits"], {"input": images.numpy()})[0]
    with torch.no_grad():
        ours = model(images).numpy()
    found = read_by_openvino(tmp_path / "x.onnx", images.numpy())
    assert (found["constants"] == "<Type: 'int4_t'>").sum() == result.facts["integer_weights"]["INT4"]
    largest = np.abs(ours).max()
    for expected in (ours, by_onnxruntime):
        np.testing.assert_allclose(found["exact"], expected, rtol=0, atol=1e-5 * largest)
        assert (found["exact"].argmax(axis=1) == expected.argmax(axis=1)).all()
    # by itself, it rounds what goes into linear layers to int8
    np.testing.assert_allclose(found["logits"], ours, rtol=0, atol=0.05 * largest)


@pytest.mark.slow
def test_openvino_takes_no_two_bit_integers(tmp_path: Path) -> None:
    """Why opset 21 is the default; once this fails, the documents can say so."""
    model, spec = NETWORKS["mobile"]()
    export_onnx(model, constrained(model, "ternary"), spec, tmp_path / "x.onnx", opset=25)
    with pytest.raises(AssertionError, match="Unsupported type"):
        read_by_openvino(tmp_path / "x.onnx", pictures(spec, 1).numpy())
