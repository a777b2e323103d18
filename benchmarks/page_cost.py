"""What the page of a run costs the control loop: tick errors of `gr00t-fast run` without a page, and with one that eight browsers look at.

One of the browsers has hung. Runs take turns in random order; browsers are processes that ask for what a browser asks, and draw nothing. `--minutes`
lets one more run with a page go on for so long, and tells how its memory grows.

    python benchmarks/page_cost.py --out=outputs/page_cost
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np

from benchmarks.lib import program
from gr00t_fast.base.errors import require
from gr00t_fast.base.measurement import paired_ratio

ROOT = Path(__file__).resolve().parent.parent
CLIENTS, PICTURE_S = 8, 0.1


@dataclass
class Config(program.Flags):
    out: Path = Path("outputs/page_cost")  # page_cost.json
    rounds: int = 5  # runs with and without a page
    seconds: float = 20.0  # of each run
    minutes: float = 0.0  # of one more run with a page, whose memory is watched


def run_command(seconds: float, page: bool) -> list[str]:
    demo = ["--config_path=configs/so100_sim.yaml", "--model_path=checkpoints/so100-sim-reach", f"--timeout={seconds}", "--json"]
    return [sys.executable, "so100_inference_optimized.py", *demo, *(["--page=127.0.0.1:0"] if page else [])]


def measured(seconds: float, page: bool) -> dict[str, float]:
    """The tick errors of one run in ms, and the page's memory in MB at the start and the end."""
    run = subprocess.Popen(run_command(seconds, page), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    browsers: list[multiprocessing.Process] = []
    memory: list[float] = []
    for line in run.stderr:
        if line.startswith("page: "):
            browsers = [multiprocessing.Process(target=browse, args=(line.split()[1], number == 0), daemon=True) for number in range(CLIENTS)]
            for browser in browsers:
                browser.start()
        if line.startswith(("Episode", "WARNING")) or "ticks (" in line:
            memory += [resident_mb(pid) for pid in _side_processes(run.pid)]
    report = json.loads(run.stdout.read().splitlines()[-1])
    run.wait()
    for browser in browsers:
        browser.kill()
    errors = report["pacing"]["tick_error_ms"]
    ticks = {"missed_ticks": report["pacing"]["missed_ticks"], "ticks": report["run"]["ticks"]}
    return {"p50": errors["p50"], "p95": errors["p95"], "p99": errors["p99"], **ticks, **({"memory_mb": memory} if page else {})}


def _side_processes(parent: int) -> list[int]:
    """The page's, of all that the run has started."""
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split() if Path(f"/proc/{parent}").exists() else []
    return [int(pid) for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def resident_mb(pid: int) -> float:
    with contextlib.suppress(OSError):
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024
    return float("nan")


def browse(url: str, hangs: bool) -> None:
    """As a browser does until it is killed: its socket, answers to pings, a picture after the other. One that `hangs` is stopped after its start."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError, require("websockets.exceptions", "page").ConnectionClosed):  # the run has ended
        asyncio.run(_browse(url.rstrip("/"), hangs))


async def _browse(url: str, hangs: bool) -> None:
    connect = require("websockets.asyncio.client", "page").connect
    host = url.removeprefix("http://")
    page = (await _get(host, "/")).decode()
    client = re.search(r"'client_id': '([^']+)'|\"client_id\": \"([^\"]+)\"", page)
    handshake = "next_message_id=0&implicit_handshake=true&document_id=d&tab_id=t&old_tab_id=null&EIO=4&transport=websocket"
    address = f"ws://{host}/_nicegui_ws/socket.io/?client_id={client[1] or client[2]}&{handshake}"
    async with connect(address, origin=url, max_size=None, proxy=None) as socket:
        await socket.recv()
        await socket.send("40")
        pictures = asyncio.create_task(_look(host))
        async for message in socket:
            if message == "2":
                await socket.send("3")
            while hangs:
                pictures.cancel()
                time.sleep(1.0)


async def _look(host: str) -> None:
    while True:
        await _get(host, "/camera/front")
        await asyncio.sleep(PICTURE_S)


async def _get(host: str, path: str) -> bytes:
    name, _, port = host.partition(":")
    reader, writer = await asyncio.open_connection(name, int(port))
    writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    return answer


def main(argv: Sequence[str] | None = None) -> int:
    config = program.read_flags(Config, argv, __doc__)
    program.make_directory(config.out)
    found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for arms, counts in program.shuffled_rounds((False, True), config.rounds, 1, config.seed):
        for page in arms:
            row = measured(config.seconds, page)
            if counts:
                found[page].append(row)
    ratio = paired_ratio([row["p99"] for row in found[True]], [row["p99"] for row in found[False]])
    result = {
        **program.provenance(config.seed),
        "clients": CLIENTS,
        "without": found[False],
        "with_page": found[True],
        "p99_with_over_without": ratio,
    }
    if config.minutes:
        memory = measured(60 * config.minutes, True)["memory_mb"]
        result["memory_mb"] = {
            "minutes": config.minutes,
            "begin": memory[0],
            "most": float(np.nanmax(memory)),
            "end": memory[-1],
            "all": memory[:: max(1, len(memory) // 60)],
        }
    (config.out / "page_cost.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    rows = [
        (name, *(f"{np.median([row[p] for row in found[page]]):.2f}" for p in ("p50", "p95", "p99")))
        for name, page in (("without", False), ("with", True))
    ]
    print(program.markdown_table(("tick error (ms)", "p50", "p95", "p99"), rows))
    print(f"p99 with a page and {CLIENTS} browsers, one hung: {ratio['median']} times ({ratio['p25']} to {ratio['p75']})")
    if config.minutes:
        print(f"memory of the page: {result['memory_mb']['begin']:.0f} MB, after {config.minutes:g} min {result['memory_mb']['end']:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
