"""Small random GR00T policies, trained for two steps by the installed lerobot's own `lerobot-train` and run by its own code, in the form of the
recordings (`checkpoint/`, observation.npz, expected.npz): what tests compare with besides the recordings. Needs lerobot's `groot` extra.

    python tests/support/lerobot_policies.py OUT SHARED
    python tests/support/lerobot_policies.py OUT SHARED PORT POSE...

SHARED: the directory with golden_lerobot/, whose program is used here with other policies. A process of its own: the program changes lerobot.
With a PORT one policy is made, whose actions are near POSE (in degrees), and lerobot's own program drives the arm there with it: calibration and
policy are in OUT, the noise is that of a generator with seed NOISE_SEED.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

_WIDE = {"vis": {"h": 64, "l": 4, "heads": 4, "inter": 72, "pos": 100, "deep": [0, 1, 2]}}
_WIDE |= {"txt": {"h": 24, "l": 6, "sel": 4, "heads": 3, "kv": 1, "hd": 16, "inter": 40, "mrope": [4, 2, 2]}}
_WIDE |= {"head": {"dh": 8, "heads": 2, "layers": 4, "out": 32, "hidden": 32, "vlh": 3, "vll": 1, "every": 2}}
_DEEP = {"vis": {"h": 32, "l": 6, "heads": 2, "inter": 50, "pos": 64, "deep": [1, 3]}}
_DEEP |= {"txt": {"h": 16, "l": 5, "sel": 5, "heads": 4, "kv": 4, "hd": 8, "inter": 60, "mrope": [2, 1, 1]}}
_DEEP |= {"head": {"dh": 12, "heads": 3, "layers": 6, "out": 24, "hidden": 24, "vlh": 2, "vll": 2, "every": 2}}
_OLD_WIDE = {"vis": {"h": 64, "l": 2, "heads": 4, "inter": 72}, "txt": {"h": 24, "l": 4, "heads": 3, "kv": 1, "hd": 16, "inter": 40, "sel": 4}}
_OLD_WIDE |= {"head": {"dh": 8, "heads": 2, "layers": 4, "out": 32, "hidden": 32, "emb": 16, "vlh": 3, "vll": 1, "ntv": 32}}
_OLD_DEEP = {"vis": {"h": 32, "l": 4, "heads": 2, "inter": 50}, "txt": {"h": 16, "l": 5, "heads": 4, "kv": 4, "hd": 8, "inter": 60, "sel": 2}}
_OLD_DEEP |= {"head": {"dh": 12, "heads": 3, "layers": 6, "out": 24, "hidden": 24, "emb": 36, "vlh": 2, "vll": 2, "ntv": 7}}
_RELATIVE = ["--policy.use_relative_actions=true", "--policy.chunk_size=16", "--policy.n_action_steps=16"]
_BUT_THE_GRIPPER = [*_RELATIVE, '--policy.relative_exclude_joints=["gripper"]']
_EIGHT = ["--policy.chunk_size=8", "--policy.n_action_steps=8"]
_LOCAL_BASE = {"base": "./GR00T-N1.7-3B"}
N1D7: dict[str, dict[str, Any]] = {
    "one small camera": {"cams": {"top": (320, 240)}, "task": "Pick", "args": [], **_WIDE},
    "three cameras": {"cams": {"z": (640, 480), "a_b": (640, 480), "Front": (640, 480)}, "task": "Wipe_the 'table', twice!", "args": [], **_DEEP},
    "relative": {"cams": {"wrist": (1280, 720), "front": (1280, 720)}, "task": "Put it  down\n", "args": _BUT_THE_GRIPPER, **_WIDE},
    "all relative": {"cams": {"front": (424, 240)}, "task": "Ünïcode ½ … 把积木", "args": _RELATIVE, **_DEEP},
    "local base": {"cams": {"b": (848, 480), "a": (848, 480)}, "task": "42", "args": _BUT_THE_GRIPPER, **_WIDE, **_LOCAL_BASE},
    "local base, absolute": {"cams": {"b": (320, 240)}, "task": "Go.", "args": _EIGHT, **_DEEP, **_LOCAL_BASE},
}
N1D5: dict[str, dict[str, Any]] = {
    "one small camera": {"cams": {"top": (320, 240)}, "task": "Pick", "args": [], **_OLD_WIDE},
    "three cameras": {"cams": {"z": (640, 480), "a_b": (640, 480), "Front": (640, 480)}, "task": "don't", "args": [], **_OLD_DEEP},
    "wide pictures": {"cams": {"wrist": (1280, 720), "front": (1280, 720)}, "task": 'Say "it\\\'s"', "args": [], **_OLD_WIDE},
    "odd characters": {"cams": {"front": (424, 240)}, "task": "Ünïcode ½ … 把积木\ttab", "args": ["--policy.n_action_steps=8"], **_OLD_DEEP},
    "long task": {
        "cams": {"b": (848, 480), "a": (848, 480)},
        "task": "42" * 150,
        "args": ["--policy.chunk_size=20", "--policy.n_action_steps=20"],
        **_OLD_WIDE,
    },
    "square": {"cams": {"b": (480, 480)}, "task": "Go.", "args": [], **_OLD_DEEP},
}


def _program(shared: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_golden_lerobot", shared / "golden_lerobot" / "make_golden_lerobot.py")
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


def make(program: ModuleType, out: Path, name: str, case: dict[str, Any], seed: int, shared: Path) -> None:
    shutil.rmtree(program.os.environ["HF_LEROBOT_HOME"], ignore_errors=True)
    program.WORK = Path(tempfile.mkdtemp(dir=out))
    program.CASES = {name: {**case, "n": 17 if is_n1d7() else 15, "seed": seed}}
    program.main(out / name, name, shared)


def is_n1d7() -> bool:
    import lerobot

    return not lerobot.__version__.startswith(("0.4", "0.5"))


def main(out: Path, shared: Path) -> None:
    program = _program(shared)
    for number, (name, case) in enumerate((N1D7 if is_n1d7() else N1D5).items()):
        make(program, out, name, case, 500 + number, shared)


# The arm

CAMERA, NOISE_SEED = (320, 240), 7


def drive(out: Path, shared: Path, port: str, pose: list[float]) -> None:
    program = _program(shared)
    case = {**(N1D7["relative"] if is_n1d7() else N1D5["one small camera"]), "cams": {"front": CAMERA}, "task": "Pick"}
    make(program, out, "driven", case, 9, shared)
    checkpoint = out / "driven" / "checkpoint"
    (_near_relative if is_n1d7() else _near)(checkpoint, pose)
    _compute_in_fp32(checkpoint)
    camera = f"{{ front: {{type: opencv, index_or_path: 0, width: {CAMERA[0]}, height: {CAMERA[1]}, fps: 30}}}}"
    arm = ["--robot.type=so101_follower", f"--robot.port={port}", "--robot.id=virtual", f"--robot.calibration_dir={out}", f"--robot.cameras={camera}"]
    common = [*arm, "--robot.use_degrees=true", "--play_sounds=false", f"--policy.path={checkpoint}"]
    if is_n1d7():
        from lerobot.scripts.lerobot_rollout import rollout

        own = ["--strategy.type=base", "--fps=30", "--duration=1.5", "--return_to_initial_position=false", "--device=cpu", "--task=Pick"]
        sys.argv = ["lerobot-rollout", *own, "--inference.type=rtc", "--inference.rtc.enabled=false", "--inference.queue_threshold=0", *common]
        rollout()
    else:
        from lerobot.scripts.lerobot_record import record

        own = ["--dataset.repo_id=me/eval_pick", f"--dataset.root={out / 'recorded'}", "--dataset.single_task=Pick", "--dataset.fps=30"]
        own += ["--dataset.episode_time_s=8", "--dataset.num_episodes=1", "--dataset.reset_time_s=0", "--dataset.push_to_hub=false"]
        sys.argv = ["lerobot-record", *own, *common]
        record()


def _near(checkpoint: Path, pose: list[float]) -> None:
    from safetensors.numpy import load_file, save_file

    for file in checkpoint.glob("policy_p*.safetensors"):
        statistics = load_file(file)
        for name, offset in (("min", -2.0), ("q01", -1.9), ("q99", 1.9), ("max", 2.0)):
            statistics[f"action.{name}"] = np.array(pose) + offset
        save_file(statistics, file)


def _near_relative(checkpoint: Path, pose: list[float]) -> None:
    from safetensors.numpy import load_file, save_file

    for file, step in (("policy_preprocessor.json", 2), ("policy_postprocessor.json", 0)):
        content = json.loads((checkpoint / file).read_text())
        raw = content["steps"][step]["config"]["raw_stats"]
        arm, gripper = raw["relative_action"]["single_arm"], raw["action"]["gripper"]
        arm.update({name: (np.float32(0.1) * np.array(values, np.float32)).tolist() for name, values in arm.items() if name != "count"})
        gripper.update({name: [pose[-1] + 0.05 * (values[0] - 40)] for name, values in gripper.items() if name != "count"})
        (checkpoint / file).write_text(json.dumps(content))
    (file,) = checkpoint.glob("policy_preprocessor_step_2*.safetensors")
    statistics = load_file(file)
    for name, percentile in (("min", "q01"), ("max", "q99")):
        statistics[f"action.{name}"] = np.concatenate([np.array(arm[name], np.float32).ravel(), np.array(gripper[percentile], np.float32)])
    save_file(statistics, file)


def _compute_in_fp32(checkpoint: Path) -> None:
    """lerobot's networks, which else compute in bf16, and from noise that can be had again."""
    import torch
    from lerobot.policies.groot.modeling_groot import GrootPolicy

    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "use_bf16": False}))
    load, drawn, generator = GrootPolicy.from_pretrained.__func__, torch.randn, torch.Generator().manual_seed(NOISE_SEED)
    shape = (1, 40, 132) if is_n1d7() else (1, 16, 32)

    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        policy = load(cls, *args, **kwargs)
        policy._groot_model.float().compute_dtype = "float32"
        return policy

    def randn(*args: Any, **kwargs: Any) -> Any:
        size = tuple(kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args))
        return drawn(shape, generator=generator).to(kwargs.get("dtype") or torch.float32) if size == shape else drawn(*args, **kwargs)

    GrootPolicy.from_pretrained, torch.randn = classmethod(from_pretrained), randn


if __name__ == "__main__":
    directory, with_recordings, *arm = sys.argv[1:]
    if arm:
        drive(Path(directory).resolve(), Path(with_recordings).resolve(), arm[0], [float(value) for value in arm[1:]])
    else:
        main(Path(directory).resolve(), Path(with_recordings).resolve())
