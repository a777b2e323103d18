"""`--record`: a run's episodes become a LeRobotDataset v3. This end costs the control loop a copy of the pictures and a line in a pipe per tick.

The other end is a process of its own (dataset_writer.py): encoding beside the loop in one interpreter would take its lock at the wrong moment.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from gr00t_fast.contracts import Observation
from gr00t_fast.control import dataset_writer
from gr00t_fast.control.binding import joints_of_parts
from gr00t_fast.control.dataset_writer import SUCCESS, Slots, check_whole, features, tidy_up
from gr00t_fast.errors import ConfigError, MissingExtraError, RecordingError, install_command, require

QUEUE_S = 3.0  # of ticks that may wait for the other process
_QUEUE_BYTES, _LEAST_SLOTS = 512 << 20, 8
_LEAST_FREE_BYTES = 200 << 20  # a few minutes of one camera
_START_S = 120.0  # importing lerobot and torch takes 5 s, on a busy machine with a cold disk ten times that
_SILENT_S = 30.0  # so long may the other process leave everything unanswered; saving an episode takes about 1 s
_END_S = 10.0  # and so long may it take to end
_TELL_AFTER_S = 2.0
_SLOWER = 1.1  # an episode that took so many times what its rows say is told


def dataset_directory(name: str) -> Path:
    """Where a data set called `name` lies: lerobot's place for `user/name`, unless there is a directory `user` here; else a path."""
    path = Path(name).expanduser()
    parts = name.split("/")
    if len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~") and not Path(parts[0]).is_dir():
        cache = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
        return Path(os.environ.get("HF_LEROBOT_HOME") or cache / "lerobot").expanduser() / name
    return path


def modality_of(
    state_widths: Mapping[str, int], action_widths: Mapping[str, int], joint_names: tuple[str, ...], camera_map: Mapping[str, str]
) -> dict[str, Any] | None:
    """`meta/modality.json`, by which programs of NVIDIA and of this project find a policy's parts and cameras. `camera_map` {robot: policy}. None
    when a part's joints are not next to each other."""
    told: dict[str, Any] = {}
    for kind, widths in (("state", state_widths), ("action", action_widths)):
        told[kind] = {}
        for part, joints in joints_of_parts(widths, joint_names, kind).items():
            if joints != list(range(joints[0], joints[0] + len(joints))):
                return None
            told[kind][part] = {"start": joints[0], "end": joints[-1] + 1}
    told["video"] = {policy: {"original_key": f"observation.images.{robot}"} for robot, policy in camera_map.items()}
    told["annotation"] = {"human.task_description": {"original_key": "task_index"}}
    return told


class DatasetRecorder:
    """Writes episodes into the data set `out`. Use as a context manager around the run; all methods belong to the loop's thread.

    `begin`, `add` at each tick, `end`, then `save` or `discard`; an episode that was ended and not decided is saved. None of these waits: `busy` is
    true while an episode is being saved. `failure` says why nothing more is recorded, if that happened; `echo` has told it.
    """

    def __init__(self, out: Path, append: bool, joint_names: tuple[str, ...], echo: Callable[[str], None] = print) -> None:
        """Raises ConfigError for a place that cannot be written, that holds something else, or a data set that is not continued with `append`;
        MissingExtraError without lerobot."""
        require("lerobot", "robot")
        if importlib.util.find_spec("datasets") is None:  # with lerobot 0.6 an extra of its own
            raise MissingExtraError(f"--record writes with lerobot's own writer, which needs its data set packages: {install_command('robot')}")
        self.out, self._append, self._joints, self._echo = out.absolute(), append, joint_names, echo
        self._fps = 0.0
        self._check_place()
        self.failure: str | None = None
        self.lost_ticks = self._lost_before = 0  # in all episodes; in those before the present one
        self.episodes: list[int] = []  # numbers of those saved
        self._process: subprocess.Popen[bytes] | None = None
        self._memory: IO[bytes] | None = None
        self._said: IO[bytes] | None = None  # the other end's stderr
        self._slots: Slots | None = None
        self._sizes: dict[str, tuple[int, ...]] = {}
        self._free: list[int] = []
        self._unsent, self._unread = bytearray(), b""
        self._state = "idle"  # idle, recording, ended
        self._deciding = 0  # episodes sent to be saved or dropped that were not confirmed yet
        self._ready = self._opened = self._gone = False
        self._heard_s = 0.0  # when the other process last answered, or owed no answer
        self._ticks_s: tuple[float, float] | None = None  # when the episode's first and latest tick were seen

    def _check_place(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"--record={self.out} is a file. Name a directory that is not there yet.")
        there = self.out.is_dir() and any(self.out.iterdir())
        if there and not self._append:
            raise ConfigError(f"--record={self.out} exists already. Name another one, or add --record_append=true to continue that data set.")
        if there and not (self.out / "meta" / "info.json").is_file():
            raise ConfigError(f"--record={self.out} holds files but no LeRobotDataset (no meta/info.json). Name another directory.")
        if rescued := tidy_up(self.out):
            self._echo(f"{self.out}: {rescued} episode(s) of an interrupted recording were completed.")
        if there:
            try:
                check_whole(self.out)
            except Exception as error:  # whatever is wrong with its files, no row may be added to them
                why = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                raise ConfigError(f"--record_append: {self.out} is damaged and was left as it is: {why}. Record into another directory.") from error
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.out.parent):
                pass
            free = shutil.disk_usage(self.out.parent).free
        except OSError as error:
            raise ConfigError(f"--record: cannot write to '{self.out.parent}': {error}. Name a place that can be written.") from error
        if free < _LEAST_FREE_BYTES:
            raise ConfigError(
                f"--record: the disk of '{self.out.parent}' has {free >> 20} MB left, less than {_LEAST_FREE_BYTES >> 20}. Free some space."
            )

    def set_rate(self, fps: float) -> None:
        """Ticks a second of the run. Raises ConfigError where the data set cannot have that rate."""
        if not float(fps).is_integer():
            raise ConfigError(f"--record: a LeRobotDataset has a whole number of frames a second, the run {fps:g}. Give --fps={round(fps)}.")
        self._fps = fps
        if self._continues:
            self._check_continued(self._info())

    @property
    def _continues(self) -> bool:
        return (self.out / "meta" / "info.json").is_file()

    def _info(self) -> dict[str, Any]:
        try:
            return json.loads((self.out / "meta" / "info.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"--record_append: {self.out}/meta/info.json cannot be read: {error}. Record into another directory.") from error

    def _check_continued(self, info: Mapping[str, Any], cameras: Mapping[str, tuple[int, int]] | None = None) -> None:
        """Raises ConfigError where rows of this run would be of another kind than those that are there."""
        version, here = str(info.get("codebase_version")), info.get("features", {})
        wanted = features(self._joints, cameras or {})
        differences = []
        if not version.startswith("v3"):
            differences.append(f"it has version {version}, v3 is written")
        if info.get("fps") != self._fps:
            differences.append(f"it has {info.get('fps')} frames a second, this run {self._fps:g}")
        for name, column in wanted.items():
            there = here.get(name, {})
            if list(there.get("shape", [])) != list(column["shape"]) or (column["dtype"] == "float32" and there.get("names") != column["names"]):
                differences.append(f"its {name} is {_described(there)}, this run's is {_described(column)}")
        if cameras is not None:
            known = {*wanted, SUCCESS, "timestamp", "frame_index", "episode_index", "index", "task_index"}
            differences += [f"it has {name}, this run has not" for name in here if name not in known]
        if differences:
            raise ConfigError(f"--record_append: {self.out} cannot be continued: {'; '.join(differences)}. Record into another directory.")

    # The other process

    @property
    def process(self) -> int | None:
        """Its number, while it may be running."""
        return None if self._process is None else self._process.pid

    def __enter__(self) -> DatasetRecorder:
        """Starts it; `open` waits until it is ready."""
        self._memory = _shared_memory()
        self._said = tempfile.TemporaryFile()
        package = str(Path(__file__).parents[2])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])}
        descriptor = self._memory.fileno()
        # a session of its own: what is typed in the terminal, and signals to the program's group, are not for it
        self._process = subprocess.Popen(
            [sys.executable, "-m", dataset_writer.__name__, str(self.out), str(descriptor)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            bufsize=0,
            pass_fds=(descriptor,),
            start_new_session=True,
            env=environment,
        )
        os.set_blocking(self._process.stdin.fileno(), False)
        os.set_blocking(self._process.stdout.fileno(), False)
        return self

    def wait_until_ready(self) -> None:
        """Raises RecordingError when the other process does not start."""
        self._wait(lambda: self._ready, _START_S, "the recording process did not start")

    def open(self, observation: Observation, robot_type: str, joint_unit: str, modality: Mapping[str, Any] | None, facts: Mapping[str, Any]) -> None:
        """Fixes the columns by the first observation. `facts` go into meta/rollouts.json with each episode. Raises
        ConfigError when the data set to continue has other columns, RecordingError when the other process does not answer."""
        cameras = {name: frame.shape[:2] for name, frame in observation.frames.items()}
        if self._continues:
            self._check_continued(self._info(), cameras)
        self._sizes = {name: frame.shape for name, frame in observation.frames.items()}
        bytes_per_tick = sum(frame.nbytes for frame in observation.frames.values())
        count = max(_LEAST_SLOTS, min(round(QUEUE_S * self._fps), _QUEUE_BYTES // max(1, bytes_per_tick)))
        os.ftruncate(self._memory.fileno(), max(1, count * bytes_per_tick))
        self._slots = Slots(self._memory.fileno(), cameras, count)
        self._free = list(range(count))
        self._send(
            do="open",
            fps=int(self._fps),
            joints=list(self._joints),
            joint_unit=joint_unit,
            robot_type=robot_type,
            cameras=cameras,
            slots=count,
            modality=modality,
            facts=dict(facts),
        )
        self._wait(lambda: self._opened, _START_S, "the recording process did not answer")

    def _wait(self, done: Callable[[], bool], limit_s: float, what: str) -> None:
        """Raises RecordingError when it is not done in time, or never will be."""
        end_s = time.monotonic() + limit_s
        while not done():
            self._exchange()
            if self.failure is not None:
                raise RecordingError(self.failure)
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                raise RecordingError(f"{what} within {limit_s:.0f} s: {self._last_words() or 'it says nothing'}. Try again, or run without --record.")
            select.select([self._process.stdout], [self._process.stdin] if self._unsent else [], [], min(left_s, 0.1))

    # Episodes

    @property
    def busy(self) -> bool:
        """Whether an episode is being saved. Takes note of what the other process has said."""
        self._exchange()
        return self._deciding > 0 and not self._gone

    def begin(self, task: str) -> None:
        """An episode of the instruction `task` begins."""
        if self.failure is not None:
            return
        self._lost_before = self.lost_ticks
        self._send(do="begin", task=task)
        self._state, self._ticks_s = "recording", None

    def add(self, observation: Observation, commanded: np.ndarray) -> None:
        """A tick: what was seen, and what was sent (J,) then. Ticks for which there is no room are left out and counted."""
        if self._state != "recording" or self.failure is not None:
            return
        self._exchange()
        for name, size in self._sizes.items():
            frame = observation.frames.get(name)
            if frame is None or frame.shape != size:
                got = "nothing" if frame is None else f"{frame.shape[1]}x{frame.shape[0]}"
                self._stop(f"camera '{name}' delivers {got}, the recording has {size[1]}x{size[0]}. Set its width and height, and record again.")
                return
        self._ticks_s = (self._ticks_s[0] if self._ticks_s else observation.time_s, observation.time_s)
        if not self._free:
            self.lost_ticks += 1
            return
        slot = self._free.pop()
        for name, view in self._slots.pictures[slot].items():
            np.copyto(view, observation.frames[name])
        self._send(do="row", slot=slot, values=[*observation.joints.tolist(), *np.asarray(commanded, np.float64).tolist()])

    def end(self, **outcome: Any) -> None:
        """The episode's last tick has been. `outcome`: JSON-ready facts, `success` (True, False or None) among them."""
        if self._state == "recording":
            self._send(do="end", **outcome, **self._figures())
            self._state = "ended"

    def save(self, **outcome: Any) -> None:
        """The ended episode is to be part of the data set, with this outcome."""
        self._decide(do="save", **outcome, **self._figures())

    def _figures(self) -> dict[str, Any]:
        first_s, last_s = self._ticks_s or (0.0, 0.0)
        return {"lost_ticks": self.lost_ticks - self._lost_before, "duration_s": round(last_s - first_s, 3)}

    def discard(self) -> None:
        """The ended episode is to be forgotten."""
        self._decide(do="discard")

    def _decide(self, **command: Any) -> None:
        if self._state == "idle":
            return
        self._state = "idle"
        self._deciding += 1
        if (lost := self.lost_ticks - self._lost_before) > 0:
            self._echo(f"WARNING: the recording of this episode lacks {lost} ticks: encoder or disk are slower than the loop.")
        self._send(**command)

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits until what was ended is saved, and says so. May be called again. `failure` says what went wrong."""
        if self._process is None or self._process.stdin.closed:
            return
        if not self._opened:  # nothing was recorded
            self._process.kill()
            self._gone = True
        if self._state != "idle":
            self.save(success=None, ended_by="error")
        began_s, told = time.monotonic(), False
        try:
            while self.busy:
                if not told and time.monotonic() - began_s > _TELL_AFTER_S:
                    told = True
                    self._echo("saving the last episode ...")
                select.select([self._process.stdout], [self._process.stdin] if self._unsent else [], [], 0.1)
        finally:
            self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                try:
                    self._process.wait(_END_S)
                finally:  # one that does not end, or Ctrl-C: it is not left behind
                    self._process.kill()
            self._process.stdout.close()
        if self._opened:
            self._echo(f"{len(self.episodes)} episode(s) recorded into {self.out}")

    @property
    def warnings(self) -> list[str]:
        """For the report."""
        lost = [f"the recording lacks {self.lost_ticks} ticks: encoder or disk were slower than the loop."] if self.lost_ticks else []
        return [*lost, *([self.failure] if self.failure else [])]

    # The pipe

    def _send(self, **command: Any) -> None:
        self._unsent += json.dumps(command).encode() + b"\n"
        self._exchange()

    def _exchange(self) -> None:
        """Pass on what waits, and take what has come; never waits."""
        if self._process is None or self._gone:
            return
        try:
            if self._unsent:
                del self._unsent[: os.write(self._process.stdin.fileno(), self._unsent[: 1 << 16])]
        except BlockingIOError:
            pass
        except OSError:  # gone: why, it has said on its other pipe
            self._unsent.clear()
        if not self._deciding and (self._slots is None or len(self._free) == len(self._slots.pictures)):
            self._heard_s = time.monotonic()
        try:
            while said := os.read(self._process.stdout.fileno(), 1 << 16):
                self._heard_s = time.monotonic()
                *lines, self._unread = (self._unread + said).split(b"\n")
                for line in lines:
                    self._take(json.loads(line))
                if self._gone:
                    return
        except BlockingIOError:
            if time.monotonic() - self._heard_s > _SILENT_S:
                self._process.kill()
                why = f"has not answered for {_SILENT_S:.0f} s (a network directory that is gone, a disk that hangs?) and was ended"
                self._fail(f"the recording process {why}: the last episode is lost. Episodes saved before are whole.")
            return
        self._fail(f"the recording process has ended: {self._last_words() or 'it was killed'}. Episodes saved before are whole.")

    def _take(self, answer: Mapping[str, Any]) -> None:
        if "free" in answer:
            self._free.append(answer["free"])
        elif "ready" in answer:
            self._ready = True
        elif "opened" in answer:
            self._opened = True
        elif "saved" in answer:
            self._deciding -= 1
            if answer["saved"] is not None:
                self.episodes.append(answer["saved"])
                rows_s, lasted_s = (answer["frames"] - 1) / self._fps, answer["duration_s"]
                slow = f": {rows_s:.1f} s at {self._fps:g} frames a second; it lasted {lasted_s:.1f} s, with ticks missed or inferences waited for"
                self._echo(
                    f"episode {answer['saved']} recorded: {answer['frames']} frames{slow if lasted_s > _SLOWER * rows_s + 1 / self._fps else ''}"
                )
        else:
            self._fail(_explained(str(answer["error"]), self.out))

    def _stop(self, why: str) -> None:
        """What was recorded of this episode is kept, and nothing after it."""
        self.save(success=None, ended_by=why)
        self._tell_failure(why)

    def _fail(self, why: str) -> None:
        self._gone = True
        self._tell_failure(why)

    def _tell_failure(self, why: str) -> None:
        self.failure = f"the recording has ended: {why}"
        self._echo(f"WARNING: {self.failure}")

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = [line for line in self._said.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else ""


def _explained(error: str, out: Path) -> str:
    if any(sign in error for sign in ("No space left", "Errno 28", "Disk quota", "File too large")):
        return f"the disk of {out.parent} is full ({error}). Free some space. Episodes saved before are whole."
    return f"{error}. Episodes saved before are whole."


def _described(column: Mapping[str, Any]) -> str:
    return " x ".join(map(str, column["shape"])) if column.get("shape") else "missing"


def _shared_memory() -> IO[bytes]:
    """Without a name, so that nothing is left behind by a program that is killed."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("gr00t_fast-recording"), "rb+", buffering=0)
    return tempfile.TemporaryFile(buffering=0)
