"""The page that a run leaves: whole in itself, nothing of the outside world in it, and nothing of a user's text taken for markup."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from control_fakes import Bench

from gr00t_fast.control.outputs import Outputs

pytest.importorskip("matplotlib")
HOSTILE = "<script>alert('x')</script> & \udcff"


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.append(data.strip())

    def pictures(self) -> dict[str, np.ndarray]:
        found = {}
        for tag, attributes in self.tags:
            if tag == "img":
                kind, _, content = attributes["src"].partition(";base64,")
                assert kind in ("data:image/png", "data:image/jpeg")
                found[attributes["alt"]] = cv2.imdecode(np.frombuffer(base64.b64decode(content), np.uint8), cv2.IMREAD_COLOR)
        return found


def page_of(bench: Bench, out: Path) -> Page:
    outputs = Outputs(out)
    bench.loop.observers = outputs.observers
    with outputs:
        bench.loop.run()
    outputs.write(bench.loop, {"lang_instruction": HOSTILE, "robot": {"type": "fake", "cameras": {"front": {"fps": 30}}}}, ["look <out>"])
    return Page((out / "report.html").read_text(encoding="utf-8"))


def test_the_page_holds_plots_pictures_table_and_settings(tmp_path: Path) -> None:
    bench = Bench(inference_s=0.2, timeout_s=2.0)
    bench.robot.cameras = {"front": type(bench.robot.cameras["front"])(1280, 720, 30.0)}
    page = page_of(bench, tmp_path)
    assert page.open == []
    pictures = page.pictures()
    assert set(pictures) == {"joints", "pace", "front, first", "front, last"}
    assert all(picture is not None for picture in pictures.values())
    assert pictures["front, first"].shape == (360, 640, 3), "large pictures are made smaller"
    for word in ("infer/network", "tick error", "elbow_flex", "robot.cameras.front.fps", "front, first", "look <out>", "200.00", "python"):
        assert word in page.text, word
    assert f"{len(bench.robot.sent)} ticks, 0 missed" in page.text[0]


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = page_of(Bench(timeout_s=0.5), tmp_path)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "form", "base", "a"}
    loading = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href") or name.startswith("on")]
    assert all(value.startswith("data:") for value in loading)
    assert "url(" not in "".join(page.text)
    assert any("default-src 'none'" in (attributes.get("content") or "") for tag, attributes in page.tags if tag == "meta")


def test_what_a_user_typed_is_text(tmp_path: Path) -> None:
    page = page_of(Bench(timeout_s=0.5), tmp_path)
    assert "script" not in {tag for tag, _ in page.tags}
    assert any("<script>alert('x')</script> & \\udcff" in text for text in page.text)


def test_a_run_that_played_nothing_leaves_no_page(tmp_path: Path) -> None:
    bench = Bench(dry_run=True)
    outputs = Outputs(tmp_path)
    bench.loop.run()
    outputs.write(bench.loop, {}, [])
    assert (tmp_path / "report.json").is_file()
    assert not (tmp_path / "report.html").exists()
