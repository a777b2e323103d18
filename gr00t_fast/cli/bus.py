"""`gr00t-fast bus`: a servo bus on a pseudo-terminal that any lerobot program can open."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import shlex
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gr00t_fast.base.contracts import SO100_JOINTS
from gr00t_fast.base.errors import ConfigError, check_ranges
from gr00t_fast.base.flags import Flags, setting
from gr00t_fast.cli.main import EXIT_ERROR, EXIT_OK, Command
from gr00t_fast.robots.calibration import Calibration, default_calibration, load_calibration, save_calibration
from gr00t_fast.virtual.bus import faults as fault_kinds
from gr00t_fast.virtual.bus.bus import ControlSocket, VirtualBus, send_command
from gr00t_fast.virtual.bus.faults import Fault

_CHECKPOINT = "outputs/checkpoint-demo"  # where the printed commands write one with random weights


@dataclass(kw_only=True)
class BusConfig(Flags):
    """Six virtual STS3215 servos of an SO-100 on a pseudo-terminal that any lerobot program can open. Runs until Ctrl-C or SIGTERM."""

    link: Path | None = None  # where to put the port (a symbolic link, removed at exit); required without --send
    calibration: Path | None = None  # lerobot calibration file (.json) the servos are preloaded from
    write_calibration: Path | None = None  # write DIR/ID.json with the servos' calibration into this directory
    id: str = "virtual"  # name of the written calibration file
    scene: Literal["place", "reach"] | None = setting(None, bare="place")  # let the servos move the simulated arm; without a value: place
    fault: list[str] = setting(default_factory=list, whole_words=True)  # a fault from the start; may be repeated (see below)
    usb_latency_ms: float = 0.0  # delay of every answer (an FTDI adapter: 1 to 16)
    wire_time: bool = False  # answers also take their time at 1 Mb/s and the servos' return delay
    servos: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5, 6])  # which servos are attached
    seed: int = 0  # of the faults `loss` and `flip`, and of the scene
    control: Path | None = None  # control socket; default: LINK.ctl
    send: str | None = None  # send a command to the bus at --control and exit (try 'state' or 'inject silent:servo=3')
    verbose: bool = False  # full tracebacks

    def check(self) -> None:
        """Raises ConfigError; fills in where the control socket is."""
        super().check()
        if self.link is None and (self.send is None or self.control is None):
            raise ConfigError("--link=PATH is missing (with --send: --link or --control of the running bus).")
        check_ranges(self, usb_latency_ms=(0.0, math.inf), servos=(1, len(SO100_JOINTS)))
        if self.control is None and self.link is not None:
            self.control = self.link.with_name(self.link.name + ".ctl")


def work(config: BusConfig) -> int:
    """Serve, or send one command. Raises Gr00tFastError."""
    if config.send is None:
        return serve(config)
    answer = send_command(config.control, config.send)  # type: ignore[arg-type]
    print(json.dumps(answer.get("ok", answer), indent=2))
    return EXIT_ERROR if "error" in answer else EXIT_OK


def prepare_calibration(config: BusConfig) -> tuple[Calibration, Path | None]:
    """The servos' calibration and, when there is one, the file that holds it."""
    calibration = load_calibration(config.calibration) if config.calibration else default_calibration()
    if config.write_calibration is None:
        return calibration, config.calibration
    path = config.write_calibration / f"{config.id}.json"
    try:
        save_calibration(calibration, path)
    except OSError as error:
        raise ConfigError(f"the calibration file {path} cannot be written: {error.strerror}.") from error
    return calibration, path


def describe(config: BusConfig, bus: VirtualBus, calibration_file: Path | None) -> str:
    """What to type next: commands that work as they are printed."""
    lines = [f"Virtual servo bus: STS3215 {', '.join(map(str, config.servos))} on {bus.port} -> {bus.device}"]
    flags = f"--robot.type=so100_follower --robot.port={shlex.quote(bus.port)}"
    if calibration_file is None:
        lines += [f"  {flags}", "  (no program can use it without a calibration file: start it with --write_calibration=DIR to get a matching one)"]
    else:
        directory = shlex.quote(str(calibration_file.resolve().parent))
        flags += f" --robot.calibration_dir={directory} --robot.id={shlex.quote(calibration_file.stem)}"
        lines += _a_run(flags, config.scene)
    load = f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    lines.append(f"A busy machine delays answers, and lerobot 0.4 gives up after 50 ms: keep it idle. Its load now: {load}.")
    lines += ["what the servos do:", f"  gr00t-fast bus --control {shlex.quote(str(config.control))} --send state"]
    return "\n".join(lines)


def _a_run(flags: str, scene: str | None) -> list[str]:
    """Without a scene the servos come up in the middle of their ranges, not where the imagined recordings began: hence --preflight=warn."""
    if scene == "reach":
        flags += ' --robot.cameras="{front: {type: sim}}" --home="[0, -20, 20, 75, -90, 10]" --episodes=1'
        return ["a run on it, with the network of the demo and a rendered camera:", f"  gr00t-fast demo {flags}"]
    flags += "" if scene else " --preflight=warn"
    return [
        "a run on it, with random weights and a rendered camera (the first command once):",
        f"  gr00t-fast random-checkpoint --size=demo --overwrite --out={_CHECKPOINT}",
        f'  gr00t-fast run {flags} --robot.cameras="{{webcam: {{type: sim}}}}" --model_path={_CHECKPOINT} '
        '--lang_instruction="Place the block in the bowl" --timeout=10',
    ]


@contextlib.contextmanager
def coming_first() -> Iterator[None]:
    """Inside, this thread and those that it starts run before other programs, as far as that is permitted, and garbage is not collected by itself."""
    usual = (os.sched_getscheduler(0), os.sched_getparam(0)) if hasattr(os, "sched_getscheduler") else None  # macOS has no such call
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    gc.freeze()
    gc.disable()  # it holds up an answer; `serve` collects while nobody asks
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
        if usual is not None:
            os.sched_setscheduler(0, *usual)


def serve(config: BusConfig) -> int:
    """Run the bus until a signal or `quit`. Returns the exit code."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _signal, _frame: stop.set())
    calibration, calibration_file = prepare_calibration(config)
    plant = None
    if config.scene is not None:
        from gr00t_fast.virtual.sim.simulation import ScenePlant

        plant = ScenePlant(config.scene, config.seed)
    bus = VirtualBus(
        calibration,
        plant,
        map(Fault.parse, config.fault),
        link=Path(os.path.abspath(config.link)),  # type: ignore[arg-type]
        usb_latency_ms=config.usb_latency_ms,
        wire_time=config.wire_time,
        servo_ids=config.servos,
        seed=config.seed,
    )
    with coming_first(), bus, contextlib.closing(ControlSocket(bus, config.control, stop.set)):  # type: ignore[arg-type]
        print(describe(config, bus, calibration_file), flush=True)
        seen = 0
        while not stop.wait(0.2) and bus.failure is None:
            if seen == bus.requests:
                gc.collect()
            seen = bus.requests
    return 0


main = Command(
    BusConfig,
    work,
    "usage: gr00t-fast bus --link=PATH [--write_calibration=DIR] [--scene] [--fault=SPEC ...] [--flag=value ...]",
    fault_kinds.__doc__ or "",
)
