"""From a text of the command line, or what YAML holds, to a value of a flag's type."""

from __future__ import annotations

import re
import typing
from collections.abc import Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from gr00t_fast.base.errors import ConfigError, closest, shown
from gr00t_fast.base.flags.words import Choice, Flag, Kind, fields_of, is_choice, item_of, kind_of, without_none, words_of

TRUE, FALSE, _NULL = ("true", "yes", "on", "1"), ("false", "no", "off", "0"), ("null", "none", "~")


def value_of(where: str, flag: Flag, raw: Any) -> Any:
    """`raw`, a text of the command line or what YAML holds, as a value of the flag's type. Raises ConfigError that begins with `where`."""
    if flag.kind == "list" and isinstance(raw, str):
        inner = raw[1:-1] if raw.startswith("[") and raw.endswith("]") else raw
        raw = [raw] if flag.extra.get("whole_words") else [each.strip() for each in inner.split(",") if each.strip()]
    if instead := flag.extra.get("instead", {}).get(str(raw)):
        raise ConfigError(f"{where}={raw} is not one of {', '.join(words_of(flag.hint))}. {instead}")
    return _typed(where, flag.hint, raw)


def _typed(where: str, hint: Any, raw: Any) -> Any:
    inner, kind, words = without_none(hint), kind_of(hint), words_of(without_none(hint))
    if raw is None or (kind in ("whole", "number") and str(raw).lower() in _NULL):
        if hint is Any or type(None) in typing.get_args(hint):
            return None
        raise ConfigError(f"{where} needs a value.")
    if kind == "choice":
        return _chosen_word(where, words, raw)
    if kind in ("whole", "number"):
        return str(raw) if str(raw) in map(str, words) else _number(where, kind, raw, words)
    if kind == "list":
        return [_typed(where, item_of(inner), each) for each in (raw if isinstance(raw, list | tuple) else [raw])]
    if kind == "bool":
        if str(raw).lower() not in (*TRUE, *FALSE):
            raise ConfigError(f"{where}={raw} is neither true nor false.")
        return str(raw).lower() in TRUE
    if kind in ("text", "path"):
        if not isinstance(raw, str):
            raise ConfigError(f"{where}: YAML reads it as {raw!r} ({type(raw).__name__}); put the text in quotes.")
        if kind == "path" and not raw.strip():
            raise ConfigError(f"{where} is empty; it needs a path.")
        return Path(raw) if kind == "path" else raw
    return _mapping(where, inner, raw) if typing.get_origin(inner) is dict else _one_of(where, inner, raw)


def _mapping(where: str, hint: Any, raw: Any) -> dict[str, Any]:
    item = typing.get_args(hint)[1]
    if not isinstance(raw, dict) or not all(isinstance(name, str | int) and value is not None for name, value in raw.items()):
        example = "{front: {type: opencv, index_or_path: 0}}" if is_choice(item) else "{front: webcam}"  # YAML makes None of the b in `{a:b}`
        raise ConfigError(f'{where}: expected names with values in braces, e.g. "{example}", got {raw!r}. YAML wants a space after the colon.')
    if is_choice(item):
        return {str(name): _chosen(f"{where}.{name}", item, value) for name, value in raw.items()}
    return {str(name): _typed(f"{where}.{name}", item, str(value) if item is str else value) for name, value in raw.items()}


def _one_of(where: str, hint: Any, raw: Any) -> Any:
    """The first type of a union that fits."""
    failures = []
    for each in typing.get_args(hint):
        fits = isinstance(raw, list | dict) == (kind_of(each) in ("list", "yaml"))
        try:
            if fits and each is not type(None):
                return _typed(where, each, raw)
        except ConfigError as error:
            failures.append(error)
    raise failures[0] if failures else ConfigError(f"{where}: {raw!r} cannot be used.")


def _chosen(where: str, base: type[Choice], raw: Any) -> Any:
    """One of a Choice's classes from a mapping with `type`."""
    classes = base.types
    if not isinstance(raw, dict) or "type" not in raw:
        got = shown(list(raw) if isinstance(raw, dict) else raw)
        raise ConfigError(f"{where} has no 'type' (one of {', '.join(classes)}), but {got}; YAML wants a space after the colon.")
    if raw["type"] not in classes:
        base.find_types()
    chosen = classes[_chosen_word(f"{where}.type", tuple(classes), raw["type"])]
    known = {flag.name: flag for flag in fields_of(chosen)}
    if unknown := [str(key) for key in raw if key != "type" and key not in known]:
        raise ConfigError(f"{where} has the unknown setting '{unknown[0]}'.{closest(unknown[0], known)} Known: {', '.join(known)}.")
    if needed := [name for name, flag in known.items() if flag.default is MISSING and name not in raw]:
        raise ConfigError(f"{where} needs the setting '{needed[0]}'. Known: {', '.join(known)}.")
    values = {key: value_of(f"{where}.{key}", known[key], value) for key, value in raw.items() if key != "type"}
    try:
        return chosen(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _number(where: str, kind: Kind, raw: Any, words: Sequence[Any]) -> int | float:
    what = "whole number such as 8" if kind == "whole" else "number such as 30"
    if isinstance(raw, bool):
        raise ConfigError(f"{where}: expected a {what}, and YAML reads this as {str(raw).lower()}, as it does yes, no, on and off.")
    try:
        if kind == "whole" and isinstance(raw, float):
            raise ValueError
        return int(raw) if kind == "whole" else float(re.sub(r"^([+-]?)\.(inf|nan)$", r"\1\2", str(raw).lower()))
    except (ValueError, TypeError):
        or_word = f", or one of {', '.join(map(str, words))}" if words else ""
        raise ConfigError(f"{where}: '{raw}' is not a {what}{or_word}.") from None


def _chosen_word(where: str, choices: Sequence[Any], raw: Any) -> Any:
    for choice in choices:  # a choice may be a number
        if str(choice) == str(raw):
            return choice
    words = [str(choice) for choice in choices]
    raise ConfigError(f"{where}={raw} is not one of {', '.join(words)}.{closest(str(raw), words)}")


def size_of(text: str, flag: str = "resolution", least: int = 32) -> tuple[int, int]:
    """`640x480` -> (640, 480): width and height. Raises ConfigError."""
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text.lower())
    if found is None or min(int(found[1]), int(found[2])) < least:
        raise ConfigError(f"--{flag}={text}: expected WIDTHxHEIGHT such as 640x480, each at least {least}.")
    return int(found[1]), int(found[2])
