"""benchmarks/results: what a file there must carry, and the one function that writes there. And the certificates that were sent, as a table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gr00t_fast.base.errors import ConfigError
from gr00t_fast.base.files import read_json

ROOT = Path(__file__).resolve().parents[2]
RESULTS, CERTIFICATES = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "certificates"


def faults_of(result: Mapping[str, Any]) -> list[str]:
    """Why it cannot stand in benchmarks/results: it does not say how, with what, where or from which code it was made."""
    commit = result.get("git_commit")
    found = [] if result.get("command_line") or result.get("command_lines") else ["no command"]
    found += ["no commit"] if not commit else [f"commit {commit}: of changed files, which nobody else has"] if commit.endswith("-dirty") else []
    found += [f"no {what}" for what, facts in (("machine", result.get("machine")), ("versions", result.get("versions"))) if not facts]
    return found


def publish(files: Iterable[tuple[Path, Path]]) -> None:
    """Copy each result and the table beside it to its place below benchmarks/results, all or none. files: (from, to), JSON files. Raises ConfigError
    for one that `faults_of` refuses."""
    pairs = list(files)
    if refused := [f"{source.name}: {fault}" for source, _ in pairs for fault in faults_of(read_json(source, nan=True))]:
        raise ConfigError(f"not fit for benchmarks/results: {'; '.join(refused)}. Commit what is changed, and measure again.")
    for source, target in pairs:
        assert target.resolve().is_relative_to(RESULTS), target
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(read_json(source, nan=True), indent=1) + "\n", encoding="utf-8")
        for table in (source.with_suffix(ending) for ending in (".md", ".txt")):
            if table.is_file():
                shutil.copyfile(table, target.with_suffix(table.suffix))


def certificates() -> str:
    """Those in benchmarks/certificates, an engine a row, as docs/results.md has them."""
    rows = [("certificate, machine, network", "engine", "steps", "p50, p95, p99 ms", "error", ""), ("---", "---", "--:", "--:", "--:", "---")]
    for file in sorted(CERTIFICATES.glob("*.json")):
        found = read_json(file)
        machine = found["machine"]["gpu"] or found["machine"]["processor"]
        for measured in found["measured"]:
            what = f"`{file.stem}`: {machine}, {measured['kind'].upper()} of {measured['parameters'] / 1e6:.1f} M parameters"
            for name, engine in measured["engines"].items():
                error, said = engine["error_joint_units"]["p99"], "pass" if engine["passed"] else "**fail**"
                for steps, times in engine["times_ms"].items():
                    p = ", ".join(f"{times[share]:.1f}" for share in ("p50", "p95", "p99"))
                    rows.append((what, name, steps, p, "NaN" if error is None else f"{error:.2f}", said))
                    what = ""
    return "\n".join(f"|{'|'.join(row)}|" for row in rows)
