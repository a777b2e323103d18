"""A fixed sequence of GPU work as one CUDA graph: what every engine on a GPU replays."""

from __future__ import annotations

from collections.abc import Callable

import torch

_CALLS_BEFORE_RECORDING = 3  # libraries choose kernels and allocate workspaces in their first calls, which a graph cannot hold

Work = Callable[[], None]


class CapturedGraph:
    """`work` recorded once; `launch` does `upload`, one replay and `download`, and `wait` waits for them.

    Everything that `work` reads and writes has to stay where it is: the graph holds addresses, and this object holds `work`, hence what it owns.
    """

    def __init__(
        self,
        work: Work,
        stream: torch.cuda.Stream,
        upload: Work | None = None,
        download: Work | None = None,
        pool: tuple[int, int] | None = None,
        capturable: Callable[[], bool] | None = None,
    ) -> None:
        """Runs on `stream` and its GPU, which need not be the current one. upload, download: copies to and from pinned memory.

        pool: memory for what `work` allocates; graphs that never run at the same time may share one, on the same stream. capturable: asked after
        the first calls; where it says no, `recorded` is False and each launch submits `work` anew.
        """
        self.stream = stream
        self._work, self._upload, self._download = work, upload, download
        self._graph: torch.cuda.CUDAGraph | None = None
        with torch.cuda.device(stream.device):
            self._done = torch.cuda.Event()
            stream.wait_stream(torch.cuda.current_stream(stream.device))
            with torch.cuda.stream(stream):
                for _ in range(_CALLS_BEFORE_RECORDING):
                    if upload is not None:
                        upload()
                    work()
            stream.synchronize()
            if capturable is None or capturable():
                graph = torch.cuda.CUDAGraph()
                # thread_local: cameras and recorders may allocate memory meanwhile, which would break a recording of mode "global"
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    work()
                self._graph = graph

    @property
    def recorded(self) -> bool:
        return self._graph is not None

    def launch(self) -> None:
        """Start; returns before it has run. Nothing launched before may still be under way."""
        with torch.cuda.stream(self.stream):
            if self._upload is not None:
                self._upload()
            if self._graph is None:
                self._work()
            else:
                self._graph.replay()
            if self._download is not None:
                self._download()
            self._done.record(self.stream)

    def wait(self) -> None:
        """Until what was launched has run: of the whole GPU only this."""
        self._done.synchronize()
