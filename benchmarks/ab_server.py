"""How much faster than a policy server, and why: one factor at a time, from camera frame to joint targets.

    python benchmarks/ab_server.py                                          # random demo weights, made in --out; a few minutes on two cores
    python benchmarks/ab_server.py --model_path=DIR --factors transport steps
    python benchmarks/ab_server.py --server=tcp://127.0.0.1:5555            # times a GR00T N1.5 inference service that runs there

Factors: transport (in process, ipc, tcp; the server is `python -m gr00t_fast.serving` in another process), pre-processing (the reference's CPU
path, reference_policy.py, or ours), engine (the reference's modules, second_reference.py, or ours), denoising steps, and warm-up (a process's
first calls). In every round each arm is timed once, in random order, with the same observation and noise; only one computes at a time. Arms
that differ in transport alone must give the same bits, or the run ends with an error. Differences are paired by round. The last line is JSON.
At full size, where weights fit no cache, say --settle=0 and leave ipc out, which would be one more server with 4 GB of weights.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np

from benchmarks import ab_remote, ab_report
from benchmarks.ab_arms import FACTORS, NONE, OURS, TRANSPORTS, Arm, Levels, Plan, Protocol, Setup, make_plan, measure, targets_of
from benchmarks.ab_checks import action_limits, check_memory, pixel_levels_apart
from benchmarks.ab_host import REFERENCE, Policies, example_inputs, makes_pixels
from benchmarks.ab_processes import (
    Addresses,
    ColdStart,
    ServerProcess,
    cold_start_in_process,
    cold_start_of_server,
    running,
    thread_variables,
)
from benchmarks.program import provenance
from gr00t_fast.errors import ConfigError, Gr00tFastError, MissingExtraError, ServerUnreachableError

_OBSERVATIONS = 16  # different ones, taken in turn
_PATIENCE_S = 600.0  # for a server to load its weights


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    os.environ.update(thread_variables(arguments.threads))  # before torch is imported
    before = signal.signal(signal.SIGTERM, _interrupt)  # so that the servers are ended, too
    try:
        result = ab_remote.run(arguments) if arguments.server else run(arguments)
    except Gr00tFastError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: no result", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    result |= provenance(arguments.seed)
    _write(result, ab_remote if arguments.server else ab_report, arguments.out)
    print(json.dumps(result))
    return 0


def _write(result: dict[str, Any], report: Any, out: Path) -> None:
    text = report.as_markdown(result)
    (out / "ab_server.md").write_text(text + "\n")
    (out / "ab_server.json").write_text(json.dumps(result, indent=2) + "\n")
    try:
        report.plot(result, out / "ab_server.png")
    except MissingExtraError as error:  # the figures are what counts
        print(f"no plot: {error}", file=sys.stderr)
    print(text)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load, time cold starts, start the servers, call in turn, and end the servers. Raises Gr00tFastError."""
    import torch

    began_s, load = time.monotonic(), os.getloadavg()[0]
    deadline_s = began_s + 60 * arguments.max_minutes
    torch.set_num_threads(arguments.threads)
    arguments.model_path = arguments.model_path or random_checkpoint(arguments)
    policies = Policies(arguments.model_path, _policy_options(arguments))
    ours = policies.ours
    steps = arguments.denoising_steps or ours.denoising_steps
    engines, left_out = _other_engines(policies, arguments)
    plain = "eager" if makes_pixels(ours.engine) else ours.engine.name
    plan = make_plan(arguments.factors, Levels(arguments.transports, ours.engine.name, plain, engines, steps, arguments.steps))
    check_memory(plan, policies)
    inputs = _inputs(policies, arguments)
    levels_apart = pixel_levels_apart(policies, inputs[0]) if "preprocessing" in arguments.factors else None
    arms = {setup: _in_process(policies, setup) for setup in plan.setups if setup.transport == NONE}
    with Addresses() as addresses:
        cold = _cold_starts(plan, addresses, inputs, arguments, deadline_s)
        servers = {setup: _server(setup, addresses, arguments) for setup in plan.setups if setup.transport != NONE}
        probes = _probes(ours, addresses, inputs[0], arguments) if "transport" in arguments.factors else {}
        with running([*servers.values(), *probes.values()], _PATIENCE_S):
            arms |= {setup: _remote(server, ours) for setup, server in servers.items()}
            arms |= {("transport alone", name): _remote(server, ours) for name, server in probes.items()}
            arms |= {("ping", name): _ping(server) for name, server in probes.items()}
            protocol = Protocol(arguments.calls, arguments.warm_up, arguments.settle, deadline_s, arguments.seed)
            measured = measure(arms, inputs, protocol, action_limits(plan, ours))
    ab_report.write_samples(measured, arguments.out / "ab_server_samples.csv")
    regime = _regime(arguments, ours, steps, inputs) | {"stopped_early": measured.stopped_early}
    commands = {setup: server.command for setup, server in servers.items()}
    result = ab_report.evaluate(plan, measured, cold, commands)
    result["agreement"]["pixel_levels_apart"] = levels_apart
    regime["load_average_at_start"] = round(load, 2)
    return regime | result | {"left_out": left_out, "floor_ms": _floor_ms(ours, steps), "minutes": round((time.monotonic() - began_s) / 60, 2)}


# --- what runs where ---------------------------------------------------------------------------------------------------------------------


def _policy_options(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("embodiment_tag", "data_config", "device", "precision", "processor_path", "engine", "seed")
    return {name: getattr(arguments, name) for name in names}


def _other_engines(policies: Policies, arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Names of further engines that run here, and why others do not. One that was asked for by name must."""
    from gr00t_fast.engine import ENGINES, EXPORTED

    if "engine" not in arguments.factors:
        return [], []
    policies.policy(OURS, REFERENCE, 1)  # now, so that what is missing is said before anything takes long
    exports = policies.model_path / "exports"
    possible = arguments.engines if arguments.engines is not None else [*ENGINES, *(name for name in EXPORTED if (exports / name).is_dir())]
    usable, left_out = [], []
    for name in possible:
        try:
            policies.policy(OURS, name, 1)
            usable.append(name)
        except Gr00tFastError as error:
            if arguments.engines is not None:
                raise
            left_out.append(f"engine {name}: {error}")
    return usable, left_out


def _in_process(policies: Policies, setup: Setup) -> Arm:
    policy = policies.policy(setup.preprocessing, setup.engine, setup.steps)
    keys = policy.get_modality_config()["action"].modality_keys
    return Arm(lambda observation, noise: targets_of(policy.get_action(observation, noise), keys), lambda: getattr(policy, "last_timing", {}))


def _remote(server: ServerProcess, ours: Any) -> Arm:
    keys = ours.get_modality_config()["action"].modality_keys
    return Arm(lambda observation, noise: targets_of(server.client.get_action(observation, noise), keys), lambda: server.client.last_timing)


def _ping(server: ServerProcess) -> Arm:
    def call(observation: dict[str, Any], noise: np.ndarray) -> np.ndarray:
        if not server.client.ping():
            raise ServerUnreachableError(f"the server at {server.address} stopped answering. Its output: {server.log}")
        return np.empty(0)

    return Arm(call)


def _server(setup: Setup, addresses: Addresses, arguments: argparse.Namespace) -> ServerProcess:
    address = addresses.new(setup.transport)
    flags = [*_flags(arguments), f"--engine={setup.engine}", f"--denoising_steps={setup.steps}", f"--address={address}"]
    if setup.preprocessing == OURS and setup.engine != REFERENCE:
        command = [sys.executable, "-m", "gr00t_fast.serving", *flags]
    else:
        command = [sys.executable, "-m", "benchmarks.ab_host", *flags, f"--preprocessing={setup.preprocessing}", f"--threads={arguments.threads}"]
    kind = "ours" if "gr00t_fast.serving" in command else "baseline"
    return ServerProcess(command, address, arguments.threads, arguments.out / f"server-{kind}-{setup.transport}.log", arguments.timeout_s)


def _flags(arguments: argparse.Namespace) -> list[str]:
    names = ("model_path", "embodiment_tag", "data_config", "device", "precision", "processor_path", "seed")
    return [f"--{name}={getattr(arguments, name)}" for name in names if getattr(arguments, name) is not None]


def _probes(ours: Any, addresses: Addresses, inputs: tuple[dict[str, Any], np.ndarray], arguments: argparse.Namespace) -> dict[str, ServerProcess]:
    """Per transport a server that answers at once with actions of the right shape: the same messages, and nothing but transport."""
    shapes = json.dumps({key: rows.shape for key, rows in ours.get_action(*inputs).items()})
    servers = {}
    for name in (name for name in arguments.transports if name != NONE):
        address = addresses.new(name)
        command = [sys.executable, "-m", "benchmarks.ab_host", f"--answer={shapes}", f"--address={address}"]
        servers[name] = ServerProcess(command, address, arguments.threads, arguments.out / f"server-instant-{name}.log", arguments.timeout_s)
    return servers


def _cold_starts(
    plan: Plan, addresses: Addresses, inputs: list[tuple[dict[str, Any], np.ndarray]], arguments: argparse.Namespace, deadline_s: float
) -> dict[Setup, ColdStart]:
    """Process start to first action of the ends of the comparison, in process and served; one process at a time, in random order."""
    if "warm_up" not in arguments.factors:
        return {}
    wanted = (plan.baseline, replace(plan.baseline, transport=NONE), plan.ours, replace(plan.ours, transport=plan.baseline.transport))
    ends = [setup for setup in dict.fromkeys(wanted) if setup in plan.setups]
    cold, shuffled = {setup: ColdStart() for setup in ends}, random.Random(arguments.seed)
    file, log = arguments.out / "inputs.npz", arguments.out / "cold.log"
    np.savez(file, **inputs[0][0], noise=inputs[0][1])
    for repeat in range(arguments.cold_starts):
        for setup in shuffled.sample(ends, len(ends)):
            if repeat and time.monotonic() > deadline_s:
                return cold
            print(f"cold start {repeat + 1}/{arguments.cold_starts}: {setup}", file=sys.stderr)
            if setup.transport != NONE:
                cold_start_of_server(_server(setup, addresses, arguments), inputs[0], arguments.first_calls, _PATIENCE_S, cold[setup])
                continue
            flags = [*_flags(arguments), f"--preprocessing={setup.preprocessing}", f"--engine={setup.engine}", f"--denoising_steps={setup.steps}"]
            own = [f"--inputs={file}", f"--calls={arguments.first_calls}", f"--threads={arguments.threads}"]
            cold_start_in_process([sys.executable, "-m", "benchmarks.ab_host", *flags, *own], arguments.threads, log, cold[setup])
    return cold


# --- what they get -----------------------------------------------------------------------------------------------------------------------


def _inputs(policies: Policies, arguments: argparse.Namespace) -> list[tuple[dict[str, Any], np.ndarray]]:
    """Frames of the size that training saw: the reference takes no other."""
    from gr00t_fast.checkpoint import open_checkpoint
    from gr00t_fast.data_config import load_data_config

    facts, head = policies.ours.facts, open_checkpoint(policies.model_path).config.head
    sizes = set(facts.resolutions.values())
    if arguments.resolution is not None and sizes != {arguments.resolution}:
        trained = ", ".join(f"{w}x{h}" for w, h in sizes)
        raise ConfigError(f"--resolution={'x'.join(map(str, arguments.resolution))}: this checkpoint was trained with {trained}. Leave the flag out.")
    if len(sizes) != 1:
        raise ConfigError(f"the cameras of this checkpoint differ in resolution ({sorted(sizes)}); the comparison needs one for all.")
    (size,), shape = sizes, (1, head.action_horizon, head.action_dim)
    config = load_data_config(arguments.data_config)
    return [example_inputs(facts, config, shape, size, arguments.seed + number) for number in range(_OBSERVATIONS)]


def random_checkpoint(arguments: argparse.Namespace) -> Path:
    from gr00t_fast.random_checkpoint import write_random_checkpoint

    size = arguments.resolution or (640, 480)
    path = arguments.out / f"checkpoint-{arguments.size}-{arguments.data_config}-{size[0]}x{size[1]}"
    if not (path / "config.json").exists():
        write_random_checkpoint(path, arguments.size, arguments.data_config, size, seed=arguments.seed)
    return path


def _regime(arguments: argparse.Namespace, ours: Any, steps: int, inputs: list[tuple[dict[str, Any], np.ndarray]]) -> dict[str, Any]:
    (size,) = set(ours.facts.resolutions.values())
    observation, noise = inputs[0]
    return {
        "benchmark": "ab_server",
        "weights": "RANDOM" if arguments.random_weights else arguments.model_path.name,
        "weight_bytes": sum(file.stat().st_size for file in arguments.model_path.glob("model*.safetensors")),
        "device": str(ours.device),
        "precision": str(ours.dtype).removeprefix("torch."),
        "engine": ours.engine.name,
        "denoising_steps": steps,
        "cameras": len(ours.facts.resolutions),
        "resolution": list(size),
        "threads_per_process": arguments.threads,
        "request_bytes": sum(value.nbytes for value in observation.values() if isinstance(value, np.ndarray)) + noise.nbytes,
        "calls_asked": arguments.calls,
        "warm_up_rounds": arguments.warm_up,
        "settling_calls": arguments.settle,
        "max_minutes": arguments.max_minutes,
    }


def _floor_ms(ours: Any, steps: int) -> float | None:
    """What the network alone could not undercut on this machine, by measured arithmetic and memory rates; None for an export, whose work differs."""
    from benchmarks.work import measure_ceilings, stage_work

    if not hasattr(ours.engine, "model"):
        return None
    ceilings, images = measure_ceilings(ours.device, ours.dtype), len(ours.facts.resolutions)
    prompt = images * ours.engine.model.config.vision.tokens + 32  # a short instruction and the template
    return round(sum(work.floor_ms(ceilings) for work in stage_work(ours.engine.model, prompt, images, steps).values()), 3)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _resolution(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{2,5})x(\d{2,5})", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT such as 1280x720, got '{text}'")
    return int(found[1]), int(found[2])


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got '{text}'")
    return int(text)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    arguments = _parser().parse_args(argv)
    arguments.random_weights = arguments.model_path is None
    arguments.data_config = arguments.data_config or {1: "so100", 2: "so100_dualcam"}[arguments.cameras]
    return arguments


def _count_or_none(text: str) -> int:
    return 0 if text == "0" else _count(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model_path", type=Path, help="checkpoint directory; without it a random one of --size is made in --out")
    parser.add_argument(
        "--size", default="demo", choices=("tiny", "demo", "full"), help="of the random checkpoint; full: the published sizes, 4.7 GB"
    )
    parser.add_argument("--embodiment_tag", default="new_embodiment")
    parser.add_argument("--data_config", help="default: so100, or so100_dualcam with --cameras=2")
    parser.add_argument("--cameras", type=int, choices=(1, 2), default=1)
    parser.add_argument("--resolution", type=_resolution, help="of the random checkpoint and its cameras: 640x480 (default), 1280x720, ...")
    parser.add_argument("--processor_path", type=Path, help="tokenizer files, when the checkpoint has none")
    parser.add_argument("--factors", nargs="+", choices=FACTORS, default=list(FACTORS), help="what to vary; the rest stays as ours is")
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=list(TRANSPORTS), help="each but none is one more server with weights")
    parser.add_argument("--denoising_steps", type=_count, help="of all arms but those that vary it; default: the checkpoint's own")
    parser.add_argument("--steps", nargs="*", type=_count, default=[2, 1, 8], help="other numbers of denoising steps")
    parser.add_argument("--engine", default="auto", help="ours")
    parser.add_argument("--engines", nargs="*", help="engines to compare with it; default: all that this machine can run")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=_count, default=1, help="CPU threads of every process, clients and servers alike")
    parser.add_argument("--calls", type=_count, default=200, help="counted calls per arm")
    parser.add_argument("--warm_up", type=_count_or_none, default=3, help="rounds not counted")
    parser.add_argument("--settle", type=_count_or_none, default=1, help="uncounted calls of the same arm before each counted one")
    parser.add_argument("--cold_starts", type=_count, default=3, help="fresh processes per arm, when warm_up is among the factors")
    parser.add_argument("--first_calls", type=_count, default=5, help="calls timed in each fresh process")
    parser.add_argument("--max_minutes", type=float, default=5.0, help="begin no further round after that long; said in the result")
    parser.add_argument("--server", help="address of a running GR00T N1.5 inference service to time instead, e.g. tcp://192.168.0.7:5555")
    parser.add_argument("--api_token", help="of that service")
    parser.add_argument("--timeout_s", type=float, default=60.0, help="of one call")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/ab_server"), help="directory for the JSON, the table, the samples and the plot")
    return parser


if __name__ == "__main__":
    sys.exit(main())
