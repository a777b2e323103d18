"""From a checkpoint directory or hub id to a model ready to run.

The model is built on the meta device (no memory), then each parameter is allocated once and filled from the mapped file.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gr00t_fast.base.contracts import PolicyMetadata
from gr00t_fast.base.errors import CheckpointError, ConfigError, closest
from gr00t_fast.checkpoint.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter, LoraDelta, TensorIndex, merge, read_adapter
from gr00t_fast.checkpoint.tensor_file import TensorEntry, TensorFile
from gr00t_fast.inputs.data_config import DataConfig, load_data_config
from gr00t_fast.inputs.embodiment import Embodiment
from gr00t_fast.model import Gr00t
from gr00t_fast.model.config import ModelConfig
from gr00t_fast.networks import NETWORKS, network_of
from gr00t_fast.networks.spec import EmbodimentFiles, Layout, NetworkSpec, published_shapes, read_object, sources_of

log = logging.getLogger(__name__)
_READ_THREADS = 4  # enough to keep an NVMe disk or the page cache busy; more does not help on two cores
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
_LISTED = 12  # names shown per kind of fault before "and N more"
Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory whose small files were read and checked; no weights yet.

    network: which of the published networks it is of. files: what it says of embodiments. letterbox: what was asked, as of `load_policy`.
    weight_files: all that the weights depend on; of a LoRA adapter, whose `base` is another directory than `path`, its own two come last.
    """

    path: Path
    network: NetworkSpec
    config: ModelConfig
    files: EmbodimentFiles
    weight_files: tuple[Path, ...]
    base: Path
    adapter: Adapter | None = None
    letterbox: str = "auto"

    def tag_of(self, tag: str) -> str:
        """As the files have it: names of NVIDIA's EmbodimentTag are in capitals."""
        return tag if tag in self.files.tags or tag.lower() not in self.files.tags else tag.lower()

    def embodiment(self, tag: str, data_config: str | DataConfig | None = None) -> Embodiment:
        """data_config: as of `load_policy`. Raises ConfigError for an unknown tag or what does not fit, CheckpointError for damaged files."""
        return self.files.embodiment(self.tag_of(tag), None if data_config is None else load_data_config(data_config))

    def row_of(self, tag: str) -> int:
        """The row of the per-embodiment weights. Raises ConfigError and CheckpointError."""
        return self.files.row_of(self.tag_of(tag))


def open_checkpoint(model_path: str | Path, with_weights: bool = True, revision: str | None = None, letterbox: str = "auto") -> Checkpoint:
    """Read configuration and metadata of a local directory, or of a hub repository (downloaded). Raises CheckpointError.

    `with_weights=False`: only the small files are needed and downloaded; `weight_files` is empty. `revision`: commit, tag or branch of the hub
    repository; without one it is whatever the repository holds today. `letterbox`: of N1.6 and N1.7, as of `load_policy`. Raises ConfigError for a
    revision of a local directory, and for another word than these.
    """
    path = _local_directory(model_path, with_weights, revision)
    adapter = read_adapter(path, with_weights)
    base = path if adapter is None else _base_of(adapter, with_weights)
    raw = read_object(base / "config.json")
    network = network_of(base, raw)
    backbone_file = base / network.backbone_file
    backbone = read_object(backbone_file) if backbone_file.exists() else network.published_backbone
    # of what lerobot trained the adapter has a policy's settings of its own
    settings = read_object(path / "config.json") if adapter is not None and network.prefix else raw
    config = network.read_config(network.config_of(base, settings), backbone)
    weights = (*_weight_files(base), *(adapter.files if adapter else ())) if with_weights else ()
    return Checkpoint(path, network, config, network.read_files(path, raw, config, letterbox), weights, base, adapter, letterbox)


def read_policy_metadata(
    model_path: str | Path,
    embodiment_tag: str,
    data_config: str | DataConfig | None = None,
    revision: str | None = None,
    letterbox: str = "auto",
) -> PolicyMetadata:
    """Metadata of a checkpoint whose network runs elsewhere. Raises ConfigError and CheckpointError as loading it would; weights may be absent."""
    return open_checkpoint(model_path, with_weights=False, revision=revision, letterbox=letterbox).embodiment(embodiment_tag, data_config).metadata


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
        located = _check_names_and_shapes(model, checkpoint, files)
        deltas: dict[str, Any] = {}
        if checkpoint.adapter is not None:
            adapter_file = stack.enter_context(TensorFile(checkpoint.adapter.weights))
            located, deltas = merge(checkpoint.adapter, adapter_file, located, checkpoint.network)
        _fill(list(_plan(model, checkpoint.network, located, deltas, row, device, dtype, only)), progress)
    return model.eval().requires_grad_(False)


class _WithoutInitialisation(TorchFunctionMode):
    """Skips torch.nn.init: every weight comes from the file, and initialising meta tensors alone imports 0.7 s of torch."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]  # type: ignore[index]
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
    meant_here = path.parent.is_dir() and revision is None  # a directory `user` stands before the hub's
    if text.count("/") != 1 or text.startswith((".", "/", "~")) or meant_here:
        beside = [found.name for found in path.parent.glob("*") if found.is_dir()]
        expected = "Expected a checkpoint directory, or a hub id such as nvidia/GR00T-N1.5-3B."
        raise CheckpointError(f"model_path '{text}' does not exist.{closest(path.name, beside, f'{path.parent}/')} {expected}")
    return _download(text, with_weights, revision)


def _base_of(adapter: Adapter, with_weights: bool) -> Path:
    try:
        base = _local_directory(adapter.base, with_weights, None if Path(adapter.base).is_dir() else adapter.revision)
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
    networks = NETWORKS.values()  # which of them it is, its config.json will say
    folders = {folder for network in networks for folder in network.prompt.folders}
    tokenizers = (f"{folder}/{file}".removeprefix("/") for folder in folders for file in _TOKENIZER_FILES)
    patterns = sorted({"config.json", *weights, ADAPTER_CONFIG, *tokenizers, *(file for network in networks for file in network.download)})
    try:
        path = Path(huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # every hub error is one of these: no network, no such repository, gated
        what = "it" if revision is None else f"its revision '{revision}'"
        raise CheckpointError(
            f"there is no directory '{repo_id}' here, and fetching {what} from the hub failed: {str(error).rstrip('.')}. "
            "Check the spelling, or download it and give the path."
        ) from error
    if path.name != revision:  # the cache's directory is named for the commit
        log.warning("%s is commit %s today; it may be another one tomorrow. Keep it with --revision=%s", repo_id, path.name, path.name)
    return path


def _weight_files(path: Path) -> tuple[Path, ...]:
    index = path / "model.safetensors.index.json"
    if not index.exists():
        single = path / "model.safetensors"
        if not single.is_file():
            raise CheckpointError(f"{path} has neither model.safetensors nor model.safetensors.index.json.")
        return (single,)
    weight_map = read_object(index).get("weight_map", {})
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


def _check_names_and_shapes(model: Gr00t, checkpoint: Checkpoint, files: list[TensorFile]) -> TensorIndex:
    """Compare the files' headers with what the network needs, before a byte of weights is read."""
    network = checkpoint.network
    located: TensorIndex = {name.removeprefix(network.prefix): (file, entry) for file in files for name, entry in file.entries.items()}
    if network.tied and network.tied[1] not in located and network.tied[0] in located:
        located[network.tied[1]] = located.pop(network.tied[0])
    needed: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        needed.update(published_shapes(network.weights, name, tuple(parameter.shape), checkpoint.config))
    missing = sorted(needed.keys() - located.keys())
    extra = sorted(name for name in located.keys() - needed.keys() if not name.startswith(network.unused_weights))
    wrong = sorted(name for name, shape in needed.items() if name in located and located[name][1].shape != shape)
    counted = Counter(name.removeprefix(network.prefix) for file in files for name in file.entries)
    twice = sorted(name for name, count in counted.items() if count > 1)
    if missing or extra or wrong or twice:
        unusable = {
            name.removeprefix(network.prefix): f"{name} ({file.path.name} has it as {dtype})" for file in files for name, dtype in file.others.items()
        }
        missing = [unusable.get(name, name) for name in missing]
        mis_shaped = [f"{name}: expected {list(needed[name])}, got {list(located[name][1].shape)}" for name in wrong]
        parts = [_listing("missing", missing), _listing("unexpected", extra), _listing("mis-shaped", mis_shaped), _listing("there twice", twice)]
        raise CheckpointError(
            f"the weights in {checkpoint.base} do not fit config.json (and {network.backbone_file}):\n"
            + "\n".join(part for part in parts if part)
            + f"\nCheck that all files come from the same {network.title} checkpoint."
        )
    halves = {dtype: sorted(name for name in needed if located[name][1].dtype == dtype) for dtype in (torch.float16, torch.bfloat16)}
    if all(halves.values()):  # no training writes both; bytes of one that are read as the other are other numbers
        raise CheckpointError(
            f"the weights in {checkpoint.base} are float16 and bfloat16, expected one of them (fp32 may lie beside it):\n"
            f"{_listing('of the rarer one', min(halves.values(), key=len))}\nCopy or download the checkpoint again, or convert it to bfloat16."
        )
    return located


def _listing(kind: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f"\n    ... and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"  {len(names)} {kind}:\n    " + "\n    ".join(names[:_LISTED]) + more


@dataclass(frozen=True)
class _Read:
    """One piece of work: fill `target` (part of a parameter) with a published tensor, or with one row of it."""

    target: Tensor
    file: TensorFile
    entry: TensorEntry
    row: int | None = None
    delta: LoraDelta | None = None

    @property
    def size_bytes(self) -> int:
        return self.target.numel() * self.entry.dtype.itemsize

    def run(self) -> int:
        published = self.file.read(self.entry.name, self.row).reshape(self.target.shape)  # a convolution over patches becomes rows
        self.target.copy_(published if self.delta is None else self.delta.add_to(published))
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
    network: NetworkSpec,
    located: TensorIndex,
    deltas: dict[str, LoraDelta],
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
        sources = sources_of(network.weights, name)
        if sources.layout is Layout.CATEGORY:
            yield _Read(parameter.data[None], *located[sources.names[0]], row)
            continue
        start = 0
        for source in sources.names:
            file, entry = located[source]
            yield _Read(parameter.data[start : start + entry.shape[0]], file, entry, delta=deltas.get(source))
            start += entry.shape[0]
