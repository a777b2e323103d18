"""Command-line flags of a draccus dataclass, without draccus' traps.

draccus decodes dataclasses well, but reads every flag as YAML (`--lang_instruction=yes` becomes 'True', `pick: the cube` a mapping,
`--robot.id=007` becomes '7'), accepts abbreviated flags and explains some mistakes with a traceback. Here the command line is split
first: text and paths are taken literally, the rest is YAML, and draccus gets the finished dictionary. A configuration file
(`--config_path`) comes below the command line.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import draccus
import yaml
from draccus.utils import ParsingError
from draccus.wrappers.docstring import get_attribute_docstring, get_preferred_help_text

from gr00t_fast.errors import ConfigError, closest
from gr00t_fast.strict_json import read_text

T = TypeVar("T")
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
CONFIG_FLAG = "config_path"

_ADDRESS = "The policy server's address is --server=tcp://HOST:PORT of so100_inference_optimized.py."
_IN_THE_EXPORT = "That is chosen when the engine is made: export/to_tensorrt.py --precision."
# Flags of Isaac-GR00T's scripts (eval_lerobot.py, eval_gr00t_so100.py, inference_service.py), and what is in their place here.
_NVIDIA_FLAGS = {
    **dict.fromkeys(("policy_host", "policy_port", "host", "port", "client"), _ADDRESS),
    "server": "This program is the server: leave the flag out.",
    "http_server": "HTTP is spoken by python -m gr00t_fast.serving --http.",
    "use_tensorrt": "Use --engine=tensorrt.",
    "trt_engine_path": "Use --engine_path=DIR.",
    **dict.fromkeys(("vit_dtype", "llm_dtype", "dit_dtype"), _IN_THE_EXPORT),
    "play_sounds": "Nothing is spoken here: leave the flag out.",
    "use_policy": "The policy always drives the arm: leave the flag out.",
    "actions_to_execute": "A run's length is given in seconds: --timeout=SECONDS.",
    "cam_idx": 'A camera is given as --robot.cameras="{front: {type: opencv, index_or_path: 0}}".',
    "record_imgs": "Use --video=FILE.mp4.",
}


class UsageError(ConfigError):
    """A flag or configuration file that cannot be understood; programs exit with code 2."""


@dataclass(frozen=True)
class Flag:
    """One flag: its dotted name, how its value is read, and for fields of a choice class which `type`s have it (empty: all)."""

    name: str
    kind: Literal["text", "path", "bool", "choice", "yaml"]
    hint: Any
    default: Any
    help: str
    owners: tuple[str, ...] = ()
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)  # names a choice had elsewhere, for the error message

    @property
    def choices(self) -> tuple[Any, ...]:
        return typing.get_args(_without_none(self.hint)) if self.kind == "choice" else ()


class _StrictLoader(yaml.SafeLoader):
    """Plain values only. draccus' own loader imports Python objects (`!!python/name`) and reads other files (`!include`)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # ten of them, each for ten of the next, are more than any memory holds
            event = self.get_event()
            raise yaml.constructor.ConstructorError(None, None, f"references such as *{event.anchor} are not supported", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        found = super().construct_mapping(node, deep)
        if len(found) != len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a name is given twice, of which only the last would count", node.start_mark)
        return found


def _decode_literal(hint: Any, raw_value: Any, path: Sequence[str]) -> Any:
    """draccus 0.10 has no decoder for typing.Literal."""
    choices = typing.get_args(hint)
    if raw_value not in choices:
        expected = ", ".join(map(str, choices))
        raise draccus.utils.DecodingError(path, f"'{raw_value}' is not one of {expected}.{closest(str(raw_value), map(str, choices))}")
    return raw_value


draccus.decode.register(Literal, _decode_literal, include_subclasses=True)


def parse_flags(config_class: type[T], argv: Sequence[str]) -> tuple[T, list[str]]:
    """Return the decoded configuration and notes for the user. Raises UsageError with one line that names flag, value and remedy."""
    table = {flag.name: flag for flag in flags_of(config_class)}
    given = _read_command_line(argv, table)
    path = given.pop(CONFIG_FLAG, None)
    from_file = _read_file(Path(path), table) if path is not None else {}
    notes = _let_new_type_win(from_file, given, table)
    _check_owners({**from_file, **given}, table)
    return _decode(config_class, {**from_file, **given}), notes


def flags_of(config_class: type) -> Iterator[Flag]:
    """Every flag of a dataclass; a field that is a draccus choice class contributes `<field>.type` and the fields of all its classes."""
    yield Flag(CONFIG_FLAG, "path", Path, None, "YAML file with any of these settings; flags on the command line win")
    for name, hint, default, text in _fields(config_class):
        inner = _without_none(hint)
        if isinstance(inner, type) and issubclass(inner, draccus.ChoiceRegistry):
            yield from _choice_flags(name, inner)
        else:
            yield Flag(name, _kind(hint), hint, default, text)


def _choice_flags(prefix: str, registry: type[draccus.ChoiceRegistry]) -> Iterator[Flag]:
    classes = registry.get_known_choices()
    renamed = getattr(registry, "RENAMED", {})
    yield Flag(f"{prefix}.type", "choice", Literal[tuple(sorted(classes))], None, f"which {prefix}", renamed=renamed)
    merged: dict[str, Flag] = {}
    for type_name, choice_class in classes.items():
        for name, hint, default, text in _fields(choice_class):
            known = merged.get(name)
            owners = (*(known.owners if known else ()), type_name)
            merged[name] = dataclasses.replace(known or Flag(f"{prefix}.{name}", _kind(hint), hint, default, text), owners=owners)
            if text and not merged[name].help:
                merged[name] = dataclasses.replace(merged[name], help=text)
    yield from merged.values()


def _fields(config_class: type) -> Iterator[tuple[str, Any, Any, str]]:
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        default = field.default_factory() if callable(field.default_factory) else field.default
        text = next((t for c in config_class.__mro__ if field.name in inspect.get_annotations(c) if (t := _comment(c, field.name))), "")
        yield field.name, hints[field.name], default, text


def _comment(config_class: type, name: str) -> str:
    return get_preferred_help_text(get_attribute_docstring(config_class, name)) or ""


def _kind(hint: Any) -> Literal["text", "path", "bool", "choice", "yaml"]:
    inner = _without_none(hint)
    if typing.get_origin(inner) is Literal:
        return "choice"
    return {str: "text", Path: "path", bool: "bool"}.get(inner, "yaml") if isinstance(inner, type) else "yaml"


def _without_none(hint: Any) -> Any:
    """`X | None` -> `X`; other unions stay."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        rest = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return rest[0] if len(rest) == 1 else hint
    return hint


def _read_command_line(argv: Sequence[str], table: Mapping[str, Flag]) -> dict[str, Any]:
    """`--flag=value`, `--flag value` and bare `--switch`; the last one wins."""
    given: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UsageError(f"unexpected argument '{word}': flags begin with '--'; a value with spaces needs quotes.")
        name, equals, value = word[2:].partition("=")
        flag = _known(name, table)
        if not equals:
            value = _following_value(flag, words)
        given[name] = _value(flag, value)
    return given


def _known(name: str, table: Mapping[str, Flag], where: str = "") -> Flag:
    if name not in table:
        if where:
            raise UsageError(f"unknown setting '{name}' in {where}.{closest(name, table)} See --help.")
        written = name.replace("-", "_")
        if written in _NVIDIA_FLAGS and written not in table:
            raise UsageError(f"unknown flag '--{name}', which is one of NVIDIA's scripts. {_NVIDIA_FLAGS[written]}")
        raise UsageError(f"unknown flag '--{name}'.{closest(f'--{name}', [f'--{known}' for known in table])} See --help.")
    return table[name]


def _following_value(flag: Flag, words: list[str]) -> str:
    if flag.kind == "bool" and (not words or words[0].lower() not in (*_TRUE, *_FALSE)):
        return "true"
    if not words or words[0].startswith("--"):
        raise UsageError(f"--{flag.name} needs a value: --{flag.name}=VALUE.")
    return words.pop(0)


def _value(flag: Flag, text: str) -> Any:
    if flag.kind == "text":
        return text
    if flag.kind == "path":
        if not text.strip():
            raise UsageError(f"--{flag.name} is empty; it needs a path.")
        return text
    if flag.kind == "bool":
        if text.lower() not in (*_TRUE, *_FALSE):
            raise UsageError(f"--{flag.name}={text} is neither true nor false.")
        return text.lower() in _TRUE
    if flag.kind == "choice":
        return _choice(flag, text)
    try:
        value = yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        raise UsageError(
            f"--{flag.name}: cannot read '{text}' as YAML ({_one_line(str(getattr(error, 'problem', error)))}). Check the braces."
        ) from error
    _check_items(f"--{flag.name}", flag, value)
    return value


def _choice(flag: Flag, text: str) -> Any:
    for choice in flag.choices:  # a choice may be a number
        if str(choice) == text:
            return choice
    words = [str(choice) for choice in flag.choices]
    meant = f" It is called {flag.renamed[text]} now." if text in flag.renamed else closest(text, words)
    raise UsageError(f"--{flag.name}={text} is not one of {', '.join(words)}.{meant}")


def _check_items(where: str, flag: Flag, value: Any) -> None:
    hint = _without_none(flag.hint)
    if typing.get_origin(hint) is dict and typing.get_args(hint) == (str, str):
        _check_names(where, value)
    else:
        _check_choice_items(where, flag, value)


def _check_names(where: str, value: Any) -> None:
    """A mapping of names: what YAML makes of `a=b` and of `{a:b}` explains itself to nobody."""
    if isinstance(value, dict) and all(isinstance(name, str | int) for pair in value.items() for name in pair):
        return
    without_space = isinstance(value, dict) and any(":" in str(name) and item is None for name, item in value.items())
    hint = " YAML wants a space after the colon." if without_space else ""
    raise UsageError(f'{where}: expected names in braces, e.g. "{{front: webcam}}", got {value!r}.{hint}')


def _check_choice_items(where: str, flag: Flag, value: Any) -> None:
    """A mapping of named choice classes, e.g. cameras: explain the usual slips (`type:opencv` without the space) better than draccus."""
    args = typing.get_args(_without_none(flag.hint))
    if len(args) != 2 or not (isinstance(args[1], type) and issubclass(args[1], draccus.ChoiceRegistry)):
        return
    classes = args[1].get_known_choices()
    example = "{ front: {type: opencv, index_or_path: 0, width: 640, height: 480, fps: 30} }"
    if not isinstance(value, dict):
        raise UsageError(f'{where}: expected names with settings, e.g. "{example}", got {value!r}.')
    for name, item in value.items():
        if not isinstance(item, dict) or "type" not in item:
            raise UsageError(
                f"{where}: '{name}' has no 'type' (one of {', '.join(classes)}; YAML wants a space after the colon), e.g. \"{example}\"."
            )
        if item["type"] not in classes:
            raise UsageError(
                f"{where}: '{name}' has the unknown type '{item['type']}'.{closest(str(item['type']), classes)} Known: {', '.join(classes)}."
            )
        known = [field.name for field in dataclasses.fields(classes[item["type"]])]
        for key in item:
            if key != "type" and key not in known:
                raise UsageError(f"{where}: '{name}' has the unknown setting '{key}'.{closest(str(key), known)} Known: {', '.join(known)}.")


def _read_file(path: Path, table: Mapping[str, Flag]) -> dict[str, Any]:
    """Return a configuration file's settings by dotted name."""
    try:
        content = yaml.load(read_text(path), _StrictLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"--{CONFIG_FLAG}: cannot read '{path}': {_one_line(str(error))}.") from error
    if not isinstance(content, dict):
        raise UsageError(f"--{CONFIG_FLAG}: '{path}' holds no settings (expected lines like `model_path: DIR`).")
    settings = dict(_flatten(content, table))
    for name, value in settings.items():
        flag = _known(name, table, str(path))
        if flag.kind in ("text", "path") and not isinstance(value, str | None):
            raise UsageError(f"{path}: YAML reads {name} as {value!r} ({type(value).__name__}); put the text in quotes.")
        _check_items(f"{path}: {name}", flag, value)
    return settings


def _flatten(content: Mapping[str, Any], table: Mapping[str, Flag], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names down to the known flags; a flag's own value may be a mapping."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in table and any(known.startswith(f"{name}.") for known in table):
            yield from _flatten(value, table, f"{name}.")
        else:
            yield name, value


def _let_new_type_win(from_file: dict[str, Any], given: Mapping[str, Any], table: Mapping[str, Flag]) -> list[str]:
    """`--robot.type` over a file for another type: settings the new type does not have are dropped from the file, with a note."""
    notes = []
    for name in [name for name in given if name.endswith(".type") and from_file.get(name, given[name]) != given[name]]:
        prefix = name.removesuffix("type")
        foreign = [key for key in from_file if key.startswith(prefix) and table[key].owners and given[name] not in table[key].owners]
        for key in foreign:
            del from_file[key]
        if foreign:
            notes.append(f"--{name}={given[name]} replaces the file's; its {', '.join(foreign)} do not apply and are ignored.")
    return notes


def _check_owners(settings: Mapping[str, Any], table: Mapping[str, Flag]) -> None:
    for name in settings:
        flag = table[name]
        if not flag.owners:
            continue
        type_flag = table[name.split(".", 1)[0] + ".type"]
        chosen = settings.get(type_flag.name)
        if chosen is None:
            raise UsageError(f"--{type_flag.name} is missing; choose from {', '.join(map(str, type_flag.choices))}.")
        if chosen in type_flag.choices and chosen not in flag.owners:
            raise UsageError(f"--{name} does not apply to --{type_flag.name}={chosen}, only to {', '.join(flag.owners)}.")


def _decode(config_class: type[T], settings: Mapping[str, Any]) -> T:
    try:
        return draccus.decode(config_class, draccus.utils.deflatten(dict(settings)))
    except ParsingError as error:
        raise UsageError(_explained(error)) from error


def _explained(error: ParsingError) -> str:
    """draccus' message without its wrapping: `--robot.cameras.front.fps: Couldn't parse '29.97' into an int`."""
    path, text = list(getattr(error, "key_path", ())), _one_line(getattr(error, "message", None) or str(error))
    one_type = re.fullmatch(r"Could not decode the value into any of the given types: \w+: (?:`([\w.]+)`: )?(.*)", text)  # `X | None`
    if one_type:
        path += [one_type[1]] if one_type[1] else []
        text = one_type[2]
    if unread := re.match(r"Couldn't parse '(.*)' into an? (int|float)$", text):
        what, example = ("whole number", "8") if unread[2] == "int" else ("number", "30")
        dotted = ".".join(path)
        written = f"--{dotted}={example}" if dotted.count(".") < 2 else f"{dotted.rpartition('.')[2]}: {example}"  # deeper: within braces
        text = f"'{unread[1]}' is not a {what}; write it as in {written}."
    cause = f" ({_one_line(str(error.__cause__))})" if error.__cause__ is not None and "Couldn't instantiate" in text else ""
    return ("--" + ".".join(path) + ": " if path else "") + text + cause


def _one_line(text: str) -> str:
    plain = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", text)
    return " ".join(plain.replace("\\n", " ").split())
