"""Several arms with one server: requests joined by deadline against one at a time, in one run, as the control loop asks.

An arm asks again as soon as it has its chunk, whose actions count from when it asked: the next one must be there before they end.
"""

from __future__ import annotations

import heapq
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks.lib.program import end_with_parent, markdown_table
from benchmarks.lib.served_policy import ServedPolicy
from gr00t_fast.base.contracts import Policy
from gr00t_fast.base.measurement import percentiles
from gr00t_fast.serving.client import PolicyClient
from gr00t_fast.serving.service import SIZES, BatchTimes, Queue, Request

MODES = {"one at a time": 1, "together": SIZES[-1]}  # how many requests are computed at once, at most


@dataclass
class Arm:
    """What one arm saw: how long it waited for each chunk, and how many were there too late."""

    latencies_s: list[float]
    missed: int = 0

    def note(self, asked_s: float, deadline_s: float | None, answered_s: float) -> None:
        self.latencies_s.append(answered_s - asked_s)
        self.missed += deadline_s is not None and answered_s > deadline_s


def simulate(seconds: Mapping[int, float], most: int, arms: int, chunk_s: float, duration_s: float) -> list[Arm]:
    """The queue in virtual time, with a network that takes `seconds` by size of batch."""
    queue, seen, now_s = Queue(BatchTimes()), [Arm([]) for _ in range(arms)], 0.0
    queue.times.seconds |= {size: each for size, each in seconds.items() if size <= most}
    ends_s: dict[int, float] = {}  # when the actions that an arm has are over
    asking = [(arm * chunk_s / arms, arm) for arm in range(arms)]
    while now_s < duration_s:
        now_s = now_s if queue.waiting else max(now_s, asking[0][0])
        while asking and asking[0][0] <= now_s:
            asked_s, arm = heapq.heappop(asking)
            queue.waiting[arm] = Request({}, {}, Future(), str(arm), asked_s, asked_s, ends_s.get(arm), 0)
            ends_s[arm] = asked_s + chunk_s
        together = queue.take(now_s)
        now_s += seconds[len(together)]
        queue.served(now_s)
        for request in together:
            seen[int(request.client)].note(request.arrived_s, request.deadline_s, now_s)
            heapq.heappush(asking, (now_s, int(request.client)))
    return seen


def drive(make: Callable[[], Policy], observation: dict[str, Any], arms: int, chunks: Sequence[float], rounds: int, round_s: float) -> dict[str, Any]:
    """Arms in processes of their own, with two servers in turn. chunks: how long a chunk lasts, as multiples of what a request of each arm takes one
    after the other. Raises ServerError when a server does not start."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        servers = {mode: ServedPolicy(make, max_batch=most) for mode, most in MODES.items()}
        clients = {mode: stack.enter_context(server) for mode, server in servers.items()}
        status = clients["together"].get_status()
        seconds = {int(size): ms / 1000 for size, ms in (status or {})["batch_ms"].items()}
        pipes: list[Connection] = []
        for number in range(arms):
            ours, theirs = context.Pipe()
            process = context.Process(target=_arm, args=(theirs, observation, number / arms), daemon=True)
            process.start()
            stack.callback(process.terminate)
            pipes.append(ours)
        rows = []
        for multiple in chunks:
            chunk_s = multiple * arms * seconds[1]
            seen = {mode: [Arm([]) for _ in range(arms)] for mode in MODES}
            for _ in range(rounds):
                for mode, server in servers.items():
                    for pipe in pipes:
                        pipe.send((clients[mode].address, server.token, chunk_s, round_s))
                    for arm, pipe in zip(seen[mode], pipes, strict=True):
                        turn = pipe.recv()
                        arm.latencies_s, arm.missed = arm.latencies_s + turn.latencies_s, arm.missed + turn.missed
            for mode, most in MODES.items():
                virtual = simulate(seconds, most, arms, chunk_s, rounds * round_s)
                row = {"chunk_ms": round(1000 * chunk_s, 1), "server": mode, **_figures(seen[mode], rounds * round_s)}
                rows.append(row | {"virtual": _figures(virtual, rounds * round_s)})
    return {"clients": arms, "batch_ms": {size: round(1000 * each, 2) for size, each in seconds.items()}, "rounds": rounds, "rows": rows}


def _arm(pipe: Connection, observation: dict[str, Any], phase: float) -> None:
    """In a process of its own: asks the server that it is given, for as long as it is given."""
    end_with_parent()
    while True:
        address, token, chunk_s, duration_s = pipe.recv()
        arm = Arm([])
        with PolicyClient(address=address, api_token=token) as client:
            client.get_modality_config()
            time.sleep(phase * chunk_s)  # arms do not begin in the same moment
            begun_s, ends_s = time.monotonic(), None
            while (asked_s := time.monotonic()) < begun_s + duration_s:
                client.get_action(observation, deadline_s=None if ends_s is None else ends_s - asked_s)
                arm.note(asked_s, ends_s, time.monotonic())
                ends_s = asked_s + chunk_s
        pipe.send(arm)


def _figures(arms: Sequence[Arm], duration_s: float) -> dict[str, Any]:
    shares = [arm.missed / max(len(arm.latencies_s), 1) for arm in arms]
    count = sum(len(arm.latencies_s) for arm in arms)
    return {
        "requests_per_s": round(count / duration_s, 1),
        "latency_ms": percentiles(1000 * each for arm in arms for each in arm.latencies_s),
        "missed_share": round(sum(arm.missed for arm in arms) / max(count, 1), 4),
        "missed_share_of_arms": [round(float(np.min(shares)), 3), round(float(np.max(shares)), 3)],
    }


def as_table(result: dict[str, Any]) -> str:
    batches = ", ".join(f"{size}: {ms} ms" for size, ms in result["batch_ms"].items())
    lines = []
    for row in result["rows"]:
        latency, least, most = row["latency_ms"], *row["missed_share_of_arms"]
        shares = f"{row['missed_share']:.1%} (of an arm {least:.0%} to {most:.0%}; in virtual time {row['virtual']['missed_share']:.1%})"
        lines.append((row["chunk_ms"], row["server"], row["requests_per_s"], *(f"{latency[q]:.0f}" for q in ("p50", "p95", "p99")), shares))
    table = markdown_table(("a chunk lasts, ms", "requests", "a second", "p50, ms", "p95", "p99", "chunks too late"), lines)
    late = [row for row in result["rows"] if row["server"] == "together" and row["missed_share"] > 0.01]
    notes = [f"{row['chunk_ms']} ms: more than this machine can do in time; the arms share the lateness." for row in late]
    what = f"{result['clients']} arms in processes of their own, {result['weights']} weights on {result['device']}; a batch takes {batches}."
    return "\n\n".join([what, table, *notes])
