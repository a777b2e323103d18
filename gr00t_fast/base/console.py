"""Output that never holds up the control loop: a terminal that is stopped (Ctrl-S), a pipe nobody reads, a stalled ssh connection.

    with Console() as console:      # sys.stdout and sys.stderr now only queue; a thread writes
        ...

Whatever prints or logs in Python goes through it. What does not fit into the queue is dropped and counted. Long work shows its progress on standard
error: bars on a terminal, elsewhere a line per part and one every ten seconds of it.
"""

from __future__ import annotations

import errno
import io
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, TextIO

QUEUED_WRITES = 2000  # a report has 60 lines, a run says a line every few seconds
LAST_WORDS_S = 1.0  # how long the end of the program waits for a terminal that takes nothing
CLOSED_TERMINAL = (errno.EIO, errno.ENXIO)  # of a terminal whose window or connection is gone
TELL_EVERY_S = 10.0  # of long work where standard error is no terminal
_THREAD_NAME = "gr00t_fast-console"


class Console:
    """Replaces the two streams while used as a context manager. The thread is a daemon and may outlive the `with` block, stuck."""

    def __init__(self) -> None:
        # SimpleQueue: its `put` is safe in finalisers and leaves no lock behind when a signal handler raises out of it.
        self._queue: SimpleQueue[tuple[TextIO, str] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._write_all, name=_THREAD_NAME, daemon=True)
        self._dropped = 0
        self._raised = self._closed = False
        self.failure: OSError | None = None  # of standard output: a closed pipe or terminal, a full disk. From then on what is written goes nowhere

    def __enter__(self) -> Console:
        self._streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (stream and _Queued(stream, self) for stream in self._streams)  # None where the descriptor is closed
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        sys.stdout, sys.stderr = self._streams
        self._closed = True
        self._queue.put(None)
        self._thread.join(LAST_WORDS_S)
        if self.failure is not None and not self._raised and kind is None:
            self._raised = True
            raise self.failure

    def put(self, stream: TextIO, text: str) -> None:
        """Queue a text. Raises `failure`, once. After the end of the `with` block it is written directly."""
        if self.failure is not None:
            if not self._raised and stream is self._streams[0]:
                self._raised = True
                raise self.failure
        elif self._closed:
            _write(stream, text)
        elif self._queue.qsize() >= QUEUED_WRITES:
            self._dropped += 1
        else:
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                self._queue.put((stream, f"[{dropped} pieces of output were dropped: the terminal took none]\n"))
            self._queue.put((stream, text))

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            stream, text = item
            try:
                _write(stream, text)
            except Exception as error:  # noqa: BLE001 - also of a stream that somebody closed or replaced by something odd; the other one must go on
                if stream is self._streams[0] and self.failure is None:
                    self.failure = error if isinstance(error, OSError) else OSError(errno.EBADF, f"the output stream failed: {error}")


def stuck() -> bool:
    """Whether some output still waits for a terminal that takes none: the interpreter cannot end in good order then."""
    end_s = time.monotonic() + 0.05  # a thread that has just written its last needs a moment
    while (stuck := any(thread.name == _THREAD_NAME and thread.is_alive() for thread in threading.enumerate())) and time.monotonic() < end_s:
        time.sleep(0.005)
    return stuck


def _write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
    except UnicodeEncodeError:  # a terminal of another alphabet: \\xe0 is better than the end of the run
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()


class _Queued(io.TextIOBase):
    """What `sys.stdout` is meanwhile; whatever it does not have is the stream's own."""

    def __init__(self, stream: TextIO, console: Console) -> None:
        self._stream, self._console = stream, console

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return getattr(self._stream, "errors", None)

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        if text:
            self._console.put(self._stream, text)
        return len(text)

    def flush(self) -> None:
        """The thread flushes after each write."""


# --- progress of long work -----------------------------------------------------------------------------------------------------------------


@contextmanager
def byte_bar(name: str) -> Iterator[Callable[[int, int], None] | None]:
    """Yields what to call with the bytes done and in all; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, desc=name, leave=False) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


@contextmanager
def progress_bar(name: str, total: int) -> Iterator[Callable[[], None]]:
    """Yields what to call after each of `total` pieces."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=name, leave=False) as bar:
            yield lambda: bar.update() and None
        return
    start_s = said_s = time.perf_counter()
    done = 0

    def tick() -> None:
        nonlocal done, said_s
        done += 1
        if done < total and time.perf_counter() - said_s > TELL_EVERY_S:
            said_s = time.perf_counter()
            print(f"{name}: {done} of {total} after {said_s - start_s:.0f} s", file=sys.stderr, flush=True)

    yield tick
    print(f"{name}: {total} in {time.perf_counter() - start_s:.1f} s", file=sys.stderr, flush=True)
