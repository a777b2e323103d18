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

from gr00t_fast.base.flags.help import help_text
from gr00t_fast.base.flags.parse import parse_flags, settings_of
from gr00t_fast.base.flags.values import size_of
from gr00t_fast.base.flags.words import OUTPUTS, Choice, Flags, flags_of, setting

__all__ = ["OUTPUTS", "Choice", "Flags", "flags_of", "help_text", "parse_flags", "setting", "settings_of", "size_of"]
