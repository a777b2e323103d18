"""`gr00t-fast doctor`: what is installed, what can run here, what a checkpoint needs, whether arm and cameras are ready."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from gr00t_fast.cli.main import EXIT_ERROR, EXIT_OK, Command, show
from gr00t_fast.cli.run import RunConfig
from gr00t_fast.cli.shared_flags import OutputFlags
from gr00t_fast.evaluation.doctor import DoctorOptions, look
from gr00t_fast.record.pictures import write_pictures


@dataclass(kw_only=True)
class DoctorConfig(OutputFlags, DoctorOptions):
    """Say what is installed, which engines can run here and which exports are stale, what a checkpoint needs, and whether the arm, its servos, its
    calibration and its cameras are ready for a run.

        gr00t-fast doctor
        gr00t-fast doctor --config_path=configs/so100.yaml --robot.port=/dev/ttyACM0 --model_path=./gr00t-n1.5-so100-finetuned --out=outputs/doctor

    Takes the flags, and the --config_path, of a run. No weights are read, nothing is written to the servos and no torque changes. `warn` is for
    something that a run may suffer from, `fail` for what keeps a run with these flags from succeeding.
    """

    out: Path | None = None  # directory for a picture of each camera, all of them on one sheet (cameras.png), doctor.json and doctor.txt; replaced


def work(config: DoctorConfig) -> int:
    """Run all checks, print them and leave what --out asks for. Raises Gr00tFastError."""
    began_s = time.perf_counter()
    config.tell("looking at packages, engines, checkpoint, servos and cameras: some seconds ...")
    rows, pictures, titles = look(config)
    counts, seconds = Counter(row.state for row in rows), round(time.perf_counter() - began_s, 2)
    result = {"program": "doctor", "ok": not counts["fail"], "seconds": seconds, "rows": [asdict(row) for row in rows]}
    table = "\n".join(f"{row.state:<5} {row.section:<11} {row.what}" + (f"\n{'':<18}-> {row.what_to_do}" if row.what_to_do else "") for row in rows)
    wrong = [row.what for row in rows if row.state == "fail"]
    judged = f"NOT READY: {'; '.join(wrong)}" if wrong else "ready: nothing that these flags need is missing"
    judged += f" ({len(rows)} checks, {counts['warn']} warnings, {seconds:.1f} s)"
    if config.out is not None:
        table += "\n" + write_pictures(pictures, titles, config.out, "doctor.txt", f"{table}\n\n{judged}\n")
        (config.out / "doctor.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    show(result, table + "\n", judged, config)
    return EXIT_ERROR if wrong else EXIT_OK


main = Command(
    DoctorConfig,
    work,
    "usage: gr00t-fast doctor [--model_path=DIR] [--robot.type=... --robot.port=...] [--flag=value ...]",
    "exit codes: 0 nothing that the given flags need is missing or wrong, 1 something is, 2 bad flag",
    file_of=RunConfig,
)
