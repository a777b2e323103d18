"""What long work shows on standard error: bars on a terminal, elsewhere a line per part and one every ten seconds of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TELL_EVERY_S = 10.0


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
        start_s = said_s = time.perf_counter()
        done = 0

        def tick() -> None:
            nonlocal done, said_s
            done += 1
            if done < total and time.perf_counter() - said_s > TELL_EVERY_S:
                said_s = time.perf_counter()
                print(f"{name}: {done} of {total} after {said_s - start_s:.0f} s", file=sys.stderr, flush=True)

        yield tick
        print(f"{name}: {total} in {time.perf_counter() - start_s:.1f} s", file=sys.stderr, flush=True)
