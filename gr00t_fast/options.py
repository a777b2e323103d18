"""What programs ask for: a checkpoint and how it runs, and where observations come from. Options that check themselves and are flags; no torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from gr00t_fast.base.contracts import MAX_FRAME_PX, MIN_FRAME_PX
from gr00t_fast.base.errors import AT_LEAST_0, AT_LEAST_1, ConfigError, check_ranges, closest
from gr00t_fast.base.flags import Flags
from gr00t_fast.inputs.data_config import load_data_config

# The words of gr00t_fast.engine, which imports torch; a test compares them.
ExportedName = Literal["onnxruntime", "openvino", "tensorrt"]
EngineName = Literal["auto", "eager", "fused", "cuda_graph", "compiled", "onnxruntime", "openvino", "tensorrt"]
PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]
_SIZE = re.compile(r"(\d+)x(\d+)")
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
DATA_SETS = "a LeRobotDataset or recordings directory, or random:SEED (which says nothing about trained weights)"


@dataclass(kw_only=True)
class CheckpointOptions(Flags):
    """Which checkpoint, and how its data is read: options of load_policy."""

    GROUP = "checkpoint"

    model_path: str = ""  # directory of the checkpoint, or its name on the Hugging Face hub; required
    revision: str | None = None  # commit, tag or branch of a --model_path on the hub; without a commit the weights may be others tomorrow
    embodiment_tag: str = "new_embodiment"  # which category weights and statistics of the checkpoint
    data_config: str | None = None  # N1.5: a name of NVIDIA's (so100, so100_dualcam, ...) or module:ClassName; default: so100
    processor_path: Path | None = None  # directory with the tokenizer files; default: looked up
    prompt_style: Literal["plain", "nvidia"] = "plain"  # nvidia: with the brackets that NVIDIA's clients and server put around the instruction
    letterbox: Literal["auto", "always", "never"] = "auto"  # whether an N1.6 or N1.7 checkpoint was trained on padded pictures; auto: its files tell

    or_else: ClassVar[str] = ""  # what to do without a checkpoint

    def missing(self) -> Iterator[tuple[str, str]]:
        if self.needs_checkpoint() and not self.model_path.strip():
            yield "model_path", f"the directory of a GR00T checkpoint, or its name on the Hugging Face hub.{self.or_else}"
        yield from super().missing()

    def check(self) -> None:
        super().check()
        if self.model_path.strip():
            load_data_config(self.data_config)

    def needs_checkpoint(self) -> bool:
        """Whether there is nothing to do without one."""
        return True

    def checkpoint_options(self, *more: str) -> dict[str, Any]:
        """These by name, but for model_path, and `more` of the configuration."""
        names = [field.name for field in dataclasses.fields(CheckpointOptions) if field.name != "model_path"]
        return {name: getattr(self, name) for name in (*names, *more)}


@dataclass(kw_only=True)
class PolicyOptions(CheckpointOptions):
    """How the network runs: the other options of load_policy."""

    GROUP = "checkpoint"

    denoising_steps: int | None = None  # steps from noise to action; default: the checkpoint's own
    action_horizon: int | None = None  # actions played per inference; default: all trained ones (lerobot: n_action_steps)
    device: str = "auto"  # auto, cuda, cuda:N, cpu, mps
    precision: PrecisionName = "auto"  # number format of the network
    engine: EngineName = "auto"  # auto: fused on a CPU, else eager; the last three need files (docs/engines.md)
    engine_path: Path | None = None  # directory of the export; default: exports/<engine> in the checkpoint's directory
    seed: int | None = None  # makes the noise, and a simulated scene, repeatable

    def check(self) -> None:
        super().check()
        check_device(self.device)
        check_ranges(self, denoising_steps=AT_LEAST_1, action_horizon=AT_LEAST_1, seed=AT_LEAST_0)

    def policy_options(self) -> dict[str, Any]:
        """The keyword arguments of load_policy."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(PolicyOptions) if field.name != "model_path"}


@dataclass(kw_only=True)
class CameraOptions(Flags):
    """What the cameras deliver, where neither a robot nor a data set tells it."""

    GROUP = "observations"

    camera_size: str | None = None  # WIDTHxHEIGHT, which decides what an N1.6 or N1.7 export is for; default: as in --observations, or 640x480

    def check(self) -> None:
        super().check()
        self.camera_px()

    def camera_px(self) -> tuple[int, int] | None:
        """Width and height. Raises ConfigError."""
        if self.camera_size is None:
            return None
        found = _SIZE.fullmatch(self.camera_size)
        if found is None or not all(MIN_FRAME_PX <= int(side) <= MAX_FRAME_PX for side in found.groups()):
            raise ConfigError(f"--camera_size={self.camera_size}: expected WIDTHxHEIGHT in pixels, such as 640x480.")
        return int(found[1]), int(found[2])


@dataclass(kw_only=True)
class ObservationOptions(Flags):
    """Where observations come from."""

    GROUP = "observations"

    observations: str | None = None  # a LeRobotDataset or recordings directory, or random:SEED
    camera_map: dict[str, str] = field(default_factory=dict)  # which camera of the data set is which of the policy: "{front: webcam}"

    def missing(self) -> Iterator[tuple[str, str]]:
        if self.needs_observations() and self.observations is None:
            yield "observations", DATA_SETS
        yield from super().missing()

    def needs_observations(self) -> bool:
        """Whether there is nothing to do without."""
        return False


def check_device(device: str) -> None:
    """Raises ConfigError."""
    if not _DEVICE.fullmatch(device):
        raise ConfigError(f"--device={device} is not one of auto, cuda, cuda:N, cpu, mps.{closest(device, ('auto', 'cuda', 'cpu', 'mps'))}")
