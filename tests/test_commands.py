"""The command `gr00t-fast` and the names that its subcommands had before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import typing
import venv
from pathlib import Path

import pytest

from gr00t_fast.cli import doctor, export, shared_flags
from gr00t_fast.cli.main import COMMANDS, command, main
from gr00t_fast.cli.run import parse, settings_of
from gr00t_fast.flags import UsageError

ROOT = Path(__file__).parent.parent
TRAINED = ROOT / "checkpoints" / "so100-sim-reach"
FORMER = [
    *(["export/to_onnx.py"], ["export/to_tensorrt.py"], ["export/quantise.py"], ["export/calibrate.py"], ["export/verify.py"]),
    *(["so100_inference_optimized.py"], ["-m", "gr00t_fast.serving"]),
    *(["-m", "gr00t_fast", "run"], ["-m", "benchmarks.lib.random_checkpoint"]),
]


def program(*words: str, cwd: Path = ROOT, python: str = sys.executable, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([python, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)


def cpu_s() -> float:
    """Processor time of the programs that have ended: what they cost, whatever else the machine does."""
    times = os.times()
    return times.children_user + times.children_system


def test_help_names_every_subcommand_at_once_and_without_torch() -> None:
    probe = "import sys; from gr00t_fast.cli.main import main; main(['--help']); print('HEAVY', [m for m in ('torch', 'numpy') if m in sys.modules])"
    before_s = cpu_s()
    done = program("-c", probe)
    assert cpu_s() - before_s < 3
    assert "HEAVY []" in done.stdout
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


def test_help_of_a_subcommand_loads_no_torch() -> None:
    """It takes seconds to import."""
    helps = "; ".join(f"main({[*name.split(), '--help']!r})" for name in COMMANDS)
    done = program("-c", f"import sys; from gr00t_fast.cli.main import main; {helps}; print('HEAVY', 'torch' in sys.modules)")
    assert done.stdout.endswith("HEAVY False\n"), done.stderr


@pytest.mark.parametrize(
    ("words", "said"), [(["rnu"], "Did you mean 'run'"), (["export", "onxx"], "Did you mean 'export onnx'"), ([], "which command")]
)
def test_a_word_that_is_no_subcommand(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_a_group_without_a_name_says_what_there_is_to_choose(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert [line.split()[:2] for line in told if line.startswith("  ")] == [["export", "onnx"], ["export", "tensorrt"]]


RUN_ALONE = {"robot": {"type": "so100_sim"}, "episodes": 3, "engine": "eager"}


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("export onnx", ["--out=o"]),
        ("export tensorrt", ["--out=o"]),
        ("quantise", ["--out=o", "--onnx=x", "--target=onnxruntime"]),
        ("calibrate", ["--out=o", "--observations=random:0"]),
        ("verify", ["--out=o", "--engine=openvino"]),
    ],
)
def test_exports_read_the_file_of_ones_runs_and_their_own(tmp_path: Path, name: str, flags: list[str]) -> None:
    """Of a run's file what both have counts, but for what means something else: where the run's report goes, its number format and its seed."""
    both = {"model_path": "m", "data_config": "so100_dualcam", "denoising_steps": 2}
    file = tmp_path / "file.json"
    for content, verbose in ((RUN_ALONE | {"verbose": True, "out": "run", "precision": "auto", "seed": 7}, False), ({"verbose": True}, True)):
        file.write_text(json.dumps(both | content))
        config = command(name).parse([f"--config_path={file}", *flags])
        assert (config.model_path, config.data_config, config.out, config.verbose) == ("m", "so100_dualcam", Path("o"), verbose)
        assert config.denoising_steps in (2, [2])
        assert getattr(config, "seed", 0) == 0
    file.write_text(json.dumps(both | {"otu": "typo"}))
    with pytest.raises(UsageError, match="otu"):
        command(name).parse([f"--config_path={file}", *flags])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_of_every_subcommand_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*name.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: gr00t-fast {name}")
    assert "exit codes:" in shown or name == "bus"
    assert main([*name.split(), "--bogus=1"]) == 2
    assert "unknown flag '--bogus'" in capsys.readouterr().err


@pytest.mark.parametrize("words", FORMER, ids=" ".join)
def test_the_former_names_still_work(words: list[str]) -> None:
    done = program(*words, "--bogus=1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown flag '--bogus'")


def test_the_words_for_engines_and_precisions_are_those_of_the_engines() -> None:
    from gr00t_fast.engine.base import PRECISIONS
    from gr00t_fast.engine.choose import CALIBRATED, ENGINES, EXPORTED
    from gr00t_fast.engine.quantized import PARTS

    assert set(typing.get_args(shared_flags.EngineName)) == {"auto", *ENGINES, *CALIBRATED, *EXPORTED}
    assert set(typing.get_args(shared_flags.ExportedName)) == set(EXPORTED)
    assert typing.get_args(export.ExportPrecision) == tuple(PRECISIONS)
    assert typing.get_args(export.PartName) == tuple(PARTS)


def test_a_report_can_be_played_again(tmp_path: Path) -> None:
    cameras = "--robot.cameras={front: {type: sim, view: wrist, width: 320}}"
    config = parse(["--robot.type=so100_sim", cameras, "--model_path=m", "--lang_instruction=yes", "--seed=3", "--max_hold_s=null", "--fps=1e1"])
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"schema": "gr00t_fast.run_report", "settings": settings_of(config)}))
    assert parse([f"--config_path={report}"]) == config


def test_a_run_does_not_replace_an_earlier_one_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.json").write_text("{}")
    assert main(["run", "--robot.type=so100_sim", f"--model_path={TRAINED}", "--lang_instruction=go", f"--out={tmp_path}"]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_the_doctor_tells_what_is_missing_and_what_is_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", f"--model_path={TRAINED}", "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["ok"]
    assert any("640x480" in row["what"] for row in result["rows"])
    assert "ready: " in captured.err
    arm = ["--robot.type=so100_follower", "--robot.port=/nowhere", "--robot.id=x", f"--robot.calibration_dir={tmp_path}"]
    assert main(["doctor", *arm, "--robot.cameras={front: {type: opencv, index_or_path: /nowhere/video}}"]) == 1
    shown = capsys.readouterr().out
    assert "/nowhere does not exist" in shown
    assert "lerobot-calibrate" in shown


def test_the_doctor_names_a_checkpoint_that_is_not_there() -> None:
    _, rows = doctor.network(doctor.main.parse(["--model_path=/nowhere"]))
    assert [row.section for row in rows if row.state == "fail"] == ["checkpoint"]


def test_a_wheel_installed_outside_the_checkout_drives_the_simulated_arm(tmp_path: Path) -> None:
    """Built from the sdist, offline, and installed without its dependencies, which come from this environment."""
    pytest.importorskip("mujoco", reason="needs `pip install 'gr00t_fast[sim]'`")
    build = "import sys; out = sys.argv[1]; from setuptools import build_meta as b; b.build_sdist(out); b.build_wheel(out)"  # it changes sys.argv
    source = tmp_path / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "gr00t_fast", "*.cfg", "*.toml", "README.md", "LICENSE"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split("\0"):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    done = program("-c", build, str(tmp_path / "dist"), cwd=source, PYTHONPATH="")
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert list((tmp_path / "dist").glob("*.tar.gz"))
    home = tmp_path / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    (site,) = home.glob("lib/python*/site-packages")
    packages = [path for path in sys.path if path.endswith("site-packages")]
    command = [sys.executable, "-m", "pip", f"--python={home}", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}  # else pip finds the checkout, and has nothing to install
    installed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert installed.returncode == 0, installed.stderr
    (site / "others.pth").write_text("\n".join(packages))
    script, outside = home / "bin" / "gr00t-fast", tmp_path / "elsewhere"
    outside.mkdir()
    before_s = cpu_s()
    shown = subprocess.run([script, "--help"], cwd=outside, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert cpu_s() - before_s < 3
    assert "export tensorrt" in shown.stdout
    where = subprocess.run(
        [home / "bin" / "python", "-c", "import gr00t_fast; print(gr00t_fast.__file__)"],
        cwd=outside,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(home) in where.stdout
    flags = ["--robot.type=so100_sim", "--robot.task=reach", "--robot.cameras={front: {type: sim}}", f"--model_path={TRAINED}"]
    flags += ["--lang_instruction=Reach the block", "--timeout=1", "--out=run", "--quiet", "--device=cpu"]
    ran = subprocess.run([script, "run", *flags], cwd=outside, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "landing safe" in ran.stdout
    assert json.loads((outside / "run" / "report.json").read_text())["run"]["ticks"] > 0
