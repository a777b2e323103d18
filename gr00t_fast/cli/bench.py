"""`gr00t-fast bench` and `tune`: which engine is the fastest here, and whether its actions are right."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from gr00t_fast.cli.main import EXIT_ERROR, EXIT_OK, Command, end_on_sigterm, leave_result
from gr00t_fast.cli.run import RunConfig
from gr00t_fast.cli.shared_flags import MEAN_SOMETHING_ELSE, OutputFlags
from gr00t_fast.evaluation.bench import BenchOptions, engine_named, measure, table_rows, verdict
from gr00t_fast.evaluation.certificate import write_certificate


@dataclass(kw_only=True)
class BenchConfig(OutputFlags, BenchOptions):
    """Time get_action of a checkpoint on every engine that can run here, and compare its actions with the plain model's in fp32.

        gr00t-fast bench --model_path=./gr00t-n1.5-so100-finetuned --observations=./my-lerobot-dataset --make

    Engines answer the same observations with the same noise, then take turns at whole calls, camera frame to joint targets; errors are in joint
    units: degrees, and per cent for the gripper, in most. One that cannot be used here gets a line that says why; one that was named ends the
    program. Last come the settings of the fastest within its limit, for the file of your runs, which --config_path reads here too.

    --make (or `gr00t-fast tune`) first makes, from your observations, what engines of this machine need and --exports lacks: minutes per engine.
    """

    out: Path | None = None  # directory for bench.json and bench.md, which are replaced; default: outputs/bench, of tune outputs/tune
    certificate: Path | None = None  # also write what was measured here to this .json, fit to be sent: no paths, no names (docs/gpu.md)


@dataclass(kw_only=True)
class TuneConfig(BenchConfig):
    __doc__ = BenchConfig.__doc__

    make: bool = True  # make the files that engines need and that are not there


def run(config: BenchConfig) -> int:
    """Compare, print, and leave bench.json and bench.md, or tune's. Raises Gr00tFastError."""
    end_on_sigterm()
    for word in config.engines:  # a slip of the keys is found before the minutes of the reference
        engine_named(word)
    name = "tune" if isinstance(config, TuneConfig) else "bench"
    out = config.out or Path("outputs") / name
    out.mkdir(parents=True, exist_ok=True)  # a directory that cannot be made is found out before the minutes
    result = {"program": name, **measure(config, config.tell)}
    judged, settings = verdict(result), result.get("settings")
    if settings is not None:
        judged += "\n" + "\n".join(["for the file of your runs:", *(f"{key}: {json.dumps(value)}" for key, value in settings.items())])
    if config.certificate is not None:
        judged += f"\ncertificate: {'pass' if write_certificate(config.certificate, [result], result) else 'FAIL'}, {config.certificate}"
    leave_result(out, result, "\n".join(table_rows(result)), judged, config)
    return EXIT_ERROR if settings is None else EXIT_OK


main = Command(
    BenchConfig,
    run,
    "usage: gr00t-fast bench --model_path=DIR [--observations=DATASET] [--make] [--flag=value ...]",
    "exit codes: 0 done, 1 no engine keeps its limit on the error, or an error; 2 bad flag, 130 interrupted",
    "interrupted: no result; exports that were finished are kept",
    file_of=RunConfig,
    not_from_file=MEAN_SOMETHING_ELSE,
)
tune = replace(main, flags=TuneConfig, usage="usage: gr00t-fast tune --model_path=DIR --observations=DATASET [--flag=value ...]")
