"""Train the small GR00T N1.5 that reaches for the block of the simulated arm.

    python training/samples.py --count=20000 --seed=1 --out=outputs/reach/samples/1
    python training/samples.py --count=500 --seed=99 --out=outputs/reach/held_out
    python training/train.py --samples=outputs/reach/samples --held_out=outputs/reach/held_out --out=outputs/reach/run
    python benchmarks/evaluate.py --model_path=outputs/reach/run/checkpoint --scenes still --controllers sync

Behaviour cloning with GR00T N1.5's flow-matching loss (network.py), AdamW, cosine. --held_out may be left out; then nothing is checked on the way,
and the JSON line and the plot have no held-out figures. The same command continues a run that was stopped, by Ctrl-C or --max_minutes, to the same
bits. All randomness of a step comes from
(seed, step). Leaves DIR/checkpoint (the published format), state.pt, loss.csv and loss.png; the last line is JSON, also after Ctrl-C (exit code 130).

Axis alphabet: N samples, B batch, H horizon, P padded state width.
"""

from __future__ import annotations

import csv
import json
import math
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.lib.program import check_counts, drawing, execute
from gr00t_fast.contracts import SO100_JOINTS
from gr00t_fast.engine import select_device
from gr00t_fast.errors import ConfigError, require
from gr00t_fast.files import atomic_write
from gr00t_fast.inputs.data_config import DATA_CONFIGS
from gr00t_fast.inputs.prompt import PromptEncoder
from gr00t_fast.inputs.transforms import ActionTransform, StateTransform
from gr00t_fast.measurement import git_commit, machine, versions
from gr00t_fast.model import ModelConfig, ModelInputs
from gr00t_fast.networks import n1d5
from gr00t_fast.robots.sim.scene import GRIPPER
from training.network import EMBODIMENT_TAG, INSTRUCTIONS, Batch, BlockFinder, configuration, losses, new_network, small_tokenizer, write_checkpoint
from training.samples import FPS, IMAGE_SIZE, RESOLUTION, Samples, StopRequest, load_samples

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

    def batch(self, rows: np.ndarray, prompts: PromptEncoder, instruction: str, generator: torch.Generator, device: torch.device) -> Batch:
        """One instruction for the whole batch, so that no prompt is padded."""
        pictures = torch.from_numpy(self.pictures[rows]).to(device)
        pixels = (pictures.permute(0, 3, 1, 2).float() - 127.5) / 127.5  # as model.vision.pixel_values ends
        ids = torch.from_numpy(prompts(instruction, self.image_tokens).copy())
        positions = (ids == prompts.image_token_id).nonzero().squeeze(1)
        chosen = torch.from_numpy(rows)
        inputs = ModelInputs(pixels[:, None], ids.expand(len(rows), -1).to(device), positions.to(device), self.states[chosen].to(device))
        return Batch(inputs, self.actions[chosen].to(device), self.block[chosen].to(device), generator)


# --- the run ---------------------------------------------------------------------------------------------------------------------------------

_FINDER_WEIGHT = 0.2
_WARM_UP_STEPS = 100
_FINAL_RATE = 0.01  # of the peak
_BETAS, _CLIP_NORM = (0.9, 0.95), 1.0
_STEP_SEEDS = 1_000_003  # steps never share a generator's seed with those of the next --seed


@dataclass(frozen=True)
class Options:
    """What decides a run; a resumed one must have the same."""

    steps: int = 4000
    batch: int = 64
    draws: int = 2  # of noise and time per observation
    rate: float = 1.5e-3
    decay: float = 0.01
    seed: int = 0


class Trainer:
    """Trains the whole small network, from pixels to actions: `step` until `done`; `save` and `load` carry a run over.

    Raises ConfigError for samples or a state that do not fit.
    """

    def __init__(self, samples: Samples, options: Options, device: torch.device) -> None:
        tokenizer = small_tokenizer()
        self.dicts, self.metadata = configuration(tokenizer, IMAGE_SIZE), metadata_of(samples)
        self.config = n1d5.read_config(*self.dicts)
        vision = self.config.vision
        self.prompts = PromptEncoder(n1d5.PROMPT, tokenizer, 1, tokenizer.token_to_id(n1d5.IMAGE_TOKEN), "plain")
        self.data = TrainingSet.of(samples, self.metadata, self.config)
        self.model = new_network(self.config, options.seed).to(device)
        torch.manual_seed(options.seed)  # of the finder's first weights
        self.finder = BlockFinder(self.config.language.hidden_size, vision.image_size // vision.patch_size).to(device)
        if len(samples) < options.batch:
            raise ConfigError(f"{len(samples)} samples are fewer than a batch of {options.batch}. Make more of them, or lower --batch_size.")
        self.modules: dict[str, nn.Module] = {"model": self.model, "finder": self.finder}
        self.samples, self.options, self.device, self.steps_done = len(samples), options, device, 0
        matrices = [p for p in self._parameters() if p.dim() > 1]
        vectors = [p for p in self._parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": options.decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=options.rate, betas=_BETAS)
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def losses(self, rows: np.ndarray, generator: torch.Generator) -> dict[str, tuple[Tensor, float]]:
        """One instruction for all rows, drawn for this step."""
        drawn = np.random.default_rng([self.options.seed, self.steps_done, 1]).integers(len(INSTRUCTIONS))
        batch = self.data.batch(rows, self.prompts, INSTRUCTIONS[int(drawn)], generator, self.device)
        flow, finding = losses(self.model, self.finder, batch, self.options.draws)
        return {"flow": (flow, 1.0), "finder": (finding, _FINDER_WEIGHT)}

    @property
    def done(self) -> bool:
        return self.steps_done >= self.options.steps

    def step(self) -> dict[str, float]:
        """One update; the losses before it."""
        rate = self._rate()
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(self.options.seed * _STEP_SEEDS + self.steps_done)
        losses = self.losses(self._rows(), generator)
        self.optimiser.zero_grad(set_to_none=True)
        sum(weight * loss for loss, weight in losses.values()).backward()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters(), _CLIP_NORM)
        self.optimiser.step()
        self.steps_done += 1
        return {**{name: loss.item() for name, (loss, _) in losses.items()}, "gradient_norm": float(norm), "rate": rate}

    def save(self, path: Path) -> None:
        state = {
            "options": asdict(self.options),
            "samples": self.samples,
            "steps_done": self.steps_done,
            **{name: module.state_dict() for name, module in self.modules.items()},
            "optimiser": self.optimiser.state_dict(),
        }
        with atomic_write(path) as partial:
            torch.save(state, partial)

    def load(self, path: Path) -> None:
        """Continue from a saved state. Raises ConfigError when it is of other options or samples."""
        state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
        told, here = {**state["options"], "samples": state["samples"]}, {**asdict(self.options), "samples": self.samples}
        if told != here:
            different = ", ".join(f"{name} {told[name]} there, {here[name]} here" for name in here if told.get(name) != here[name])
            raise ConfigError(f"{path} is of another run ({different}). Give the same options, or another --out.")
        for name, module in self.modules.items():
            module.load_state_dict(state[name])
        self.optimiser.load_state_dict(state["optimiser"])
        self.steps_done = state["steps_done"]

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for module in self.modules.values() for parameter in module.parameters()]

    def _rate(self) -> float:
        """Linear warm-up, then a cosine down to one per cent."""
        options, step = self.options, self.steps_done
        warm_up = min(1.0, (step + 1) / min(_WARM_UP_STEPS, max(1, options.steps // 10)))
        cosine = (1 + math.cos(math.pi * step / options.steps)) / 2
        return options.rate * warm_up * (_FINAL_RATE + (1 - _FINAL_RATE) * cosine)

    def _rows(self) -> np.ndarray:
        """Of this step. Each epoch is a permutation of the samples; what does not fill a batch is left to the next epoch."""
        size, seed = self.options.batch, self.options.seed
        epoch, place = divmod(self.steps_done, self.samples // size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([seed, epoch]).permutation(self.samples)
        return np.sort(self._order[place * size : (place + 1) * size])

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


# --- its record ------------------------------------------------------------------------------------------------------------------------------

_COLUMNS = ("step", "flow", "finder", "gradient_norm", "rate", "held_out_flow", "held_out_finder", "action_error_deg", "minutes")
_PANELS = {"losses": ("flow", "held_out_flow", "finder", "held_out_finder"), "denoised actions against the expert's, held out": ("action_error_deg",)}
_SHOWN = ("flow", "action_error_deg")  # beside the progress bar
LAST_STEP = "the last step"


class Log:
    """loss.csv: means since the last row, and the check on held-out samples. Rows of steps that a resumed run repeats are dropped."""

    def __init__(self, path: Path, first_step: int) -> None:
        self.path, self.rows, self._pending = path, [], []
        if path.exists() and first_step:
            with path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= first_step]
        self.minutes_before = float(self.rows[-1]["minutes"]) if self.rows else 0.0

    def note(self, step: dict[str, float]) -> None:
        self._pending.append(step)

    def write_row(self, steps_done: int, check: dict[str, float], minutes: float) -> None:
        if not self._pending:
            return
        means = {name: float(np.mean([step[name] for step in self._pending])) for name in self._pending[0]}
        row = {"step": steps_done, **means, **check, "minutes": self.minutes_before + minutes}
        self.rows.append({name: f"{row[name]:.6g}" if name in row else "" for name in _COLUMNS})
        self._pending = []
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)

    def last(self) -> dict[str, float]:
        """The figures of the last row by name; what was not checked is left out."""
        row = self.rows[-1] if self.rows else {}
        return {name: float(value) for name, value in row.items() if value and name != "step"}

    def plot(self, path: Path) -> None:
        """Losses, and the error of held-out actions where that was checked."""
        panels = {title: lines for title, names in _PANELS.items() if (lines := {name: p for name in names if (p := self._points(name))})}
        if not panels:  # loss.csv was taken away from a run that is over
            return
        with drawing(path, path.parent.name, 1, len(panels), (5 * len(panels), 3.6)) as grid:
            for axes, (title, lines) in zip(grid[0], panels.items(), strict=True):
                for name, points in lines.items():
                    axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), linestyle="--" if "held_out" in name else "-")
                axes.set_title(title)
                axes.set_xlabel("step")
                axes.set_yscale("log")
                axes.legend()

    def _points(self, name: str) -> list[tuple[int, float]]:
        return [(int(row["step"]), float(row[name])) for row in self.rows if row.get(name)]


# --- the program -----------------------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class TrainConfig:
    samples: Path  # directory of samples, sub-directories included
    held_out: Path | None = None  # directory of samples to check on
    out: Path  # directory to create, or to continue
    steps: int = Options.steps  # updates in the whole run; the learning rate falls over them
    max_minutes: float | None = None  # end training after so long; the same command continues
    batch_size: int = Options.batch  # observations per step
    learning_rate: float = Options.rate  # the highest one
    weight_decay: float = Options.decay  # of matrices
    seed: int = 0  # of first weights, batches and noise
    draws: int = 2  # of noise and time per observation
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    precision: Literal["fp32", "bf16"] = "fp32"  # of the checkpoint's weights; training is in fp32
    threads: int = 1  # of a CPU; on a machine that has other work, two are slower than one
    check_every: int = 100  # steps between rows of loss.csv
    save_minutes: float = 3.0  # minutes between saved states

    def options(self) -> Options:
        """Checked. Raises UsageError."""
        check_counts(self, "steps", "batch_size", "threads", "check_every", "draws")
        check_counts(self, "seed", "learning_rate", "weight_decay", "save_minutes", least=0)
        return Options(self.steps, self.batch_size, self.draws, self.learning_rate, self.weight_decay, self.seed)


def stopped_from_outside(reason: str) -> bool:
    """Whether what `pursue` says is the name of a signal."""
    return reason.startswith("SIG")


def pursue(run: Trainer, config: TrainConfig, held_out: TrainingSet | None) -> tuple[str, Log]:
    """Go on from DIR/state.pt where there is one; step until the run is done, its time is over or somebody stops it; save.

    Returns why it ended (LAST_STEP when done), and the log.
    """
    state = config.out / "state.pt"
    if state.exists():
        run.load(state)
        print(f"continuing {config.out} at step {run.steps_done}", file=sys.stderr)
    log = Log(config.out / "loss.csv", run.steps_done)
    began_s = saved_s = time.monotonic()
    bar = require("tqdm", "sim").tqdm(total=run.options.steps, initial=run.steps_done, unit=" steps", mininterval=2)
    with bar, StopRequest() as stop:
        reason = None
        while reason is None:
            if run.done:
                reason = LAST_STEP
                break
            log.note(run.step())
            bar.update(1)
            taken = (time.monotonic() - began_s) / 60
            reason = stop.reason or (f"--max_minutes={config.max_minutes:g}" if config.max_minutes and taken >= config.max_minutes else None)
            if run.steps_done % config.check_every == 0 or run.done or reason:
                log.write_row(run.steps_done, run.check(held_out) if held_out else {}, taken)
                bar.set_postfix({name: log.rows[-1][name] for name in _SHOWN if log.rows[-1][name]})
            if time.monotonic() - saved_s > 60 * config.save_minutes:
                run.save(state)
                saved_s = time.monotonic()
        run.save(state)
    if stopped_from_outside(reason):
        print(f"stopped by {reason} at step {run.steps_done} of {run.options.steps}; the same command goes on from there", file=sys.stderr)
    return reason, log


def run(config: TrainConfig) -> dict[str, Any]:
    options = config.options()
    torch.set_num_threads(config.threads)
    config.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(load_samples([config.samples]), options, select_device(config.device))
    held_out = TrainingSet.of(load_samples([config.held_out]), trainer.metadata, trainer.config) if config.held_out else None
    reason, log = pursue(trainer, config, held_out)
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
