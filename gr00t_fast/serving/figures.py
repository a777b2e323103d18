"""What an operator sees of a service: counts and times for Prometheus, a status, and a line in the log every few seconds."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Any

from gr00t_fast.errors import Gr00tFastError, ServerError, require
from gr00t_fast.measurement import percentiles

log = logging.getLogger(__name__)
MAX_REASON_CHARACTERS = 1000  # of an error text; a longer one quotes the request
PROGRESS_EVERY_S = 10.0
_MAX_CLIENTS, _OTHERS = 64, "others"  # told apart: whoever connects anew for each request must not fill the memory
_KEPT = 1000  # times of the last requests, for percentiles
_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def reason_of(error: BaseException) -> str:
    """An error as text that does not grow with the request; a bug's with its type in front."""
    text = str(error) if isinstance(error, Gr00tFastError) else f"{type(error).__name__}: {error}"
    return text if len(text) <= MAX_REASON_CHARACTERS else f"{text[:MAX_REASON_CHARACTERS]} ..."


class Figures:
    """Counts requests and says so in the log every few seconds, however many come; a flood of garbage must not fill the disk. For any thread."""

    def __init__(self, every_s: float = PROGRESS_EVERY_S) -> None:
        """Raises MissingExtraError without prometheus_client."""
        prometheus = require("prometheus_client", "serving")
        self._registry, self._text_of = prometheus.CollectorRegistry(), prometheus.generate_latest
        of_client = {"labelnames": ("client",), "registry": self._registry}
        self._served = prometheus.Counter("gr00t_requests_served", "Requests answered with actions", **of_client)
        self._refused = prometheus.Counter("gr00t_requests_refused", "Requests answered with an error", **of_client)
        self._missed = prometheus.Counter("gr00t_deadlines_missed", "Actions that were there later than the client said they must be", **of_client)
        self._batches = prometheus.Histogram("gr00t_batch_size", "Requests computed together", buckets=(1, 2, 4, 8), registry=self._registry)
        times = {"buckets": _BUCKETS_S, "registry": self._registry}
        self._queue_s = prometheus.Histogram("gr00t_queue_seconds", "From a request's arrival until it is computed", **times)
        self._compute_s = prometheus.Histogram("gr00t_compute_seconds", "What the inference of a request took, with those of its batch", **times)
        self._lock, self._every_s, self._said_s = threading.Lock(), every_s, time.monotonic() - every_s
        self._clients: set[str] = set()
        self._counts = {"served": 0, "refused": 0, "deadlines_missed": 0, "batches": 0}
        self._queue_ms: deque[float] = deque(maxlen=_KEPT)
        self._compute_ms: deque[float] = deque(maxlen=_KEPT)
        self._reason, self._last_failure = "", ""

    def batch(self, size: int) -> None:
        self._batches.observe(size)
        with self._lock:
            self._counts["batches"] += 1

    def served(self, client: str, queue_s: float, compute_s: float, missed: bool = False) -> None:
        """missed: whether the answer was later than the client's deadline."""
        with self._lock:
            client = self._known(client)
            self._served.labels(client).inc()
            self._missed.labels(client).inc(missed)
            self._queue_s.observe(queue_s)
            self._compute_s.observe(compute_s)
            self._queue_ms.append(1000 * queue_s)
            self._compute_ms.append(1000 * compute_s)
            self._counts["served"] += 1
            self._counts["deadlines_missed"] += missed
            self._say()

    def refused(self, error: Exception, client: str = "") -> None:
        """A bug leaves a traceback in the log, but not the same one again and again."""
        reason = reason_of(error)
        with self._lock:
            if not isinstance(error, Gr00tFastError) and reason != self._last_failure:
                self._last_failure = reason
                log.error("a request of %s failed", client or "a client", exc_info=error)
            self._refused.labels(self._known(client)).inc()
            self._counts["refused"] += 1
            self._reason = f"{reason[:300]!r}{f' ({client})' if client else ''}"
            self._say()

    def status(self) -> dict[str, Any]:
        """Counts since the start, and percentiles in ms of the last requests; JSON-ready."""
        with self._lock:
            return self._status()

    def _status(self) -> dict[str, Any]:
        times = {"queue_ms": percentiles(self._queue_ms), "compute_ms": percentiles(self._compute_ms)}
        return {"clients": len(self._clients), **self._counts, **times}

    def serve(self, port: int) -> None:
        """Answer GET /metrics at a port of this machine, in a thread of its own. Raises ServerError."""
        try:
            require("prometheus_client", "serving").start_http_server(port, "127.0.0.1", self._registry)
        except OSError as error:
            raise ServerError(f"cannot listen on 127.0.0.1:{port}: {error.strerror}. Give another --metrics_port.") from error

    def exposition(self) -> bytes:
        """As Prometheus reads it."""
        return bytes(self._text_of(self._registry))

    def _known(self, client: str) -> str:
        name = client if client in self._clients or len(self._clients) < _MAX_CLIENTS else _OTHERS
        self._clients.add(name)
        return name

    def _say(self) -> None:
        now_s = time.monotonic()
        if now_s - self._said_s < self._every_s:
            return
        log.info("%s", status_line(self._status(), self._reason))
        self._said_s = now_s


def status_line(status: dict[str, Any], last_refusal: str = "") -> str:
    """`status` of Figures in one line."""
    if not status["served"]:
        text = "no request served"
    else:
        compute, queue = status["compute_ms"], status["queue_ms"]
        of_each = status["served"] / max(status["batches"], 1)
        text = f"{status['served']} requests served, p50 {compute['p50']:.1f} ms, p95 {compute['p95']:.1f} ms, {of_each:.1f} in a batch; "
        text += f"waited p50 {queue['p50']:.1f} ms, p95 {queue['p95']:.1f} ms"
        if status["deadlines_missed"]:
            text += f"; {status['deadlines_missed']} later than their deadline"
    refused = f"; {status['refused']} refused" if status["refused"] else ""
    return f"{text}{refused}{f', the last one because: {last_refusal}' if refused and last_refusal else ''}"
