"""Flags that several subcommands have, each written once: what is printed, what a run leaves, what limits the motion."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from gr00t_fast.base.errors import ConfigError
from gr00t_fast.base.flags import OUTPUTS, Flags, setting
from gr00t_fast.control.camera_watch import CameraFault
from gr00t_fast.control.limits import SafetyOptions
from gr00t_fast.record.page import BARE, page_address
from gr00t_fast.record.views import WINDOW, display_target

MEAN_SOMETHING_ELSE = ("precision", "seed", "camera_map")  # settings of a run's file, to programs that make or measure engines


@dataclass(kw_only=True)
class OutputFlags(Flags):
    """What is printed."""

    GROUP = OUTPUTS

    json: bool = False  # print the result as one line of JSON on standard output, and the table on standard error
    quiet: bool = False  # print the verdict, warnings and errors only
    verbose: bool = False  # full tracebacks

    def check(self) -> None:
        super().check()
        out = getattr(self, "out", None)  # of most programs
        if out is not None and out.is_file():
            raise ConfigError(f"--out={out} is a file. Expected a directory, existing or not.")

    def tell(self, text: str) -> None:
        """What is being done, on standard error: each part takes seconds to minutes."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)


@dataclass(kw_only=True)
class SafetyFlags(Flags):
    """What limits the motion: SafetyOptions, and what is watched beside it."""

    GROUP = "safety"

    safety: SafetyOptions = field(default_factory=SafetyOptions)
    camera_fault: CameraFault = "warn"  # one that is blank, shows noise, always the same picture, or old ones: warn says it, land ends the run


@dataclass(kw_only=True)
class RunOutputFlags(OutputFlags):
    """What a run leaves."""

    GROUP = OUTPUTS

    out: Path | None = None  # directory for report.html, report.json, report.txt, joints.png, run.npz, run.csv
    overwrite: bool = False  # replace the files of an earlier run in --out, and the file of --video
    video: Path | None = None  # record the cameras to this .mp4 or .gif
    record: str = ""  # write the run as a LeRobotDataset v3: a directory, or user/name in lerobot's cache
    record_append: bool = False  # add the episodes to the data set of --record that is there
    display: str | None = setting(None, bare=WINDOW)  # show the run in rerun: in a window here, at HOST:PORT, or in FILE.rrd; kept with --out

    page: str | None = setting(None, bare=BARE)  # watch, stop and judge the run in a browser: at HOST:PORT, or `open` for one here

    def check(self) -> None:
        super().check()
        page_address(self.page)
        if self.record_append and not self.record:
            raise ConfigError("--record_append needs --record=DIR: the data set to continue.")
        if self.video is not None and self.video.suffix.lower() not in (".mp4", ".gif"):
            raise ConfigError(f"--video={self.video} must end in .mp4 or .gif.")
        display_target(self.display, self.out)
