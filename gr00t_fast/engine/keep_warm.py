"""Keep a GPU's clocks up between inferences.

At 30 Hz a fast GPU idles most of the time, and lowers its clocks within milliseconds to seconds: the next inference then runs slower than a
benchmark without pauses says. A thread that launches a little work while the policy waits holds the clocks up, for electricity.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

import torch

_BURST_S = 0.002  # pause between bursts
_MATRIX = 2048  # a product of this size takes some 20 to 200 microseconds
_PRODUCTS = 4


class KeepWarm:
    """Calls `work` again and again in a thread of its own, except while paused. A context manager; what `work` raises, leaving it raises.

    `work` must return once it is done, and be short: `pause` waits for it.
    """

    def __init__(self, work: Callable[[], None], pause_s: float = _BURST_S) -> None:
        self._work, self._pause_s = work, pause_s
        self._turn = threading.Lock()
        self._wanted = threading.Event()  # a lock alone is not fair: the thread that just released it would get it again
        self._ending = threading.Event()
        self._failure: BaseException | None = None
        self.bursts = 0
        self._thread = threading.Thread(target=self._run, name="keep-warm", daemon=True)

    def __enter__(self) -> KeepWarm:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ending.set()
        self._thread.join()
        if self._failure is not None and error is None:
            raise self._failure

    def pause(self) -> None:
        """From here to `resume` nothing else is launched: the inference has the GPU to itself."""
        self._wanted.set()
        self._turn.acquire()

    def resume(self) -> None:
        self._turn.release()
        self._wanted.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside nothing else is launched."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def _run(self) -> None:
        try:
            while not self._ending.wait(self._pause_s):
                if self._wanted.is_set():
                    continue
                with self._turn:
                    self._work()
                    self.bursts += 1
        except BaseException as error:  # noqa: BLE001 - kept for the thread that waits, which raises it
            self._failure = error


def matrix_burst(device: torch.device) -> Callable[[], None]:
    """A few matrix products on a stream of lowest priority, waited for."""
    stream = torch.cuda.Stream(device, priority=0)
    a = torch.randn(_MATRIX, _MATRIX, device=device, dtype=torch.bfloat16)
    out, done = torch.empty_like(a), torch.cuda.Event(blocking=True)  # blocking: the thread sleeps instead of spinning

    @torch.inference_mode()
    def burst() -> None:
        with torch.cuda.stream(stream):
            for _ in range(_PRODUCTS):
                torch.matmul(a, a, out=out)
            done.record()
        done.synchronize()

    return burst
