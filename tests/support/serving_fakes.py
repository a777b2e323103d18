"""A policy without a network for the server tests, servers around it in this and in other processes, and messages with mistakes in them.

python tests/support/serving_fakes.py zmq|http PORT [TOKEN [FPS]]     serves the fake policy; prints its port when it listens
"""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from control_fakes import policy_metadata

from gr00t_fast.base.contracts import ActionPrefix, ModalityConfig, Policy
from gr00t_fast.inputs.data_config import load_data_config
from gr00t_fast.inputs.observation import parse_observation

HORIZON = 16
WIDTHS = {"state.single_arm": 5, "state.gripper": 1}
ROOT = Path(__file__).resolve().parents[2]


class ArithmeticPolicy(Policy):
    """Checks an observation as the real policy does, and answers joints + step + brightness of each picture: wrong routing shows.

    The instruction `hold` makes it wait for `released`, `wait 0.5` take that many seconds, and `bug` fail as only a bug can.
    """

    def __init__(self, data_config: str = "so100", fps: float = 30.0) -> None:
        self.config = load_data_config(data_config)
        self.metadata = policy_metadata({key.removeprefix("video."): (40, 32) for key in self.config.video_keys}, fps=fps)
        self.calls, self.resets, self.threads = 0, 0, set()
        self.busy, self.released = threading.Lock(), threading.Event()

    def get_action(self, observation: dict[str, Any], noise: Any = None, prefix: ActionPrefix | None = None) -> dict[str, np.ndarray]:
        assert self.busy.acquire(blocking=False), "two threads in one policy"
        try:
            self.calls += 1
            self.threads.add(threading.get_ident())
            parsed = parse_observation(observation, self.config, WIDTHS)
            word, _, value = parsed.instructions[0].partition(" ")
            if word == "wait":
                time.sleep(float(value))
            if word == "hold":
                assert self.released.wait(60), "nobody released it"
            if word == "bug":
                raise ZeroDivisionError("a bug")
            actions = self._actions(parsed, noise)
            for key, rows in ({} if prefix is None else prefix.actions).items():
                actions[key][..., : prefix.inference_delay, :] = rows[..., : prefix.inference_delay, :]
            return actions
        finally:
            self.busy.release()

    def _actions(self, parsed: Any, noise: Any) -> dict[str, np.ndarray]:
        brightness = sum(10.0**place * frames.reshape(parsed.batch, -1).mean(1) for place, frames in enumerate(parsed.frames.values()))
        offset = brightness + (0 if noise is None else float(np.sum(noise)))
        steps = np.arange(HORIZON)[None, :, None] + offset[:, None, None]
        actions = {key.replace("state", "action"): (value + steps).astype(np.float32) for key, value in parsed.state.items()}
        return actions if parsed.batched else {key: value[0] for key, value in actions.items()}

    def get_modality_config(self) -> dict[str, ModalityConfig]:
        return self.config.modality_config()

    def reset(self) -> None:
        self.resets += 1


def observation(batch: int | None = None, cameras: tuple[str, ...] = ("webcam",), size: tuple[int, int] = (32, 40), **changes: Any) -> dict[str, Any]:
    """Pictures and joints that differ in every item."""
    generator, items = np.random.default_rng(0), batch or 1
    result: dict[str, Any] = {f"video.{name}": generator.integers(0, 256, (items, 1, *size, 3), dtype=np.uint8) for name in cameras}
    result |= {key: generator.normal(size=(items, 1, width)) for key, width in WIDTHS.items()}
    if batch is None:
        result = {key: value[0] for key, value in result.items()}
    return result | {"annotation.human.task_description": ["pick up the cube"] * items} | changes


def instructed(words: str) -> dict[str, Any]:
    """An observation with this instruction."""
    return observation(**{"annotation.human.task_description": [words]})


def assert_same(actions: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actions.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(actions[key], value)
        assert (actions[key].dtype, actions[key].shape) == (value.dtype, value.shape)


@contextmanager
def running(server: Any) -> Iterator[Any]:
    """`server.run` in a thread."""
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(20)
        assert not thread.is_alive(), "the server did not end"


class ServerProcess:
    """The fake policy's server in a process of its own, which may be killed."""

    def __init__(self, kind: str = "zmq", port: int = 0, token: str = "", fps: float = 30.0) -> None:
        command = [sys.executable, __file__, kind, str(port), token, str(fps)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)
        self.process.stdout.close()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


WORDS = b"endpoint data api_token __ndarray_class__ as_npy as_json get_action ping NUMPY 'descr' |u1 <f8".split()
TYPES = (0xC4, 0xC5, 0xC6, 0xC7, 0xC9, 0xD9, 0xDB, 0xDC, 0xDD, 0xDE, 0xDF, 0xC1)  # of msgpack
BOMBS = (b"\x91", b"\x81\xa1a", b"\xdd\x00\x0f\xff\xff", b"\xdc\x07\xff", b"\x80")


class Mutator:
    """Valid messages with mistakes: damaged, cut, spliced, with lengths that lie, with bombs, or pure noise."""

    def __init__(self, seeds: list[bytes], seed: int = 0) -> None:
        self.seeds, self.random = seeds, random.Random(seed)

    def next(self) -> bytes:
        data = self.random.choice(self.seeds)
        for _ in range(self.random.choice((1, 1, 1, 2, 5))):
            data = self._changed(data)
        return data

    def _changed(self, data: bytes) -> bytes:
        choose, bytes_ = self.random.choice, self.random.randbytes
        other = choose(self.seeds)
        begin, end = sorted(self.random.randrange(len(data) + 1) for _ in range(2))
        length = choose((b"\xff" * 4, b"\x00" * 4, b"\x7f\xff\xff\xff", bytes_(4)))
        ways = (
            lambda: data[:begin],
            lambda: data[begin:],
            lambda: data[:begin] + bytes_(1) + data[begin + 1 :],
            lambda: data[:begin] + other[self.random.randrange(len(other)) :],
            lambda: data[:begin] + bytes_(choose((1, 2, 8, 64))) + data[begin:],
            lambda: data[:begin] + bytes([choose(TYPES)]) + length + data[begin + 5 :],
            lambda: data[:end] + data[begin:end] * choose((1, 2, 8)) + data[end:],
            lambda: bytes_(choose((0, 1, 7, 100, 1000))),
            lambda: choose(BOMBS) * choose((10, 600, 2000)) + data,
            lambda: data.replace(choose(WORDS), choose((*WORDS, b"|O8", b"kill", b""))),
        )
        return choose(ways)()


def main(kind: str, port: str, token: str = "", fps: str = "30") -> None:
    if kind == "http":
        from gr00t_fast.serving.http import HttpPolicyServer as Server
    else:
        from gr00t_fast.serving.server import PolicyServer as Server
    server = Server(ArithmeticPolicy(fps=float(fps)), port=int(port), api_token=token or None)
    print(server.port, flush=True)
    server.run()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(*sys.argv[1:])
