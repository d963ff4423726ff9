"""``cbpq doctor``: whether everything cbpq needs is here and works."""

import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import typer

import cbpq
from cbpq import sections
from cbpq.cli import common
from cbpq.sections import Section

CORE = ("torch", "torchvision", "timm", "numpy", "safetensors", "typer", "rich")


@dataclass(frozen=True)
class Check:
    """One part: ``ok`` is None for an optional one that is not installed."""

    part: str
    found: str
    ok: bool | None
    advice: str = ""


def command(json: common.Json = False) -> None:
    """Check versions, devices and optional parts, and test the file format; exit code 4 if a needed part fails.

    Examples:

      cbpq doctor
      cbpq doctor --json
    """
    checks = run_checks()
    healthy = all(check.ok is not False for check in checks)
    if json:
        common.print_json({"ok": healthy, "checks": checks})
    else:
        marks = {True: "ok", False: "FAILED", None: "not installed"}
        rows = [(check.part, check.found, marks[check.ok]) for check in checks]
        notes = tuple(f"{check.part}: {check.advice}" for check in checks if check.advice)
        sections.render(common.stdout(), Section("", ("part", "found", ""), rows, notes=notes))
    if not healthy:
        failed = ", ".join(check.part for check in checks if check.ok is False)
        common.stderr().print(f"error: not in order: {failed}", markup=False, soft_wrap=True, style="red")
        raise typer.Exit(4)


def run_checks() -> list[Check]:
    """Look at every part; a part that fails is a result, never an exception."""
    checks = [
        Check("cbpq", cbpq.__version__, True),
        Check("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", True),
    ]
    checks += [_core(package) for package in CORE]
    checks.append(
        _try("torch with torchvision", _import_pair, "install a matching pair: pip install torch torchvision")
    )
    checks.append(_try("devices", _devices, "reinstall torch: pip install --force-reinstall torch torchvision"))
    checks.append(
        _try("file format", _write_and_read, "reinstall cbpq, safetensors and numpy; check the temporary folder")
    )
    checks += _extras()
    return checks


def _core(package: str) -> Check:
    version = _version_of(package)
    return Check(package, version or "nothing", version is not None, "" if version else f"run: pip install {package}")


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _try(part: str, look: Callable[[], str], advice: str) -> Check:
    try:
        return Check(part, look(), True)
    except Exception as error:  # whatever it is, it is the finding
        return Check(part, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", False, advice)


def _import_pair() -> str:
    """Import both and call an operator of torchvision's own: builds that do not match fail only there."""
    import torch
    import torchvision

    kept = torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2), torch.tensor([1.0, 0.5]), 0.5)
    if kept.tolist() != [0]:
        raise RuntimeError("torchvision computes wrong results")
    return "work together"


def _devices() -> str:
    import torch

    from cbpq.devices import describe_device

    found = [torch.device("cpu")]
    found += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    found += [torch.device("mps")] if torch.backends.mps.is_available() else []
    for device in found:
        torch.ones(2, device=device).sum().item()
    return ", ".join(map(describe_device, found))


def _write_and_read() -> str:
    """Pack, write, read and decode one small weight."""
    import numpy as np

    from cbpq.fileformat import CbpqFile, ConstrainedTensor, read, write

    codes = np.array([[-4, -2, -1, 0], [1, 2, 4, 4]], np.int32)
    tensor = ConstrainedTensor(codes, np.array([0.5, 2.0], np.float32), (-4, -2, -1, 0, 1, 2, 4), 4, "two-bit-shift")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        write(path, CbpqFile({"weight": tensor}, {}, {}, {}, {}))
        back = read(path).constrained["weight"]
    if not (np.array_equal(back.codes, codes) and np.array_equal(back.weight(), tensor.weight())):
        raise RuntimeError("what was read is not what was written")
    return "written and read back"


def _extras() -> list[Check]:
    """Look for the packages of every export format that has an extra."""
    from cbpq.exports import FORMATS

    checks: dict[str, Check] = {}  # several formats share packages
    for name, target in FORMATS.items():
        for package in target.modules:
            version = _version_of(package)
            advice = "" if version else f'for {name} export: pip install "cbpq[{target.extra}]"'
            checks.setdefault(package, Check(package, version or "nothing", True if version else None, advice))
    return list(checks.values())
