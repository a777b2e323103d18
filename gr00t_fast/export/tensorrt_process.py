"""Runs the building of one stage as a child process, follows its progress, and ends it when this process is interrupted."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from gr00t_fast.errors import EngineError
from gr00t_fast.export.tensorrt_stage import Request

OnPhase = Callable[[str | None, float | None], None]  # name of the phase and the share of it that is done; (None, None) once a second
_ROOT = Path(__file__).resolve().parents[2]
BUILDER = (sys.executable, "-m", "gr00t_fast.export.tensorrt_stage")
_TAIL_CHARACTERS = 600
_KILL_AFTER_S = 5.0


def run_stage(request: Request, on_phase: OnPhase) -> dict[str, Any]:
    """Return the facts of the built engine. Raises EngineError with the library's message, or what is known when the process died.

    The child is in a session of its own: Ctrl-C reaches this process only, which then ends the child and leaves no half-written engine in place.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))}
    with tempfile.TemporaryFile() as errors:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        child = subprocess.Popen(BUILDER, env=environment, text=True, start_new_session=True, **pipes)
        try:
            child.stdin.write(request.to_json() + "\n")
            child.stdin.flush()  # left open: the child ends when it is closed
            answer = _follow(child, on_phase)
        finally:
            _end(child)
        if answer is None:
            raise EngineError(_obituary(Path(request.onnx).name, child.returncode, errors))
    if "error" in answer:
        raise EngineError(answer["error"])
    return answer["result"]


def _follow(child: subprocess.Popen, on_phase: OnPhase) -> dict[str, Any] | None:
    """Hand on phases until the answer comes; None when the child ends without one."""
    for line in _lines(child.stdout):
        try:
            message = json.loads(line) if line else {"phase": None, "done": None}
        except ValueError:
            continue  # something else printed by the library
        if "phase" not in message:
            return message
        on_phase(message["phase"], message["done"])
    return None


def _lines(stream: IO[str]) -> Iterator[str]:
    """Lines as they come, and an empty one for each second without any, so that the caller's clock goes on."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=1.0)
        except queue.Empty:
            yield ""
            continue
        if line is None:
            return
        yield line


def _end(child: subprocess.Popen) -> None:
    child.stdin.close()
    try:
        child.wait(timeout=_KILL_AFTER_S if child.poll() is None else None)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    child.stdout.close()


def _obituary(graph: str, code: int, errors: IO[bytes]) -> str:
    errors.seek(0)
    tail = errors.read().decode(errors="replace").strip()[-_TAIL_CHARACTERS:]
    memory = " Probably the system ran out of memory: close other programs, or build on a machine with more." if code in (-9, 137) else ""
    return f"building {graph} ended with code {code} and no result.{memory}{' Its last words: ' + tail if tail else ''}"
