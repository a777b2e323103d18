"""The import arrow as functions over source text, so that the rules can be tried on samples as well as on the repository.

A *unit* is what the arrow is drawn between: a package or module directly under gr00t_fast (`control`, `policy`), `benchmarks`, `training`, or
another script. Imports inside functions and under TYPE_CHECKING count like any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

SCRIPT = "a script"
PROGRAMS = ("benchmarks", "training", SCRIPT)
LAYERS = (
    *(("base",), ("model",), ("inputs",), ("networks",), ("checkpoint",), ("engine",), ("policy", "options")),
    *(("export", "serving", "control", "robots", "scene"), ("virtual", "record"), ("evaluation",), ("cli",), PROGRAMS),
)
# Narrower than the layers: the only units of this project that these may import, besides themselves.
ONLY = {
    **{"model": (), "control": ("base",), "robots": ("base",), "scene": ("base",), "record": ("base", "control")},
    "serving": ("base", "policy", "checkpoint", "inputs"),
    "virtual": ("base", "robots", "model", "networks", "inputs"),
}
OUTSIDE = ("benchmarks", "examples", "export", "scripts", "training")

Sources = Mapping[str, str]  # module name -> source


def read_sources(root: Path) -> dict[str, str]:
    """Every product module below `root` by its dotted name: gr00t_fast, the program packages and the root's scripts; not the tests."""
    files = [*root.glob("*.py"), *(file for top in ("gr00t_fast", *OUTSIDE) for file in (root / top).rglob("*.py"))]
    parts = {file: file.relative_to(root).with_suffix("").parts for file in files}
    return {".".join(each).removesuffix(".__init__"): file.read_text(encoding="utf-8") for file, each in parts.items()}


def unit_of(module: str) -> str:
    """`gr00t_fast.control.loop` -> `control`; the facade `gr00t_fast` itself stands for `policy`; programs outside and `__main__`s are scripts."""
    top, *rest = module.split(".")
    if top in PROGRAMS:
        return top
    if top != "gr00t_fast" or rest[-1:] == ["__main__"]:
        return SCRIPT
    return rest[0] if rest else "policy"


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted target) of each import, wherever it is; `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            yield from ((node.lineno, prefix + alias.name) for alias in node.names)


def arrow_violations(sources: Sources) -> list[str]:
    """Imports against the arrow, between the three ends, beyond `ONLY`, of tests, and units that the table does not have."""
    found = []
    for module, source in sources.items():
        if module == "gr00t_fast":
            continue  # the facade looks its names up when they are used; what it really imports is measured in a subprocess
        for line, target in imports(source):
            if reason := _against_arrow(module, target, sources):
                found.append(f"{module}:{line}: imports {target}: {reason}")
    return found


def _against_arrow(module: str, target: str, sources: Sources) -> str | None:
    if target.split(".")[0] == "tests":
        return "product code does not use tests"
    if target.split(".")[0] in OUTSIDE and module.startswith("gr00t_fast"):
        return "the library does not use its programs"
    if target.split(".")[0] not in ("gr00t_fast", *OUTSIDE) or target == "gr00t_fast.__version__":
        return None
    if target.startswith("gr00t_fast.") and not any(name == target or name.startswith(target + ".") for name in sources):
        target = target.rpartition(".")[0]  # a name inside a module
    here, there = unit_of(module), unit_of(target)
    if here == there:
        return None
    rank = {unit: number for number, units in enumerate(LAYERS) for unit in units}
    if unknown := {here, there} - rank.keys():
        return f"{unknown} is not in LAYERS of tests/support/import_rules.py; decide where it belongs"
    here_rank, there_rank = rank[here], rank[there]
    if there_rank > here_rank:
        return f"'{there}' is above '{here}'"
    if there_rank == here_rank and SCRIPT not in (here, there):
        return f"'{here}' and '{there}' are of one layer"
    if here in ONLY and there not in ONLY[here]:
        return f"'{here}' may import only {', '.join(ONLY[here])}"
    return None


def required_extras(sources: Sources) -> set[tuple[str, str]]:
    """(top-level module, extra) of each `require("module", "extra")`."""
    calls = (node for source in sources.values() for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    named = (call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "require")
    literals = [[arg.value for arg in call.args if isinstance(arg, ast.Constant)] for call in named]
    return {(args[0].split(".")[0], args[1]) for args in literals if len(args) == 2}
