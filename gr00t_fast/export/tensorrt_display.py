"""Shows on standard error what the builder is doing: a moving line on a terminal, a line per stage elsewhere."""

from __future__ import annotations

import sys
import time

from gr00t_fast.export.tensorrt_build import BuiltStage, Progress

_WIDTH = 100


class Display(Progress):
    """A Progress that prints."""

    def __init__(self) -> None:
        super().__init__(self._stage, self._phase, self._finished)
        self._title, self._words, self._start_s = "", "", time.monotonic()
        self._moving = sys.stderr.isatty()

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()

    def _stage(self, name: str, index: int, count: int, reason: str) -> None:
        self._title, self._words, self._start_s = f"[{index + 1}/{count}] {name}", "", time.monotonic()
        self._line(f"{self._title}: building, {reason}")

    def _phase(self, name: str | None, done: float | None) -> None:
        if not self._moving:
            return
        if name is not None:
            self._words = name if done is None else f"{name} {done:.0%}"
        elapsed_s = time.monotonic() - self._start_s
        print(f"\r\x1b[K{f'{self._title} {elapsed_s:4.0f} s  {self._words}'[:_WIDTH]}", end="", file=sys.stderr, flush=True)

    def _finished(self, row: BuiltStage) -> None:
        if row.built:
            megabytes = row.facts["bytes"] / 1e6
            self._line(f"{self._title}: done in {time.monotonic() - self._start_s:.0f} s, {row.facts['layers']} layers, {megabytes:.1f} MB")

    def _line(self, text: str) -> None:
        self._clear()
        print(text, file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if self._moving:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
