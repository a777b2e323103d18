"""Train the small GR00T N1.5 that reaches for the block of the simulated arm.

    python training/samples.py --count=20000 --seed=1 --out=outputs/reach/samples/1
    python training/samples.py --count=500 --seed=99 --out=outputs/reach/held_out
    python training/train.py --samples=outputs/reach/samples --held_out=outputs/reach/held_out --out=outputs/reach/run
    python benchmarks/evaluate.py --model_path=outputs/reach/run/checkpoint --scenes still --controllers sync

Behaviour cloning with GR00T N1.5's flow-matching loss (network.py), AdamW, cosine. --held_out may be left out; then nothing is checked on the way.
The same command continues a run that was stopped, by Ctrl-C or --max_minutes, to the same bits: all randomness of a step comes from (seed, step).
Leaves DIR/checkpoint (the published format), state.pt, loss.csv and loss.png; the last line is JSON, also after Ctrl-C (exit code 130).

Axis alphabet: N samples, B batch, H horizon, P padded state width.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np
import torch
from torch import Tensor, nn

from gr00t_fast.base.contracts import SO100_JOINTS
from gr00t_fast.base.errors import ConfigError, check_ranges, require
from gr00t_fast.base.files import atomic_write
from gr00t_fast.base.measurement import provenance
from gr00t_fast.base.signals import StopSignals
from gr00t_fast.cli.main import Command
from gr00t_fast.engine import select_device
from gr00t_fast.inputs.data_config import DATA_CONFIGS
from gr00t_fast.inputs.prompt import PromptEncoder
from gr00t_fast.inputs.transforms import ActionTransform, StateTransform
from gr00t_fast.model import ModelConfig, ModelInputs
from gr00t_fast.networks import n1d5
from gr00t_fast.virtual.sim.scene import GRIPPER
from training.network import EMBODIMENT_TAG, INSTRUCTIONS, configuration, losses, new_network, small_tokenizer, write_checkpoint
from training.samples import FPS, IMAGE_SIZE, RESOLUTION, Samples, load_samples

# --- data ---------------------------------------------------------------------------------------------------------------------------------------

DATA_CONFIG = "so100"
_PARTS = {"single_arm": slice(0, GRIPPER), "gripper": slice(GRIPPER, GRIPPER + 1)}


def metadata_of(samples: Samples) -> dict[str, Any]:
    """experiment_cfg/metadata.json: statistics of states and of all actions of all chunks, the camera, the rate."""
    values = {"state": samples.joints, "action": samples.chunks.reshape(-1, len(SO100_JOINTS))}
    statistics = {kind: {part: _statistics(rows[:, columns]) for part, columns in _PARTS.items()} for kind, rows in values.items()}
    told = {"absolute": True, "rotation_type": None, "shape": None, "continuous": True}
    shapes = {part: {**told, "shape": [columns.stop - columns.start]} for part, columns in _PARTS.items()}
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
    image_tokens: int

    @classmethod
    def of(cls, samples: Samples, metadata: dict[str, Any], config: ModelConfig) -> TrainingSet:
        embodiment = n1d5.MetadataFile(metadata, config).embodiment(EMBODIMENT_TAG, DATA_CONFIGS[DATA_CONFIG])
        joints, chunks = samples.joints.astype(np.float64), samples.chunks
        states = StateTransform(embodiment)({f"state.{part}": joints[:, columns] for part, columns in _PARTS.items()})
        actions = ActionTransform(embodiment).normalised({f"action.{p}": chunks[..., c] for p, c in _PARTS.items()}, {})
        return cls(samples.pictures, torch.from_numpy(states), torch.from_numpy(actions), torch.from_numpy(samples.block), config.vision.tokens)

    def __len__(self) -> int:
        return len(self.states)

    def batch(self, rows: np.ndarray, prompts: PromptEncoder, instruction: str, device: torch.device) -> tuple[ModelInputs, Tensor, Tensor]:
        """Inputs, actions and block; one instruction for the whole batch, so that no prompt is padded."""
        pictures = torch.from_numpy(self.pictures[rows]).to(device)
        pixels = (pictures.permute(0, 3, 1, 2).float() - 127.5) / 127.5  # as model.vision.pixel_values ends
        ids = torch.from_numpy(prompts(instruction, self.image_tokens).copy())
        positions = (ids == prompts.image_token_id).nonzero().squeeze(1)
        chosen = torch.from_numpy(rows)
        inputs = ModelInputs(pixels[:, None], ids.expand(len(rows), -1).to(device), positions.to(device), self.states[chosen].to(device))
        return inputs, self.actions[chosen].to(device), self.block[chosen].to(device)


# --- the run ---------------------------------------------------------------------------------------------------------------------------------

_FINDER_WEIGHT = 0.2
_WARM_UP_STEPS = 100
_FINAL_RATE = 0.01  # of the peak
_BETAS, _CLIP_NORM = (0.9, 0.95), 1.0
_STEP_SEEDS = 1_000_003  # steps never share a generator's seed with those of the next --seed


@dataclass(kw_only=True)
class Options:
    """What decides a run; a resumed one must have the same."""

    steps: int = 4000  # updates in the whole run; the learning rate falls over them
    batch_size: int = 64  # observations per step
    draws: int = 2  # of noise and time per observation
    learning_rate: float = 1.5e-3  # the highest one
    weight_decay: float = 0.01  # of matrices
    seed: int = 0  # of first weights, batches and noise


class Trainer:
    """Trains the whole small network, from pixels to actions: `step` until `done`; `save` and `load` carry a run over.

    Raises ConfigError for samples or a state that do not fit.
    """

    def __init__(self, samples: Samples, options: Options, device: torch.device) -> None:
        tokenizer = small_tokenizer()
        self.dicts, self.metadata = configuration(tokenizer, IMAGE_SIZE), metadata_of(samples)
        self.config = n1d5.read_config(*self.dicts)
        self.prompts = PromptEncoder(n1d5.PROMPT, tokenizer, 1, tokenizer.token_to_id(n1d5.IMAGE_TOKEN), "plain")
        self.data = TrainingSet.of(samples, self.metadata, self.config)
        self.model = new_network(self.config, options.seed).to(device)
        torch.manual_seed(options.seed)  # of the finder's first weights
        self.finder = nn.Linear(self.config.language.hidden_size, 1).to(device)
        if len(samples) < options.batch_size:
            raise ConfigError(f"{len(samples)} samples are fewer than a batch of {options.batch_size}. Make more of them, or lower --batch_size.")
        self.modules = nn.ModuleDict({"model": self.model, "finder": self.finder})
        self.options, self.device, self.steps_done = options, device, 0
        self.rows: list[dict[str, float]] = []  # of loss.csv
        self._run = {each.name: getattr(options, each.name) for each in fields(Options)} | {"samples": len(samples)}
        matrices, vectors = ([p for p in self.modules.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
        groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=options.learning_rate, betas=_BETAS)

    @property
    def done(self) -> bool:
        return self.steps_done >= self.options.steps

    def step(self) -> dict[str, float]:
        """One update; the losses before it."""
        options, step = self.options, self.steps_done
        rate = options.learning_rate * learning_rate(step, options.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        instruction = INSTRUCTIONS[int(np.random.default_rng([options.seed, step, 1]).integers(len(INSTRUCTIONS)))]
        generator = torch.Generator().manual_seed(options.seed * _STEP_SEEDS + step)
        epoch, place = divmod(step, len(self.data) // options.batch_size)  # an epoch is a permutation; what fills no batch is left to the next one
        order = np.random.default_rng([options.seed, epoch]).permutation(len(self.data))
        rows = np.sort(order[place * options.batch_size : (place + 1) * options.batch_size])
        batch = self.data.batch(rows, self.prompts, instruction, self.device)
        flow, finding = losses(self.model, self.finder, *batch, options.draws, generator)
        self.optimiser.zero_grad(set_to_none=True)
        (flow + _FINDER_WEIGHT * finding).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.modules.parameters(), _CLIP_NORM)
        self.optimiser.step()
        self.steps_done += 1
        return {"flow": flow.item(), "finder": finding.item(), "gradient_norm": float(norm), "rate": rate}

    def save(self, path: Path) -> None:
        weights, optimiser = self.modules.state_dict(), self.optimiser.state_dict()
        with atomic_write(path) as partial:
            torch.save(
                {"run": self._run, "steps_done": self.steps_done, "rows": self.rows, "weights": weights, "optimiser": optimiser},
                partial,
            )

    def load(self, path: Path) -> None:
        """Continue from a saved state. Raises ConfigError when it is of other options or samples."""
        state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
        told, here = state["run"], self._run
        if told != here:
            different = ", ".join(f"{name} {told[name]} there, {here[name]} here" for name in here if told[name] != here[name])
            raise ConfigError(f"{path} is of another run ({different}). Give the same options, or another --out.")
        self.modules.load_state_dict(state["weights"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.steps_done, self.rows = state["steps_done"], state["rows"]

    @torch.no_grad()
    def check(self, held_out: TrainingSet, steps: int = 4, rows: int = 250) -> dict[str, float]:
        """On samples that training does not see: both losses, and how far denoised actions are from the expert's, in degrees (body joints)."""
        generator = torch.Generator().manual_seed(1)
        rows = min(rows, len(held_out))
        inputs, wanted, block = held_out.batch(np.arange(rows), self.prompts, INSTRUCTIONS[0], self.device)
        flow, finding = losses(self.model, self.finder, inputs, wanted, block, self.options.draws, generator)
        head = self.config.head
        noise = torch.randn((rows, head.action_horizon, head.action_dim), generator=generator).to(self.device)
        actions = self.model(inputs, noise, self.model.head.step_tables(steps))[..., : wanted.shape[-1]]
        statistics = next(iter(self.metadata.values()))["statistics"]["action"]["single_arm"]
        half = torch.tensor(np.subtract(statistics["max"], statistics["min"]) / 2, device=self.device)
        error = ((actions - wanted)[..., : len(half)].abs() * half).mean()
        return {"held_out_flow": flow.item(), "held_out_finder": finding.item(), "action_error_deg": error.item()}


def learning_rate(step: int, steps: int) -> float:
    """As a part of the highest: linear warm-up, then a cosine down to one per cent."""
    warm_up = min(1.0, (step + 1) / min(_WARM_UP_STEPS, max(1, steps // 10)))
    return warm_up * (_FINAL_RATE + (1 - _FINAL_RATE) * (1 + math.cos(math.pi * step / steps)) / 2)


# --- its record ------------------------------------------------------------------------------------------------------------------------------

_PANELS = {"losses": ("flow", "held_out_flow", "finder", "held_out_finder"), "denoised actions against the expert's, held out": ("action_error_deg",)}
LAST_STEP = "the last step"


def plot(path: Path, rows: Sequence[dict[str, float]]) -> None:
    """Losses, and the error of held-out actions where that was checked."""
    panels = {title: present for title, names in _PANELS.items() if (present := [name for name in names if name in rows[-1]])}
    figure = require("matplotlib.figure", "plots").Figure((5 * len(panels), 3.6), layout="constrained")
    figure.suptitle(path.parent.name, fontsize=10)
    for axes, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows]
            axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), linestyle="--" if "held_out" in name else "-")
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.set_yscale("log")
        axes.legend()
    figure.savefig(path, dpi=110)


# --- the program -----------------------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class TrainConfig(Options):
    samples: Path  # directory of samples, sub-directories included
    held_out: Path | None = None  # directory of samples to check on
    out: Path  # directory to create, or to continue
    max_minutes: float | None = None  # end training after so long; the same command continues
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    precision: Literal["fp32", "bf16"] = "fp32"  # of the checkpoint's weights; training is in fp32
    threads: int = 1  # of a CPU; on a machine that has other work, two are slower than one
    check_every: int = 100  # steps between rows of loss.csv, and between saved states


def pursue(trainer: Trainer, config: TrainConfig, held_out: TrainingSet | None, stop: StopSignals) -> str:
    """Go on from DIR/state.pt where there is one; step until the run is done, its time is over or somebody stops it; save.

    Returns why it ended (LAST_STEP when done).
    """
    state = config.out / "state.pt"
    if state.exists():
        trainer.load(state)
        print(f"continuing {config.out} at step {trainer.steps_done}", file=sys.stderr)
    reason, since = LAST_STEP if trainer.done else None, list[dict[str, float]]()
    minutes_before = trainer.rows[-1]["minutes"] if trainer.rows else 0.0
    began_s = time.monotonic()
    with require("tqdm", "sim").tqdm(total=config.steps, initial=trainer.steps_done, unit=" steps", mininterval=2) as bar:
        while reason is None:
            since.append(trainer.step())
            bar.update(1)
            taken = (time.monotonic() - began_s) / 60
            over = config.max_minutes is not None and taken >= config.max_minutes
            reason = LAST_STEP if trainer.done else stop.reason or (f"--max_minutes={config.max_minutes:g}" if over else None)
            if trainer.steps_done % config.check_every == 0 or reason:
                means = {name: float(np.mean([step[name] for step in since])) for name in since[0]}
                check = trainer.check(held_out) if held_out else {}
                trainer.rows.append({"step": trainer.steps_done, **means, **check, "minutes": minutes_before + taken})
                figures = [list(row.values()) for row in trainer.rows]
                np.savetxt(config.out / "loss.csv", figures, "%.6g", ",", header=",".join(trainer.rows[-1]), comments="")
                bar.set_postfix({name: f"{value:.4g}" for name, value in (means | check).items()})
                trainer.save(state)
                since.clear()
    return reason


def run(config: TrainConfig) -> int:
    """The last line tells what came of it. The exit code is that of a signal, so that a script does not go on with half a training."""
    check_ranges(config, **dict.fromkeys(("steps", "batch_size", "threads", "check_every", "draws"), (1, math.inf)))
    check_ranges(config, **dict.fromkeys(("seed", "learning_rate", "weight_decay"), (0, math.inf)))
    torch.set_num_threads(config.threads)
    config.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(load_samples([config.samples]), config, select_device(config.device))
    held_out = TrainingSet.of(load_samples([config.held_out]), trainer.metadata, trainer.config) if config.held_out else None
    with StopSignals() as stop:
        reason = pursue(trainer, config, held_out, stop)
    if stop.reason:
        print(f"stopped by {reason} at step {trainer.steps_done} of {config.steps}; the same command goes on from there", file=sys.stderr)
    write_checkpoint(
        config.out / "checkpoint", trainer.model, trainer.dicts, trainer.metadata, torch.bfloat16 if config.precision == "bf16" else torch.float32
    )
    plot(config.out / "loss.png", trainer.rows)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    counts = {"steps": trainer.steps_done, "samples": len(trainer.data), "parameters": parameters}
    print(json.dumps({"run": "training", "stopped_by": reason, **counts, **trainer.rows[-1], **provenance()}))
    return stop.exit_code or 0


main = Command(TrainConfig, run, __doc__.strip(), interrupted="interrupted: the same command goes on from what is saved in --out")

if __name__ == "__main__":
    sys.exit(main())
