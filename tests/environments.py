"""Python environments of their own for packages that do not fit beside what the tests run in."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import uuid
from pathlib import Path

import pytest
from small_job import ROOT
from small_job import environment as variables

_NO_NETWORK = "NewConnectionError|Name or service not known|Temporary failure|timed out|unreachable|ProxyError|SSLError"


def environment(name: str, *packages: str, beside: bool = False) -> Path:
    """The Python of an environment with these packages, for subprocesses; made once and kept in the temporary folder.

    Args:
        name: for people; no two environments share a place if their packages differ.
        packages: what pip installs, such as ``onnx<1.23``.
        beside: whether the packages that the tests run with can be imported too, where there are none of its own.

    Skips the test where pip has no network.
    """
    own = Path(sysconfig.get_path("purelib"))
    content = "\n".join((sys.version, *packages, str(own) if beside else ""))
    folder = Path(tempfile.gettempdir()) / f"cbpq-{name}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
    if not folder.exists():
        new = folder.with_name(f"{folder.name}-{uuid.uuid4().hex}")  # another process may be at it as well
        try:
            _make(new, packages, own if beside else None)
            os.rename(new, folder)
        except OSError:
            if not folder.exists():
                raise
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return folder / "bin" / "python"


def _make(folder: Path, packages: tuple[str, ...], beside: Path | None) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, capture_output=True)
    if beside is not None:
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "beside.pth").write_text(f"{beside}\n", encoding="utf-8")
    install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *packages]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1]
        if re.search(_NO_NETWORK, done.stderr):
            pytest.skip(f"pip has no network for {', '.join(packages)}: {last}")
        pytest.fail(f"pip cannot install {', '.join(packages)}: {last}")


def run_in(python: Path, *arguments: object) -> str:
    """What Python prints with these arguments in such an environment, with cbpq as it is here; fails if it fails."""
    done = subprocess.run(
        [str(python), *map(str, arguments)], capture_output=True, text=True, check=False, cwd=ROOT, env=variables()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
