"""Which flags a dataclass has: their names, the types of their values, and the comments behind its fields."""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import functools
import inspect
import io
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

Kind = Literal["text", "path", "bool", "choice", "whole", "number", "list", "yaml"]
CONFIG_FLAG = "config_path"
OUTPUTS = "outputs"  # the group of what a program leaves


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
    instead: ClassVar[Mapping[str, str]] = {}  # names that are no types here -> a sentence of what to do

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
        return kind_of(self.hint)

    @property
    def optional(self) -> bool:
        """Whether `null` leaves it out, as its default does. A required text, such as an instruction, is literal."""
        return self.default is None or (self.default == "" and not self.help.endswith("required"))


def flags_of(config_class: type) -> Iterator[Flag]:
    """Every flag of a dataclass."""
    yield from _flags_below(config_class)
    yield Flag(CONFIG_FLAG, Path, None, "YAML file with any of these settings, or report.json of an earlier run; flags win", OUTPUTS)


def _flags_below(config_class: type) -> Iterator[Flag]:
    for flag in fields_of(config_class):
        inner = without_none(flag.hint)
        if is_choice(inner):
            yield from _choice_flags(flag, inner)
        elif dataclasses.is_dataclass(inner):
            yield from (dataclasses.replace(each, group=flag.group) for each in _flags_below(typing.cast(type, inner)))
        else:
            yield flag


def _choice_flags(field: Flag, base: type[Choice]) -> Iterator[Flag]:
    classes, merged = base.types, dict[str, Flag]()
    words, extra = Literal[tuple(sorted(classes))], {"instead": base.instead}
    yield dataclasses.replace(field, name=f"{field.name}.type", hint=words, help=f"which {field.name}", extra=extra)
    for type_name, choice_class in classes.items():
        for flag in fields_of(choice_class):
            known = merged.get(flag.name, dataclasses.replace(flag, name=f"{field.name}.{flag.name}", group=field.group))
            merged[flag.name] = dataclasses.replace(known, owners=(*known.owners, type_name), help=known.help or flag.help)
    yield from merged.values()


def fields_of(config_class: type) -> Iterator[Flag]:
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


def is_choice(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Choice)


def kind_of(hint: Any) -> Kind:
    inner = without_none(hint)
    origin, arguments = typing.get_origin(inner), typing.get_args(inner)
    if origin is Literal:
        return "choice"
    if origin in (list, collections.abc.Sequence):
        return "list"
    if origin in (typing.Union, types.UnionType):  # a number, or a word in its place
        rest = [each for each in arguments if typing.get_origin(each) is not Literal and each is not type(None)]
        return kind_of(rest[0]) if len(rest) == 1 else "yaml"
    kinds: dict[Any, Kind] = {str: "text", Path: "path", bool: "bool", int: "whole", float: "number"}
    return kinds.get(inner, "yaml")


def without_none(hint: Any) -> Any:
    """`X | None` -> `X`; other unions stay."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        rest = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return rest[0] if len(rest) == 1 else hint
    return hint


def item_of(hint: Any) -> Any:
    """`list[X] | None` -> `X`."""
    return typing.get_args(without_none(hint))[0]


def words_of(hint: Any) -> tuple[Any, ...]:
    """`Literal["a", "b"]` -> ("a", "b"), also of a list of them; `float | Literal["auto"]` -> ("auto",)."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    return tuple(word for each in typing.get_args(hint) for word in words_of(each))
