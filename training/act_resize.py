"""A resize for ACT that is saved with the policy, so that pictures at inference are resized as they were in training.

    python training/act_resize.py --dataset=outputs/reach/dataset --resolution=320x240 --out=outputs/act_320x240
    PYTHONPATH=. lerobot-train --discover_packages_path=training --policy.path=outputs/act_320x240 --policy.push_to_hub=false \\
        --dataset.repo_id=local/dataset --dataset.root=outputs/reach/dataset --dataset.video_backend=pyav --batch_size=8 --steps=20000

The first command writes an untrained ACT whose preprocessor resizes; every checkpoint of the second has the same preprocessor. A resize among
lerobot's `dataset.image_transforms` is lost at inference: ACT takes pictures of any size and says nothing.

Whoever loads such a policy must have imported this module, which registers the step: `import training.act_resize` before `make_pre_post_processors`
or `PolicyProcessorPipeline.from_pretrained`; on the command line of lerobot `--discover_packages_path=training`. Without it, lerobot ends with
"Failed to load processor step from registry ... 'gr00t_fast_act_resize'". Needs lerobot 0.4.4 (the `robot` extra).

Axis alphabet: B batch, T time steps, C channels, H height, W width.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.lib.program import execute, size_of
from gr00t_fast.errors import ConfigError, ObservationError, require

if TYPE_CHECKING:
    from lerobot.configs.types import PipelineFeatureType, PolicyFeature

_types, _processor = require("lerobot.configs.types", "robot"), require("lerobot.processor", "robot")

REGISTRY_NAME = "gr00t_fast_act_resize"
_LEROBOT_RESIZE = "image_crop_resize_processor"
# Beside the pictures of a camera a batch may hold, under the camera's key with one of these endings, flags that are no pictures.
_FLAG_ENDINGS = ("_is_pad", "_padding_mask")
_CHANNELS = (1, 3, 4)

Features: TypeAlias = "dict[PipelineFeatureType, dict[str, PolicyFeature]]"


def is_picture(key: str) -> bool:
    """Whether lerobot keeps a camera's pictures under `key`: observation.image or observation.images.<camera>."""
    return (key == "observation.image" or key.startswith("observation.images.")) and not key.endswith(_FLAG_ENDINGS)


@dataclass
@_processor.ProcessorStepRegistry.register(name=REGISTRY_NAME)
class ActResize(_processor.ObservationProcessorStep):
    """Pictures float (B, C, H, W) or (B, T, C, H, W) -> the same with `height` and `width`; everything else passes through.

    Bilinear, aspect ratio not kept; `antialias` averages over all source pixels, without it detail below the new resolution aliases.
    Raises ConfigError for a size below one pixel, ObservationError for pictures of another rank, dtype or axis order.
    """

    height: int
    width: int
    antialias: bool = True

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{REGISTRY_NAME}: {name} must be a whole number of pixels, at least 1; got {value!r}.")
        if not isinstance(self.antialias, bool):
            raise ConfigError(f"{REGISTRY_NAME}: antialias must be true or false; got {self.antialias!r}.")

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        return {key: self._resized(key, value) if is_picture(key) else value for key, value in observation.items()}

    def get_config(self) -> dict[str, Any]:
        return {"height": self.height, "width": self.width, "antialias": self.antialias}

    def transform_features(self, features: Features) -> Features:
        """Shapes (C, H, W) of pictures as they leave; the argument is left as it is."""
        observation = _types.PipelineFeatureType.OBSERVATION
        seen = features.get(observation, {})
        changed = {key: self._feature(feature) if is_picture(key) else feature for key, feature in seen.items()}
        return {**features, observation: changed}

    def _feature(self, feature: PolicyFeature) -> PolicyFeature:
        return _types.PolicyFeature(feature.type, (feature.shape[0], self.height, self.width))

    def _resized(self, key: str, pictures: Any) -> Tensor:
        _check(key, pictures)
        if pictures.shape[-2:] == (self.height, self.width):
            return pictures
        # One memory layout and one dtype, whatever the caller's: other kernels would round otherwise than in training.
        flat = pictures.flatten(0, -4).contiguous().float()  # (B*T, C, H, W)
        if flat.device.type == "mps":
            flat = flat.cpu()  # torch has no antialiased kernel there
        small = F.interpolate(flat, (self.height, self.width), mode="bilinear", align_corners=False, antialias=self.antialias)
        return small.unflatten(0, pictures.shape[:-3]).to(pictures)  # (B, [T,] C, height, width)


def _check(key: str, pictures: Any) -> None:
    if not isinstance(pictures, Tensor):
        raise ObservationError(f"'{key}': expected a tensor, got {type(pictures).__name__}. Convert frames as lerobot's predict_action does.")
    if pictures.ndim not in (4, 5):
        raise ObservationError(
            f"'{key}': expected (B, C, H, W) or (B, T, C, H, W), got shape {tuple(pictures.shape)}. "
            "The step belongs after 'to_batch_processor', which adds the batch axis."
        )
    if not pictures.is_floating_point():
        raise ObservationError(f"'{key}': expected floating point in 0..1, got {pictures.dtype}. Divide frames by 255 before the pipeline.")
    if pictures.shape[-3] not in _CHANNELS:
        raise ObservationError(f"'{key}': expected channels before height and width, got shape {tuple(pictures.shape)}. Permute (H, W, C) first.")


def insert_resize(preprocessor: Any, resize: ActResize) -> None:
    """Put `resize` before the normaliser of a lerobot preprocessor, in place; one that is there already with the same values is left.

    Raises ConfigError when there is no normaliser, or another resize: the network was trained behind that one.
    """
    names = [getattr(type(step), "_registry_name", type(step).__name__) for step in preprocessor.steps]
    present = next((step for step in preprocessor.steps if isinstance(step, ActResize)), None)
    if present == resize:
        return
    if present is not None or _LEROBOT_RESIZE in names:
        shown = present if present is not None else _LEROBOT_RESIZE
        raise ConfigError(f"the preprocessor resizes already ({shown}); a second resize ({resize}) would change what the network was trained on.")
    place = next((index for index, step in enumerate(preprocessor.steps) if isinstance(step, _processor.NormalizerProcessorStep)), None)
    if place is None:
        raise ConfigError(f"expected a preprocessor with a 'normalizer_processor', got the steps {', '.join(names) or 'none'}.")
    preprocessor.steps = [*preprocessor.steps[:place], resize, *preprocessor.steps[place:]]


def save_with_resize(directory: Path, policy: Any, preprocessor: Any, postprocessor: Any, resize: ActResize) -> None:
    """Insert `resize` into the preprocessor and save policy and both pipelines, as lerobot-train saves a checkpoint.

    State files of an earlier save that the new pipelines do not name are removed: the numbers in their names shift with the new step.
    """
    insert_resize(preprocessor, resize)
    directory.mkdir(parents=True, exist_ok=True)
    policy.save_pretrained(directory)
    for pipeline in (preprocessor, postprocessor):
        pipeline.save_pretrained(directory)
        _remove_stale_states(directory, pipeline.name)


def _remove_stale_states(directory: Path, pipeline_name: str) -> None:
    name = re.sub(r"[^a-zA-Z0-9_]", "_", pipeline_name.lower())  # as lerobot names its files
    steps = json.loads((directory / f"{name}.json").read_text())["steps"]
    named = {step["state_file"] for step in steps if "state_file" in step}
    ours = re.compile(re.escape(name) + r"_step_\d+(_\w+)?\.safetensors")
    for file in directory.iterdir():
        if ours.fullmatch(file.name) and file.name not in named:
            file.unlink()


def untrained_act(dataset: Path, seed: int, backbone_weights: str | None = None, device: str = "cpu", **options: Any) -> tuple[Any, Any, Any]:
    """An ACT for the data set in `dataset` with its preprocessor and postprocessor; `options` of ACTConfig. Raises ConfigError without a data set."""
    from lerobot.configs.types import FeatureType
    from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata
    from lerobot.datasets.utils import dataset_to_policy_features
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy
    from lerobot.policies.factory import make_pre_post_processors

    if not (dataset / "meta" / "info.json").exists():
        raise ConfigError(f"{dataset} is no LeRobotDataset: it has no meta/info.json. Record one with training/record.py.")
    meta = LeRobotDatasetMetadata(f"local/{dataset.name}", root=dataset)
    features = dataset_to_policy_features(meta.features)
    outputs = {key: feature for key, feature in features.items() if feature.type is FeatureType.ACTION}
    inputs = {key: feature for key, feature in features.items() if key not in outputs}
    torch.manual_seed(seed)
    config = ACTConfig(input_features=inputs, output_features=outputs, pretrained_backbone_weights=backbone_weights, device=device, **options)
    policy = ACTPolicy(config).to(device)
    config.pretrained_backbone_weights = None  # the saved weights hold them; otherwise every load would download what it then overwrites
    return policy, *make_pre_post_processors(config, dataset_stats=meta.stats)


@dataclass
class ResizeConfig:
    dataset: Path  # a LeRobotDataset v3, for its cameras and statistics
    resolution: str  # what the network sees, WIDTHxHEIGHT
    out: Path  # directory to create
    antialias: bool = True
    backbone_weights: str | None = None  # torchvision's name, such as ResNet18_Weights.IMAGENET1K_V1, downloaded; default: random
    seed: int = 0


def run(config: ResizeConfig) -> str:
    width, height = size_of(config.resolution, least=1)
    if config.out.exists():
        raise ConfigError(f"{config.out} is there already. Choose another --out, or remove it.")
    policy, preprocessor, postprocessor = untrained_act(config.dataset, config.seed, config.backbone_weights)
    save_with_resize(config.out, policy, preprocessor, postprocessor, ActResize(height, width, config.antialias))
    return f"{config.out}: an untrained ACT that sees {config.resolution}. Next: lerobot-train --policy.path={config.out} (see --help)"


def main(argv: Sequence[str] | None = None) -> int:
    return execute(ResizeConfig, run, lambda _, found: print(found), argv, __doc__, "interrupted")


if __name__ == "__main__":
    sys.exit(main())
