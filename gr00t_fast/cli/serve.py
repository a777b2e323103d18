"""`gr00t-fast serve`: a checkpoint behind a socket, for NVIDIA's clients and ours.

torch and the policy are imported after the flags are read: `--help` and every mistake on the command line answer at once.
"""

from __future__ import annotations

import json
import logging
import signal
import urllib.request
from dataclasses import dataclass
from typing import Any

from gr00t_fast.base.errors import AT_LEAST_1, ConfigError, ServerError, ServerUnreachableError, check_ranges, require
from gr00t_fast.cli.main import EXIT_OK, Command
from gr00t_fast.cli.run import RunConfig
from gr00t_fast.options import PolicyOptions
from gr00t_fast.serving.client import PING_TIMEOUT_S, PolicyClient
from gr00t_fast.serving.service import check_free, status_line
from gr00t_fast.serving.wire import tcp_address


@dataclass(kw_only=True)
class ServeConfig(PolicyOptions):
    """Put a checkpoint behind a socket, for NVIDIA's clients and ours."""

    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0: reachable from other machines
    port: int = 5555  # TCP port to listen on
    address: str = ""  # any ZeroMQ address instead of host and port, e.g. ipc:///tmp/gr00t.sock
    api_token: str | None = None  # secret that clients must send; without it every client is served and kill is disabled
    http: bool = False  # speak HTTP (POST /act, GET /health, /metrics, /status) and openpi's WebSocket instead of ZeroMQ
    max_batch: int = 8  # how many clients' requests are computed together at most, where that is quicker; measured at the start. 1: one by one
    metrics_port: int = 0  # ZeroMQ: answer GET /metrics (Prometheus) at this port of this machine; 0: at none
    status: bool = False  # print what the server that runs at --host and --port, or --address, is doing, and end
    host_names: str = ""  # --http: names by which clients call this machine besides its own and its addresses, separated by commas
    verbose: bool = False  # full tracebacks and debug messages

    def needs_checkpoint(self) -> bool:
        return not self.status

    def check(self) -> None:
        super().check()
        check_ranges(self, port=(1, 65535), max_batch=AT_LEAST_1)
        if self.api_token is not None and not self.api_token:
            raise ConfigError("--api_token is empty; leave the flag out to serve every client.")
        if self.http and self.address:
            raise ConfigError(f"--address={self.address} is for ZeroMQ; with --http use --host and --port.")
        if self.host_names and not self.http:
            raise ConfigError(f"--host_names={self.host_names} is for --http: ZeroMQ's clients do not say whom they call.")
        if self.metrics_port and (self.http or not 1 <= self.metrics_port <= 65535):
            raise ConfigError(f"--metrics_port={self.metrics_port}: expected a port from 1 to 65535; with --http they are at /metrics of its own.")
        transport, _, place = self.address.partition("://")
        if self.address and (transport not in ("tcp", "ipc") or not place):
            raise ConfigError(f"--address={self.address}: expected ipc://PATH or tcp://HOST:PORT.")


def serve(config: ServeConfig) -> int:
    """Load, warm up, and answer until a signal or a client with the token ends it. Raises Gr00tFastError."""
    if config.status:
        return _print_status(config)
    logging.basicConfig(level=logging.DEBUG if config.verbose else logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    require("uvicorn" if config.http else "zmq", "serving")
    check_free(config.address or tcp_address(config.host, config.port))
    from gr00t_fast.policy import load_policy  # imports torch

    policy = load_policy(config.model_path, **config.policy_options())
    logging.info("warming up")
    policy.warm_up()
    server = _server(config, policy)
    server.service.measure_batches(config.max_batch)
    if config.metrics_port:
        server.service.figures.serve(config.metrics_port)
    _stop_on_signals(server)
    print(f"Server is ready and listening on {server.address}", flush=True)
    server.run()
    return EXIT_OK


def _server(config: ServeConfig, policy: Any) -> Any:
    if config.http:
        from gr00t_fast.serving.http import HttpPolicyServer

        names = [name.strip() for name in config.host_names.split(",") if name.strip()]
        return HttpPolicyServer(policy, config.host, config.port, config.api_token, names)
    from gr00t_fast.serving.server import PolicyServer

    return PolicyServer(policy, config.host, config.port, config.api_token, config.address or None)


def _print_status(config: ServeConfig) -> int:
    """Raises ServerError when no server of ours answers."""
    if config.http:
        request = urllib.request.Request(f"http://{config.host}:{config.port}/status", headers={"Authorization": f"Bearer {config.api_token or ''}"})
        try:
            with urllib.request.urlopen(request, timeout=PING_TIMEOUT_S) as reply:
                status = json.load(reply)
        except (OSError, ValueError) as error:
            raise ServerError(f"no server of ours answers at {request.full_url}: {error}. Look at --host, --port and --api_token.") from error
    else:
        with PolicyClient(config.host, config.port, PING_TIMEOUT_S, config.api_token, config.address or None) as client:
            try:
                status = client.get_status()
            except ServerUnreachableError as error:
                raise ServerError(
                    f"no policy server answers at {client.address}. Look at --host and --port; one with --http needs it here, too."
                ) from error
            if status is None:
                raise ServerError(f"the server at {client.address} tells no status: it is NVIDIA's, or an older one.")
    batches = ", ".join(f"{size}: {ms:g} ms" for size, ms in status["batch_ms"].items())
    print(f"{status_line(status)}; {status['waiting']} waiting, {status['clients']} clients so far; a batch takes {batches or 'not known yet'}")
    return EXIT_OK


def _stop_on_signals(server: Any) -> None:
    """The first SIGINT or SIGTERM ends the server after the inference in progress, a second one at once."""

    def on_signal(number: int, frame: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.default_int_handler)
        logging.info("stopping on %s", signal.Signals(number).name)
        server.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)


main = Command(
    ServeConfig,
    serve,
    "usage: gr00t-fast serve --model_path=DIR [--port=5555] [--flag=value ...]",
    "exit codes: 0 stopped by Ctrl-C, SIGTERM or kill, 1 error, 2 bad flag, 130 interrupted while loading",
    file_of=RunConfig,
)
