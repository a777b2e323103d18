"""What long work shows on standard error: bars on a terminal, and one line per part elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def byte_bar(name: str) -> Iterator[Callable[[int, int], None] | None]:
    """Yields what to call with the bytes done and in all; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, desc=name, leave=False) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


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
