"""GR00T as lerobot trains it (`--policy.type=groot`): N1.5 with lerobot 0.4 and 0.5, N1.7 from 0.6 on.

config.json                                            the policy's features (cameras and widths), and how many actions it returns
policy_preprocessor.json, policy_postprocessor.json    what is done with observations and actions, step by step; `state_file` of a step: statistics
base_config.json, and the network's backbone file      sizes, where they lie there; lerobot's format has none: then those of the published network
train_config.json                                      the data set's name

Tensors have NVIDIA's names with a prefix. The numbers are lerobot's, which differ from NVIDIA's for the same weights: pictures are squashed, cameras
sorted, statistics and prompts others (lerobot 0.4.4 and 0.6.1: policies/groot/processor_groot.py, modeling_groot.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from gr00t_fast.base.contracts import SO100_JOINTS
from gr00t_fast.base.errors import CheckpointError, ConfigError, shown
from gr00t_fast.base.files import lerobot_home, read_json
from gr00t_fast.inputs.data_config import DataConfig
from gr00t_fast.inputs.embodiment import STATISTICS, Arithmetic, Camera, Embodiment, ImageSettings, Part
from gr00t_fast.inputs.images import FitImages
from gr00t_fast.model.config import ModelConfig
from gr00t_fast.networks import n1d5, n1d7
from gr00t_fast.networks.n1d5 import N1D5
from gr00t_fast.networks.n1d7 import N1D7, Modalities, check_data_config, image_settings
from gr00t_fast.networks.spec import Section, damaged, read_object

POLICY, PREPROCESSOR, POSTPROCESSOR = "config.json", "policy_preprocessor.json", "policy_postprocessor.json"
BASE_FILE, TRAINING_FILE = "base_config.json", "train_config.json"
DEFAULT_TAG = "new_embodiment"  # of load_policy: here it stands for the one that the checkpoint has
_MIXED = "Take all files from one checkpoint."
_IMAGES, _STATE, _ACTION = "observation.images.", "observation.state", "action"
_WEIGHTS_PREFIX = "_groot_model."

# The steps of each network's processors, by the names in lerobot's registry.
_PACK_N1D5, _PACK_N1D7 = "groot_pack_inputs_v3", "groot_n1_7_pack_inputs_v1"
_ENCODE, _DECODE = "groot_n1_7_vlm_encode_v1", "groot_n1_7_action_decode_v1"
_UNPACK_N1D5, _UNPACK_N1D7 = "groot_action_unpack_unnormalize_v1", "groot_action_unpack_unnormalize_v2"
_RENAME, _BATCH, _DEVICE = "rename_observations_processor", "to_batch_processor", "device_processor"
_PIPELINES = {
    _PACK_N1D5: ((_RENAME, _BATCH, _PACK_N1D5, "groot_eagle_encode_v3", "groot_eagle_collate_v3", _DEVICE), (_UNPACK_N1D5,)),
    _PACK_N1D7: ((_RENAME, _BATCH, _PACK_N1D7, _ENCODE, _DEVICE), (_UNPACK_N1D7, _DECODE)),
}
# What a step's settings may be: key -> what an absent one means, and the value that is computed with.
_COMPUTED: dict[str, dict[str, tuple[Any, Any]]] = {
    _DEVICE: {"float_dtype": (None, None)},
    _PACK_N1D5: {
        **{"state_horizon": (1, 1), "language_key": ("task", "task"), "formalize_language": (False, False), "normalize_min_max": (True, True)},
    },
    _PACK_N1D7: {"state_horizon": (1, 1), "language_key": ("task", "task"), "normalize_min_max": (True, True)},
    _UNPACK_N1D5: {"normalize_min_max": (True, True)},
    _UNPACK_N1D7: {"normalize_min_max": (True, True), "libero_gripper_action": (False, False)},
    _DECODE: {"action_decode_transform": (None, None)},
}
# Those that are read, or have no effect on inference.
_PACKED = {"embodiment_tag", "embodiment_mapping", "max_state_dim", "max_action_dim", "action_horizon"}
_READ: dict[str, set[str]] = {
    _RENAME: {"rename_map"},
    _DEVICE: {"device"},
    "groot_eagle_encode_v3": {"tokenizer_assets_repo"},
    "groot_eagle_collate_v3": {"tokenizer_assets_repo"},
    _PACK_N1D5: _PACKED,
    _PACK_N1D7: {
        *_PACKED,
        *("valid_action_horizon", "video_horizon", "formalize_language", "state_dropout_prob", "clip_outliers", "use_percentiles"),
        *("video_modality_keys", "raw_stats", "modality_config"),
    },
    _ENCODE: {
        *("image_crop_size", "image_target_size", "shortest_image_edge", "crop_fraction", "use_albumentations", "letter_box_transform"),
        *("model_name", "device"),
    },
    _UNPACK_N1D5: {"env_action_dim"},
    _UNPACK_N1D7: {"env_action_dim", "clip_normalized_action", "libero_gripper_binarize"},
    _DECODE: {"env_action_dim", "raw_stats", "modality_config", "use_percentiles", "use_relative_action"},
}
_ALIASES = {"wrist_image": "image2"}  # a camera's other name, where the first is not there
# All in fp32, and a joint is constant where its statistics are equal.
_ARITHMETIC = Arithmetic(forward=np.float32, inverse=np.float32, close=False, clip_actions=False, keep_constant=False)


@dataclass(frozen=True)
class _Step:
    name: str
    settings: Section
    state_file: Any


def _steps(directory: Path, file: str) -> list[_Step]:
    """Raises CheckpointError."""
    steps = read_object(directory / file).get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, Mapping) and isinstance(step.get("config"), Mapping) for step in steps):
        raise damaged(file, "its steps are no list of names and settings")
    return [
        _Step(str(step.get("registry_name")), Section(step["config"], f"{file} {step.get('registry_name')}"), step.get("state_file"))
        for step in steps
    ]


def model_type_of(directory: Path, policy: Mapping[str, Any]) -> str:
    """The step that packs a policy's inputs, which tells its network. Raises CheckpointError for another policy than GR00T."""
    if policy["type"] != "groot":
        raise CheckpointError(
            f"{directory} is a lerobot policy of type {shown(policy['type'])}, expected 'groot'. Run it with lerobot: lerobot-rollout "
            f"--policy.path={directory} (lerobot 0.6), lerobot-record --policy.path={directory} (0.4)."
        )
    names = [step.name for step in _steps(directory, PREPROCESSOR)]
    found = next((name for name in names if name in _PIPELINES), None)
    if found is None:
        raise CheckpointError(f"{directory / PREPROCESSOR} has the steps {', '.join(names)}; expected {' or '.join(_PIPELINES)} among them.")
    return found


def _pipeline(directory: Path, file: str, expected: Collection[tuple[str, ...]]) -> dict[str, _Step]:
    """By name, checked. Raises CheckpointError for steps, settings or an order that is not computed here."""
    steps = _steps(directory, file)
    if (names := tuple(step.name for step in steps)) not in expected:
        known = " or ".join(f"{', '.join(each)}" for each in expected)
        raise CheckpointError(f"{directory / file} has the steps {', '.join(names)}; expected {known}. What another one does is not computed here.")
    for step in steps:
        computed = _COMPUTED.get(step.name, {})
        step.settings.warn_of_unknown({*computed, *_READ.get(step.name, ())})
        step.settings.refuse_other(computed)
    return {step.name: step for step in steps}


def _statistics_of(directory: Path, step: _Step) -> dict[str, dict[str, np.ndarray]]:
    """Feature -> statistic -> float64, from the step's file. Raises CheckpointError."""
    name = step.state_file
    if not isinstance(name, str) or Path(name).name != name:
        raise damaged(step.settings.where, f"its state_file is {shown(name)}, expected the name of a file with statistics")
    try:
        flat = load_file(directory / name)
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory / name} is missing: the statistics of {step.settings.where}. Copy or download it.") from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise damaged(str(directory / name), f"cannot be read ({error})") from error
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, values in flat.items():
        feature, _, statistic = key.rpartition(".")
        if feature in (_STATE, _ACTION) and statistic in STATISTICS:
            found.setdefault(feature, {})[statistic] = values.astype(np.float64)
    for feature in (_STATE, _ACTION):
        if absent := [statistic for statistic in ("min", "max") if statistic not in found.get(feature, {})]:
            raise CheckpointError(
                f"{directory / name} has no {' and '.join(f'{feature}.{statistic}' for statistic in absent)}: joints cannot be scaled."
            )
    return found


@dataclass(frozen=True)
class LerobotFiles:
    """The small files of a policy that lerobot saved: it has one embodiment. `dataset`: meta/info.json of the data that it was trained on, where it
    is on this machine."""

    policy: Section
    pre: Mapping[str, _Step]
    post: Mapping[str, _Step]
    statistics: Mapping[str, Mapping[str, np.ndarray]]
    config: ModelConfig
    dataset: Mapping[str, Any]

    @property
    def _pack(self) -> _Step:
        return next(step for name, step in self.pre.items() if name in _PIPELINES)

    @property
    def _decode(self) -> _Step:
        return next(iter(self.post.values()))

    @property
    def tag(self) -> str:
        return str(self._pack.settings.values.get("embodiment_tag", DEFAULT_TAG))

    @property
    def tags(self) -> Collection[str]:
        return (self.tag,)

    def row_of(self, tag: str) -> int:
        if tag not in (self.tag, DEFAULT_TAG):
            raise ConfigError(f"unknown embodiment_tag '{tag}'. This checkpoint has one: leave --embodiment_tag out, or give {self.tag}.")
        mapping, rows = self._pack.settings.section("embodiment_mapping").values, self.config.head.embodiments
        row = mapping.get(self.tag, 0)  # lerobot trains an unknown tag with the first row
        if type(row) is not int or not 0 <= row < rows:
            raise CheckpointError(
                f"{self._pack.settings.where}: '{self.tag}' selects row {shown(row)} of the per-embodiment weights; there are {rows}."
            )
        return row

    def embodiment(self, tag: str, data_config: DataConfig | None) -> Embodiment:
        row = self.row_of(tag)
        try:
            found = self._read(row)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            if isinstance(error, CheckpointError | ConfigError):
                raise
            raise damaged(f"{POLICY}, {PREPROCESSOR} and {POSTPROCESSOR}", f"their settings are incomplete or damaged ({error!r})") from error
        if data_config is not None:
            check_data_config(data_config, found.data_config, PREPROCESSOR)
        return found

    def _read(self, row: int) -> Embodiment:
        pack, decode, head = self._pack.settings, self._decode.settings, self.config.head
        widths = {"state": self._width("input_features", _STATE), "action": self._width("output_features", _ACTION)}
        self._check_twice(widths["action"])
        steps, state, action = self._parts(widths)
        for what, parts in (("state", state), ("action", action)):
            if (total := sum(part.width for part in parts)) != widths[what]:
                raise CheckpointError(f"{PREPROCESSOR}: the {what} has {total} values, by {POLICY} {widths[what]}. {_MIXED}")
        chunk, played, horizon = self.policy.whole("chunk_size"), self.policy.whole("n_action_steps"), steps
        if self._pack.name == _PACK_N1D7:  # lerobot's N1.5 returns all that there are
            horizon = min(steps, chunk, pack.whole("valid_action_horizon", steps))
            steps = min(horizon, played)
        cameras = self._cameras()
        data_config = DataConfig(
            video_keys=tuple(cameras),
            state_keys=tuple(part.key for part in state),
            action_keys=tuple(part.key for part in action),
            action_indices=tuple(range(steps)),
        )
        files = {"policy": self.policy.values, **{step.name: step.settings.values for step in (*self.pre.values(), *self.post.values())}}
        files = {name: {key: value for key, value in values.items() if key != "device"} for name, values in files.items()}  # it decides no number
        statistics = {feature: {name: values.tolist() for name, values in found.items()} for feature, found in self.statistics.items()}
        clip = decode.switch("clip_normalized_action", False) if self._decode.name == _UNPACK_N1D7 else self._decode.name == _DECODE
        return Embodiment(
            tag=self.tag,
            row=row,
            data_config=data_config,
            cameras=cameras,
            state=state,
            action=action,
            arithmetic=replace(_ARITHMETIC, clip_actions=clip),
            trained_horizon=horizon,
            state_width=head.state_dim,
            record={"files": files, "statistics": statistics},
            images=self._image_settings(),
            formalize_language=self._pack.name == _PACK_N1D7 and pack.switch("formalize_language", True),
            notes=self._notes(chunk, played),
            n_action_steps=min(steps, played),
        )

    def _width(self, features: str, key: str) -> int:
        (width,) = self.policy.section(features).section(key).values["shape"]
        return Section({"shape": width}, f"{POLICY} {features}.{key}").whole("shape")

    def _check_twice(self, actions: int) -> None:
        """What stands in two files. Raises CheckpointError where they say different things."""
        pack, decode, head = self._pack.settings, self._decode.settings, self.config.head
        widths = {"max_state_dim": head.state_dim, "max_action_dim": head.action_dim}
        for section, expected in ((self.policy, {**widths, "embodiment_tag": self.tag}), (pack, widths), (decode, {"env_action_dim": actions})):
            section.refuse_different(expected)
        decode.whole("env_action_dim")  # lerobot writes it always; without it the other settings have been lost, too
        if self._decode.name == _DECODE:
            decode.refuse_different({key: pack.values.get(key) for key in ("raw_stats", "modality_config", "use_percentiles")})
        self.policy.refuse_other({"action_decode_transform": (None, None)} if self._pack.name == _PACK_N1D7 else {})
        if self.policy.switch("use_relative_actions", False) and not decode.values.get("use_relative_action"):
            raise CheckpointError(f"{POLICY} says use_relative_actions, {decode.where} decodes absolute ones. {_MIXED}")
        if pack.values.get("video_horizon") not in (None, 1):
            raise CheckpointError(f"{pack.where}: video_horizon is {shown(pack.values['video_horizon'])}; a camera's frame is shown once here.")

    def _parts(self, widths: Mapping[str, int]) -> tuple[int, tuple[Part, ...], tuple[Part, ...]]:
        """How many actions the statistics are for, and the parts of state and action, scaled in fp32."""
        pack, decode = self._pack.settings, self._decode.settings
        settings = {"clip_outliers": False, "use_percentiles": False, "use_relative_action": False, "apply_sincos_state_encoding": False}
        if self._pack.name == _PACK_N1D7:
            settings["clip_outliers"] = pack.switch("clip_outliers", True)
        if self._decode.name == _DECODE:
            settings |= {
                "use_percentiles": decode.switch("use_percentiles", False),
                "use_relative_action": decode.switch("use_relative_action", False),
            }
            told, statistics = decode.section("modality_config").values, decode.section("raw_stats").values
            # lerobot scales by ranges whatever these say
            modalities = {name: {key: value for key, value in each.items() if not key.endswith("_embedding_keys")} for name, each in told.items()}
            needed = ("min", "max", *(("q01", "q99") if settings["use_percentiles"] else ()))
        else:
            modalities, statistics, needed = *self._split(widths), ("min", "max")
        reader = Modalities(modalities, statistics, settings, needed, (decode.where, decode.where))
        steps = reader.offsets("action")
        if list(steps) != list(range(len(steps))) or len(steps) > self.config.head.action_horizon:
            raise CheckpointError(
                f"{decode.where}: delta_indices {shown(list(steps))}; expected 0, 1, 2 and so on, {self.config.head.action_horizon} at most."
            )
        state, action = (tuple(map(_in_fp32, parts)) for parts in (reader.state(), reader.action(len(steps))))
        for feature, parts in ((_STATE, state), (_ACTION, action)):
            for name, found in (("min", [part.low for part in parts]), ("max", [part.high for part in parts])):
                if not np.array_equal(np.concatenate([values.ravel() for values in found]), self.statistics[feature][name].astype(np.float32)):
                    raise CheckpointError(f"{feature}.{name} of {self._pack.state_file} is not that of {decode.where}. {_MIXED}")
        return len(steps), state, action

    def _split(self, widths: Mapping[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Modalities and statistics of a checkpoint that scales whole vectors: an SO-100's are its arm and its gripper, as NVIDIA names them."""
        modalities: dict[str, Any] = {}
        statistics: dict[str, Any] = {}
        for modality, feature in (("state", _STATE), ("action", _ACTION)):
            width = widths[modality]
            split = (
                {"single_arm": slice(0, width - 1), "gripper": slice(width - 1, width)} if width == len(SO100_JOINTS) else {"joints": slice(0, width)}
            )
            modalities[modality] = {"modality_keys": list(split), "delta_indices": list(range(self.config.head.action_horizon))}
            found = self.statistics[feature]
            if wrong := [name for name, values in found.items() if values.shape != (width,)]:
                raise CheckpointError(f"{self._pack.state_file}: {feature}.{', '.join(wrong)}: expected {width} values, as {POLICY} has.")
            statistics[modality] = {part: {name: values[where] for name, values in found.items()} for part, where in split.items()}
        return modalities, statistics

    def _cameras(self) -> dict[str, Camera | None]:
        """By the names that an observation has before lerobot renames it, in the network's order."""
        features = {key: value["shape"] for key, value in self.policy.section("input_features").values.items() if value.get("type") == "VISUAL"}
        if other := [key for key in features if not key.startswith(_IMAGES)]:
            raise CheckpointError(f"{POLICY}: the camera {', '.join(other)} is not computed here; expected {_IMAGES}<name>.")
        renamed = {new: old for old, new in self.pre[_RENAME].settings.section("rename_map").values.items()}
        if other := [key for pair in renamed.items() for key in pair if not key.startswith(_IMAGES)]:
            raise CheckpointError(f"{PREPROCESSOR}: rename_map has {', '.join(map(shown, other))}; only cameras ({_IMAGES}<name>) are renamed here.")
        names = [name.removeprefix(_IMAGES) for name in sorted(features)]
        told = self._pack.settings.values.get("video_modality_keys") or []
        matches = [next((each for each in (name, _ALIASES.get(name)) if each in names), None) for name in told]
        shapes = {name: features[_IMAGES + name] for name in [name for name in matches if name is not None] or names}
        return {
            f"video.{renamed.get(_IMAGES + name, _IMAGES + name).removeprefix(_IMAGES)}": Camera(width, height, self.dataset.get("fps"))
            for name, (_, height, width) in shapes.items()
        }

    def _image_settings(self) -> ImageSettings:
        if self._pack.name == _PACK_N1D5:
            side = self.config.vision.image_size
            return ImageSettings(False, False, side, 1.0, None, (side, side), squash=True)  # type: ignore[arg-type]
        encode = self.pre[_ENCODE].settings
        if encode.values.get("image_target_size") is None:
            raise CheckpointError(f"{encode.where}: image_target_size is null: frames that are not resized are not computed here.")
        sizes = {key: encode.values.get(key) for key in ("image_crop_size", "image_target_size", "shortest_image_edge", "crop_fraction")}
        settings = {**sizes, "use_albumentations": encode.switch("use_albumentations", False)}
        return image_settings(settings, encode.switch("letter_box_transform", False), squash=not settings["use_albumentations"])

    def _notes(self, chunk: int, played: int) -> tuple[str, ...]:
        rate = f"{self.dataset['fps']:g} Hz as its data set" if self.dataset else "its files do not say the rate of its data set"
        return (f"as lerobot trained it: chunk_size {chunk}, n_action_steps {played}, {rate}",)


def _in_fp32(part: Part) -> Part:
    return replace(part, low=part.low.astype(np.float32), high=part.high.astype(np.float32))


def read_files(path: Path, config: Mapping[str, Any], sizes: ModelConfig, letterbox: str) -> LerobotFiles:
    if letterbox != "auto":
        raise ConfigError(
            f"letterbox '{letterbox}' is for NVIDIA's GR00T N1.7 checkpoints; {path} is lerobot's, which says it. Leave --letterbox out."
        )
    policy = read_object(path / POLICY)
    before, after = _PIPELINES[model_type_of(path, policy)]
    pre, post = _pipeline(path, PREPROCESSOR, [before]), _pipeline(path, POSTPROCESSOR, [(last, _DEVICE) for last in after])
    pack, decode = (next(step for step in steps.values() if step.name in named) for steps, named in ((pre, _PIPELINES), (post, after)))
    statistics = _statistics_of(path, pack)
    if decode.name != _DECODE:
        other = _statistics_of(path, decode)
        wrong = [f"{feature}.{name}" for feature in other for name in other[feature] if not _equal(other[feature], statistics[feature], name)]
        if wrong:
            raise CheckpointError(f"{', '.join(wrong)} of {pack.state_file} and {decode.state_file} differ. {_MIXED}")
    return LerobotFiles(Section(policy, POLICY), pre, post, statistics, sizes, _dataset(path))


def _equal(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], name: str) -> bool:
    return name in other and np.array_equal(one[name], other[name], equal_nan=True)


def _dataset(path: Path) -> dict[str, Any]:
    """`fps` of the data set that the policy was trained on, {} where it is not on this machine: no file of the policy has it."""
    try:
        told = read_json(path / TRAINING_FILE)["dataset"]
        places = [Path(root) for root in (told.get("root"),) if root and Path(root).is_absolute()] or [lerobot_home() / told["repo_id"]]
        fps = read_json(places[0] / "meta" / "info.json")["fps"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {"fps": float(fps)} if type(fps) in (int, float) and 0 < fps < 1000 else {}


def _config_of(published: Mapping[str, Any]) -> Callable[[Path, Mapping[str, Any]], Mapping[str, Any]]:
    """What NVIDIA's config.json would say: the base model's where it lies there, with the policy's number of denoising steps."""

    def config_of(directory: Path, policy: Mapping[str, Any]) -> Mapping[str, Any]:
        file = directory / BASE_FILE
        base = {key: value for key, value in (read_object(file) if file.exists() else published).items() if key != "_note"}
        steps = policy.get("num_inference_timesteps")
        return base if steps is None else {**base, "num_inference_timesteps": steps}

    return config_of


def _whole_frames(config: Mapping[str, Any], backbone: Mapping[str, Any]) -> ModelConfig:
    sizes = n1d5.read_config(config, backbone)
    return replace(sizes, vision=replace(sizes.vision, crop_scale=1.0))  # type: ignore[arg-type]


def _render(instruction: str, images: int, tokens: int) -> str:
    """lerobot shows N1.5 the printed list of the instruction, in training too."""
    return n1d5.render_prompt(str([instruction]), images, tokens)


_FILES = (PREPROCESSOR, POSTPROCESSOR, BASE_FILE, TRAINING_FILE, "policy_p*processor_step_*.safetensors")

LEROBOT_N1D5 = replace(
    N1D5,
    model_type=_PACK_N1D5,
    read_config=_whole_frames,
    read_files=read_files,
    images=lambda embodiment, config: FitImages(embodiment, config.vision.token_side, last=None),
    prompt=replace(N1D5.prompt, render=_render, lists_texts=False),
    download=(*_FILES, "eagle2_hg_model/*"),
    config_of=_config_of(n1d5.PUBLISHED_CONFIG),
    prefix=_WEIGHTS_PREFIX,
    tied=("backbone.eagle_model.language_model.lm_head.weight", "backbone.eagle_model.language_model.model.embed_tokens.weight"),
)
LEROBOT_N1D7 = replace(
    N1D7,
    model_type=_PACK_N1D7,
    read_files=read_files,
    download=(*_FILES, N1D7.backbone_file),
    config_of=_config_of(n1d7.PUBLISHED_CONFIG),
    prefix=_WEIGHTS_PREFIX,
    tied=("backbone.model.lm_head.weight", "backbone.model.model.language_model.embed_tokens.weight"),
)
