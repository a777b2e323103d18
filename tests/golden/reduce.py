"""Cut the reference's recorded outputs down to what tests need, so that parity runs in a clean checkout.

    python tests/golden/reduce.py SHARED_DIR        (SHARED_DIR holds golden/so100 and golden/so100_dualcam; see the README there)

Nothing is recomputed: every number in the .npz files is the reference's own. Left out, and why that is exact:
- embedding rows of tokens that no prompt uses: ids are renumbered, in order (`vocabulary` holds the original ids);
- rows of other embodiments in the per-embodiment weights, and rows of the position table beyond the horizon: never read. When a test writes the
  checkpoint again, the first come back as NaN, so that reading a wrong row cannot pass;
- the camera frames (noise, it does not compress): the reference's 224 x 224 bytes, after crop and resize, are kept instead;
- of the vision and language features, five image tokens in six: relative errors over the rest mean the same.
bf16 weights are stored as their 16 bits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

CASES = {"so100": ("webcam",), "so100_dualcam": ("front", "wrist")}
PROMPTS = {"plain": "expected.npz", "nvidia": "expected_list_prompt.npz"}
STEPS = (1, 2, 4, 8)
ROW = 31  # new_embodiment
EMBEDDING = "backbone.eagle_model.language_model.model.embed_tokens.weight"
POSITIONS = "action_head.position_embedding.weight"
KEPT_IMAGE_TOKENS = 6  # every sixth


def is_per_embodiment(name: str) -> bool:
    return name.endswith((".W", ".b"))


def reduce_case(source: Path, cameras: tuple[str, ...]) -> dict[str, np.ndarray]:
    checkpoint = source / "checkpoint"
    expected = {style: np.load(source / file) for style, file in PROMPTS.items()}
    vocabulary = np.unique(np.concatenate([z["in.eagle_input_ids"].ravel() for z in expected.values()]))
    arrays = _inputs(source, expected["plain"], cameras)
    arrays["vocabulary"] = vocabulary
    arrays.update(_configuration(checkpoint, vocabulary))
    horizon = expected["plain"]["noise"].shape[1]
    arrays.update(_weights(load_file(checkpoint / "model.safetensors"), vocabulary, horizon))
    image_token = json.loads((checkpoint / "eagle2_hg_model" / "config.json").read_text())["image_token_index"]
    for style, z in expected.items():
        for key in ("noise", "vision_features", "in.eagle_pixel_values", "in.state"):
            assert np.array_equal(z[key], expected["plain"][key]), f"{key} differs between the prompts; it is stored once"
        arrays.update({f"{style}/{key}": value for key, value in _outputs(z, vocabulary, image_token).items()})
    return arrays


def _inputs(source: Path, z: np.lib.npyio.NpzFile, cameras: tuple[str, ...]) -> dict[str, np.ndarray]:
    observation = np.load(source / "observation.npz")
    frames = np.stack([z[f"video_224.{camera}"][0, 0] for camera in cameras])
    states = {key: observation[key] for key in observation if key.startswith("state.")}
    return {
        "frames_224": frames,
        "noise": z["noise"],
        "in.state": z["in.state"],
        "vision_features": z["vision_features"][:, ::KEPT_IMAGE_TOKENS],
        **states,
    }


def _configuration(checkpoint: Path, vocabulary: np.ndarray) -> dict[str, np.ndarray]:
    config = json.loads((checkpoint / "config.json").read_text())
    eagle = json.loads((checkpoint / "eagle2_hg_model" / "config.json").read_text())
    config["action_head_cfg"]["max_seq_len"] = config["action_head_cfg"]["action_horizon"]
    eagle["text_config"]["vocab_size"] = len(vocabulary)
    for key in ("bos_token_id", "eos_token_id"):
        eagle["text_config"].pop(key, None)
    eagle["image_token_index"] = int(np.searchsorted(vocabulary, eagle["image_token_index"]))
    metadata = json.loads((checkpoint / "experiment_cfg" / "metadata.json").read_text())
    return {"config": np.array(json.dumps(config)), "eagle": np.array(json.dumps(eagle)), "metadata": np.array(json.dumps(metadata))}


def _weights(state: dict[str, torch.Tensor], vocabulary: np.ndarray, horizon: int) -> dict[str, np.ndarray]:
    arrays = {}
    for name, tensor in state.items():
        assert tensor.dtype == torch.bfloat16, name
        if name == EMBEDDING:
            tensor = tensor[torch.from_numpy(vocabulary)]
        elif name == POSITIONS:
            tensor = tensor[:horizon]
        elif is_per_embodiment(name):
            tensor = tensor[ROW : ROW + 1]
        arrays[f"weights/{name}"] = tensor.contiguous().view(torch.int16).numpy().view(np.uint16)
    return arrays


def _outputs(z: np.lib.npyio.NpzFile, vocabulary: np.ndarray, image_token: int) -> dict[str, np.ndarray]:
    ids = z["in.eagle_input_ids"][0]
    images = np.flatnonzero(ids == image_token)
    rows = np.sort(np.concatenate((np.flatnonzero(ids != image_token), images[::KEPT_IMAGE_TOKENS])))
    arrays = {"ids": np.searchsorted(vocabulary, ids).astype(np.int32), "rows": rows.astype(np.int32)}
    arrays.update({key: z[key][:, rows] for key in ("backbone_features", "vl_features")})
    arrays.update({key: z[key] for key in z if key.rsplit(".", 1)[-1] in map(str, STEPS) and key.startswith("action")})
    return arrays


def main() -> None:
    shared = Path(sys.argv[1])
    for case, cameras in CASES.items():
        target = Path(__file__).parent / f"{case}.npz"
        np.savez_compressed(target, **reduce_case(shared / "golden" / case, cameras))
        print(f"{target}: {target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
