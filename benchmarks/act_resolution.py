"""What the training resolution costs: ACT at several resolutions, and SmolVLA, which pads them all to one square.

    python benchmarks/act_resolution.py                                       # a smaller transformer behind ResNet18, a minute on two CPU cores
    python benchmarks/act_resolution.py --published --rounds=10               # the published sizes: 52 and 450 million parameters, 4 GB of memory

For each resolution: tokens of the encoder, time of a refill (one chunk for one observation, from uint8 frames) and of a training step (forward,
backward, AdamW as lerobot sets it up, on random samples; loading data is not in it). One network of each kind serves all resolutions: ACT takes
pictures of any size. Weights are random: speed does not depend on them, and the figures do not say how well a policy does its task. Resolutions take
turns, shuffled anew every round, after a round that is not counted.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np
import torch
from torch import Tensor

from benchmarks.lib import program
from benchmarks.lib.policy_zoo import JOINTS, Setting, build_act, build_smolvla, observation_of
from gr00t_fast.base.errors import ConfigError, check_ranges
from gr00t_fast.base.flags import size_of
from gr00t_fast.base.measurement import StageTimer, paired_ratio, percentiles
from gr00t_fast.engine import select_device

_FIGURES = ("refill_ms", "training_step_ms")
_NAMES = {"act": "ACT", "smolvla": "SmolVLA (pads every picture to one square)"}


class NetworkAtResolutions:
    """One network; a resolution is only what the frames have. `network`: act or smolvla."""

    def __init__(self, network: str, setting: Setting, sizes: Sequence[program.Size], batch: int) -> None:
        generator = np.random.default_rng(setting.seed)
        self._arm: Any = build_act(setting) if network == "act" else build_smolvla(setting)
        self._observations = {size: observation_of(replace(setting, resolution=size), generator) for size in sizes}
        self._network, self._device, self._batch, self.parameters = network, setting.device, batch, self._arm.parameters
        preset = self._arm.policy.config.get_optimizer_preset()
        self._optimizer, self._clip_norm = preset.build(self._arm.policy.get_optim_params()), preset.grad_clip_norm

    def refill_ms(self, size: program.Size) -> float:
        """From uint8 frames and joints to the first action of a new chunk on the host."""
        self._arm.policy.eval()
        self._arm.reset()
        timer = StageTimer()
        self._arm.act(self._observations[size])
        return timer.finish()["total"]

    def training_step_ms(self, size: program.Size) -> float:
        """One update on random samples; of SmolVLA the vision tower and the language model stay frozen."""
        policy, samples = self._arm.policy, self._samples(size)
        policy.train()
        timer = StageTimer(torch.cuda.synchronize if self._device.type == "cuda" else None)
        loss, _ = policy.forward(samples)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), self._clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return timer.finish()["total"]

    def tokens(self, size: program.Size) -> int:
        """ACT: all that enter the transformer's encoder (latent, state, pictures). SmolVLA: those of one picture, behind the connector."""
        seen: list[int] = []
        if self._network == "act":  # (S, B, D)
            hook = self._arm.policy.model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[0]))
        else:  # (B, V, D)
            connector = self._arm.policy.model.vlm_with_expert.get_vlm_model().connector
            hook = connector.register_forward_hook(lambda _, inputs, output: seen.append(output.shape[1]))
        self.refill_ms(size)
        hook.remove()
        return seen[0]

    def _samples(self, size: program.Size) -> dict[str, Tensor]:
        batch = {"observation.state": torch.randn(self._batch, JOINTS)}
        batch["action"] = torch.randn(self._batch, self._arm.policy.config.chunk_size, JOINTS)
        batch["action_is_pad"] = torch.zeros(self._batch, self._arm.policy.config.chunk_size, dtype=torch.bool)
        for name, frame in self._observations[size]["frames"].items():
            pixels = torch.from_numpy(frame).permute(2, 0, 1).float() / 255
            batch[f"observation.images.{name}"] = pixels.repeat(self._batch, 1, 1, 1)  # (B, 3, H, W)
        if self._network == "smolvla":
            tokens = torch.randint(5, 200, (self._batch, 10))
            batch |= {"observation.language.tokens": tokens, "observation.language.attention_mask": torch.ones_like(tokens, dtype=torch.bool)}
        return {key: value.to(self._device) for key, value in batch.items()}


@dataclass
class Config(program.Flags):
    published: bool = False  # networks of the published sizes instead of small ones
    resolutions: list[str] = field(default_factory=lambda: ["640x480", "320x240", "224x224"])  # what the network sees, WIDTHxHEIGHT
    cameras: int = 1  # pictures of one observation
    batch_size: int = 2  # samples of a training step
    rounds: int = 8  # turns of each resolution, after one that is not counted
    smolvla: bool = True  # time SmolVLA too
    out: Path = Path("outputs/act_resolution")  # directory for JSON and table


def main(argv: Sequence[str] | None = None) -> int:
    return program.finish("act_resolution", program.read_flags(Config, argv, __doc__), run, as_table)


def run(config: Config) -> program.Result:
    check_ranges(config, **dict.fromkeys(("batch_size", "rounds", "cameras"), (1, math.inf)))
    sizes = {text: size_of(text, "resolutions") for text in config.resolutions}
    device = select_device(config.device)
    if not sizes or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"expected --resolutions, each once, and --device cpu or cuda; got {config.resolutions} and {device}.")
    cameras = tuple(f"camera{number}" for number in range(config.cameras))
    setting = Setting(config.published, cameras, next(iter(sizes.values())), device, torch.float32, config.out, config.seed)
    networks = ("act", "smolvla") if config.smolvla else ("act",)
    return {
        **{"benchmark": "act_resolution", "published_sizes": config.published, "device": device.type, "dtype": "float32"},
        **{name: getattr(config, name) for name in ("cameras", "batch_size", "rounds")},
        "networks": {name: measure(NetworkAtResolutions(name, setting, list(sizes.values()), config.batch_size), sizes, config) for name in networks},
        **program.provenance(config.seed),
    }


def measure(network: NetworkAtResolutions, sizes: Mapping[str, program.Size], config: Config) -> program.Result:
    """Ratios are paired by round, against the first resolution."""
    samples: dict[str, dict[str, list[float]]] = {name: {what: [] for what in _FIGURES} for name in sizes}
    for order, counted in program.shuffled_rounds(sizes, config.rounds, 1, config.seed):
        for name in order:
            for what in _FIGURES:
                value = getattr(network, what)(sizes[name])
                samples[name][what] += [value] if counted else []
    first = next(iter(sizes))
    rows = {
        name: {
            "tokens": network.tokens(sizes[name]),
            **{what: percentiles(values) for what, values in found.items()},
            "times_faster_than_first": {what: paired_ratio(samples[first][what], values)["median"] for what, values in found.items()},
        }
        for name, found in samples.items()
    }
    return {"parameters": network.parameters, "resolutions": rows}


def as_table(result: program.Result) -> str:
    size = "published sizes" if result["published_sizes"] else "small networks"
    parts = [f"{size} on {result['device']}, {result['cameras']} camera(s), batch {result['batch_size']}, {result['rounds']} rounds."]
    columns = ("resolution", "tokens", "refill p50 ms", "p95", "faster", "training step p50 ms", "p95", "faster")
    for network, found in result["networks"].items():
        lines = []
        for name, row in found["resolutions"].items():
            cells = [(f"{row[what]['p50']:.1f}", f"{row[what]['p95']:.1f}", f"{row['times_faster_than_first'][what]:.2f}x") for what in _FIGURES]
            lines.append((name, row["tokens"], *cells[0], *cells[1]))
        parts += [f"{_NAMES[network]}, {found['parameters'] / 1e6:.1f} M parameters", program.markdown_table(columns, lines)]
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
