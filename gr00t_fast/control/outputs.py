"""What a run leaves behind: the report on the terminal, and files where asked for. Everything that could be missing is found out
beforehand."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NoReturn

from gr00t_fast.control.loop import ControlLoop, Observer
from gr00t_fast.control.plots import plot_joints, save_run
from gr00t_fast.control.recorder import LiveView, VideoRecorder
from gr00t_fast.control.report import as_text, build_report, write_report
from gr00t_fast.errors import ConfigError, MissingExtraError
from gr00t_fast.optional import install_command


class Outputs:
    """Onlookers during the run and files after it. Use as a context manager around the run."""

    def __init__(self, out: Path | None, video: Path | None, show_images: bool, fps: float, on_quit: Callable[[], None]) -> None:
        """Raises ConfigError when `out` or `video` cannot be written, MissingExtraError without a needed package: before the arm is touched."""
        self._out = out
        if out is not None:
            _check_writable(out, "--out")
            if importlib.util.find_spec("matplotlib") is None:  # found, not imported: that costs 0.3 s and is not needed yet
                raise MissingExtraError(f"--out draws joints.png with matplotlib, which is not installed: {install_command('plots')}")
        self._video = VideoRecorder(video, fps) if video is not None else None
        if video is not None:
            _check_writable(video.parent, "--video")
            if video.is_dir():
                raise ConfigError(f"--video: '{video}' is a directory. Name a file in a directory that can be written.")
        self._view = LiveView(on_quit=on_quit) if show_images else None
        self._stack = ExitStack()

    @property
    def observers(self) -> list[Observer]:
        return [observer for observer in (self._video, self._view) if observer is not None]

    def __enter__(self) -> Outputs:
        if self._video is not None:
            self._stack.enter_context(self._video)
        if self._view is not None:
            self._stack.callback(self._view.close)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def write(
        self, loop: ControlLoop, settings: Mapping[str, Any], warnings: Sequence[str], failing: bool = False, notes: Sequence[str] = ()
    ) -> None:
        """Print the report, `warnings` and `notes` once more in it, and write the files. Raises ConfigError when the disk refuses; with `failing`,
        when the run's own error is on its way to the user, that is only a warning."""
        try:
            self._write(loop, settings, warnings, notes)
        except Exception as error:
            if not failing:
                raise
            if isinstance(error, BrokenPipeError):
                return  # it is what ended the run, and said as that
            with suppress(OSError):  # whatever it was, it must not take the place of the error that ended the run
                print(f"WARNING: the report of the run could not be written: {error}", file=sys.stderr, flush=True)

    def _write(self, loop: ControlLoop, settings: Mapping[str, Any], warnings: Sequence[str], notes: Sequence[str]) -> None:
        report = build_report(loop, settings, [*warnings, *self._video_warnings()], notes=notes)
        with ExitStack() as told:  # the terminal may be gone (SIGHUP): the files are written all the same, and then that is raised
            try:
                print(_for_terminal(loop, report), end="", flush=True)
            except OSError as error:
                told.callback(_raise, error)
            paths = self._write_files(loop, report)
        if self._video is not None and self._video.error is None and self._video.path.exists():
            paths.append(self._video.path)
        if paths:
            print("wrote " + ", ".join(str(path) for path in paths))

    def _write_files(self, loop: ControlLoop, report: Mapping[str, Any]) -> list[Path]:
        if self._out is None:
            return []
        paths = write_report(report, self._out)
        if len(loop.trace):
            try:
                paths += save_run(loop.trace, self._out)
                paths.append(plot_joints(loop.trace, self._out / "joints.png", loop.robot.joint_unit))
            except OSError as error:
                raise ConfigError(f"--out: cannot write to '{self._out}': {error}. The report itself is there.") from error
        return paths

    def _video_warnings(self) -> list[str]:
        if self._video is None:
            return []
        warnings = [f"the video ended early: {self._video.error}"] if self._video.error else []
        if self._video.dropped_frames:
            warnings.append(f"the video lacks {self._video.dropped_frames} frames: the encoder was slower than the loop.")
        return warnings


def _for_terminal(loop: ControlLoop, report: Mapping[str, Any]) -> str:
    """The report; where nothing was played there is nothing to report but that."""
    if loop.trace.moved or loop.trace.ended_by == "done":
        return "\n" + as_text(report)
    return "The arm was not moved: the run ended before the first target was sent.\n"


def _raise(error: BaseException) -> NoReturn:
    raise error


def _check_writable(directory: Path, flag: str) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".write_probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{flag}: cannot write to '{directory}': {error}. Name a directory that can be written.") from error
