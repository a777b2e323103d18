"""What `--page` shows in a browser: NiceGUI in a process of its own (sink.py).

A browser fetches each picture when it has drawn the one before, so that a slow one gets fewer and none waits in a queue. All else goes through the
page's own socket, which alone can change anything: requests other than GET, from other sites, under foreign names or without the token are refused.
"""

from __future__ import annotations

import contextlib
import html
import math
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from ipaddress import ip_address
from typing import Any
from urllib.parse import parse_qs, quote

import numpy as np

from gr00t_fast.base.contracts import Observation
from gr00t_fast.base.errors import require
from gr00t_fast.base.keyboard import LEFT, RIGHT, SPACE
from gr00t_fast.control.modes import Mode
from gr00t_fast.control.trace import TickRecord
from gr00t_fast.record.page import PageFacts, PageNote
from gr00t_fast.record.sink import Tell

_MOST_CLIENTS = 8
_MOST_PAGES = 24  # that were asked for and not closed yet, those without a socket among them
_MOST_MESSAGE_BYTES = 1 << 16
_LONGEST_INSTRUCTION = 500
_REFRESH_S = 0.1
_WIDTH_PX, _JPEG_QUALITY = 640, 80
_LINES = 200
_COOKIE = "gr00t_fast_page"
_DRAWN_S = 1.0  # for the browsers to draw the end
_COLOURS = {Mode.PLAY: "#2e7d32", Mode.HOLD: "#b26a00", Mode.AWAY: "#c62828", Mode.PUT_DOWN: "#c62828", Mode.PAUSED: "#1565c0"}
_HEAD = """
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
<script>
 function follow(old, url) {  // the next picture once this one is there: never a queue, and nothing while the page sleeps
   const next = new Image(); next.alt = old.alt; next.id = old.id
   next.onload = () => { old.replaceWith(next); setTimeout(follow, 90, next, url) }
   next.onerror = () => setTimeout(follow, 700, old, url)
   next.src = url + '?' + Date.now()
 }
</script>
"""


@dataclass
class _State:
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


class PageServer(contextlib.AbstractContextManager):
    """Serves the page until it is left. Raises MissingExtraError without NiceGUI."""

    def __init__(self, tell: Tell, sock: socket.socket, facts: PageFacts) -> None:
        import cv2  # changes the environment when it is imported

        cv2.setNumThreads(1)
        self._cv2, self._tell, self._facts = cv2, tell, facts
        self._ui = require("nicegui", "page").ui
        self._state, self._pictures = _State(), dict[str, bytes]()
        self._mode, self._since_s = Mode.APART, time.monotonic()
        self._low, self._high = np.zeros(len(facts.joints)), np.full(len(facts.joints), math.nan)
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._alarms: deque[str] = deque(maxlen=5)
        self._tick: TickRecord | None = None
        self._rate = Rate()
        self._drawn: set[str] = set()  # browsers that show the end
        self._server = self._made(sock)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [sock]}, name="page", daemon=True)
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.01)
        if not self._server.started:
            raise RuntimeError("the web server has not started")

    def __exit__(self, *error: object) -> None:
        """Once the browsers have drawn the end: they keep it."""
        end_s = time.monotonic() + _DRAWN_S
        while self._gate.sockets > len(self._drawn) and time.monotonic() < end_s:
            time.sleep(0.02)
        time.sleep(_REFRESH_S)  # what was drawn is on its way
        self._server.should_exit = True
        self._thread.join(_DRAWN_S)
        import os

        os._exit(0)  # a browser that does not read may hold the server up

    # What the run tells

    def ranges(self, limits: Sequence[Sequence[float]]) -> None:
        """Of each joint, from its calibration (J, 2)."""
        self._low, self._high = np.array(limits, float).T

    def add(self, observation: Observation, note: PageNote) -> None:
        """A tick. Pictures are made smaller and encoded while somebody looks."""
        if self._gate.sockets:
            for name, frame in observation.frames.items():
                self._pictures[name] = self._jpeg(frame)
        if note.mode is not self._mode:
            self._mode, self._since_s = note.mode, time.monotonic()
        self._tick = note.tick or self._tick
        if note.tick is not None:
            self._rate.add(note.tick)
        self._say(note.said)
        state = self._state
        state.lowering, state.paused = note.mode is Mode.PUT_DOWN, note.mode is Mode.PAUSED
        state.headline, state.colour = note.mode.name.replace("_", " ").lower(), _COLOURS.get(note.mode, "#455a64")
        state.why, state.instruction = self._why(note), note.instruction
        state.facts = self._clock(note)
        state.bars = bars(self._facts.joints, self._facts.unit, self._low, self._high, observation.joints, note.tick)

    def over(self, report: str, said: Sequence[str]) -> None:
        """The run has ended."""
        self._say(said)
        state = self._state
        state.headline, state.colour, state.why = "over", "#455a64", "The run has ended. A new run appears here by itself."
        state.report, state.over = report, True

    def _say(self, lines: Sequence[str]) -> None:
        if lines:
            self._lines.extend(lines)
            self._alarms.extend(line for line in lines if line.startswith("WARNING"))
            self._state.lines, self._state.alarms = "\n".join(reversed(self._lines)), "\n".join(reversed(self._alarms))

    def _jpeg(self, frame: np.ndarray) -> bytes:
        height, width = frame.shape[:2]
        if width > _WIDTH_PX:
            frame = self._cv2.resize(frame, (_WIDTH_PX, max(1, round(height * _WIDTH_PX / width))), interpolation=self._cv2.INTER_AREA)
        return self._cv2.imencode(".jpg", frame[:, :, ::-1], [self._cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1].tobytes()  # RGB -> BGR

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
        if tick is None:
            return ""
        limit = f" of {self._facts.timeout_s:g}" if self._facts.timeout_s else ""
        episode = f"episode {tick.episode + 1} of {self._facts.episodes}, {self._rate.episode_s:.1f}{limit} s"
        chunk = f"chunk: {len(tick.ahead)} rows left, inference {tick.inference_ms:.0f} ms, {tick.missed_ticks} missed ticks"
        return f"{episode}\n{self._rate}\n{chunk}"

    # What browsers get

    def _made(self, sock: socket.socket) -> Any:
        import uvicorn
        from fastapi import FastAPI
        from fastapi.responses import Response

        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

        @app.get("/camera/{name:path}")
        async def camera(name: str) -> Response:
            picture = self._pictures.get(name)
            headers = {"Cache-Control": "no-store"}
            return Response(picture, 200 if picture else 404, headers, "image/jpeg")

        looks = {"title": "gr00t_fast", "dark": None, "tailwind": False, "show_welcome_message": False}
        self._ui.run_with(app, root=self._page, reconnect_timeout=3.0, message_history_length=0, **looks)
        self._gate = Gate(app, self._facts.hosts, self._facts.token, sock.getsockname()[1])
        sizes = {"ws_max_size": _MOST_MESSAGE_BYTES, "ws_max_queue": 4, "h11_max_incomplete_event_size": _MOST_MESSAGE_BYTES}
        quiet = {"log_level": "critical", "access_log": False, "server_header": False, "proxy_headers": False}
        return uvicorn.Server(uvicorn.Config(self._gate, lifespan="on", timeout_graceful_shutdown=1, limit_concurrency=100, **sizes, **quiet))

    def _page(self) -> None:
        """One browser's page."""
        from nicegui import Client

        ui, state, facts = self._ui, self._state, self._facts
        if len(Client.instances) > _MOST_PAGES:
            ui.label("Too many pages were opened. Close some, wait a minute, and load this one again.")
            return
        ui.add_head_html(_HEAD)
        with ui.header().classes("items-center") as header:
            headline = ui.label().classes("text-h6").mark("mode")
            why = ui.label().classes("why").mark("why")
        instruction = ui.label().classes("text-subtitle1").mark("instruction")
        alarms = ui.label().classes("alarm").mark("alarms")
        report = ui.label().classes("text report").mark("report")
        with ui.element("div").classes("sides"):
            if facts.cameras:
                ui.html("".join(map(_figure, facts.cameras)), sanitize=False).classes("cameras")
                ui.run_javascript("document.querySelectorAll('.cameras img').forEach(i => follow(i, i.dataset.url))")
            with ui.element("div"):
                numbers = ui.label().classes("facts").mark("facts")
                joints = ui.html("", sanitize=False).classes("bars")
                ui.label("blue: measured, red: sent, orange: what the chunk still holds").classes("text-caption")
                with ui.row().classes("w-full items-center no-wrap") as next_instruction:
                    text = ui.input("instruction of the next episode").props(f"maxlength={_LONGEST_INSTRUCTION} dense outlined")
                    text.style("flex: 1").mark("text")
                    ui.button("take it", on_click=lambda: self._instruct(text)).props("no-caps").mark("instruct")
        lines = ui.label().classes("text").mark("lines")
        with ui.footer().style("flex-direction: column; align-items: stretch; gap: .4rem; background: #222e") as controls:
            with ui.row().classes("w-full no-wrap").style("gap: .3rem"):
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
                part.set_visibility(not state.over)
            if state.over and ui.context.client.id not in self._drawn:
                ui.run_javascript("document.getElementById('popup').style.display = 'none'")  # "connection lost": it is not, the run has ended
                self._drawn.add(ui.context.client.id)

        refresh()
        ui.timer(_REFRESH_S, refresh)

    def _key(self, text: str, key: str) -> Any:
        return (
            self._ui.button(text, on_click=lambda: self._tell("key", key))
            .props("no-caps color=blue-grey-8 padding=sm xs")
            .style("flex: 1")
            .mark(text)
        )

    def _instruct(self, field: Any) -> None:
        self._tell("instruction", str(field.value)[:_LONGEST_INSTRUCTION])
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


class Gate:
    """In front of the page: who may come in. An ASGI application."""

    def __init__(self, app: Callable[..., Any], hosts: tuple[str, ...], token: str, port: int) -> None:
        """hosts: what a browser may call this machine. With a token, any IP address is one besides: a foreign site has a name."""
        self._app, self._hosts, self._token, self._cookie = app, hosts, token, f"{_COOKIE}_{port}"
        self.sockets = 0  # browsers that are connected

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            return await self._app(scope, receive, send)
        refused = self._refusal(scope)
        if refused is None and kind == "websocket" and self.sockets >= _MOST_CLIENTS:
            refused = 503, _FULL
        if refused is not None:
            return await _answer(kind, receive, send, *refused)
        if kind == "http" and self._asked_token(scope):
            cookie = f"{self._cookie}={self._token}; HttpOnly; SameSite=Lax; Path=/"
            return await _answer(kind, receive, send, 303, "", ((b"location", b"/"), (b"set-cookie", cookie.encode())))
        if kind == "http" and scope["path"] == "/" and self.sockets >= _MOST_CLIENTS:
            return await _answer(kind, receive, send, 503, _FULL)
        self.sockets += kind == "websocket"
        try:
            await self._app(scope, receive, send)
        finally:
            self.sockets -= kind == "websocket"

    def _refusal(self, scope: Any) -> tuple[int, str] | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if not self._is_here(host):
            return 403, "This page is not served under that name. Use the address that the run printed."
        if origin is not None and origin != f"http://{host}":
            return 403, "Another site asks: refused."
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD"):
            return 405, "Only the page's own socket changes anything."
        if scope["type"] == "websocket" and origin is None:
            return 403, "A browser says where it comes from (Origin)."
        if self._token and not (self._asked_token(scope) or self._has_cookie(headers.get(b"cookie", ""))):
            return 403, "The token is missing or wrong. Use the whole address that the run printed, with ?token=..."
        return None

    def _is_here(self, host: str) -> bool:
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        name = name.strip("[]").lower()
        if name in (known.lower() for known in self._hosts):
            return True
        try:
            return bool(self._token) and bool(ip_address(name))
        except ValueError:
            return False

    def _asked_token(self, scope: Any) -> bool:
        asked = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        return bool(self._token) and secrets.compare_digest(asked.encode(), self._token.encode())

    def _has_cookie(self, text: str) -> bool:
        try:
            held = SimpleCookie(text).get(self._cookie)
        except CookieError:
            return False
        return held is not None and secrets.compare_digest(held.value.encode(), self._token.encode())


_FULL = f"{_MOST_CLIENTS} browsers look at this run already. Close one of them."


async def _answer(kind: str, receive: Any, send: Any, status: int, text: str, more: Sequence[tuple[bytes, bytes]] = ()) -> None:
    if kind == "websocket":
        await receive()
        return await send({"type": "websocket.close", "code": 1008, "reason": text[:100]})
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain; charset=utf-8"), *more]})
    return await send({"type": "http.response.body", "body": text.encode() + b"\n"})


def _figure(camera: str) -> str:
    name, url = html.escape(camera), html.escape(f"/camera/{quote(camera)}")
    return f'<figure><img alt="{name}" data-url="{url}"><figcaption>{name}</figcaption></figure>'


def bars(joints: Sequence[str], unit: str, low: np.ndarray, high: np.ndarray, measured: np.ndarray, tick: TickRecord | None) -> str:
    """An SVG: for each joint its calibrated range, where it is (filled), what was sent (a mark), and what the chunk still holds (a line)."""
    left, width, row = 150.0, 330.0, 26.0
    rows = []
    for index, name in enumerate(joints):
        y, span = index * row, high[index] - low[index]

        def x(value: float, index: int = index, span: float = span) -> float:
            share = (value - low[index]) / span if span > 0 else math.nan
            return left + width * min(1.0, max(0.0, share)) if math.isfinite(share) else math.nan

        now = x(measured[index])
        rows.append(f'<text x="0" y="{y + 17:.0f}">{html.escape(name)}</text>')
        rows.append(f'<rect x="{left:.0f}" y="{y + 6:.0f}" width="{width:.0f}" height="13" fill="#8883" rx="3"/>')
        if math.isfinite(now):
            rows.append(f'<rect x="{left:.0f}" y="{y + 6:.0f}" width="{now - left:.1f}" height="13" fill="#1e88e5" rx="3"/>')
        if tick is not None and len(tick.ahead) and math.isfinite(now):
            points = " ".join(f"{x(value):.1f},{y + 22:.0f}" for value in (tick.ahead[:, index].min(), tick.ahead[:, index].max()))
            rows.append(f'<polyline points="{points}" stroke="#fb8c00" stroke-width="3" fill="none"/>')
        if tick is not None and math.isfinite(sent := x(tick.commanded[index])):
            rows.append(f'<rect x="{sent - 1.5:.1f}" y="{y + 2:.0f}" width="3" height="20" fill="#e53935"/>')
        shown = f"{measured[index]:.1f}{'%' if name == 'gripper' else '°' if unit == 'degrees' else ''}" if math.isfinite(measured[index]) else "NaN"
        rows.append(f'<text x="{left + width + 8:.0f}" y="{y + 17:.0f}">{shown}</text>')
    size = f"0 0 {left + width + 70:.0f} {len(joints) * row + 4:.0f}"
    return f'<svg viewBox="{size}" font-size="13" fill="currentColor">{"".join(rows)}</svg>'
