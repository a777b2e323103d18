"""The policy: NVIDIA-style observation dict in, joint targets out, transforms included.

    from gr00t_fast import load_policy
    policy = load_policy("./my-checkpoint", data_config="so100")
    actions = policy.get_action({"video.webcam": frame, "state.single_arm": arm, "state.gripper": gripper,
                                 "annotation.human.task_description": ["Place the block in the bowl"]})

Axis alphabet: B batch, C cameras, H horizon, D joint values of a part, A padded action width.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr00t_fast.base.console import byte_bar
from gr00t_fast.base.contracts import ActionPrefix, ModalityConfig, NetworkName, Policy, PolicyMetadata
from gr00t_fast.base.errors import CheckpointError, ConfigError, EngineError, Gr00tFastError, ObservationError, UnsafeActionError
from gr00t_fast.base.measurement import StageTimer
from gr00t_fast.checkpoint import Checkpoint, load_model, open_checkpoint
from gr00t_fast.engine import (
    EXPORTED,
    PRECISIONS,
    Continuation,
    Engine,
    PolicyInputs,
    check_engine,
    check_own_engine,
    open_engine,
    prefix_weights,
    prepare_engine,
    select_device,
    select_precision,
    warming_up,
)
from gr00t_fast.engine.manifest import Digests, Target, sha256_of_json, target_of
from gr00t_fast.inputs.data_config import DataConfig
from gr00t_fast.inputs.embodiment import Embodiment
from gr00t_fast.inputs.processor import Processor, Transform
from gr00t_fast.inputs.prompt import find_tokenizer
from gr00t_fast.model.config import ModelConfig

_MAX_DENOISING_STEPS = 1000  # one per time bucket of training; more would repeat buckets
_WARM_UP_CALLS = 3  # allocator, thread pools and lazily built kernels settle within two
_WARM_UP_INSTRUCTION = "Place the block in the bowl"


def load_policy(
    model_path: str | Path,
    embodiment_tag: str | Enum = "new_embodiment",
    data_config: str | DataConfig | Any = None,
    denoising_steps: int | None = None,
    action_horizon: int | None = None,
    device: str | int | torch.device = "auto",
    precision: str = "auto",
    engine: str | Engine = "auto",
    engine_path: str | Path | None = None,
    processor_path: str | Path | None = None,
    prompt_style: str = "plain",
    seed: int | None = None,
    revision: str | None = None,
    letterbox: str = "auto",
) -> Gr00tPolicy:
    """Load a checkpoint of GR00T N1.5, N1.6 or N1.7 and return a policy that is ready to run.

    model_path: directory or hub id. Its config.json says which network it is.
    embodiment_tag: which statistics and per-embodiment weights of the checkpoint; also NVIDIA's EmbodimentTag.
    data_config: what an N1.5 checkpoint reads, by default so100; also an object with NVIDIA's attributes. Other checkpoints say it themselves, and a
    data configuration that contradicts them is refused.
    denoising_steps: by default the checkpoint's own number.
    action_horizon: actions that a call returns; by default as many as the data config's `action_indices`, or what the checkpoint predicts if that
    is less.
    device: "auto", "cpu", "cuda", "cuda:1", "mps", or the number of a GPU.
    precision: "auto", "fp32", "bf16" or "fp16".
    engine: a name, or an Engine of your own.
    engine_path: directory of an export, for engines that run one; by default `<checkpoint>/exports/<engine>`. Such engines do not load the weights;
    the export is compared with them.
    processor_path: directory with the tokenizer's files; by default they are looked up.
    prompt_style: "plain", or "nvidia" for the brackets that NVIDIA's clients send.
    seed: makes the noise repeatable.
    revision: commit, tag or branch of a hub id. Without a commit the weights may be others tomorrow.
    letterbox: "always" or "never" if pictures of an N1.6 or N1.7 checkpoint were padded to a square, or not, when it was trained; "auto" reads its
    files. Without `experiment_cfg/` these do not say it for most fine-tunes of N1.6, and for those of N1.7 of April to June 2026.

    Raises ConfigError for an argument that cannot be used, CheckpointError for files that are missing, damaged or of another network, and
    EngineError for an export that does not fit. Everything small is checked before weights are read.
    """
    embodiment_tag = embodiment_tag.value if isinstance(embodiment_tag, Enum) else embodiment_tag
    device = f"cuda:{device}" if type(device) is int else str(device) if isinstance(device, torch.device) else device
    own, name = (None, engine) if engine is None or isinstance(engine, str) else (engine, "auto")
    _check_words(model_path=model_path, embodiment_tag=embodiment_tag, device=device, precision=precision, engine=name, letterbox=letterbox)
    _check_words(**{name: value for name, value in (("engine_path", engine_path), ("revision", revision)) if value is not None})
    check_engine(name, engine_path)
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
        raise ConfigError(f"seed must be a whole number from 0 to 2**63 - 1, or None for a different one each time; got {seed!r}.")
    if own is not None:
        check_own_engine(own)
    checkpoint = open_checkpoint(model_path, with_weights=own is None, revision=revision, letterbox=letterbox)
    target, tokenizer = target_of(checkpoint, embodiment_tag, data_config), find_tokenizer(checkpoint.network.prompt, processor_path, checkpoint.base)
    processor = checkpoint.network.processor(checkpoint.config, target.embodiment, tokenizer, prompt_style)
    steps = checkpoint.config.head.denoising_steps if denoising_steps is None else denoising_steps

    def policy(ready: Engine) -> Gr00tPolicy:
        return Gr00tPolicy(checkpoint, processor, ready, steps, action_horizon, seed, name=str(model_path))

    check_denoising_steps(steps, checkpoint.config)  # before weights are read
    check_action_horizon(action_horizon, target.embodiment)
    if own is not None:
        return policy(own)
    if name in EXPORTED:  # an export has a precision, and its runtime says which devices it can use
        return policy(open_engine(name, engine_path, target, device, precision))
    where = select_device(device)
    dtype = select_precision(precision, where)
    over = prepare_engine(name, where)
    with byte_bar("weights") as progress:
        model = load_model(checkpoint, embodiment_tag, where, dtype, progress)
    return policy(over(model))


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


def check_denoising_steps(steps: int, config: ModelConfig) -> int:
    """Raises ConfigError."""
    most, number = min(_MAX_DENOISING_STEPS, config.head.timestep_buckets), _whole(steps)
    if number is None or not 1 <= number <= most:
        raise ConfigError(f"denoising_steps must be a whole number from 1 to {most}, got {steps!r}.")
    return number


def check_action_horizon(horizon: int | None, embodiment: Embodiment) -> int:
    """None: the data configuration's. Raises ConfigError."""
    trained = embodiment.trained_horizon
    number = embodiment.default_horizon if horizon is None else _whole(horizon)
    if number is None or not 1 <= number <= trained:
        raise ConfigError(
            f"action_horizon must be from 1 to {trained}, the number of actions this checkpoint was trained to predict; got {horizon!r}."
        )
    return number


class Gr00tPolicy(Policy):
    """A network in this process: `get_action` is `preprocess`, `infer` and `postprocess`, which can be called alone. Not thread-safe: one thread
    calls it."""

    def __init__(
        self, checkpoint: Checkpoint, processor: Processor, engine: Engine, steps: int, action_horizon: int | None, seed: int | None, name: str = ""
    ) -> None:
        """name: of the checkpoint, for `repr`. Raises ConfigError for steps or a horizon that cannot be used."""
        self.checkpoint, self.processor, self.engine, self.name = checkpoint, processor, engine, name
        self.metadata: PolicyMetadata = processor.embodiment.metadata
        self.denoising_steps, self.action_horizon = steps, action_horizon
        if (size := getattr(engine, "camera_size", None)) is not None:  # an export is for one shape of camera
            processor.expect_cameras(dict.fromkeys(self.metadata.resolutions, size))
        self._generator = torch.Generator()  # on the CPU, so that a seed means the same noise on every device
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        self._seed = seed
        self.last_timing = {}

    def __repr__(self) -> str:
        words: dict[str, Any] = {"embodiment_tag": self.metadata.embodiment_tag, "engine": self.engine.name}
        words |= {"device": str(self.device), "dtype": str(self.dtype)}
        words |= {"denoising_steps": self.denoising_steps, "action_horizon": self.action_horizon}
        return f"Gr00tPolicy({self.name!r}, {', '.join(f'{word}={value!r}' for word, value in words.items())})"

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @property
    def dtype(self) -> torch.dtype:
        return self.engine.dtype

    @property
    def transforms(self) -> list[Transform]:
        """What `preprocess` does to an observation, in order."""
        return self.processor.transforms

    @property
    def denoising_steps(self) -> int:
        """Euler steps per inference. Setting it costs nothing: the small tables it needs are made at the next call and kept."""
        return self._denoising_steps

    @denoising_steps.setter
    def denoising_steps(self, steps: int) -> None:
        self._denoising_steps = check_denoising_steps(steps, self.checkpoint.config)

    @property
    def action_horizon(self) -> int:
        """How many of the predicted actions are returned."""
        return self._action_horizon

    @action_horizon.setter
    def action_horizon(self, horizon: int | None) -> None:
        self._action_horizon = check_action_horizon(horizon, self.processor.embodiment)

    def fingerprint(self) -> str:
        """As `Policy.fingerprint`: of weights, statistics, embodiment and data configuration. It reads the weight files (1 s per GB), unless a hidden
        file of the checkpoint's directory has their digests from an earlier call. Raises OSError."""
        return sha256_of_json(Target(self.checkpoint, self.processor.embodiment).identity(Digests(self.checkpoint.path)))

    @property
    def protocol(self) -> NetworkName:
        return self.checkpoint.network.protocol

    @property
    def continues(self) -> bool:
        return self.engine.continues

    @property
    def max_batch(self) -> int:
        return self.engine.max_batch

    @property
    def equal_prompts(self) -> bool:
        return getattr(self.engine, "equal_prompts", False)

    @property
    def precision(self) -> str:
        """What the network computes in: int8 or fp8 where the engine is quantised, else its number format."""
        return getattr(self.engine, "precision", "") or next(word for word, dtype in PRECISIONS.items() if dtype == self.dtype)

    @property
    def chunk_shape(self) -> tuple[int, int]:
        """Trained horizon and padded action width: what `noise` has besides the batch."""
        return self.processor.chunk_shape

    def describe(self) -> list[str]:
        """As `Policy.describe`."""
        return [f"{self.engine.name} on {self.device}", self.precision, f"{self.denoising_steps} denoising steps", *self.processor.describe()]

    def expect_cameras(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """As `Policy.expect_cameras`."""
        self.processor.expect_cameras(sizes)

    def get_modality_config(self) -> dict[str, ModalityConfig]:
        embodiment = self.processor.embodiment
        return embodiment.data_config.modality_config(embodiment.action_configs)

    @property
    def modality_config(self) -> dict[str, ModalityConfig]:
        """As `get_modality_config`; NVIDIA's Gr00tPolicy has both."""
        return self.get_modality_config()

    def apply_transforms(self, observation: dict[str, Any]) -> dict[str, Tensor]:
        """What the network reads, by the names of NVIDIA's method: for a look at it. Raises ObservationError."""
        inputs, checkpoint = self.preprocess(observation), self.checkpoint
        pixels = inputs.to(self.device, torch.float32).pixel_values
        return checkpoint.network.reference_inputs(inputs, self.processor.embodiment, checkpoint.config, pixels)

    def unapply_transforms(self, action: dict[str, Any]) -> dict[str, np.ndarray]:
        """`{"action": normalised actions (B, H, A)}`, a tensor or an array -> `action.<part>` float32 (B, H, D) in joint units; of N1.6 and N1.7
        those that the embodiment has, relative ones from `"state"`, the `state.<part>` (B, T, D) that they count from."""
        chunk = np.asarray(torch.as_tensor(action["action"]).float().cpu())
        return self.processor.action(chunk[:, : self.processor.embodiment.trained_horizon], action.get("state"))

    def reset(self) -> None:
        """Begin an episode: a seeded policy repeats its noise from the start. Nothing else is kept from call to call."""
        if self._seed is not None:
            self._generator.manual_seed(self._seed)

    def get_action(self, observation: dict[str, Any], noise: Any = None, prefix: ActionPrefix | None = None) -> dict[str, np.ndarray]:
        """One inference.

        observation: `video.<cam>` uint8 (T, H, W, 3) or (B, T, H, W, 3) with T = 1, any resolution; `state.<part>` float (T, D) or
        (B, T, D); the instruction as str or list of str. Unbatched in, unbatched out. NVIDIA's nested form is taken too. Where a checkpoint
        reads earlier times (`delta_indices` of `get_modality_config`), T is their number, oldest first.
        noise: (B, trained horizon, A), numpy or torch; makes the call reproducible. Drawn from the policy's generator when absent.
        prefix: actions to continue; without it, or with no rows in it, the call is exactly the same as ever.
        Returns `action.<part>` float32 (action_horizon, D) or (B, action_horizon, D). Raises what `preprocess`, `infer` and `postprocess` raise.
        """
        timer = StageTimer(self.engine.synchronise)
        inputs = self.preprocess(observation, timer)
        actions = self.postprocess(self.infer(inputs, noise, prefix, timer), inputs, prefix, timer)
        self.last_timing = timer.finish()
        return actions

    def get_actions(self, calls: Sequence[Mapping[str, Any]]) -> list[dict[str, np.ndarray] | Exception]:
        """As `Policy.get_actions`: one inference for all. An item's actions are those of its own call up to the rounding of a larger product."""
        timer = StageTimer(self.engine.synchronise)
        answers: dict[int, Any] = {}
        begun: list[tuple[int, PolicyInputs, Tensor, Continuation | None, ActionPrefix | None]] = []
        for number, call in enumerate(calls):
            prefix = call.get("prefix")
            try:
                inputs = self.preprocess(call["observation"], timer)
                begun.append((number, inputs, *self._beginning(inputs, call.get("noise"), prefix), prefix))
            except Gr00tFastError as error:
                answers[number] = error
        if begun:
            _, parts, starts, continued, _ = zip(*begun, strict=True)
            continuation = None
            if any(continued):  # weights of 0 continue nothing
                filled = [part or Continuation(*[torch.zeros(start.shape)] * 2) for part, start in zip(continued, starts, strict=True)]
                continuation = Continuation.together(filled)
            rows = self._run(PolicyInputs.together(parts), torch.cat(starts), continuation, timer)
            chunks = np.split(rows, np.cumsum([part.batch for part in parts])[:-1])
            for (number, inputs, _, _, prefix), chunk in zip(begun, chunks, strict=True):
                try:
                    answers[number] = self.postprocess(chunk, inputs, prefix, timer)
                except UnsafeActionError as error:
                    answers[number] = error
        self.last_timing = timer.finish()
        return [answers[number] for number in range(len(calls))]

    def preprocess(self, observation: dict[str, Any], timer: StageTimer | None = None) -> PolicyInputs:
        """Check and transform, on the host. timer: collects stages, here and below. Raises ObservationError."""
        with (timer or StageTimer()).stage("preprocess"):
            return self.processor(observation)

    def infer(self, inputs: PolicyInputs, noise: Any = None, prefix: ActionPrefix | None = None, timer: StageTimer | None = None) -> np.ndarray:
        """Run the network: -> normalised actions float32 (B, trained horizon, A). noise, prefix: as of `get_action`.

        Raises ObservationError for noise or a prefix of another form, ConfigError for a prefix that the engine cannot take, EngineError when the
        engine's answer has another shape.
        """
        timer = timer or StageTimer(self.engine.synchronise)
        with timer.stage("preprocess"):
            start, continuation = self._beginning(inputs, noise, prefix)
        return self._run(inputs, start, continuation, timer)

    def _beginning(self, inputs: PolicyInputs, noise: Any, prefix: ActionPrefix | None) -> tuple[Tensor, Continuation | None]:
        """What denoising begins with, and what it is to continue."""
        known = self.processor.known_rows(prefix, inputs)
        if known and not self.engine.continues:
            raise ConfigError(f"the engine '{self.engine.name}' cannot continue a chunk. Use --smoothing=none, or --engine=eager.")
        continuation = self._continuation(known, prefix, inputs) if known else None
        return self._noise(noise, inputs.batch), continuation  # noise last: a refused observation uses up none

    def _run(self, inputs: PolicyInputs, start: Tensor, continuation: Continuation | None, timer: StageTimer) -> np.ndarray:
        options = {} if continuation is None else {"continuation": continuation}
        answer = self.engine.run(inputs, start, self._denoising_steps, timer, **options)
        expected = (inputs.batch, *self.chunk_shape)
        if not isinstance(answer, Tensor | np.ndarray) or tuple(answer.shape) != expected:
            found = f"shape {tuple(answer.shape)}" if isinstance(answer, Tensor | np.ndarray) else type(answer).__name__
            raise EngineError(
                f"the engine '{self.engine.name}' returned {found}, expected actions of shape {expected} (batch, trained horizon, padded action "
                "width). Mend its `run`."
            )
        return torch.as_tensor(answer).float().cpu().numpy()

    def postprocess(
        self, chunk: np.ndarray, inputs: PolicyInputs, prefix: ActionPrefix | None = None, timer: StageTimer | None = None
    ) -> dict[str, np.ndarray]:
        """`infer`'s answer -> `action.<part>` float32 in joint units, the first `action_horizon` of them; unbatched if the observation was.

        Raises UnsafeActionError when one is NaN or infinite.
        """
        with (timer or StageTimer()).stage("postprocess"):
            actions = self.processor.action(chunk[:, : self.action_horizon], inputs.raw_state)
            for key, rows in self.processor.known_rows(prefix, inputs).items():  # exactly, without what normalising rounds
                committed = min(prefix.inference_delay, self._action_horizon)
                actions[key][:, :committed] = rows[:, :committed]
            unusable = [key for key, values in actions.items() if not np.isfinite(values).all()]
            if unusable:
                raise UnsafeActionError(
                    f"the network answered NaN or infinity ({', '.join(unusable)}) in {self.dtype}; expected finite ones: no arm may get these. "
                    + ("The weights are damaged." if self.dtype == torch.float32 else "Numbers overflow that fit in fp32: try --precision=fp32.")
                )
            actions = {"action": np.concatenate([*actions.values()], axis=-1)} if inputs.joined else actions
            return actions if inputs.batched else {key: value[0] for key, value in actions.items()}

    def _continuation(self, known: Mapping[str, np.ndarray], prefix: ActionPrefix, inputs: PolicyInputs) -> Continuation:
        """Normalised and padded, on the host. Dimensions beyond the arm's own carry no weight: nothing is known of them."""
        horizon, width = self.chunk_shape
        rows = torch.from_numpy(self.processor.action.normalised(known, inputs.raw_state))  # (B, L, widths together)
        actions, weights = torch.zeros(inputs.batch, horizon, width), torch.zeros(horizon, width)
        actions[:, : rows.shape[1], : rows.shape[2]] = rows
        weights[:, : rows.shape[2]] = prefix_weights(horizon, prefix.inference_delay, rows.shape[1])[:, None]
        return Continuation(actions, weights.expand_as(actions))

    def warm_up(self, instruction: str | None = None, continuing: bool = False) -> dict[str, float]:
        """Run until the first-call costs are paid, with `continuing` those of continuing a chunk too; returns the last call's timing.

        Does not disturb the noise sequence of a seeded policy. Raises CheckpointError when an action is NaN or infinite.
        """
        observation = self.example_observation(instruction or _WARM_UP_INSTRUCTION)
        state = self._generator.get_state()
        try:
            with warming_up(self.engine):
                for _ in range(_WARM_UP_CALLS):
                    actions = self.get_action(observation)
                for _ in range(_WARM_UP_CALLS if continuing else 0):
                    self.get_action(observation, prefix=ActionPrefix(actions, 1))
        except UnsafeActionError as error:
            narrow = self.dtype != torch.float32
            raise CheckpointError(
                f"the network answers NaN or infinity to an ordinary observation in {self.dtype}; expected finite actions. "
                + (
                    f"{self.dtype} may overflow where fp32 does not: try --precision=fp32."
                    if narrow
                    else "The weights or the statistics are damaged: copy or download the checkpoint again."
                )
            ) from error
        self._generator.set_state(state)
        return self.last_timing

    def example_observation(self, instruction: str = _WARM_UP_INSTRUCTION) -> dict[str, Any]:
        """An observation of the right form: mid-grey pictures, joints in the middle of their range. For warm-up and timing."""
        return self.processor.example_observation(instruction)

    def _noise(self, noise: Any, batch: int) -> Tensor:
        shape = (batch, *self.chunk_shape)
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
