"""`gr00t-fast COMMAND [--flag=value ...]`: the table of subcommands. A subcommand's module is imported when it is asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from gr00t_fast.cli.program import EXIT_OK, EXIT_USAGE, leave, print_help
from gr00t_fast.errors import closest, exit_code_of

NAME = "gr00t-fast"
# The words of a subcommand -> its module under gr00t_fast.cli, whose `main(argv)` returns an exit code; and its line in --help.
COMMANDS = {
    "run": ("run", "drive an arm with a checkpoint, or with a policy server"),
    "replay": ("replay", "play the actions of a recorded episode on an arm"),
    "compare": ("compare", "set two runs side by side"),
    "doctor": ("doctor", "say what is installed, what can run here, and what is missing"),
    "export onnx": ("export_onnx", "write a checkpoint as ONNX graphs"),
    "export tensorrt": ("export_tensorrt", "build TensorRT engines"),
    "quantise": ("quantise", "make an 8-bit version of an ONNX export"),
    "calibrate": ("calibrate", "make the scales of the engine fp8"),
    "verify": ("verify", "compare an exported engine with the plain model"),
    "tune": ("tune", "make, check and time every engine that runs here, and write the best into your config file"),
    "bench": ("bench", "time every engine that runs here, and check its actions"),
    "serve": ("serve", "answer policy clients over ZeroMQ or HTTP"),
    "bus": ("bus", "virtual servo bus of an SO-100 on a pseudo-terminal"),
    "sim": ("sim", "show the simulated scene, solved by a scripted expert"),
}


def entry_point() -> NoReturn:
    """The console script."""
    leave(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: that of the subcommand; 0 for --help, 2 for a word that is no subcommand."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0] in ("--help", "-h", "help"):
        return exit_code_of(lambda: print_help(help_text())) if words else _refuse("which command?", "")
    if words[0] == "--version":
        return exit_code_of(_print_version)
    for count in (1, 2):
        if found := COMMANDS.get(" ".join(words[:count])):
            return importlib.import_module(f"gr00t_fast.cli.{found[0]}").main(words[count:])
    of_a_group = [name for name in COMMANDS if name.startswith(f"{words[0]} ")]
    if of_a_group and ("--help" in words[1:] or "-h" in words[1:]):
        return exit_code_of(lambda: print_help(help_text(of_a_group)))
    asked = " ".join(words[: 2 if of_a_group else 1])
    return _refuse(f"unknown command '{asked}'.", closest(asked, COMMANDS))


def _refuse(what: str, meant: str) -> int:
    print(f"error: {what}{meant} Known: {', '.join(COMMANDS)}. See {NAME} --help.", file=sys.stderr)
    return EXIT_USAGE


def _print_version() -> int:
    from gr00t_fast import __version__

    print(__version__)
    return EXIT_OK


def help_text(names: Sequence[str] = tuple(COMMANDS)) -> str:
    """The subcommands with a line each."""
    rows = [f"  {name:<18}{COMMANDS[name][1]}" for name in names]
    return "\n".join([f"usage: {NAME} COMMAND [--flag=value ...]", "", *rows, "", f"{NAME} COMMAND --help lists a command's flags."])
