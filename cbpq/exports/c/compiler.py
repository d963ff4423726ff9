"""Whether generated code compiles here and does what it should."""

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from cbpq.errors import CbpqError

FLAGS = ("-std=c99", "-O2", "-Wall", "-Wextra", "-pedantic")
_NAMES = ("cc", "gcc", "clang")
_SECONDS = 1800  # for a large network on a small machine


def find_compiler() -> str | None:
    """The C compiler's path, or None."""
    return next((path for path in map(shutil.which, _NAMES) if path), None)


def version(compiler: str) -> str:
    """The first line of what a compiler says of itself."""
    return (_run([compiler, "--version"], Path.cwd()).stdout.splitlines() or ["unknown"])[0]


def compile_and_run(compiler: str, files: Mapping[str, str]) -> str:
    """What ``main.c`` prints, compiled with the other files in a temporary folder.

    Raises:
        CbpqError: it does not compile, does not end, or finds other results than expected.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="cbpq-") as name:
            folder = Path(name)
            for file, content in files.items():
                (folder / file).write_text(content, encoding="ascii")
            built = _run([compiler, *FLAGS, "network.c", "main.c", "-lm", "-o", "check"], folder)
            if built.returncode:
                raise CbpqError(f"{compiler} does not compile the C code: {_first(built.stderr)}; nothing was written")
            ran = _run([str(folder / "check")], folder)
    except OSError as error:
        raise CbpqError(
            f"the C code cannot be checked here ({error.strerror}); --no-check writes it without a check"
        ) from error
    if ran.returncode:
        raise CbpqError(
            f"the C code computes something else than torch ({_first(ran.stdout + ran.stderr)}); nothing was written"
        )
    return ran.stdout


def _run(command: list[str], folder: Path) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise CbpqError(
            f"{Path(command[0]).name} did not end within {_SECONDS} s; --no-check writes the C code without a check"
        ) from error


def _first(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line]
    return (errors or lines or ["it says nothing"])[0][:300]
