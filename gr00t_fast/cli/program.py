"""What the subcommands share: exit codes, errors as messages, help that may be piped, and the end of the program."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn, Protocol, TypeVar

from gr00t_fast import console
from gr00t_fast.console import CLOSED_TERMINAL, Console
from gr00t_fast.control.pacer import SIGNAL_EXIT_BASE, StopRequested
from gr00t_fast.errors import Gr00tFastError, exit_code_of, is_output_lost, tell_lost_output
from gr00t_fast.flags import UsageError

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_CTRL_C = 0, 1, 2, 130

C = TypeVar("C")


def execute(
    parse: Callable[[Sequence[str]], C],
    work: Callable[[C], int],
    help_text: Callable[[], str],
    argv: Sequence[str],
    interrupted: str = "",
) -> int:
    """Parse the flags and work: returns the exit code.

    Every Gr00tFastError becomes one message on stderr and exit code 1, or 2 for a UsageError; Ctrl-C gives 130 and says `interrupted`; bugs keep
    their traceback. `--verbose` among the flags shows the traceback of expected errors too.
    """
    if wants_help(argv):
        return exit_code_of(lambda: print_help(help_text()))
    return exit_code_of(lambda: _guarded(parse, work, argv, interrupted))


def execute_queued(parse: Callable[[Sequence[str]], C], work: Callable[[C], int], help_text: Callable[[], str], argv: Sequence[str]) -> int:
    """As `execute`, for a program that drives an arm. Output goes through a queue: a terminal that takes none holds up nothing."""
    if wants_help(argv):
        return exit_code_of(lambda: print_help(help_text()))
    queued = Console()
    try:
        with queued:
            code = _guarded(parse, work, argv, "")
    except OSError as error:
        if error is not queued.failure:
            raise
        code = EXIT_ERROR
    if queued.failure is None:
        return code
    lost = tell_lost_output(queued.failure)  # the arm has landed by now
    return SIGNAL_EXIT_BASE + getattr(signal, "SIGHUP", 1) if queued.failure.errno in CLOSED_TERMINAL else code or lost


def wants_help(argv: Sequence[str]) -> bool:
    return "--help" in argv or "-h" in argv


def print_help(text: str) -> int:
    """A reader that has seen enough, as with `| head`, is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_OK


def _guarded(parse: Callable[[Sequence[str]], C], work: Callable[[C], int], argv: Sequence[str], interrupted: str) -> int:
    verbose = "--verbose" in argv
    try:
        config = parse(argv)
        verbose = getattr(config, "verbose", verbose)
        return work(config)
    except UsageError as error:
        return explain(error, EXIT_USAGE, verbose)
    except Gr00tFastError as error:
        return explain(error, EXIT_ERROR, verbose)
    except StopRequested as request:  # before the arm was connected, or the loop would have handled it
        print(f"stopped by {request.reason}", file=sys.stderr)
        return request.exit_code
    except KeyboardInterrupt:
        if interrupted:
            print(interrupted, file=sys.stderr)
        return EXIT_CTRL_C
    except Exception as error:
        if isinstance(error, OSError) and is_output_lost(error):
            raise
        traceback.print_exception(error)
        return EXIT_ERROR


def explain(error: Gr00tFastError, code: int, verbose: bool) -> int:
    if verbose:
        traceback.print_exception(error)
    print(f"error: {error}", file=sys.stderr)
    return code


class OutputWishes(Protocol):
    """`--json` and `--quiet`."""

    json: bool
    quiet: bool


def show(result: Mapping[str, Any], table: str, verdict: str, wishes: OutputWishes) -> None:
    """The result for people: table and verdict on standard output; `--quiet` leaves the verdict, `--json` makes it one line of JSON."""
    text = verdict if wishes.quiet else "\n".join(filter(None, (table, verdict)))
    if wishes.json:
        print(text, file=sys.stderr)
        print(json.dumps(result), flush=True)
    else:
        print(text, flush=True)


def end_on_sigterm() -> None:
    """As an exit, so that what is half written is removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(SIGNAL_EXIT_BASE + signal.SIGTERM))


def leave(code: int) -> NoReturn:
    """End the program. An inference that hangs, or a terminal that takes no output, must not hold it up: the interpreter cannot end while native
    code of another thread runs (it may abort instead), so what is left to do at exit is then done here."""
    if console.stuck():
        os._exit(code)
    worker: ModuleType | None = sys.modules.get("gr00t_fast.control.worker")  # without it no inference can be running
    if worker is None or not worker.thread_left_running():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
