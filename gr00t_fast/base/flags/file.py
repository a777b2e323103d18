"""The YAML file, or a run's report, that comes below the command line."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from gr00t_fast.base.errors import ConfigError, closest, one_line
from gr00t_fast.base.files import parse_json, read_text
from gr00t_fast.base.flags.values import value_of
from gr00t_fast.base.flags.words import CONFIG_FLAG, OUTPUTS, Flag


def read_file(path: Path, table: Mapping[str, Flag], also: Mapping[str, Flag], not_from_file: Collection[str], more: str) -> dict[str, Any]:
    """A configuration file's settings by dotted name. also, not_from_file: another program's flags, and what does not count in its files."""
    try:
        text = read_text(path)
        content = parse_json(text) if path.suffix == ".json" else read_yaml(text)
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
        name: flag.default if value is None and flag.default in (None, "") else value_of(f"{path}: {name}", flag, value)
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


def read_yaml(text: str) -> Any:
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
