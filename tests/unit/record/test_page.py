"""The page of a run, without a browser: addresses, who may come in, what a browser that hangs or a process that dies costs."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from control_fakes import Bench

from gr00t_fast.base import signals
from gr00t_fast.base.contracts import SO100_JOINTS, Observation
from gr00t_fast.base.errors import ArmAwayError, ConfigError
from gr00t_fast.base.keyboard import RIGHT
from gr00t_fast.base.signals import StopRequested, StopSignals
from gr00t_fast.control.modes import Mode
from gr00t_fast.control.trace import TickRecord

pytest.importorskip("nicegui")
pytest.importorskip("websockets")

from waiting import beside, until
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from gr00t_fast.record.page import DEFAULT_PORT, HERE, PageAddress, PageFacts, PageNote, PageView, listen, page_address
from gr00t_fast.record.page_server import PageServer, Rate, bars
from gr00t_fast.record.session import Session
from gr00t_fast.record.web import WebPage

SOCKET = "/_nicegui_ws/socket.io/?EIO=4&transport=websocket"
FRAMES = {"front": np.full((48, 64, 3), 90, np.uint8)}


def facts(hosts: tuple[str, ...], token: str) -> PageFacts:
    return PageFacts(SO100_JOINTS, "degrees", ("front",), 2, 8.0, {Mode.AWAY: 5.0}, hosts, token, "", False)


def tick(number: int, **named: Any) -> TickRecord:
    target = np.zeros(6)
    known = {"episode": 0, "time_s": number / 30, "inference_ms": 40.0, "stood": False, "age_ticks": 1, "underrun": False}
    known |= {"tick_error_ms": 0.1, "inferences": 1, "missed_ticks": 0}
    return TickRecord(number=number, target=target, commanded=target, **{"ahead": np.ones((4, 6)), **known, **named})


@contextlib.contextmanager
def shown(host: str = HERE) -> Iterator[PageView]:
    """A page that is ready, with a first tick; `said` is what went wrong."""
    said: list[str] = []
    with PageView(PageAddress(host, 0), facts, StopSignals(), said.append, said.append) as view:
        view.wait_until_ready()
        view.said = said
        view.see(Observation(np.zeros(6), FRAMES, 0.0), tick(0), Mode.PLAY)
        yield view


@pytest.fixture(scope="module")
def view() -> Iterator[PageView]:
    with shown() as page:
        yield page


@pytest.fixture(scope="module")
def public() -> Iterator[PageView]:
    """At an address that others reach, so with a token."""
    with shown("0.0.0.0") as page:
        yield page


def port_of(page: PageView) -> int:
    return int(page.url.split(":")[2].partition("/")[0])


def asked(page: PageView, path: str = "/", method: str = "GET", **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(HERE, port_of(page), timeout=10)
    connection.request(method, path, headers={"Host": f"{HERE}:{port_of(page)}", **headers})
    answer = connection.getresponse()
    answer.text = answer.read().decode(errors="replace")
    return answer


def connected(page: PageView, **options: Any) -> Any:
    port = port_of(page)
    return connect(f"ws://{HERE}:{port}{SOCKET}", **{"origin": f"http://{HERE}:{port}", "proxy": None, "close_timeout": 1, **options})


@pytest.mark.parametrize(
    ("text", "address"),
    {
        None: None,
        "off": None,
        "127.0.0.1:8100": PageAddress(HERE, DEFAULT_PORT),
        "8200": PageAddress(HERE, 8200),
        ":8200": PageAddress(HERE, 8200),
        "0.0.0.0:9000": PageAddress("0.0.0.0", 9000),
        "[::1]:9000": PageAddress("::1", 9000),
        "open": PageAddress(opens=True),
    }.items(),
)
def test_what_the_flag_means(text: str | None, address: PageAddress | None) -> None:
    assert page_address(text) == address


@pytest.mark.parametrize("text", ["http://localhost:80/", "localhost", "1:2:3", "127.0.0.1:70000", ""])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--page"):
        page_address(text)


def test_a_port_that_is_taken_is_refused_with_another_one() -> None:
    with socket.create_server((HERE, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=str(port + 1)):
            listen(PageAddress(HERE, port))


def test_who_asks_by_the_right_name_gets_the_page(view: PageView) -> None:
    assert asked(view).status == 200
    assert asked(view, Host=f"localhost:{port_of(view)}").status == 200


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("GET", {"Host": "evil.example"}, 403),  # a name that was made to lead here (DNS rebinding)
        ("GET", {"Host": "192.0.2.7"}, 403),
        ("GET", {"Host": ""}, 403),
        ("GET", {"Origin": "https://evil.example"}, 403),
        ("GET", {"Origin": "null"}, 403),
        ("POST", {}, 405),
        ("POST", {"Origin": "https://evil.example"}, 403),
        ("PUT", {}, 405),
    ],
)
def test_others_are_refused(view: PageView, method: str, headers: dict[str, str], status: int) -> None:
    assert asked(view, "/", method, **headers).status == status
    assert asked(view, SOCKET.replace("websocket", "polling"), method, **headers).status == status


@pytest.mark.parametrize("origin", ["https://evil.example", "http://127.0.0.1:1", None])
def test_another_site_gets_no_socket(view: PageView, origin: str | None) -> None:
    with pytest.raises(Exception, match="403"), connected(view, origin=origin):
        pass


def test_eight_browsers_and_no_more(view: PageView) -> None:
    with contextlib.ExitStack() as open_ones:
        for _ in range(8):
            open_ones.enter_context(connected(view))
        for _ in range(12):
            with pytest.raises(Exception, match="403"), connected(view):
                pass
        assert asked(view).status == 503
    until(lambda: asked(view).status == 200, "there is room again", 10.0)


def test_a_message_that_is_too_large_ends_the_connection(view: PageView) -> None:
    with connected(view) as browser:
        browser.recv(timeout=5)
        browser.send("4" + "x" * 200_000)
        with pytest.raises(ConnectionClosed, match="1009"):
            list(iter(browser.recv, None))
    assert asked(view).status == 200


def test_another_address_needs_the_token(public: PageView) -> None:
    token = public.url.partition("token=")[2]
    assert len(token) >= 16
    assert asked(public).status == 403
    assert asked(public, "/camera/front").status == 403
    assert asked(public, "/?token=" + "x" * len(token)).status == 403
    with pytest.raises(Exception, match="403"), connected(public):
        pass
    let_in = asked(public, f"/?token={token}")
    assert let_in.status == 303
    cookie = let_in.getheader("set-cookie")
    assert "HttpOnly" in cookie
    assert asked(public, Cookie=cookie.partition(";")[0]).status == 200
    assert asked(public, Cookie="a=b; " + cookie.partition("=")[0] + "=wrong").status == 403
    assert asked(public, f"/?token={token}", Host="evil.example").status == 403
    with connected(public, additional_headers={"Cookie": cookie.partition(";")[0]}) as browser:
        assert browser.recv(timeout=5)


def test_pictures_are_there_while_somebody_looks(view: PageView) -> None:
    with connected(view):

        def picture() -> bool:
            view.see(Observation(np.zeros(6), FRAMES, 0.0), tick(1), Mode.PLAY)
            return asked(view, "/camera/front").text.startswith("\ufffd\ufffd") and asked(view, "/camera/front").status == 200

        until(picture, "a picture", 10.0)
    assert asked(view, "/camera/other").status == 404
    assert asked(view, "/camera/../../etc/passwd").status == 404


def test_browsers_that_read_nothing_hold_up_no_tick() -> None:
    """Large pictures, eight sockets of which none is read, and a page process that is stopped for a while."""
    large, said = {"front": np.zeros((720, 1280, 3), np.uint8)}, []
    with shown() as page:
        page.sink.prepare(Observation(np.zeros(6), large, 0.0))
        open_ones = [socket.create_connection((HERE, port_of(page))) for _ in range(8)]
        for one in open_ones:
            one.sendall(f"GET / HTTP/1.1\r\nHost: {HERE}:{port_of(page)}\r\n\r\n".encode())
        took_s = []
        for number in range(200):
            if number == 50:
                os.kill(beside(), signal.SIGSTOP)
            if number == 150:
                os.kill(beside(), signal.SIGCONT)
            began_s = time.thread_time()  # what the loop's thread computes; a wait would show in the assertion below
            wall_s = time.monotonic()
            page.see(Observation(np.zeros(6), large, 0.0), tick(number), Mode.PLAY)
            took_s.append(time.thread_time() - began_s)
            assert time.monotonic() - wall_s < 2.0, "it waited"
            time.sleep(0.01)
        assert np.median(took_s) < 0.005
        for one in open_ones:
            one.close()
        said = page.said
    assert [line for line in said if "WARNING" in line] == []


def test_a_page_that_dies_is_said_and_changes_nothing() -> None:
    with shown() as page:
        os.kill(beside(), signal.SIGKILL)
        until(lambda: page.warnings, "it is said", 10.0)
        for number in range(100):
            page.see(Observation(np.zeros(6), FRAMES, 0.0), tick(number), Mode.PLAY)
        assert page.poll() == []
    assert "--page" in page.warnings[0]


def test_a_joint_that_cannot_be_read_is_shown_as_such() -> None:
    measured = np.array([0.0, np.nan, 10.0, np.inf, -200.0, 50.0])
    drawn = bars(SO100_JOINTS, "degrees", np.full(6, -100.0), np.full(6, 100.0), measured, tick(0))
    assert drawn.count("NaN") == 2
    assert 'width="nan"' not in drawn.lower()
    assert "inf" not in drawn
    assert "nan" not in bars(SO100_JOINTS, "degrees", np.zeros(6), np.full(6, np.nan), measured, None), "before the ranges are known"


def test_the_rate_is_that_of_rows_that_played() -> None:
    rate = Rate()
    for number in range(100):  # a second without actions in the middle
        rate.add(tick(number, underrun=30 <= number < 61))
    assert str(rate).startswith("30 Hz now")
    assert "0 in the worst second" in str(rate)
    rate.add(tick(100, episode=1))
    assert "Hz" not in str(rate), "a new episode"


@pytest.mark.parametrize("from_another_thread", [False, True])
def test_stop_means_put_down_and_pressed_anew_let_go(from_another_thread: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now_s[0])
    stop = StopSignals()

    def press(at_s: float) -> bool:
        """Whether the loop would obey now."""
        now_s[0] = at_s
        if from_another_thread:
            thread = threading.Thread(target=stop.press, args=("STOP",))
            thread.start()
            thread.join()
        else:
            stop.press("STOP")
        try:
            stop.check()
        except StopRequested:
            return True
        return False

    assert press(100.0)
    stop.begin_shutdown()
    assert not press(100.3), "a double click"
    assert not press(100.9), "too soon"
    assert press(102.0)
    assert stop.reason == "STOP"


def test_stop_interrupts_what_is_done_before_the_arm_is_powered() -> None:
    """As Ctrl-C does: a checkpoint takes a minute to load."""
    stop = StopSignals()
    threading.Timer(0.2, stop.press, ("STOP",)).start()
    began_s = time.monotonic()
    with pytest.raises(StopRequested, match="STOP"), stop, stop.raise_at_once():
        time.sleep(30.0)
    assert time.monotonic() - began_s < 10.0


def test_those_who_look_on_see_every_mode() -> None:
    """Also that the arm is away, and how it is put down; pictures only where there are new ones."""
    bench, seen = Bench(timeout_s=2.0), []
    observe, calls = bench.robot.observe, [0]

    def sometimes_away(with_frames: bool = True) -> Observation:
        calls[0] += 1
        if 20 <= calls[0] < 25:
            raise ArmAwayError("lost the port.", 5.0)
        return observe(with_frames)

    bench.robot.observe, bench.robot.rest_pose = sometimes_away, np.zeros(6)
    bench.loop.observers = [type("Watching", (), {"see": lambda self, observation, tick, mode: seen.append((mode, len(observation.frames), tick))})()]
    bench.loop.run()
    modes = [mode for mode, _, _ in seen]
    assert {Mode.HOLD, Mode.PLAY, Mode.AWAY, Mode.PUT_DOWN, Mode.RELEASED} <= set(modes)
    assert modes.count(Mode.AWAY) >= 4
    assert all(not pictures and record is None for mode, pictures, record in seen if mode in (Mode.AWAY, Mode.PUT_DOWN))
    assert all(pictures for mode, pictures, _ in seen if mode is Mode.PLAY)


def test_a_blinded_trial_shows_its_name_and_nothing_that_tells_its_setting() -> None:
    """Two ticks that differ in what settings make differ."""
    with socket.create_server((HERE, 0)) as listening:
        made = PageServer(lambda *words: None, listening, replace(facts((HERE,), ""), trial="trial 7 of 40"))
        made.ranges([[-100.0, 100.0]] * 6)
        seen = []
        for mode, inference_ms, left in ((Mode.PLAY, 40.0, 4), (Mode.HOLD, 900.0, 0)):
            record = replace(tick(3), inference_ms=inference_ms, ahead=np.ones((left, 6)), underrun=mode is Mode.HOLD)
            made.add(Observation(np.zeros(6), {}, 0.0), PageNote((record,), mode, f"go in {inference_ms} ms", "", ()))
            seen.append({name: value for name, value in vars(made.state).items()})
        WebPage.__exit__(made)
    assert seen[0] == seen[1]
    assert seen[0]["facts"] == "trial 7 of 40"


def test_a_double_click_counts_once() -> None:
    """A second "next" would end the pause in which hands are in the scene."""
    pressed, now_s = [[("key", RIGHT)], [("key", RIGHT)], [("key", RIGHT)]], [0.0]
    page = type("Pressed", (), {"poll": lambda self: pressed.pop(0)})()
    session = Session(StopSignals(), echo=lambda line: None, now_s=lambda: now_s[0], page=page)
    ended = []
    for now_s[0] in (0.0, 0.2, 1.5):
        session.over = False
        session.poll()
        ended.append(session.over)
    assert ended == [True, False, True]


def test_ticks_at_200_hz_fit_into_a_note() -> None:
    """With as many rows ahead as the loop shows."""
    with shown() as page:
        time.sleep(0.2)
        page.see(Observation(np.zeros(6), FRAMES, 0.0), tick(0), Mode.PLAY)
        for number in range(1, 31):
            page.see(Observation(np.zeros(6), FRAMES, 0.0), tick(number, ahead=np.ones((64, 6))), Mode.PLAY)
        time.sleep(0.2)
        page.see(Observation(np.zeros(6), FRAMES, 0.0), tick(31), Mode.PLAY)
        assert page.sink.dropped == 0
