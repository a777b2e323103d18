"""`python -m gr00t_fast.serving --model_path DIR --port 5555`: a checkpoint behind a socket, for NVIDIA's clients and ours.

torch and the policy are imported after the flags are read: `--help` and every mistake on the command line answer at once.
"""

from __future__ import annotations

import logging
import signal
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gr00t_fast.errors import Gr00tFastError, exit_code_of
from gr00t_fast.flags import Flag, UsageError, flags_of, parse_flags
from gr00t_fast.optional import require
from gr00t_fast.serving.listening import check_port_free

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_CTRL_C = 0, 1, 2, 130
_MAX_IPC_PATH_BYTES = 103  # what macOS takes; Linux takes 107
_POLICY_OPTIONS = (
    *("embodiment_tag", "data_config", "denoising_steps", "action_horizon", "device", "precision", "engine", "engine_path"),
    *("processor_path", "prompt_style", "seed", "revision"),
)


@dataclass
class ServeConfig:
    """Everything the command line says."""

    model_path: str = ""  # directory of the checkpoint, or its name on the Hugging Face hub; required
    revision: str | None = None  # commit, tag or branch of a --model_path on the hub; without a commit the weights may be others tomorrow
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0: reachable from other machines
    port: int = 5555  # TCP port to listen on
    address: str = ""  # any ZeroMQ address instead of host and port, e.g. ipc:///tmp/gr00t.sock
    api_token: str | None = None  # secret that clients must send; without it every client is served and kill is disabled
    http: bool = False  # speak HTTP (POST /act, GET /health) instead of ZeroMQ
    host_names: str = ""  # --http: names by which clients call this machine besides its own and its addresses, separated by commas
    embodiment_tag: str = "new_embodiment"  # which category weights and statistics of the checkpoint
    data_config: str = "so100"  # a name of NVIDIA's (so100, so100_dualcam, fourier_gr1_arms_only, ...), or module:ClassName of your own
    denoising_steps: int | None = None  # steps from noise to action; default: the checkpoint's own
    action_horizon: int | None = None  # actions returned per inference; default: all that the checkpoint predicts
    device: str = "auto"  # auto, cuda, cuda:N, cpu, mps
    precision: str = "auto"  # number format of the network: auto, fp32, bf16, fp16
    engine: str = "auto"  # auto is eager; cuda_graph, compiled; fp8, onnxruntime, openvino and tensorrt need files (README)
    engine_path: Path | None = None  # directory of the export; default: exports/<engine> in the checkpoint's directory
    processor_path: Path | None = None  # directory with the Eagle tokenizer files; default: looked up
    prompt_style: Literal["plain", "nvidia"] = "plain"  # nvidia: with the brackets that NVIDIA's server puts around the instruction
    seed: int | None = None  # makes the noise repeatable
    verbose: bool = False  # full tracebacks and debug messages


def parse(argv: Sequence[str]) -> ServeConfig:
    """Return the checked configuration. Raises UsageError."""
    config, notes = parse_flags(ServeConfig, argv)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if not config.model_path.strip():
        raise UsageError("--model_path is missing: the directory of a GR00T N1.5 checkpoint, or its name on the Hugging Face hub.")
    if not 1 <= config.port <= 65535:
        raise UsageError(f"--port={config.port} must be from 1 to 65535.")
    if config.api_token is not None and not config.api_token:
        raise UsageError("--api_token is empty; leave the flag out to serve every client.")
    if config.http and config.address:
        raise UsageError(f"--address={config.address} is for ZeroMQ; with --http use --host and --port.")
    if config.host_names and not config.http:
        raise UsageError(f"--host_names={config.host_names} is for --http: ZeroMQ's clients do not say whom they call.")
    if config.address:
        _check_address(config.address)
    return config


def _check_address(address: str) -> None:
    """Before gigabytes are read. Raises UsageError."""
    transport, _, place = address.partition("://")
    if transport not in ("tcp", "ipc") or not place:
        raise UsageError(f"--address={address}: expected ipc://PATH or tcp://HOST:PORT.")
    path = Path(place)
    if transport == "ipc" and not place.startswith("@") and not path.parent.is_dir():  # @: Linux's abstract names, no files
        raise UsageError(f"--address={address}: there is no directory {path.parent} for the socket.")
    if transport == "ipc" and len(place.encode()) > _MAX_IPC_PATH_BYTES:
        raise UsageError(f"--address={address}: a socket's path has at most {_MAX_IPC_PATH_BYTES} bytes, this one {len(place.encode())}.")


def serve(config: ServeConfig) -> None:
    """Load, warm up, and answer until a signal or a client with the token ends it. Raises Gr00tFastError."""
    require("uvicorn" if config.http else "msgpack", "serving")
    if not config.address:
        check_port_free(config.host, config.port)
    from gr00t_fast.policy import load_policy  # imports torch

    policy = load_policy(config.model_path, **{name: getattr(config, name) for name in _POLICY_OPTIONS})
    logging.info("warming up")
    policy.warm_up()
    server = _server(config, policy)
    _stop_on_signals(server)
    print(f"Server is ready and listening on {server.address}", flush=True)
    server.run()


def _server(config: ServeConfig, policy: Any) -> Any:
    if config.http:
        from gr00t_fast.serving.http import HttpPolicyServer

        names = [name.strip() for name in config.host_names.split(",") if name.strip()]
        return HttpPolicyServer(policy, config.host, config.port, config.api_token, names)
    from gr00t_fast.serving.server import PolicyServer

    return PolicyServer(policy, config.host, config.port, config.api_token, config.address or None)


def _stop_on_signals(server: Any) -> None:
    """The first SIGINT or SIGTERM ends the server after the inference in progress, a second one at once."""

    def on_signal(number: int, frame: object) -> None:
        del frame
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, _interrupt)
        logging.info("stopping on %s", signal.Signals(number).name)
        server.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 stopped as asked, 1 error, 2 bad flag, 130 interrupted while loading."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--help" in argv or "-h" in argv:
        print(help_text())
        return EXIT_OK
    verbose = "--verbose" in argv
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        serve(parse(argv))
    except Gr00tFastError as error:
        if verbose:
            logging.exception("failed")
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, UsageError) else EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_CTRL_C
    return EXIT_OK


def help_text() -> str:
    """All flags with their values, defaults and meaning."""
    lines = ["usage: python -m gr00t_fast.serving --model_path DIR [--port 5555] [--flag value ...]", ""]
    lines += [line for flag in flags_of(ServeConfig) for line in _help_lines(flag)]
    return "\n".join([*lines, "", "exit codes: 0 stopped by Ctrl-C, SIGTERM or kill, 1 error, 2 bad flag, 130 interrupted while loading"])


def _help_lines(flag: Flag) -> list[str]:
    values = {"text": "TEXT", "path": "PATH", "bool": "true|false", "yaml": "VALUE"}.get(flag.kind) or "|".join(map(str, flag.choices))
    default = "" if flag.default in (None, "") else f" [{str(flag.default).lower()}]"
    head, *rest = textwrap.wrap(flag.help + default, 92)
    return [f"  {f'--{flag.name}={values}':<31} {head}", *(" " * 34 + line for line in rest)]


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
