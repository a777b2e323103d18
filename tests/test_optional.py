"""Optional packages, and what importing them must not do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Audit hooks see every thread of the process; a refused connection is tried again by nobody. The sender's thread gets a moment.
WATCHED = """if True:
    import sys, time
    def note(event, arguments):
        if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.posix_spawn"):
            print("AUDIT", event, arguments, flush=True)
            raise OSError("not allowed here")
    sys.addaudithook(note)
    from gr00t_fast.optional import require
    openvino = require("openvino", "openvino")
    openvino.Core().available_devices
    from openvino.tools import ovc
    time.sleep(0.5)
    print("done", flush=True)
    """


def test_openvino_posts_nothing_and_writes_no_client_id(tmp_path: Path) -> None:
    pytest.importorskip("openvino_telemetry")
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "TF_BUILD", "JENKINS_URL")}
    command = [sys.executable, "-c", WATCHED]
    done = subprocess.run(command, cwd=ROOT, env=environment | {"HOME": str(tmp_path)}, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["done"], done.stdout + done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == []
