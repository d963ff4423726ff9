"""What the studies share: running the command line, keeping the result as small JSON, and mean ± deviation."""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any


def over_seeds(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation, in percent."""
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread} %"


def cbpq(*arguments: str) -> str:
    """Run the command line and give what it prints."""
    done = subprocess.run([sys.executable, "-m", "cbpq", *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def quantized(output: Path, *arguments: str) -> dict[str, Any]:
    """The report of ``cbpq quantize`` with these arguments; a finished run is kept, an interrupted one resumed."""
    if not (output / "model.safetensors").exists():
        unfinished = ["--resume"] if (output / "checkpoint" / "state.pt").exists() else []
        cbpq("quantize", *arguments, *unfinished, "-o", str(output))
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    return report


def keep(path: Path, report: dict[str, Any], measured: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Write the small JSON of a run: its command, what was ``measured``, ``more``, stages, settings and versions."""
    kept = {
        "command": without_folders(report["command"]),
        "test": {key: measured[key] for key in ("top1", "top1_interval", "loss", "images", "comparison")},
        **more,
        "stages": report["stages"],
        "seconds": report["seconds"],
        "file_bytes": report["sizes"]["file_bytes"],
        "versions": report["versions"],
        "settings": {key: value["value"] for key, value in report["settings"].items()},
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(kept, indent=1) + "\n")
    return kept


def without_folders(command: str) -> str:
    """A command line with files' names alone, as on any machine."""
    return shlex.join(Path(part).name if "/" in part else part for part in shlex.split(command))
