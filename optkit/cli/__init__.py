"""The command line: one file a command. Results go to standard output, talk to standard error; each failure has its exit code.

0 ok, 1 a limit of the recipe did not hold, 2 bad usage or input, 3 a package or device is missing, 4 memory or disk, 70 a failure
of optkit itself, 130 and 143 stopped by a signal, 141 nobody reads the output.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from types import FrameType
from typing import NoReturn

import typer

from optkit.cli.check import check
from optkit.cli.compare import compare_command
from optkit.cli.listing import list_names
from optkit.cli.run import run_command
from optkit.cli.schema import schema
from optkit.cli.verify import verify
from optkit.core.errors import OptkitError, StoppedError

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
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app()
    except OptkitError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception:  # what reaches this place is our own mistake
        traceback.print_exc()
        sys.stderr.write("this is a failure of optkit itself; please report it with the lines above\n")
        sys.exit(70)
    sys.exit(0)


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise StoppedError("stopped by SIGTERM; finished stages are kept: go on with --resume", 128 + number)
