"""GR00T N1.7 beyond the recordings: other settings of its processor, files that are damaged, a random checkpoint through policy and loop."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_networks import edit_json, write_network

from gr00t_fast import load_policy
from gr00t_fast.base.errors import CheckpointError, ConfigError, ObservationError
from gr00t_fast.checkpoint import load_model, open_checkpoint
from gr00t_fast.cli.run import main
from gr00t_fast.engine.manifest import target_of
from gr00t_fast.inputs.embodiment import ImageSettings
from gr00t_fast.inputs.images import BY_QWEN, _interpolated, accepted_size, view, view_size
from gr00t_fast.inputs.transforms import ActionTransform, StateTransform
from gr00t_fast.model.config import QwenVisionConfig
from gr00t_fast.model.vision import patches_of, picture_values
from gr00t_fast.networks import n1d7
from gr00t_fast.networks.n1d7 import DEFAULTS, PUBLISHED_BACKBONE
from gr00t_fast.policy import Gr00tPolicy
from gr00t_fast.virtual.random_checkpoint import write_random_checkpoint

TAG, LANGUAGE = "new_embodiment", "annotation.human.task_description"
MODALITIES = f"processor_kwargs.modality_configs.{TAG}"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_random_checkpoint(tmp_path / "checkpoint", "tiny", network="n1.7", data_config="so100_dualcam", dtype=torch.float32)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Gr00tPolicy:
    return load_policy(
        write_random_checkpoint(tmp_path_factory.mktemp("n1d7") / "checkpoint", "tiny", network="n1.7"), device="cpu", precision="fp32"
    )


def observation(cameras: tuple[str, ...] = ("webcam",), times: int = 1, seed: int = 0) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    frames = {f"video.{camera}": generator.integers(0, 256, (times, 48, 64, 3), dtype=np.uint8) for camera in cameras}
    return {**frames, "state.single_arm": generator.uniform(-30, 30, (1, 5)), "state.gripper": generator.uniform(0, 60, (1, 1)), LANGUAGE: "pick it"}


def noise(policy: Gr00tPolicy) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((1, *policy.chunk_shape)).astype(np.float32)


# --- the policy ----------------------------------------------------------------------------------------------------------------------


def test_a_relative_chunk_counts_from_the_state_that_it_was_inferred_from(policy: Gr00tPolicy) -> None:
    seen, start = observation(), noise(policy)
    inputs = policy.preprocess(seen)
    chunk = policy.infer(inputs, start)
    here = policy.postprocess(chunk, inputs)
    assert {key: value.shape for key, value in here.items()} == {"action.single_arm": (16, 5), "action.gripper": (16, 1)}
    there = policy.postprocess(chunk, policy.preprocess({**seen, "state.single_arm": seen["state.single_arm"] + 10}))
    np.testing.assert_allclose(there["action.single_arm"], here["action.single_arm"] + 10, atol=1e-4)
    assert np.array_equal(there["action.gripper"], here["action.gripper"])


def test_the_nested_form_gives_the_same(policy: Gr00tPolicy) -> None:
    seen, start = observation(), noise(policy)
    nested = {
        "video": {"webcam": seen["video.webcam"][None]},
        "state": {name: seen[f"state.{name}"][None].astype(np.float32) for name in ("single_arm", "gripper")},
        "language": {LANGUAGE: [["pick it"]]},
    }
    flat = policy.get_action({key: value.astype(np.float32) if key.startswith("state.") else value for key, value in seen.items()}, noise=start)
    made = policy.get_action(nested, noise=start)
    assert all(np.array_equal(made[key][0], flat[key]) for key in flat)
    del nested["state"]["gripper"]
    with pytest.raises(ObservationError, match="state.gripper"):
        policy.get_action(nested)


def test_earlier_frames_come_with_the_observation_and_none_are_kept(tmp_path: Path) -> None:
    """Two clients by turns get what each of them gets alone, and a look at the transforms changes nothing."""
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", "tiny", network="n1.7", frame_offsets=(-3, 0))
    policy = load_policy(checkpoint, device="cpu", precision="fp32")
    assert policy.get_modality_config()["video"].delta_indices == [-3, 0]
    start = noise(policy)
    one, other = (observation(times=2, seed=seed) for seed in (0, 1))
    alone = [policy.get_action(seen, noise=start)["action.single_arm"] for seen in (one, other)]
    assert not np.array_equal(*alone)
    for seen, expected in ((one, alone[0]), (other, alone[1]), (one, alone[0])):
        policy.apply_transforms(other)
        assert np.array_equal(policy.get_action(seen, noise=start)["action.single_arm"], expected)
    swapped = policy.get_action({**one, "video.webcam": one["video.webcam"][::-1]}, noise=start)
    assert not np.array_equal(swapped["action.single_arm"], alone[0]), "the order of the frames counts"
    for times in (1, 3):
        with pytest.raises(ObservationError, match=f"video.webcam: expected 2 time steps.*got {times}.*get_modality_config"):
            policy.get_action(observation(times=times))


def test_data_configs_and_tags_that_do_not_fit_are_refused(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"processor_config\.json.*video\.webcam.*video\.front, video\.wrist"):
        load_policy(tiny, data_config="so100", device="cpu")
    load_policy(tiny, data_config="so100_dualcam", device="cpu")
    with pytest.raises(ConfigError, match="unknown embodiment_tag 'gr1'.*--embodiment_tag=new_embodiment"):
        load_policy(tiny, embodiment_tag="gr1", device="cpu")
    checkpoint = open_checkpoint(tiny)
    assert target_of(checkpoint, "NEW_EMBODIMENT", None).embodiment_tag == TAG, "names of NVIDIA's EmbodimentTag are in capitals"


# --- the program -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "change", "code", "says"),
    [
        (("--controller=threaded", "--smoothing=prefix"), None, 0, "torque off; safe"),
        ((), ("statistics.json", f"{TAG}.state.single_arm", 0.01), 1, "radians"),
        (("--robot.cameras={top: {type: sim, width: 64, height: 48}}",), None, 1, "no camera of the robot provides 'front', 'wrist'"),
    ],
)
def test_the_program_with_another_model_path(tiny: Path, capsys: pytest.CaptureFixture[str], flags: tuple, change: Any, code: int, says: str) -> None:
    pytest.importorskip("mujoco")
    if change is not None:
        file, key, scale = change
        for part in ("state", "action"):
            values = json.loads((tiny / file).read_text())[TAG][part]["single_arm"]
            scaled = {name: (np.asarray(numbers) * scale).tolist() for name, numbers in values.items()}
            edit_json(tiny / file, key.replace("state", part), scaled)
    cameras = "{front: {type: sim, width: 64, height: 48}, wrist: {type: sim, width: 64, height: 48}}"
    given = flags if any("cameras" in flag for flag in flags) else (f"--robot.cameras={cameras}", *flags)
    argv = ["--robot.type=so100_sim", f"--model_path={tiny}", "--lang_instruction=pick", "--timeout=0.5", "--device=cpu", *given]
    assert main(argv) == code
    out, err = capsys.readouterr()
    assert says in out + err


@pytest.mark.parametrize(
    ("flags", "wrist", "code", "says", "warns"),
    [
        ((), (64, 48), 0, "in the shape of the cameras (letter_box_transform is false", True),
        (("--letterbox=always",), (64, 36), 0, "padded to a square (--letterbox=always)", False),
        (("--letterbox=never",), (64, 48), 0, "in the shape of the cameras (--letterbox=never)", False),
        ((), (64, 36), 1, "front 64x48, wrist 64x36", True),
    ],
)
def test_the_line_before_the_start_says_how_pictures_are_made(tiny: Path, capsys, flags, wrist, code: int, says: str, warns: bool) -> None:
    pytest.importorskip("mujoco")
    sizes = (f"{name}: {{type: sim, width: {width}, height: {height}}}" for name, (width, height) in (("front", (64, 48)), ("wrist", wrist)))
    argv = ["--robot.type=so100_sim", f"--robot.cameras={{{', '.join(sizes)}}}", f"--model_path={tiny}", "--lang_instruction=pick"]
    assert main([*argv, "--timeout=0.3", "--device=cpu", *flags]) == code
    said = "".join(capsys.readouterr())
    assert says in said
    assert ("WARNING: camera 'front' is 64x48" in said and "--letterbox=always" in said) == warns
    assert ("connecting to the arm" in said) == (code == 0)


# --- files ---------------------------------------------------------------------------------------------------------------------------


def test_absent_keys_mean_the_reference_s_defaults(tiny: Path) -> None:
    """12 language layers and no self-attention over tokens, where the published network has 16 and 4."""
    raw = json.loads((tiny / "config.json").read_text())
    raw["vl_self_attention_cfg"] = None
    for key in ("select_layer", "num_timestep_buckets", "attend_text_every_n_blocks"):
        raw.pop(key, None)
    (tiny / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="select_layer .*1 and 3, got 12"):
        open_checkpoint(tiny)
    edit_json(tiny / "config.json", "select_layer", 3)
    head = open_checkpoint(tiny).config.head
    assert (head.timestep_buckets, head.attend_text_every, head.vl_attention.num_layers) == (1000, DEFAULTS["attend_text_every_n_blocks"], 0)
    with pytest.raises(CheckpointError, match="unexpected"):
        load_model(open_checkpoint(tiny), TAG, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    [
        ("config.json", "use_tactile", True, "use_tactile is True"),
        ("config.json", "strict_action_padding_mask", True, "strict_action_padding_mask is True"),
        ("config.json", "diffusion_model_cfg.positional_embeddings", ..., "positional_embeddings .*'sinusoidal'"),
        ("config.json", "max_num_embodiments", 10, "selects row 10 .* there are 10"),
        ("config.json", "max_state_dim", 131, "max_state_dim is 132, expected 131"),
        ("backbone_config.json", "text_config.rope_scaling.mrope_interleaved", False, "mrope_interleaved"),
        ("backbone_config.json", "text_config.rope_scaling.mrope_section", [2, 2, 1], "half of head_dim"),
        ("backbone_config.json", "vision_config.deepstack_visual_indexes", [1, 0], "deepstack_visual_indexes"),
        ("processor_config.json", f"{MODALITIES}.action.delta_indices", [1, 2], "action delta_indices"),
        ("processor_config.json", f"{MODALITIES}.state.delta_indices", [-1, 0], "state_history_length"),
        ("statistics.json", f"{TAG}.relative_action", ..., "relative_action has no statistics"),
        ("statistics.json", f"{TAG}.state.gripper.q99", [float("1e400")], "JSON|finite|damaged"),
        # files that contradict each other, or themselves
        ("config.json", "use_relative_action", False, "use_relative_action is True in processor_config.json and False in config.json"),
        ("processor_config.json", f"{MODALITIES}.action.action_configs", None, "'single_arm' is absolute, but statistics.json"),
        ("processor_config.json", f"{MODALITIES}.action.action_configs", [{"rep": "ABSOLUTE"}] * 2, "'single_arm' is absolute, but statistics.json"),
        ("processor_config.json", f"{MODALITIES}.action.action_configs", [{"rep": "DELTA"}] * 2, "'single_arm' has rep DELTA"),
        *(
            ("processor_config.json", f"{MODALITIES}.action.action_configs", [{"rep": rep, "type": "EEF", "format": form}] * 2, "'single_arm' .*EEF")
            for rep, form in (("RELATIVE", "XYZ_ROT6D"), ("RELATIVE", "XYZ_ROTVEC"), ("ABSOLUTE", "DEFAULT"))
        ),
        ("statistics.json", f"{TAG}.action.gripper.max", [1e30], "action.gripper.max exceeds"),
        ("statistics.json", f"{TAG}.action.gripper.max", [50.0], "action.gripper.q99 exceeds action.gripper.max"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(tiny: Path, file: str, key: str, value: Any, message: str) -> None:
    edit_json(tiny / file, key, value)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tiny).embodiment(TAG)


@pytest.mark.parametrize(
    ("file", "key", "names"),
    [
        ("config.json", "select_layers", "'select_layers' Did you mean 'select_layer'"),
        ("config.json", "diffusion_model_cfg.gate", "config.json diffusion_model_cfg.*'gate'"),
        ("processor_config.json", "processor_kwargs.use_percentile", "processor_config.json.*'use_percentile'"),
        ("processor_config.json", f"{MODALITIES}.state.jitter", "processor_config.json state.*'jitter'"),
    ],
)
def test_keys_that_nothing_reads_are_named_in_a_warning(tiny: Path, caplog: pytest.LogCaptureFixture, file: str, key: str, names: str) -> None:
    edit_json(tiny / file, key, 3)
    open_checkpoint(tiny).embodiment(TAG)
    (warning,) = caplog.messages
    assert re.search(names, warning)


# --- pictures ------------------------------------------------------------------------------------------------------------------------

AREA = ImageSettings(False, True, 256, 0.95, None, None)
PADDED = replace(AREA, letterbox=True)


@pytest.mark.parametrize("size", [(256, 256), (224, 224), (320, 300), (256, 320), (100, 400)])
def test_sizes_and_patches_are_those_of_the_reference_s_image_processor(size: tuple[int, int]) -> None:
    processing = pytest.importorskip("transformers.models.qwen2_vl.image_processing_qwen2_vl_fast")
    sizes = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}}
    reference = processing.Qwen2VLImageProcessorFast(**sizes, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    frame = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, *size), dtype=np.uint8))
    expected = reference(images=[frame], return_tensors="pt")
    accepted = accepted_size(*size, 32)
    assert expected["image_grid_thw"].tolist() == [[1, accepted[0] // 16, accepted[1] // 16]]
    pixels = frame.permute(1, 2, 0).numpy() if accepted == size else _interpolated(frame.permute(1, 2, 0).numpy(), accepted, "bicubic")
    made = patches_of(picture_values(torch.from_numpy(np.array(pixels))[None]), open_vision())[0]
    assert torch.equal(made, expected["pixel_values"])


def open_vision() -> QwenVisionConfig:
    return n1d7.read_config(n1d7.PUBLISHED_CONFIG, PUBLISHED_BACKBONE).vision


@pytest.mark.parametrize("shape", [(48, 64), (480, 640), (300, 200), (256, 256), (1080, 1920)])
def test_pictures_as_torchvision_makes_them(shape: tuple[int, int]) -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2")
    frame = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    top, left = ((max(shape) - side) // 2 for side in shape)
    pad = v2.Pad([left, top, max(shape) - shape[1] - left, max(shape) - shape[0] - top])
    sizes = ((230, 230), (256, 256)), ((230, 200), (256, 320)), ((300, 300), (256, 256))
    for (crop, target), letterbox in itertools.product(sizes, (True, False)):
        reference = v2.Compose([v2.ToImage(), *([pad] if letterbox else []), v2.Resize(target), v2.CenterCrop(crop), v2.Resize(target)])
        made = BY_QWEN(view(frame, ImageSettings(letterbox, False, 256, 1.0, crop, target)), 32)
        assert np.array_equal(made, reference(torch.from_numpy(frame).permute(2, 0, 1)).permute(1, 2, 0).numpy())


SIZES = [  # width and height of a frame; of the view that is stacked; patches; tokens. The first rows are the reference's
    *(((640, 480), (340, 256), (16, 22), 88), ((320, 240), (340, 256), (16, 22), 88), ((480, 640), (256, 340), (22, 16), 88)),
    *(((641, 479), (342, 256), (16, 22), 88), ((1920, 1080), (455, 256), (16, 28), 112), ((640, 360), (455, 256), (16, 28), 112)),
    *(((848, 480), (452, 256), (16, 28), 112), ((424, 240), (452, 256), (16, 28), 112), ((256, 256), (256, 256), (16, 16), 64)),
    *(((333, 777), (256, 597), (38, 16), 152), ((64, 48), (340, 256), (16, 22), 88)),
]


@pytest.mark.parametrize(("camera", "stacked", "grid", "tokens"), SIZES)
def test_a_camera_s_shape_decides_grid_and_tokens(policy: Gr00tPolicy, camera, stacked, grid, tokens) -> None:
    width, height = camera
    assert view_size(height, width, AREA) == stacked[::-1]
    assert view_size(height, width, PADDED) == (256, 256)
    frame = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    given = policy.apply_transforms({**observation(), "video.webcam": frame})
    assert given["image_grid_thw"].tolist() == [[1, *grid]]
    assert (given["input_ids"] == policy.processor.prompts.image_token_id).sum() == tokens
    assert np.isfinite(policy.get_action({**observation(), "video.webcam": frame})["action.single_arm"]).all()


@pytest.mark.parametrize("camera", [(640, 480), (641, 479), (333, 777), (1919, 1081), (160, 120)])
def test_views_are_those_of_lerobot(camera: tuple[int, int]) -> None:
    """lerobot 0.6's port, whose step needs neither its network nor its processor; byte for byte."""
    theirs = pytest.importorskip("lerobot.policies.groot.processor_groot", exc_type=ImportError)
    if not hasattr(theirs, "_transform_n1_7_image_for_vlm_albumentations"):
        pytest.skip("this lerobot knows N1.5 alone")
    frame = np.random.default_rng(0).integers(0, 256, (*camera[::-1], 3), dtype=np.uint8)
    sizes: dict[str, Any] = {"image_crop_size": [230, 230], "image_target_size": [256, 256]}
    for letterbox, edge, fraction in itertools.product((False, True), (256, 224, 320), (0.95, 0.8)):
        options = {**sizes, "shortest_image_edge": edge, "crop_fraction": fraction, "letter_box_transform": letterbox}
        expected = theirs._transform_n1_7_image_for_vlm_albumentations(frame, **options)
        assert np.array_equal(view(frame, ImageSettings(letterbox, True, edge, fraction, None, None)), expected)


@pytest.mark.parametrize(("front", "wrist", "stack"), [((640, 480), (320, 240), True), ((640, 480), (641, 479), False), ((64, 48), (48, 64), False)])
def test_views_that_do_not_stack_are_refused_unless_they_are_padded(tiny: Path, front, wrist, stack: bool) -> None:
    sizes = {"front": front, "wrist": wrist}
    seen = observation(("front", "wrist")) | {f"video.{name}": np.zeros((1, height, width, 3), np.uint8) for name, (width, height) in sizes.items()}
    policy, padded = (load_policy(tiny, device="cpu", precision="fp32", letterbox=word) for word in ("auto", "always"))
    padded.expect_cameras(sizes)
    assert padded.preprocess(seen).frames[0].shape == (1, 256, 256, 3)
    if stack:
        policy.preprocess(seen)
        return
    told = rf"front {front[0]}x{front[1]}, wrist {wrist[0]}x{wrist[1]}.*--letterbox=always"
    for call in (lambda: policy.preprocess(seen), lambda: policy.expect_cameras(sizes)):
        with pytest.raises(ObservationError, match=told):
            call()


def test_a_strip_is_refused(policy: Gr00tPolicy) -> None:
    with pytest.raises(ObservationError, match="at most 8 times.*webcam 32x4096"):
        policy.preprocess({**observation(), "video.webcam": np.zeros((1, 4096, 32, 3), np.uint8)})


def _trained(**files: str) -> dict[str, str]:
    return {f"experiment_cfg/{name.replace('__', '.')}": text for name, text in files.items()}


PADDING, NOT = (json.dumps({"eval_image_transform": f"ReplayCompose([\n  {step}SmallestMaxSize(p=1.0)])"}) for step in ("LetterBoxPad(p=1.0), ", ""))


@pytest.mark.parametrize(
    ("flag", "files", "asked", "pads", "known", "why"),
    [
        (True, {}, "auto", True, True, "letter_box_transform"),
        (False, {}, "auto", False, False, "letter_box_transform"),
        (False, {}, "always", True, True, "--letterbox=always"),
        (True, {}, "never", False, True, "--letterbox=never"),
        (False, _trained(final_processor_config__json=PADDING), "auto", True, True, "final_processor_config.json"),
        (True, _trained(final_processor_config__json=NOT), "auto", False, True, "final_processor_config.json"),
        (False, _trained(final_processor_config__json=PADDING), "never", False, True, "--letterbox=never"),
        (False, _trained(final_model_config__json="{}"), "auto", True, True, "final_model_config.json"),
        (False, _trained(final_model_config__json='{"letter_box_transform": false}'), "auto", False, True, "letter_box_transform"),
        (False, _trained(config__yaml="data:\n  video_backend: torchcodec\n"), "auto", True, True, "config.yaml"),
    ],
)
def test_how_a_fine_tune_was_trained_wins_over_the_flag(tiny: Path, flag, files, asked: str, pads: bool, known: bool, why: str) -> None:
    edit_json(tiny / "processor_config.json", "processor_kwargs.letter_box_transform", flag)
    for name, text in files.items():
        (tiny / name).parent.mkdir(exist_ok=True)
        (tiny / name).write_text(text)
    policy = load_policy(tiny, device="cpu", precision="fp32", letterbox=asked)
    found = policy.metadata.letterbox
    assert (found.pads, found.known) == (pads, known)
    assert why in found.why
    assert policy.preprocess(observation(("front", "wrist"))).frames[0].shape[2] == (256 if pads else 352)
    assert why in " ".join(policy.describe())


def test_words_and_files_about_letterboxing_that_are_wrong(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="always, never"):
        load_policy(tiny, letterbox="allways")
    with pytest.raises(ConfigError, match="N1.5 checkpoint.*--letterbox"):
        load_policy(write_network(tmp_path / "n1d5"), letterbox="never")
    edit_json(tiny / "processor_config.json", "processor_kwargs.letter_box_transform", "no")
    with pytest.raises(CheckpointError, match="letter_box_transform.*true or false"):
        load_policy(tiny)
    (tiny / "experiment_cfg").mkdir()
    (tiny / "experiment_cfg" / "final_processor_config.json").write_text('{"eval_image_transform": ')
    with pytest.raises(CheckpointError, match="final_processor_config.json"):
        load_policy(tiny)


# --- joints --------------------------------------------------------------------------------------------------------------------------


def _embodiment(checkpoint: Path, **settings: Any):
    for key, value in settings.items():
        edit_json(checkpoint / "processor_config.json", f"processor_kwargs.{key}", value)
    return open_checkpoint(checkpoint).embodiment(TAG)


def test_state_kinds(tiny: Path) -> None:
    edit_json(tiny / "processor_config.json", f"{MODALITIES}.state.mean_std_embedding_keys", ["gripper"])
    edit_json(tiny / "processor_config.json", f"{MODALITIES}.state.sin_cos_embedding_keys", ["single_arm"])
    state = {"state.single_arm": np.full((1, 1, 5), 1000.0), "state.gripper": np.full((1, 1, 1), 45.0)}
    plain = StateTransform(_embodiment(tiny))(state)
    assert plain[0, :6].tolist() == [1.0] * 5 + [1.0], "clipped, and (45 - 30) / 15"
    assert StateTransform(_embodiment(tiny, clip_outliers=False))(state)[0, 0] > 1
    angles = StateTransform(_embodiment(tiny, apply_sincos_state_encoding=True))(state)
    np.testing.assert_allclose(angles[0, :11], [math.sin(1000)] * 5 + [math.cos(1000)] * 5 + [1.0], rtol=1e-5)
    assert not StateTransform(_embodiment(tiny, exclude_state=True))(state).any()
    edit_json(tiny / "statistics.json", f"{TAG}.state.gripper.std", [0.0])
    assert StateTransform(_embodiment(tiny, exclude_state=False))(state)[0, 10] == 45, "as it is where nothing varied"


def test_actions_are_absolute_without_relative_action(tiny: Path) -> None:
    state = {"state.single_arm": np.full((1, 1, 5), 10.0), "state.gripper": np.zeros((1, 1, 1))}
    chunk = np.zeros((1, 16, 132), np.float32)
    relative = ActionTransform(_embodiment(tiny))(chunk, state)["action.single_arm"]
    assert np.array_equal(relative, np.full((1, 16, 5), 10.0)), "no motion"
    absolute = ActionTransform(_embodiment(tiny, use_relative_action=False))(chunk, state)["action.single_arm"]
    np.testing.assert_allclose(absolute[0, 0], [0, -20, 20, 67.5, -90], atol=1e-4)
