"""From the words of a command line and a file below it to the checked dataclass, and back."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, TypeVar

from gr00t_fast.base.errors import ConfigError, closest
from gr00t_fast.base.flags.file import read_file, read_yaml
from gr00t_fast.base.flags.values import FALSE, TRUE, value_of
from gr00t_fast.base.flags.words import CONFIG_FLAG, Choice, Flag, Flags, fields_of, flags_of, is_choice, without_none, words_of

T = TypeVar("T")
Others = Mapping[str, tuple[str, str]]  # flag of another program (one that ends in a dot: what begins with it) -> whose, and what is in its place


def parse_flags(
    config_class: type[T], argv: Sequence[str], file_of: type | None = None, not_from_file: Sequence[str] = (), others: Others | None = None
) -> tuple[T, list[str]]:
    """Return the checked configuration and notes for the user. Raises ConfigError with one line that names flag, value and remedy.

    file_of: the configuration class of another program, whose --config_path files are read too: what both have counts, but for what that program
    leaves, and `not_from_file`. A file with a setting that only the other program has is of that one. others: unknown flags that get an answer.
    """
    table = {flag.name: flag for flag in flags_of(config_class)}
    more = "See --help-all." if getattr(config_class, "COMMON", ()) else "See --help."
    given = _read_command_line(argv, table, more, others or {})
    path = given.pop(CONFIG_FLAG, None)
    also = {} if file_of is None else {flag.name: flag for flag in flags_of(file_of)}
    from_file = {} if path is None else read_file(path, table, also, {*not_from_file, *given}, more)
    settings = {**from_file, **given}
    notes = _settle_types(settings, given, table)
    missing: dict[str, str] = {}
    config = build(config_class, settings, table, missing)
    if isinstance(config, Flags):
        missing |= dict(config.missing())
    if missing:
        raise ConfigError(" ".join(f"--{name} is missing: {what.rstrip('.')}." for name, what in missing.items()))
    if isinstance(config, Flags):
        config.check()
        notes += config.notes()
    return config, notes


def _read_command_line(argv: Sequence[str], table: Mapping[str, Flag], more: str, others: Others) -> dict[str, Any]:
    """Name -> value. The last one wins; of a list they add up."""
    given: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            meant = f" Did you mean --model_path={word}?" if "model_path" in table and Path(word).exists() else ""
            raise ConfigError(f"unexpected argument '{word}': flags begin with '--'; a value with spaces needs quotes.{meant}")
        written, equals, value = word[2:].partition("=")
        flag, negated = _flag_of(written, table, more, others)
        if negated and equals:
            raise ConfigError(f"--{written} takes no value.")
        if flag.kind == "list":
            texts = [value] if equals else []
            while words and not words[0].startswith("--"):
                texts.append(words.pop(0))
            if not texts:
                raise ConfigError(f"--{flag.name} needs values: --{flag.name}=A,B.")
            given.setdefault(flag.name, []).extend(each for text in texts for each in value_of(f"--{flag.name}", flag, text))
        elif negated:
            given[flag.name] = False
        else:
            given[flag.name] = _from_text(flag, value) if equals else _following_value(flag, words)
    return given


def _flag_of(written: str, table: Mapping[str, Flag], more: str, others: Others) -> tuple[Flag, bool]:
    """The flag, and whether `no` stands before it."""
    name = written.replace("-", "_")
    if name in table:
        return table[name], False
    if name.startswith("no_") and (positive := table.get(name[3:])) and positive.kind == "bool":
        return positive, True
    if found := others.get(name) or others.get(name.partition(".")[0] + "."):
        owner, remedy = found
        raise ConfigError(f"unknown flag '--{written}', which is {owner}. {remedy}")
    raise ConfigError(f"unknown flag '--{written}'.{closest(name, [*table, 'help'], '--')} {more}")


def _following_value(flag: Flag, words: list[str]) -> Any:
    if flag.kind == "bool" and (not words or words[0].lower() not in (*TRUE, *FALSE)):
        return True
    if words and not words[0].startswith("--"):
        return _from_text(flag, words.pop(0))
    if flag.extra.get("bare") is None:
        raise ConfigError(f"--{flag.name} needs a value: --{flag.name}=VALUE.")
    return flag.extra["bare"]


def _from_text(flag: Flag, text: str) -> Any:
    """The value that is written on the command line; not of a list."""
    if flag.optional and text == "null":
        return flag.default
    if flag.kind == "yaml" and not text.strip():
        raise ConfigError(f"--{flag.name} is empty; it needs a value.")
    try:
        raw = read_yaml(text) if flag.kind == "yaml" else text
    except ValueError as error:
        raise ConfigError(f"--{flag.name}: cannot read '{text}' as YAML ({error}). Check the braces.") from error
    return value_of(f"--{flag.name}", flag, raw)


def _settle_types(settings: dict[str, Any], given: Mapping[str, Any], table: Mapping[str, Flag]) -> list[str]:
    """Settings that the chosen `type` does not have are refused; a file's, where the command line chose another type, are dropped with a note."""
    notes = []
    for name in list(settings):
        owners, type_name = table[name].owners, name.partition(".")[0] + ".type"
        chosen = settings.get(type_name)
        if not owners or chosen is None or chosen in owners:
            continue
        if name in given or type_name not in given:
            raise ConfigError(f"--{name} does not apply to --{type_name}={chosen}, only to {', '.join(owners)}.")
        del settings[name]
        notes.append(f"{name} of the file does not apply to --{type_name}={chosen} and is ignored.")
    return notes


def build(config_class: type[T], settings: Mapping[str, Any], table: Mapping[str, Flag], missing: dict[str, str]) -> T:
    """Required flags that are not there are None, and added to `missing` with what they are."""
    values: dict[str, Any] = {}
    for flag in fields_of(config_class):
        inner = without_none(flag.hint)
        if is_choice(inner):
            of_choice = {name.partition(".")[2]: value for name, value in settings.items() if name.startswith(f"{flag.name}.")}
            if "type" in of_choice:
                values[flag.name] = inner.types[of_choice.pop("type")](**of_choice)
            elif of_choice:
                missing[f"{flag.name}.type"] = f"choose from {', '.join(words_of(table[f'{flag.name}.type'].hint))}"
        elif dataclasses.is_dataclass(inner):
            values[flag.name] = build(typing.cast(type, inner), settings, table, missing)
        elif flag.name in settings:
            values[flag.name] = settings[flag.name]
        elif flag.default is MISSING:
            values[flag.name], missing[flag.name] = None, flag.help or "see --help"
    return config_class(**values)


def settings_of(config: Any) -> dict[str, Any]:
    """The configuration as JSON-ready values that `--config_path` reads again: the inverse of `parse_flags`."""
    found: dict[str, Any] = {}
    for flag in fields_of(type(config)):
        value = getattr(config, flag.name)
        nested = dataclasses.is_dataclass(value) and not isinstance(value, Choice)
        found |= settings_of(value) if nested else {flag.name: _plain(value)}
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Choice):
        return {"type": value.type_name, **{flag.name: _plain(getattr(value, flag.name)) for flag in fields_of(type(value))}}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
