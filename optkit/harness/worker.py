"""The process that does the work: prepares an artefact, or opens one as an arm and measures it. It never outlives its parent.

Commands come as JSON lines on standard input, answers go as JSON lines to a pipe; everything printed goes to the log of the run.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any

from optkit.core.errors import OptkitError, ResourceError


def main() -> None:
    """Serve commands until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--answers", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--meeting", default="")
    parser.add_argument("--stack", default=os.devnull)
    parser.add_argument("--threads", type=int, required=True)
    run(parser.parse_args())


def run(options: argparse.Namespace) -> None:
    """Serve commands until standard input ends, with the options that this file takes."""
    _die_with(options.parent)
    _call_itself(f"worker rank {options.rank}")
    with os.fdopen(options.answers, "w", buffering=1) as answers, Path(options.stack).open("w") as stack:
        faulthandler.register(signal.SIGUSR1, stack, all_threads=False)  # for a parent that wonders where this process hangs
        serve(options, answers)


def serve(options: argparse.Namespace, answers: IO[str]) -> None:
    """Answer one command after another."""
    from optkit.harness.arm import Arm

    def tell(text: str) -> None:
        answers.write(json.dumps({"progress": text}) + "\n")

    arm = _guarded(answers, lambda: Arm(options.rank, options.ranks, options.meeting, options.threads, tell))
    if arm is None:
        return
    answers.write(json.dumps({"done": None}) + "\n")
    for line in sys.stdin:
        command = json.loads(line)
        result = _guarded(answers, partial(getattr(arm, f"do_{command['do']}"), **command["with"]))
        if result is not None:
            answers.write(json.dumps({"done": result}) + "\n")


def _guarded(answers: IO[str], work: Callable[[], Any]) -> Any:
    """Return what the work returns ({} for nothing); on failure answer with the error and return None."""
    try:
        result = work()
        return {} if result is None else result
    except OptkitError as error:
        answers.write(json.dumps({"refused": str(error), "exit_code": error.exit_code}) + "\n")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "out of memory" in str(error).lower():
            short = ResourceError(f"not enough memory: {str(error).splitlines()[0] if str(error) else 'allocation failed'}")
            answers.write(json.dumps({"refused": str(short), "exit_code": short.exit_code}) + "\n")
        else:
            _bug(answers, error)
    except Exception as error:  # the parent must hear of every failure
        _bug(answers, error)
    return None


def _bug(answers: IO[str], error: Exception) -> None:
    traceback.print_exc()
    answers.write(json.dumps({"failed": f"{type(error).__name__}: {error}"}) + "\n")


def _call_itself(name: str) -> None:
    """Give this process a name for lists of processes, where it can have one: a forked one has the command of its server."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(15, name.encode())  # PR_SET_NAME


def _die_with(parent: int) -> None:
    """Ask the kernel to end this process with its parent, where it can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    main()
