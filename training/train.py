"""Train the small GR00T N1.5 that reaches for the block of the simulated arm.

    python training/samples.py --count=20000 --seed=1 --out=outputs/reach/samples/1
    python training/samples.py --count=500 --seed=99 --out=outputs/reach/held_out
    python training/train.py --samples=outputs/reach/samples --held_out=outputs/reach/held_out --out=outputs/reach/run
    python benchmarks/evaluate.py --model_path=outputs/reach/run/checkpoint --scenes still --controllers sync

Behaviour cloning with GR00T N1.5's flow-matching loss (network.py), AdamW, cosine. --held_out may be left out; then nothing is checked on the way,
and the JSON line and the plot have no held-out figures. The same command continues a run that was stopped, by Ctrl-C or --max_minutes, to the same
bits. Leaves DIR/checkpoint (the published format), state.pt, loss.csv and loss.png; the last line is JSON, also after Ctrl-C (exit code 130).

Axis alphabet: N samples, B batch, H horizon, P padded state width.
"""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np
import torch
from torch import Tensor

from benchmarks.lib.program import check_counts, execute
from gr00t_fast.checkpoint.embodiment import parse_metadata
from gr00t_fast.contracts import SO100_JOINTS
from gr00t_fast.engine import select_device
from gr00t_fast.inputs.data_config import DATA_CONFIGS
from gr00t_fast.inputs.prompt import IMAGE_TOKEN, PromptEncoder
from gr00t_fast.inputs.transforms import ActionTransform, StateTransform
from gr00t_fast.measurement import git_commit, machine, versions
from gr00t_fast.model import ModelInputs
from gr00t_fast.networks import n1d5
from gr00t_fast.robots.sim.scene import GRIPPER
from training.network import EMBODIMENT_TAG, INSTRUCTIONS, Batch, BlockFinder, configuration, losses, new_network, small_tokenizer, write_checkpoint
from training.run import Options, Run, TrainingConfig, pursue, stopped_from_outside
from training.samples import FPS, IMAGE_SIZE, RESOLUTION, Samples, load_samples

# --- data ---------------------------------------------------------------------------------------------------------------------------------------

DATA_CONFIG = "so100"
_PARTS = {"single_arm": slice(0, GRIPPER), "gripper": slice(GRIPPER, GRIPPER + 1)}


def metadata_of(samples: Samples) -> dict[str, Any]:
    """experiment_cfg/metadata.json: statistics of states and of all actions of all chunks, the camera, the rate."""
    values = {"state": samples.joints, "action": samples.chunks.reshape(-1, len(SO100_JOINTS))}
    statistics = {kind: {part: _statistics(rows[:, columns]) for part, columns in _PARTS.items()} for kind, rows in values.items()}
    shapes = {
        part: {"absolute": True, "rotation_type": None, "shape": [columns.stop - columns.start], "continuous": True}
        for part, columns in _PARTS.items()
    }
    camera = {"resolution": list(RESOLUTION), "channels": 3, "fps": float(FPS)}
    videos = {key.removeprefix("video."): camera for key in DATA_CONFIGS[DATA_CONFIG].video_keys}
    modalities = {"video": videos, "state": shapes, "action": shapes}
    return {EMBODIMENT_TAG: {"statistics": statistics, "modalities": modalities, "embodiment_tag": EMBODIMENT_TAG}}


def _statistics(rows: np.ndarray) -> dict[str, list[float]]:
    rows = rows.astype(np.float64)
    found = {"min": rows.min(0), "max": rows.max(0), "mean": rows.mean(0), "std": rows.std(0)}
    found |= {name: np.quantile(rows, q, axis=0) for name, q in (("q01", 0.01), ("q99", 0.99))}
    return {name: [round(float(value), 4) for value in values] for name, values in found.items()}


@dataclass(frozen=True)
class TrainingSet:
    """Normalised as the policy normalises. pictures uint8 (N, side, side, 3); states (N, P); actions (N, H, joints); block (N, 2)."""

    pictures: np.ndarray
    states: Tensor
    actions: Tensor
    block: Tensor

    @classmethod
    def of(cls, samples: Samples, metadata: dict[str, Any], padded_state: int) -> TrainingSet:
        known, config = parse_metadata(metadata, EMBODIMENT_TAG), DATA_CONFIGS[DATA_CONFIG]
        joints, chunks = samples.joints.astype(np.float64), samples.chunks
        states = StateTransform(config, known, padded_state)({f"state.{part}": joints[:, columns] for part, columns in _PARTS.items()})
        actions = ActionTransform(config, known, len(SO100_JOINTS)).normalised({f"action.{p}": chunks[..., c] for p, c in _PARTS.items()})
        return cls(samples.pictures, torch.from_numpy(states), torch.from_numpy(actions), torch.from_numpy(samples.block))

    def __len__(self) -> int:
        return len(self.states)

    def batch(self, rows: np.ndarray, prompts: PromptEncoder, instruction: str, generator: torch.Generator, device: torch.device) -> Batch:
        """One instruction for the whole batch, so that no prompt is padded."""
        pictures = torch.from_numpy(self.pictures[rows]).to(device)
        pixels = (pictures.permute(0, 3, 1, 2).float() - 127.5) / 127.5  # as model.vision.pixel_values ends
        ids = torch.from_numpy(prompts(instruction).copy())
        positions = (ids == prompts.image_token_id).nonzero().squeeze(1)
        chosen = torch.from_numpy(rows)
        inputs = ModelInputs(pixels[:, None], ids.expand(len(rows), -1).to(device), positions.to(device), self.states[chosen].to(device))
        return Batch(inputs, self.actions[chosen].to(device), self.block[chosen].to(device), generator)


# --- the run ------------------------------------------------------------------------------------------------------------------------------------

_FINDER_WEIGHT = 0.2


class Trainer(Run):
    """The run that trains the whole small network, from pixels to actions."""

    def __init__(self, samples: Samples, options: Options, device: torch.device) -> None:
        tokenizer = small_tokenizer()
        self.dicts, self.metadata = configuration(tokenizer, IMAGE_SIZE), metadata_of(samples)
        self.config = n1d5.read_config(*self.dicts)
        vision = self.config.vision
        self.prompts = PromptEncoder(tokenizer, 1, vision.tokens, tokenizer.token_to_id(IMAGE_TOKEN), "plain")
        self.data = TrainingSet.of(samples, self.metadata, self.config.head.state_dim)
        self.model = new_network(self.config, options.seed).to(device)
        torch.manual_seed(options.seed)  # of the finder's first weights
        self.finder = BlockFinder(self.config.language.hidden_size, vision.image_size // vision.patch_size).to(device)
        super().__init__({"model": self.model, "finder": self.finder}, len(samples), options, device)

    def losses(self, rows: np.ndarray, generator: torch.Generator) -> dict[str, tuple[Tensor, float]]:
        """One instruction for all rows, drawn for this step."""
        drawn = np.random.default_rng([self.options.seed, self.steps_done, 1]).integers(len(INSTRUCTIONS))
        batch = self.data.batch(rows, self.prompts, INSTRUCTIONS[int(drawn)], generator, self.device)
        flow, finding = losses(self.model, self.finder, batch, self.options.draws)
        return {"flow": (flow, 1.0), "finder": (finding, _FINDER_WEIGHT)}

    @torch.no_grad()
    def check(self, held_out: TrainingSet, steps: int = 4, rows: int = 250) -> dict[str, float]:
        """On samples that training does not see: both losses, and how far denoised actions are from the expert's, in degrees (body joints)."""
        generator = torch.Generator().manual_seed(1)
        rows = min(rows, len(held_out))
        batch = held_out.batch(np.arange(rows), self.prompts, INSTRUCTIONS[0], generator, self.device)
        flow, finding = losses(self.model, self.finder, batch, self.options.draws)
        head = self.config.head
        noise = torch.randn((rows, head.action_horizon, head.action_dim), generator=generator).to(self.device)
        actions = self.model(batch.inputs, noise, self.model.head.step_tables(steps))[..., : batch.actions.shape[-1]]
        statistics = next(iter(self.metadata.values()))["statistics"]["action"]["single_arm"]
        half = torch.tensor(np.subtract(statistics["max"], statistics["min"]) / 2, device=self.device)
        error = ((actions - batch.actions)[..., : len(half)].abs() * half).mean()
        return {"held_out_flow": flow.item(), "held_out_finder": finding.item(), "action_error_deg": error.item()}

    def write_checkpoint(self, out: Path, dtype: torch.dtype) -> None:
        write_checkpoint(out, self.model, self.dicts, self.metadata, dtype)


# --- the program --------------------------------------------------------------------------------------------------------------------------------


_COLUMNS = ("flow", "finder", "gradient_norm", "rate", "held_out_flow", "held_out_finder", "action_error_deg")


@dataclass(kw_only=True)
class TrainConfig(TrainingConfig):
    samples: Path  # directory of samples, sub-directories included
    held_out: Path | None = None  # directory of samples to check on
    draws: int = 2  # of noise and time per observation
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    precision: Literal["fp32", "bf16"] = "fp32"  # of the checkpoint's weights; training is in fp32


def run(config: TrainConfig) -> dict[str, Any]:
    check_counts(config, "draws")
    options = config.options(config.draws)
    torch.set_num_threads(config.threads)
    config.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(load_samples([config.samples]), options, select_device(config.device))
    held_out = TrainingSet.of(load_samples([config.held_out]), trainer.metadata, trainer.config.head.state_dim) if config.held_out else None
    reason, log = pursue(trainer, config, _COLUMNS, (lambda: trainer.check(held_out)) if held_out else dict)
    trainer.write_checkpoint(config.out / "checkpoint", {"bf16": torch.bfloat16, "fp32": torch.float32}[config.precision])
    log.plot(config.out / "loss.png")
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    counts = {"steps": trainer.steps_done, "samples": len(trainer.data), "parameters": parameters}
    return {"run": "training", "stopped_by": reason, **counts, **log.last()}


def main(argv: Sequence[str] | None = None) -> int:
    def tell(_: TrainConfig, result: dict[str, Any]) -> int:
        command = "python training/train.py " + shlex.join(sys.argv[1:] if argv is None else argv)
        print(json.dumps({**result, "machine": machine(), "versions": versions(), "commit": git_commit(), "command": command}))
        reason = result["stopped_by"]
        return 128 + signal.Signals[reason] if stopped_from_outside(reason) else 0  # so that a script does not go on with half a training

    return execute(TrainConfig, run, tell, argv, __doc__, "interrupted: the same command goes on from what is saved in --out")


if __name__ == "__main__":
    sys.exit(main())
