"""The command line: what it accepts, how it refuses, and what it exits with. The policy and the arm are fakes, the flags are real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from control_fakes import FakeClock, FakePolicy, FakeRobot, policy_metadata

from gr00t_fast.cli import run as cli
from gr00t_fast.cli import run as script
from gr00t_fast.contracts import LandingReport
from gr00t_fast.control.recorder import DatasetRecorder
from gr00t_fast.errors import CheckpointError, MissingExtraError, RobotError
from gr00t_fast.flags import flags_of
from gr00t_fast.robots.config import OpenCVCameraConfig, SO100FollowerConfig, SO100SimConfig

ROOT = Path(__file__).parent.parent
ISSUE = [
    "--robot.type=so100_follower",
    "--robot.port=/dev/tty.usbmodem58FA0921581",
    "--robot.id=black",
    "--robot.cameras={ front: {type: opencv, index_or_path: 1, width: 1280, height: 720, fps: 30}}",
    "--model_path=./gr00t-n1.5-so100-finetuned",
    "--embodiment_tag=new_embodiment",
    "--data_config=so100",
    "--denoising_steps=2",
    "--lang_instruction=Place the block in the bowl",
    "--action_horizon=8",
]
SIM = ["--robot.type=so100_sim", "--model_path=m", "--lang_instruction=go"]


def test_the_well_known_command_line_parses_as_printed() -> None:
    config = cli.parse(ISSUE)
    assert config.robot == SO100FollowerConfig(
        id="black",
        port="/dev/tty.usbmodem58FA0921581",
        cameras={"front": OpenCVCameraConfig(width=1280, height=720, fps=30, index_or_path=1)},
    )
    assert (config.model_path, config.embodiment_tag, config.data_config) == ("./gr00t-n1.5-so100-finetuned", "new_embodiment", "so100")
    assert (config.denoising_steps, config.action_horizon, config.lang_instruction) == (2, 8, "Place the block in the bowl")


def test_every_other_flag() -> None:
    argv = ["--device=cuda:1", "--precision=bf16", "--engine=eager", "--seed=3", "--processor_path=p", "--prompt_style=nvidia"]
    argv += ["--camera_map={front: webcam}"]
    config = cli.parse(
        [*SIM, *argv, "--show_images", "--timeout=12.5", "--episodes", "2", "--fps=15", "--max_speed_deg_s=null", "--out=o", "--dry_run"]
    )
    assert (config.device, config.precision, config.engine, config.seed) == ("cuda:1", "bf16", "eager", 3)
    assert (config.processor_path, config.prompt_style, config.camera_map) == (Path("p"), "nvidia", {"front": "webcam"})
    assert (config.show_images, config.dry_run, config.timeout, config.episodes, config.fps) == (True, True, 12.5, 2, 15.0)
    assert (config.safety.max_speed_deg_s, config.out) == (None, Path("o"))


TEXTS = [
    *("pick: the cube", "yes", "null", "007", "1e3", "🤖 pick up 红色 cube", "\"quoted\" and 'single'", "{a: b}", "[1, 2", "# no comment"),
    *(
        "- x",
        "a\nb",
        "--dashes",
        "include me",
        "it's 50% & done!",
        "key=value",
        " spaces ",
        "~",
        "*star",
        "!tag",
        "@at",
        "`tick`",
        "\\n",
        "true",
    ),
]


@pytest.mark.parametrize("text", TEXTS)
def test_free_text_arrives_literally(text: str) -> None:
    config = cli.parse([*SIM[:2], f"--lang_instruction={text}", f"--robot.id={text}", f"--model_path={text}", f"--out={text}"])
    assert (config.lang_instruction, config.robot.id, config.model_path, str(config.out)) == (text, text, text, str(Path(text)))


def test_free_text_as_a_separate_word() -> None:
    assert cli.parse([*SIM[:2], "--lang_instruction", "pick: the cube"]).lang_instruction == "pick: the cube"


def test_dashes_are_underscores() -> None:
    assert cli.parse([*SIM[:1], "--lang-instruction=go", "--model-path", "some-where", "--no-record-append"]).record_append is False


SWITCHES = [
    (["--show_images"], True),
    (["--show_images=true"], True),
    (["--show_images", "false"], False),
    (["--show_images=False"], False),
    (["--show_images", "--seed=1"], True),
]


@pytest.mark.parametrize(("words", "expected"), SWITCHES)
def test_switches(words: list[str], expected: bool) -> None:
    assert cli.parse([*SIM, *words]).show_images is expected


FOLLOWER = ISSUE[:2]
BAD = {
    "unknown flag": ([*SIM, "--lang_instructoin=x"], "Did you mean '--lang_instruction'"),
    "abbreviated flag": ([*SIM, "--robot.ta=reach"], "unknown flag '--robot.ta'"),
    "NVIDIA's host": ([*SIM, "--policy_host=robot.local"], "--server=tcp://HOST:PORT"),
    "NVIDIA's port": ([*SIM, "--policy_port", "5555"], "--server=tcp://HOST:PORT"),
    "NVIDIA's other host": ([*SIM, "--host=robot.local"], "--server=tcp://HOST:PORT"),
    "NVIDIA's other port, with a dash": ([*SIM, "--policy-port=5555"], "--server=tcp://HOST:PORT"),
    "NVIDIA's HTTP": ([*SIM, "--http-server"], "gr00t-fast serve --http"),
    "NVIDIA's TensorRT": ([*SIM, "--use-tensorrt"], "--engine=tensorrt"),
    "NVIDIA's engines": ([*SIM, "--trt_engine_path=x"], "--engine_path"),
    "NVIDIA's length of a run": ([*SIM, "--actions_to_execute=350"], "--timeout"),
    "lerobot's checkpoint": ([*SIM, "--policy.path=x"], "--model_path"),
    "lerobot's network": ([*SIM, "--policy.type=groot"], "--model_path"),
    "lerobot's task": ([*SIM, "--dataset.single_task=go"], "--lang_instruction"),
    "lerobot's data set": ([*SIM, "--dataset.repo_id=me/mine"], "--record="),
    "lerobot's episodes": ([*SIM, "--dataset.num_episodes=3"], "--episodes"),
    "lerobot's length": ([*SIM, "--dataset.episode_time_s=3"], "--timeout"),
    "lerobot's pause": ([*SIM, "--dataset.reset_time_s=3"], "--reset_time_s"),
    "lerobot's rate": ([*SIM, "--dataset.fps=30"], "--fps"),
    "lerobot's view": ([*SIM, "--display_data=true"], "--display"),
    "lerobot's resumption": ([*SIM, "--resume=true"], "--record_append"),
    "lerobot's strategy": ([*SIM, "--strategy.type=dagger"], "leave the flag out"),
    "empty pose": ([*SIM, "--home="], "--home is empty"),
    "unknown robot flag": ([*SIM, "--robot.prot=x"], "unknown flag '--robot.prot'. Did you mean '--robot.port'"),
    "single dash": ([*SIM, "-timeout=3"], "unexpected argument '-timeout=3'"),
    "unquoted instruction": (["--lang_instruction=pick", "the", "cube"], "needs quotes"),
    "flag of another robot": ([*SIM, "--robot.port=/dev/x"], "does not apply to --robot.type=so100_sim"),
    "unknown robot": (["--robot.type=so100_folower"], "Did you mean 'so100_follower'"),
    "lerobot's old name of the arm": (["--robot.type=so100", *SIM[1:]], "It is called so100_follower now"),
    "no robot": (["--model_path=m", "--lang_instruction=go"], "--robot.type is missing"),
    "robot flags without a type, and nothing else": (["--robot.port=/dev/x"], "--model_path is missing"),
    "robot flags without a type": (["--robot.port=/dev/x"], "--robot.type is missing"),
    "no port": (["--robot.type=so100_follower", *SIM[1:]], "--robot.port is missing"),
    "empty port": (["--robot.type=so100_follower", "--robot.port=", *SIM[1:]], "lerobot-find-port"),
    "no model": (["--robot.type=so100_sim", "--lang_instruction=go"], "--model_path is missing"),
    "no instruction": (SIM[:2], "--lang_instruction is missing"),
    "empty instruction": ([*SIM, "--lang_instruction="], "--lang_instruction is missing"),
    "blank instruction": ([*SIM, "--lang_instruction=   "], "--lang_instruction is missing"),
    "value missing at the end": ([*SIM, "--seed"], "--seed needs a value"),
    "value missing before a flag": ([*SIM, "--seed", "--dry_run"], "--seed needs a value"),
    "not an int": ([*SIM, "--denoising_steps=two"], "--denoising_steps: 'two' is not a whole number"),
    "words for a number": ([*SIM, "--timeout=long"], "--timeout: 'long' is not a number"),
    "negative pause": ([*SIM, "--reset_time_s=-1"], "from 0"),
    "endless pause": ([*SIM, "--reset_time_s=.inf"], "3600"),
    "float for an int": ([*SIM, "--action_horizon=8.5"], "--action_horizon: "),
    "zero steps": ([*SIM, "--denoising_steps=0"], "at least 1"),
    "negative horizon": ([*SIM, "--action_horizon=-1"], "at least 1"),
    "negative timeout": ([*SIM, "--timeout=-3"], "--timeout=-3"),
    "nan rate": ([*SIM, "--fps=.nan"], "must be from 1 to 200 Hz"),
    "infinite speed": ([*SIM, "--max_speed_deg_s=.inf"], "from 1"),
    "negative seed": ([*SIM, "--seed=-1"], "not be negative"),
    "episodes without end": ([*SIM, "--episodes=2"], "needs --timeout"),
    "unknown device": ([*SIM, "--device=cdua"], "Did you mean 'cuda'"),
    "unknown prompt style": ([*SIM, "--prompt_style=nvidea"], "Did you mean 'nvidia'"),
    "unknown sim task": ([*SIM, "--robot.task=plce"], "Did you mean 'place'"),
    "not a bool": ([*SIM, "--dry_run=maybe"], "neither true nor false"),
    "empty path": ([*SIM, "--out="], "needs a path"),
    "video suffix": ([*SIM, "--video=run.avi"], ".mp4 or .gif"),
    "broken braces": ([*SIM, "--robot.cameras={front: {type: sim"], "--robot.cameras: cannot read"),
    "type without a space": ([*FOLLOWER, "--robot.cameras={front: {type:opencv, width: 640}}"], "space after the colon"),
    "camera without type": ([*FOLLOWER, "--robot.cameras={front: {index_or_path: 0}}"], "has no 'type'"),
    "unknown camera type": ([*FOLLOWER, "--robot.cameras={front: {type: opencvv}}"], "Did you mean 'opencv'"),
    "unknown camera setting": ([*FOLLOWER, "--robot.cameras={front: {type: opencv, widht: 3}}"], "Did you mean 'width'"),
    "camera is a number": ([*FOLLOWER, "--robot.cameras=5"], "expected names with settings"),
    "fractional camera rate": ([*FOLLOWER, "--robot.cameras={front: {type: opencv, fps: 29.97}}"], "--robot.cameras.front.fps"),
    "camera height 0": ([*FOLLOWER, "--robot.cameras={front: {type: opencv, height: 0}}", *SIM[1:]], "--robot.cameras.front.height=0"),
    "negative camera rate": ([*FOLLOWER, "--robot.cameras={front: {type: opencv, fps: -30}}", *SIM[1:]], "--robot.cameras.front.fps=-30"),
    "absurd rate": ([*SIM, "--fps=1e9"], "must be from 1 to 200 Hz"),
    "rate next to zero": ([*SIM, "--fps=1e-300"], "must be from 1 to 200 Hz"),
    "timeout below a tick": ([*SIM, "--timeout=0.001"], "at least one tick"),
    "instruction that is no text": ([*SIM[:2], "--lang_instruction=a\udcffb"], "no UTF-8 text"),
    "camera map is a text": ([*SIM, "--camera_map=front"], "--camera_map: expected names with values in braces"),
    "camera map with an equals sign": ([*SIM, "--camera_map=front=webcam"], 'e.g. "{front: webcam}", got \'front=webcam\'.'),
    "camera map without a space": ([*SIM, "--camera_map={front:webcam}"], "YAML wants a space after the colon"),
    "missing config file": ([*SIM, "--config_path=/nowhere.yaml"], "cannot read '/nowhere.yaml'"),
    "config path is a directory": ([*SIM, "--config_path=/"], "cannot read '/': / is a directory"),
    "lerobot's network by name": ([*SIM, "--policy_type=groot"], "unknown flag '--policy_type'. See"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line_and_exit_code_2(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv, message = BAD[case]
    assert script.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert "<class" not in captured.err


FILES = {
    "unknown setting": ("model_pth: x\n", "unknown setting 'model_pth'"),
    "unknown robot setting": ("robot: {type: so100_sim, tsak: place}\n", "unknown setting 'robot.tsak'"),
    "text read as a bool": ("lang_instruction: yes\n", "put the text in quotes"),
    "id read as a number": ("robot: {type: so100_sim, id: 007}\n", "put the text in quotes"),
    "text read as a mapping": ("lang_instruction: {pick: the cube}\n", "put the text in quotes"),
    "another file": ("config_path: other.yaml\n", "config_path"),
    "not YAML": ("a: [1\n", "cannot read"),
    "not text": ("\x00\x01", "cannot read"),
    "a list": ("- a\n", "holds no settings"),
    "empty": ("", "holds no settings"),
    "unknown type": ("robot: {type: so1000}\n", "so1000"),
    "text for a group": ("robot: so100_sim\n", "`robot: {type: so100_sim}`"),
    "yes for a number": ("timeout: yes\n", "timeout: expected a number such as 30"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_bad_config_file(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = FILES[case]
    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert script.main([f"--config_path={path}", "--model_path=m", *([] if "lang" in content else SIM[2:])]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_presets_parse_and_flags_win() -> None:
    real = cli.parse([f"--config_path={ROOT}/configs/so100.yaml", "--robot.port=/dev/ttyACM0", *SIM[1:]])
    assert real.robot.cameras["front"].width == 640
    assert (real.robot.id, real.action_horizon, real.safety.max_speed_deg_s) == ("black", 8, "auto")
    sim = cli.parse([f"--config_path={ROOT}/configs/so100_sim.yaml", "--model_path=m", "--action_horizon=4", "--robot.task=place"])
    assert isinstance(sim.robot, SO100SimConfig)
    assert (sim.action_horizon, sim.robot.task, sim.lang_instruction) == (4, "place", "Reach the block")
    assert (real.data_config, sim.data_config) == (None, None)  # N1.5's default; an N1.7 checkpoint with other keys refuses a name


def test_another_robot_type_than_the_files(capsys: pytest.CaptureFixture[str]) -> None:
    cameras = "--robot.cameras={front: {type: opencv}}"
    config = cli.parse([f"--config_path={ROOT}/configs/so100_sim.yaml", *ISSUE[:2], "--model_path=m", cameras])
    assert config.robot == SO100FollowerConfig(port="/dev/tty.usbmodem58FA0921581", cameras={"front": OpenCVCameraConfig()})
    assert "robot.task of the file does not apply" in capsys.readouterr().err


def test_a_cameras_flag_replaces_the_files_cameras() -> None:
    argv = [f"--config_path={ROOT}/configs/so100_sim.yaml", "--model_path=m", "--robot.cameras={wrist: {type: sim, view: wrist}}"]
    assert list(cli.parse(argv).robot.cameras) == ["wrist"]


def test_a_rendered_camera_on_a_servo_bus_is_said_to_be_one(capsys: pytest.CaptureFixture[str]) -> None:
    cli.parse([*FOLLOWER, "--robot.cameras={front: {type: sim}}", *SIM[1:]])
    assert "camera front has type sim: it draws the simulated scene" in capsys.readouterr().err
    cli.parse([*SIM])
    assert capsys.readouterr().err == ""


def test_the_pause_between_episodes_is_for_arms_whose_scene_somebody_puts_back() -> None:
    assert cli.reset_time_s(cli.parse(ISSUE)) == 10
    assert cli.reset_time_s(cli.parse(SIM)) == 0
    assert cli.reset_time_s(cli.parse([*SIM, "--reset_time_s=2.5"])) == 2.5


def checkpoint_of(directory: Path, horizon: object = 16, cameras: tuple[str, ...] = ("webcam",)) -> str:
    """The two small files of a checkpoint that are looked at before torch is imported."""
    (directory / "experiment_cfg").mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"action_head_cfg": {"action_horizon": horizon}}))
    entry = {"modalities": {"video": {name: {} for name in cameras}}}
    (directory / "experiment_cfg" / "metadata.json").write_text(json.dumps({"new_embodiment": entry}))
    return f"--model_path={directory}"


CONTRADICTIONS = {
    "long horizon": ("--action_horizon=20", "--action_horizon=20 is more than the 16 actions"),
    "another embodiment": ("--embodiment_tag=so100", "It has: --embodiment_tag=new_embodiment."),
    "other cameras": ("--data_config=so100_dualcam", "was trained with video.webcam. Use --data_config=so100."),
    "no data config": ("--data_config=so10", "Did you mean 'so100'"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_flags_that_contradict_the_checkpoint_are_told_before_it_is_loaded(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flag, message = CONTRADICTIONS[case]
    assert script.main([*SIM, checkpoint_of(tmp_path), flag]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "loading" not in captured.out


def test_a_checkpoint_that_is_odd_is_left_for_loading_to_explain(tmp_path: Path) -> None:
    script.check_checkpoint(cli.parse([*SIM, checkpoint_of(tmp_path / "good"), "--embodiment_tag=NEW_EMBODIMENT"]))  # a name of NVIDIA's
    config = cli.parse([*SIM, checkpoint_of(tmp_path, horizon="many"), "--action_horizon=20"])
    script.check_checkpoint(config)
    (tmp_path / "config.json").unlink()
    script.check_checkpoint(config)


class World:
    """A fake policy and a fake arm behind the real program."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.policy, self.robot = FakePolicy(FakeClock()), FakeRobot(FakeClock())
        self.load = lambda config: self.policy
        monkeypatch.setattr(script, "load", lambda config: self.load(config))
        monkeypatch.setattr(script, "build_robot", lambda config: self.robot)

    def run(self, *argv: str) -> int:
        return script.main([*SIM, "--timeout=0.25", *argv])


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def raising(error: BaseException):
    def hook(*_: object) -> None:
        raise error

    return hook


def test_a_run_leaves_everything_behind(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert world.run(f"--out={out}", f"--video={tmp_path / 'run.mp4'}", "--action_horizon=4", "--show_images", "--controller=sync") == 0
    assert sorted(path.name for path in out.iterdir()) == ["joints.png", "report.html", "report.json", "report.txt", "run.csv", "run.npz"]
    assert (tmp_path / "run.mp4").stat().st_size > 0
    report = json.loads((out / "report.json").read_text())
    assert report["run"]["ended_by"] == "done"
    assert report["settings"]["robot"]["type"] == "so100_sim"
    assert report["settings"]["action_horizon"] == 4
    printed = capsys.readouterr().out
    assert "Direct inference time: 0." in printed
    assert "Loop 1: 0." in printed
    starts = [printed.index(words) for words in ("loading m ...", "warming up ...", "ready: 4 of 16 actions", "connecting to the arm ...", "Direct")]
    assert starts == sorted(starts)
    assert "instruction: 'go'" in printed
    assert "ended by the time limit" in printed
    assert world.policy.warmed_up == "go"
    assert world.robot.calls == ["connect", "reset", "land"]


def test_everything_that_can_fail_comes_before_the_arm(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert world.run(f"--out={tmp_path / 'file' / 'x'}") == 2
    assert world.run(f"--video={tmp_path / 'file' / 'x.mp4'}") == 2
    world.policy.metadata = policy_metadata(tag="gr1")
    assert world.run() == 1
    world.policy.metadata = FakePolicy(FakeClock()).metadata
    world.policy.warm_up = raising(MissingExtraError("pip install 'gr00t_fast[x]'"))
    assert world.run() == 1
    world.load = raising(CheckpointError("no metadata in 'm'"))
    assert world.run() == 1
    assert world.robot.calls == []
    error = capsys.readouterr().err
    assert "error: no metadata in 'm'" in error
    assert "Traceback" not in error


def test_errors_of_the_arm_exit_1_after_landing(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.robot.on_send = lambda: len(world.robot.sent) == 2 and raising(RobotError("servo 3 is silent"))()
    assert world.run() == 1
    assert world.robot.calls[-1] == "land"
    captured = capsys.readouterr()
    assert captured.err == "error: servo 3 is silent\n"
    assert "ended by error" in captured.out  # the report of what was done


def test_a_recording_that_cannot_be_reported_does_not_hide_why_the_run_ended(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    close, told = DatasetRecorder.close, []

    def close_and_fail_once(recorder: DatasetRecorder) -> None:
        close(recorder)
        if not told:
            told.append(True)
            raise BrokenPipeError("nobody reads")

    monkeypatch.setattr(DatasetRecorder, "close", close_and_fail_once)
    world.robot.on_send = lambda: len(world.robot.sent) == 2 and raising(RobotError("servo 3 is silent"))()
    assert world.run(f"--record={tmp_path / 'set'}") == 1
    assert told
    assert "error: servo 3 is silent" in capsys.readouterr().err


def test_an_arm_that_never_moved_gets_no_report(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world.robot.on_observe = raising(RobotError("camera 'front' cannot be opened"))
    assert world.run(f"--out={tmp_path}") == 1
    assert not list(tmp_path.iterdir()), "the corrected command runs as it is"
    captured = capsys.readouterr()
    assert captured.err == "error: camera 'front' cannot be opened\n"
    assert captured.out.splitlines()[-2:] == ["connecting to the arm ...", "The arm was not moved: the run ended before the first target was sent."]


def test_a_target_that_may_have_arrived_is_a_move(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.robot.on_send = raising(RobotError("servo 3 is silent"))
    assert world.run() == 1
    assert "was not moved" not in capsys.readouterr().out


def test_a_reader_that_goes_away_lands_the_arm_and_is_named(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    world.robot.on_send = lambda: len(world.robot.sent) == 2 and os.close(reader)
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert world.run() == 1
    assert world.robot.calls[-1] == "land"
    assert capsys.readouterr().err == "error: nobody reads this program's output any more (a closed pipe, as with `| head`); the run has ended.\n"


def test_unsafe_actions_exit_1_after_landing(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.policy.on_action = lambda targets: targets * np.nan
    assert world.run("--max_held_ticks=2") == 1
    assert world.robot.calls[-1] == "land"
    assert "NaN" in capsys.readouterr().err


def test_bugs_keep_their_traceback_but_the_arm_lands(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.policy.on_action = raising(ZeroDivisionError())
    assert world.run() == 1
    assert world.robot.calls[-1] == "land"
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "ZeroDivisionError" in said


def test_verbose_shows_the_traceback_of_user_errors(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.load = raising(CheckpointError("damaged"))
    assert world.run("--verbose") == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_unsafe_landing_is_an_error_whatever_else(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.robot.landing = LandingReport({"gripper": "unknown"}, True, True, ["servo 6 did not answer"])
    assert world.run() == 1
    assert "MAY STILL BE POWERED: servo 6 did not answer" in capsys.readouterr().err


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


def test_signals_have_their_usual_effect_once_the_arm_has_landed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []
    monkeypatch.setattr(script.Outputs, "write", lambda *_, **__: seen.append(signal.getsignal(signal.SIGTERM)))
    assert world.run() == 0
    assert seen == [before]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("phase", ["load", "run"])
def test_signals_end_with_the_shells_exit_code(world: World, number: int, code: int, phase: str, capsys: pytest.CaptureFixture[str]) -> None:
    if phase == "load":
        world.load = lambda config: signal.raise_signal(number)
    else:
        world.policy.on_action = lambda targets: (signal.raise_signal(number), targets)[1]
    assert world.run() == code
    assert world.robot.calls == ([] if phase == "load" else ["connect", "reset", "land"])


def test_dry_run_sends_nothing(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert world.run("--dry_run") == 0
    assert world.robot.sent == []
    assert "nothing was sent" in capsys.readouterr().out


def test_preflight_warnings_are_printed_and_reported(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world.policy.metadata = policy_metadata(tag="gr1", cameras={"webcam": (16, 9)})
    assert world.run("--preflight=warn", f"--out={tmp_path}") == 0
    warnings = json.loads((tmp_path / "report.json").read_text())["warnings"]
    assert any("gr1" in warning for warning in warnings)
    assert any("ASPECT RATIO" in warning for warning in warnings)
    printed = capsys.readouterr().out
    assert [printed.count("frames are resized"), printed.count("camera 'front' is the policy's")] == [2, 2]
    first, motion, again = printed.index("frames are resized"), printed.index("Direct inference"), printed.rindex("frames are resized")
    assert first < motion < again  # said once more after all the lines that may have buried it
    assert "frames are resized" in (tmp_path / "report.txt").read_text()


def program(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "so100_inference_optimized.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)


def test_help_is_quick_and_short_and_loads_nothing_heavy() -> None:
    probe = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['x', '--help']\n"
        "import so100_inference_optimized as s; assert s.main() == 0\n"
        "print('HEAVY', [m for m in ('torch', 'lerobot', 'mujoco', 'cv2', 'matplotlib', 'transformers') if m in sys.modules])\n"
        "import time; print('CPU', time.process_time())"  # what it costs, whatever else the machine does
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True)
    shown, _, told = done.stdout.partition("HEAVY ")
    assert told.startswith("[]")
    assert float(told.rpartition("CPU")[2]) < 1.5, "seconds; a fifth of it on a quiet machine"
    assert len(shown.splitlines()) <= 45
    for part in ("--robot.port", "--lang_instruction", "checkpoint:", "arm:", "task:", "motion:", "safety:", "outputs:", "--help-all"):
        assert part in shown


def test_help_all_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--help-all"]) == 0
    shown = capsys.readouterr().out
    for flag in flags_of(cli.RunConfig):
        assert flag.help, flag.name
        assert f"--{flag.name}=" in shown


def test_as_a_program() -> None:
    assert program("--help").returncode == 0
    bad = program(*ISSUE, "--bogus=1")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: unknown flag '--bogus'")
