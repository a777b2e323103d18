"""What an export says about itself, and the check that it belongs to the checkpoint, cameras and data configuration at hand.

`manifest.json` lies beside the exported files. Every engine that runs from files calls `check_manifest` before it opens one of them, so that an
engine of other weights or another arm can never move this one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from gr00t_fast.base.errors import EngineError, ObservationError, StaleEngineError
from gr00t_fast.base.files import MANIFEST_NAME, atomic_write, read_json
from gr00t_fast.checkpoint import Checkpoint
from gr00t_fast.inputs.data_config import DataConfig
from gr00t_fast.inputs.embodiment import Embodiment

FORMAT = 1
STAGES = ("vision", "language", "denoise_step")  # of an exported network
# Sizes of inputs and outputs that vary between calls: of a prompt all tokens, and those that are no image tokens.
TOKENS, TEXT_TOKENS = "tokens", "text_tokens"

# What makes exports, by the names that manifests record: those of the scripts in export/.
PROGRAMS = {
    "to_onnx.py": ("gr00t-fast", "export", "onnx"),
    "quantise.py": ("gr00t-fast", "quantise"),
    "to_tensorrt.py": ("gr00t-fast", "export", "tensorrt"),
}


@dataclass(frozen=True)
class Target:
    """What an export is made for, and later has to fit."""

    checkpoint: Checkpoint
    embodiment: Embodiment
    data_config_name: str | None = None  # as on the command line, if it stood there

    @property
    def embodiment_tag(self) -> str:
        return self.embodiment.tag

    @property
    def data_config(self) -> DataConfig:
        return self.embodiment.data_config

    def identity(self, digests: Digests) -> dict[str, Any]:
        """Content, not names or dates: the same checkpoint elsewhere has the same identity. Raises OSError when a weight file cannot be read."""
        files, embodiment = self.checkpoint.weight_files, self.embodiment
        cameras = {key: embodiment.cameras[key] for key in self.data_config.video_keys}
        return {
            "weights": dict(zip((file.name for file in files), digests.of(files), strict=True)),
            "config": sha256_of_json(_without_later_fields(asdict(self.checkpoint.config))),
            "metadata": sha256_of_json(embodiment.record),
            "embodiment_tag": embodiment.tag,
            "cameras": [[key, camera.width, camera.height] if camera else [key] for key, camera in cameras.items()],
            "data_config": json.loads(json.dumps(_without_later_fields(asdict(self.data_config)))),  # lists instead of tuples, as JSON gives it back
            **({} if embodiment.letterbox is None else {"letterbox": embodiment.letterbox.pads}),
        }

    def command(self, program: str, *flags: str) -> str:
        """The command line that makes an export for this target: `program` is the name that manifests record."""
        common = {"model_path": self.checkpoint.path, "embodiment_tag": self.embodiment_tag, "data_config": self.data_config_name}
        common |= {} if self.checkpoint.letterbox == "auto" else {"letterbox": self.checkpoint.letterbox}
        said = (f"--{name}={value}" for name, value in common.items() if value is not None)
        return shlex.join([*PROGRAMS.get(program, (program,)), *said, *flags])


def target_of(checkpoint: Checkpoint, embodiment_tag: str, given: str | DataConfig | None) -> Target:
    """What exports of `checkpoint` are made for. given: a data configuration, as of `load_policy`. Raises ConfigError and CheckpointError."""
    name = given if given is None or isinstance(given, str) else "module:ClassName"
    return Target(checkpoint, checkpoint.embodiment(embodiment_tag, given), name)


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    kind: what the stages' files are: "onnx", "openvino", "tensorrt".
    precision: "fp32", "fp16" or "bf16", the number format of the graphs' inputs and outputs, and of weights that are not quantised.
    quantisation: None, or what the quantiser says of it; `format` ("int8", "fp8") and `runtime` (which engine the file is made for) at least.
    identity: `Target.identity`.
    shapes: cameras (pictures per observation: several times of a camera count apart), picture (their height and width), camera_size (width and
        height of the cameras that it was made for, where they decide that), image_tokens, max_tokens
        (most prompt tokens, image tokens included), prompt_buckets (usual prompt lengths, ascending), horizon, action_dim, state_dim; and for graphs
        that have the places of the pictures' tokens built in image_spans: of each picture its first token's place and the one behind its last's,
        both negative where they count from the prompt's end.
    denoising_steps: step counts that the tables cover.
    stages: stage -> {"file": name, "inputs": {name: shape}, "outputs": {name: shape}}; a size that varies is the text "tokens" or "text_tokens".
    files: name -> {"bytes": int, "sha256": text}, every file of the export but this one.
    versions: package -> version. command: how it was made. details: what else a kind needs (opset, target GPU, calibration).
    program, flags: the key of `PROGRAMS` that made it, and its flags besides checkpoint, embodiment, data configuration and --out: with
        these a message can say how to make it again.
    """

    kind: str
    precision: str
    identity: Mapping[str, Any]
    shapes: Mapping[str, Any]
    denoising_steps: tuple[int, ...]
    stages: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str]
    command: str
    quantisation: Mapping[str, Any] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    program: str = ""
    flags: tuple[str, ...] = ()
    format: int = FORMAT

    @property
    def stage_files(self) -> dict[tuple[str, int], str]:
        """Stage and number of observations -> file; an ONNX export may have further ones for several observations at once."""
        batches = {(stage, int(size)): file for size, files in self.details.get("batches", {}).items() for stage, file in files.items()}
        return {(stage, 1): entry["file"] for stage, entry in self.stages.items()} | batches

    def write(self, directory: Path) -> None:
        with atomic_write(directory / MANIFEST_NAME) as file:
            file.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def varying_sizes(shapes: Mapping[str, Any], prompt_tokens: int) -> dict[str, int]:
    """What stands for the names in shapes of `Manifest.stages`, for a prompt of that length. shapes: of the manifest."""
    return {TOKENS: prompt_tokens, TEXT_TOKENS: prompt_tokens - shapes.get("image_tokens", 0)}


def least_tokens(spans: Sequence[Sequence[int]] | None, image_tokens: int) -> int:
    """Tokens of the shortest prompt: at least one token of text (two beside pictures in known places, which exporters need for a size that varies).
    spans: `image_spans` of the manifest's shapes."""
    if not spans:
        return image_tokens + 1
    return 2 + (spans[-1][1] if spans[0][0] >= 0 else -spans[0][0])


def describe_files(directory: Path, digests: Digests | None = None) -> dict[str, dict[str, Any]]:
    """`Manifest.files` for all that lies in `directory` (hidden files and the manifest apart)."""
    files = sorted(file for file in directory.iterdir() if file.is_file() and file.name != MANIFEST_NAME and not file.name.startswith("."))
    found = (digests or Digests(directory)).of(files)
    return {file.name: {"bytes": file.stat().st_size, "sha256": digest} for file, digest in zip(files, found, strict=True)}


def read_manifest(directory: Path, remedy: str) -> Manifest:
    """Raises EngineError when there is none or it is damaged; `remedy` is the command to run."""
    path = directory / MANIFEST_NAME
    try:
        raw = read_json(path)
        if raw["format"] != FORMAT:
            raise ValueError(f"it has format {raw['format']}; this version reads format {FORMAT}")
        manifest = Manifest(**{each.name: raw[each.name] for each in fields(Manifest) if each.name in raw})
        sections = (manifest.identity, manifest.shapes, manifest.stages, manifest.files, *manifest.files.values(), *manifest.stages.values())
        if not all(isinstance(section, dict) for section in sections) or not isinstance(manifest.quantisation, dict | None):
            raise ValueError("a section is no mapping")
        if any(Path(name).name != name for name in manifest.files):
            raise ValueError("a file's name leaves the directory")
        if set(manifest.stages) != set(STAGES):
            raise ValueError(f"it has the stages {', '.join(manifest.stages) or 'none'}, expected {', '.join(STAGES)}")
        if any(file not in manifest.files for file in manifest.stage_files.values()):
            raise ValueError("a stage's file is not among the files that are checked")
        if not all(isinstance(flag, str) for flag in manifest.flags):
            raise ValueError("flags have the wrong form")
        return manifest
    except FileNotFoundError as error:
        raise EngineError(f"{directory} holds no exported engine (no {MANIFEST_NAME}). Run: {remedy}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"{path} cannot be read ({error!r}). Run: {remedy}") from error


def remedy_for(directory: Path, target: Target, program: str, *flags: str) -> str:
    """The command that makes this export (again): with the program and flags that made it, or the given ones when it does not say."""
    with contextlib.suppress(EngineError):
        made_by = read_manifest(directory, "")
        program, flags = (made_by.program, tuple(made_by.flags)) if made_by.program else (program, flags)
    overwrite = ("--overwrite",) if directory.is_dir() and any(directory.iterdir()) else ()
    return target.command(program, f"--out={directory}", *flags, *overwrite)


def check_manifest(directory: Path, kind: str, target: Target, remedy: str) -> Manifest:
    """The manifest of `directory`, whose files are whole and belong to `target`.

    Raises EngineError when there is no export of this `kind` or a file is missing, cut short or altered, and StaleEngineError when it was made
    from or for something else. Every message names `remedy`, the command to run.
    """
    manifest = read_manifest(directory, remedy)
    if manifest.kind != kind:
        engine = {"onnx": "onnxruntime"}.get(manifest.kind, manifest.kind)
        raise EngineError(
            f"{directory} holds an export of kind '{manifest.kind}', expected '{kind}'. Run it with --engine={engine}, or make one for this engine "
            f"in another directory."
        )
    digests = Digests(directory)
    if differences := _differences(manifest.identity, target.identity(digests)):
        listed = "\n  ".join(differences)
        raise StaleEngineError(f"the engine in {directory} was not made for this checkpoint and robot:\n  {listed}\nRun: {remedy}")
    check_files(directory, manifest, digests, remedy)
    return manifest


def check_picture(shapes: Mapping[str, Any], picture: Sequence[int], camera_size: Sequence[int] | None, remedy: str) -> None:
    """Whether pictures of (height, width), made of frames of `camera_size` where that is known, are of the size that an export is for; shapes: of
    its manifest, `remedy`: the command that made it. Raises ObservationError."""
    made = shapes.get("picture", list(picture))
    if list(picture) == made:
        return
    here, there = ("" if size is None else " of {}x{}".format(*size) for size in (camera_size, shapes.get("camera_size")))
    flag = f"--camera_size={here.removeprefix(' of ') or 'WIDTHxHEIGHT'}"
    raise ObservationError(
        f"cameras{here} make pictures of {picture[1]}x{picture[0]}; this export takes {made[1]}x{made[0]}{there and f' (cameras{there})'}. Set the "
        f"cameras to that shape, or make the graphs again with gr00t-fast export onnx and {flag}, and what was made from them: {remedy}"
    )


def _differences(made_for: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    def value(identity: Mapping[str, Any], name: str) -> Any:
        found = identity.get(name)
        return sorted(map(str, found.values())) if name == "weights" and isinstance(found, Mapping) else found  # shards may have been renamed

    hashed = ("weights", "config", "metadata")
    return [
        f"other {name}" if name in hashed else f"{name}: made for {made_for.get(name)}, here {expected}"
        for name, expected in here.items()
        if value(made_for, name) != value(here, name)
    ]


def check_files(directory: Path, manifest: Manifest, digests: Digests, remedy: str) -> None:
    """Raises EngineError for a file that is missing, cut short or altered."""
    files = {directory / name: entry for name, entry in manifest.files.items()}
    for file, entry in files.items():  # sizes first: they cost nothing
        if not file.is_file():
            raise EngineError(f"{file} is missing from the export. Run: {remedy}")
        if file.stat().st_size != entry.get("bytes"):
            raise EngineError(f"{file} is cut short or altered: expected {entry.get('bytes')} bytes, got {file.stat().st_size}. Run: {remedy}")
    for (file, entry), digest in zip(files.items(), digests.of(files), strict=True):
        if digest != entry.get("sha256"):
            raise EngineError(f"{file} is altered: its content is not what was exported. Run: {remedy}")


# Fields that configurations have got since exports were first made, and what stands in them for what was exported then.
_LATER_FIELDS = {
    "crop_scale": 0.95,
    "final_norm": True,
    "mrope_sections": None,
    "attend_text_every": None,
    "video_indices": (0,),
    "state_indices": (0,),
}


def _without_later_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """So that exports of then still fit."""
    kept = {name: value for name, value in fields.items() if name not in _LATER_FIELDS or value != _LATER_FIELDS[name]}
    return {name: _without_later_fields(value) if isinstance(value, dict) else value for name, value in kept.items()}


_CACHE_NAME = ".digests.json"
_THREADS = 4  # hashlib releases the interpreter lock


class Digests:
    """SHA-256 of files, remembered in a hidden file of `directory` (the export's)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory.resolve()
        self._known = self._read()

    def of(self, files: Iterable[Path]) -> list[str]:
        """Hexadecimal SHA-256 of each file, in order. Raises OSError for one that cannot be read."""
        with ThreadPoolExecutor(_THREADS) as pool:
            found = list(pool.map(self._digest, files))
        self._known.update({key: [*stamp, digest] for key, stamp, digest in found})
        self._write()
        return [digest for _, _, digest in found]

    def unknown(self, files: Iterable[Path]) -> list[Path]:
        """Those that `of` would have to read. Raises OSError."""
        return [file for file in files if self._known.get(self._key(file), [])[:3] != _stamp(file)]

    def _digest(self, file: Path) -> tuple[str, list[int], str]:
        key, stamp = self._key(file), _stamp(file)
        known = self._known.get(key, [])
        return key, stamp, known[3] if known[:3] == stamp else sha256(file)

    def _key(self, file: Path) -> str:
        """Files of the export by name, so that renaming its directory loses nothing; others by their whole path."""
        resolved = file.resolve()
        return resolved.name if resolved.parent == self._directory else str(resolved)

    def _read(self) -> dict[str, list]:
        try:
            known = json.loads((self._directory / _CACHE_NAME).read_text(encoding="utf-8"))
            return {str(key): [int(size), int(mtime), int(ctime), str(digest)] for key, (size, mtime, ctime, digest) in known.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}  # absent or damaged: only time is lost

    def _write(self) -> None:
        # a read-only export is hashed at every start instead
        with contextlib.suppress(OSError), atomic_write(self._directory / _CACHE_NAME) as file:
            file.write_text(json.dumps(self._known), encoding="utf-8")


def _stamp(file: Path) -> list[int]:
    """Size and times; ctime too: tools that copy the modification time cannot copy that."""
    status = os.stat(file)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def sha256(file: Path) -> str:
    with open(file, "rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_json(value: object) -> str:
    """The digest of the value, not of its spelling: keys sorted, no white space."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
