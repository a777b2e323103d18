"""The command line of every program here: flags from a dataclass.

    @dataclass(kw_only=True)
    class BenchConfig:
        '''What the program does, in a paragraph; printed by --help.'''

        out: Path  # directory to make; a field without a default is required
        rounds: int = 100  # timed calls of each engine
        engines: list[str] = setting(default_factory=list, former=("arms",))  # which; a former spelling is understood, with a note

    config, notes = parse_flags(BenchConfig, argv)      # raises UsageError: one line that names flag, value and remedy; exit code 2
    print(help_text(BenchConfig, "usage: ..."))         # every flag with its values, default and the comment behind its field

One dialect: `--name=value`, `--name value`, bare `--switch` and `--no-switch`, dashes and underscores alike. Lists are `--name A B`, `--name=A,B` or
the flag again; sizes are `--name 640 480` or `--name=640x480`. Text and paths are taken literally, mappings are YAML. `--config_path` names a YAML
file, or the report of an earlier run, that comes below the command line.

Simple fields (text, paths, numbers, choices, lists of them) are read here, with the standard library alone: programs that measure a bare GPU machine
need no packages for their flags. Fields of other types, such as a robot with its cameras, are decoded by draccus, whose traps are avoided: it reads
every flag as YAML (`--lang_instruction=yes` becomes 'True', `--robot.id=007` '7'), accepts abbreviated flags and explains some
mistakes with a traceback.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import re
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from gr00t_fast.errors import ConfigError, closest
from gr00t_fast.files import read_json, read_text

T = TypeVar("T")
Kind = Literal["text", "path", "bool", "choice", "whole", "number", "list", "yaml"]
CONFIG_FLAG = "config_path"
_TRUE, _FALSE, _NULL = ("true", "yes", "on", "1"), ("false", "no", "off", "0"), ("null", "none", "~")
_WIDTH, _INDENT = 92, 34

_ADDRESS = "The policy server's address is --server=tcp://HOST:PORT of gr00t-fast run."
_IN_THE_EXPORT = "That is chosen when the engine is made: gr00t-fast export tensorrt --precision."
# Flags of Isaac-GR00T's scripts (eval_lerobot.py, eval_gr00t_so100.py, inference_service.py), and what is in their place here.
_NVIDIA_FLAGS = {
    **dict.fromkeys(("policy_host", "policy_port", "host", "port", "client"), _ADDRESS),
    "server": "This program is the server: leave the flag out.",
    "http_server": "HTTP is spoken by gr00t-fast serve --http.",
    "use_tensorrt": "Use --engine=tensorrt.",
    "trt_engine_path": "Use --engine_path=DIR.",
    **dict.fromkeys(("vit_dtype", "llm_dtype", "dit_dtype"), _IN_THE_EXPORT),
    "play_sounds": "Nothing is spoken here: leave the flag out.",
    "use_policy": "The policy always drives the arm: leave the flag out.",
    "actions_to_execute": "A run's length is given in seconds: --timeout=SECONDS.",
    "cam_idx": 'A camera is given as --robot.cameras="{front: {type: opencv, index_or_path: 0}}".',
    "record_imgs": "Use --video=FILE.mp4.",
}
_DATA_SET = "gr00t-fast run records with --record=user/name (or --record=DIR), and gr00t-fast replay plays --dataset=user/name."
# The same of lerobot-record, lerobot-replay and lerobot-rollout; a name that ends in a dot stands for what begins with it.
_LEROBOT_FLAGS = {
    **dict.fromkeys(("policy.path", "policy.pretrained_path"), "Use --model_path=DIR."),
    "policy.type": "The checkpoint says which network it is: --model_path=DIR is enough.",
    "policy.": "Settings of the network are flags of their own, such as --device and --denoising_steps.",
    **dict.fromkeys(("dataset.single_task", "task"), 'Use --lang_instruction="...".'),
    "dataset.num_episodes": "Use --episodes=N.",
    **dict.fromkeys(("dataset.episode_time_s", "duration"), "Use --timeout=SECONDS."),
    "dataset.reset_time_s": "Use --reset_time_s=SECONDS.",
    "dataset.fps": "Use --fps=N; without it the arm runs at the rate of the checkpoint's training data.",
    **dict.fromkeys(("dataset.rename_map", "rename_map"), 'Use --camera_map="{mine: checkpoint\'s}".'),
    "dataset.push_to_hub": "Nothing is uploaded here: leave the flag out.",
    "dataset.": _DATA_SET,
    **dict.fromkeys(("display_data", "display_ip", "display_port"), "Use --display, or --display=HOST:PORT."),
    "resume": "Use --record_append=true, beside --record.",
    "strategy.": "The policy drives the arm from start to end, as lerobot's strategy base: leave the flag out.",
    "inference.": "Use --controller=threaded --smoothing=rtc for real-time chunking.",
    "teleop.": "There is no teleoperation here: use lerobot-teleoperate or lerobot-record.",
}


class UsageError(ConfigError):
    """A flag or configuration file that cannot be understood; programs exit with code 2."""


def setting(
    default: Any = MISSING, *, default_factory: Any = MISSING, former: Sequence[str] = (), bare: Any = None, whole_words: bool = False
) -> Any:
    """A field of a configuration with more to it than a type and a default.

    former: names that the flag had. bare: what `--name` without a value means. whole_words: of a list, a value is one item, commas and all.
    """
    metadata = {"former": tuple(former), "bare": bare, "whole_words": whole_words}
    if default_factory is not MISSING:
        return dataclasses.field(default_factory=default_factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Flag:
    """One flag: its dotted name, how its value is read, and for fields of a choice class which `type`s have it (empty: all)."""

    name: str
    kind: Kind
    hint: Any
    default: Any  # MISSING: required
    help: str
    owners: tuple[str, ...] = ()
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)  # names a choice had elsewhere, for the error message
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of `setting`

    @property
    def choices(self) -> tuple[Any, ...]:
        """Of a choice, or of a list of choices."""
        hint = _without_none(_item_hint(self.hint) if self.kind == "list" else self.hint)
        return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def parse_flags(config_class: type[T], argv: Sequence[str], file_of: type | None = None, not_from_file: Sequence[str] = ()) -> tuple[T, list[str]]:
    """Return the decoded configuration and notes for the user. Raises UsageError with one line that names flag, value and remedy.

    file_of: the configuration class of another program, whose --config_path files are read too: what both have counts, but for `not_from_file`.
    """
    table = {flag.name: flag for flag in flags_of(config_class)}
    also = {} if file_of is None else {flag.name: flag for flag in flags_of(file_of)}
    notes: list[str] = []
    given = _read_command_line(argv, table, notes)
    path = given.pop(CONFIG_FLAG, None)
    from_file = _read_file(path, {**also, **table}, notes) if path is not None else {}
    from_file = {name: value for name, value in from_file.items() if name in table and not (also and name in not_from_file)}
    notes += _let_new_type_win(from_file, given, table)
    settings = {**from_file, **given}
    _check_owners(settings, table)
    return _decode(config_class, settings, table), notes


def flags_of(config_class: type) -> Iterator[Flag]:
    """Every flag of a dataclass; a field that is a draccus choice class contributes `<field>.type` and the fields of all its classes."""
    yield Flag(CONFIG_FLAG, "path", Path, None, "YAML file with any of these settings, or report.json of an earlier run; flags win")
    for name, hint, default, text, extra in _fields(config_class):
        inner = _without_none(hint)
        if _is_registry(inner):
            yield from _choice_flags(name, inner)
        else:
            yield Flag(name, _kind(hint), hint, default, text, extra=extra)


def settings_of(config: Any) -> dict[str, Any]:
    """The configuration as JSON-ready values that `--config_path` reads again: the inverse of `parse_flags`."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def help_text(config_class: type, usage: str, epilog: str = "") -> str:
    """Usage, what the dataclass says about the program, and all flags with values, defaults and meaning; those of a choice class apart."""
    flags = list(flags_of(config_class))
    groups = {flag.name.partition(".")[0] for flag in flags if "." in flag.name}
    doc = config_class.__doc__ or ""
    about = "" if doc.startswith(f"{config_class.__name__}(") else inspect.cleandoc(doc)  # what dataclass writes where there is none
    lines = [usage, "", *([about, ""] if about else [])]
    lines.append("flags (--name=value or --name value, dashes or underscores; lists as --name 1 2 or --name=1,2):")
    lines += [line for flag in flags if "." not in flag.name for line in _help_lines(flag, 0)]
    for group in sorted(groups):
        members = [flag for flag in flags if flag.name.startswith(f"{group}.")]
        types_known = max(len(flag.owners) for flag in members)
        lines += ["", f"{group}:", *(line for flag in members for line in _help_lines(flag, types_known))]
    return "\n".join([*lines, *(["", epilog] if epilog else [])])


# --- from a dataclass to flags ------------------------------------------------------------------------------------------------------------


def _choice_flags(prefix: str, registry: Any) -> Iterator[Flag]:
    classes = registry.get_known_choices()
    renamed = getattr(registry, "RENAMED", {})
    yield Flag(f"{prefix}.type", "choice", Literal[tuple(sorted(classes))], None, f"which {prefix}", renamed=renamed)
    merged: dict[str, Flag] = {}
    for type_name, choice_class in classes.items():
        for name, hint, default, text, extra in _fields(choice_class):
            known = merged.get(name)
            owners = (*(known.owners if known else ()), type_name)
            merged[name] = dataclasses.replace(known or Flag(f"{prefix}.{name}", _kind(hint), hint, default, text, extra=extra), owners=owners)
            if text and not merged[name].help:
                merged[name] = dataclasses.replace(merged[name], help=text)
    yield from merged.values()


def _fields(config_class: type) -> Iterator[tuple[str, Any, Any, str, Mapping[str, Any]]]:
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        text = next((text for each in config_class.__mro__ if (text := _comments(each).get(field.name))), "")
        yield field.name, hints[field.name], default, text, field.metadata


@functools.cache
def _comments(config_class: type) -> dict[str, str]:
    """Field -> the comment behind its definition."""
    try:
        source = textwrap.dedent(inspect.getsource(config_class))
    except (OSError, TypeError):  # no source at hand: flags without help
        return {}
    behind = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    body = typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
    fields = [node for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    return {node.target.id: behind.get(node.end_lineno or 0, behind.get(node.lineno, "")) for node in fields if isinstance(node.target, ast.Name)}


def _is_registry(hint: Any) -> bool:
    """Whether it is one of draccus' choice classes."""
    return isinstance(hint, type) and hasattr(hint, "get_known_choices")


def _kind(hint: Any) -> Kind:
    inner = _without_none(hint)
    origin, arguments = typing.get_origin(inner), typing.get_args(inner)
    if origin is Literal:
        return "choice"
    if origin in (list, tuple) and all(_kind(each) not in ("list", "yaml") for each in arguments if each is not Ellipsis):
        return "list"
    if origin in (typing.Union, types.UnionType):  # a number, or a word in its place
        rest = [each for each in arguments if typing.get_origin(each) is not Literal and each is not type(None)]
        return _kind(rest[0]) if len(rest) == 1 and rest[0] in (int, float) else "yaml"
    kinds: dict[Any, Kind] = {str: "text", Path: "path", bool: "bool", int: "whole", float: "number"}
    return kinds.get(inner, "yaml") if isinstance(inner, type) else "yaml"


def _item_hint(hint: Any) -> Any:
    return typing.get_args(_without_none(hint))[0]


def _without_none(hint: Any) -> Any:
    """`X | None` -> `X`; other unions stay."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        rest = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return rest[0] if len(rest) == 1 else hint
    return hint


def _takes_none(hint: Any) -> bool:
    return hint is Any or type(None) in typing.get_args(hint)


def _words_of(hint: Any) -> tuple[Any, ...]:
    """`float | Literal["auto"]` -> ("auto",)."""
    return tuple(word for each in typing.get_args(hint) if typing.get_origin(each) is Literal for word in typing.get_args(each))


def _help_lines(flag: Flag, types_known: int) -> list[str]:
    head, default = f"  --{flag.name}={_values(flag)}", _shown_default(flag)
    only = f" ({', '.join(flag.owners)} only)" if flag.owners and len(flag.owners) < types_known else ""
    body = textwrap.wrap(f"{flag.help}{default}{only}", _WIDTH)
    if len(head) < _INDENT and body:
        body[0] = f"{head:<{_INDENT}}{body[0]}"
        return [body[0], *(" " * _INDENT + line for line in body[1:])]
    return [head, *(" " * _INDENT + line for line in body)]


def _values(flag: Flag) -> str:
    one = {"text": "TEXT", "path": "PATH", "bool": "true|false", "whole": "N", "number": "X", "yaml": "VALUE"}
    words = "|".join(map(str, flag.choices))
    if flag.kind == "list":
        item = words or one[_kind(_item_hint(flag.hint))]
        fixed = typing.get_args(_without_none(flag.hint)) if typing.get_origin(_without_none(flag.hint)) is tuple else ()
        return "x".join([item] * len(fixed)) if fixed and Ellipsis not in fixed else f"{item},.."
    return words or "|".join([one[flag.kind], *map(str, _words_of(flag.hint))])


def _shown_default(flag: Flag) -> str:
    if flag.default is MISSING:
        return " (required)"
    if isinstance(flag.default, list | tuple):
        joined = ("x" if isinstance(flag.default, tuple) else ",").join(map(str, flag.default))
        return f" [{joined}]" if joined else ""
    if flag.default in (None, "", {}) or not isinstance(flag.default, str | int | float | Path):
        return ""
    return f" [{str(flag.default).lower() if isinstance(flag.default, bool) else flag.default}]"


# --- from the command line and a file to values -------------------------------------------------------------------------------------------


class _Nothing:
    """No value behind a flag."""


def _read_command_line(argv: Sequence[str], table: Mapping[str, Flag], notes: list[str]) -> dict[str, Any]:
    """Name -> value. The last one wins; of a list they add up."""
    given: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            meant = f" Did you mean --model_path={word}?" if "model_path" in table and Path(word).exists() else ""
            raise UsageError(f"unexpected argument '{word}': flags begin with '--'; a value with spaces needs quotes.{meant}")
        written, equals, value = word[2:].partition("=")
        flag, negated = _flag_of(written, table, notes)
        if flag.kind == "list":
            texts = [value, *_following_values(flag, words, least=0)] if equals else _following_values(flag, words)
            given[flag.name] = given.get(flag.name, []) + [each for text in texts for each in _list_words(flag, text)]
        elif negated:
            if equals:
                raise UsageError(f"--{written} takes no value.")
            given[flag.name] = False
        else:
            text = value if equals else _following_value(flag, words)
            given[flag.name] = flag.extra.get("bare") if isinstance(text, _Nothing) else _value(flag, text)
    return {name: _value(table[name], value) if table[name].kind == "list" else value for name, value in given.items()}


def _flag_of(written: str, table: Mapping[str, Flag], notes: list[str]) -> tuple[Flag, bool]:
    """The flag, and whether it is said with `no`."""
    name = written.replace("-", "_")
    if name in table:
        return table[name], False
    if name.startswith("no_") and (positive := table.get(name[3:])) and positive.kind == "bool":
        return positive, True
    for flag in table.values():
        if name in flag.extra.get("former", ()):
            notes.append(f"--{written} is called --{flag.name} now.")
            return flag, False
    if name in _NVIDIA_FLAGS:
        raise UsageError(f"unknown flag '--{written}', which is one of NVIDIA's scripts. {_NVIDIA_FLAGS[name]}")
    if lerobot := _LEROBOT_FLAGS.get(name) or _LEROBOT_FLAGS.get(name.partition(".")[0] + "."):
        raise UsageError(f"unknown flag '--{written}', which is one of lerobot's programs. {lerobot}")
    raise UsageError(f"unknown flag '--{written}'.{closest(f'--{name}', [f'--{known}' for known in table])} See --help.")


def _following_value(flag: Flag, words: list[str]) -> str | _Nothing:
    if flag.kind == "bool" and (not words or words[0].lower() not in (*_TRUE, *_FALSE)):
        return "true"
    if not words or words[0].startswith("--"):
        if flag.extra.get("bare") is not None:
            return _Nothing()
        raise UsageError(f"--{flag.name} needs a value: --{flag.name}=VALUE.")
    return words.pop(0)


def _following_values(flag: Flag, words: list[str], least: int = 1) -> list[str]:
    found: list[str] = []
    while words and not words[0].startswith("--"):
        found.append(words.pop(0))
    if len(found) < least:
        raise UsageError(f"--{flag.name} needs values: --{flag.name}=A,B.")
    return found


def _list_words(flag: Flag, text: str) -> list[str]:
    """The items of `A,B`, `[A, B]` and, of numbers, `AxB`."""
    if flag.extra.get("whole_words"):
        return [text]
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    numbers = _kind(_item_hint(flag.hint)) in ("whole", "number")
    return [each.strip() for each in re.split(r"[,x]" if numbers else ",", inner) if each.strip()]


def _value(flag: Flag, text: Any) -> Any:
    """The value that a text stands for; of a list, the texts of its items."""
    if flag.kind == "yaml":
        return _yaml_value(flag, text)
    return _typed(flag, flag.hint, text)


def _typed(flag: Flag, hint: Any, raw: Any) -> Any:
    """`raw`, a text or what a file holds, as a value of a simple type. Raises UsageError."""
    kind, inner = _kind(hint), _without_none(hint)
    if raw is None:
        if _takes_none(hint):
            return None
        raise UsageError(f"--{flag.name} needs a value.")
    if kind == "list":
        return _typed_list(flag, inner, raw)
    if kind == "text":
        return raw
    if kind == "path":
        if not str(raw).strip():
            raise UsageError(f"--{flag.name} is empty; it needs a path.")
        return Path(raw)
    if kind == "bool":
        if str(raw).lower() not in (*_TRUE, *_FALSE):
            raise UsageError(f"--{flag.name}={raw} is neither true nor false.")
        return str(raw).lower() in _TRUE
    if kind == "choice":
        return _choice(flag, inner, str(raw))
    if str(raw).lower() in _NULL and _takes_none(hint):
        return None
    if str(raw) in map(str, _words_of(hint)):
        return str(raw)
    return _number(flag, kind, raw, _words_of(hint))


def _typed_list(flag: Flag, hint: Any, raw: Any) -> Any:
    arguments = typing.get_args(hint)
    if not isinstance(raw, list | tuple):
        raw = _list_words(flag, raw) if isinstance(raw, str) else [raw]
    values = [_typed(flag, arguments[0], each) for each in raw]
    if typing.get_origin(hint) is list:
        return values
    if Ellipsis not in arguments and len(values) != len(arguments):
        raise UsageError(f"--{flag.name} takes {len(arguments)} values, as in --{flag.name}={_values(flag)}; it got {len(values)}.")
    return tuple(values)


def _number(flag: Flag, kind: Kind, raw: Any, words: Sequence[Any]) -> int | float:
    what, example = ("whole number", "8") if kind == "whole" else ("number", "30")
    try:
        if isinstance(raw, bool):
            raise ValueError
        if kind == "whole":
            if isinstance(raw, float):
                raise ValueError
            return int(raw)
        return float(re.sub(r"^([+-]?)\.(inf|nan)$", r"\1\2", str(raw).lower()))
    except ValueError:
        or_word = f", or one of {', '.join(map(str, words))}" if words else ""
        raise UsageError(f"--{flag.name}: '{raw}' is not a {what}; write it as in --{flag.name}={example}{or_word}.") from None


def _choice(flag: Flag, hint: Any, text: str) -> Any:
    choices = typing.get_args(hint)
    for choice in choices:  # a choice may be a number
        if str(choice) == text:
            return choice
    words = [str(choice) for choice in choices]
    meant = f" It is called {flag.renamed[text]} now." if text in flag.renamed else closest(text, words)
    raise UsageError(f"--{flag.name}={text} is not one of {', '.join(words)}.{meant}")


def _yaml_value(flag: Flag, text: str) -> Any:
    import yaml

    if not text.strip():
        raise UsageError(f"--{flag.name} is empty; it needs a value.")
    try:
        value = yaml.load(text, _strict_loader())
    except yaml.YAMLError as error:
        raise UsageError(
            f"--{flag.name}: cannot read '{text}' as YAML ({_one_line(str(getattr(error, 'problem', error)))}). Check the braces."
        ) from error
    _check_items(f"--{flag.name}", flag, value)
    return value


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
    if len(args) != 2 or not _is_registry(args[1]):
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


def _read_file(path: Path, table: Mapping[str, Flag], notes: list[str]) -> dict[str, Any]:
    """A configuration file's settings by dotted name."""
    content = _content_of(path)
    if not isinstance(content, dict):
        raise UsageError(f"--{CONFIG_FLAG}: '{path}' holds no settings (expected lines like `model_path: DIR`).")
    if "schema" in content and isinstance(content.get("settings"), dict):
        content = content["settings"]  # of a run's report
    settings = {}
    for written, value in _flatten(content, table):
        if written == CONFIG_FLAG:
            raise UsageError(f"{path}: {CONFIG_FLAG} cannot stand in a file; one file does not read another.")
        former = next((flag for flag in table.values() if written in flag.extra.get("former", ())), None)
        if former is not None:
            notes.append(f"{path}: {written} is called {former.name} now.")
        flag = former or table.get(written)
        if flag is None:
            raise UsageError(f"unknown setting '{written}' in {path}.{closest(written, table)} See --help.")
        if flag.kind in ("text", "path") and not isinstance(value, str | None):
            raise UsageError(f"{path}: YAML reads {written} as {value!r} ({type(value).__name__}); put the text in quotes.")
        if flag.kind == "yaml":
            if value is not None:
                _check_items(f"{path}: {written}", flag, value)
            settings[flag.name] = value
        else:
            settings[flag.name] = None if value is None and flag.default is None else _typed(flag, flag.hint, value)
    return settings


def _content_of(path: Path) -> Any:
    if path.suffix == ".json":
        try:
            return read_json(path)
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"--{CONFIG_FLAG}: cannot read '{path}': {_one_line(str(error))}.") from error
    import yaml

    try:
        return yaml.load(read_text(path), _strict_loader())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"--{CONFIG_FLAG}: cannot read '{path}': {_one_line(str(error))}.") from error


def _flatten(content: Mapping[str, Any], table: Mapping[str, Flag], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names down to the known flags; a flag's own value may be a mapping."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in table and any(known.startswith(f"{name}.") for known in table):
            yield from _flatten(value, table, f"{name}.")
        else:
            yield name, value


@functools.cache
def _strict_loader() -> Any:
    import yaml

    class StrictLoader(yaml.SafeLoader):
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

    return StrictLoader


# --- from values to the dataclass ---------------------------------------------------------------------------------------------------------


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


def _decode(config_class: type[T], settings: Mapping[str, Any], table: Mapping[str, Flag]) -> T:
    missing = [flag for flag in table.values() if flag.default is MISSING and not flag.owners and flag.name not in settings]
    if missing:
        raise UsageError(f"--{missing[0].name} is missing: {missing[0].help or 'see --help'}.")
    hints = typing.get_type_hints(config_class)
    values: dict[str, Any] = {}
    for name, value in settings.items():
        field, _, rest = name.partition(".")
        if rest:
            values.setdefault(field, {})[rest] = value
        else:
            values[field] = value
    for name, value in values.items():
        if name not in table or (table[name].kind == "yaml" and typing.get_args(_without_none(hints[name])) != (str, str)):
            values[name] = _decoded(name, hints[name], value)
    return config_class(**values)


def _decoded(name: str, hint: Any, value: Any) -> Any:
    """A field of a type that draccus knows about."""
    import draccus

    _teach_literals()
    try:
        return draccus.decode(hint, draccus.utils.deflatten(value) if isinstance(value, dict) else value)
    except draccus.utils.ParsingError as error:
        raise UsageError(_explained(name, error)) from error


@functools.cache
def _teach_literals() -> None:
    """draccus has no decoder for typing.Literal."""
    import draccus

    def decode(hint: Any, raw_value: Any, path: Sequence[str]) -> Any:
        choices = typing.get_args(hint)
        if raw_value not in choices:
            expected = ", ".join(map(str, choices))
            raise draccus.utils.DecodingError(path, f"'{raw_value}' is not one of {expected}.{closest(str(raw_value), map(str, choices))}")
        return raw_value

    draccus.decode.register(Literal, decode, include_subclasses=True)


def _explained(name: str, error: Any) -> str:
    """draccus' message without its wrapping: `--robot.cameras.front.fps: Couldn't parse '29.97' into an int`."""
    path, text = [name, *getattr(error, "key_path", ())], _one_line(getattr(error, "message", None) or str(error))
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
    return f"--{'.'.join(path)}: {text}{cause}"


def _one_line(text: str) -> str:
    plain = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", text)
    return " ".join(plain.replace("\\n", " ").split())


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        registry: Any = type(value)
        chosen = {"type": registry.get_choice_name(registry)} if _is_registry(registry) else {}
        return {**chosen, **settings_of(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
