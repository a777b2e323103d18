"""The page of a run in a real browser, Chromium with its driver: `make test-page` installs both where it may.

GR00T_FAST_PAGE_STOPS=30 pytest tests/browser/test_page_browser.py -s    # STOP pressed thirty times on the virtual servo bus
GR00T_FAST_PAGE_PICTURES=DIR pytest tests/browser/test_page_browser.py   # keeps pictures of the page
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import virtual_camera

pytest.importorskip("nicegui")
pytest.importorskip("selenium", reason="drives the browser: pip install selenium")
pytest.importorskip("lerobot")

from drive import Drive, Programs
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from waiting import until

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
STOPS = int(os.environ.get("GR00T_FAST_PAGE_STOPS", "3"))
PICTURES = os.environ.get("GR00T_FAST_PAGE_PICTURES")
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
TAG = "Pick <b>up</b> the <script>cube</script>"

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with its driver: apt-get install chromium chromium-driver")


@pytest.fixture(scope="module")
def browser() -> Iterator[WebDriver]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1280,960", "--no-proxy-server"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    made = Programs(tmp_path_factory.mktemp("programs"))
    yield made
    made.close()


class Run(subprocess.Popen):
    """A command with a page; `url` once it is printed."""

    def __init__(self, *argv: str, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "gr00t_fast", *argv, "--page=127.0.0.1:0"]
        super().__init__(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment)
        self.lines, found = [], queue.SimpleQueue()

        def read() -> None:
            for line in self.stdout:
                self.lines.append(line)
                if line.startswith("page: "):
                    found.put(line.split()[1])
            found.put(None)

        self.reader = threading.Thread(target=read, daemon=True)
        self.reader.start()
        self.url = found.get(timeout=120)
        assert self.url, "".join(self.lines)


@contextlib.contextmanager
def running(*argv: str, environment: dict[str, str] | None = None) -> Iterator[Run]:
    with Run(*argv, environment=environment) as run:
        try:
            yield run
        finally:
            run.terminate()
            run.wait(60)
            run.reader.join(10)


def text_of(browser: WebDriver) -> str:
    return browser.execute_script("return document.body.innerText")


def shows(browser: WebDriver, words: str, patience_s: float = 20.0) -> None:
    until(lambda: words in text_of(browser), f"the page shows {words!r}", patience_s)


def button(browser: WebDriver, words: str):
    return next(found for found in browser.find_elements(By.TAG_NAME, "button") if words in found.text)


def pictures(browser: WebDriver) -> list[int]:
    """The widths of those that have come, 0 of others."""
    return browser.execute_script("return [...document.querySelectorAll('.cameras img')].map(i => i.naturalWidth)")


def keep(browser: WebDriver, name: str) -> None:
    if PICTURES:
        browser.save_screenshot(str(Path(PICTURES) / f"{name}.png"))


def test_a_run_is_seen_judged_and_stopped(browser: WebDriver) -> None:
    """The simulated scene without hardware or checkpoint, two cameras, several episodes."""
    with running("sim", "--task=place") as run:
        browser.get(run.url)
        until(lambda: len(pictures(browser)) == 2 and all(pictures(browser)), "both cameras, two seconds later on a quiet machine", 20.0)
        shows(browser, "playing the policy's actions")
        shows(browser, "Hz now")
        keep(browser, "page_desktop")
        for words, told in {"success": "marked: success", "failure": "marked: failure", "again": "played again"}.items():
            button(browser, words).click()
            shows(browser, told)
        browser.find_element(By.TAG_NAME, "input").send_keys(TAG)
        button(browser, "take it").click()
        shows(browser, "instruction of the next episode")
        button(browser, "next").click()
        until(lambda: TAG in text_of(browser).partition("episode ")[0], "the instruction, as text", 20.0)
        assert not browser.find_elements(By.TAG_NAME, "b"), "it is no HTML"
        button(browser, "pause").click()
        shows(browser, "paused, the arm holds its pose")
        time.sleep(0.8)  # sooner it would be a double click
        button(browser, "go on").click()
        shows(browser, "playing the policy's actions")
        button(browser, "STOP").click()
        shows(browser, "The run has ended")
        shows(browser, "ended by STOP on the page")
        keep(browser, "page_over")
        assert run.wait(60) == 0, "".join(run.lines)
    time.sleep(3.0)  # the server is gone by now
    assert "ended by STOP on the page" in text_of(browser), "what was shown stays"


def test_on_a_phone_stop_is_always_in_sight(browser: WebDriver) -> None:
    with running("sim", "--task=reach") as run:
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
        try:
            browser.get(run.url)
            until(lambda: any(pictures(browser)), "a camera", 20.0)
            keep(browser, "page_phone")
            for place in ("0", "document.body.scrollHeight"):
                browser.execute_script(f"window.scrollTo(0, {place})")
                box = button(browser, "STOP").rect
                scrolled = browser.execute_script("return window.scrollY")
                assert box["x"] >= 0
                assert box["x"] + box["width"] <= PHONE["width"]
                assert 0 <= box["y"] - scrolled <= PHONE["height"] - box["height"]
                assert box["height"] >= 48, "for a thumb"
                top = "return document.elementFromPoint(195, arguments[0]).closest('button')?.innerText"
                assert "STOP" in browser.execute_script(top, box["y"] - scrolled + box["height"] / 2), "nothing lies over it"
            assert browser.execute_script("return document.documentElement.scrollWidth") <= PHONE["width"], "nothing sticks out"
        finally:
            browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def address_of(drive: Drive) -> str:
    drive.says("page: http")
    return drive.words().partition("page: ")[2].split()[0]


def driven(programs: Programs, directory: Path, *flags: str) -> Drive:
    """A run on the virtual servo bus with the flags that a user gives."""
    argv = ["run", "--model_path=stands", "--embodiment_tag=new_embodiment", "--lang_instruction=go", "--page=127.0.0.1:0", *flags]
    return Drive(programs, directory, argv)


def click_stop(browser: WebDriver) -> float:
    """When the button was pressed, on the monotonic clock."""
    browser.execute_script("document.addEventListener('click', event => window.pressed_ms = Date.now(), {capture: true, once: true})")
    button(browser, "STOP").click()
    return browser.execute_script("return window.pressed_ms") / 1000 + time.monotonic() - time.time()


def test_stop_puts_the_arm_down_at_once(browser: WebDriver, programs: Programs, tmp_path: Path) -> None:
    """From the press to the first goal of the way down, as the servos got it."""
    took_ms = []
    for number in range(STOPS):
        drive = driven(programs, tmp_path / str(number))
        try:
            browser.get(address_of(drive))
            drive.moves(40.0)
            until(lambda bus=drive.bus: time.monotonic() - bus.goal_changes()[-1][0] > 0.5, "it has arrived", 20.0)
            pressed_s = click_stop(browser)
            until(lambda bus=drive.bus, at_s=pressed_s: bus.goal_changes()[-1][0] > at_s, "a goal of the way down", 20.0)
            took_ms.append(1000 * (next(at_s for at_s, _ in drive.bus.goal_changes() if at_s > pressed_s) - pressed_s))
            drive.ends()
            assert drive.status == 0, drive.words()
            assert drive.away_deg.max() < 4.0, "it was put down where it lay"
        finally:
            drive.close()
    print(f"STOP to the first goal of the way down, {STOPS} times: p50 {np.median(took_ms):.0f} ms, p95 {np.percentile(took_ms, 95):.0f} ms")
    assert np.median(took_ms) <= 150.0, took_ms


def test_stop_again_lets_go(browser: WebDriver, programs: Programs, tmp_path: Path) -> None:
    drive = driven(programs, tmp_path / "run", "--home_speed_deg_s=3")  # longer on its way down than a slow browser needs for two clicks
    try:
        browser.get(address_of(drive))
        drive.moves(30.0)
        click_stop(browser)
        shows(browser, "STOP AGAIN", 5.0)
        shows(browser, "lets go at once")
        time.sleep(1.2)  # sooner, it counts as the same press
        click_stop(browser)
        drive.ends()
        assert drive.away_deg.max() > 5.0, "on its way"
        assert set(drive.torque.values()) == {0}
    finally:
        drive.close()


def test_a_cable_that_is_away_is_said(browser: WebDriver, programs: Programs, tmp_path: Path) -> None:
    drive = driven(programs, tmp_path / "run", "--robot.reconnect_s=60")  # the cable is back when the page has been read, however slow that is
    try:
        browser.get(address_of(drive))
        drive.moves()
        drive.bus.unplug()
        shows(browser, "out of reach")
        shows(browser, "of 60 s")
        drive.bus.replug()
        shows(browser, "playing the policy's actions")
        click_stop(browser)
        drive.ends()
        assert drive.away_deg.max() < 4.0
    finally:
        drive.close()


# The cameras put back where they were (`gr00t-fast align`)


@pytest.mark.skipif(virtual_camera.compiler() is None, reason="needs a C compiler for the virtual camera (apt install gcc)")
def test_a_camera_that_is_turned_as_the_page_says_becomes_green(browser: WebDriver, tmp_path: Path) -> None:
    """A camera of the simulated scene is turned and rolled; a person follows the arrows."""
    pytest.importorskip("mujoco")
    from benchmarks.scene import Config, Displaced, Study
    from gr00t_fast.base.contracts import SO100_JOINTS
    from gr00t_fast.scene.card import Card

    study = Study(Config(recorded=10))
    Card(**vars(study.card) | {"joints": SO100_JOINTS, "cameras": {"front": study.card.cameras["front"]}}).save(tmp_path / "card.npz")
    virtual_camera.build_plugin(tmp_path)
    turned = np.array([0.0, 4.0, -3.0])  # up, left, counterclockwise

    def place() -> None:
        virtual_camera.write_camera(tmp_path, 0, study.film("front", 40, Displaced(turn_deg=tuple(turned)))[..., ::-1])

    def off() -> str:
        return browser.execute_script("return document.querySelector('.off').innerText")

    def ways() -> str:
        return browser.execute_script("return document.querySelector('.ways').innerText")

    place()
    camera = "{front: {type: opencv, index_or_path: 0, width: 640, height: 480}}"
    words = ["align", f"--recordings={tmp_path / 'card.npz'}", "--robot.type=so100_follower", f"--robot.cameras={camera}"]
    with running(*words, environment=virtual_camera.plugin_environment(tmp_path)) as run:
        browser.get(run.url)
        until(lambda: len(pictures(browser)) == 2 and all(pictures(browser)), "the picture and its ghost", 30.0)
        until(lambda: "pixels off" in off() and ways(), "how far it is off, and the way back", 30.0)
        seen = [off()]
        keep(browser, "align_off")
        for _ in range(12):
            if "as in the recordings" in ways():
                break
            for sign, axis, word in ((-1, 1, "to the right"), (1, 1, "to the left"), (-1, 0, "down"), (1, 0, "up")):
                turned[axis] += sign * sum(map(float, re.findall(rf"turn it ([\d.]+) degrees {word}", ways())))
            for sign, word in ((-1, "clockwise"), (1, "counterclockwise")):
                turned[2] += sign * sum(map(float, re.findall(rf"roll it ([\d.]+) degrees {word}", ways())))
            place()
            until(lambda: off() != seen[-1], f"turned to {turned}, after {seen}: the number follows", 20.0)
            time.sleep(2.0)  # of the new place alone
            seen.append(off())
        numbers = [float(text.split()[0]) for text in seen]
        assert "as in the recordings" in ways(), (seen, ways(), turned)
        assert numbers[-1] < 0.2 * numbers[0]
        assert np.abs(turned).max() < 0.5
        keep(browser, "align_right")
        virtual_camera.set_state(tmp_path, 0, virtual_camera.READS_HANG)
        until(lambda: "no picture" in off(), "that the camera is silent", 20.0)
        virtual_camera.set_state(tmp_path, 0, virtual_camera.RUNNING)
        until(lambda: "pixels off" in off(), "that it is back", 20.0)
        button(browser, "DONE").click()
        assert run.wait(30) == 0, "".join(run.lines)
