"""Reduce the reference's recordings to what cannot be computed again, so that parity is tested in a clean checkout.

    PYTHONPATH=.:tests python tests/golden/reduce.py SHARED_DIR

Makes the *.xz beside this file and tokenizers.json. README.md says what SHARED_DIR holds, what is left out, and why that is exact. Each case is
restored at once and compared with SHARED_DIR: all numbers, the ids of all prompts, and the actions of a policy on raw frames, bit for bit.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden.restore import HERE, UNREAD_WORD, Differences, build, digest, restore, write
from safetensors import safe_open

from gr00t_fast import load_policy
from gr00t_fast.policy import Gr00tPolicy

# Directory and case -> the seed of its numbers; for N1.5's and N1.6's and N1.7's the 64-bit words that were drawn before the first frame.
_CASES: dict[str, dict[str, tuple[int, int | None]]] = {
    "golden": {"so100": (11, 24), "so100_dualcam": (22, 24)},
    "golden_n1d6": {"so101": (16, 28), "so101_dual": (26, 188), "so101_relative": (36, 328), "so101_letterbox": (46, 188)},
    "golden_n1d7": {
        "so101": (17, 188),
        "so101_dual": (27, 28),
        "so101_no_letterbox": (47, 188),
        "so101_letterbox_flag": (57, 188),
        "so101_dual_no_letterbox": (67, 28),
    },
    "golden_lerobot": {"n1d5": (74, None), "n1d7": (71, None), "n1d7_relative": (72, None), "n1d7_local_base": (76, None)},
}
_PADDED = {"golden_n1d6": ("so101_letterbox",), "golden_n1d7": ("so101", "so101_dual", "so101_letterbox_flag")}
_TOKENIZERS = {"n1d5": ("eagle2_hg_model",), "n1d6": ("n1d6_processor", "eagle2_hg_model"), "n1d7": ("qwen3_vl_processor",)}
_TEXTS = ("go", "Other task")  # that tests say besides the recorded ones
_PADDING = (0, 151643)  # ids that stand where nothing is read
_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")
_PER_EMBODIMENT = (".W", ".b")
_UNUSED = "as_run."  # the recordings as NVIDIA rounds them; no test reads those


def _program(directory: str, case: str) -> str:
    """Which made it, by the network's name."""
    network = {"golden": "n1d5", "golden_lerobot": case[:4]}.get(directory, directory[-4:])
    return f"lerobot_{network}" if directory == "golden_lerobot" else network


def describe(shared: Path, directory: str, case: str, ids: Iterable[int]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a reduced file says of a case, but for its digest; and the truth by the names that differences have."""
    source, program = shared / directory / case, _program(directory, case)
    seed, skip = _CASES[directory][case]
    half = None
    if skip is None:
        skip, half = _where_lerobots_frames_begin(seed, source)
    about = {"program": program, "seed": seed, "skip": skip, "half": half, "noise": 3 if program == "n1d6" else 12}
    about["letterbox"] = case in _PADDED[directory] if directory in _PADDED else False if case == "n1d7_local_base" else None
    texts, binary = {}, {}
    for file in _configuration(source):
        path = str(file.relative_to(source))
        if file.suffix == ".safetensors":
            binary[path] = file.read_bytes().hex()
        else:
            texts[path] = file.read_text()
    about |= {"texts": texts, "binary": binary}
    truth = _describe_weights(about, source, program, sorted(ids))
    about["arrays"] = {}
    for file in ("observation.npz", "expected.npz", "expected_list_prompt.npz"):
        if (source / file).exists():
            with np.load(source / file) as z:
                arrays = {name: z[name] for name in sorted(z, key=lambda name: name != "grids") if not name.startswith(_UNUSED)}
            about["arrays"][file] = {
                name: (each.dtype.str, each.shape, *([each.tolist()] if each.dtype.kind == "U" else [])) for name, each in arrays.items()
            }
            truth |= {f"{file}/{name}": each for name, each in arrays.items()}
    cameras = [name for name, (_, shape, *_) in about["arrays"]["observation.npz"].items() if len(shape) > 2 and shape[-1] == 3]
    about["cameras"] = _in_the_order_of_the_network(source, cameras, program)
    _describe_pictures(about, truth)
    return about, truth


def _configuration(source: Path) -> list[Path]:
    """All of a checkpoint but its weights."""
    files = (file for file in sorted((source / "checkpoint").rglob("*")) if file.is_file())
    return [file for file in files if not (file.suffix == ".safetensors" and file.name.startswith("model"))]


def _describe_weights(about: dict[str, Any], source: Path, program: str, ids: list[int]) -> dict[str, np.ndarray]:
    embodiment = 31 if "n1d5" in program else 10
    about["rows"] = {**dict.fromkeys(_EMBEDDINGS, ids), **{ending: [embodiment] for ending in _PER_EMBODIMENT}}
    truth, shapes, about["weights"] = {}, {}, {}
    for file in sorted((source / "checkpoint").glob("model*.safetensors")):
        with safe_open(file, "pt") as weights:
            drawn = {key: _drawn_name(key, program) for key in weights.keys()}  # noqa: SIM118
            about["weights"][str(file.relative_to(source))] = drawn
            for key, name in drawn.items():
                tensor = weights.get_tensor(key)
                shapes[name], about["bfloat16"] = list(tensor.shape), tensor.dtype == torch.bfloat16
                rows = next((rows for ending, rows in about["rows"].items() if name.endswith(ending)), None)
                tensor = tensor if rows is None else tensor[rows]
                truth[name] = (tensor.view(torch.int16) if about["bfloat16"] else tensor).numpy()
    stored = set(shapes)
    if program == "n1d6":  # always drawn, sometimes published
        (embedding,) = (name for name in shapes if name.endswith("embed_tokens.weight"))
        shapes.setdefault(embedding.replace("model.embed_tokens", "lm_head"), shapes[embedding])
    about["draws"] = [(name, shapes[name], name in stored) for name in sorted(shapes)]
    return truth


def _drawn_name(key: str, program: str) -> str:
    """lerobot's policy has the network below another name, and its file the embedding under that of the head."""
    name = key.removeprefix("_groot_model.")
    if program.startswith("lerobot"):
        name = name.replace("backbone.model.lm_head", "backbone.model.model.language_model.embed_tokens")
        name = name.replace("language_model.lm_head", "language_model.model.embed_tokens")
    return name


def _where_lerobots_frames_begin(seed: int, source: Path) -> tuple[int, int | None]:
    """64-bit words drawn before, and the half of one that is left: make_golden_lerobot.py draws two pictures, two episodes and a state."""
    random = np.random.default_rng(seed)
    for _ in range(2):
        random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        random.integers(-12, 13, (480, 640, 3), dtype=np.int16)
    for _ in range(2):
        random.uniform(0, 6.28, 6), random.uniform(0.03, 0.12, 6), random.normal(0, 0.4, (52, 6))
    random.normal(0, 8, 6)
    state = random.bit_generator.state
    (skipped,) = np.flatnonzero(np.random.PCG64(seed).random_raw(1_000_000) == random.bit_generator.random_raw())
    return int(skipped), int(state["uinteger"]) if state["has_uint32"] else None


def _in_the_order_of_the_network(source: Path, cameras: list[str], program: str) -> list[str]:
    with np.load(source / "expected.npz") as z:
        order = [name.replace("video_224", "video") for name in z if name.startswith("video_224.")]
    if order or not program.startswith("lerobot"):
        return order or cameras
    pack = json.loads((source / "checkpoint" / "policy_preprocessor.json").read_text())["steps"][2]["config"]
    named = (pack.get("modality_config") or {}).get("video", {}).get("modality_keys") or pack.get("video_modality_keys")
    return [f"observation.images.{name}" for name in named] if named else sorted(cameras)


def _describe_pictures(about: dict[str, Any], truth: dict[str, np.ndarray]) -> None:
    """Of the last resize the network's inputs tell the bytes."""
    if (grids := truth.get("expected.npz/in.image_grid_thw")) is not None:
        about["grid"] = rows, columns = grids[0, 1:].tolist()
        patches = truth["expected.npz/in.pixel_values"].reshape(len(grids), rows // 2, columns // 2, 2, 2, 3, 2, 16, 16)[:, :, :, :, :, :, 0]
        pixels = patches.transpose(0, 1, 3, 6, 2, 4, 7, 5).reshape(len(grids), 16 * rows, 16 * columns, 3)
    elif "expected.npz/in.eagle_pixel_values" in truth:
        pixels = truth["expected.npz/in.eagle_pixel_values"].transpose(0, 2, 3, 1)
    else:
        return
    truth["pictures"] = np.round(pixels.astype(np.float64) * 127.5 + 127.5).astype(np.uint8)


# --- tokenizers


def reduced_tokenizer(directory: Path, ids: Iterable[int]) -> dict[str, Any]:
    """As much as it takes to make these ids: their entries, and the merges that lead to them."""
    vocabulary = json.loads((directory / "vocab.json").read_text())
    by_id = {index: token for token, index in vocabulary.items()}
    merges = [tuple(line.split(" ")) for line in (directory / "merges.txt").read_text().splitlines() if line and not line.startswith("#version")]
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    all_added = json.loads((directory / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    added = {index: {key: all_added[index][key] for key in ("content", "special")} for index in map(str, sorted(ids)) if index in all_added}
    used, tokens = set(), {entry["content"]: int(index) for index, entry in added.items()}
    for token in (by_id[index] for index in sorted(ids) if index in by_id):
        parts = list(token)
        tokens.update((part, vocabulary[part]) for part in parts)
        while pairs := [pair for pair in zip(parts, parts[1:], strict=False) if pair in ranks]:
            pair = min(pairs, key=ranks.__getitem__)
            used.add(pair)
            parts = _merged(parts, pair)
            tokens["".join(pair)] = vocabulary["".join(pair)]
        assert parts == [token], f"{token}: {parts}"
    return {"vocab": tokens, "merges": [" ".join(pair) for pair in sorted(used, key=ranks.__getitem__)], "added": added}


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    made: list[str] = []
    for part in parts:
        if made and (made[-1], part) == pair:
            made[-1] += part
        else:
            made.append(part)
    return made


# --- all


def _policies(root: Path, directory: str, case: str) -> Iterable[Gr00tPolicy]:
    settings = {"device": "cpu", "precision": "fp32", **({"data_config": case} if directory == "golden" else {})}
    for tokenizer in _TOKENIZERS[_program(directory, case)[-4:]]:
        for style in ("plain", "nvidia") if directory == "golden" else ("plain",):
            yield load_policy(root / directory / case / "checkpoint", processor_path=root / tokenizer, prompt_style=style, **settings)


def _observation(root: Path, directory: str, case: str, policy: Gr00tPolicy) -> dict[str, Any]:
    with np.load(root / directory / case / "observation.npz") as z:
        seen = {name: z[name] if z[name].ndim else str(z[name]) for name in z if name != "camera_order_of_dataset"}
    if "instruction" in seen:
        seen[policy.processor.data_config.language_key] = [seen.pop("instruction")]
    return seen


def _answers(root: Path, directory: str, case: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Ids of all prompts; actions from the recorded frames and noise."""
    prompts, actions = [], []
    for policy in _policies(root, directory, case):
        seen = _observation(root, directory, case, policy)
        with np.load(root / directory / case / "expected.npz") as z:
            noise = z["noise"]
        inputs = policy.preprocess(seen)
        own = next(each for each in seen.values() if isinstance(each, str) or (isinstance(each, list | np.ndarray) and isinstance(each[0], str)))
        texts = [own if isinstance(own, str) else str(own[0]), *_TEXTS]
        prompts += [policy.processor.prompts(text, 1) for text in texts] + [np.asarray(inputs.input_ids).ravel()]
        actions.append(policy.infer(inputs, noise))
    return prompts, actions


def main() -> None:
    shared = Path(sys.argv[1]).resolve()
    answers = {(directory, case): _answers(shared, directory, case) for directory, cases in _CASES.items() for case in cases}
    ids: dict[str, set[int]] = {name: set() for names in _TOKENIZERS.values() for name in names}
    for (directory, case), (prompts, _) in answers.items():
        for name in _TOKENIZERS[_program(directory, case)[-4:]]:
            ids[name].update(int(index) for prompt in prompts for index in prompt)
    (HERE / "tokenizers.json").write_text(json.dumps({name: reduced_tokenizer(shared / name, used) for name, used in ids.items()}, indent=0) + "\n")
    for (directory, case), _ in answers.items():
        used = ids[_TOKENIZERS[_program(directory, case)[-4:]][0]] | set(_PADDING)
        about, truth = describe(shared, directory, case, used)
        stored: dict[str, np.ndarray] = {}
        about["digest"] = digest(*build(about, Differences(stored, truth)))
        file = HERE / f"{directory}.{case}.xz"
        write(file, about, stored)
        print(f"{file.name}: {file.stat().st_size / 1e6:.2f} MB", flush=True)
    with tempfile.TemporaryDirectory() as made:
        for name in (*_CASES, *ids):
            restore(name, Path(made))
        for (directory, case), expected in answers.items():
            _check(shared, Path(made), directory, case, expected)
    print("restored: equal")


def _check(shared: Path, made: Path, directory: str, case: str, expected: tuple[list[np.ndarray], list[np.ndarray]]) -> None:
    source, copy = shared / directory / case, made / directory / case
    for file in source.glob("*.npz"):
        with np.load(file) as theirs, np.load(copy / file.name) as ours:
            assert all(np.array_equal(theirs[name], ours[name]) for name in ours)
            assert {name for name in theirs if not name.startswith(_UNUSED)} == set(ours)
    for file in _configuration(source):
        assert file.read_bytes() == (copy / file.relative_to(source)).read_bytes(), file
    for file in (source / "checkpoint").glob("model*.safetensors"):
        with safe_open(file, "pt") as theirs, safe_open(copy / file.relative_to(source), "pt") as ours:
            assert list(theirs.keys()) == list(ours.keys())
            for name in theirs.keys():  # noqa: SIM118
                true, found = theirs.get_tensor(name), ours.get_tensor(name)
                assert ((true == found) | found.isnan() | (found == UNREAD_WORD)).all(), name
    for theirs, ours in zip(expected, _answers(made, directory, case), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(theirs, ours, strict=True)), (directory, case)


if __name__ == "__main__":
    main()
