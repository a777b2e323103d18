"""The command `gr00t-fast` and the names that its subcommands had before."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import typing
import venv
from pathlib import Path

import pytest

from gr00t_fast import options
from gr00t_fast.base.flags import flags_of
from gr00t_fast.cli.main import COMMANDS, command, main
from gr00t_fast.cli.run import parse, settings_of
from gr00t_fast.export import ExportPrecision

ROOT = Path(__file__).resolve().parents[3]
TRAINED = ROOT / "checkpoints" / "so100-sim-reach"
FORMER = [
    *(["export/to_onnx.py"], ["export/to_tensorrt.py"], ["export/quantise.py"], ["export/verify.py"]),
    *(["so100_inference_optimized.py"], ["gr00t_fast.serving"], ["gr00t_fast", "run"]),
]


def program(*words: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)


def test_help_names_every_subcommand_and_loads_nothing_heavy() -> None:
    """torch takes seconds to import."""
    helps = "; ".join(f"main({[*name.split(), '--help']!r})" for name in COMMANDS)
    tell = "print('HEAVY', [m for m in ('torch', 'lerobot', 'mujoco', 'cv2', 'numpy') if m in sys.modules])"
    done = program(sys.executable, "-c", f"import sys; from gr00t_fast.cli.main import main; main(['--help']); {tell}; {helps}; {tell}")
    overview, _, rest = done.stdout.partition("HEAVY []\n")
    assert all(f"  {name} " in overview for name in COMMANDS)
    assert rest.endswith("HEAVY ['numpy']\n"), done.stderr


def test_a_word_that_is_no_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (("export onxx", "Did you mean 'export onnx'"), ("", "which command"), ("export", "export tensorrt")):
        assert main(words.split()) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_of_every_subcommand_is_explained(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*name.split(), "--help-all"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: gr00t-fast {name}")
    monkeypatch.setenv("COLUMNS", "200")
    assert main([*name.split(), "--help"]) == 0
    assert name != "run" or len(capsys.readouterr().out.splitlines()) <= 45
    capsys.readouterr()
    assert all(flag.help and f"--{flag.name}=" in shown for flag in flags_of(command(name).flags))
    assert main([*name.split(), "--bogus=1"]) == 2
    assert "unknown flag '--bogus'" in capsys.readouterr().err


@pytest.mark.parametrize("wish", ["--help=1", "--help-all=true", "--help_all"])
def test_help_is_help_however_it_is_asked_for(wish: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", wish]) == 0
    assert ("--smoothing=" in capsys.readouterr().out) == (wish != "--help=1")


def test_help_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """But for a word that is longer by itself, such as the values of a flag; the widest text is what it is without a terminal."""
    for columns in (80, 100, 400):
        monkeypatch.setenv("COLUMNS", str(columns))
        for name in COMMANDS:
            assert main([*name.split(), "--help-all"]) == 0
            lines = capsys.readouterr().out.splitlines()
            assert not [line for line in lines if len(line) > columns and " " in line.strip()]
            assert max(map(len, lines)) < 150


@pytest.mark.parametrize("words", FORMER, ids=" ".join)
def test_the_former_names_still_work(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [*words, "--bogus=1"])
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__") if words[0].endswith(".py") else runpy.run_module(words[0], run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: unknown flag '--bogus'")


@pytest.mark.parametrize("words", [["calibrate"], ["calibrate", "--model_path=DIR", "--observations=DATASET"], ["calibrate", "--help"]])
def test_a_command_that_is_gone_says_what_to_use(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "gr00t-fast quantise" in line
    assert "--engine=tensorrt" in line
    assert program(sys.executable, "export/calibrate.py", *words[1:]).returncode == 2


def test_an_engine_that_is_gone_is_refused_with_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--robot.type=so100_sim", f"--model_path={TRAINED}", "--lang_instruction=x", "--engine=fp8"]) == 2
    said = capsys.readouterr().err
    assert "--engine=fp8" in said
    assert "tensorrt" in said


def test_the_words_for_engines_and_precisions_are_those_of_the_engines() -> None:
    from gr00t_fast.engine import ENGINES, EXPORTED, PRECISIONS

    assert set(typing.get_args(options.EngineName)) == {"auto", *ENGINES, *EXPORTED}
    assert set(typing.get_args(options.ExportedName)) == set(EXPORTED)
    assert typing.get_args(ExportPrecision) == tuple(PRECISIONS)


def test_a_report_can_be_played_again(tmp_path: Path) -> None:
    cameras = "--robot.cameras={front: {type: sim, view: wrist, width: 320}}"
    config = parse(["--robot.type=so100_sim", cameras, "--model_path=m", "--lang_instruction=yes", "--seed=3", "--max_hold_s=null", "--fps=1e1"])
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"schema": "gr00t_fast.run_report", "settings": settings_of(config)}))
    assert parse([f"--config_path={report}"]) == config
    config.robot.servo_lag_ms = 150.0  # as benchmarks/evaluate.py does; no flag says it
    assert settings_of(config)["robot"].keys() == {"type", "id", "calibration_dir", "task", "cameras", "use_degrees", "disable_torque_on_disconnect"}


@pytest.mark.slow
def test_a_wheel_installed_outside_the_checkout_drives_the_simulated_arm(tmp_path: Path) -> None:
    """Built from the sdist, offline, and installed without its dependencies, which come from this environment."""
    pytest.importorskip("mujoco", reason="needs `pip install 'gr00t_fast[sim]'`")
    build = "import sys; out = sys.argv[1]; from setuptools import build_meta as b; b.build_sdist(out); b.build_wheel(out)"  # it changes sys.argv
    source = tmp_path / "source"
    shutil.copytree(ROOT / "gr00t_fast", source / "gr00t_fast", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = program(sys.executable, "-c", build, tmp_path / "dist", cwd=source, PYTHONPATH="")
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert list((tmp_path / "dist").glob("*.tar.gz"))
    home, outside = tmp_path / "venv", tmp_path / "elsewhere"
    venv.create(home, with_pip=False, symlinks=True)
    pip = [sys.executable, "-m", "pip", f"--python={home}", "install", "--quiet", "--no-deps", "--no-index", wheel]
    installed = program(*pip, PYTHONPATH="")  # else pip finds the checkout, and has nothing to install
    assert installed.returncode == 0, installed.stderr
    (site,) = home.glob("lib/python*/site-packages")
    (site / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    outside.mkdir()
    where = program(home / "bin" / "python", "-c", "import gr00t_fast; print(gr00t_fast.__file__)", cwd=outside, PYTHONPATH="")
    assert str(home) in where.stdout
    flags = ["--robot.type=so100_sim", "--robot.task=reach", "--robot.cameras={front: {type: sim}}", f"--model_path={TRAINED}"]
    flags += ["--lang_instruction=Reach the block", "--timeout=1", "--out=run", "--quiet", "--device=cpu"]
    ran = program(home / "bin" / "gr00t-fast", "run", *flags, cwd=outside, PYTHONPATH="")
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert json.loads((outside / "run" / "report.json").read_text())["run"]["ticks"] > 0
