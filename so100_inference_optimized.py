#!/usr/bin/env python
"""Run GR00T N1.5 on an SO-100 arm: in one process, or with --server on a policy server.

    python so100_inference_optimized.py \\
        --robot.type=so100_follower --robot.port=/dev/ttyACM0 --robot.id=black \\
        --robot.cameras="{ front: {type: opencv, index_or_path: 1, width: 1280, height: 720, fps: 30}}" \\
        --model_path=./gr00t-n1.5-so100-finetuned --embodiment_tag=new_embodiment --data_config=so100 \\
        --denoising_steps=2 --lang_instruction="Place the block in the bowl" --action_horizon=8

`--help` lists all flags. Order matters: whatever can fail - flags, checkpoint, warm-up, pre-flight - comes before the arm gets torque.
"""

from __future__ import annotations

import sys
from typing import Any

from gr00t_fast import cli
from gr00t_fast.cli import RunConfig
from gr00t_fast.contracts import Clock, Robot
from gr00t_fast.control.binding import RobotBinding, resolve_camera_map
from gr00t_fast.control.controller import Controller, SyncController
from gr00t_fast.control.loop import ControlLoop, LoopOptions
from gr00t_fast.control.outputs import Outputs
from gr00t_fast.control.pacer import MonotonicClock
from gr00t_fast.control.preflight import Preflight
from gr00t_fast.control.safety import SafetyOptions
from gr00t_fast.control.signals import StopSignals
from gr00t_fast.control.threaded import OverlapOptions, ThreadedController
from gr00t_fast.control.trace import summary
from gr00t_fast.errors import ServerUnreachableError


def run(config: RunConfig) -> int:
    """One run; returns the exit code. Raises Gr00tFastError with the arm untouched or landed."""
    stop = StopSignals()
    with stop, stop.armed():
        if not config.server:
            cli.check_checkpoint(config)
        robot = build_robot(config)
        cli.say(f"loading {config.model_path} ..." if not config.server else f"asking the policy server at {config.server} ...")
        policy = load(config)
        preflight = Preflight(robot, policy.facts, strict=config.preflight == "refuse", echo=cli.say)
        fps = preflight.before_connecting(config.fps, config.camera_map, config.action_horizon)
        outputs = Outputs(config.out, config.video, config.show_images, fps, on_quit=lambda: stop.request("window closed"))
        loop = control_loop(config, policy, robot, fps, stop, preflight, outputs)
        cli.say("warming up ...")
        loop.controller.warm_up()
        cli.say(summary(policy, robot.name, fps, config.action_horizon, config.lang_instruction))
        cli.say("connecting to the arm ...")
    try:
        with outputs:
            try:
                with stop:  # only until the arm has landed: whatever hangs afterwards can be ended with Ctrl-C as any program
                    loop.run()
            finally:
                cli.announce_landing(loop.trace.landing)  # before anything that can fail or take time
    finally:
        if loop.trace.landing is not None:
            failing = sys.exc_info()[0] is not None
            outputs.write(loop, cli.settings_of(config), preflight.warnings, failing, preflight.notes)
    return cli.exit_code(stop, loop.trace.landing)


def load(config: RunConfig) -> Any:
    """The network in this process, or with --server a client of one elsewhere. Both import torch."""
    if config.server:
        return _connect(config)
    from gr00t_fast.policy import load_policy

    return load_policy(
        config.model_path,
        embodiment_tag=config.embodiment_tag,
        data_config=config.data_config,
        denoising_steps=config.denoising_steps,
        action_horizon=config.action_horizon,
        device=config.device,
        precision=config.precision,
        engine=config.engine,
        engine_path=config.engine_path,
        processor_path=config.processor_path,
        prompt_style=config.prompt_style,
        seed=config.seed,
        revision=config.revision,
    )


def _connect(config: RunConfig) -> Any:
    from gr00t_fast.remote import connect

    return connect(
        config.server,
        config.api_token,
        config.server_timeout_s,
        config.server_reconnect_s,
        model_path=config.model_path,
        revision=config.revision,
        embodiment_tag=config.embodiment_tag,
        data_config=config.data_config,
        action_horizon=config.action_horizon,
        prompt_style=config.prompt_style,
        echo=cli.say,
    )


def build_robot(config: RunConfig) -> Robot:
    """The arm, not yet connected: a wrong port or a missing calibration is found out here, before weights are read."""
    from gr00t_fast.robots import check_ready, make_robot

    check_ready(config.robot)
    return make_robot(config.robot)


def control_loop(config: RunConfig, policy: Any, robot: Robot, fps: float, stop: StopSignals, preflight: Preflight, outputs: Outputs) -> ControlLoop:
    clock, facts = MonotonicClock(), policy.facts
    camera_map = resolve_camera_map(robot.cameras, facts.resolutions, config.camera_map)
    binding = RobotBinding(policy.get_modality_config(), facts.state_widths, facts.action_widths, robot.joint_names, camera_map)
    controller = build_controller(config, policy, binding, clock, fps)
    safety = SafetyOptions(config.clamp_to_limits, config.max_speed_deg_s, config.max_following_error_deg, config.max_held_ticks)
    options = LoopOptions(fps, config.episodes, config.timeout, config.seed, config.dry_run, safety, cli.reset_time_s(config), config.camera_fault)
    return ControlLoop(robot, controller, options, clock, stop, preflight.connected, outputs.observers, echo=cli.say)


def build_controller(config: RunConfig, policy: Any, binding: RobotBinding, clock: Clock, fps: float) -> Controller:
    """`policy` is anything that yields actions: the network in this process, or a client of a server elsewhere, which may be away for a while."""
    recoverable = (ServerUnreachableError,) if config.server else ()
    max_hold_s, echo = cli.max_hold_s(config), None if config.server else cli.say  # the client of a server tells its own
    if config.controller == "sync":
        options = {"recoverable": recoverable, "max_hold_s": max_hold_s}
        return SyncController(policy, binding, config.lang_instruction, clock, config.action_horizon, **options)
    overlap = OverlapOptions(config.chunk_threshold, config.smoothing, config.when_late, recoverable, max_hold_s)
    return ThreadedController(policy, binding, config.lang_instruction, clock, fps, overlap, config.action_horizon, echo=echo)


def main(argv: list[str] | None = None) -> int:
    return cli.main(run, argv)


if __name__ == "__main__":
    cli.leave(main())
