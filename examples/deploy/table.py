"""Write a network in every format, run each in the tool that it is for, and print one table of what came out.

python -m examples.deploy.table resnet18/model.safetensors --data random.npz --name resnet18 -o resnet18.json
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cbpq
from cbpq import fileformat
from cbpq.errors import CbpqError
from cbpq.inputs import InputSpec
from examples.deploy.consumers import CONSUMERS, NETWORK
from examples.deploy.formats import FORMATS, Format

ROOT = Path(__file__).parents[2]
PYTHONS = ("openvino", "qonnx", "coreml")
HEAD = (
    "| network | `cbpq export …` | size | consumer | pictures | logits differ by | top-1 | time | FP32 there |",
    "|---|---|---:|---|---:|---:|---:|---:|---:|",
)


@dataclass(frozen=True)
class Job:
    """The network, what to measure with, and where files go."""

    source: Path
    arch: str | None
    data: str
    name: str
    folder: Path
    pythons: Mapping[str, str]
    pictures: int
    few: int
    repetitions: int

    def out(self, ending: str) -> Path:
        """What a format is written to."""
        return self.folder / f"{self.name}{ending}"


def run(python: str, *arguments: object) -> str:
    """What a module of this repository prints, run by some interpreter with one thread."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [python, "-m", *map(str, arguments)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def read_pictures(path: str, spec: InputSpec, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None]:
    """The first test pictures (N, H, W, C), and their labels (N,) if there are any."""
    with np.load(path) as arrays:
        images = arrays["val_images" if "val_images" in arrays else "images"][:count]
        labels = arrays["val_labels"][:count].ravel().astype(np.int64) if "val_labels" in arrays else None
    images = images.reshape(*images.shape[:3], -1)
    if images.shape[1:] != (spec.height, spec.width, spec.channels):
        raise SystemExit(f"{path} has pictures of {images.shape[1:]}, not of the network's own size")
    return images, labels


def normalized(pixels: NDArray[np.uint8], spec: InputSpec) -> NDArray[np.float32]:
    """Pixels (N, H, W, C) as a network is fed them, (N, C, H, W)."""
    mean, deviation = (np.array(values, np.float32) for values in (spec.mean, spec.std))
    fed = (pixels.astype(np.float32) / np.float32(255) - mean) / deviation
    return np.ascontiguousarray(fed.transpose(0, 3, 1, 2))


def write_float32(source: Path, out: Path) -> Path:
    """The same network as a file whose weights are all float32, to be exported in the same way."""
    file = fileformat.read(source)
    decoded = {name: tensor.weight() for name, tensor in file.constrained.items()}
    fileformat.write(out, replace(file, constrained={}, others={**file.others, **decoded}))
    return out


def consumed(job: Job, python: str, *arguments: object) -> dict[str, Any]:
    """What a consumer gives."""
    out = job.folder / "measured.npz"
    network = ("--network", job.source, *(("--arch", job.arch) if job.arch else ()))
    run(python, "examples.deploy.consumers", *arguments[:2], job.folder / "data.npz", out, *network, *arguments[2:])
    with np.load(out) as found:
        return dict(found)


@cache
def exported(python: str, *command: str) -> dict[str, Any]:
    """What ``cbpq export`` says; a file that several rows need is written once."""
    told: dict[str, Any] = json.loads(run(python, "cbpq", *command, "--overwrite", "--json"))
    return told


def float32_there(job: Job, row: Format) -> tuple[str, Path]:
    """The consumer and the file of the FP32 network to compare times with."""
    if row.like == NETWORK:
        return NETWORK, job.source
    plain = replace(row, options=row.options[:2], ranged=False)
    out = job.out(f"-float32{row.ending}")
    exported(sys.executable, *plain.command(job.folder / "float32.safetensors", job.arch, "", out), "--no-check")
    return row.consumer, out


def measured(job: Job, row: Format, expected: NDArray[np.float32], labels: NDArray[np.int64] | None) -> dict[str, Any]:
    """One row: sizes, and what the consumer computes and takes."""
    python = job.pythons[row.python] if row.python else sys.executable
    command = row.command(job.source, job.arch, job.data, job.out(row.ending))
    told = exported(python if row.exported_there else sys.executable, *command)
    against = ("--float32", *float32_there(job, row)) if row.like else ()
    count = min(job.few if row.slow else job.pictures, len(expected))
    repetitions = max(3, job.repetitions // 10) if row.slow else job.repetitions
    limits = ("--pictures", count, "--repetitions", repetitions)
    found = consumed(job, python, row.consumer, job.out(row.ending), *against, *limits)
    says, ours = found["logits"].argmax(axis=1), expected[:count].argmax(axis=1)
    timed = row.like != ""  # what torch takes in the place of Core ML says nothing
    return {
        "command": " ".join(row.options),
        "bytes": told["size"],
        "constant_bytes": told.get("constant_bytes"),
        "consumer": f"{found['version']}{', ' + row.words if row.words else ''}",
        "pictures": count,
        "max_difference": float(np.abs(found["logits"] - expected[:count]).max()),
        "max_logit": float(np.abs(expected[:count]).max()),
        "top1": float((says == labels[:count]).mean() * 100) if labels is not None else None,
        "same_answer": float((says == ours).mean() * 100),
        "repetitions": repetitions,
        "seconds": median(found["seconds"].tolist()) if timed else None,
        "float32_seconds": median(found["float32_seconds"].tolist()) if timed else None,
    }


def measure(job: Job, only: Sequence[str]) -> Iterator[dict[str, Any]]:
    """All rows that there is an interpreter for: what is known so far, after each."""
    loaded, file = cbpq.load(job.source, arch=job.arch), fileformat.read(job.source)
    pixels, labels = read_pictures(job.data, loaded.info.input_spec, job.pictures)
    np.savez(job.folder / "data.npz", pixels=pixels, inputs=normalized(pixels, loaded.info.input_spec))
    write_float32(job.source, job.folder / "float32.safetensors")
    reference = consumed(job, sys.executable, NETWORK, job.source, "--pictures", len(pixels))
    expected = reference["logits"]
    result: dict[str, Any] = {
        "network": job.name,
        "file_bytes": job.source.stat().st_size,
        "pytorch": {
            "version": str(reference["version"]),
            "pictures": len(expected),
            "top1": float((expected.argmax(axis=1) == labels).mean() * 100) if labels is not None else None,
        },
        "cbpq": cbpq.__version__,
        "machine": platform.machine(),
        "rows": [],
        "left_out": [],
    }
    for row in FORMATS:
        if not row.suits(file) or (only and row.consumer not in only):
            continue
        if row.python and row.python not in job.pythons:
            result["left_out"].append(f"{' '.join(row.options)} in {row.consumer}, for want of --{row.python}-python")
        else:
            print(" ".join(row.options), "in", row.consumer, file=sys.stderr, flush=True)
            result["rows"].append(measured(job, row, expected, labels))
        yield result


def size(count: int) -> str:
    """Bytes as people write them."""
    return f"{count / 1e6:.3g} MB" if count >= 1e6 else f"{count / 1e3:.4g} kB"


def line(name: str, row: Mapping[str, Any]) -> str:
    """One row as Markdown."""
    constants = row["constant_bytes"]
    top1, same = row["top1"], f"{row['same_answer']:.1f} % the same"
    cells = [
        name,
        f"`{row['command']}`",
        size(row["bytes"]) if constants is None else f"{size(constants)} of constants",
        row["consumer"],
        str(row["pictures"]),
        f"{row['max_difference']:.1e} of {row['max_logit']:.3g}",
        f"{top1:.1f} %, {same}" if top1 is not None else same,
        *("—" if time is None else f"{time * 1e3:,.1f} ms" for time in (row["seconds"], row["float32_seconds"])),
    ]
    return f"| {' | '.join(cells)} |"


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """One table of all networks."""
    return "\n".join([*HEAD, *(line(result["network"], row) for result in results for row in result["rows"])])


def command_line() -> argparse.ArgumentParser:
    """What the script takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a cbpq file")
    parser.add_argument(
        "--data", required=True, help="an .npz file with val_images and val_labels, or with images alone"
    )
    parser.add_argument("--arch", help="the function that builds the network, where the file does not tell")
    parser.add_argument("--name", default="network", help="what the exports are called")
    for tool in PYTHONS:
        parser.add_argument(f"--{tool}-python", help=f"the interpreter of an environment with {tool}")
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--few", type=int, default=100, help="pictures for qonnx, Core ML and C, which take long")
    parser.add_argument(
        "--repetitions", type=int, default=100, help="pictures to time; a tenth of it where they take long"
    )
    parser.add_argument("--work", type=Path, help="keep the exports in this folder")
    parser.add_argument("--only", nargs="*", default=[], choices=CONSUMERS, help="these consumers' rows")
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="results to be in the same table")
    parser.add_argument("-o", "--output", type=Path, help="JSON with everything that was measured")
    return parser


def main() -> None:
    """Measure, and print the table."""
    args = command_line().parse_args()
    pythons = {tool: path for tool in PYTHONS if (path := getattr(args, f"{tool}_python"))}
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.work or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        counts = (args.pictures, args.few, args.repetitions)
        result: dict[str, Any] = {"rows": [], "left_out": []}
        for result in measure(Job(args.file, args.arch, args.data, args.name, folder, pythons, *counts), args.only):
            if args.output:
                args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown([*(json.loads(path.read_text()) for path in args.beside), result]))
    for note in result["left_out"]:
        print(f"left out: {note}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except (CbpqError, OSError) as error:
        raise SystemExit(f"error: {' '.join(str(error).split())}") from None
