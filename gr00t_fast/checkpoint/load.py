"""From a checkpoint directory or hub id to a model ready to run.

The model is built on the meta device (no memory), then each parameter is allocated once and filled straight from the file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gr00t_fast.checkpoint.embodiment import EMBODIMENT_ROWS, EmbodimentMetadata, parse_metadata
from gr00t_fast.checkpoint.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter, Difference, Located, merge, read_adapter
from gr00t_fast.checkpoint.processor_n1d7 import (
    EMBODIMENT_FILE,
    PROCESSOR_FILE,
    PROCESSOR_FILES,
    STATISTICS_FILE,
    SUBDIRECTORY,
    TRAINING_FILES,
    EmbodimentN1d7,
    ProcessorFiles,
    letterbox_of,
    processor_directory,
)
from gr00t_fast.checkpoint.tensor_file import TensorEntry, TensorFile
from gr00t_fast.errors import CheckpointError, ConfigError
from gr00t_fast.files import read_json
from gr00t_fast.model import Gr00t
from gr00t_fast.model.config import ModelConfig
from gr00t_fast.networks import n1d5, n1d7
from gr00t_fast.networks.n1d5 import PUBLISHED_EAGLE
from gr00t_fast.networks.n1d7 import BACKBONE_FILE, MODEL_TYPE, PUBLISHED_BACKBONE
from gr00t_fast.networks.weights import UNUSED_PREFIXES, Layout, published_shapes, sources_of

log = logging.getLogger(__name__)
_READ_THREADS = 4  # enough to keep an NVMe disk or the page cache busy; more does not help on two cores
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
_LISTED = 12  # names shown per kind of fault before "and N more"
Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory whose small files were read and checked; no weights yet.

    raw_metadata: experiment_cfg/metadata.json of N1.5; processor: the files that N1.7 has instead.
    weight_files: all that the weights depend on; of a LoRA adapter, whose `base` is another directory than `path`, its own two come last.
    """

    path: Path
    config: ModelConfig
    raw_metadata: dict[str, Any]
    weight_files: tuple[Path, ...]
    base: Path
    adapter: Adapter | None = None
    processor: ProcessorFiles | None = None
    state_history: int = 1

    def tag_of(self, tag: str) -> str:
        """As the files have it: names of NVIDIA's EmbodimentTag are in capitals."""
        known = self.raw_metadata if self.processor is None else self.processor.statistics
        return tag if tag in known or tag.lower() not in known else tag.lower()

    def embodiment(self, tag: str) -> EmbodimentMetadata:
        """Of N1.5. Raises ConfigError for an unknown tag, and for a checkpoint of N1.7."""
        if self.processor is not None:
            raise ConfigError(f"{self.path} is a GR00T N1.7 checkpoint, and this works with N1.5 only so far.")
        return parse_metadata(self.raw_metadata, self.tag_of(tag))

    def embodiment_n1d7(self, tag: str) -> EmbodimentN1d7:
        """Of N1.7. Raises ConfigError for an unknown tag, CheckpointError for damaged files."""
        head = self.config.head
        sizes = {"state_dim": head.state_dim // self.state_history, "state_history": self.state_history}
        sizes |= {"action_dim": head.action_dim, "action_horizon": head.action_horizon, "embodiments": head.embodiments}
        return self.processor.embodiment(self.tag_of(tag), sizes)

    def record_of(self, tag: str) -> Any:
        """All that the small files say of an embodiment, and nothing of others, as it stands there. Raises ConfigError and CheckpointError."""
        if self.processor is None:
            return self.raw_metadata[self.embodiment(tag).tag]
        return self.processor.record(self.tag_of(tag), self.row_of(tag))

    def trained_cameras(self, tag: str) -> dict[str, tuple[int, ...]]:
        """`video.<camera>` -> width and height of the training videos, or nothing where the checkpoint does not say. Raises as `record_of`."""
        if self.processor is None:
            return {key: (camera.width, camera.height) for key, camera in self.embodiment(tag).cameras.items()}
        return {f"video.{camera}": () for camera in self.embodiment_n1d7(tag).cameras}

    def row_of(self, tag: str) -> int:
        """The row of the per-embodiment weights. Raises ConfigError and CheckpointError."""
        return EMBODIMENT_ROWS[self.tag_of(tag)] if self.processor is None else self.embodiment_n1d7(tag).row


def open_checkpoint(model_path: str | Path, with_weights: bool = True, revision: str | None = None, letterbox: str = "auto") -> Checkpoint:
    """Read configuration and metadata of a local directory, or of a hub repository (downloaded). Raises CheckpointError.

    `with_weights=False`: only the small files are needed and downloaded; `weight_files` is empty. `revision`: commit, tag or branch of the hub
    repository; without one it is whatever the repository holds today. `letterbox`: of N1.7, as of `load_policy`. Raises ConfigError for a revision
    of a local directory, and for another word than these.
    """
    path = _local_directory(model_path, with_weights, revision)
    adapter = read_adapter(path, with_weights)
    base = path if adapter is None else _base_of(adapter, with_weights)
    raw = _read_json(base / "config.json")
    is_n1d7 = raw.get("model_type") == MODEL_TYPE
    backbone_file = base / (BACKBONE_FILE if is_n1d7 else "eagle2_hg_model/config.json")
    backbone = _read_json(backbone_file) if backbone_file.exists() else PUBLISHED_BACKBONE if is_n1d7 else PUBLISHED_EAGLE
    config = n1d7.read_config(raw, backbone) if is_n1d7 else n1d5.read_config(raw, backbone)
    weights = (*_weight_files(base), *(adapter.files if adapter else ())) if with_weights else ()
    if is_n1d7:
        files = _processor_files(path, raw, letterbox)
        return Checkpoint(path, config, {}, weights, base, adapter, files, raw.get("state_history_length", 1))
    if letterbox != "auto":
        raise ConfigError(f"letterbox '{letterbox}' is for GR00T N1.7; {path} is a GR00T N1.5 checkpoint. Leave --letterbox out.")
    return Checkpoint(path, config, _read_json(path / "experiment_cfg" / "metadata.json", nan=True), weights, base, adapter)


def load_model(
    checkpoint: Checkpoint,
    embodiment_tag: str,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None = None,
    only: tuple[str, ...] = ("",),
) -> Gr00t:
    """Build and fill the network. One CheckpointError lists all missing, extra and mis-shaped tensors.

    Parameters whose names do not begin with one of `only` stay on the meta device, without memory: for work on a part of the network.
    """
    row, rows = checkpoint.row_of(embodiment_tag), checkpoint.config.head.embodiments
    if row >= rows:
        raise CheckpointError(f"embodiment_tag '{embodiment_tag}' selects row {row} of the per-embodiment weights; by config.json there are {rows}.")
    with _WithoutInitialisation(), torch.device("meta"):
        model = Gr00t(checkpoint.config)
    with ExitStack() as stack:
        own = checkpoint.adapter.files if checkpoint.adapter else ()
        files = [stack.enter_context(TensorFile(path)) for path in checkpoint.weight_files if path not in own]
        located, differences = _check_names_and_shapes(model, checkpoint, files), {}
        if checkpoint.adapter is not None:
            adapter_file = stack.enter_context(TensorFile(checkpoint.adapter.weights))
            located, differences = merge(checkpoint.adapter, adapter_file, located)
        _fill(list(_plan(model, located, differences, row, device, dtype, only)), progress)
    return model.eval().requires_grad_(False)


class _WithoutInitialisation(TorchFunctionMode):
    """Skips torch.nn.init: every weight comes from the file, and initialising meta tensors alone imports 0.7 s of torch."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _local_directory(model_path: str | Path, with_weights: bool, revision: str | None) -> Path:
    path = Path(model_path).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ConfigError(f"revision '{revision}': model_path {path} is a local directory, which has none. Leave --revision out.")
        return path
    if path.is_file():
        raise CheckpointError(f"model_path {path} is a file; expected the checkpoint's directory (with config.json in it).")
    text = str(model_path)
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise CheckpointError(f"model_path '{text}' does not exist. Expected a checkpoint directory, or a hub id such as nvidia/GR00T-N1.5-3B.")
    return _download(text, with_weights, revision)


def _base_of(adapter: Adapter, with_weights: bool) -> Path:
    try:
        base = _local_directory(adapter.base, with_weights, None)
    except CheckpointError as error:
        raise CheckpointError(
            f"{adapter.directory} is a LoRA adapter, and the checkpoint that it changes cannot be had: {error} "
            f"Write where it is into base_model_name_or_path of {ADAPTER_CONFIG}."
        ) from error
    if (base / ADAPTER_CONFIG).exists():
        raise CheckpointError(f"{adapter.directory} adapts {base}, which is a LoRA adapter itself; expected a whole checkpoint.")
    return base


def _download(repo_id: str, with_weights: bool, revision: str | None) -> Path:
    import huggingface_hub  # only when a hub id is given

    weights = ["model*.safetensors*", ADAPTER_WEIGHTS] if with_weights else []
    patterns = ["config.json", *weights, ADAPTER_CONFIG, "experiment_cfg/metadata.json", "eagle2_hg_model/*"]
    beside = (*PROCESSOR_FILES, *_TOKENIZER_FILES)  # in the root or in the subdirectory, as gr00t_fast.inputs.prompt looks for them
    patterns += [BACKBONE_FILE, *beside, *(f"{SUBDIRECTORY}/{file}" for file in beside), *TRAINING_FILES]
    try:
        path = Path(huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # every hub error is one of these: no network, no such repository, gated
        what = "it" if revision is None else f"its revision '{revision}'"
        raise CheckpointError(
            f"'{repo_id}' is no local directory, and fetching {what} from the hub failed: {str(error).rstrip('.')}. "
            "Check the spelling, or download it and give the path."
        ) from error
    if path.name != revision:  # the cache's directory is named for the commit
        log.warning("%s is commit %s today; it may be another one tomorrow. Keep it with --revision=%s", repo_id, path.name, path.name)
    return path


def _read_json(path: Path, nan: bool = False) -> dict[str, Any]:
    """nan: whether numbers may be NaN; whoever uses them decides."""
    try:
        loaded = read_json(path, nan)
    except FileNotFoundError as error:
        below = sorted({file.parent for file in path.parent.glob("*/model*.safetensors*")})
        meant = f" Did you mean {' or '.join(map(str, below[:3]))}?" if below else ""
        raise CheckpointError(f"{path} is missing. Expected a GR00T checkpoint: {_EXPECTED_FILES}.{meant}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}). Copy or download it again.") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(loaded).__name__}.")
    return loaded


_EXPECTED_FILES = f"config.json, model*.safetensors and (N1.5) experiment_cfg/metadata.json or (N1.7) {', '.join(PROCESSOR_FILES)}"


def _processor_files(path: Path, config: dict[str, Any], letterbox: str) -> ProcessorFiles:
    directory = processor_directory(path)
    rows = directory / EMBODIMENT_FILE  # without one the reference has its own table
    processor, statistics = _read_json(directory / PROCESSOR_FILE), _read_json(directory / STATISTICS_FILE, nan=True)
    decided = letterbox_of(path, processor, letterbox)
    return ProcessorFiles(processor, statistics, _read_json(rows) if rows.exists() else {}, config, decided, letterbox)


def _weight_files(path: Path) -> tuple[Path, ...]:
    index = path / "model.safetensors.index.json"
    if not index.exists():
        single = path / "model.safetensors"
        if not single.is_file():
            raise CheckpointError(f"{path} has neither model.safetensors nor model.safetensors.index.json. Expected {_EXPECTED_FILES}.")
        return (single,)
    weight_map = _read_json(index).get("weight_map", {})
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must give a file name for each tensor. Copy or download it again.")
    names = sorted(set(weight_map.values()))
    foreign = [name for name in names if Path(name).name != name]
    if foreign:
        raise CheckpointError(f"{index} names files outside the checkpoint's directory: {', '.join(foreign)}. Expected plain file names.")
    absent = [name for name in names if not (path / name).is_file()]
    if absent or not names:
        raise CheckpointError(f"{index} names weight files that are not there: {', '.join(absent) or '(none named)'}. Copy or download them.")
    return tuple(path / name for name in names)


def _check_names_and_shapes(model: Gr00t, checkpoint: Checkpoint, files: list[TensorFile]) -> Located:
    """Compare the files' headers with what the network needs, before a byte of weights is read."""
    located: Located = {name: (file, entry) for file in files for name, entry in file.entries.items()}
    needed: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        needed.update(published_shapes(name, tuple(parameter.shape), checkpoint.config))
    missing = sorted(needed.keys() - located.keys())
    extra = sorted(name for name in located.keys() - needed.keys() if not name.startswith(UNUSED_PREFIXES))
    wrong = sorted(name for name, shape in needed.items() if name in located and located[name][1].shape != shape)
    twice = sorted(name for name in located if sum(name in file.entries for file in files) > 1)
    if missing or extra or wrong or twice:
        mis_shaped = [f"{name}: expected {list(needed[name])}, got {list(located[name][1].shape)}" for name in wrong]
        version, backbone = ("N1.5", "eagle2_hg_model/config.json") if checkpoint.processor is None else ("N1.7", BACKBONE_FILE)
        parts = [_listing("missing", missing), _listing("unexpected", extra), _listing("mis-shaped", mis_shaped), _listing("in two files", twice)]
        raise CheckpointError(
            f"the weights in {checkpoint.base} do not fit config.json (and {backbone}):\n"
            + "\n".join(part for part in parts if part)
            + f"\nCheck that all files come from the same GR00T {version} checkpoint."
        )
    return located


def _listing(kind: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f"\n    ... and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"  {len(names)} {kind}:\n    " + "\n    ".join(names[:_LISTED]) + more


@dataclass(frozen=True)
class _Read:
    """One piece of work: fill `target` (part of a parameter) from a published tensor's rows, `first_row` on."""

    target: Tensor
    file: TensorFile
    entry: TensorEntry
    first_row: int
    difference: Difference | None = None

    @property
    def size_bytes(self) -> int:
        return self.target.numel() * self.entry.dtype.itemsize

    def run(self) -> int:
        direct = self.target.dtype == self.entry.dtype and self.target.device.type == "cpu" and self.difference is None
        buffer = self.target if direct else torch.empty(self.target.shape, dtype=self.entry.dtype)
        self.file.read_into(buffer, self.entry, self.first_row)
        if not direct:
            self.target.copy_(buffer if self.difference is None else self.difference.add_to(buffer))
        return self.size_bytes


def _fill(reads: list[_Read], progress: Progress | None) -> None:
    total = sum(read.size_bytes for read in reads)
    done = 0
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for size in pool.map(_Read.run, reads):
            done += size
            if progress:
                progress(done, total)


def _plan(
    model: Gr00t,
    located: Located,
    differences: dict[str, Difference],
    row: int,
    device: torch.device,
    dtype: torch.dtype,
    only: tuple[str, ...],
) -> Iterator[_Read]:
    """Allocate each parameter and say where its parts come from."""
    for name, meta in [(name, meta) for name, meta in model.named_parameters() if name.startswith(only)]:
        parameter = torch.nn.Parameter(torch.empty(meta.shape, dtype=dtype, device=device), requires_grad=False)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, parameter)
        sources = sources_of(name, model.config)
        if sources.layout is Layout.CATEGORY:
            yield _Read(parameter.data[None], *located[sources.names[0]], first_row=row)
            continue
        start = 0
        for source in sources.names:
            file, entry = located[source]
            yield _Read(parameter.data[start : start + entry.shape[0]], file, entry, first_row=0, difference=differences.get(source))
            start += entry.shape[0]
