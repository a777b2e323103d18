"""Output that never holds up the control loop: a terminal that is stopped (Ctrl-S), a pipe nobody reads, a stalled ssh connection.

    with Console() as console:      # sys.stdout and sys.stderr now only queue; a thread writes
        ...

Whatever prints or logs in Python goes through it. What does not fit into the queue is dropped and counted.
"""

from __future__ import annotations

import contextlib
import errno
import io
import queue
import sys
import threading
import time
from types import TracebackType
from typing import BinaryIO, TextIO

QUEUED_WRITES = 2000  # a report has 60 lines, a run says a line every few seconds
LAST_WORDS_S = 1.0  # how long the end of the program waits for a terminal that takes nothing
CLOSED_TERMINAL = (errno.EIO, errno.ENXIO)  # of a terminal whose window or connection is gone
_THREAD_NAME = "gr00t_fast-console"


class Console:
    """Replaces the two streams while used as a context manager; one at a time. The thread is a daemon and may outlive the `with` block, stuck."""

    def __init__(self) -> None:
        self._queue: queue.Queue[tuple[TextIO, str] | None] = queue.Queue(QUEUED_WRITES)
        self._thread = threading.Thread(target=self._write_all, name=_THREAD_NAME, daemon=True)
        self._dropped = 0
        self._raised = False
        self.failure: OSError | None = None  # of standard output: a closed pipe or terminal, a full disk. From then on what is written goes nowhere

    def __enter__(self) -> Console:
        self._streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (_Queued(stream, self) for stream in self._streams)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        sys.stdout, sys.stderr = self._streams
        end_s = time.monotonic() + LAST_WORDS_S
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=LAST_WORDS_S)
        self._thread.join(max(0.0, end_s - time.monotonic()))
        if self.failure is not None and not self._raised and error is None:
            self._raised = True
            raise self.failure

    def put(self, stream: TextIO, text: str) -> None:
        """Queue a text. Raises `failure`, once."""
        if self.failure is not None:
            if not self._raised and stream is self._streams[0]:
                self._raised = True
                raise self.failure
            return
        try:
            if self._dropped and not self._queue.full():
                dropped, self._dropped = self._dropped, 0
                self._queue.put_nowait((stream, f"[{dropped} pieces of output were dropped: the terminal took none]\n"))
            self._queue.put_nowait((stream, text))
        except queue.Full:
            self._dropped += 1

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            stream, text = item
            try:
                stream.write(text)
                stream.flush()
            except OSError as error:
                if stream is self._streams[0]:
                    self.failure = self.failure or error
            except ValueError:  # somebody closed the stream object
                self.failure = self.failure or OSError(errno.EBADF, "the output stream was closed")


def stuck() -> bool:
    """Whether some output still waits for a terminal that takes none: the interpreter cannot end in good order then."""
    return any(thread.name == _THREAD_NAME and thread.is_alive() for thread in threading.enumerate())


class _Queued(io.TextIOBase):
    """What `sys.stdout` is meanwhile."""

    def __init__(self, stream: TextIO, console: Console) -> None:
        self._stream, self._console = stream, console

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return getattr(self._stream, "errors", None)

    @property
    def buffer(self) -> BinaryIO:
        return self._stream.buffer

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
