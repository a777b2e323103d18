"""Pictures and joint values on their way in and out: the reference's arithmetic, repeated here from its libraries or its formulas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from gr00t_fast.base.errors import ConfigError
from gr00t_fast.inputs.data_config import DATA_CONFIGS, DataConfig
from gr00t_fast.inputs.embodiment import Embodiment, Part
from gr00t_fast.inputs.images import to_trained_size
from gr00t_fast.inputs.transforms import Normaliser, StateTransform
from gr00t_fast.model.vision import pixel_values
from gr00t_fast.networks import n1d5
from gr00t_fast.networks.n1d5 import ARITHMETIC, PUBLISHED_EAGLE, MetadataFile

SIZES = [(480, 640), (720, 1280), (224, 224), (236, 236), (100, 131), (97, 61), (1080, 1920), (240, 320), (21, 43)]


def _frames(height: int, width: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Noise, gradients and saturated areas: crop, rounding and overshoot all show."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (batch, height, width, 3), generator=generator, dtype=torch.uint8)
    frames[:, : height // 3] = torch.linspace(0, 255, width).to(torch.uint8)[None, None, :, None]
    frames[:, -height // 4 :, : width // 2] = 255
    return frames


def _as_nvidia(frames: torch.Tensor, crop: float = 0.95) -> torch.Tensor:
    """NVIDIA's evaluation transforms, with the operations of torchvision that they use -> uint8 (B, 3, 224, 224)."""
    v2 = pytest.importorskip("torchvision.transforms.v2")
    height, width = frames.shape[1:3]
    pipeline = v2.Compose(
        [
            v2.CenterCrop((int(height * crop), int(width * crop))),
            v2.Resize((224, 224), interpolation=v2.InterpolationMode.BILINEAR, antialias=True),
        ]
    )
    return (pipeline((frames.float() / 255.0).permute(0, 3, 1, 2)) * 255).to(torch.uint8)


def _bytes(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels * 127.5 + 127.5).round().to(torch.uint8)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pictures_equal_torchvision(height: int, width: int) -> None:
    frames = _frames(height, width, batch=2)
    ours, theirs = _bytes(pixel_values(frames, 224)), _as_nvidia(frames)
    assert torch.equal(ours, theirs)
    assert (_as_nvidia(frames, crop=0.9).int() - theirs.int()).abs().float().mean() > 1, "the comparison cannot tell another crop"


def test_pixel_values_are_those_of_eagles_image_processor() -> None:
    """transformers' fast processors fold rescaling into the normalisation: (x - 127.5) / 127.5."""
    processing = pytest.importorskip("transformers.image_processing_utils_fast")
    every_byte = torch.arange(256, dtype=torch.uint8).repeat(3, 1)[None, :, :, None]  # (1, 3, 256, 1)
    processor = processing.BaseImageProcessorFast(
        do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    theirs = processor.rescale_and_normalize(every_byte.float(), True, 1 / 255, True, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    square = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(-1, -1, -1, 3)  # one 16 x 16 picture, cropped to 15 x 15
    ours = pixel_values(square, 15)[0, 0].ravel()
    table = dict(zip(range(256), theirs[0, 0, :, 0].tolist(), strict=True))
    assert [table[level] for level in square[0, 0:15, 0:15, 0].ravel().tolist()] == ours.tolist()


# --- cameras of another resolution ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(320, 240), (1280, 720), (640, 480), (1920, 1080), (641, 480)])
def test_other_sizes_show_the_same_scene(width: int, height: int) -> None:
    """A smooth picture keeps its values at the same relative places: sides, colours and range are right."""
    y, x = np.mgrid[0:480, 0:640]
    scene = np.stack([x / 639 * 255, y / 479 * 255, np.full_like(x, 90.0)], axis=-1).round().astype(np.uint8)
    resized = to_trained_size(np.stack([scene, scene[::-1]]), width, height)
    assert (resized.shape, resized.dtype) == ((2, height, width, 3), np.uint8)
    for row, column in ((0.1, 0.9), (0.5, 0.5), (0.8, 0.2)):
        got = resized[0, round(row * (height - 1)), round(column * (width - 1))]
        np.testing.assert_allclose(got, [column * 255, row * 255, 90], atol=2)
    np.testing.assert_allclose(resized[1, ::-1].astype(int), resized[0], atol=1)


@pytest.mark.parametrize("size", [(640, 120), (1280, 120), (160, 480), (160, 960), (160, 120)], ids=str)
def test_a_side_that_shrinks_is_averaged_whatever_the_other_does(size: tuple[int, int]) -> None:
    """Stripes finer than the pixels left become grey, and no pattern that was not there."""
    stripes = (np.arange(640) % 4 == 1)[None, :] if size[0] < 640 else (np.arange(480) % 4 == 1)[:, None]
    scene = np.broadcast_to(stripes, (480, 640))[None, ..., None].repeat(3, axis=-1).astype(np.uint8) * 252
    assert np.unique(to_trained_size(scene, *size)).tolist() == [63]


# --- joint values --------------------------------------------------------------------------------------------------------------------

STATISTICS = {
    "min": np.array([-100.0, 0.0, 5.0]),
    "max": np.array([100.0, 30.0, 5.0]),  # the last joint never moved
    "mean": np.array([10.0, 12.0, 5.0]),
    "std": np.array([40.0, 8.0, 0.0]),
    "q01": np.array([-90.0, 1.0, 5.0]),
    "q99": np.array([95.0, 29.0, 5.0]),
}
VALUES = np.array([[-100.0, 30.0, 5.0], [0.0, 15.0, 5.0], [250.0, -7.5, 9.0]])


def normaliser(mode: str, key: str = "state.arm") -> Normaliser:
    low, high = {"q99": ("q01", "q99"), "mean_std": ("mean", "std")}.get(mode, ("min", "max"))
    return Normaliser(Part(key, mode, STATISTICS[low], STATISTICS[high], STATISTICS, clip=mode == "q99"), ARITHMETIC)


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("min_max", VALUES, [[-1, 1, 0], [0, 0, 0], [2.5, -1.5, 0]]),  # outside the range is not clipped
        ("q99", VALUES, [[-1, 1, 1], [-1 + 180 / 185, 0, 1], [1, -1, 1]]),  # clipped; a constant stays raw within the clip
        ("mean_std", VALUES, [[-2.75, 2.25, 5], [-0.25, 0.375, 5], [6, -19.5 / 8, 9]]),
        ("binary", np.array([[0.0, 0.5, 0.51]]), [[0, 0, 1]]),
        ("sin_cos", np.array([[0.0, np.pi / 2, -np.pi / 6]]), [[0, 1, -0.5, 1, 0, 3**0.5 / 2]]),  # all sines, then all cosines
        ("none", VALUES, VALUES),
    ],
)
def test_states_are_normalised(mode: str, values: np.ndarray, expected: list[list[float]]) -> None:
    np.testing.assert_allclose(normaliser(mode).forward(values), expected, atol=1e-12)


@pytest.mark.parametrize("mode", ["min_max", "q99", "mean_std", "none"])
def test_the_inverse_undoes(mode: str) -> None:
    inside = np.array([[-80.0, 3.0, 5.0], [0.0, 15.0, 5.0], [94.0, 28.5, 5.0]])
    back = normaliser(mode).inverse(normaliser(mode).forward(inside).astype(np.float32))
    assert back.dtype == np.float32
    moving = 3 if mode != "mean_std" else 2  # a joint without spread comes back as its mean plus 0 x the raw value
    np.testing.assert_allclose(back[:, :moving], inside[:, :moving], atol=1e-4)
    np.testing.assert_allclose(back[:, 2], 5)


def embodiment(config: DataConfig = DATA_CONFIGS["so100"], statistics: dict[str, np.ndarray] = STATISTICS, width: int = 8) -> Embodiment:
    part = {name: values.tolist() for name, values in statistics.items()}
    one = {name: values[:1] for name, values in part.items()}
    video = {"webcam": {"resolution": [640, 480], "fps": 30.0}}
    raw = {"statistics": {kind: {"single_arm": part, "gripper": one} for kind in ("state", "action")}, "modalities": {"video": video}}
    published = n1d5.read_config(n1d5.PUBLISHED_CONFIG, PUBLISHED_EAGLE)
    sizes = replace(published, head=replace(published.head, state_dim=width, action_dim=width))
    return MetadataFile({"new_embodiment": raw}, sizes).embodiment("new_embodiment", config)


@pytest.mark.parametrize(("mode", "absent"), [("q99", "q01, q99"), ("mean_std", "mean, std")])
def test_modes_need_their_statistics(mode: str, absent: str) -> None:
    config = replace(DATA_CONFIGS["so100"], normalisation={"state.single_arm": mode})
    with pytest.raises(ConfigError, match=f"state.single_arm.*'{mode}'.*{absent}"):
        embodiment(config, {name: STATISTICS[name] for name in ("min", "max")})


def test_a_state_of_sines_and_cosines_takes_twice_the_room() -> None:
    turned = replace(DATA_CONFIGS["so100"], normalisation={"state.single_arm": "sin_cos"})
    found = embodiment(turned)
    assert found.state_widths == {"state.single_arm": 3, "state.gripper": 1}, "an observation has the joints themselves"
    state = StateTransform(found)({"state.gripper": np.array([[[50.0]]]), "state.single_arm": np.array([[[0.0, np.pi / 2, np.pi]]])})
    np.testing.assert_allclose(state, [[0, 1, 0, 1, 0, -1, 0.5, 0]], atol=1e-7)
    with pytest.raises(ConfigError, match="7 values together; the network takes 6"):
        embodiment(turned, width=6)


def test_parts_that_do_not_fit_the_checkpoint() -> None:
    with pytest.raises(ConfigError, match="4 values together; the network takes 3"):
        embodiment(width=3)
    with pytest.raises(ConfigError, match=r"state.left_arm.*state.single_arm"):
        embodiment(replace(DATA_CONFIGS["so100"], state_keys=("state.left_arm", "state.gripper")))
