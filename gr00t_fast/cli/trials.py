"""`gr00t-fast trials`: is setting A better than setting B? Runs of both in random order, of which nobody sees which is which until all are judged.

gr00t-fast trials --config_path=run.yaml --runs=20 --a="--denoising_steps=4" --b="--denoising_steps=2" --out=outputs/steps
"""

from __future__ import annotations

import gc
import shlex
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from gr00t_fast.base.contracts import Robot
from gr00t_fast.base.errors import AT_LEAST_0, AT_LEAST_1, ConfigError, Gr00tFastError, check_ranges
from gr00t_fast.base.flags import Flags, parse_flags, setting
from gr00t_fast.base.keyboard import ENTER, RIGHT, Keys, keys_obstacle
from gr00t_fast.base.measurement import linux_says
from gr00t_fast.base.worker import thread_left_running
from gr00t_fast.cli.main import EXIT_OK, Command, show
from gr00t_fast.cli.others import FLAGS_OF_OTHERS
from gr00t_fast.cli.run import EXITS, RecordedFacts, RunConfig, build_robot, drive, load, reset_time_s, settings_of, voice
from gr00t_fast.evaluation.compare import played_settings
from gr00t_fast.evaluation.trials import KEYS_HELP, NOT_JUDGED, Study, Trial, TrialSession, sections, verdict
from gr00t_fast.record.report import strict, text_of
from gr00t_fast.robots import SO100FollowerConfig

_NOT_OF_TRIALS = ("record", "record_append", "video", "display", "overwrite", "dry_run", "episodes")
_MEMORY_TIMES = 2  # files of 16 bits may become numbers of 32


@dataclass(kw_only=True)
class TrialFlags(Flags):
    """What is compared, and how often."""

    GROUP = "trials"

    a: str = ""  # flags of the first setting, in quotes: any of a run that change what the arm does; default: as the other flags say
    b: str | None = None  # flags of the second setting; default: no second one
    runs: int = 20  # trials of each setting
    resume: bool = False  # go on with the study in --out: with what has not been played, or did not count
    order_seed: int | None = None  # of the random order; default: a new one, written into study.json


@dataclass(kw_only=True)
class _OneSetting(TrialFlags, RunConfig):
    """All flags, checked as those of a run."""


@dataclass(kw_only=True)
class TrialsConfig(TrialFlags, RunConfig):
    """Compare two settings, A and B: each trial is a run of one episode, in an order that is random and not shown. s and f say how a trial ended (the
    simulated arm judges itself). study.txt, .html, .png and .json in --out say whether one is better, a directory of each trial how it was.

    Other flags are those of `gr00t-fast run`, for both settings.
    """

    COMMON = (*RunConfig.COMMON, *(field.name for field in fields(TrialFlags)))  # type: ignore[assignment]  # longer than a run's
    settings: dict[str, RunConfig] = setting(default_factory=dict, flag=False)  # by name

    def missing(self) -> Iterator[tuple[str, str]]:
        """What a run misses may be in --a or --b."""
        if self.out is None:
            yield "out", "a directory for the study, such as outputs/steps_4_or_2"

    def check(self) -> None:
        """The rest is checked of each setting."""
        check_ranges(self, runs=AT_LEAST_1, order_seed=AT_LEAST_0)

    @property
    def flags(self) -> dict[str, str]:
        """What each setting adds, by name."""
        return {"a": self.a} | ({} if self.b is None else {"b": self.b})


class Trials(Command[TrialsConfig]):
    """Each setting is the whole command line as a run's, with its own flags behind."""

    def parse(self, argv: Sequence[str]) -> TrialsConfig:
        config = super().parse(argv)
        config.settings = {name: _setting(config, argv, name, flags) for name, flags in config.flags.items()}
        return config


def _setting(config: TrialsConfig, argv: Sequence[str], name: str, flags: str) -> RunConfig:
    """Raises ConfigError, which names the setting that has flags of its own."""
    try:
        found, _ = parse_flags(_OneSetting, [*argv, *shlex.split(flags)], others=FLAGS_OF_OTHERS)
        shared = (*(field.name for field in fields(TrialFlags)), "out", "json", "quiet", "verbose", "api_token")
        if own := [each for each in shared if getattr(found, each) != getattr(config, each)]:
            raise ConfigError(f"--{own[0]} is of the study, not of a setting. Give it outside of --a and --b.")
        if given := found.given(*_NOT_OF_TRIALS):
            raise ConfigError(f"--{given[0]} is not for trials: each is a run of one episode, kept in --out. Leave it out.")
        if found.timeout is None and (not _needs_person(found) or keys_obstacle()):
            raise ConfigError("--timeout is missing: seconds after which a trial is over; nobody could press a key that ends it.")
    except ValueError as error:  # of quotes that do not end, too
        raise ConfigError(f"--{name}={shlex.quote(flags)}: {error}" if flags else str(error)) from error
    return RunConfig(**{field.name: getattr(found, field.name) for field in fields(RunConfig)})


def work(config: TrialsConfig, load_policy: Callable[[RunConfig], Any] = load, shared: Mapping[str, Any] | None = None) -> int:
    """A study; returns the exit code. load_policy: makes the policy of a setting. shared: conditions that the settings do not hold, JSON-ready."""
    assert config.out is not None
    say, settings = voice(config), config.settings
    played = {name: strict(played_settings(settings_of(each))) for name, each in settings.items()}
    study = Study(config.out, {"runs": config.runs, **(shared or {}), "flags": config.flags, "settings": played}, config.order_seed, config.resume)
    if len(settings) == 2 and settings["a"] == settings["b"]:
        say("WARNING: A and B are the same setting: the study shows how large a difference chance makes.")
    if left := study.left:
        for each in settings.values():
            build_robot(each)  # a wrong port is found out before weights are read
        say(f"{len(left)} of {len(study.order)} trials are to be played")
        policies = Policies(list(settings.values()), load_policy, say)
        if not keys_obstacle():
            say(KEYS_HELP)
        for number in left:
            if (code := _play(study, number, settings[study.order[number]], policies)) is not None:
                say(f"{len(study.order) - len(study.left)} of {len(study.order)} trials count. The same command with --resume goes on.")
                return code
    result = study.finish()
    show(result, text_of(sections(result)), verdict(result), config)
    say(f"wrote study.json, study.txt, study.html and study.png into {study.directory}")
    return EXIT_OK


def _play(study: Study, number: int, wanted: RunConfig, policies: Policies) -> int | None:
    """One trial. Returns the exit code when the study ends with it. Raises what ends a run before its episode begins, or leaves the arm powered."""
    name, trial, say = f"trial {number + 1} of {len(study.order)}", study.trial(number), voice(wanted)
    seed = wanted.seed if _needs_person(wanted) else (wanted.seed or 0) + number  # another layout of the scene
    robot: Robot | None = None
    session: TrialSession | None = None

    def load_policy(arm: Robot, stop: Callable[[str], None]) -> Any:
        nonlocal robot
        robot = arm
        return policies(wanted)

    def session_of(*arguments: Any, **options: Any) -> TrialSession:
        nonlocal session
        assert robot is not None
        session = TrialSession(*arguments, robot=robot, on_begin=lambda: study.begin(trial), **options)
        return session

    _put_back(wanted, name, say)
    say(name)
    try:
        config = replace(wanted, out=study.directory / trial.directory, seed=seed, blind=name)
        code = drive(config, load_policy, RecordedFacts({}), session_of)
    except Exception as error:
        if robot is None or session is None or not session.begun or isinstance(error, OSError):
            raise
        code, trial.excluded = None, f"crash: {type(error).__name__}"
        study.write()
        if not robot.land().safe:  # its report once more
            raise
        if not isinstance(error, Gr00tFastError):
            traceback.print_exception(error)
        say(f"WARNING: {error}")
    else:
        assert session is not None
        if session.begun:
            _judge(trial, session, wanted, name)
            study.write()
        code = code if code or session.stopped else None
    say(f"{name}: {f'does not count ({trial.excluded})' if trial.excluded else 'success' if trial.success else 'failure'}")
    if thread_left_running() and code is None:
        say("waiting for an inference that still runs; Ctrl-C ends the study")
        while thread_left_running():  # one thread at a time may call a policy
            time.sleep(0.05)
    return code


def _judge(trial: Trial, session: TrialSession, config: RunConfig, name: str) -> None:
    """How it ended, asking a person where nobody has said it."""
    excluded, success = session.excluded, session.success
    if not excluded and success is None and _needs_person(config):
        question = f"{name}: how did it end? s success, f failure, x leaves it out"
        success = {"s": True, "f": False}.get(_key(("s", "f", "x"), question, voice(config)))
    trial.success, trial.time_s = success, None if session.time_s is None else round(session.time_s, 3)
    trial.excluded = excluded or ("" if success is not None else NOT_JUDGED)


def _put_back(config: RunConfig, name: str, say: Callable[[str], None]) -> None:
    """The pause in which a person arranges the scene. The arm is not powered."""
    if _needs_person(config) and not keys_obstacle():
        _key((ENTER, RIGHT), f"{name}: put things in their places, then press Enter or the right arrow", say)
    elif pause_s := reset_time_s(config):
        say(f"{name} begins in {pause_s:g} s: put things in their places")
        time.sleep(pause_s)


def _key(wanted: Sequence[str], question: str, say: Callable[[str], None]) -> str:
    """The first of these keys that is pressed; none where there are no keys."""
    if keys_obstacle():
        return ""
    say(question)
    with Keys() as keys:
        while not (pressed := [key for key in keys.poll() if key in wanted]):
            time.sleep(0.02)
    return pressed[0]


def _needs_person(config: RunConfig) -> bool:
    """Nobody arranges and judges the simulated scene."""
    return isinstance(config.robot, SO100FollowerConfig)


class Policies:
    """Those of the settings. Settings that differ in denoising steps and action horizon alone share one; others stay loaded side by side where memory
    allows, else one is loaded anew for every trial, whether it is another one or not: the wait must not tell."""

    def __init__(self, settings: Sequence[RunConfig], load_policy: Callable[[RunConfig], Any], say: Callable[[str], None]) -> None:
        """Loads all. Raises what a run does."""
        self._load, self._loaded, self._keep = load_policy, dict[str, tuple[Any, int, int]](), True
        for config in settings:
            if self._loaded and _key_of(config) not in self._loaded and (why := _lacks_memory(config)):
                say(f"{why}: the policies are loaded one after the other, before each trial")
                self._keep = False
            self(config)

    def __call__(self, config: RunConfig) -> Any:
        if not self._keep:
            self._loaded.clear()
            gc.collect()
        if (key := _key_of(config)) not in self._loaded:
            policy = self._load(config if config.server else replace(config, denoising_steps=None, action_horizon=None))
            self._loaded[key] = policy, getattr(policy, "denoising_steps", 0), policy.action_horizon
        policy, steps, horizon = self._loaded[key]
        if not config.server:
            policy.denoising_steps, policy.action_horizon = config.denoising_steps or steps, config.action_horizon or horizon
        return policy


def _key_of(config: RunConfig) -> str:
    """Equal for settings that one policy serves."""
    of_policy = {"model_path": config.model_path, **config.policy_options(), "denoising_steps": None, "action_horizon": None}
    return str(settings_of(config) if config.server else of_policy)


def _lacks_memory(config: RunConfig) -> str:
    """Why this checkpoint cannot be loaded beside another, as far as its files and what is free now tell; empty: it can."""
    if config.server:
        return ""
    import torch

    from gr00t_fast.checkpoint import open_checkpoint
    from gr00t_fast.engine import select_device

    files, device = open_checkpoint(config.model_path, revision=config.revision).weight_files, select_device(config.device)
    needed, on_host = _MEMORY_TIMES * sum(file.stat().st_size for file in files), linux_says("meminfo", "MemAvailable") or "0 kB"
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else int(on_host.split()[0]) * 1024
    return "" if needed < free else f"{config.model_path} may need {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free on {device}"


main = Trials(
    TrialsConfig,
    work,
    'usage: gr00t-fast trials --runs=20 --a="--flag=value" [--b="--flag=value"] --out=DIR [--resume] [--flag=value ...]',
    EXITS,
    interrupted="interrupted: the same command with --resume goes on",
    drives_arm=True,
)
