"""What is in a file, checked against a scalar count of the same weights."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cbpq.cli.inspect import bars
from cbpq.errors import CbpqError, UsageError
from cbpq.fileformat import CbpqFile, ConstrainedTensor, read, write
from cbpq.inspection import inspect_file

LEVELS = (-4, -2, -1, 0, 1, 2, 4)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    constrained = {
        "layer10.weight": ConstrainedTensor(
            rng.choice(LEVELS, size=(4, 3, 3, 3)).astype(np.int32),
            np.array([0.5, 0.25, 1.0, 2.0], np.float32),
            LEVELS,
            4,
            "two-bit-shift",
        ),
        "layer2.weight": ConstrainedTensor(
            np.array([[1, -1, 1], [1, 1, 1]], np.int32), np.array(0.125, np.float32), (-1, 1), 1, "binary"
        ),
    }
    others: dict[str, NDArray[Any]] = {
        "bias": np.zeros(5, np.float32),
        "half": np.zeros(3, np.float16),
        "steps": np.array(7, np.int64),
    }
    path = tmp_path / "model.safetensors"
    write(path, CbpqFile(constrained, others, {"architecture": "tiny"}, {"seed": 1}, {"top1": 50.0}))
    return path


def test_every_number_against_a_plain_count(file: Path) -> None:
    codes = np.random.default_rng(0).choice(LEVELS, size=(4, 3, 3, 3)).ravel().tolist()
    counted = Counter(codes)
    inspection = inspect_file(file)
    binary, shift = inspection.layers  # layer2 before layer10
    assert (binary.name, shift.name) == ("layer2.weight", "layer10.weight")

    assert shift.shape == (4, 3, 3, 3)
    assert shift.parameters == 108
    assert shift.codes == LEVELS
    assert shift.counts == tuple(counted[level] for level in LEVELS)
    assert shift.zeros == pytest.approx(counted[0] / 108)
    entropy = -sum(n / 108 * math.log2(n / 108) for n in counted.values())
    assert shift.entropy == pytest.approx(entropy)
    assert shift.bits == 3
    assert shift.codes_bytes == 4 * math.ceil(27 * 3 / 8)
    assert shift.entropy_bytes == round(108 * entropy / 8)
    assert shift.bits_per_weight == pytest.approx(8 * 44 / 108)
    assert (shift.scale_per, shift.scales, shift.scale_min, shift.scale_max) == ("channel", 4, 0.25, 2.0)

    assert binary.counts == (1, 5)
    assert binary.bits_per_weight == pytest.approx(8 * 2 / 6)
    assert (binary.scale_per, binary.scale_min, binary.scale_max) == ("layer", 0.125, 0.125)

    assert inspection.sizes == {
        "float32_bytes": 4 * (108 + 6) + 20 + 12 + 8,
        "file_bytes": file.stat().st_size,
        "codes_bytes": 46,
        "scale_bytes": 20,
        "others_bytes": 20 + 6 + 8,
        "header_bytes": 8 + int.from_bytes(file.read_bytes()[:8], "little"),
        "entropy_bytes": round((108 * shift.entropy + 6 * binary.entropy) / 8),
        "bits_per_weight": pytest.approx(8 * 46 / 114),
        "entropy": pytest.approx((108 * shift.entropy + 6 * binary.entropy) / 114),
        "bits_per_parameter": pytest.approx(8 * file.stat().st_size / 122),
        "constrained_share": pytest.approx(114 / 122),
        "half_share": pytest.approx(3 / 8),
    }
    assert (inspection.source, inspection.run, inspection.metrics) == (
        {"architecture": "tiny"},
        {"seed": 1},
        {"top1": 50.0},
    )


def test_dense_packing_is_seen(file: Path) -> None:
    write(file, read(file).packed_as("dense"))
    binary, shift = inspect_file(file).layers
    assert (binary.packing, binary.codes_bytes) == ("bits", 2)
    words = 4 * (2 * 4 + 2)  # 27 weights of each channel: two words of 11, and 5 digits below 256²
    assert (shift.packing, shift.bits, shift.codes_bytes) == ("dense", 3, words)
    assert shift.bits_per_weight == pytest.approx(8 * words / 108)


def test_to_dict_is_json(file: Path) -> None:
    document = json.loads(json.dumps(inspect_file(str(file)).to_dict(), allow_nan=False))
    assert document["layers"][0]["counts"] == [1, 5]
    assert document["layers"][1]["shape"] == [4, 3, 3, 3]


def test_a_file_without_constrained_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, CbpqFile({}, {"bias": np.zeros(2, np.float32)}, {}, {}, {}))
    inspection = inspect_file(path)
    assert inspection.layers == ()
    assert inspection.sizes["bits_per_weight"] == inspection.sizes["constrained_share"] == 0


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        inspect_file(tmp_path / "nothing")
    with pytest.raises(CbpqError):
        inspect_file(tmp_path)
    (tmp_path / "junk").write_bytes(b"\0" * 100)
    with pytest.raises(CbpqError):
        inspect_file(tmp_path / "junk")


def test_bars() -> None:
    assert bars((0, 1, 4, 8)) == " ▂▅█"
    assert bars((1, 1_000_000)) == "▁█"
    assert bars((5,) * 40 + (0,) * 10) == "40 of 50 levels used"
