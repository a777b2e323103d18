"""`ab_server.py --server`: a GR00T N1.5 inference service that runs somewhere, as its clients see it; beside ours in process when a checkpoint
is given. What runs behind that address (number of steps, precision, machine) is its own affair, and so is what it draws as noise: the plain protocol
carries none, so actions are not compared.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ab_arms import Arm, DisagreementError, Protocol, measure, paired, paired_ratio, ratio_text, targets_of
from benchmarks.ab_host import example_inputs
from benchmarks.ab_processes import Addresses, ServerProcess, running
from benchmarks.ab_report import size_text, transport_sentence
from gr00t_fast.data_config import DataConfig, load_data_config
from gr00t_fast.errors import ConfigError, ServerError, ServerUnreachableError
from gr00t_fast.measurement import percentiles
from gr00t_fast.serving import PolicyClient

_THEIRS, _OURS = "theirs, served", "ours, in process"
_PROBE = ("transport alone", "tcp, this machine")
_OBSERVATIONS = 16
_UNKNOWN = "Unknown endpoint"


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Ask what the service takes, and time it. Raises ServerUnreachableError, ServerError and ConfigError."""
    address, config = _address(arguments.server), load_data_config(arguments.data_config)
    deadline_s = time.monotonic() + 60 * arguments.max_minutes
    with PolicyClient(address=address, timeout_s=arguments.timeout_s, api_token=arguments.api_token) as client:
        missing = _check_service(client, config)
        ours = _ours(arguments)
        size = _size(arguments, ours)
        inputs = [example_inputs(ours.facts if ours else None, config, (1, 1, 1), size, arguments.seed + k) for k in range(_OBSERVATIONS)]
        first_ms, shapes = _first_calls(client, inputs[0][0], arguments.first_calls)
        arms = {_THEIRS: Arm(lambda observation, noise: _targets(client.get_action(observation)), lambda: client.last_timing)}
        if "ping" not in missing:
            arms["ping"] = Arm(lambda observation, noise: _ping(client))
        if ours is not None:
            arms[_OURS] = Arm(lambda observation, noise: _targets(ours.get_action(observation)), lambda: ours.last_timing)
        with Addresses() as addresses:
            probe = _probe(addresses.new("tcp"), shapes, arguments)
            with running([probe], arguments.timeout_s):
                arms[_PROBE] = Arm(lambda observation, noise: _targets(probe.client.get_action(observation)), lambda: probe.client.last_timing)
                arms["probe ping"] = Arm(lambda observation, noise: _ping(probe.client))
                measured = measure(arms, inputs, Protocol(arguments.calls, arguments.warm_up, arguments.settle, deadline_s, arguments.seed))
    latency = {" ".join(name) if isinstance(name, tuple) else name: percentiles(samples) for name, samples in measured.times_ms.items()}
    return {
        "benchmark": "ab_server",
        "server": address,
        "missing_endpoints": missing,
        "cameras": len(config.video_keys),
        "resolution": list(size),
        "request_bytes": sum(value.nbytes for value in inputs[0][0].values() if isinstance(value, np.ndarray)),
        "rounds": measured.rounds,
        "calls_asked": arguments.calls,
        "stopped_early": measured.stopped_early,
        "threads_of_ours": arguments.threads,
        "ours_is": _about(ours),
        "latency_ms": latency,
        "first_calls_ms": [round(value, 3) for value in first_ms],
        "theirs_minus_ours_ms": paired(measured.times_ms[_THEIRS], measured.times_ms[_OURS]) if ours else None,
        "theirs_over_ours": paired_ratio(measured.times_ms[_THEIRS], measured.times_ms[_OURS]) if ours else None,
        "transport_alone": {"tcp on this machine": {"message_ms": latency[" ".join(_PROBE)], "ping_ms": latency["probe ping"]}},
    }


def _address(text: str) -> str:
    if not text.startswith(("tcp://", "ipc://")):
        raise ConfigError(f"--server={text}: expected an address such as tcp://192.168.0.7:5555.")
    return text


def _check_service(client: PolicyClient, config: DataConfig) -> list[str]:
    """The endpoints it lacks. Raises ServerUnreachableError when nothing answers, ConfigError when it takes other keys than ours."""
    missing = []
    try:
        if not client.ping():
            raise ServerUnreachableError(f"nothing answers at {client.address}. Is the inference service running there?")
    except ServerError as error:
        _accept_unknown(error, "ping", missing)
    try:
        asked = client.get_modality_config()
    except ServerError as error:
        _accept_unknown(error, "get_modality_config", missing)
        return missing
    for name, keys in (("video", config.video_keys), ("state", config.state_keys)):
        theirs = list(asked[name].modality_keys) if name in asked else []
        if set(theirs) != set(keys):
            raise ConfigError(
                f"the service takes {', '.join(theirs) or f'no {name}'}; --data_config has {', '.join(keys)}. Choose the one it serves."
            )
    return missing


def _accept_unknown(error: ServerError, endpoint: str, missing: list[str]) -> None:
    """A service without that endpoint is noted; any other error goes on."""
    if isinstance(error, ServerUnreachableError) or _UNKNOWN not in str(error):
        raise error
    missing.append(endpoint)


def _ours(arguments: argparse.Namespace) -> Any:
    """Our policy, warm, when there is a checkpoint."""
    if arguments.model_path is None:
        return None
    import torch

    from gr00t_fast.policy import load_policy

    torch.set_num_threads(arguments.threads)
    names = ("embodiment_tag", "data_config", "denoising_steps", "device", "precision", "engine", "processor_path", "seed")
    policy = load_policy(arguments.model_path, **{name: getattr(arguments, name) for name in names})
    policy.warm_up()
    return policy


def _size(arguments: argparse.Namespace, ours: Any) -> tuple[int, int]:
    if arguments.resolution or ours is None:
        return arguments.resolution or (640, 480)
    return next(iter(ours.facts.resolutions.values()))


def _first_calls(client: PolicyClient, observation: dict[str, Any], count: int) -> tuple[list[float], dict[str, list[int]]]:
    """Times in ms, and the shapes of the actions. Whether they are the service's own first calls, it alone knows."""
    times_ms, actions = [], {}
    for _ in range(count):
        began_s = time.perf_counter()
        actions = client.get_action(observation)
        times_ms.append(1e3 * (time.perf_counter() - began_s))
    return times_ms, {key: list(rows.shape) for key, rows in actions.items()}


def _targets(actions: dict[str, np.ndarray]) -> np.ndarray:
    targets = targets_of({key: np.atleast_2d(rows.T).T for key, rows in actions.items()}, sorted(actions))  # NVIDIA's squeezes (H, 1) to (H,)
    if not np.isfinite(targets).all():
        raise DisagreementError("the actions are not finite: a time for them means nothing.")
    return targets


def _ping(client: PolicyClient) -> np.ndarray:
    if not client.ping():
        raise ServerUnreachableError(f"{client.address} stopped answering.")
    return np.empty(0)


def _probe(address: str, shapes: dict[str, list[int]], arguments: argparse.Namespace) -> ServerProcess:
    import json

    command = [sys.executable, "-m", "benchmarks.ab_host", f"--answer={json.dumps(shapes)}", f"--address={address}"]
    return ServerProcess(command, address, arguments.threads, arguments.out / "server-instant-tcp.log", arguments.timeout_s)


def _about(ours: Any) -> str | None:
    if ours is None:
        return None
    return f"{ours.engine.name} engine, {str(ours.dtype).removeprefix('torch.')} on {ours.device}, {ours.denoising_steps} steps"


def as_markdown(r: dict[str, Any]) -> str:
    stopped = f" (**stopped early**: {r['calls_asked']} were asked for)" if r["stopped_early"] else ""
    lines = [
        f"# The inference service at {r['server']}",
        "",
        f"{r['cameras']} camera(s) of {size_text(r)}, {r['rounds']} rounds{stopped}, arms in random order. Times in ms.",
        "",
        "| arm | p50 | p95 | p99 |",
        "|---|--:|--:|--:|",
    ]
    lines += [f"| {name} | {p['p50']:.2f} | {p['p95']:.2f} | {p['p99']:.2f} |" for name, p in r["latency_ms"].items()]
    lines += ["", f"* Our first calls to it took {', '.join(f'{value:.0f}' for value in r['first_calls_ms'])} ms."]
    if r["theirs_minus_ours_ms"]:
        d = r["theirs_minus_ours_ms"]
        quartiles = f"(quartiles {d['p25']:.2f} to {d['p75']:.2f}, paired by round)"
        lines.append(f"* Theirs minus ours ({r['ours_is']}): {d['median']:.2f} ms {quartiles}.")
        lines.append(f"* Theirs takes {ratio_text(r['theirs_over_ours'])} as long.")
    lines += [f"* {transport_sentence(name, probe, r)}" for name, probe in r["transport_alone"].items()]
    lines.append("* Its steps, precision, machine and noise are its own and not known here: this is a comparison of services, not of one factor.")
    if r["missing_endpoints"]:
        lines.append(f"* It does not know: {', '.join(r['missing_endpoints'])}.")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    from gr00t_fast.optional import require

    require("matplotlib", "plots").use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.5 * len(result["latency_ms"])))
    names = list(result["latency_ms"])
    middles = [result["latency_ms"][name]["p50"] for name in names]
    above = [result["latency_ms"][name]["p95"] - middle for name, middle in zip(names, middles, strict=True)]
    axis.barh(names, middles, xerr=[[0.0] * len(names), above], capsize=3)
    axis.invert_yaxis()
    axis.set_xlabel("ms: p50, whisker to p95")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
