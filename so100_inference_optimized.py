#!/usr/bin/env python
"""Run GR00T N1.5 on an SO-100 arm, in one process.

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
from gr00t_fast.control.stop import StopSignals
from gr00t_fast.control.threaded import OverlapOptions, ThreadedController


def run(config: RunConfig) -> int:
    """One run; returns the exit code. Raises Gr00tFastError with the arm untouched or landed."""
    stop = StopSignals()
    with stop, stop.armed():
        policy = load(config)
        robot = build_robot(config)
        preflight = Preflight(robot, policy.facts, strict=config.preflight == "refuse")
        fps = preflight.before_connecting(config.fps, config.camera_map, config.action_horizon)
        outputs = Outputs(config.out, config.video, config.show_images, fps, on_quit=lambda: stop.request("window closed"))
        loop = control_loop(config, policy, robot, fps, stop, preflight, outputs)
        loop.controller.warm_up()
    try:
        with outputs:
            try:
                with stop:  # only until the arm has landed: whatever hangs afterwards can be ended with Ctrl-C as any program
                    loop.run()
            finally:
                cli.announce_landing(loop.trace.landing)  # before anything that can fail or take time
    finally:
        if loop.trace.landing is not None:
            outputs.write(loop, cli.settings_of(config), preflight.warnings, failing=sys.exc_info()[0] is not None)
    return cli.exit_code(stop, loop.trace.landing)


def load(config: RunConfig) -> Any:
    from gr00t_fast.policy import load_policy  # imports torch

    return load_policy(
        config.model_path,
        embodiment_tag=config.embodiment_tag,
        data_config=config.data_config,
        denoising_steps=config.denoising_steps,
        action_horizon=config.action_horizon,
        device=config.device,
        precision=config.precision,
        engine=config.engine,
        processor_path=config.processor_path,
        prompt_style=config.prompt_style,
        seed=config.seed,
    )


def build_robot(config: RunConfig) -> Robot:
    from gr00t_fast.robots import make_robot  # imports lerobot or mujoco

    return make_robot(config.robot)


def control_loop(config: RunConfig, policy: Any, robot: Robot, fps: float, stop: StopSignals, preflight: Preflight, outputs: Outputs) -> ControlLoop:
    clock, facts = MonotonicClock(), policy.facts
    camera_map = resolve_camera_map(robot.cameras, facts.resolutions, config.camera_map)
    binding = RobotBinding(policy.get_modality_config(), facts.state_widths, facts.action_widths, robot.joint_names, camera_map)
    controller = build_controller(config, policy, binding, clock, fps)
    safety = SafetyOptions(config.clamp_to_limits, config.max_step_deg, config.max_held_ticks)
    options = LoopOptions(fps, config.episodes, config.timeout, config.seed, config.dry_run, safety)
    return ControlLoop(robot, controller, options, clock, stop, preflight.connected, outputs.observers)


def build_controller(config: RunConfig, policy: Any, binding: RobotBinding, clock: Clock, fps: float) -> Controller:
    """`policy` is anything that yields actions: the network in this process, or a client of a server elsewhere."""
    if config.controller == "sync":
        return SyncController(policy, binding, config.lang_instruction, clock, config.action_horizon)
    overlap = OverlapOptions(config.chunk_threshold, config.smoothing, config.when_late)
    return ThreadedController(policy, binding, config.lang_instruction, clock, fps, overlap, config.action_horizon)


def main(argv: list[str] | None = None) -> int:
    return cli.main(run, argv)


if __name__ == "__main__":
    cli.leave(main())
