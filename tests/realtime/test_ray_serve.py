"""The service on a real Ray cluster of this machine: `make test-ray`. Two replicas answer as one, and a killed one is replaced."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from nvidia_style_service import http_post
from openpi_client import msgpack_numpy
from serving_fakes import ROOT
from waiting import until
from websockets.sync.client import connect

from gr00t_fast import Gr00tPolicy, load_policy
from gr00t_fast.base.errors import ConfigError
from gr00t_fast.virtual.random_checkpoint import write_random_checkpoint

pytest.importorskip("ray", reason="make test-ray installs it")
START_S = 120.0
REPLICA = "ServeReplica"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint"), "tiny", "so100")


@pytest.fixture(scope="module")
def policy(checkpoint: Path) -> Gr00tPolicy:
    return load_policy(checkpoint, device="cpu", precision="fp32", seed=0)


def replicas_of_this_run() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if REPLICA in process.name() or REPLICA in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.fixture(scope="module")
def address(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`serve run` with a YAML."""
    # below the ports that the system gives, of which Ray's own servers take many before this one is bound, and above those of its workers
    port, file = random.randrange(20_000, 30_000), tmp_path_factory.mktemp("ray") / "config.yaml"
    model = {"model_path": str(checkpoint), "device": "cpu", "precision": "fp32", "seed": 0}
    deployment = {"name": "PolicyDeployment", "num_replicas": 2, "ray_actor_options": {"num_cpus": 0.1}}
    application = {"import_path": "gr00t_fast.serving.ray_app:app", "args": {"models": {"reach": model, "fold": {**model, "denoising_steps": 1}}}}
    file.write_text(yaml.safe_dump({"http_options": {"port": port}, "applications": [{**application, "deployments": [deployment]}]}, sort_keys=False))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    command = [str(Path(sys.executable).parent / "serve"), "run", str(file)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            until(lambda: process.poll() is not None or answers(f"http://127.0.0.1:{port}"), patience_s=START_S)
            assert process.poll() is None
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            with contextlib.suppress(ProcessLookupError):  # it has taken all of its processes along
                os.killpg(process.pid, signal.SIGKILL)


def answers(address: str) -> bool:
    with contextlib.suppress(OSError):
        return http_post(f"{address}/act", {"observation": {}})[0] == 400
    return False


def act(address: str, observation: Any, **headers: str) -> tuple[int, Any]:
    return http_post(f"{address}/act", {"observation": observation}, headers=headers)


def among(actions: dict[str, np.ndarray], expected: list[dict[str, np.ndarray]]) -> bool:
    return any(all(np.allclose(actions[key], rows, rtol=0, atol=1e-3) for key, rows in each.items()) for each in expected)


def test_two_replicas_answer_as_one_and_a_killed_one_costs_its_own_requests_only(address: str, policy: Gr00tPolicy) -> None:
    seen = policy.example_observation("pick")
    policy.reset()
    expected = [policy.get_action(seen) for _ in range(64)]  # of one seed: each replica goes through them
    first = [act(address, seen) for _ in range(12)]
    assert {status for status, _ in first} == {200}
    assert all(among(actions, expected) for _, actions in first)
    until(lambda: len(replicas_of_this_run()) == 2, patience_s=START_S)
    victim = replicas_of_this_run()[0]
    outcomes: list[int] = []

    def ask() -> None:
        with contextlib.suppress(OSError):  # the connection of one that the killed replica had may break
            outcomes.append(act(address, seen)[0])

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    victim.kill()
    for thread in threads:
        thread.join(60)
    assert outcomes.count(200) >= 4, outcomes
    until(lambda: len(replicas_of_this_run()) == 2 and victim.pid not in {each.pid for each in replicas_of_this_run()}, patience_s=START_S)
    assert {act(address, seen)[0] for _ in range(12)} == {200}


def test_a_client_names_its_checkpoint(address: str, checkpoint: Path, policy: Gr00tPolicy) -> None:
    seen = policy.example_observation("pick")
    other = load_policy(checkpoint, device="cpu", precision="fp32", seed=0, denoising_steps=1)
    status, actions = act(address, seen, serve_multiplexed_model_id="fold")
    assert status == 200
    assert among(actions, [other.get_action(seen) for _ in range(16)])
    status, refusal = act(address, seen, serve_multiplexed_model_id="flod")
    assert status == 400
    assert "Did you mean 'fold'" in refusal["detail"]


def test_openpi_s_protocol_goes_through_it(address: str, policy: Gr00tPolicy) -> None:
    with connect(address.replace("http", "ws"), compression=None) as socket:
        assert msgpack_numpy.unpackb(socket.recv())["keys"]["video"] == ["video.webcam"]
        socket.send(msgpack_numpy.packb(policy.example_observation("pick")))
        assert msgpack_numpy.unpackb(socket.recv())["actions"].shape == (16, 6)


@pytest.mark.parametrize("args", [{}, {"models": {"a": {}}}, {"model_path": "x"}, {"models": {}}])
def test_arguments_that_make_no_sense(args: dict[str, Any]) -> None:
    from gr00t_fast.serving.ray_app import app

    with pytest.raises(ConfigError, match="args: expected"):
        app(args)
