"""The policy: NVIDIA-style observation dict in, joint targets out, transforms included.

    from gr00t_fast import load_policy
    policy = load_policy("./my-checkpoint", data_config="so100")
    actions = policy.get_action({"video.webcam": frame, "state.single_arm": arm, "state.gripper": gripper,
                                 "annotation.human.task_description": ["Place the block in the bowl"]})

Axis alphabet: B batch, C cameras, H horizon, D joint values of a part, A padded action width.
"""

from __future__ import annotations

import logging
import operator
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr00t_fast.checkpoint import EMBODIMENT_ROWS, Checkpoint, EmbodimentMetadata, load_model, open_checkpoint
from gr00t_fast.contracts import ActionPrefix, ModalityConfig, PolicyFacts
from gr00t_fast.data_config import DataConfig, load_data_config
from gr00t_fast.engine import (
    AnyEngine,
    FrameEngine,
    Goal,
    RawInputs,
    Target,
    check_engine,
    open_engine,
    prepare_engine,
    runs_from_files,
    select_device,
    select_precision,
    soft_mask,
    warming_up,
)
from gr00t_fast.errors import CheckpointError, ConfigError, ObservationError
from gr00t_fast.facts import check_cameras, facts_of
from gr00t_fast.model import ModelInputs
from gr00t_fast.observation import PolicyInput, check_pixels, parse_observation, parse_prefix
from gr00t_fast.progress import byte_bar
from gr00t_fast.prompt import PromptEncoder, find_tokenizer
from gr00t_fast.timing import StageTimer
from gr00t_fast.transforms import ActionTransform, StateTransform, pixel_values, reference_inputs, to_trained_size

log = logging.getLogger(__name__)
_WARM_UP_CALLS = 3  # allocator, thread pools and lazily built kernels settle within two
_WARM_UP_INSTRUCTION = "Place the block in the bowl"
_CPU = torch.device("cpu")
_MAX_DENOISING_STEPS = 1000  # one per time bucket of training; more would repeat buckets


def load_policy(
    model_path: str | Path,
    embodiment_tag: str | Enum = "new_embodiment",
    data_config: str | DataConfig = "so100",
    denoising_steps: int | None = None,
    action_horizon: int | None = None,
    device: str | int | torch.device = "auto",
    precision: str = "auto",
    engine: str | AnyEngine = "auto",
    engine_path: str | Path | None = None,
    processor_path: str | Path | None = None,
    prompt_style: str = "plain",
    seed: int | None = None,
    revision: str | None = None,
) -> Gr00tPolicy:
    """Load a GR00T N1.5 checkpoint (directory or hub id) and return a policy ready to run.

    `revision` is the commit, tag or branch of a hub id: without a commit the weights may be others tomorrow.
    `denoising_steps` defaults to the checkpoint's own; `action_horizon` to the number of the data config's `action_indices`, or what the
    checkpoint predicts if that is less. `engine_path` is the directory of an export or of a calibration, for engines that need one (default:
    `<checkpoint>/exports/<engine>`); exports read no weights, they compare them. An Engine of your own, with `device` and `dtype`, can stand for
    a name. As in NVIDIA's Gr00tPolicy, `embodiment_tag` may be an EmbodimentTag and `device` the number of a GPU.

    Raises ConfigError for an argument that cannot be used, CheckpointError for files that are missing, damaged or of another network, and
    EngineError for an export that does not fit. Everything small is checked before weights are read.
    """
    embodiment_tag = embodiment_tag.value if isinstance(embodiment_tag, Enum) else embodiment_tag
    device = f"cuda:{device}" if type(device) is int else str(device) if isinstance(device, torch.device) else device
    own, name = (engine, "auto") if hasattr(engine, "run") or hasattr(engine, "run_raw") else (None, engine)
    _check_words(model_path=model_path, embodiment_tag=embodiment_tag, device=device, precision=precision, engine=name)
    _check_words(**{name: value for name, value in (("engine_path", engine_path), ("revision", revision)) if value is not None})
    check_engine(name, engine_path)
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
        raise ConfigError(f"seed must be a whole number from 0 to 2**63 - 1, or None for a different one each time; got {seed!r}.")
    checkpoint = open_checkpoint(model_path, with_weights=own is None, revision=revision)
    metadata = checkpoint.embodiment(embodiment_tag)
    config = load_data_config(data_config)
    language = checkpoint.config.language
    tokens, cameras = checkpoint.config.vision.tokens, len(config.video_keys)
    prompts = PromptEncoder(find_tokenizer(processor_path, checkpoint.base), cameras, tokens, language.image_token_id, prompt_style)
    pieces = _Pieces(checkpoint, metadata, config, prompts)
    steps = pieces.check_denoising_steps(checkpoint.config.head.denoising_steps if denoising_steps is None else denoising_steps)
    horizon = pieces.check_action_horizon(action_horizon)
    if own is not None:
        return Gr00tPolicy(pieces, own, own.device, own.dtype, steps, horizon, seed)
    target = Target(checkpoint, embodiment_tag, config, data_config if isinstance(data_config, str) else "module:ClassName")
    if runs_from_files(name):  # an export has a precision, and its runtime says which devices it can use
        ready = open_engine(name, engine_path, target, device, precision)
        return Gr00tPolicy(pieces, ready, ready.device, ready.dtype, steps, horizon, seed)
    where = select_device(device)
    dtype = select_precision(precision, where)
    over = prepare_engine(name, engine_path, target, where)
    with byte_bar("weights") as progress:
        model = load_model(checkpoint, embodiment_tag, where, dtype, progress)
    return Gr00tPolicy(pieces, over(model, pieces.to_pixels), where, dtype, steps, horizon, seed)


def _check_words(**arguments: object) -> None:
    for name, value in arguments.items():
        if not (isinstance(value, str | Path) and str(value).strip()):
            raise ConfigError(f"{name}: expected a non-empty text, got {value!r}.")


def _whole(value: object) -> int | None:
    """`value` as an int when it is a whole number of any kind (NumPy's too), else None."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


class _Pieces:
    """What the policy needs from the checkpoint besides the network; built, and so checked, before the weights are read."""

    def __init__(self, checkpoint: Checkpoint, metadata: EmbodimentMetadata, config: DataConfig, prompts: PromptEncoder) -> None:
        head = checkpoint.config.head
        check_cameras(metadata, config)
        self.network, self.metadata, self.data_config, self.prompts = checkpoint.config, metadata, config, prompts
        self.state = StateTransform(config, metadata, head.state_dim)
        self.action = ActionTransform(config, metadata, head.action_dim)

    def to_pixels(self, frames: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) at the trained resolution -> fp32 (B, 3, h, w) in [-1, 1], on the frames' device."""
        return pixel_values(frames, self.network.vision.image_size)

    def check_denoising_steps(self, steps: int) -> int:
        most, number = min(_MAX_DENOISING_STEPS, self.network.head.timestep_buckets), _whole(steps)
        if number is None or not 1 <= number <= most:
            raise ConfigError(f"denoising_steps must be a whole number from 1 to {most}, got {steps!r}.")
        return number

    def check_action_horizon(self, horizon: int | None) -> int:
        trained = self.network.head.action_horizon
        if horizon is None:
            return min(trained, len(self.data_config.action_indices))
        number = _whole(horizon)
        if number is None or not 1 <= number <= trained:
            raise ConfigError(
                f"action_horizon must be from 1 to {trained}, the number of actions this checkpoint was trained to predict; got {horizon!r}."
            )
        return number


class Gr00tPolicy:
    """Implements the `Policy` protocol in this process. Not thread-safe: one thread calls it."""

    def __init__(
        self, pieces: _Pieces, engine: AnyEngine, device: torch.device, dtype: torch.dtype, steps: int, action_horizon: int, seed: int | None
    ) -> None:
        self._pieces, self.engine, self.device, self.dtype = pieces, engine, device, dtype
        if isinstance(engine, FrameEngine):
            engine.to_joints = pieces.action.on(device)
        self._denoising_steps, self._action_horizon = steps, action_horizon
        self._generator = torch.Generator()  # on the CPU, so that a seed means the same noise on every device
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        self._seed = seed
        self._resizes_told: set[str] = set()
        self.last_timing: dict[str, float] = {}

    @property
    def denoising_steps(self) -> int:
        """Euler steps per inference. Setting it costs nothing: the small tables it needs are made at the next call and kept."""
        return self._denoising_steps

    @denoising_steps.setter
    def denoising_steps(self, steps: int) -> None:
        self._denoising_steps = self._pieces.check_denoising_steps(steps)

    @property
    def action_horizon(self) -> int:
        """How many of the predicted actions are returned."""
        return self._action_horizon

    @action_horizon.setter
    def action_horizon(self, horizon: int | None) -> None:
        self._action_horizon = self._pieces.check_action_horizon(horizon)

    @property
    def chunk_shape(self) -> tuple[int, int]:
        """Trained horizon and padded action width: what `noise` has besides the batch."""
        return self._pieces.network.head.action_horizon, self._pieces.network.head.action_dim

    @property
    def prompt_style(self) -> str:
        return self._pieces.prompts.style

    @property
    def facts(self) -> PolicyFacts:
        """What the checkpoint says about the robot it was trained on, for the pre-flight check."""
        pieces = self._pieces
        return facts_of(pieces.metadata, pieces.data_config, pieces.state.widths, pieces.action.widths, pieces.network.head.action_horizon)

    def get_modality_config(self) -> dict[str, ModalityConfig]:
        return self._pieces.data_config.modality_config()

    @property
    def modality_config(self) -> dict[str, ModalityConfig]:
        """As `get_modality_config`; NVIDIA's Gr00tPolicy has both."""
        return self.get_modality_config()

    def apply_transforms(self, observation: dict[str, Any]) -> dict[str, Tensor]:
        """What the network reads, by the names of NVIDIA's method (transforms.reference_inputs): for a look at it. Raises ObservationError."""
        raw = self.raw_inputs(observation)
        pixels = torch.stack([self._pixels(frames) for frames in raw.frames], dim=1)  # (B, C, 3, h, w)
        row = EMBODIMENT_ROWS[self._pieces.metadata.tag]
        return reference_inputs(raw.input_ids, raw.lengths, pixels, raw.state, self._pieces.state.network_width, row)

    def unapply_transforms(self, action: dict[str, Any]) -> dict[str, np.ndarray]:
        """`{"action": normalised actions (B, H, A)}`, a tensor or an array -> `action.<part>` float32 (B, H, D) in joint units."""
        return self._pieces.action(np.asarray(torch.as_tensor(action["action"]).float().cpu()))

    def reset(self) -> None:
        """Begin an episode: a seeded policy repeats its noise from the start."""
        if self._seed is not None:
            self._generator.manual_seed(self._seed)

    def get_action(self, observation: dict[str, Any], noise: Any = None, prefix: ActionPrefix | None = None) -> dict[str, np.ndarray]:
        """One inference.

        observation: `video.<cam>` uint8 (T, H, W, 3) or (B, T, H, W, 3) with T = 1, any resolution; `state.<part>` float (T, D) or
        (B, T, D); the instruction as str or list of str. Unbatched in, unbatched out.
        noise: (B, trained horizon, A), numpy or torch; makes the call reproducible. Drawn from the policy's generator when absent.
        prefix: actions to continue (real-time chunking); without it, or with no rows in it, the call is exactly the same as ever.
        Returns `action.<part>` float32 (action_horizon, D) or (B, action_horizon, D). Raises ObservationError, and
        ConfigError for a prefix that the engine cannot take.
        """
        timer = StageTimer(self.engine.synchronise)
        with timer.stage("preprocess"):
            parsed = parse_observation(observation, self._pieces.data_config, self._pieces.state.widths)
            raw = self._raw_inputs(parsed)
            takes_frames = isinstance(self.engine, FrameEngine)
            inputs = None if takes_frames else self._model_inputs(raw)
            start = self._noise(noise, parsed.batch)  # last: a refused observation uses up no noise
            known = self._known(prefix, parsed)
            options = {"goal": self._goal(prefix, known, _CPU if takes_frames else self.device)} if known else {}
        if takes_frames:
            chunk = self.engine.run_raw(raw, start, self._denoising_steps, timer, **options)
        else:
            chunk = self.engine.run(inputs, start.to(self.device), self._denoising_steps, timer, **options).float().cpu().numpy()
        with timer.stage("postprocess"):
            to_parts = self._pieces.action.split if takes_frames else self._pieces.action  # an engine of frames gives joint units
            actions = to_parts(chunk[:, : self.action_horizon])
            for key, rows in known.items():  # they are facts by now: exactly, without what guidance leaves and normalising rounds
                committed = min(prefix.delay, self._action_horizon)
                actions[key][:, :committed] = rows[:, :committed]
            if not parsed.batched:
                actions = {key: value[0] for key, value in actions.items()}
        self.last_timing = timer.finish()
        return actions

    def warm_up(self, instruction: str | None = None, prefix_method: str | None = None) -> dict[str, float]:
        """Run until the first-call costs are paid, with `prefix_method` those of continuing a chunk too; returns the last call's timing.

        Does not disturb the noise sequence of a seeded policy. Raises CheckpointError when an action is NaN or infinite.
        """
        observation = self.example_observation(instruction or _WARM_UP_INSTRUCTION)
        state = self._generator.get_state()
        with warming_up(self.engine):
            for _ in range(_WARM_UP_CALLS):
                actions = self.get_action(observation)
                self._check_finite(actions)
            if prefix_method is not None:
                for _ in range(_WARM_UP_CALLS):
                    self._check_finite(self.get_action(observation, prefix=ActionPrefix(actions, 1, prefix_method)))
        self._generator.set_state(state)
        return self.last_timing

    def _check_finite(self, actions: dict[str, np.ndarray]) -> None:
        unusable = [key for key, values in actions.items() if not np.isfinite(values).all()]
        if unusable:
            narrow = "" if self.dtype == torch.float32 else f" {self.dtype} may overflow where fp32 does not: try --precision=fp32."
            raise CheckpointError(
                f"the network answers NaN or infinity ({', '.join(unusable)}) to an ordinary observation in {self.dtype}; expected finite actions."
                f"{narrow or ' The weights or the statistics are damaged: copy or download the checkpoint again.'}"
            )

    def example_observation(self, instruction: str = _WARM_UP_INSTRUCTION) -> dict[str, Any]:
        """An observation of the right form: mid-grey pictures, joints in the middle of their range. For warm-up and timing."""
        config, metadata = self._pieces.data_config, self._pieces.metadata
        observation: dict[str, Any] = {config.language_key: [instruction]}
        for key in config.video_keys:
            camera = metadata.cameras[key]
            observation[key] = np.full((1, camera.height, camera.width, 3), 127, dtype=np.uint8)
        for key in config.state_keys:
            statistics = metadata.statistics[key]
            observation[key] = ((statistics["min"] + statistics["max"]) / 2)[None]
        return observation

    def _known(self, prefix: ActionPrefix | None, parsed: PolicyInput) -> dict[str, np.ndarray]:
        """`action.<part>` -> float32 (B, L, D); empty when there is nothing to continue."""
        if prefix is None:
            return {}
        if not getattr(self.engine, "continues", False):
            raise ConfigError(f"the engine '{self.engine.name}' cannot continue a chunk. Use --engine=eager, or --smoothing=none or ensemble.")
        return parse_prefix(prefix, self._pieces.action.widths, parsed, self._pieces.network.head.action_horizon)

    def _goal(self, prefix: ActionPrefix, known: dict[str, np.ndarray], device: torch.device) -> Goal:
        """Normalised and padded. Dimensions beyond the arm's own carry no weight: nothing is known of them."""
        head = self._pieces.network.head
        rows = torch.from_numpy(self._pieces.action.normalised(known))  # (B, L, widths together)
        actions = torch.zeros(rows.shape[0], head.action_horizon, head.action_dim)
        actions[:, : rows.shape[1], : rows.shape[2]] = rows
        weights = torch.zeros(head.action_horizon, head.action_dim)
        weights[:, : rows.shape[2]] = soft_mask(head.action_horizon, prefix.delay, rows.shape[1])[:, None]
        return Goal(actions.to(device), weights.to(device), prefix.method)

    def _noise(self, noise: Any, batch: int) -> Tensor:
        head = self._pieces.network.head
        shape = (batch, head.action_horizon, head.action_dim)
        if noise is None:
            # drawn in fp32 whatever the precision, so that runs in two precisions can be compared at one seed
            return torch.randn(shape, generator=self._generator)
        try:
            start = torch.as_tensor(noise, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ObservationError(f"noise: expected numbers of shape {shape}, got {type(noise).__name__} ({error}).") from error
        if tuple(start.shape) != shape or not torch.isfinite(start).all():
            found = "values that are not finite" if tuple(start.shape) == shape else f"shape {tuple(start.shape)}"
            raise ObservationError(f"noise: expected finite numbers of shape {shape} (batch, trained horizon, padded action width), got {found}.")
        return start.cpu()

    def to_pixels(self, frames: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) at the trained resolution -> fp32 (B, 3, h, w) in [-1, 1], on the frames' device. For benchmarks."""
        return self._pieces.to_pixels(frames)

    def raw_inputs(self, observation: dict[str, Any]) -> RawInputs:
        """What a FrameEngine takes, for benchmarks. Raises ObservationError."""
        return self._raw_inputs(parse_observation(observation, self._pieces.data_config, self._pieces.state.widths))

    def _raw_inputs(self, parsed: PolicyInput) -> RawInputs:
        trained = [self._pieces.metadata.cameras[key] for key in parsed.frames]
        check_pixels(parsed.batch * sum(camera.width * camera.height for camera in trained), "at the size of the training videos")
        ids, lengths, image_positions = self._prompt(parsed.instructions, parsed.batched)
        frames = [self._trained_size(key, frames) for key, frames in parsed.frames.items()]
        return RawInputs(frames, ids, lengths, image_positions, self._pieces.state(parsed.state))

    def _model_inputs(self, raw: RawInputs) -> ModelInputs:
        pixels = torch.stack([self._pixels(frames) for frames in raw.frames], dim=1)  # (B, C, 3, h, w)
        padded = (raw.lengths != raw.input_ids.shape[1]).any()
        mask = torch.from_numpy(np.arange(raw.input_ids.shape[1]) < raw.lengths[:, None]) if padded else None
        return ModelInputs(
            pixel_values=pixels.to(self.dtype),
            input_ids=torch.from_numpy(raw.input_ids).to(self.device),
            image_positions=torch.from_numpy(raw.image_positions).to(self.device),
            state=torch.from_numpy(raw.state).to(self.device, self.dtype),
            prompt_mask=None if mask is None else mask.to(self.device),
        )

    def _trained_size(self, key: str, frames: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, 3) at the resolution that training saw."""
        camera = self._pieces.metadata.cameras[key]
        height, width = frames.shape[1:3]
        if (height, width) != (camera.height, camera.width) and key not in self._resizes_told:
            self._resizes_told.add(key)
            log.info("%s is %dx%d, training saw %dx%d: resizing every frame", key, width, height, camera.width, camera.height)
        return to_trained_size(frames, camera.width, camera.height)

    def _pixels(self, frames: np.ndarray) -> Tensor:
        """uint8 (B, H, W, 3) -> (B, 3, h, w) on the device: bytes are uploaded, floats are made there."""
        # copied only where a view is read-only or strided: torch warns of memory that it could but must not write
        return self._pieces.to_pixels(torch.from_numpy(np.require(frames, requirements=("C", "W"))).to(self.device))

    def _prompt(self, instructions: list[str], batched: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids (B, S) padded on the right, lengths (B,), places of the image tokens (V,)."""
        prompts = self._pieces.prompts
        encoded = [prompts(instruction, batched) for instruction in instructions]
        lengths = np.array([len(ids) for ids in encoded])
        padded = np.zeros((len(encoded), lengths.max()), dtype=np.int64)
        for row, ids in zip(padded, encoded, strict=True):
            row[: len(ids)] = ids
        # pictures precede the instruction: their places are the same for every item
        return padded, lengths, np.flatnonzero(encoded[0] == prompts.image_token_id)
