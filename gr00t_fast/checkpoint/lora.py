"""A fine-tune that is kept as low-rank deltas to a base checkpoint: LoRA, in the files that the peft library writes.

    adapter_config.json          what it is, and of which checkpoint
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight (r, in) and .lora_B.weight (out, r); modules trained as a whole under
                                 their own names

The weights that result are W + scale * B @ A, where scale is lora_alpha / r, with use_rslora lora_alpha / sqrt(r) (peft's LoraLayer). Other
ways to adapt change more than that and are refused by name. `fan_in_fan_out` is not looked at: the modules of this network store (out, in),
and for those peft sets it to false.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from gr00t_fast.base.errors import CheckpointError
from gr00t_fast.checkpoint.tensor_file import TensorEntry, TensorFile
from gr00t_fast.networks.spec import NetworkSpec

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SIDES = {"A": ".lora_A.weight", "B": ".lora_B.weight"}
# Settings that say which modules were adapted (the tensors show it), how training went or what peft remembers of itself.
_WITHOUT_EFFECT = {
    *("task_type", "auto_mapping", "peft_version", "inference_mode", "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out"),
    *("modules_to_save", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
    *("base_model_name_or_path", "r", "lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern", "revision"),
}
# Those that are understood with these values only. Other ways to initialise (pissa, olora, loftq) change the base weights too.
_UNDERSTOOD = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal")}

TensorIndex = dict[str, tuple[TensorFile, TensorEntry]]


@dataclass(frozen=True)
class Adapter:
    """adapter_config.json, read and checked. `base`: directory or hub id of the checkpoint that it changes, `revision` of the latter."""

    directory: Path
    base: str
    alpha: float
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    revision: str | None = None

    @property
    def weights(self) -> Path:
        return self.directory / ADAPTER_WEIGHTS

    @property
    def files(self) -> tuple[Path, ...]:
        """What the weights depend on besides those of the base."""
        return self.directory / ADAPTER_CONFIG, self.weights

    def scale_of(self, module: str, rank: int) -> float:
        """`alpha_pattern` goes by the end of a module's name, the first that fits, as in peft."""
        alpha = next((alpha for end, alpha in self.alpha_pattern.items() if f".{module}".endswith(f".{end}")), self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True)
class LoraDelta:
    """What is added to one published matrix."""

    file: TensorFile
    a: TensorEntry
    b: TensorEntry
    scale: float

    def add_to(self, weight: Tensor) -> Tensor:
        """(out, in) on the CPU, as the base has it -> fp32 (out, in)."""
        a, b = (self.file.read(entry.name) for entry in (self.a, self.b))
        return weight.float() + (b.float() @ a.float()) * self.scale


def read_adapter(directory: Path, with_weights: bool = True) -> Adapter | None:
    """The adapter in `directory`, or None when there is no adapter_config.json. Raises CheckpointError for one that cannot be merged exactly."""
    file = directory / ADAPTER_CONFIG
    if not file.is_file():
        return None
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        base, alpha, pattern = raw["base_model_name_or_path"], float(raw["lora_alpha"]), dict(raw.get("alpha_pattern") or {})
        adapter = Adapter(directory, str(base or ""), alpha, {key: float(value) for key, value in pattern.items()}, bool(raw.get("use_rslora")))
        adapter = replace(adapter, revision=raw.get("revision") and str(raw["revision"]))
        if not all(map(math.isfinite, (alpha, *adapter.alpha_pattern.values()))):
            raise ValueError("a scale that is not finite")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as the configuration of a LoRA adapter ({error!r}). Copy or download it again.") from error
    _refuse_other_methods(raw, adapter)
    if not adapter.base.strip():
        raise CheckpointError(f"{file}: base_model_name_or_path is empty; write the base checkpoint's directory or hub id there.")
    present = [path.name for path in (*directory.glob("model*.safetensors*"), *directory.glob("adapter_model.bin"))]
    if with_weights and (present or not adapter.weights.is_file()):
        raise CheckpointError(
            f"{directory} is a LoRA adapter ({ADAPTER_CONFIG}); expected its weights in {ADAPTER_WEIGHTS} and no others, "
            f"found {', '.join(present) or 'none'}. {_merge_command(adapter)}"
        )
    return adapter


def _refuse_other_methods(raw: Mapping[str, Any], adapter: Adapter) -> None:
    understood = {name: values for name, values in _UNDERSTOOD.items() if name in raw}
    wrong = [f"{name}={raw[name]!r}" for name, values in understood.items() if raw[name] not in values]
    wrong += [f"{name}={value!r}" for name, value in raw.items() if value and name not in _WITHOUT_EFFECT and name not in understood]
    wrong += [f"alpha_pattern for {key!r}" for key in adapter.alpha_pattern if not re.fullmatch(r"[\w.]+", key)]  # peft takes regular expressions
    if wrong or "peft_type" not in raw:
        raise CheckpointError(
            f"{adapter.directory / ADAPTER_CONFIG}: {', '.join(wrong) or 'no peft_type'} is not what is merged here (LoRA of linear layers). "
            f"{_merge_command(adapter)}"
        )


def _merge_command(adapter: Adapter) -> str:
    if (adapter.directory / "policy_preprocessor.json").exists():
        return f"Merge it in lerobot, with PeftModel.from_pretrained(policy, '{adapter.directory}').merge_and_unload(), and save the policy."
    base = f"GR00T_N1_5.from_pretrained('{adapter.base}')"
    return (
        "Merge it with NVIDIA's package and peft, then copy experiment_cfg: "
        'python -c "from gr00t.model.gr00t_n1 import GR00T_N1_5; from peft import PeftModel; '
        f"PeftModel.from_pretrained({base}, '{adapter.directory}').merge_and_unload().save_pretrained('merged')\""
    )


def merge(adapter: Adapter, file: TensorFile, base: TensorIndex, network: NetworkSpec) -> tuple[TensorIndex, dict[str, LoraDelta]]:
    """Where each published tensor comes from, whole modules replaced, and what is added to the others, by published name.

    base: the base checkpoint's tensors. Raises CheckpointError that lists all tensors of the adapter which fit none of them.
    """
    unused = network.unused_weights
    located, deltas, faults = dict(base), {}, []
    modules: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in file.entries.items():
        published = name.removeprefix(_PREFIX).removeprefix(network.prefix)
        side = next((side for side, ending in _SIDES.items() if published.endswith(ending)), None)
        if side is not None:
            modules.setdefault(published.removesuffix(_SIDES[side]), {})[side] = entry
        elif published in base and entry.shape == base[published][1].shape:
            located[published] = (file, entry)
        elif not published.startswith(unused):
            faults.append(f"{name} {list(entry.shape)}")
    for module, sides in modules.items():
        weight = f"{module}.weight"
        if weight.startswith(unused):
            continue
        shapes = {side: entry.shape for side, entry in sides.items()}
        if weight not in base or not _fits(shapes, base[weight][1].shape):
            faults.append(f"{module} {', '.join(f'{side} {list(shape)}' for side, shape in shapes.items())}")
            continue
        deltas[weight] = LoraDelta(file, sides["A"], sides["B"], adapter.scale_of(network.prefix + module, shapes["A"][0]))
    if faults or not file.entries:
        raise CheckpointError(
            f"{adapter.weights} does not fit the checkpoint that it is for ({adapter.base}): {'; '.join(faults[:8]) or 'it holds no tensors'}"
            f"{f' and {len(faults) - 8} more' if len(faults) > 8 else ''}. Check base_model_name_or_path in {ADAPTER_CONFIG}."
        )
    return located, deltas


def _fits(sides: Mapping[str, tuple[int, ...]], weight: tuple[int, ...]) -> bool:
    a, b = sides.get("A", ()), sides.get("B", ())
    return len(a) == len(b) == len(weight) == 2 and a[0] == b[1] > 0 and (b[0], a[1]) == weight
