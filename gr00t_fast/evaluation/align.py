"""A page on which a person puts cameras back where they were when the data set was recorded: the recorded picture as a ghost over the live one, and
which way to turn. No servo is spoken to."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from gr00t_fast.record.web import REFRESH_S, WebPage, names_of
from gr00t_fast.robots import CameraConfig, SimCameraConfig, rendered
from gr00t_fast.robots import lerobot_glue as glue
from gr00t_fast.scene.card import Card
from gr00t_fast.scene.look import ASSUMED_DISTANCE_M, ASSUMED_VIEW_DEG, Look, look, most_shift, of_policy, ways_back
from gr00t_fast.virtual.sim.simulation import HOME_DEG, RenderedCameras

_OLDEST_MS, _FIRST_MS = 2000, 5000
_READ_S = 0.1
_GHOST = ".trained"
_GHOSTLY = "document.documentElement.style.setProperty('--ghost', {})"
_STYLE = """
<style>
 :root { --ghost: .5 } .nicegui-content { padding: .6rem; gap: .6rem; max-width: 90rem; margin: auto; width: 100% }
 .views { display: flex; flex-wrap: wrap; gap: 1rem; width: 100% } .views > * { flex: 1 1 20rem; min-width: 0 }
 .cameras { position: relative } .cameras figure { margin: 0; position: relative }
 .cameras img { width: 100%; max-height: 75vh; object-fit: contain; object-position: left; display: block }
 .cameras figure + figure { position: absolute; inset: 0; opacity: var(--ghost) } figcaption { display: none }
 .off { font-size: 1.6rem; font-weight: 700; font-variant-numeric: tabular-nums } .ways { font-size: 1.1rem; white-space: pre-line }
</style>
"""


class AlignPage(WebPage):
    """Shows each camera with its ghost, how far it is off, and the way back."""

    def __init__(self, sock: socket.socket, hosts: tuple[str, ...], token: str, card: Card, camera_map: Mapping[str, str]) -> None:
        """camera_map: {robot camera: policy camera}, of all that are shown."""
        self.done = False  # a person has pressed `done`
        self._card, self._map, self._silent = card, camera_map, set[str]()
        self._off, self._colour, self._ways = (dict.fromkeys(camera_map, value) for value in ("looking ...", "#455a64", ""))
        super().__init__(sock, hosts, token)

    def see(self, frames: Mapping[str, np.ndarray]) -> None:
        """The newest pictures, uint8 RGB."""
        self._silent = self._map.keys() - frames.keys()
        for name in self._silent:
            self._off[name], self._colour[name] = "no picture", "#c62828"
            self._ways[name] = f"for {_OLDEST_MS / 1000:g} s. Is its cable in? If it does not come back, start `gr00t-fast align` again."
        trained = {name: of_policy(self._card, policy, len(self._map) == 1) for name, policy in self._map.items()}
        self.show({**frames, **{name + _GHOST: camera.median for name, camera in trained.items() if camera is not None}})

    def judge(self, found: Look) -> None:
        """What a look has said."""
        for name, policy in self._map.items():
            if name in self._silent:
                continue
            told = [text for kind, text in found.findings if f"'{name}'" in text and kind != "note"]
            seen, trained = found.measures.get(name), of_policy(self._card, policy, len(self._map) == 1)
            if seen is None or trained is None:
                self._off[name], self._colour[name] = "cannot be compared", "#455a64"
                self._ways[name] = "\n".join(told or [text for _, text in found.findings if f"'{name}'" in text])
                continue
            limit, problem = most_shift(trained), any(kind == "problem" and f"'{name}'" in text for kind, text in found.findings)
            right = seen["shift"] <= limit and not problem
            self._off[name] = "another picture" if problem else f"{seen['shift']:.1f} pixels off, at most {limit:.1f}"
            self._colour[name] = "#2e7d32" if right else "#c62828"
            self._ways[name] = "as in the recordings" if right else "\n".join(told if problem else ways_back(trained, seen))

    def page(self) -> None:
        ui, views = self.ui, {}
        ui.add_head_html(_STYLE)
        ui.label("Move each camera until its number is green. The recorded picture lies over the live one.").classes("text-h6")
        with ui.row().classes("full-width items-center no-wrap"):
            ui.label("live")
            ghost = ui.slider(min=0, max=1, step=0.05, value=0.5).style("flex: 1; max-width: 30rem")
            ghost.on_value_change(lambda event: ui.run_javascript(_GHOSTLY.format(float(event.value))))
            ui.label("recorded")
            ui.button("done", on_click=self._end)
        with ui.element("div").classes("views"):
            for name in self._map:
                with ui.element("div"):
                    ui.label(name).classes("text-subtitle1")
                    views[name] = ui.label().classes("off"), ui.label().classes("ways")
                    self.pictures([name, name + _GHOST])
        ui.label(f"The ways are for a lens that sees {ASSUMED_VIEW_DEG:.0f} degrees, {100 * ASSUMED_DISTANCE_M:.0f} cm from the scene.")

        def refresh() -> None:
            for name, (off, ways) in views.items():
                off.set_text(self._off[name])
                off.style(f"color: {self._colour[name]}")
                ways.set_text(self._ways[name])

        refresh()
        ui.timer(REFRESH_S, refresh)

    def _end(self) -> None:
        self.done = True


@contextlib.contextmanager
def opened(cameras: Mapping[str, CameraConfig]) -> Iterator[Callable[[], dict[str, np.ndarray]]]:
    """What reads the newest picture of each, uint8 RGB, but for cameras that give none now. Raises RobotError for one that cannot be opened. A drawn
    camera sees the arm in its home pose."""
    drawn = rendered(cameras)
    made = {name: glue.make_camera(name, camera) for name, camera in cameras.items() if not isinstance(camera, SimCameraConfig)}
    shown = RenderedCameras(drawn, "degrees") if drawn else None
    with contextlib.ExitStack() as stack:
        for name, camera in made.items():
            stack.callback(glue.disconnect_camera, camera)
            glue.open_camera(name, cameras[name], camera, _FIRST_MS)

        def read() -> dict[str, np.ndarray]:
            frames = {}
            for name, camera in made.items():
                with contextlib.suppress(Exception):  # lerobot raises many kinds for a cable that a hand has touched
                    frames[name] = glue.newest_frame(camera, _OLDEST_MS)[0]
            return {**frames, **(shown.frames(HOME_DEG) if shown else {})}

        yield read


def align(
    cameras: Mapping[str, CameraConfig], card: Card, camera_map: Mapping[str, str], sock: socket.socket, tell: Callable[[str], None]
) -> Look | None:
    """Until a person says that it is done. Returns the last look. `tell` gets the address. Raises RobotError."""
    hosts, token, url = names_of(sock)
    last: Look | None = None
    with opened(cameras) as read, ThreadPoolExecutor(1) as pool, AlignPage(sock, hosts, token, card, camera_map) as page:
        tell(f"page: {url}")
        looking: Future[Look] | None = None
        while not page.done:
            frames = read()
            page.see(frames)
            if looking is not None and looking.done():
                last, looking = looking.result(), None
                page.judge(last)
            if looking is None and frames:
                looking = pool.submit(look, card, {name: frame.copy() for name, frame in frames.items()}, camera_map)
            time.sleep(_READ_S)
    return last
