"""The command line: one file per command, each a thin wrapper over a plain function of the library.

Exit codes: 0 done, 1 failed, 2 usage, 3 a gate was not met, 4 an optional part or a device is missing, 130 interrupted,
143 ended by SIGTERM.
"""

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

import cbpq
from cbpq.cli import compare, doctor, evaluate, export, inspect, models, processes, quantize
from cbpq.cli.common import stderr
from cbpq.errors import CbpqError, UsageError
from cbpq.sections import printable

app = typer.Typer(
    name="cbpq",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("quantize")(quantize.command)
app.command("evaluate")(evaluate.command)
app.command("compare")(compare.command)
app.command("inspect")(inspect.command)
app.command("export")(export.command)
app.command("models")(models.command)
app.command("doctor")(doctor.command)

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")
_MOST_SAID = 1500  # characters of an error: a file may hold names of any length
_ADVICE = {
    errno.ENOSPC: "free some space or write elsewhere",
    errno.EDQUOT: "free some space or write elsewhere",
    errno.EACCES: "change its permissions or choose another place",
    errno.EPERM: "change its permissions or choose another place",
    errno.EROFS: "choose a place that can be written",
}


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cbpq {cbpq.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Lead every weight of a pretrained image classifier to one of a few allowed values.

    Exit codes: 0 done, 1 failed, 2 usage, 3 a gate was missed, 4 a part or device is missing, 130 interrupted,
    143 ended by SIGTERM.
    """
    if processes.are_several() and context.invoked_subcommand not in ("quantize", "evaluate"):
        raise UsageError("only quantize and evaluate run in several processes; start one")
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; every failure is one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that lacks a character shows ? and goes on
            stream.reconfigure(errors="replace")
    processes.calm()
    if not (sys.warnoptions or os.environ.get("CBPQ_DEBUG")):
        warnings.simplefilter("ignore")  # those of other packages mean nothing to who runs a command
    try:
        # standalone_mode off: errors come here instead of ending the process inside typer
        code = app(args=arguments, prog_name="cbpq", standalone_mode=False)
        processes.finish()
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # whoever read our output has seen enough; point stdout away so that the interpreter's last flush is quiet
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("CBPQ_DEBUG"):
            traceback.print_exc()
        explained, code = explain(error)
        with processes.last_word(error, explained, code) as message:
            if message is not None:
                line = printable(_brief(" ".join(message.split())))
                kind = "interrupted" if code > 128 else "error"
                stderr().print(f"{kind}: {line}", markup=False, soft_wrap=True, style="red")
        return code
    if code == 130 and not processes.is_launched():  # else those that were launched have said it
        stderr().print("interrupted")
    return code if isinstance(code, int) else 0


def _brief(line: str) -> str:
    """A line without its middle if it is far too long: what is wrong comes first, and what to do about it last."""
    return line if len(line) <= _MOST_SAID else f"{line[: _MOST_SAID - 300]} … {line[-300:]}"


def explain(error: BaseException) -> tuple[str, int]:
    """The line and the exit code an exception ends with."""
    text = str(error)
    if isinstance(error, CbpqError):
        return text, error.exit_code
    if isinstance(error, OSError) and error.errno in _ADVICE:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; {_ADVICE[error.errno]}", 1
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(phrase in text.lower() for phrase in _OUT_OF_MEMORY)
    ):
        return f"out of memory; lower --batch-size, --input-size or --workers ({text[:200] or 'no more memory'})", 1
    if isinstance(error, typer.Abort):
        return "aborted", 1
    # typer's own usage errors share no public class over the versions supported, but all bring these two
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        return error.format_message().rstrip(".") + hint, int(error.exit_code)
    kind = type(error).__name__
    return f"this is a bug in cbpq: {kind}: {text or 'no message'}; CBPQ_DEBUG=1 shows the traceback", 1
