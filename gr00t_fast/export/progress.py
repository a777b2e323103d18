"""Progress of minutes of work: a bar on a terminal, one line per part elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Progress:
    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        """Yields what to call after each of `total` pieces."""
        if sys.stderr.isatty():
            from tqdm import tqdm

            with tqdm(total=total, desc=name, leave=False) as bar:
                yield lambda: bar.update() and None
            return
        start_s = time.perf_counter()
        yield lambda: None
        print(f"{name}: {total} in {time.perf_counter() - start_s:.1f} s", file=sys.stderr, flush=True)
