"""`python -m gr00t_fast.robots.feetech_bus --link PATH`: a servo bus on a pseudo-terminal that any lerobot program can open."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

from gr00t_fast.errors import ConfigError, Gr00tFastError
from gr00t_fast.robots.feetech_bus import faults as fault_kinds
from gr00t_fast.robots.feetech_bus.bus import VirtualBus
from gr00t_fast.robots.feetech_bus.control import ControlSocket, send_command
from gr00t_fast.robots.feetech_bus.faults import Fault
from gr00t_fast.robots.feetech_bus.servo import Calibration, Plant, default_calibration, load_calibration, save_calibration

_CHECKPOINT = "outputs/demo/checkpoint"  # that of `make demo`


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m gr00t_fast.robots.feetech_bus",
        description="Six virtual STS3215 servos of an SO-100 on a pseudo-terminal. Runs until Ctrl-C or SIGTERM.",
        epilog=fault_kinds.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--link", type=Path, metavar="PATH", help="where to put the port (a symbolic link, removed at exit)")
    parser.add_argument("--calibration", type=Path, metavar="FILE.json", help="lerobot calibration file the servos are preloaded from")
    parser.add_argument("--write_calibration", type=Path, metavar="DIR", help="write DIR/ID.json with the servos' calibration")
    parser.add_argument("--id", default="virtual", help="name of the written calibration file (default: %(default)s)")
    parser.add_argument("--scene", nargs="?", const="place", choices=("place", "reach"), help="let the servos move the simulated arm")
    parser.add_argument("--fault", action="append", default=[], metavar="SPEC", help="a fault from the start; may be repeated (see below)")
    parser.add_argument("--noise", action="append", default=[], metavar="loss=R|flip=R", help="share of answered bytes lost or flipped")
    parser.add_argument("--usb_latency_ms", type=float, default=0.0, metavar="MS", help="delay of every answer (an FTDI adapter: 1 to 16)")
    parser.add_argument("--wire_time", action="store_true", help="answers also take their time at 1 Mb/s and the servos' return delay")
    parser.add_argument("--servos", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6], metavar="N", help="which servos are attached")
    parser.add_argument("--seed", type=int, default=0, help="of the noise and of the scene")
    parser.add_argument("--control", type=Path, metavar="PATH", help="control socket (default: LINK.ctl)")
    parser.add_argument("--send", metavar="COMMAND", help="send a command to the bus at --control and exit (try 'state' or 'inject silent:servo=3')")
    args = parser.parse_args(argv)
    if args.link is None and (args.send is None or args.control is None):
        parser.error("--link PATH is required (with --send: --link or --control of the running bus)")
    if args.usb_latency_ms < 0:
        parser.error(f"--usb_latency_ms must not be negative, got {args.usb_latency_ms}")
    args.control = args.control or args.link.with_name(args.link.name + ".ctl")
    return args


def noise_faults(specs: list[str]) -> list[Fault]:
    """`loss=0.002` -> a fault on every answered byte. Raises ConfigError."""
    faults = []
    for spec in specs:
        kind, _, rate = spec.partition("=")
        if kind not in ("loss", "flip"):
            raise ConfigError(f"--noise takes loss=RATE or flip=RATE, got '{spec}'.")
        faults.append(Fault.parse(f"{kind}:rate={rate}"))
    return faults


def make_plant(task: str | None, seed: int) -> Plant | None:
    """The MuJoCo scene behind the servos, or None. MuJoCo is imported only here."""
    if task is None:
        return None
    from gr00t_fast.robots.so100_sim.plant import ScenePlant

    return ScenePlant(task=task, seed=seed)


def prepare_calibration(args: argparse.Namespace) -> tuple[Calibration, Path | None]:
    """The servos' calibration and, when there is one, the file that holds it."""
    calibration = load_calibration(args.calibration) if args.calibration else default_calibration()
    if args.write_calibration is None:
        return calibration, args.calibration
    path = args.write_calibration / f"{args.id}.json"
    try:
        save_calibration(calibration, path)
    except OSError as error:
        raise ConfigError(f"the calibration file {path} cannot be written: {error.strerror}.") from error
    return calibration, path


def describe(args: argparse.Namespace, bus: VirtualBus, calibration_file: Path | None) -> str:
    """What to type next: commands that work as they are printed."""
    lines = [f"Virtual servo bus: STS3215 {', '.join(map(str, args.servos))} on {bus.port} -> {bus.device}"]
    flags = f"--robot.type=so100_follower --robot.port={shlex.quote(bus.port)}"
    if calibration_file is None:
        lines += [f"  {flags}", "  (no program can use it without a calibration file: start it with --write_calibration=DIR to get a matching one)"]
    else:
        directory = shlex.quote(str(calibration_file.resolve().parent))
        flags += f" --robot.calibration_dir={directory} --robot.id={shlex.quote(calibration_file.stem)}"
        lines.append("a run on it, with random weights and a rendered camera (the first command once):")
        lines += [f"  {line}" for line in _a_run(flags, args.scene is not None)]
    lines += ["what the servos do:", f"  python -m gr00t_fast.robots.feetech_bus --control {shlex.quote(str(args.control))} --send state"]
    return "\n".join(lines)


def _a_run(flags: str, scene: bool) -> list[str]:
    """Without a scene the servos come up in the middle of their ranges, not where the imagined recordings began: hence --preflight=warn."""
    flags += "" if scene else " --preflight=warn"
    return [
        f"python -m gr00t_fast.random_checkpoint --size=demo --overwrite --out={_CHECKPOINT}",
        f'python so100_inference_optimized.py {flags} --robot.cameras="{{webcam: {{type: sim}}}}" --model_path={_CHECKPOINT} '
        '--lang_instruction="Place the block in the bowl" --timeout=10',
    ]


def serve(args: argparse.Namespace) -> int:
    """Run the bus until a signal or `quit`. Returns the exit code."""
    stop = threading.Event()

    def end(_signal: int, _frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    calibration, calibration_file = prepare_calibration(args)
    bus = VirtualBus(
        calibration,
        make_plant(args.scene, args.seed),
        [*map(Fault.parse, args.fault), *noise_faults(args.noise)],
        link=Path(os.path.abspath(args.link)),
        usb_latency_ms=args.usb_latency_ms,
        wire_time=args.wire_time,
        servo_ids=args.servos,
        seed=args.seed,
    )
    with bus:
        control = ControlSocket(bus, args.control, stop.set)
        try:
            print(describe(args, bus, calibration_file), flush=True)
            while not stop.wait(0.2) and bus.failure is None:
                pass
        finally:
            control.close()
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point; expected errors become one line and exit code 1."""
    args = parse_args(argv)
    try:
        if args.send is None:
            return serve(args)
        answer = send_command(args.control, args.send)
    except Gr00tFastError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(answer.get("ok", answer), indent=2))
    return 1 if "error" in answer else 0


if __name__ == "__main__":
    sys.exit(main())
