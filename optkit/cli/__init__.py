"""The command line: one file a command. Results go to standard output, talk to standard error; each failure has its exit code.

0 ok, 1 a limit of the recipe did not hold, 2 bad usage or input, 3 a package or device is missing, 4 memory or disk, 70 a failure
of optkit itself, 130 and 143 stopped by a signal, 141 nobody reads the output.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import NoReturn

import typer

from optkit.cli.check import check
from optkit.cli.compare import compare_command
from optkit.cli.listing import list_names
from optkit.cli.run import run_command
from optkit.cli.schema import schema
from optkit.cli.verify import verify
from optkit.core.errors import OptkitError
from optkit.core.files import refusals

app = typer.Typer(
    name="optkit",
    help="Apply compression transforms to a model by recipe, and measure what they buy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
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
        with refusals(Path("standard output")):
            sys.stdout.flush()
    except OptkitError as error:
        sys.stderr.write(f"{error}\n")
        code = error.exit_code
    except KeyboardInterrupt as stop:
        sys.stderr.write("stopped\n")
        code = getattr(stop, "exit_code", 130)
    except BrokenPipeError:
        code = 141
    except Exception:  # what reaches this place is our own mistake
        traceback.print_exc()
        sys.stderr.write("this is a failure of optkit itself; please report it with the lines above\n")
        code = 70
    if code in (4, 141):  # what could not be printed is given up, or the interpreter would try again
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)


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
