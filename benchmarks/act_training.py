"""ACT at one resolution after the other: the same network, optimiser and frames, timed where lerobot-train 0.4.4 takes its times; and SmolVLA.

One network serves all arms, since ACT takes pictures of any size: what differs between arms is the resolution and who resizes, nothing else.
The preprocessor of every arm holds the resize of training/act_resize.py, as a policy that will run on a robot must have it; in an arm whose
`resized_by` is "loader" the data set delivers small pictures already and that step passes them through. SmolVLA brings every picture to one square
(512x512 as published), so that its number of tokens does not depend on the camera; the aspect ratio decides how much of the square is padding.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.lib.policy_zoo import JOINTS, Setting, build_smolvla, observation_of
from benchmarks.lib.program import Size, size_text
from gr00t_fast.errors import ConfigError, require
from gr00t_fast.files import atomic_write
from gr00t_fast.measurement import peak_rss_bytes

# ResNet18 is the published one in either; the transformer around it is smaller here.
SMALL_ACT = {"dim_model": 128, "n_heads": 4, "dim_feedforward": 512, "n_encoder_layers": 2, "n_vae_encoder_layers": 2}
_RECORDED: Size = (640, 480)


@dataclass(frozen=True)
class Options:
    """What decides the work. `dataset`: a LeRobotDataset v3; `batch`: samples per training step."""

    dataset: Path
    batch: int
    published: bool
    device: str
    seed: int
    threads: int | None = None


@dataclass(frozen=True)
class Arm:
    """`resized_by`: "nobody", "pipeline" (the policy's preprocessor) or "loader" (the data set, as it reads a frame)."""

    name: str
    size: Size
    resized_by: str
    preprocessor: Any
    batches: Iterator[Any]


def before_lerobot() -> None:
    """Call before its first import: a local data set has no business on the hub, and torchvision's notice about its video reader is known."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore", "The video decoding and encoding capabilities of torchvision")


def tiny_dataset(out: Path, seed: int) -> Path:
    """One recorded episode of the simulated arm at 640x480, made once."""
    path = out / f"dataset-{size_text(_RECORDED)}-{seed}"
    if path.exists():
        return path
    from training import record

    with atomic_write(path) as partial, contextlib.redirect_stdout(sys.stderr):
        flags = [f"--out={partial}", "--episodes=1", f"--resolution={size_text(_RECORDED)}", f"--seed={seed}"]
        if code := record.main(flags):
            raise ConfigError(f"training/record.py {' '.join(flags)} recorded nothing (exit code {code}). Give a data set with --dataset.")
    return path


def lerobot_update(policy: Any, batch: int, on_cpu: bool) -> tuple[Any, Callable[[Any], float]]:
    """Accelerate as lerobot-train sets it up, and one step of lerobot's own update_policy on a batch, which returns what it logs as updt_s."""
    from accelerate import Accelerator  # with lerobot
    from lerobot.scripts.lerobot_train import update_policy
    from lerobot.utils.logging_utils import AverageMeter, MetricsTracker

    preset, accelerator = policy.config.get_optimizer_preset(), Accelerator(cpu=on_cpu, step_scheduler_with_optimizer=False)
    wrapped, optimizer = accelerator.prepare(policy, preset.build(policy.get_optim_params()))

    def update(samples: Any) -> float:
        tracker = MetricsTracker(batch, 1, 1, {name: AverageMeter(name) for name in ("loss", "grad_norm", "lr", "update_s")})
        update_policy(tracker, wrapped, samples, optimizer, preset.grad_clip_norm, accelerator=accelerator)
        return tracker.metrics["update_s"].val

    return accelerator, update


class ActTraining:
    """A network, its optimiser and the arms. Raises ConfigError for a directory without a data set or one that is smaller than a batch."""

    def __init__(self, options: Options, sizes: list[Size], resizers: list[str]) -> None:
        before_lerobot()
        from training.act_resize import untrained_act

        if options.device != "cpu":  # as lerobot-train sets them
            torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = True
        small = {} if options.published else SMALL_ACT
        self.options = options
        self.policy, self._preprocessor, _ = untrained_act(options.dataset, options.seed, device=options.device, **small)
        self._accelerator, self._update = lerobot_update(self.policy, options.batch, options.device == "cpu")
        self._features = {key: feature.shape for key, feature in self.policy.config.image_features.items()}
        self.arms = [arm for size in sizes for arm in self._arms(size, resizers)]

    @property
    def cameras(self) -> int:
        return len(self._features)

    def observation(self) -> dict[str, torch.Tensor]:
        """One frame as lerobot's predict_action hands it to the preprocessor, batch axis included."""
        item = self._dataset(None)[0]
        return {key: item[key][None] for key in ("observation.state", *self._features)}

    def train_step(self, arm: Arm) -> dict[str, float]:
        """Seconds of one step, by lerobot's own update_policy: data_s = loader_s + preprocessor_s, then updt_s; step_s is all of it."""
        self.wait()
        began_s = time.perf_counter()
        batch = next(arm.batches)
        loaded_s = time.perf_counter()
        batch = arm.preprocessor(batch)
        ready_s = time.perf_counter()
        update_s = self._update(batch)
        self.wait()
        ended_s = time.perf_counter()
        return {
            "loader_s": loaded_s - began_s,
            "preprocessor_s": ready_s - loaded_s,
            "data_s": ready_s - began_s,
            "updt_s": update_s,
            "step_s": ended_s - began_s,
        }

    @torch.inference_mode()
    def refill(self, arm: Arm, observation: dict[str, torch.Tensor]) -> dict[str, float]:
        """ms of one chunk for a single observation: the preprocessor, and select_action with an empty queue."""
        self.policy.reset()
        self.wait()
        began_s = time.perf_counter()
        batch = arm.preprocessor(observation)
        self.wait()
        ready_s = time.perf_counter()
        self.policy.select_action(batch)
        self.wait()
        return {"preprocess_ms": 1e3 * (ready_s - began_s), "refill_ms": 1e3 * (time.perf_counter() - ready_s)}

    def encoder_tokens(self, arm: Arm, observation: dict[str, torch.Tensor]) -> int:
        """Tokens that enter the transformer's encoder: latent, state, and a token for each place of the ResNet's last map, of all cameras."""
        seen: list[int] = []
        hook = self.policy.model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[0]))  # (S, B, D)
        self.refill(arm, observation)
        hook.remove()
        return seen[0]

    def wait(self) -> None:
        if self.options.device != "cpu":
            torch.cuda.synchronize()

    def _arms(self, size: Size, resizers: list[str]) -> Iterator[Arm]:
        from training.act_resize import ActResize, insert_resize

        preprocessor = copy.deepcopy(self._preprocessor)
        if all(shape[-2:] == size[::-1] for shape in self._features.values()):
            yield Arm(size_text(size), size, "nobody", preprocessor, self._batches(None))
            return
        insert_resize(preprocessor, ActResize(size[1], size[0]))
        for resizer in resizers:
            yield Arm(f"{size_text(size)} {resizer}", size, resizer, preprocessor, self._batches(size if resizer == "loader" else None))

    def _dataset(self, size: Size | None) -> Any:
        from lerobot.datasets.factory import resolve_delta_timestamps
        from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata

        path, transform = self.options.dataset, None
        if size is not None:
            from torchvision.transforms.v2 import Resize

            transform = Resize(size[::-1], antialias=True)
        deltas = resolve_delta_timestamps(self.policy.config, LeRobotDatasetMetadata(f"local/{path.name}", root=path))
        return LeRobotDataset(f"local/{path.name}", root=path, delta_timestamps=deltas, image_transforms=transform, video_backend="pyav")

    def _batches(self, size: Size | None) -> Iterator[Any]:
        """In this process, so that all that is done for a batch is seen; every arm gets the same frames in the same order."""
        from lerobot.datasets.utils import cycle

        dataset, batch = self._dataset(size), self.options.batch
        if len(dataset) < batch:
            raise ConfigError(f"{self.options.dataset} has {len(dataset)} frames, fewer than a batch of {batch}. Give a larger one, or --batch_size.")
        order = torch.Generator().manual_seed(self.options.seed)
        on_gpu = self.options.device != "cpu"
        loader = torch.utils.data.DataLoader(dataset, batch, shuffle=True, drop_last=True, generator=order, pin_memory=on_gpu)
        return cycle(self._accelerator.prepare(loader))


def measure_memory(options: Options, size: Size) -> dict[str, int]:
    """Bytes that ACT at one resolution needs beyond an idle process with everything imported; run it in a process that does nothing else.

    `inference`: the weights and one refill; `training`: also gradients, AdamW's two moments, activations and a batch. On a CPU the growth of the
    largest resident size, on a GPU the most that torch had allocated.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    before_lerobot()
    import lerobot.scripts.lerobot_train  # noqa: F401 - its size belongs to the idle process

    idle = 0 if options.device != "cpu" else require("psutil", "bench").Process().memory_info().rss
    peak: Callable[[], int] = torch.cuda.max_memory_allocated if options.device != "cpu" else peak_rss_bytes
    training = ActTraining(options, [size], ["pipeline"])
    observation, arm = training.observation(), training.arms[0]
    training.refill(arm, observation)
    inference = peak() - idle
    for _ in range(2):  # AdamW's moments are allocated at the end of the first step
        training.train_step(arm)
    return {"inference": inference, "training": peak() - idle}


_PADDING = -1.0  # lerobot pads with 0 before it maps 0..1 to -1..1; real pixels are random here, so that none of their patches is all black


@dataclass(frozen=True)
class Seen:
    """What reached the vision tower at one resolution. `padded_share`: of its patches that hold padding only."""

    square: Size
    image_tokens: int  # per camera, after the connector
    padded_share: float


class SmolVlaAtResolutions:
    """One network; a resolution is only what the frames have. `setting.resolution` is not used."""

    def __init__(self, setting: Setting, sizes: list[Size], batch: int) -> None:
        generator = np.random.default_rng(setting.seed)
        self._setting, self._batch, self._arm = setting, batch, build_smolvla(setting)
        self._observations = {size: observation_of(replace(setting, resolution=size), generator) for size in sizes}
        self._update: Callable[[Any], float] | None = None

    @property
    def parameters(self) -> int:
        return self._arm.parameters

    @property
    def dtype(self) -> str:
        return self._arm.dtype

    def forward_ms(self, size: Size) -> float:
        """From uint8 frames and joints to the first action of a new chunk on the host."""
        self._arm.reset()
        began_s = time.perf_counter()
        self._arm.act(self._observations[size])
        return 1e3 * (time.perf_counter() - began_s)

    def look_inside(self, size: Size) -> Seen:
        """One forward with hooks at the vision tower's door and behind the connector."""
        vlm = self._arm.policy.model.vlm_with_expert.get_vlm_model()
        pixels: list[Tensor] = []
        tokens: list[int] = []
        hooks = [
            vlm.vision_model.register_forward_pre_hook(lambda _, args, named: pixels.append(named["pixel_values"]), with_kwargs=True),
            vlm.connector.register_forward_hook(lambda _, args, output: tokens.append(output.shape[1])),  # (B, V, D)
        ]
        self.forward_ms(size)
        for hook in hooks:
            hook.remove()
        height, width = pixels[0].shape[-2:]
        return Seen((width, height), tokens[0], padded_share(pixels[0], vlm.vision_model.config.patch_size))

    def training_s(self, size: Size) -> float:
        """updt_s of one step on random samples, by lerobot's own update_policy; the vision tower and the language model stay frozen."""
        if self._update is None:
            _, self._update = lerobot_update(self._arm.policy, self._batch, self._setting.device.type == "cpu")
        return self._update(self._samples(size))

    def _samples(self, size: Size) -> dict[str, Tensor]:
        device, observation = self._setting.device, self._observations[size]
        batch: dict[str, Any] = {"observation.state": torch.randn(self._batch, JOINTS)}
        for name, frame in observation["frames"].items():
            pixels = torch.from_numpy(frame).permute(2, 0, 1).float() / 255
            batch[f"observation.images.{name}"] = pixels.expand(self._batch, -1, -1, -1)  # (B, 3, H, W)
        batch["action"] = torch.randn(self._batch, self._arm.actions_per_chunk, JOINTS)
        tokens = torch.randint(5, 200, (self._batch, 10))
        batch |= {"observation.language.tokens": tokens, "observation.language.attention_mask": torch.ones_like(tokens, dtype=torch.bool)}
        return {key: value.to(device) for key, value in batch.items()}


def padded_share(pixels: Tensor, patch: int) -> float:
    """Of the patches of pixels (B, C, H, W) in -1..1, those that are padding all over."""
    rows = pixels.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, C, H/p, W/p, p, p)
    return (rows == _PADDING).all(-1).all(-1).all(1).float().mean().item()
