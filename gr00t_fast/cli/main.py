"""`gr00t-fast COMMAND [--flag=value ...]`: the table of subcommands, and the one way in which each begins and ends.

A subcommand is a dataclass of flags that check themselves, and a function that works and returns the exit code. Its module is imported when it is
asked for.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pkgutil
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

from gr00t_fast.base import console
from gr00t_fast.base.console import CLOSED_TERMINAL, Console
from gr00t_fast.base.errors import ConfigError, Gr00tFastError, closest
from gr00t_fast.base.flags import help_text, parse_flags
from gr00t_fast.base.signals import SIGNAL_EXIT_BASE, StopRequested
from gr00t_fast.base.worker import thread_left_running
from gr00t_fast.cli.others import FLAGS_OF_OTHERS

if TYPE_CHECKING:
    from gr00t_fast.cli.shared_flags import OutputFlags

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_CTRL_C = 0, 1, 2, 130
NAME = "gr00t-fast"
# The words of a subcommand -> its module under gr00t_fast.cli and the Command in it; and its line in --help.
COMMANDS = {
    "demo": ("demo:main", "see it work: a simulated arm and a small trained network, both in the package"),
    "run": ("run:main", "drive an arm with a checkpoint, or with a policy server"),
    "replay": ("replay:main", "play the actions of a recorded episode on an arm"),
    "eval": ("eval:main", "compare a checkpoint's actions with those of a recorded data set"),
    "compare": ("compare:main", "set two runs side by side"),
    "trials": ("trials:main", "say whether one setting is better than another: blinded trials in random order"),
    "scene": ("scene:main", "write what a data set's cameras saw, for run, doctor and eval to compare with"),
    "align": ("align:main", "put cameras back where they were when the data was recorded, on a page"),
    "doctor": ("doctor:main", "say what is installed, what can run here, and what is missing"),
    "export onnx": ("export:onnx", "write a checkpoint as ONNX graphs"),
    "export tensorrt": ("export:tensorrt", "build TensorRT engines"),
    "quantise": ("export:quantise", "make an 8-bit version of an ONNX export"),
    "verify": ("export:verify", "compare an exported engine with the plain model"),
    "bench": ("bench:main", "time every engine that runs here, and check its actions"),
    "tune": ("bench:tune", "bench --make: make the engines that can run here, then compare them"),
    "serve": ("serve:main", "answer policy clients over ZeroMQ or HTTP"),
    "bus": ("bus:main", "virtual servo bus of an SO-100 on a pseudo-terminal"),
    "sim": ("sim:main", "show the simulated scene, solved by a scripted expert"),
    "random-checkpoint": ("random_checkpoint:main", "write a checkpoint with random weights"),
}
# Words that people type and that are no subcommand (any more) -> what to do instead.
GONE = {
    "calibrate": "the engine fp8 and its calibration are gone. For 8 bits use gr00t-fast quantise, for a GPU then --engine=tensorrt.",
    "record": "demonstrations are recorded with lerobot-record. What a policy does: gr00t-fast run --record=DIR.",
    "train": "there is no training here: use NVIDIA's or lerobot's trainer, then gr00t-fast run --model_path=DIR.",
    "teleoperate": "there is no teleoperation here: use lerobot-teleoperate or lerobot-record.",
}

C = TypeVar("C")


@dataclass(frozen=True)
class Command(Generic[C]):
    """A program: called with a command line, it returns the exit code.

    Every Gr00tFastError becomes one message on stderr and exit code 1, or 2 for a ConfigError: a command line or file is to be changed. Ctrl-C gives
    130 and says `interrupted`; bugs keep their traceback. `--verbose` among the flags shows the traceback of expected errors too.
    """

    flags: type[C]
    work: Callable[[C], int]
    usage: str  # first lines of --help
    epilog: str = "exit codes: 0 done, 1 error, 2 bad flag, 130 interrupted"  # last lines of --help
    interrupted: str = "interrupted"
    file_of: type | None = None  # whose --config_path files are read too, but for what that program leaves ...
    not_from_file: Sequence[str] = ()  # ... and these settings
    drives_arm: bool = False  # a terminal that takes no output holds up nothing
    first_words: str = ""  # the flag whose values may come first, without it
    before: Sequence[str] = ()  # flags that this program gives itself; the user's come after them, and win

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        words = sys.argv[1:] if argv is None else list(argv)
        wishes = {word.partition("=")[0].replace("_", "-") for word in words}
        if {"--help", "-h", "--help-all"} & wishes:
            return _ending(lambda: _print_help(help_text(self.flags, self.usage, self.epilog, "--help-all" in wishes)))
        if self.first_words and words and not words[0].startswith("-"):
            words = [f"--{self.first_words}", *words]

        def program() -> int:
            config = self.parse([*self.before, *words])
            return guarded(lambda: self.work(config), self.interrupted, getattr(config, "verbose", False))

        return _ending(lambda: guarded(program, self.interrupted, "--verbose" in words), Console() if self.drives_arm else None)

    def parse(self, argv: Sequence[str]) -> C:
        """The checked configuration; notes go to stderr. Raises ConfigError."""
        config, notes = parse_flags(self.flags, argv, self.file_of, self.not_from_file, FLAGS_OF_OTHERS)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        return config


def guarded(program: Callable[[], int], interrupted: str, verbose: bool = False) -> int:
    """What `program` returns, or the exit code of the error that it raises, which is printed. verbose: with its traceback, which bugs always have."""
    try:
        return program()
    except Gr00tFastError as error:
        if verbose:
            traceback.print_exception(error)
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_ERROR
    except StopRequested as request:  # before the arm was connected, or the loop would have handled it
        print(f"stopped by {request.reason}", file=sys.stderr)
        return request.exit_code
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return EXIT_CTRL_C
    except Exception as error:
        if isinstance(error, OSError) and _is_output_lost(error):
            raise
        traceback.print_exception(error)
        return EXIT_ERROR


def entry_point() -> NoReturn:
    """The console script."""
    leave(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: that of the subcommand; 0 for --help, 2 for a word that is no subcommand."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words:
        return _refuse("which command?")
    if words[0] in ("--help", "-h", "help"):
        return _ending(lambda: _print_help(overview()))
    if words[0] == "--version":
        return _ending(_print_version)
    if words[0] in GONE:
        print(f"error: {GONE[words[0]]}", file=sys.stderr)
        return EXIT_USAGE
    for count in (1, 2):
        if (name := " ".join(words[:count])) in COMMANDS:
            return command(name)(words[count:])
    group = [name for name in COMMANDS if name.startswith(f"{words[0]} ")]
    if group and ("--help" in words[1:] or "-h" in words[1:]):
        return _ending(lambda: _print_help(overview(group)))
    asked = " ".join(words[: 2 if group else 1])
    known = (*COMMANDS, "--help", "--version")
    return _refuse(f"unknown command '{asked}'.{closest(asked, known) or closest(' '.join(words[:2]), known)}")


def command(name: str) -> Callable[[Sequence[str]], int]:
    """`export onnx` -> what it runs."""
    return pkgutil.resolve_name(f"gr00t_fast.cli.{COMMANDS[name][0]}")


def overview(names: Sequence[str] = tuple(COMMANDS)) -> str:
    """The subcommands with a line each."""
    rows = [f"  {name:<19}{COMMANDS[name][1]}" for name in names]
    return "\n".join([f"usage: {NAME} COMMAND [--flag=value ...]", "", *rows, "", f"{NAME} COMMAND --help lists a command's flags."])


def _refuse(what: str) -> int:
    print(f"error: {what} Known: {', '.join(COMMANDS)}. See {NAME} --help.", file=sys.stderr)
    return EXIT_USAGE


def _print_version() -> int:
    from gr00t_fast import __version__

    print(__version__)
    return EXIT_OK


def _print_help(text: str) -> int:
    """A reader that has seen enough, as with `| head`, is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _discard_output()
    return EXIT_OK


def show(result: Mapping[str, Any], table: str, verdict: str, wishes: OutputFlags) -> None:
    """The result for people: table and verdict on standard output; `--quiet` leaves the verdict, `--json` makes it one line of JSON."""
    text = verdict if wishes.quiet else "\n".join(filter(None, (table, verdict)))
    print(text, file=sys.stderr if wishes.json else sys.stdout, flush=True)
    if wishes.json:
        print(json.dumps(result), flush=True)


def leave_result(out: Path, result: Mapping[str, Any], table: str, verdict: str, wishes: OutputFlags) -> None:
    """Write the result into the directory `out`, as JSON and as text by the name of its program, and `show` it. Raises ConfigError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{result['program']}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (out / f"{result['program']}.md").write_text(f"{table}\n{verdict}\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out={out} cannot be written: {error.strerror}. Name another directory.") from error
    show(result, table, verdict, wishes)


# --- how a program ends -------------------------------------------------------------------------------------------------------------------


def _ending(program: Callable[[], int], console: Console | None = None) -> int:
    """What `program` returns, or 1 when its output cannot be written. console: through which it goes."""
    code, lost = EXIT_ERROR, None
    try:
        with console or contextlib.nullcontext():
            code = program()
        sys.stdout.flush()
    except OSError as error:
        if not _is_output_lost(error) and (console is None or error is not console.failure):
            raise
        lost = error
    if console is not None:
        lost = console.failure or lost
    if lost is None:
        return code
    _tell_lost_output(lost)  # an arm has been put down by now
    return SIGNAL_EXIT_BASE + signal.SIGHUP if console is not None and lost.errno in CLOSED_TERMINAL else code or EXIT_ERROR


def _is_output_lost(error: OSError) -> bool:
    """Whether it came from writing: a pipe whose reader left, a full disk, a terminal that is gone."""
    return isinstance(error, BrokenPipeError) or error.errno in (errno.ENOSPC, errno.EIO)


def _tell_lost_output(error: OSError) -> None:
    reason = f"cannot write to the output ({error.strerror})"
    if isinstance(error, BrokenPipeError):
        reason = "nobody reads this program's output any more (a closed pipe, as with `| head`)"
    with contextlib.suppress(OSError):  # it may have been stderr too
        print(f"error: {reason}; the run has ended.", file=sys.stderr)
    with contextlib.suppress(OSError, ValueError):
        _discard_output()  # or the interpreter complains when it flushes at exit


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def end_on_sigterm() -> None:
    """As an exit, so that what is half written is removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(SIGNAL_EXIT_BASE + signal.SIGTERM))


def leave(code: int) -> NoReturn:
    """End the program. An inference that hangs, or a terminal that takes no output, must not hold it up: the interpreter cannot end while native
    code of another thread runs (it may abort instead), so what is left to do at exit is then done here."""
    if console.stuck():
        os._exit(code)
    if not thread_left_running():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
