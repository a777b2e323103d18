"""A process beside the run that the control loop feeds: one each writes the data set, shows the run live and encodes the video.

Encoders, lerobot and rerun hold the interpreter's lock for milliseconds, and a disk or a viewer may hang. So the loop copies a tick into a slot of
shared memory, sends the slot's number through a pipe and goes on. A tick that finds no free slot is dropped and counted. The process has a lower
priority, is not reached by what is typed in the terminal, and outlives a run that is killed: it works off what it was given, and ends.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gr00t_fast.base.contracts import Observation

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

_MOST_SLOTS = 200  # their numbers fit into the pipe's buffer (208 KiB on Linux): a send never waits, also when the other process does not read
_LEAST_SLOTS, _MOST_BYTES = 8, 512 << 20
_HEAD_BYTES = 1 << 16  # of a slot, before the pictures: joints, the caller's note and the sizes of the pictures; 1 kB with a chunk of 16 actions
_NICENESS = 10  # the control loop comes first
_KEYBOARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Tell = Callable[..., None]  # of the other process: tell(what, value), to the run


class Sink:
    """The run's end. `consumer(tell, *arguments)` makes the other end in a new process: a context manager whose methods are called by `call`, and by
    `put` its `add(observation, note)`, which must not keep the pictures. It is left when the input has ended, or by an exception of its own.

    `on_answer(what, value)` is called in a thread of this process: with what the other end tells, and with "error" and a text when it fails or is
    gone before `close`; after that no more.
    """

    def __init__(self, consumer: Callable[..., Any], *arguments: Any, on_answer: Callable[[str, Any], None], slots: int = 60) -> None:
        """`slots`: ticks that may wait for the other process, until the first one is put; fewer where they take more than 512 MB. Starts nothing."""
        self._made_by, self._on_answer, self.slots = (consumer, *arguments), on_answer, slots
        self.dropped = 0  # ticks that found no free slot
        self._process: Any = None
        self._ring = _Ring()
        self._free: deque[int] = deque()
        self._given = self._done = 0
        self._heard_s = 0.0
        self._closing = self._failed = False

    @property
    def running(self) -> bool:
        return self._process is not None and not self._closing and self._listener.is_alive()

    @property
    def pending(self) -> bool:
        """Whether it has not done everything yet that it was given."""
        return self.running and self._done < self._given

    @property
    def backlog(self) -> int:
        """How many calls it has not answered yet."""
        return self._given - self._done

    @property
    def silent_s(self) -> float:
        """How long it has done nothing of what it was given; 0 when it has done everything."""
        return time.monotonic() - self._heard_s if self.pending else 0.0

    def start(self) -> None:
        """`wait` waits until the other end is made, or has failed."""
        import multiprocessing  # only where there is something to record or to show

        context = multiprocessing.get_context("spawn")
        self._ring.open()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._ring, *self._made_by))
        with _signals_blocked():
            self._process.start()
        theirs.close()
        self._given, self._heard_s = 1, time.monotonic()  # to be made is the first thing to do
        self._listener = threading.Thread(target=self._listen, name="sink", daemon=True)
        self._listener.start()

    def prepare(self, observation: Observation) -> None:
        """Make room for ticks like this one, best before the arm moves: 50 MB take 20 ms. The first `put` does it otherwise."""
        if self._ring.slot_bytes or not self.running:
            return
        slot_bytes = _bytes_of(observation)
        slots = min(self.slots, _MOST_SLOTS, max(_LEAST_SLOTS, _MOST_BYTES // slot_bytes))
        self._ring.resize(slots, slot_bytes)
        self.call("ring", slots, slot_bytes)
        self._free.extend(range(slots))

    def put(self, observation: Observation, note: Any = None) -> None:
        """Give it a tick, or drop it where there is no room; `note` can be pickled. Never waits."""
        if not self.running:
            return
        self.prepare(observation)
        if not self._free or _bytes_of(observation) > self._ring.slot_bytes:
            self.dropped += 1
            return
        if self._ring.write(self._free[0], observation, note):
            self.call("add", self._free.popleft())
        else:
            self.dropped += 1

    def call(self, method: str, *arguments: Any) -> None:
        """Have a method called in the other process, after everything that was given before. Small arguments: the pipe takes them at once."""
        if self._done == self._given:
            self._heard_s = time.monotonic()
        self._given += 1
        with contextlib.suppress(OSError):  # it is gone: `on_answer` says so
            self._pipe.send((method, arguments))

    def wait(self, limit_s: float) -> bool:
        """Until it has done everything, or is gone. Returns False when that takes longer."""
        end_s = time.monotonic() + limit_s
        while self.pending and time.monotonic() < end_s:
            time.sleep(0.005)
        return not self.pending

    def kill(self) -> None:
        """With what it has started: an encoder that hangs."""
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()

    def close(self, limit_s: float) -> bool:
        """End its input and let it finish. Returns False when it did nothing for so long and was killed: on a busy machine, where it comes last, it
        is slow already to start. Nothing may be given afterwards."""
        if self._process is None or self._closing:
            return True
        self._closing, ended_s = True, time.monotonic()  # first: what ends after this has not ended by itself
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        try:
            while self._process.exitcode is None and (left_s := max(self._heard_s, ended_s) + limit_s - time.monotonic()) > 0:
                self._process.join(left_s)
            return self._process.exitcode is not None
        finally:  # also when Ctrl-C ends the waiting: it is not left behind
            if self._process.exitcode is None:
                self.kill()
                self._process.join()
            self._listener.join(1.0)

    def _listen(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                what, value = self._pipe.recv()
                self._heard_s = time.monotonic()
                if what != "done":
                    self._answer(what, value)
                    continue
                if value is not None:
                    self._free.append(value)
                self._done += 1
        self._process.join()
        if not self._closing:
            self._answer("error", f"its process has ended (exit code {self._process.exitcode})")

    def _answer(self, what: str, value: Any) -> None:
        if self._failed:
            return
        self._failed = what == "error"
        with contextlib.suppress(OSError):  # what it says goes to a terminal that may be gone; the loop finds that out by itself
            self._on_answer(what, value)


def _bytes_of(observation: Observation) -> int:
    return _HEAD_BYTES + sum(frame.nbytes for frame in observation.frames.values())


class _Ring:
    """Slots of shared memory, each with room for one observation and a note: a file that the new process inherits, and whose size is known later than
    that process is started. It has no name: nothing is left behind by a program that is killed."""

    def __init__(self, inherited: Any = None) -> None:
        self._fd = -1 if inherited is None else inherited.detach()
        self.slot_bytes = 0

    def open(self) -> None:
        if hasattr(os, "memfd_create"):  # not in /dev/shm, of which a container has 64 MB
            self._fd = os.memfd_create("gr00t_fast")
        else:
            with tempfile.TemporaryFile() as file:
                self._fd = os.dup(file.fileno())

    def __reduce__(self) -> tuple[Any, ...]:
        from multiprocessing.reduction import DupFd

        return _Ring, (DupFd(self._fd),)

    def resize(self, slots: int, slot_bytes: int) -> None:
        """At both ends, once; the file is not needed afterwards."""
        os.ftruncate(self._fd, slots * slot_bytes)
        there = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)  # no page is to be looked for in the middle of a tick
        self._slots = np.frombuffer(mmap.mmap(self._fd, slots * slot_bytes, there), np.uint8).reshape(slots, slot_bytes)
        self.slot_bytes = slot_bytes
        os.close(self._fd)

    def write(self, slot: int, observation: Observation, note: Any) -> bool:
        """Returns False where the note is too large."""
        shapes = {name: frame.shape for name, frame in observation.frames.items()}
        head = pickle.dumps((replace(observation, frames={}), note, shapes))
        if len(head) > _HEAD_BYTES:
            return False
        self._slots[slot, : len(head)] = np.frombuffer(head, np.uint8)
        for name, picture in self._pictures(slot, shapes):
            np.copyto(picture, observation.frames[name])
        return True

    def read(self, slot: int) -> tuple[Observation, Any]:
        observation, note, shapes = pickle.loads(self._slots[slot, :_HEAD_BYTES].data)
        return replace(observation, frames=dict(self._pictures(slot, shapes))), note

    def _pictures(self, slot: int, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, np.ndarray]]:
        at = _HEAD_BYTES
        for name, shape in shapes.items():
            size = int(np.prod(shape))
            yield name, self._slots[slot, at : at + size].reshape(shape)
            at += size


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """A process that is started here is born with them blocked: Ctrl-C in the terminal is for the run, also before that process can ignore it."""
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # which would unblock them when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _KEYBOARD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# The other process


def _serve(pipe: Connection, ring: _Ring, consumer: Callable[..., Any], *arguments: Any) -> None:
    """Until the input ends, or the run is gone."""
    _detach()

    def tell(what: str, value: Any = None) -> None:
        with contextlib.suppress(OSError):  # the run was killed: what it has given is still worked off
            pipe.send((what, value))

    try:
        with consumer(tell, *arguments) as made:
            tell("done")
            while request := _received(pipe):
                method, values = request
                slot = values[0] if method == "add" else None
                if method == "ring":
                    ring.resize(*values)
                elif slot is not None:
                    made.add(*ring.read(slot))
                else:
                    getattr(made, method)(*values)
                tell("done", slot)
    except Exception as error:  # noqa: BLE001 - whatever it was: the run decides
        tell("error", f"{type(error).__name__}: {error}".splitlines()[0][:300])


def _received(pipe: Connection) -> tuple[str, tuple[Any, ...]] | None:
    try:
        return pipe.recv()
    except (EOFError, OSError):  # the run was killed
        return None


def _detach() -> None:
    """From the terminal, from what is printed there, and from processes that are started here: a viewer outlives this one."""
    os.setsid()
    for number in _KEYBOARD:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _KEYBOARD)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    for descriptor in range(3, 256):
        with contextlib.suppress(OSError):
            os.set_inheritable(descriptor, False)
    with contextlib.suppress(OSError):
        os.nice(_NICENESS)
