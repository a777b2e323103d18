"""How much faster than lerobot's own code is a checkpoint that lerobot trained, from raw frames and joints to joint targets?

    python benchmarks/bench_lerobot.py --processor_path=DIR --size=full --threads=2

Runs in an environment with lerobot and its `groot` extra: 0.4.4 (Python 3.11) makes a policy of N1.5, 0.6.1 (3.12) one of N1.7, with random weights.
Both sides get the same frames, joints and noise and take turns; their actions are compared first. --processor_path: tokenizer files of the network,
of N1.5 Eagle's whole `eagle2_hg_model`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

from benchmarks.lib import program
from gr00t_fast.base.errors import ConfigError, check_ranges, require
from gr00t_fast.base.measurement import paired_ratio, percentiles

CAMERAS, JOINTS, TASK, WIDTH, HEIGHT = ("front", "wrist"), 6, "Place the block in the bowl", 640, 480


@dataclass
class BenchLerobotFlags(program.Flags):
    processor_path: Path = Path("processor")  # directory of the tokenizer's files
    size: Literal["tiny", "demo", "full"] = "full"  # of the network; full: as published
    precision: Literal["fp32", "bf16"] = "bf16"  # of both; lerobot's bf16 is autocast over weights in bf16
    rounds: int = 10  # timed calls of each side
    out: Path = Path("outputs/bench_lerobot")  # where the policy and the result go

    def __post_init__(self) -> None:
        check_ranges(self, rounds=(1, math.inf))


def main(argv: Sequence[str] | None = None) -> int:
    return program.finish("bench_lerobot", program.read_flags(BenchLerobotFlags, argv, __doc__), measure, as_table)


def make_policy(config: BenchLerobotFlags, n1d7: bool) -> tuple[Path, Any, Any, Any]:
    """A directory as lerobot saves it; and lerobot's policy, pre- and postprocessor."""
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.groot.configuration_groot import GrootConfig
    from lerobot.policies.groot.modeling_groot import GrootPolicy
    from lerobot.policies.groot.processor_groot import make_groot_pre_post_processors
    from safetensors.torch import load_file, save_file

    from gr00t_fast.engine import PRECISIONS

    base, directory = config.out / f"base-{config.size}", config.out / f"policy-{config.size}"
    if (base / "backbone_config.json").exists():  # other sizes than those that lerobot holds
        told = json.loads((base / "config.json").read_text())
        (base / "backbone").mkdir(exist_ok=True)
        (base / "backbone" / "config.json").write_text((base / "backbone_config.json").read_text())
        (base / "config.json").write_text(json.dumps({**told, "model_name": str(base / "backbone")}))
    inputs = {f"observation.images.{camera}": PolicyFeature(FeatureType.VISUAL, (3, HEIGHT, WIDTH)) for camera in CAMERAS}
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (JOINTS,))
    features = {"input_features": inputs, "output_features": {"action": PolicyFeature(FeatureType.ACTION, (JOINTS,))}}
    own = {"model_params_fp32": config.precision == "fp32"} if n1d7 else {}
    settings = GrootConfig(**features, device="cpu", base_model_path=str(base), use_bf16=config.precision == "bf16", **own)
    statistics = {key: {"min": np.full(JOINTS, -90.0), "max": np.full(JOINTS, 90.0)} for key in ("observation.state", "action")}
    policy = GrootPolicy(settings).eval()
    if config.precision == "fp32" and not n1d7:
        policy._groot_model.compute_dtype = "float32"  # else the base's
    processors = make_groot_pre_post_processors(settings, dataset_stats=statistics)
    directory.mkdir(exist_ok=True)
    settings.save_pretrained(directory)
    for processor in processors:
        processor.save_pretrained(directory)
    eagle = "eagle2_hg_model/config.json"
    for name, target in {"config.json": "base_config.json", "backbone_config.json": "backbone_config.json", eagle: eagle}.items():
        if (base / name).exists():
            (directory / target).parent.mkdir(exist_ok=True)
            shutil.copy(base / name, directory / target)
    if not (directory / "model.safetensors").exists():
        weights = {f"_groot_model.{name}": tensor for file in sorted(base.glob("model*.safetensors")) for name, tensor in load_file(file).items()}
        save_file(weights, directory / "model.safetensors")
    return directory, policy.to(PRECISIONS[config.precision]), *processors


def prepare_lerobot(config: BenchLerobotFlags, n1d7: bool) -> None:
    """What lerobot would download, from --processor_path: it looks below the working directory, or in its cache."""
    processor = config.processor_path.resolve()
    if n1d7:
        place = config.out / "nvidia" / "Cosmos-Reason2-2B"
        shutil.copytree(processor, place, dirs_exist_ok=True)
        template = json.loads((place / "chat_template.json").read_text())["chat_template"]
        tokenizer = json.loads((place / "tokenizer_config.json").read_text())
        (place / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "chat_template": template}))
        return
    from lerobot.policies.groot import groot_n1

    base = config.out / f"base-{config.size}" / "eagle2_hg_model" / "config.json"
    cache = Path(os.environ["HF_LEROBOT_HOME"]) / "lerobot" / "eagle2hg-processor-groot-n1p5"
    ready = groot_n1.ensure_eagle_cache_ready

    def without_flash_attention(*args: Any) -> None:
        ready(*args)
        modelling = cache / "modeling_eagle2_5_vl.py"
        modelling.write_text(modelling.read_text().replace('"flash_attention_2"', '"sdpa"'))

    cache.mkdir(parents=True, exist_ok=True)
    for file in processor.iterdir():
        (cache / file.name).write_text(file.read_text().replace("Eagle2_5_VL", "Eagle25VL"))  # as lerobot calls them
    sizes, told = json.loads((cache / "config.json").read_text()), json.loads(base.read_text())
    for part in ("vision_config", "text_config"):
        sizes[part] |= {**told[part], "torch_dtype": "float32"}
    (cache / "config.json").write_text(json.dumps({**sizes, "_attn_implementation": "sdpa"}))
    groot_n1.ensure_eagle_cache_ready = without_flash_attention


def measure(config: BenchLerobotFlags) -> program.Result:
    """Raises MissingExtraError without lerobot's GR00T."""
    config.out = config.out.resolve()
    os.environ.setdefault("HF_LEROBOT_HOME", str(config.out / "lerobot"))
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(config.out / "hf")}
    lerobot = require("lerobot", "robot")
    require("transformers", "bench")
    import torch

    from gr00t_fast import load_policy
    from gr00t_fast.networks.n1d7 import PROCESSOR_FILES
    from gr00t_fast.virtual.random_checkpoint import write_random_checkpoint

    torch.set_num_threads(config.threads or torch.get_num_threads())
    n1d7 = not lerobot.__version__.startswith(("0.4", "0.5"))
    if not config.processor_path.is_dir():
        raise ConfigError(f"--processor_path={config.processor_path} is no directory.")
    config.processor_path = config.processor_path.resolve()
    os.chdir(config.out)
    base = config.out / f"base-{config.size}"
    if not base.exists():
        write_random_checkpoint(base, config.size, network="n1.7" if n1d7 else "n1.5", published_tokenizer=True, seed=config.seed)
        for file in PROCESSOR_FILES:  # lerobot's recipe begins with the base's weights alone
            (base / file).unlink(missing_ok=True)
    prepare_lerobot(config, n1d7)
    directory, theirs, before, after = make_policy(config, n1d7)
    ours = load_policy(directory, device="cpu", precision=config.precision, engine="eager", processor_path=config.processor_path)
    random = np.random.default_rng(config.seed)
    frames = {f"observation.images.{camera}": random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8) for camera in CAMERAS}
    observation = {**frames, "observation.state": random.uniform(-60, 60, JOINTS).astype(np.float32)}
    noise = torch.from_numpy(random.standard_normal((1, *ours.chunk_shape)).astype(np.float32))

    def lerobots() -> np.ndarray:
        try:
            from lerobot.policies.utils import prepare_observation_for_inference
        except ImportError:
            from lerobot.utils.control_utils import prepare_observation_for_inference
        with torch.inference_mode():
            chunk = theirs.predict_action_chunk(before(prepare_observation_for_inference(dict(observation), torch.device("cpu"), TASK)))
            rows = after(chunk) if n1d7 else torch.stack([after(chunk[:, row]) for row in range(chunk.shape[1])], 1)
        return rows[0].float().numpy()

    def gr00t_fasts() -> np.ndarray:
        return ours.get_action({**observation, "task": TASK}, noise=noise)["action"]

    drawn, size = torch.randn, tuple(noise.shape)

    def randn(*args: Any, **kwargs: Any) -> torch.Tensor:
        asked = tuple(kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args))
        return noise.to(kwargs.get("dtype") or torch.float32) if asked == size else drawn(*args, **kwargs)

    torch.randn = randn
    calls: dict[str, Callable[[], np.ndarray]] = {"lerobot": lerobots, "gr00t_fast": gr00t_fasts}
    actions = {name: call() for name, call in calls.items()}
    times_ms = program.times_in_turns(calls, config.rounds, warm_up=1, seed=config.seed)
    difference = np.abs(actions["gr00t_fast"] - actions["lerobot"])
    return {
        **{"network": "n1.7" if n1d7 else "n1.5", "lerobot": lerobot.__version__, "threads": torch.get_num_threads()},
        **{name: getattr(config, name) for name in ("size", "precision", "rounds")},
        "times_ms": {name: percentiles(times) for name, times in times_ms.items()},
        "speed_up": paired_ratio(times_ms["lerobot"], times_ms["gr00t_fast"]),
        "difference_joint_units": {"largest": float(difference.max()), "median": float(np.median(difference))},
        **program.provenance(config.seed),
    }


def as_table(result: program.Result) -> str:
    rows = [(name, *(f"{result['times_ms'][name][p]:.0f}" for p in ("p50", "p95", "p99"))) for name in ("lerobot", "gr00t_fast")]
    ratio, apart = result["speed_up"], result["difference_joint_units"]
    return "\n\n".join(
        (
            f"{result['network']}, {result['size']}, {result['precision']}, lerobot {result['lerobot']}, {result['threads']} threads, CPU",
            program.markdown_table(("raw frames to actions, ms", "p50", "p95", "p99"), rows),
            f"Paired by round, gr00t_fast is {ratio['median']:.2f} times as fast (quartiles {ratio['p25']:.2f} to {ratio['p75']:.2f})."
            f" Actions differ by at most {apart['largest']:.2g} degrees, half of them by less than {apart['median']:.2g}.",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
