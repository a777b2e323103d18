"""--help: every flag with its values, default and the comment behind its field."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from dataclasses import MISSING
from pathlib import Path

from gr00t_fast.base.flags.words import OUTPUTS, Flag, Flags, flags_of, item_of, kind_of, words_of

_WIDTH, _INDENT, _LEAST_WIDTH, _WIDE = 92, 34, 40, 200  # columns: of a flag's text at most and before it, at least, and without a terminal


def help_text(config_class: type, usage: str, epilog: str = "", everything: bool = False) -> str:
    """Usage, what the dataclass says about the program, and its flags in groups, its own first and outputs last; `everything`: those too that few
    need."""
    flags, common = list(flags_of(config_class)), getattr(config_class, "COMMON", ())
    shown = [flag for flag in flags if everything or not common or flag.name in common]
    columns, doc = max(shutil.get_terminal_size((_WIDE, 0)).columns, _INDENT + _LEAST_WIDTH), config_class.__doc__ or ""
    about = "" if doc.startswith(f"{config_class.__name__}(") else inspect.cleandoc(doc)  # what dataclass writes where there is none
    lines = [usage, "", *([about, ""] if about else [])]
    lines.append("--name=value or --name value, dashes or underscores; lists as --name 1 2 or --name=1,2")
    for group in sorted(dict.fromkeys(flag.group for flag in shown), key=lambda group: (group != Flags.GROUP) + (group == OUTPUTS)):
        members = [flag for flag in shown if flag.group == group]
        most_types = max(len(flag.owners) for flag in members)
        lines += [f"{group}:", *(line for flag in members for line in _help_lines(flag, most_types, columns))]
    if len(shown) < len(flags):
        lines.append(f"{len(flags) - len(shown)} more flags: --help-all")
    text = "\n".join([*lines, *(["", epilog] if epilog else [])])
    fold = textwrap.TextWrapper(columns, break_long_words=False, break_on_hyphens=False)
    return "\n".join(line if len(line) <= columns else fold.fill(line) for line in text.splitlines())


def _help_lines(flag: Flag, most_types: int, columns: int) -> list[str]:
    head, default = f"  --{flag.name}={_values(flag)}", _shown_default(flag)
    only = f" ({', '.join(flag.owners)} only)" if flag.owners and len(flag.owners) < most_types else ""
    body = textwrap.wrap(f"{flag.help}{default}{only}", min(_WIDTH, columns - _INDENT))
    if len(head) < _INDENT and body:
        head, body = f"{head:<{_INDENT}}{body[0]}", body[1:]
    return [head, *(" " * _INDENT + line for line in body)]


def _values(flag: Flag) -> str:
    one = {"text": "TEXT", "path": "PATH", "bool": "true|false", "whole": "N", "number": "X", "yaml": "YAML"}
    words = "|".join(map(str, words_of(flag.hint)))
    if flag.kind == "list":
        return (words or one[kind_of(item_of(flag.hint))]) + ",.."
    return words if flag.kind == "choice" else "|".join(filter(None, (one[flag.kind], words)))


def _shown_default(flag: Flag) -> str:
    if flag.default is MISSING:
        return " (required)"
    if flag.default in (None, "", {}, []) or not isinstance(flag.default, list | str | int | float | Path):
        return ""
    joined = ",".join(map(str, flag.default)) if isinstance(flag.default, list) else str(flag.default)
    return f" [{joined.lower() if isinstance(flag.default, bool) else joined}]"
