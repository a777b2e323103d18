"""The import arrow as functions over source text, so that the rules can be tried on samples as well as on the repository.

A *unit* is what the arrow is drawn between: a package or module directly under gr00t_fast (`control`, `errors`), a top-level package
(`benchmarks`), or a script at the root. Imports inside functions and under TYPE_CHECKING count like any other.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

BASE = ("errors", "contracts", "tensorrt_library", "flags", "measurement", "console", "files")
POLICY = ("policy",)
ENDS = ("serving", "control", "robots")  # do not know each other
PROGRAMS = ("cli", "export")  # under gr00t_fast; scripts and benchmarks are added by `unit_of`
LAYERS = (BASE, ("model",), ("inputs",), ("networks",), ("checkpoint",), ("engine",), POLICY, ENDS, PROGRAMS)
# Narrower than the layers: the only units of this project that these may import, besides themselves.
ONLY = {"model": (), "control": BASE, "robots": BASE, "serving": (*BASE, "policy", "checkpoint", "inputs")}
# Installed with the core. Everything else third-party goes through gr00t_fast.errors, inside a function.
CORE_PACKAGES = frozenset({"torch", "numpy", "safetensors", "huggingface_hub", "tokenizers", "cv2", "yaml"})
FLAG_PACKAGES = frozenset({"yaml"})  # at import time only where flags are declared: a policy must load without them
FLAG_MODULES = frozenset({"gr00t_fast.flags", "gr00t_fast.robots.config"})
OUTSIDE = ("benchmarks", "examples", "export", "scripts", "training")
SCRIPT = "a script"

Sources = Mapping[str, str]  # module name -> source


def read_sources(root: Path) -> dict[str, str]:
    """Every product module below `root` by its dotted name: gr00t_fast, the program packages and the root's scripts; not the tests."""
    files = [*root.glob("*.py"), *(file for top in ("gr00t_fast", *OUTSIDE) for file in (root / top).rglob("*.py"))]
    return {_module_name(file.relative_to(root)): file.read_text(encoding="utf-8") for file in files}


def _module_name(file: Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit_of(module: str) -> str:
    """`gr00t_fast.control.loop` -> `control`; the facade `gr00t_fast` itself stands for `policy`; programs outside and `__main__`s are scripts."""
    top, *rest = module.split(".")
    if top != "gr00t_fast" or rest[-1:] == ["__main__"]:
        return SCRIPT
    return rest[0] if rest else "policy"


def rank_of(unit: str) -> int | None:
    """Layer of `unit`, or None when the table does not have it."""
    if unit == SCRIPT:
        return len(LAYERS) - 1
    return next((rank for rank, units in enumerate(LAYERS) if unit in units), None)


def imports(source: str, module: str, at_import_time: bool = False) -> list[tuple[int, str]]:
    """(line, dotted target) of each import; `from a import b` gives `a.b`. `at_import_time`: without functions and TYPE_CHECKING blocks."""
    found = []
    for node in _nodes(ast.parse(source), at_import_time):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{module}:{node.lineno}: a relative import; write the full name")
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def _nodes(node: ast.AST, at_import_time: bool) -> Iterable[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if at_import_time and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_import_time and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _nodes(child, at_import_time)


def arrow_violations(sources: Sources) -> list[str]:
    """Imports against the arrow, between the three ends, beyond `ONLY`, of tests, and units that the table does not have."""
    found = []
    for module, source in sources.items():
        if module == "gr00t_fast":
            continue  # the facade looks its names up when they are used; what it really imports is measured in a subprocess
        for line, target in imports(source, module):
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
    here_rank, there_rank = rank_of(here), rank_of(there)
    if here_rank is None or there_rank is None:
        return f"'{here if here_rank is None else there}' is not in LAYERS of tests/import_rules.py; decide where it belongs"
    if there_rank > here_rank:
        return f"'{there}' is above '{here}'"
    if there_rank == here_rank and here in ENDS:
        return f"'{here}' and '{there}' do not know each other"
    if there_rank == here_rank and here not in (*BASE, *POLICY, *PROGRAMS, SCRIPT):
        return f"'{here}' and '{there}' are of one layer"
    if here in ONLY and there not in ONLY[here]:
        return f"'{here}' may import only {', '.join(ONLY[here])}"
    return None


def package_violations(sources: Sources) -> list[str]:
    """Third-party packages imported at import time that the core install lacks, flag packages outside flag modules, extras for the model."""
    found = []
    for module, source in sources.items():
        if not module.startswith("gr00t_fast"):
            continue
        for line, target in imports(source, module, at_import_time=True):
            package = target.split(".")[0]
            if package in sys.stdlib_module_names or package in ("gr00t_fast", "__future__"):
                continue
            if package not in CORE_PACKAGES:
                found.append(f"{module}:{line}: imports {package} at import time; use gr00t_fast.errors.require inside a function")
            elif package in FLAG_PACKAGES and module not in FLAG_MODULES:
                found.append(f"{module}:{line}: imports {package}; only modules that declare flags do")
            elif unit_of(module) == "model" and package != "torch":
                found.append(f"{module}:{line}: imports {package}; the model needs torch alone")
    return found


def required_extras(sources: Sources) -> set[tuple[str, str]]:
    """(top-level module, extra) of each `require("module", "extra")`."""
    calls = (node for source in sources.values() for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    named = (call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "require")
    literals = [[arg.value for arg in call.args if isinstance(arg, ast.Constant)] for call in named]
    return {(args[0].split(".")[0], args[1]) for args in literals if len(args) == 2}
