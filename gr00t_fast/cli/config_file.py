"""A configuration file of `gr00t-fast run` with some settings changed: other settings, their order and the comments stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gr00t_fast.cli.run_flags import RunConfig
from gr00t_fast.errors import ConfigError
from gr00t_fast.files import atomic_write
from gr00t_fast.flags import CONFIG_FLAG, flags_of, parse_flags


def config_path_in(argv: Sequence[str]) -> Path | None:
    """The file that a command line names."""
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        if name.replace("-", "_") == f"__{CONFIG_FLAG}":
            return Path(value if equals else following)
    return None


def write_settings(path: Path, settings: Mapping[str, Any]) -> Path | None:
    """Write settings, by the names of a run's flags, into the YAML file `path`, which is made where there is none. The file as it was is kept beside
    it: returns where, None for a new one. Raises ConfigError when the file cannot be written; it is then as it was."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    text = updated(before, settings)
    backup = _free_name(path) if path.exists() else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if backup is not None:
            backup.write_text(before, encoding="utf-8")
        with atomic_write(path.resolve()) as partial:
            partial.write_text(text, encoding="utf-8")
            parse_flags(RunConfig, [f"--{CONFIG_FLAG}={partial}"])  # as a run will read it
    except OSError as error:
        raise ConfigError(f"--{CONFIG_FLAG}: '{path}' cannot be written: {error.strerror}. Give another file, or make it writable.") from error
    return backup


def updated(text: str, settings: Mapping[str, Any]) -> str:
    """YAML text with these top-level settings. Where they cannot be put in place (the file is one pair of braces) the whole is written anew, without
    its comments. Raises ConfigError for text that is no mapping."""
    import yaml

    root = yaml.compose(text)
    if root is None:
        return text + _lines(settings)
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError("the configuration file holds no settings (expected lines like `model_path: DIR`).")
    now_called = {former: flag.name for flag in flags_of(RunConfig) for former in flag.extra.get("former", ())}
    expected = {now_called.get(name, name): value for name, value in yaml.safe_load(text).items()} | dict(settings)
    edits, missing = [], dict(settings)
    for key, value in root.value:
        name = now_called.get(key.value, key.value)
        if name in missing:
            edits.append((key.start_mark.index, key.end_mark.index, name))
            edits.append(
                (value.start_mark.index, value.end_mark.index, " " * (value.start_mark.index == value.end_mark.index) + _scalar(missing.pop(name)))
            )
    changed = text
    for start, end, new in sorted(edits, reverse=True):
        changed = changed[:start] + new + changed[end:]
    if missing:
        changed = changed.rstrip("\n") + "\n" + _lines(missing)
    try:
        if yaml.safe_load(changed) == expected:
            return changed
    except yaml.YAMLError:
        pass  # written anew below
    return yaml.safe_dump(expected, sort_keys=False, allow_unicode=True)


def _lines(settings: Mapping[str, Any]) -> str:
    return "".join(f"{name}: {_scalar(value)}\n" for name, value in settings.items())


def _scalar(value: Any) -> str:
    """As JSON, which is YAML, but for plain words."""
    import json

    import yaml

    text = str(value)
    plain = isinstance(value, str) and text.strip() == text and text and "\n" not in text and ": " not in text and " #" not in text
    try:
        return text if plain and yaml.safe_load(text) == value else json.dumps(value, ensure_ascii=False)
    except yaml.YAMLError:
        return json.dumps(value, ensure_ascii=False)


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}.bak{number or ''}") for number in range(1000))
    return next(name for name in names if not name.exists())
