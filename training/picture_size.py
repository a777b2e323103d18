"""Sizes of pictures as flags and messages write them: WIDTHxHEIGHT, in pixels."""

from __future__ import annotations

import argparse
import re

Size = tuple[int, int]  # width, height


def parse_size(text: str) -> Size:
    """`320x240` -> (320, 240). Raises argparse.ArgumentTypeError for anything else, so that it can be a flag's type."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT in pixels such as 320x240, got '{text}'")
    return int(found[1]), int(found[2])


def size_text(size: Size) -> str:
    """(320, 240) -> `320x240`."""
    return f"{size[0]}x{size[1]}"
