"""`python -m gr00t_fast.serving`: help, mistakes, and a checkpoint served over both protocols."""

from __future__ import annotations

import inspect
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
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


@pytest.mark.slow
def test_a_checkpoint_is_served_from_the_command_line_over_both_protocols(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gr00t_fast.policy import load_policy
    from gr00t_fast.virtual.random_checkpoint import write_random_checkpoint

    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", size="tiny")
    seen, metrics_port = observation(size=(480, 640)), free_port()
    with (
        command_line(checkpoint, "--http", f"--port={free_port()}") as http_process,
        command_line(checkpoint, "--api_token=t", f"--metrics_port={metrics_port}") as process,
    ):
        expected = load_policy(checkpoint, seed=3, denoising_steps=2, device="cpu").get_action(seen)
        status, actions = reference.http_post(f"{http_process.stdout.readline().split()[-1]}/act", {"observation": seen})
        assert status == 200
        assert_same(actions, expected)
        port = int(process.stdout.readline().rpartition(":")[2])
        with reference.Client(port, "t") as client:
            assert_same(client.get_action(seen), expected)
        for asked in (["--http", http_process.args[-1]], [f"--port={port}", "--api_token=t"]):
            assert main(["--status", *asked]) == 0
            assert re.search(r"1 requests served.*0 waiting, 1 clients so far; a batch takes 1: .* ms, 2: .* ms", capsys.readouterr().out)
        assert main(["--status", f"--port={port}"]) == 1
        assert "Invalid API token" in capsys.readouterr().err
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics") as reply:
            assert b"gr00t_compute_seconds_count 1.0" in reply.read()
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
