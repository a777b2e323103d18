"""Small random GR00T policies, trained for two steps by the installed lerobot's own `lerobot-train` and run by its own code, in the form of the
recordings (`checkpoint/`, observation.npz, expected.npz): what tests compare with besides the recordings. Needs lerobot's `groot` extra.

    python tests/lerobot_policies.py OUT SHARED

SHARED: the directory with golden_lerobot/, whose program is used here with other policies. A process of its own: the program changes lerobot.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

_WIDE = {"vis": {"h": 64, "l": 4, "heads": 4, "inter": 72, "pos": 100, "deep": [0, 1, 2]}}
_WIDE |= {"txt": {"h": 24, "l": 6, "sel": 4, "heads": 3, "kv": 1, "hd": 16, "inter": 40, "mrope": [4, 2, 2]}}
_WIDE |= {"head": {"dh": 8, "heads": 2, "layers": 4, "out": 32, "hidden": 32, "vlh": 3, "vll": 1, "every": 2}}
_DEEP = {"vis": {"h": 32, "l": 6, "heads": 2, "inter": 50, "pos": 64, "deep": [1, 3]}}
_DEEP |= {"txt": {"h": 16, "l": 5, "sel": 5, "heads": 4, "kv": 4, "hd": 8, "inter": 60, "mrope": [2, 1, 1]}}
_DEEP |= {"head": {"dh": 12, "heads": 3, "layers": 6, "out": 24, "hidden": 24, "vlh": 2, "vll": 2, "every": 2}}
_OLD_WIDE = {"vis": {"h": 64, "l": 2, "heads": 4, "inter": 72}, "txt": {"h": 24, "l": 4, "heads": 3, "kv": 1, "hd": 16, "inter": 40, "sel": 4}}
_OLD_WIDE |= {"head": {"dh": 8, "heads": 2, "layers": 4, "out": 32, "hidden": 32, "emb": 16, "vlh": 3, "vll": 1, "ntv": 32}}
_OLD_DEEP = {"vis": {"h": 32, "l": 4, "heads": 2, "inter": 50}, "txt": {"h": 16, "l": 5, "heads": 4, "kv": 4, "hd": 8, "inter": 60, "sel": 2}}
_OLD_DEEP |= {"head": {"dh": 12, "heads": 3, "layers": 6, "out": 24, "hidden": 24, "emb": 36, "vlh": 2, "vll": 2, "ntv": 7}}
_RELATIVE = ["--policy.use_relative_actions=true", "--policy.chunk_size=16", "--policy.n_action_steps=16"]
_BUT_THE_GRIPPER = [*_RELATIVE, '--policy.relative_exclude_joints=["gripper"]']
_EIGHT = ["--policy.chunk_size=8", "--policy.n_action_steps=8"]
_TWENTY = ["--policy.chunk_size=20", "--policy.n_action_steps=20"]
_LOCAL_BASE = {"base": "./GR00T-N1.7-3B"}
N1D7: dict[str, dict[str, Any]] = {
    "one small camera": {"cams": {"top": (320, 240)}, "task": "Pick", "args": [], **_WIDE},
    "three cameras": {"cams": {"z": (640, 480), "a_b": (640, 480), "Front": (640, 480)}, "task": "Wipe_the 'table', twice!", "args": [], **_DEEP},
    "relative": {"cams": {"wrist": (1280, 720), "front": (1280, 720)}, "task": "Put it  down\n", "args": _BUT_THE_GRIPPER, **_WIDE},
    "all relative": {"cams": {"front": (424, 240)}, "task": "Ünïcode ½ … 把积木", "args": _RELATIVE, **_DEEP},
    "local base": {"cams": {"b": (848, 480), "a": (848, 480)}, "task": "42", "args": _BUT_THE_GRIPPER, **_WIDE, **_LOCAL_BASE},
    "local base, absolute": {"cams": {"b": (320, 240)}, "task": "Go.", "args": _EIGHT, **_DEEP, **_LOCAL_BASE},
}
N1D5: dict[str, dict[str, Any]] = {
    "one small camera": {"cams": {"top": (320, 240)}, "task": "Pick", "args": [], **_OLD_WIDE},
    "three cameras": {"cams": {"z": (640, 480), "a_b": (640, 480), "Front": (640, 480)}, "task": "don't", "args": [], **_OLD_DEEP},
    "wide pictures": {"cams": {"wrist": (1280, 720), "front": (1280, 720)}, "task": 'Say "it\\\'s"', "args": [], **_OLD_WIDE},
    "odd characters": {"cams": {"front": (424, 240)}, "task": "Ünïcode ½ … 把积木\ttab", "args": ["--policy.n_action_steps=8"], **_OLD_DEEP},
    "long task": {
        "cams": {"b": (848, 480), "a": (848, 480)},
        "task": "42" * 150,
        "args": ["--policy.chunk_size=20", "--policy.n_action_steps=20"],
        **_OLD_WIDE,
    },
    "square": {"cams": {"b": (480, 480)}, "task": "Go.", "args": [], **_OLD_DEEP},
}


def _program(shared: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_golden_lerobot", shared / "golden_lerobot" / "make_golden_lerobot.py")
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


def main(out: Path, shared: Path) -> None:
    program = _program(shared)
    import lerobot

    n1d7 = not lerobot.__version__.startswith(("0.4", "0.5"))
    for number, (name, case) in enumerate((N1D7 if n1d7 else N1D5).items()):
        shutil.rmtree(program.os.environ["HF_LEROBOT_HOME"], ignore_errors=True)
        program.WORK = Path(tempfile.mkdtemp(dir=out))
        program.CASES = {name: {**case, "n": 17 if n1d7 else 15, "seed": 500 + number}}
        program.main(out / name, name, shared)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
