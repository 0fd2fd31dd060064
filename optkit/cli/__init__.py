"""The command line: one file a command. Results go to standard output, talk to standard error; each failure has its exit code.

0 ok, 1 a limit of the recipe did not hold, 2 bad usage or input, 3 a package or device is missing, 4 memory or disk, 70 a failure
of optkit itself, 129, 130 and 143 stopped by a signal, 141 nobody reads the output.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import traceback
from importlib.metadata import version as installed
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from optkit.cli.bench import bench
from optkit.cli.check import check
from optkit.cli.compare import compare_command
from optkit.cli.export import export
from optkit.cli.law import law_command
from optkit.cli.listing import list_names
from optkit.cli.plan import plan_command
from optkit.cli.profile import profile_command
from optkit.cli.run import run_command
from optkit.cli.schema import schema
from optkit.cli.train import train_command
from optkit.cli.verify import verify
from optkit.core.errors import OptkitError, ResourceError

app = typer.Typer(
    name="optkit",
    help="Apply compression transforms to a model by recipe, and measure what they buy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _tell_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"optkit {installed('optkit')}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="print the version", is_eager=True, callback=_tell_version)] = False,
) -> None:
    """Apply compression transforms to a model by recipe, and measure what they buy."""


app.add_typer(bench)
app.command("plan")(plan_command)
app.command("profile")(profile_command)
app.command("run")(run_command)
app.command("check")(check)
app.command("compare")(compare_command)
app.command("export")(export)
app.command("law")(law_command)
app.command("list")(list_names)
app.command("schema")(schema)
app.command("train")(train_command)
app.command("verify")(verify)


def main() -> NoReturn:
    """Run the command line and exit with the code that says how it went."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, _terminate)
    if sys.stdout is None or sys.stderr is None:  # closed by the caller
        nowhere = Path(os.devnull).open("w")  # noqa: SIM115
        sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    try:
        code = _called()
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        _say("stopped")
        code = getattr(stop, "exit_code", 130)
    except Exception as error:  # what is neither a refusal nor a lost output is our own mistake
        code = _told(error)
    sys.exit(code)


def _told(error: Exception) -> int:
    """Say what happened and return its exit code."""
    if isinstance(error, OptkitError):
        _say(str(error))
        return error.exit_code
    if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC):  # all files go through one door: this is our output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would try again at its end
        if error.errno == errno.EPIPE:
            return 141
        _say("cannot write standard output: the disk is full")
        return ResourceError.exit_code
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        _say(f"{str(error.filename)[:60]}...: the name is too long")
        return OptkitError.exit_code
    if isinstance(error, MemoryError) or (isinstance(error, ImportError) and "failed to map" in str(error)):
        _say(f"not enough memory: {error}")
        return ResourceError.exit_code
    _say("".join(traceback.format_exception(error)))
    _say("this is a failure of optkit itself; please report it with the lines above")
    return 70


def _say(text: str) -> None:
    """Write lines to standard error, foreign control characters made visible; where nobody can read them, the exit code has to do."""
    from optkit.report.text import plain

    with contextlib.suppress(OSError):
        sys.stderr.write("".join(f"{plain(line, 2000)}\n" for line in text.split("\n")))
        sys.stderr.flush()


class _Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP. Like Ctrl-C it must not be taken for a failure of the library in which it strikes."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated(number)


def _called() -> int:
    """Call the command and return its exit code. Typer turns signals and broken pipes into exits; here they are themselves again."""
    try:
        app()
    except SystemExit as done:
        cause: BaseException | None = done
        while cause is not None:
            if isinstance(cause, KeyboardInterrupt | BrokenPipeError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    return 0
