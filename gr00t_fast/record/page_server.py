"""What `--page` shows in a browser, in a process of its own (sink.py)."""

from __future__ import annotations

import html
import math
import os
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gr00t_fast.base.contracts import Observation
from gr00t_fast.base.keyboard import LEFT, RIGHT, SPACE
from gr00t_fast.control.modes import Mode
from gr00t_fast.control.trace import TickRecord
from gr00t_fast.record.page import COMPARED, PageFacts, PageNote
from gr00t_fast.record.sink import Tell
from gr00t_fast.record.web import REFRESH_S, WebPage

_LONGEST_INSTRUCTION = 500
_LINES = 200
_DRAWN_S = 1.0  # for the browsers to draw the end
_COLOURS = {Mode.PLAY: "#2e7d32", Mode.HOLD: "#b26a00", Mode.AWAY: "#c62828", Mode.PUT_DOWN: "#c62828", Mode.PAUSED: "#1565c0"}
_STYLE = """
<style>
 body { font: 16px/1.4 system-ui, sans-serif }
 .nicegui-content { padding: .6rem .6rem 11rem; gap: .6rem; max-width: 90rem; margin: auto; width: 100% }
 .sides { display: flex; flex-wrap: wrap; gap: 1rem; width: 100% } .sides > * { flex: 1 1 21rem; min-width: 0 }
 .cameras { display: flex; flex-wrap: wrap; gap: .6rem; align-content: start } .cameras figure { margin: 0; flex: 1 1 9rem }
 .cameras img { width: 100%; max-height: 62vh; object-fit: contain; object-position: left; min-height: 3rem; display: block }
 figcaption { font-size: .85rem; opacity: .7 } .bars { width: 100% } .bars svg { width: 100%; height: auto; display: block }
 .why { font-size: 1.05rem; font-weight: 600 } .facts { font-variant-numeric: tabular-nums; white-space: pre-line }
 .text { white-space: pre-wrap; font: 13px/1.4 ui-monospace, monospace; overflow-x: auto; width: 100% } .report { white-space: pre }
 .alarm { color: #c62828; font-weight: 600; white-space: pre-wrap } .stop { font-size: 1.4rem; font-weight: 700; width: 100%; min-height: 4rem }
</style>
"""


@dataclass
class State:
    """What every browser shows, made once for all of them."""

    headline: str = "starting"
    colour: str = "#455a64"
    why: str = "loading, warming up, connecting"
    facts: str = ""
    instruction: str = ""
    bars: str = ""
    lines: str = ""
    alarms: str = ""
    report: str = ""
    lowering: bool = False  # the arm is put down: STOP lets go
    paused: bool = False
    over: bool = False


class PageServer(WebPage):
    """Serves the page until it is left. Raises MissingExtraError without NiceGUI."""

    def __init__(self, tell: Tell, sock: socket.socket, facts: PageFacts) -> None:
        self._tell, self._facts, self.state = tell, facts, State()
        self._mode, self._since_s = Mode.APART, time.monotonic()
        self._low, self._high = np.zeros(len(facts.joints)), np.full(len(facts.joints), math.nan)
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._alarms: deque[str] = deque(maxlen=5)
        self._tick: TickRecord | None = None
        self._rate = Rate()
        self._drawn: set[str] = set()  # browsers that show the end
        super().__init__(sock, facts.hosts, facts.token)

    def __exit__(self, *error: object) -> None:
        """Once the browsers have drawn the end: they keep it."""
        end_s = time.monotonic() + _DRAWN_S
        while self.browsers > len(self._drawn) and time.monotonic() < end_s:
            time.sleep(0.02)
        time.sleep(REFRESH_S)  # what was drawn is on its way
        super().__exit__(*error)
        os._exit(0)  # a browser that does not read may hold the server up

    # What the run tells

    def ranges(self, limits: Sequence[Sequence[float]]) -> None:
        """Each joint's range, from its calibration (J, 2)."""
        self._low, self._high = np.array(limits, float).T

    def add(self, observation: Observation, note: PageNote) -> None:
        """What has come. Pictures are made smaller and encoded while somebody looks."""
        self.show(observation.frames)
        if note.mode is not self._mode:
            self._mode, self._since_s = note.mode, time.monotonic()
        for tick in note.ticks:
            self._tick = tick
            self._rate.add(tick)
        self._say(note.said)
        state = self.state
        state.lowering, state.paused = note.mode is Mode.PUT_DOWN, note.mode is Mode.PAUSED
        playing = bool(self._facts.trial) and note.mode in (Mode.HOLD, Mode.PLAY)  # which of both would tell the setting
        mode = Mode.PLAY if playing else note.mode
        state.headline, state.colour = mode.name.replace("_", " ").lower(), _COLOURS.get(mode, "#455a64")
        state.why, state.instruction = "the trial goes on" if playing else self._why(note), "" if self._facts.trial else note.instruction
        state.facts = self._clock(note)
        shown = self._tick if note.ticks and not self._facts.trial else None
        state.bars = bars(self._facts.joints, self._facts.unit, self._low, self._high, observation.joints, shown)

    def over(self, report: str, said: Sequence[str]) -> None:
        """The run has ended."""
        self._say(said)
        state = self.state
        state.headline, state.colour, state.why = "over", "#455a64", "The run has ended. A new run appears here by itself."
        state.report, state.over = report, True

    def _say(self, lines: Sequence[str]) -> None:
        if lines:
            self._lines.extend(lines)
            self._alarms.extend(line for line in lines if line.startswith("WARNING"))
            self.state.lines, self.state.alarms = "\n".join(reversed(self._lines)), "\n".join(reversed(self._alarms))

    def _why(self, note: PageNote) -> str:
        """What the arm does, or waits for, and for how long."""
        so_far_s, limit_s = time.monotonic() - self._since_s, self._facts.limits_s.get(note.mode)
        time_s = f"{so_far_s:.1f} s" if limit_s is None else f"{so_far_s:.1f} of {limit_s:g} s"
        what = {
            Mode.CONNECTED: "looking at arm and cameras",
            Mode.MOVE: f"moving to where the episode begins, {time_s}",
            Mode.HOLD: f"waiting for the network (inference), {time_s}",
            Mode.PLAY: "playing the policy's actions",
            Mode.PAUSED: f"paused, the arm holds its pose, {time_s}",
            Mode.BETWEEN: f"between episodes: {note.waits or 'put things back'}, {time_s}",
            Mode.AWAY: f"the arm is out of reach (cable, power), {time_s}",
            Mode.PUT_DOWN: f"putting the arm down, {time_s}. STOP again lets go at once: the arm falls",
            Mode.RELEASED: "the torque is off",
            Mode.HELD: "the arm is left as it was found",
        }
        return what.get(note.mode, note.mode.value)

    def _clock(self, note: PageNote) -> str:
        tick = self._tick
        if tick is None or self._facts.trial:
            return self._facts.trial
        limit = f" of {self._facts.timeout_s:g}" if self._facts.timeout_s else ""
        episode = f"episode {tick.episode + 1} of {self._facts.episodes}, {self._rate.episode_s:.1f}{limit} s"
        chunk = f"chunk: {len(tick.ahead)} rows left, inference {tick.inference_ms:.0f} ms, {tick.missed_ticks} missed ticks"
        return f"{episode}\n{self._rate}\n{chunk}"

    # What browsers get

    def page(self) -> None:
        """One browser's page."""
        ui, state, facts = self.ui, self.state, self._facts
        ui.add_head_html(_STYLE)
        with ui.header().classes("items-center") as header:
            headline = ui.label().classes("text-h6").mark("mode")
            why = ui.label().classes("why").mark("why")
        instruction = ui.label().classes("text-subtitle1").mark("instruction")
        alarms = ui.label().classes("alarm").mark("alarms")
        report = ui.label().classes("text report").mark("report")
        with ui.element("div").classes("sides"):
            if facts.cameras:
                self.pictures(facts.cameras)
            with ui.element("div"):
                numbers = ui.label().classes("facts").mark("facts")
                joints = ui.html("", sanitize=False).classes("bars")
                ui.label("blue: measured, red: sent, orange: what the chunk still holds").classes("text-caption")
                with ui.row().classes("full-width items-center no-wrap") as next_instruction:
                    text = ui.input("instruction of the next episode").props(f"maxlength={_LONGEST_INSTRUCTION} dense outlined")
                    text.style("flex: 1").mark("text")
                    ui.button("take it", on_click=lambda: self._instruct(text)).props("no-caps").mark("instruct")
        if facts.compares:
            self.pictures(camera + COMPARED for camera in facts.cameras)
        lines = ui.label().classes("text").mark("lines")
        with ui.footer().style("flex-direction: column; align-items: stretch; gap: .4rem; background: #222e") as controls:
            with ui.row().classes("full-width no-wrap").style("gap: .3rem"):
                pause = self._key("pause", SPACE)
                for name, key in {"success": "s", "failure": "f", "again": LEFT, "next": RIGHT}.items():
                    self._key(name, key)
            stop = ui.button(on_click=lambda: self._tell("stop")).classes("stop").props("color=red-10").mark("stop")

        def refresh() -> None:
            headline.set_text(state.headline)
            header.style(f"background-color: {state.colour}")
            why.set_text(state.why)
            instruction.set_text(state.instruction)
            alarms.set_text(state.alarms)
            numbers.set_text(state.facts)
            joints.set_content(state.bars)
            lines.set_text(state.lines)
            report.set_text(state.report)
            pause.set_text("go on" if state.paused else "pause")
            stop.set_text("STOP AGAIN: LET GO, THE ARM FALLS" if state.lowering else "STOP")
            for part in (controls, next_instruction):
                part.set_visibility(not state.over and not (facts.trial and part is next_instruction))
            if state.over and ui.context.client.id not in self._drawn:
                ui.run_javascript("document.getElementById('popup').style.display = 'none'")  # "connection lost": it is not, the run has ended
                self._drawn.add(ui.context.client.id)

        refresh()
        ui.timer(REFRESH_S, refresh)

    def _key(self, text: str, key: str) -> Any:
        return (
            self.ui.button(text, on_click=lambda: self._tell("key", key)).props("no-caps color=blue-grey-8 padding=sm xs").style("flex: 1").mark(text)
        )

    def _instruct(self, field: Any) -> None:
        self._tell("instruction", str(field.value)[:_LONGEST_INSTRUCTION].encode("utf-8", "ignore").decode())  # half a character is none
        field.set_value("")


class Rate:
    """Actions a second: in the last second, on average, and in the worst second of the episode that plays."""

    def __init__(self) -> None:
        self._episode, self._began_s, self._played, self._worst = -1, 0.0, 0, math.inf
        self._recent: deque[float] = deque()
        self.episode_s = 0.0

    def add(self, tick: TickRecord) -> None:
        if tick.episode != self._episode:
            self._episode, self._began_s, self._played, self._worst = tick.episode, tick.time_s, 0, math.inf
            self._recent.clear()
        self.episode_s = tick.time_s - self._began_s
        if not tick.underrun:
            self._played += 1
            self._recent.append(tick.time_s)
        while self._recent and self._recent[0] <= tick.time_s - 1.0:
            self._recent.popleft()
        if self.episode_s >= 1.0:
            self._worst = min(self._worst, len(self._recent))

    def __str__(self) -> str:
        if math.isinf(self._worst):
            return "rate: after a second"
        return f"{len(self._recent)} Hz now, {self._played / self.episode_s:.1f} on average, {self._worst} in the worst second"


def bars(joints: Sequence[str], unit: str, low: np.ndarray, high: np.ndarray, measured: np.ndarray, tick: TickRecord | None) -> str:
    """An SVG: for each joint its calibrated range, where it is (filled), what was sent (a mark), and what the chunk still holds (a line)."""
    left, width, row = 150.0, 330.0, 26.0
    rows = []
    for index, name in enumerate(joints):
        y, span = index * row, high[index] - low[index]

        def x(value: float, index: int = index, span: float = span) -> float:
            share = (value - low[index]) / span if span > 0 else math.nan
            return left + width * min(1.0, max(0.0, share)) if math.isfinite(share) else math.nan

        now = x(float(measured[index]))
        rows.append(f'<text x="0" y="{y + 17:.0f}">{html.escape(name)}</text>')
        rows.append(f'<rect x="{left:.0f}" y="{y + 6:.0f}" width="{width:.0f}" height="13" fill="#8883" rx="3"/>')
        if math.isfinite(now):
            rows.append(f'<rect x="{left:.0f}" y="{y + 6:.0f}" width="{now - left:.1f}" height="13" fill="#1e88e5" rx="3"/>')
        if tick is not None and len(tick.ahead) and math.isfinite(now):
            points = " ".join(f"{x(value):.1f},{y + 22:.0f}" for value in (tick.ahead[:, index].min(), tick.ahead[:, index].max()))
            rows.append(f'<polyline points="{points}" stroke="#fb8c00" stroke-width="3" fill="none"/>')
        if tick is not None and math.isfinite(sent := x(float(tick.commanded[index]))):
            rows.append(f'<rect x="{sent - 1.5:.1f}" y="{y + 2:.0f}" width="3" height="20" fill="#e53935"/>')
        shown = f"{measured[index]:.1f}{'%' if name == 'gripper' else '°' if unit == 'degrees' else ''}" if math.isfinite(measured[index]) else "NaN"
        rows.append(f'<text x="{left + width + 8:.0f}" y="{y + 17:.0f}">{shown}</text>')
    size = f"0 0 {left + width + 70:.0f} {len(joints) * row + 4:.0f}"
    return f'<svg viewBox="{size}" font-size="13" fill="currentColor">{"".join(rows)}</svg>'
