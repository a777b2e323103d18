"""Checkpoints whose small files and headers were damaged or written with intent: each loads and runs, or is refused with an explanation, soon.

GR00T_FAST_HOSTILE_CHECKPOINTS=1000 for the long run.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import shutil
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_networks import observation, write_network
from serving_fakes import Mutator

from gr00t_fast import load_policy
from gr00t_fast.base.errors import Gr00tFastError
from gr00t_fast.virtual.random_checkpoint import write_random_checkpoint

COUNT = int(os.environ.get("GR00T_FAST_HOSTILE_CHECKPOINTS") or 60)
HANG_S = 30.0  # on a busy machine; the slowest takes two seconds on a quiet one
MAX_MESSAGE_CHARACTERS = 10_000
LENGTH_BYTES = 8
PROCESSOR_FILES = ("processor_config.json", "statistics.json", "embodiment_id.json")
FILES = {
    "n1.5": ("config.json", "eagle2_hg_model/config.json", "experiment_cfg/metadata.json", "eagle2_hg_model/tokenizer.json", "model.safetensors"),
    **dict.fromkeys(("n1.6", "n1.7"), ("config.json", "backbone_config.json", *PROCESSOR_FILES, "tokenizer.json", "model.safetensors")),
    **{
        case: (
            *("config.json", "base_config.json", "policy_preprocessor.json", "policy_preprocessor.json", "policy_postprocessor.json"),
            *(backbone, "train_config.json", statistics, "model.safetensors"),
        )
        for case, backbone, statistics in (
            ("n1d5", "eagle2_hg_model/config.json", "policy_preprocessor_step_2_groot_pack_inputs_v3.safetensors"),
            ("n1d7_relative", "backbone_config.json", "policy_preprocessor_step_2_groot_n1_7_pack_inputs_v1.safetensors"),
        )
    },
}
LEROBOT = {"n1d5": "eagle2_hg_model", "n1d7_relative": "qwen3_vl_processor"}  # what lerobot trained, and whose tokenizer it has
VALUES: tuple[Any, ...] = (
    *(0, -1, 1, 2, 7, 10**5, 2**31, 2**63, 10**400, 0.5, 1e308, -0.0, True, False, None, "", "x", "1", "../../etc/passwd", "\0", "\ud800"),
    *([], [[]], {}, {"": {}}, [1, 2], [1e300] * 5, ["a"] * 1000, [0] * 100_000, "y" * 1_000_000, {str(index): index for index in range(5000)}),
)


class Hang(BaseException):
    """No `except Exception` may swallow it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Forger:
    """Damages one file, in its bytes or in what its JSON says."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def forge(self, file: Path) -> None:
        data = file.read_bytes()
        if file.suffix != ".safetensors":
            file.write_bytes(self._text(data))
            return
        length = int.from_bytes(data[:LENGTH_BYTES], "little")
        header, rest = data[LENGTH_BYTES : LENGTH_BYTES + length], data[LENGTH_BYTES + length :]
        if self.random.random() < 0.2:
            file.write_bytes(self._bytes(data[: LENGTH_BYTES + length]) + rest)
            return
        header = self._text(header)
        told = len(header) if self.random.random() < 0.8 else self.random.choice((0, 1, len(header) - 1, 2**63, 2**64 - 1, 10**8))
        file.write_bytes(told.to_bytes(LENGTH_BYTES, "little") + header + rest)

    def _text(self, data: bytes) -> bytes:
        if self.random.random() < 0.3:
            return self._bytes(data)
        content = json.loads(data)
        for _ in range(self.random.choice((1, 1, 2, 5))):
            content = self._change(content)
        text = json.dumps(content)
        for word in ("NaN", "Infinity", "1e400", "[" * 100_000, "9" * 10_000):
            if self.random.random() < 0.02:
                numbers = [place for place, character in enumerate(text) if character.isdigit()]
                place = self.random.choice(numbers or [0])
                text = text[:place] + word + text[place + 1 :]
        return text.encode("utf-8", "surrogatepass")

    def _bytes(self, data: bytes) -> bytes:
        return Mutator([data], self.random.randrange(2**32)).next()

    def _change(self, content: Any) -> Any:
        """Somewhere in it."""
        places = list(self._places(content))
        if not places:
            return self.random.choice(VALUES)
        owner, key = self.random.choice(places)
        way = self.random.randrange(6)
        if way <= 2:
            owner[key] = copy.deepcopy(self.random.choice(VALUES))
        elif way == 3:
            del owner[key]
        elif way == 4:
            other, name = self.random.choice(places)
            owner[key] = copy.deepcopy(other[name])
        elif isinstance(owner, dict):
            owner[self.random.choice(("new_embodiment", "__metadata__", "x" * 100_000, "num_layers", "", f"{key} "))] = owner.pop(key)
        else:
            owner.append(owner[key])
        return content

    def _places(self, content: Any) -> Iterator[tuple[Any, Any]]:
        items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
        for key, value in list(items)[:300]:
            yield content, key
            yield from self._places(value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numbers near the limits overflow: that is answered, not hidden
@pytest.mark.parametrize("network", FILES)
def test_hostile_checkpoints_are_refused_or_work(network: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    pristine, processor, seen = tmp_path / "pristine", None, observation()
    if network == "n1.5":
        write_network(pristine)
    elif network in ("n1.6", "n1.7"):
        write_random_checkpoint(pristine, "tiny", network=network)
    else:
        shared = request.getfixturevalue("shared_dir")
        shutil.copytree(shared / "golden_lerobot" / network / "checkpoint", pristine)
        processor, arrays = shared / LEROBOT[network], np.load(shared / "golden_lerobot" / network / "observation.npz")
        seen = {**{key: value for key, value in arrays.items() if key.startswith("observation.")}, "task": "pick"}
    outcomes: dict[str, int] = {}
    slowest_s = 0.0
    for number in range(COUNT):
        forger = Forger(number)
        checkpoint = Path(shutil.copytree(pristine, tmp_path / str(number)))
        for file in dict.fromkeys(forger.random.sample(FILES[network], forger.random.choice((1, 1, 1, 2)))):  # what is named twice, once
            forger.forge(checkpoint / file)
        began_s = time.monotonic()
        try:
            with time_limit(HANG_S), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                policy = load_policy(checkpoint, device="cpu", denoising_steps=1, processor_path=processor)
                policy.warm_up()
                policy.get_action(seen)
                outcome = "works"
        except Gr00tFastError as error:
            outcome = type(error).__name__
            if (length := len(str(error))) > MAX_MESSAGE_CHARACTERS:
                pytest.fail(f"checkpoint {number}: a message of {length} characters", pytrace=False)
        except BaseException as error:
            raise AssertionError(f"checkpoint {number} ended in {type(error).__name__}") from error
        slowest_s = max(slowest_s, time.monotonic() - began_s)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        shutil.rmtree(checkpoint)
    print(f"{COUNT} hostile checkpoints: {outcomes}, slowest {slowest_s:.1f} s")
    assert outcomes.keys() - {"works"}, "nothing was refused: the forger does not forge"
