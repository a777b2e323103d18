"""The command line: what it accepts, how it refuses, and what it exits with. The policy and the arm are fakes, the flags are real."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from control_fakes import FakeClock, FakePolicy, FakeRobot, policy_metadata

from gr00t_fast.base.contracts import LandingReport
from gr00t_fast.base.errors import CheckpointError, MissingExtraError, RobotError
from gr00t_fast.cli import run as cli
from gr00t_fast.cli.main import main
from gr00t_fast.robots import OpenCVCameraConfig, SO100FollowerConfig, SO100SimConfig

ROOT = Path(__file__).resolve().parents[3]
ISSUE = shlex.split(
    "--robot.type=so100_follower --robot.port=/dev/tty.usbmodem58FA0921581 --robot.id=black "
    "--robot.cameras='{ front: {type: opencv, index_or_path: 1, width: 1280, height: 720, fps: 30}}' "
    "--model_path=./gr00t-n1.5-so100-finetuned --embodiment_tag=new_embodiment --data_config=so100 "
    "--denoising_steps=2 --lang_instruction='Place the block in the bowl' --action_horizon=8"
)
SIM = ["--robot.type=so100_sim", "--model_path=m", "--lang_instruction=go"]


def test_the_well_known_command_line_parses_as_printed() -> None:
    config = cli.parse(ISSUE)
    cameras = {"front": OpenCVCameraConfig(width=1280, height=720, fps=30, index_or_path=1)}
    assert config.robot == SO100FollowerConfig(id="black", port="/dev/tty.usbmodem58FA0921581", cameras=cameras)
    assert (config.model_path, config.embodiment_tag, config.data_config) == ("./gr00t-n1.5-so100-finetuned", "new_embodiment", "so100")
    assert (config.denoising_steps, config.action_horizon, config.lang_instruction) == (2, 8, "Place the block in the bowl")


def test_ways_to_write_a_flag() -> None:
    config = cli.parse([*SIM, "--lang-instruction=went", "--no-overwrite", "--verbose", "--timeout=null", "--seed", "3", "--camera_map={a: b}"])
    assert (config.lang_instruction, config.overwrite, config.verbose, config.timeout) == ("went", False, True, None)
    assert (config.seed, config.camera_map) == (3, {"a": "b"})


OTHERS = {  # flags of other programs -> whose they are, and what is said to use
    "run --strategy.type=dagger": ("lerobot's", "lerobot-rollout"),
    "run --dataset.push_to_hub=true": ("lerobot's", "hf upload"),
    "run --policy.path=x": ("lerobot's", "--model_path"),
    "run --policy.n_action_steps=8": ("lerobot's", "--action_horizon"),
    "run --robot.position_p_coefficient=24": ("lerobot's", "16, 0 and 32"),
    "run --policy_host=robot.local": ("NVIDIA's", "--server"),
    "eval --dataset_path=x": ("NVIDIA's", "--dataset="),
    "eval --trajs=3": ("NVIDIA's", "--episodes"),
    "eval --steps=150": ("NVIDIA's", "--denoising_steps"),
    "eval --plot": ("NVIDIA's", "no plot"),
    "eval --modality_keys single_arm": ("NVIDIA's", "all joints"),
    "serve --use_sim_policy_wrapper": ("NVIDIA's", "nested and flat"),
}


@pytest.mark.parametrize("line", OTHERS)
def test_a_flag_of_another_program_names_its_owner_and_what_to_use(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    owner, remedy = OTHERS[line]
    assert main(line.split()) == 2
    told = capsys.readouterr().err
    assert f"which is {owner}." in told
    assert remedy in told
    assert not ("leave the flag out" in told and owner == "lerobot's"), "takeover and upload do not exist here, they are not needless"


@pytest.mark.parametrize("written", ["text", "nothing"])
def test_null_unsets_what_a_file_sets(written: str, tmp_path: Path) -> None:
    """A required text is literal: `null` is an instruction like another. The file itself can say it, too."""
    unset = {"out": None, "video": None, "record": "", "server": "", "engine_path": None, "revision": None, "display": None, "timeout": None}
    (tmp_path / "run.yaml").write_text("".join(f"{name}: {'x.mp4' if written == 'text' and name != 'timeout' else 'null'}\n" for name in unset))
    flags = [f"--{name}=null" for name in unset] if written == "text" else []
    config = cli.parse([f"--config_path={tmp_path}/run.yaml", *SIM[:2], "--lang_instruction=null", *flags])
    assert {name: getattr(config, name) for name in unset} == unset
    assert config.lang_instruction == "null"


FOLLOWER = ISSUE[:2]
BAD = {
    "unknown flag": ([*SIM, "--lang_instructoin=x"], "Did you mean '--lang_instruction'"),
    "NVIDIA's host": ([*SIM, "--policy_host=robot.local"], "--server=tcp://HOST:PORT"),
    "unquoted instruction": (["--lang_instruction=pick", "the", "cube"], "needs quotes"),
    "setting of programs alone": ([*SIM, "--robot.servo_lag_ms=150"], "unknown flag '--robot.servo_lag_ms'"),
    "flag of another robot": ([*SIM, "--robot.port=/dev/x"], "does not apply to --robot.type=so100_sim"),
    "two arms of lerobot's": (["--robot.type=bi_so101_follower", *SIM[1:]], "drives one arm"),
    "lerobot's old name of the arm": (["--robot.type=so100", *SIM[1:]], "Expected so100_follower"),
    "no instruction": (SIM[:2], "--lang_instruction is missing"),
    "not an int": ([*SIM, "--denoising_steps=two"], "--denoising_steps: 'two' is not a whole number"),
    "episodes without end": ([*SIM, "--episodes=2"], "needs --timeout"),
    "no data config": ([*SIM, "--data_config=so10"], "Did you mean 'so100'"),
    "video suffix": ([*SIM, "--video=run.avi"], ".mp4 or .gif"),
    "unknown camera setting": ([*FOLLOWER, "--robot.cameras={front: {type: opencv, widht: 3}}"], "Did you mean 'width'"),
    "negative camera rate": ([*FOLLOWER, "--robot.cameras={front: {type: opencv, fps: -30}}", *SIM[1:]], "--robot.cameras.front.fps=-30"),
    "instruction that is no text": ([*SIM[:2], "--lang_instruction=a\udcffb"], "no UTF-8 text"),
    "camera map with an equals sign": ([*SIM, "--camera_map=front=webcam"], 'e.g. "{front: webcam}", got \'front=webcam\'.'),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line_and_exit_code_2(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv, message = BAD[case]
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


BOMB = "a: &a [x, x]\n" + "".join(f"{this}: &{this} [*{last}, *{last}]\n" for last, this in zip("abcdefgh", "bcdefghi", strict=True))
FILES = {
    "unknown setting": ("model_pth: x\n", "unknown setting 'model_pth'"),
    "text read as a bool": ("lang_instruction: yes\n", "put the text in quotes"),
    "text for a group": ("robot: so100_sim\n", "`robot: {type: so100_sim}`"),
    "more than any memory holds": (BOMB, "references"),
    "a name twice": ("seed: 1\nseed: 2", "twice"),
    "nested deeply": ("[" * 100_000, "cannot read"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_bad_config_file(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    content, message = FILES[case]
    Path("run.yaml").write_text(content)
    assert cli.main(["--config_path=run.yaml", "--model_path=m", *([] if "lang" in content else SIM[2:])]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_presets_parse_and_flags_win(capsys: pytest.CaptureFixture[str]) -> None:
    real = cli.parse([f"--config_path={ROOT}/configs/so100.yaml", "--robot.port=/dev/ttyACM0", *SIM[1:]])
    assert (real.robot.id, real.robot.cameras["front"].width, real.action_horizon) == ("black", 640, 8)
    sim = cli.parse([f"--config_path={ROOT}/configs/so100_sim.yaml", "--model_path=m", "--action_horizon=4", "--robot.task=place"])
    assert isinstance(sim.robot, SO100SimConfig)
    assert (sim.action_horizon, sim.robot.task, sim.lang_instruction) == (4, "place", "Reach the block")
    assert (real.data_config, sim.data_config) == (None, None)  # N1.5's default; an N1.7 checkpoint with other keys refuses a name
    other = cli.parse([f"--config_path={ROOT}/configs/so100_sim.yaml", *FOLLOWER, "--model_path=m", "--robot.cameras={front: {type: sim}}"])
    assert isinstance(other.robot, SO100FollowerConfig)
    told = capsys.readouterr().err
    assert "robot.task" in told
    assert "camera front has type sim" in told


class World:
    """A fake policy and a fake arm behind the real program."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.policy, self.robot = FakePolicy(FakeClock()), FakeRobot(FakeClock())
        self.load = lambda config: self.policy
        monkeypatch.setattr(cli, "load", lambda config: self.load(config))
        monkeypatch.setattr(cli, "build_robot", lambda config: self.robot)

    def run(self, *argv: str) -> int:
        return cli.main([*SIM, "--timeout=0.25", *argv])


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def raising(error: BaseException):
    def hook(*_: object) -> None:
        raise error

    return hook


def test_a_run_leaves_everything_behind(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    world.policy.metadata = policy_metadata(cameras={"webcam": (16, 9)})
    words = [f"--out={out}", f"--video={tmp_path / 'run.mp4'}", "--action_horizon=4", "--controller=sync", "--preflight=warn"]
    assert world.run(*words) == 0
    assert sorted(path.name for path in out.iterdir()) == ["joints.png", "report.html", "report.json", "report.txt", "run.csv", "run.npz"]
    assert (tmp_path / "run.mp4").stat().st_size > 0
    columns = (out / "run.csv").read_text().partition("\n")[0].split(",")
    assert (columns[:2], columns[-1], len(columns)) == (["time_s", "episode"], "underrun", 21)
    report = json.loads((out / "report.json").read_text())
    assert report["run"]["ended_by"] == "done"
    assert (report["settings"]["robot"]["type"], report["settings"]["action_horizon"]) == ("so100_sim", 4)
    assert any("ASPECT RATIO" in warning for warning in report["warnings"])
    printed = capsys.readouterr().out
    starts = [printed.index(words) for words in ("loading m ...", "warming up ...", "ready: 4 of 16 actions", "connecting to the arm ...", "Direct")]
    assert starts == sorted(starts)
    assert "frames are resized" in printed[printed.rindex("Direct inference time") :], "said once more after all the lines that may have buried it"
    assert "ended by the time limit" in printed
    assert world.policy.warmed_up == "go"
    assert world.robot.calls == ["connect", "reset", "land"]


def test_everything_that_can_fail_comes_before_the_arm(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "report.json").write_text("{}")
    assert world.run(f"--out={tmp_path}") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert world.run(f"--out={tmp_path / 'file' / 'x'}") == 2
    assert world.run(f"--video={tmp_path / 'file' / 'x.mp4'}") == 2
    world.policy.warm_up = raising(MissingExtraError("pip install 'gr00t_fast[x]'"))
    assert world.run() == 1
    world.load = raising(CheckpointError("no metadata in 'm'"))
    assert world.run() == 1
    assert world.robot.calls == []
    error = capsys.readouterr().err
    assert "error: no metadata in 'm'" in error
    assert "Traceback" not in error
    assert world.run("--verbose") == 1
    assert "Traceback" in capsys.readouterr().err


def _silent_servo(world: World) -> None:
    world.robot.on_send = lambda: len(world.robot.sent) == 2 and raising(RobotError("servo 3 is silent"))()


@pytest.mark.parametrize(
    ("spoil", "told", "traceback"),
    [
        (_silent_servo, "error: servo 3 is silent", False),
        (lambda world: setattr(world.policy, "on_action", lambda targets: targets * np.nan), "NaN", False),
        (lambda world: setattr(world.policy, "on_action", raising(ZeroDivisionError())), "ZeroDivisionError", True),  # a bug keeps its traceback
    ],
)
def test_whatever_fails_the_arm_is_put_down_and_the_exit_code_is_1(
    spoil: Callable[[World], None], told: str, traceback: bool, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(world)
    assert world.run("--timeout=1") == 1
    assert world.robot.calls[-1] == "land"
    captured = capsys.readouterr()
    assert told in captured.err
    assert ("Traceback" in captured.err) == traceback
    assert traceback or "ended by" in captured.out, "the report of what was done"


def test_an_arm_that_never_moved_gets_no_report(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world.robot.on_observe = raising(RobotError("camera 'front' cannot be opened"))
    assert world.run(f"--out={tmp_path}") == 1
    assert not list(tmp_path.iterdir()), "the corrected command runs as it is"
    assert "was not moved" in capsys.readouterr().out


def test_a_reader_that_goes_away_lands_the_arm_and_is_named(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    world.robot.on_send = lambda: len(world.robot.sent) == 2 and os.close(reader)
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert world.run() == 1
    assert world.robot.calls[-1] == "land"
    assert "nobody reads this program's output" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_hides_neither_the_error_nor_the_powered_arm(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def dies() -> None:
        if len(world.robot.sent) == 2:
            (tmp_path / "report.json").mkdir()
            raise RobotError("servo 3 is silent")

    world.robot.on_send = dies
    world.robot.landing = LandingReport({"gripper": "unknown"}, True, True, ["servo 6 did not answer"])
    assert world.run(f"--out={tmp_path}") == 1
    captured = capsys.readouterr()
    powered, warning, error = captured.err.splitlines()
    assert "MAY STILL BE POWERED: servo 6 did not answer" in powered
    assert warning.startswith("WARNING: the report of the run could not be written: --out")
    assert error == "error: servo 3 is silent"
    assert "ended by error" in captured.out


@pytest.mark.parametrize(("number", "code", "phase"), [(signal.SIGINT, 130, "load"), (signal.SIGTERM, 143, "run")])
def test_signals_end_with_the_shells_exit_code(world: World, number: int, code: int, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = signal.getsignal(number), []
    monkeypatch.setattr(cli.Outputs, "write", lambda *_, **__: seen.append(signal.getsignal(number)))
    if phase == "load":
        world.load = lambda config: signal.raise_signal(number)
    else:
        world.policy.on_action = lambda targets: (signal.raise_signal(number), targets)[1]
    assert world.run() == code
    assert world.robot.calls == ([] if phase == "load" else ["connect", "reset", "land"])
    assert seen == ([] if phase == "load" else [before]), "once the arm has landed they have their usual effect"


def test_a_dry_run_sends_nothing_and_leaves_pictures_and_a_table(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert world.run("--dry_run", f"--out={tmp_path}", f"--video={tmp_path / 'cameras.mp4'}") == 0
    assert world.robot.sent == []
    assert "nothing was sent" in capsys.readouterr().out
    assert {"camera_front.png", "cameras.png", "dry_run.txt", "report.json", "cameras.mp4"} <= {file.name for file in tmp_path.iterdir()}
    assert "gripper" in (tmp_path / "dry_run.txt").read_text()
