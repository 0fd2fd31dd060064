"""The command line: one file a command. Results go to standard output, talk to standard error; each failure has its exit code.

0 ok, 1 a limit of the recipe did not hold, 2 bad usage or input, 3 a package or device is missing, 4 memory or disk, 70 a failure
of optkit itself, 130 and 143 stopped by a signal, 141 nobody reads the output.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from types import FrameType
from typing import NoReturn

import typer

from optkit.cli.bench import bench
from optkit.cli.check import check
from optkit.cli.compare import compare_command
from optkit.cli.listing import list_names
from optkit.cli.run import run_command
from optkit.cli.schema import schema
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
app.add_typer(bench)
app.command("run")(run_command)
app.command("check")(check)
app.command("compare")(compare_command)
app.command("list")(list_names)
app.command("schema")(schema)
app.command("verify")(verify)


def main() -> NoReturn:
    """Run the command line and exit with the code that says how it went."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = _called()
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        sys.stderr.write("stopped\n")
        code = getattr(stop, "exit_code", 130)
    except Exception as error:  # what is neither a refusal nor a lost output is our own mistake
        code = _told(error)
    sys.exit(code)


def _told(error: Exception) -> int:
    """Say what happened and return its exit code."""
    if isinstance(error, OptkitError):
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC):  # all files go through one door: this is our output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would try again at its end
        if error.errno == errno.EPIPE:
            return 141
        sys.stderr.write("cannot write standard output: the disk is full\n")
        return ResourceError.exit_code
    traceback.print_exception(error)
    sys.stderr.write("this is a failure of optkit itself; please report it with the lines above\n")
    return 70


class _Terminated(KeyboardInterrupt):
    """SIGTERM. Like Ctrl-C it must not be taken for a failure of the library in which it strikes."""

    exit_code = 128 + signal.SIGTERM


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


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
