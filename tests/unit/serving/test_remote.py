"""A policy server as the policy of a control loop: what is checked before the arm moves, and a server that dies, hangs or changes under it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import nvidia_style_service as reference
import pytest
from control_fakes import FakeRobot, policy_metadata
from serving_fakes import ArithmeticPolicy, assert_same, observation, running

from gr00t_fast.base.clock import MonotonicClock
from gr00t_fast.base.contracts import ModalityConfig
from gr00t_fast.base.errors import ConfigError, PreflightError, ServerError, WireError
from gr00t_fast.cli import run as cli
from gr00t_fast.cli import serve
from gr00t_fast.record.report import without_secrets
from gr00t_fast.serving import HttpPolicyServer, PolicyServer
from gr00t_fast.serving.remote import RemotePolicy
from gr00t_fast.serving.wire import metadata_from_message, metadata_to_message

SIM = ["--robot.type=so100_sim", "--lang_instruction=go", "--fps=30"]
NOWHERE = "tcp://127.0.0.1:1"


def address_of(server: Any) -> str:
    return f"tcp://127.0.0.1:{server.port}"


@contextlib.contextmanager
def connected(server: Any, said: list[str] | None = None, **options: Any) -> Iterator[RemotePolicy]:
    defaults = {"api_token": None, "timeout_s": 5.0, "reconnect_s": 30.0, "echo": ([] if said is None else said).append}
    policy = RemotePolicy(address_of(server), **{**defaults, **options})
    try:
        yield policy
    finally:
        policy.close()


# --- metadata over the wire ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(policy_metadata())])
@pytest.mark.parametrize(
    "junk", ["", -1, 0.5, [], {}, {"single_arm": "x"}, {"single_arm": [3]}, {"webcam": [1, -2]}, {1: 2}, float("nan"), True, ...]
)
def test_facts_that_make_no_sense_are_refused_by_name(field: str, junk: Any) -> None:
    message = metadata_to_message(policy_metadata())
    if junk is ...:
        del message[field]
    else:
        message[field] = junk
    optional = ("fps", "letterbox", "embodiment_tag", "n_action_steps", "fingerprint")
    allowed = (field, junk) == ("fps", 0.5) or (field in optional and junk is ...)
    with contextlib.nullcontext() if allowed else pytest.raises(WireError, match=field):
        metadata_from_message(message)


# --- before the arm moves ----------------------------------------------------------------------------------------------------------------


class World:
    """The real program and a real connection; the arm is a fake that keeps real time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.robot = FakeRobot(MonotonicClock())
        monkeypatch.setattr(cli, "build_robot", lambda config: self.robot)

    def run(self, server: Any, *argv: str) -> int:
        return cli.main([*SIM, f"--server={server if isinstance(server, str) else address_of(server)}", "--timeout=0.5", *argv])


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_a_fingerprint_is_of_the_content_of_a_checkpoint(tmp_path: Path) -> None:
    """And not of its place, the device or what is asked of it. NVIDIA's clients get the answer as ever."""
    from random_networks import write_network

    from gr00t_fast import load_policy

    first = write_network(tmp_path / "first")
    shutil.copytree(first, tmp_path / "copy")
    copy = load_policy(tmp_path / "copy", device="cpu", precision="bf16", denoising_steps=1)
    others = [write_network(tmp_path / "weights", seed=1), write_network(tmp_path / "statistics")]
    metadata = others[1] / "experiment_cfg" / "metadata.json"
    content = json.loads(metadata.read_text())
    content["new_embodiment"]["statistics"]["action"]["single_arm"]["max"][0] += 1.0
    metadata.write_text(json.dumps(content))
    told = [load_policy(path, device="cpu").fingerprint() for path in (first, *others)]
    assert copy.fingerprint() == told[0]
    assert len(set(told)) == 3
    with running(PolicyServer(copy, port=0)) as server, connected(server) as remote, reference.Client(server.port) as nvidias:
        seen = copy.example_observation()
        assert remote.get_action(seen).keys() == nvidias.get_action(seen).keys() == {"action.single_arm", "action.gripper"}
        assert remote.metadata.fingerprint


@pytest.mark.parametrize("controller", ["sync", "threaded"])
def test_the_program_drives_the_arm_from_a_server(world: World, controller: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = ArithmeticPolicy()
    with running(PolicyServer(policy, port=0, api_token="s3cret")) as server:
        assert world.run(server, f"--controller={controller}", "--api_token=s3cret", f"--out={tmp_path}") == 0
    assert world.robot.calls == ["connect", "reset", "land"]
    assert len(world.robot.sent) >= 5
    text, report = ((tmp_path / name).read_text() for name in ("report.txt", "report.json"))
    assert f"address {address_of(server)}, outages 0" in text
    assert "s3cret" not in text + report
    assert "(hidden)" in report
    assert json.loads(report)["controller"]["kind"] == controller
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "flags", "said"),
    [
        (PolicyServer, [], "Unauthorized.* --api_token=..."),
        (PolicyServer, ["--api_token=wrong"], "Unauthorized.* --api_token=..."),
        (reference.Server, ["--api_token=wrong"], "Unauthorized.* --api_token=..."),
        (None, ["--server_timeout_s=0.3"], f"no policy server answers at {NOWHERE} within 0.3 s.*gr00t-fast serve "),
        (HttpPolicyServer, [], "no policy server answers .* without --http"),
        (PolicyServer, ["--api_token=right"], "--robot.use_degrees=false"),  # its metadata go through the pre-flight check
    ],
)
def test_what_is_said_before_the_arm_is_touched(world: World, kind: Any, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    policy = ArithmeticPolicy()
    policy.metadata = policy_metadata(low=[-100.0] * 5 + [0.0], high=[100.0] * 6)
    with contextlib.ExitStack() as stack:
        server = NOWHERE
        if kind in (PolicyServer, HttpPolicyServer):
            server = stack.enter_context(running(kind(policy, port=0, api_token="right")))
        elif kind is not None:
            server = stack.enter_context(reference.Server(policy, api_token="right"))
        assert world.run(server, *flags) == 1
    assert re.search(said, capsys.readouterr().err)
    assert world.robot.calls == []


def test_a_server_that_tells_no_facts_is_refused_unless_waved_through(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    with reference.Server(ArithmeticPolicy()) as server:
        assert world.run(server, "--controller=threaded") == 1
        error = capsys.readouterr().err
        assert all(what in error for what in ("joint units", "camera resolution", "embodiment"))
        assert "--model_path=" in error
        assert "--preflight=warn" in error
        assert world.robot.calls == []
        assert world.run(server, "--preflight=warn", "--controller=threaded") == 0
    assert "WARNING: ignored at your wish" in capsys.readouterr().out
    assert len(world.robot.sent) >= 5


@pytest.mark.parametrize("style", ["plain", "nvidia"])
def test_an_older_server_that_leaves_out_the_axis_of_a_single_joint(style: str) -> None:
    with reference.Server(ArithmeticPolicy(), squeezes=True) as server, connected(server, prompt_style=style) as remote:
        with reference.Client(server.port) as nvidias:
            assert nvidias.get_action(observation())["action.gripper"].ndim == 1
        for batch in (None, 1, 3):
            assert_same(remote.get_action(observation(batch)), ArithmeticPolicy().get_action(observation(batch)))


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small files of a checkpoint, without its weights."""
    from gr00t_fast.virtual.random_checkpoint import write_random_checkpoint

    checkpoint = write_random_checkpoint(tmp_path_factory.mktemp("metadata") / "checkpoint", "tiny", resolution=(64, 48))
    (checkpoint / "model.safetensors").unlink()
    return checkpoint


def test_facts_come_from_the_metadata_beside_a_server_that_tells_none(world: World, metadata: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with reference.Server(ArithmeticPolicy()) as server:
        assert world.run(server, f"--model_path={metadata}", "--controller=threaded", "--preflight=warn") == 0
        shapes = {request["data"]["video.webcam"].shape for request in server.requests if request.get("endpoint") == "get_action"}
    assert shapes == {(1, 1, 48, 64, 3)}  # a batch of one; the arm's camera has 40x32, and a reference server refuses what training did not see
    printed = capsys.readouterr().out
    assert "does not say" not in printed
    assert "delivers 40x32, the policy was trained with 64x48" in printed


def test_metadata_and_style_are_those_of_our_server(metadata: Path) -> None:
    said: list[str] = []
    with running(PolicyServer(ArithmeticPolicy(), port=0)) as server:
        with connected(server, said, model_path=str(metadata)) as policy:
            assert policy.continues
            assert policy.metadata.resolutions == {"webcam": (40, 32)}
        assert "--model_path is not used" in " ".join(said)
        with pytest.raises(ConfigError, match=r"--prompt_style=nvidia .* policy server"), connected(server, prompt_style="nvidia"):
            pass


class Odd(ArithmeticPolicy):
    """States of which nobody can tell which joint is which."""

    def get_modality_config(self) -> dict[str, ModalityConfig]:
        return super().get_modality_config() | {"state": ModalityConfig([0], self.state_keys)}


@pytest.mark.parametrize(
    ("keys", "error", "match"),
    [
        (["state.upper", "state.lower"], PreflightError, "how many joints each has"),
        ([], PreflightError, "0 numbers"),
        (["joints"], ServerError, "no usable 'state' keys"),
    ],
)
def test_modality_configurations_that_tell_too_little(keys: list[str], error: type[Exception], match: str) -> None:
    policy = Odd()
    policy.state_keys = keys
    with reference.Server(policy) as server, pytest.raises(error, match=match):
        RemotePolicy(address_of(server), None, 5.0, 30.0)


def test_warm_up_finds_what_the_server_cannot_do(metadata: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = ArithmeticPolicy()
    with running(PolicyServer(policy, port=0)) as server:
        with connected(server, action_horizon=16) as remote:
            remote.warm_up("go", continuing=True)
            assert policy.calls == 3
        with connected(server, action_horizon=17) as remote, pytest.raises(ConfigError, match=r"--action_horizon=17 is more than the 16"):
            remote.warm_up("go")
        monkeypatch.setattr(policy, "_actions", lambda *_: {"action.gripper": np.full((16, 1), np.nan, np.float32)})
        with connected(server) as remote, pytest.raises(ServerError, match=r"NaN or infinity \(action.gripper\)"):
            remote.warm_up("go")
    with reference.Server(ArithmeticPolicy()) as server, connected(server, model_path=str(metadata)) as remote:
        remote.warm_up("go")
        with pytest.raises(ConfigError, match=r"--smoothing=prefix.*gr00t-fast serve"):
            remote.warm_up("go", continuing=True)


@pytest.mark.parametrize(("style", "prompt"), [("plain", "pick: it"), ("nvidia", "['pick: it']")])
def test_what_nvidias_server_makes_of_the_instruction(metadata: Path, style: str, prompt: str) -> None:
    """The text that training saw, as in process, unless its clients' brackets are asked for; the actions are those of a single observation."""
    seen = observation(size=(48, 64), **{"annotation.human.task_description": ["pick: it"]})
    handling = reference.InputHandling(ArithmeticPolicy())
    with reference.Server(handling) as server, connected(server, model_path=str(metadata), prompt_style=style) as remote:
        remote.warm_up("pick: it")
        assert_same(remote.get_action(seen), ArithmeticPolicy().get_action(seen))
        assert_same(remote.get_action(observation(2, size=(48, 64))), ArithmeticPolicy().get_action(observation(2, size=(48, 64))))
    assert set(handling.prompts[:-1]) == {prompt}


# --- the command line --------------------------------------------------------------------------------------------------------------------

WRONG = ("localhost:5555", "tcp://localhost", "tcp://localhost:0", "tcp://localhost:70000", "tcp://*:5555", "http://localhost:8000/act", "ipc://")
BAD = {
    **{f"--server={address}": "Expected tcp://HOST:PORT or ipc://PATH" for address in WRONG},
    "--model_path=m --api_token=x": "--api_token needs --server",
    "--model_path=m --server_timeout_s=1": "--server_timeout_s needs --server",
    "": "Or infer on a policy server",
    "--server=tcp://a:1 --api_token=": "--api_token is empty",
    "--server=tcp://a:1 --server_timeout_s=0": "--server_timeout_s=0 must be from",
    "--server=tcp://a:1 --server_reconnect_s=.inf": "--server_reconnect_s=inf must be from",
    "--server=tcp://a:1 --denoising_steps=2": "--denoising_steps belongs on the command line",
    "--server=tcp://a:1 --device=cpu": "--device belongs on the command line",
    "--server=tcp://a:1 --data_config=so100_dualcam": "belongs on the command line of the policy server",  # without --model_path
    "--server=tcp://a:1 --controller=sync --smoothing=prefix": "--smoothing=prefix needs --controller",
}


@pytest.mark.parametrize("flags", BAD)
def test_mistakes_on_the_command_line(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SIM, *flags.split()]) == 2
    captured = capsys.readouterr()
    assert BAD[flags] in captured.err
    assert captured.err.count("\n") == 1


def test_a_token_is_in_no_report() -> None:
    config = cli.parse([*SIM, "--server=tcp://a:1", "--api_token=s3cret"])
    assert cli.settings_of(config)["api_token"] == "(hidden)"
    assert cli.settings_of(cli.parse([*SIM, "--server=tcp://a:1"]))["api_token"] is None
    for words in (["--api_token=s3cret"], ["--api_token", "s3cret"], ["--api-token=s3cret"], ["--api-token", "s3cret"]):
        assert cli.parse([*SIM, "--server=tcp://a:1", *words]).api_token == "s3cret"
        shown = without_secrets(["p", *words, "--x"])
        assert "s3cret" not in " ".join(shown)
        assert shown[-1] == "--x"


def test_a_token_in_a_file_is_not_in_the_process_list(tmp_path: Path) -> None:
    (file := tmp_path / "secret.yaml").write_text("api_token: s3cret\n")
    assert serve.main.parse([f"--config_path={file}", "--model_path=m"]).api_token == "s3cret"
    assert cli.parse([*SIM, f"--config_path={file}", "--server=tcp://a:1"]).api_token == "s3cret"
