"""The command line of every program here: flags from a dataclass.

    @dataclass(kw_only=True)
    class BenchConfig(Flags):
        '''What the program does, in a paragraph; printed by --help.'''

        out: Path  # directory to make; a field without a default is required
        rounds: int = 100  # timed calls of each engine

    config, notes = parse_flags(BenchConfig, argv)      # ConfigError: one line that names flag, value and remedy
    print(help_text(BenchConfig, "usage: ..."))         # every flag with its values, default and the comment behind its field

One dialect: `--name=value`, `--name value`, bare `--switch` and `--no-switch`, dashes and underscores alike. Lists are `--name A B`, `--name=A,B` or
the flag again. Text and paths are taken literally, mappings are YAML; `null` leaves an optional setting out. `--config_path` names a YAML file, or
the report of an earlier run, that comes below the command line.

A field that is a dataclass contributes its fields as flags; one that is a `Choice`, such as a robot, contributes `<field>.type` and
`<field>.<setting>` of all its classes. Everything is read with the standard library; YAML is imported when a value or a file needs it.
"""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import functools
import inspect
import io
import re
import shutil
import textwrap
import tokenize
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from gr00t_fast.base.errors import ConfigError, closest, one_line
from gr00t_fast.base.files import parse_json, read_text

T = TypeVar("T")
Kind = Literal["text", "path", "bool", "choice", "whole", "number", "list", "yaml"]
CONFIG_FLAG = "config_path"
OUTPUTS = "outputs"  # the group of what a program leaves
_TRUE, _FALSE, _NULL = ("true", "yes", "on", "1"), ("false", "no", "off", "0"), ("null", "none", "~")
_WIDTH, _INDENT, _LEAST_WIDTH, _WIDE = 92, 34, 40, 200  # columns of --help: of a flag's text at most and before it, at least, and without a terminal

# Flags of other programs: whose, and what is in their place here -> names; one that ends in a dot stands for what begins with it.
_IN_PLACE_OF_OTHERS = {
    "NVIDIA's": {
        "The policy server's address is --server=tcp://HOST:PORT of gr00t-fast run.": "policy_host policy_port host port client",
        "This program is the server: leave the flag out.": "server",
        "HTTP is spoken by gr00t-fast serve --http.": "http_server",
        "Use --engine=tensorrt.": "use_tensorrt",
        "Use --engine_path=DIR.": "trt_engine_path",
        "That is chosen when the engine is made: gr00t-fast export tensorrt --precision.": "vit_dtype llm_dtype dit_dtype",
        "Nothing like it is needed here: leave the flag out.": "use_policy",
        "The length of a run is given in seconds: --timeout=SECONDS.": "actions_to_execute",
        'A camera is given as --robot.cameras="{front: {type: opencv, index_or_path: 0}}".': "cam_idx",
        "Use --video=FILE.mp4.": "record_imgs",
        "Use --display: rerun's viewer shows the cameras.": "show_images",
        "gr00t-fast eval has --dataset=DIR and --episodes=0,3 (or all), compares whole episodes and all joints, and draws no plot. "
        "Steps of the network are --denoising_steps=N.": "dataset_path trajs traj_ids steps plot save_plot_path modality_keys",
        "Observations are taken in both forms, nested and flat: leave the flag out.": "use_sim_policy_wrapper",
    },
    "lerobot's": {
        "Nothing like it is needed here: leave the flag out.": "play_sounds",
        "There is no human takeover here, and episodes need no strategy. For takeover install plugins/lerobot_policy_gr00t_fast, and use "
        "lerobot-rollout --policy.type=gr00t_fast.": "strategy.",
        "There is no upload here. Use --record=DIR, then `hf upload user/name DIR --repo-type=dataset`.": "dataset.push_to_hub",
        "The length of a run is given in seconds: --timeout=SECONDS.": "duration dataset.episode_time_s",
        "Use --model_path=DIR: the checkpoint says which network it is.": "policy.path policy.pretrained_path policy.type",
        "Use --action_horizon=N.": "policy.n_action_steps actions_per_chunk",
        "Settings of the network are flags of their own, such as --device and --denoising_steps.": "policy.",
        'Use --lang_instruction="...".': "dataset.single_task task",
        "Use --episodes=N.": "dataset.num_episodes",
        "Use --reset_time_s=SECONDS.": "dataset.reset_time_s",
        "Use --fps=N; without it the arm runs at the rate of the checkpoint's training data.": "dataset.fps",
        'Use --camera_map="{mine: checkpoint\'s}".': "dataset.rename_map rename_map",
        "gr00t-fast run records with --record=user/name (or --record=DIR), and gr00t-fast replay plays --dataset=user/name.": "dataset.",
        "Use --display, or --display=HOST:PORT.": "display_data display_ip display_port",
        "Use --record_append=true, beside --record.": "resume",
        "Use --controller=threaded with --smoothing=rtc (real-time chunking) or --smoothing=prefix.": "aggregate_fn_name inference.",
        "There is no teleoperation here: use lerobot-teleoperate or lerobot-record.": "teleop.",
    },
}
_FLAGS_OF_OTHERS = {
    name: (owner, remedy) for owner, remedies in _IN_PLACE_OF_OTHERS.items() for remedy, names in remedies.items() for name in names.split()
}
# Names that lerobot had for an arm before version 0.2 -> as it is called since.
_WORDS_OF_OTHERS = {"so100": "so100_follower", "so101": "so101_follower"}


class Flags:
    """Base of configurations. GROUP: heading in --help of the fields that the class declares. COMMON: names that --help shows, the rest under
    --help-all; empty: all."""

    GROUP: ClassVar[str] = "flags"
    COMMON: ClassVar[tuple[str, ...]] = ()

    def missing(self) -> Iterator[tuple[str, str]]:
        """Flags without which there is nothing to do and that were not given, and what each is. Overridden, it yields from `super().missing()`."""
        yield from ()

    def check(self) -> None:
        """Raises ConfigError for values that cannot be used, alone or together. Overridden, it calls `super().check()`."""

    def notes(self) -> list[str]:
        """What the user should know of these settings."""
        return []


class Choice:
    """Base of dataclasses that a configuration chooses between by `type`: `class Camera(Choice)` and then `class Webcam(Camera, type="webcam")`."""

    types: ClassVar[dict[str, type]]
    type_name: ClassVar[str] = ""

    def __init_subclass__(cls, type: str = "") -> None:
        if Choice in cls.__bases__:
            cls.types = {}
        if type:
            cls.types[type], cls.type_name = cls, type

    @classmethod
    def find_types(cls) -> None:
        """A base may add to `types` what takes seconds to import; called when a type is named that is not among them."""


def setting(default: Any = MISSING, *, default_factory: Any = MISSING, bare: Any = None, whole_words: bool = False, flag: bool = True) -> Any:
    """A field of a configuration with more to it than a type and a default.

    bare: what `--name` without a value means. whole_words: of a list, a value is one item, commas and all. flag: whether the field is a flag.
    """
    metadata = {"bare": bare, "whole_words": whole_words, "flag": flag}
    if default_factory is not MISSING:
        return dataclasses.field(default_factory=default_factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Flag:
    """One flag: its dotted name, the type of its value, and for fields of a `Choice` which `type`s have it (empty: all)."""

    name: str
    hint: Any
    default: Any  # MISSING: required
    help: str
    group: str = Flags.GROUP
    owners: tuple[str, ...] = ()
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of `setting`

    @property
    def kind(self) -> Kind:
        return _kind(self.hint)

    @property
    def optional(self) -> bool:
        """Whether `null` leaves it out, as its default does. A required text, such as an instruction, is literal."""
        return self.default is None or (self.default == "" and not self.help.endswith("required"))


def parse_flags(config_class: type[T], argv: Sequence[str], file_of: type | None = None, not_from_file: Sequence[str] = ()) -> tuple[T, list[str]]:
    """Return the checked configuration and notes for the user. Raises ConfigError with one line that names flag, value and remedy.

    file_of: the configuration class of another program, whose --config_path files are read too: what both have counts, but for what that program
    leaves, and `not_from_file`. A file with a setting that only the other program has is of that one.
    """
    table = {flag.name: flag for flag in flags_of(config_class)}
    more = "See --help-all." if getattr(config_class, "COMMON", ()) else "See --help."
    given = _read_command_line(argv, table, more)
    path = given.pop(CONFIG_FLAG, None)
    also = {} if file_of is None else {flag.name: flag for flag in flags_of(file_of)}
    from_file = {} if path is None else _read_file(path, table, also, {*not_from_file, *given}, more)
    settings = {**from_file, **given}
    notes = _settle_types(settings, given, table)
    missing: dict[str, str] = {}
    config = _build(config_class, settings, table, missing)
    if isinstance(config, Flags):
        missing |= dict(config.missing())
    if missing:
        raise ConfigError(" ".join(f"--{name} is missing: {what.rstrip('.')}." for name, what in missing.items()))
    if isinstance(config, Flags):
        config.check()
        notes += config.notes()
    return config, notes


def flags_of(config_class: type) -> Iterator[Flag]:
    """Every flag of a dataclass."""
    yield from _flags_below(config_class)
    yield Flag(CONFIG_FLAG, Path, None, "YAML file with any of these settings, or report.json of an earlier run; flags win", OUTPUTS)


def _flags_below(config_class: type) -> Iterator[Flag]:
    for flag in _fields(config_class):
        inner = _without_none(flag.hint)
        if _is_choice(inner):
            yield from _choice_flags(flag, inner)
        elif dataclasses.is_dataclass(inner):
            yield from (dataclasses.replace(each, group=flag.group) for each in _flags_below(typing.cast(type, inner)))
        else:
            yield flag


def settings_of(config: Any) -> dict[str, Any]:
    """The configuration as JSON-ready values that `--config_path` reads again: the inverse of `parse_flags`."""
    found: dict[str, Any] = {}
    for flag in _fields(type(config)):
        value = getattr(config, flag.name)
        nested = dataclasses.is_dataclass(value) and not isinstance(value, Choice)
        found |= settings_of(value) if nested else {flag.name: _plain(value)}
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Choice):
        return {"type": value.type_name, **{name: _plain(each) for name, each in vars(value).items()}}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


# --- --help -------------------------------------------------------------------------------------------------------------------------------


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
    words = "|".join(map(str, _words_of(flag.hint)))
    if flag.kind == "list":
        return (words or one[_kind(_item_of(flag.hint))]) + ",.."
    return words if flag.kind == "choice" else "|".join(filter(None, (one[flag.kind], words)))


def _shown_default(flag: Flag) -> str:
    if flag.default is MISSING:
        return " (required)"
    if flag.default in (None, "", {}, []) or not isinstance(flag.default, list | str | int | float | Path):
        return ""
    joined = ",".join(map(str, flag.default)) if isinstance(flag.default, list) else str(flag.default)
    return f" [{joined.lower() if isinstance(flag.default, bool) else joined}]"


# --- from a dataclass to flags ------------------------------------------------------------------------------------------------------------


def _choice_flags(field: Flag, base: type[Choice]) -> Iterator[Flag]:
    classes, merged = base.types, dict[str, Flag]()
    yield dataclasses.replace(field, name=f"{field.name}.type", hint=Literal[tuple(sorted(classes))], help=f"which {field.name}")
    for type_name, choice_class in classes.items():
        for flag in _fields(choice_class):
            known = merged.get(flag.name, dataclasses.replace(flag, name=f"{field.name}.{flag.name}", group=field.group))
            merged[flag.name] = dataclasses.replace(known, owners=(*known.owners, type_name), help=known.help or flag.help)
    yield from merged.values()


def _fields(config_class: type) -> Iterator[Flag]:
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        declaring = next(each for each in config_class.__mro__ if field.name in inspect.get_annotations(each))
        group = vars(declaring).get("GROUP", Flags.GROUP)
        if field.metadata.get("flag", True):
            yield Flag(field.name, hints[field.name], default, _comments(declaring).get(field.name, ""), group, extra=field.metadata)


@functools.cache
def _comments(config_class: type) -> dict[str, str]:
    """Field -> the comment behind its definition."""
    try:
        source = textwrap.dedent(inspect.getsource(config_class))
    except (OSError, TypeError):  # no source at hand: flags without help
        return {}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    behind = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    body = typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
    fields = [node for node in body if isinstance(node, ast.AnnAssign)]
    return {ast.unparse(node.target): behind.get(node.end_lineno or 0, behind.get(node.lineno, "")) for node in fields}


def _is_choice(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Choice)


def _kind(hint: Any) -> Kind:
    inner = _without_none(hint)
    origin, arguments = typing.get_origin(inner), typing.get_args(inner)
    if origin is Literal:
        return "choice"
    if origin in (list, collections.abc.Sequence):
        return "list"
    if origin in (typing.Union, types.UnionType):  # a number, or a word in its place
        rest = [each for each in arguments if typing.get_origin(each) is not Literal and each is not type(None)]
        return _kind(rest[0]) if len(rest) == 1 else "yaml"
    kinds: dict[Any, Kind] = {str: "text", Path: "path", bool: "bool", int: "whole", float: "number"}
    return kinds.get(inner, "yaml")


def _without_none(hint: Any) -> Any:
    """`X | None` -> `X`; other unions stay."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        rest = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return rest[0] if len(rest) == 1 else hint
    return hint


def _item_of(hint: Any) -> Any:
    """`list[X] | None` -> `X`."""
    return typing.get_args(_without_none(hint))[0]


def _words_of(hint: Any) -> tuple[Any, ...]:
    """`Literal["a", "b"]` -> ("a", "b"), also of a list of them; `float | Literal["auto"]` -> ("auto",)."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    return tuple(word for each in typing.get_args(hint) for word in _words_of(each))


# --- the command line and a file ----------------------------------------------------------------------------------------------------------


def _read_command_line(argv: Sequence[str], table: Mapping[str, Flag], more: str) -> dict[str, Any]:
    """Name -> value. The last one wins; of a list they add up."""
    given: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            meant = f" Did you mean --model_path={word}?" if "model_path" in table and Path(word).exists() else ""
            raise ConfigError(f"unexpected argument '{word}': flags begin with '--'; a value with spaces needs quotes.{meant}")
        written, equals, value = word[2:].partition("=")
        flag, negated = _flag_of(written, table, more)
        if negated and equals:
            raise ConfigError(f"--{written} takes no value.")
        if flag.kind == "list":
            texts = [value] if equals else []
            while words and not words[0].startswith("--"):
                texts.append(words.pop(0))
            if not texts:
                raise ConfigError(f"--{flag.name} needs values: --{flag.name}=A,B.")
            given.setdefault(flag.name, []).extend(each for text in texts for each in _value(f"--{flag.name}", flag, text))
        elif negated:
            given[flag.name] = False
        else:
            given[flag.name] = _from_text(flag, value) if equals else _following_value(flag, words)
    return given


def _flag_of(written: str, table: Mapping[str, Flag], more: str) -> tuple[Flag, bool]:
    """The flag, and whether it is said with `no`."""
    name = written.replace("-", "_")
    if name in table:
        return table[name], False
    if name.startswith("no_") and (positive := table.get(name[3:])) and positive.kind == "bool":
        return positive, True
    if found := _FLAGS_OF_OTHERS.get(name) or _FLAGS_OF_OTHERS.get(name.partition(".")[0] + "."):
        owner, remedy = found
        raise ConfigError(f"unknown flag '--{written}', which is {owner}. {remedy}")
    raise ConfigError(f"unknown flag '--{written}'.{closest(name, [*table, 'help'], '--')} {more}")


def _following_value(flag: Flag, words: list[str]) -> Any:
    if flag.kind == "bool" and (not words or words[0].lower() not in (*_TRUE, *_FALSE)):
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
        raw = _read_yaml(text) if flag.kind == "yaml" else text
    except ValueError as error:
        raise ConfigError(f"--{flag.name}: cannot read '{text}' as YAML ({error}). Check the braces.") from error
    return _value(f"--{flag.name}", flag, raw)


def _read_file(path: Path, table: Mapping[str, Flag], also: Mapping[str, Flag], not_from_file: Collection[str], more: str) -> dict[str, Any]:
    """A configuration file's settings by dotted name. also, not_from_file: another program's flags, and what does not count in its files."""
    try:
        text = read_text(path)
        content = parse_json(text) if path.suffix == ".json" else _read_yaml(text)
    except (OSError, ValueError) as error:
        remedy = "Expected a YAML file of settings, or a run's report."
        raise ConfigError(f"--{CONFIG_FLAG}: cannot read '{path}': {one_line(error).rstrip('.')}. {remedy}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--{CONFIG_FLAG}: '{path}' holds no settings (expected lines like `model_path: DIR`).")
    if "schema" in content and isinstance(content.get("settings"), dict):
        content = content["settings"]  # of a run's report
    known = {name: flag for name, flag in {**also, **table}.items() if name != CONFIG_FLAG}  # one file does not read another
    written = dict(_flatten(path, content, known))
    for unknown in written.keys() - known.keys():
        raise ConfigError(f"unknown setting '{unknown}' in {path}.{closest(unknown, known)} {more}")
    if not written.keys() <= table.keys():  # it is the other program's
        written = {name: value for name, value in written.items() if name not in not_from_file and not (name in also and also[name].group == OUTPUTS)}
    used = {name: (table[name], value) for name, value in written.items() if name in table}
    return {
        name: flag.default if value is None and flag.default in (None, "") else _value(f"{path}: {name}", flag, value)
        for name, (flag, value) in used.items()
    }


def _flatten(path: Path, content: Mapping[str, Any], table: Mapping[str, Flag], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names down to the known flags; a flag's own value may be a mapping."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if name in table or not (below := [known for known in table if known.startswith(f"{name}.")]):
            yield name, value
        elif isinstance(value, dict):
            yield from _flatten(path, value, table, f"{name}.")
        else:
            example = f"`{key}: {{{below[0].removeprefix(f'{name}.')}: {value or '...'}}}`"
            raise ConfigError(f"{path}: {name} is a group of settings, got {value!r}. Write them in braces, such as {example}, or indented below it.")


def _read_yaml(text: str) -> Any:
    """Plain values. Raises ValueError with one line."""
    import yaml

    try:
        return yaml.load(text, _strict_loader())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ValueError((f"line {mark.line + 1}: " if mark else "") + one_line(getattr(error, "problem", None) or error)) from error


@functools.cache
def _strict_loader() -> Any:
    import yaml

    class StrictLoader(yaml.SafeLoader):
        """Plain values only: no Python objects, no references, each name once."""

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


# --- values -------------------------------------------------------------------------------------------------------------------------------


def _value(where: str, flag: Flag, raw: Any) -> Any:
    """`raw`, a text of the command line or what YAML holds, as a value of the flag's type. Raises ConfigError that begins with `where`."""
    if flag.kind == "list" and isinstance(raw, str):
        inner = raw[1:-1] if raw.startswith("[") and raw.endswith("]") else raw
        raw = [raw] if flag.extra.get("whole_words") else [each.strip() for each in inner.split(",") if each.strip()]
    return _typed(where, flag.hint, raw)


def _typed(where: str, hint: Any, raw: Any) -> Any:
    inner, kind, words = _without_none(hint), _kind(hint), _words_of(_without_none(hint))
    if raw is None or (kind in ("whole", "number") and str(raw).lower() in _NULL):
        if hint is Any or type(None) in typing.get_args(hint):
            return None
        raise ConfigError(f"{where} needs a value.")
    if kind == "choice":
        return _chosen_word(where, words, raw)
    if kind in ("whole", "number"):
        return str(raw) if str(raw) in map(str, words) else _number(where, kind, raw, words)
    if kind == "list":
        return [_typed(where, _item_of(inner), each) for each in (raw if isinstance(raw, list | tuple) else [raw])]
    if kind == "bool":
        if str(raw).lower() not in (*_TRUE, *_FALSE):
            raise ConfigError(f"{where}={raw} is neither true nor false.")
        return str(raw).lower() in _TRUE
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
        example = "{front: {type: opencv, index_or_path: 0}}" if _is_choice(item) else "{front: webcam}"  # YAML makes None of the b in `{a:b}`
        raise ConfigError(f'{where}: expected names with values in braces, e.g. "{example}", got {raw!r}. YAML wants a space after the colon.')
    if _is_choice(item):
        return {str(name): _chosen(f"{where}.{name}", item, value) for name, value in raw.items()}
    return {str(name): _typed(f"{where}.{name}", item, str(value) if item is str else value) for name, value in raw.items()}


def _one_of(where: str, hint: Any, raw: Any) -> Any:
    """The first type of a union that fits."""
    failures = []
    for each in typing.get_args(hint):
        fits = isinstance(raw, list | dict) == (_kind(each) in ("list", "yaml"))
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
        raise ConfigError(f"{where} has no 'type' (one of {', '.join(classes)}); YAML wants a space after the colon.")
    if raw["type"] not in classes:
        base.find_types()
    chosen = classes[_chosen_word(f"{where}.type", tuple(classes), raw["type"])]
    known = {flag.name: flag for flag in _fields(chosen)}
    if unknown := [str(key) for key in raw if key != "type" and key not in known]:
        raise ConfigError(f"{where} has the unknown setting '{unknown[0]}'.{closest(unknown[0], known)} Known: {', '.join(known)}.")
    if needed := [name for name, flag in known.items() if flag.default is MISSING and name not in raw]:
        raise ConfigError(f"{where} needs the setting '{needed[0]}'. Known: {', '.join(known)}.")
    values = {key: _value(f"{where}.{key}", known[key], value) for key, value in raw.items() if key != "type"}
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
    ours = _WORDS_OF_OTHERS.get(str(raw))
    meant = f" It is called {ours} now." if ours in words else closest(str(raw), words)
    raise ConfigError(f"{where}={raw} is not one of {', '.join(words)}.{meant}")


# --- from values to the dataclass ---------------------------------------------------------------------------------------------------------


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


def _build(config_class: type[T], settings: Mapping[str, Any], table: Mapping[str, Flag], missing: dict[str, str]) -> T:
    """Required flags that are not there are None, and added to `missing` with what they are."""
    values: dict[str, Any] = {}
    for flag in _fields(config_class):
        inner = _without_none(flag.hint)
        if _is_choice(inner):
            of_choice = {name.partition(".")[2]: value for name, value in settings.items() if name.startswith(f"{flag.name}.")}
            if "type" in of_choice:
                values[flag.name] = inner.types[of_choice.pop("type")](**of_choice)
            elif of_choice:
                missing[f"{flag.name}.type"] = f"choose from {', '.join(_words_of(table[f'{flag.name}.type'].hint))}"
        elif dataclasses.is_dataclass(inner):
            values[flag.name] = _build(typing.cast(type, inner), settings, table, missing)
        elif flag.name in settings:
            values[flag.name] = settings[flag.name]
        elif flag.default is MISSING:
            values[flag.name], missing[flag.name] = None, flag.help or "see --help"
    return config_class(**values)


def size_of(text: str, flag: str = "resolution", least: int = 32) -> tuple[int, int]:
    """`640x480` -> (640, 480): width and height. Raises ConfigError."""
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text.lower())
    if found is None or min(int(found[1]), int(found[2])) < least:
        raise ConfigError(f"--{flag}={text}: expected WIDTHxHEIGHT such as 640x480, each at least {least}.")
    return int(found[1]), int(found[2])
