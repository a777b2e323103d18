"""`python -m gr00t_fast.serving`: help, mistakes, and a checkpoint served over both protocols."""

from __future__ import annotations

import inspect
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nvidia_style_service as reference
import pytest
from serving_fakes import ROOT, ArithmeticPolicy, assert_same, observation

from gr00t_fast.cli.serve import main
from gr00t_fast.serving import PolicyServer


def test_help_is_quick_and_knows_all_policy_options(capsys: pytest.CaptureFixture[str]) -> None:
    from gr00t_fast.policy import load_policy

    before = os.times()
    done = subprocess.run([sys.executable, "-m", "gr00t_fast.serving", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    assert os.times().children_user - before.children_user < 3  # processor time: a busy neighbour does not count
    for name in ("port", "host", "api_token", "http", *inspect.signature(load_policy).parameters):
        assert f"--{name}=" in done.stdout


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--model_path is missing"),
        (["--model_path", "x", "--port", "99999"], "--port=99999"),
        (["--model_path=x", "--prot=1"], "Did you mean '--port'"),
        (["--model-path=x", "--engine=egaer"], "Did you mean 'eager'"),
        (["--server", "--model_path=x"], "is the server"),
        (["--model_path=x", "--http-server"], "--http"),
        (["--model_path=x", "--use-tensorrt"], "--engine=tensorrt"),
        (["--client", "--port=5555"], "gr00t-fast run"),
        (["--model_path=x", "--api_token="], "--api_token is empty"),
        (["--model_path=x", "--http", "--address=ipc:///tmp/x"], "--address"),
        (["--model_path=x", "--address=/tmp/x"], "expected ipc://PATH or tcp://HOST:PORT"),
        (["--model_path=x", "--address=ipc://"], "expected ipc://PATH or tcp://HOST:PORT"),
    ],
)
def test_mistakes_on_the_command_line(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert said in capsys.readouterr().err


def test_an_address_that_cannot_be_used_is_found_before_anything_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file := tmp_path / "file").touch()
    servers = [PolicyServer(ArithmeticPolicy(), port=0), PolicyServer(ArithmeticPolicy(), address=f"ipc://{tmp_path}/socket")]
    places = [f"--port={servers[0].port}", f"--address={servers[1].address}", f"--address=ipc://{file}"]
    for place in places:
        assert main(["--model_path=/nowhere", place]) == 1
        assert "cannot listen" in capsys.readouterr().err
    for place in ("--address=ipc:///no/such/place/x", f"--address=ipc:///tmp/{'x' * 120}"):
        assert main(["--model_path=/nowhere", place]) == 2
        assert "cannot make a socket" in capsys.readouterr().err
    assert file.exists()
    for server in servers:
        server.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def test_a_checkpoint_is_served_from_the_command_line_over_both_protocols(tmp_path: Path) -> None:
    from benchmarks.lib.random_checkpoint import write_random_checkpoint
    from gr00t_fast.policy import load_policy

    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", size="tiny")
    seen = observation(size=(480, 640))
    with command_line(checkpoint, "--http") as http_process, command_line(checkpoint, "--api_token=t") as process:
        expected = load_policy(checkpoint, seed=3, denoising_steps=2, device="cpu").get_action(seen)
        status, actions = reference.http_post(f"{http_process.stdout.readline().split()[-1]}/act", {"observation": seen})
        assert status == 200
        assert_same(actions, expected)
        with reference.Client(int(process.stdout.readline().rpartition(":")[2]), "t") as client:
            assert_same(client.get_action(seen), expected)
        for one, end in ((http_process, signal.SIGINT), (process, signal.SIGTERM)):
            one.send_signal(end)
            log = one.communicate(timeout=20)[1]
            assert one.returncode == 0, log
            assert f"stopping on {end.name}" in log
            assert "Traceback" not in log


@contextmanager
def command_line(checkpoint: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    options = ["--model_path", str(checkpoint), "--port", str(free_port()), "--seed=3", "--denoising_steps", "2", "--device=cpu", *more]
    command = [sys.executable, "-m", "gr00t_fast.serving", *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()
