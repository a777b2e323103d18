"""What the benchmarks and the training programs have in common: flags from a dataclass, a checkpoint to measure, turns, tables, files, plots and one
way to end.

Importing this needs the standard library and numpy alone: a bare GPU machine has no matplotlib.
"""

from __future__ import annotations

import json
import multiprocessing.connection
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gr00t_fast.base import measurement
from gr00t_fast.base.console import progress_bar
from gr00t_fast.base.contracts import NetworkName
from gr00t_fast.base.errors import ConfigError, MissingExtraError
from gr00t_fast.base.flags import help_text, parse_flags
from gr00t_fast.cli.main import guarded
from gr00t_fast.cli.others import FLAGS_OF_OTHERS

EXIT_DIFFERS, EXIT_USAGE = 1, 2
_RESULTS = Path(__file__).resolve().parents[1] / "results"

Result = dict[str, Any]
Config, T = TypeVar("Config"), TypeVar("T")
Size = tuple[int, int]  # width, height in pixels


@dataclass
class Flags:
    """What every benchmark takes. `out` is declared by each."""

    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: a GPU where there is one
    threads: int | None = None  # CPU threads of torch; default: torch's own choice
    seed: int = 0  # of everything that is drawn
    json: bool = False  # also print the result as one line of JSON, the last of the output


@dataclass
class PolicyFlags(Flags):
    """Those of `load_policy`, by its names."""

    model_path: Path | None = None  # checkpoint directory; default: one with random weights is made in --out
    embodiment_tag: str = "new_embodiment"  # which category weights and statistics of the checkpoint
    data_config: str | None = None  # of N1.5: so100, so100_dualcam, or module:ClassName of your own; default: so100
    denoising_steps: int | None = None  # steps from noise to action; default: the checkpoint's own
    precision: str = "auto"  # fp32, bf16, fp16; auto: bf16 where the device computes in it, else fp32
    engine: str = "auto"  # how the network is run; auto: fused on a CPU, else eager
    engine_path: Path | None = None  # directory of an export; default: exports/<engine> in the checkpoint's directory

    def options(self, *without: str) -> dict[str, Any]:
        """Keyword arguments for `load_policy`."""
        names = ("embodiment_tag", "data_config", "denoising_steps", "device", "precision", "engine", "engine_path", "processor_path", "seed")
        return {name: getattr(self, name, None) for name in names if name not in without}


@dataclass
class RandomFlags(PolicyFlags):
    """And which network has random weights where no checkpoint is given."""

    network: NetworkName = "n1.5"  # of the random checkpoint; a --model_path tells its own


def read_flags(config_class: type[Config], argv: Sequence[str] | None, doc: str) -> Config:
    """The command line as `config_class`. `--help` prints `doc` and every flag with its default, and ends the program; a mistake ends it with 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"--help", "--help-all", "-h"} & {word.partition("=")[0].replace("_", "-") for word in words}:
        print(help_text(config_class, doc.strip()))
        raise SystemExit(0)
    try:
        config, notes = parse_flags(config_class, words, others=FLAGS_OF_OTHERS)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USAGE) from None
    for note in notes:
        print(note, file=sys.stderr)
    return config


# --- where a result comes from, and what it is measured on ---------------------------------------------------------------------------------


def provenance(seed: int) -> Result:
    """Where a result comes from: machine, versions, commit, command and seed."""
    return {**measurement.provenance(), "seed": seed}


def checkpoint_of(arguments: Any, size: str = "demo", resolution: Size = (640, 480)) -> Path:
    """--model_path, or a checkpoint with random weights in --out, written once per --network, size, --data_config, --seed and resolution of the
    cameras. Raises ConfigError."""
    if arguments.model_path:
        return Path(arguments.model_path)
    from gr00t_fast.virtual.random_checkpoint import SO100_CONFIGS

    asked = getattr(arguments, "data_config", None)
    data_config = asked if asked in SO100_CONFIGS else "so100"  # a class of the user's own names cameras; loading says if so100 has them not
    return checkpoint_in(arguments.out, "checkpoint", size, data_config, arguments.seed, resolution, getattr(arguments, "network", "n1.5"))


def checkpoint_in(
    directory: Path,
    name: str,
    size: str,
    data_config: str = "so100",
    seed: int = 0,
    resolution: Size = (640, 480),
    network: NetworkName = "n1.5",
) -> Path:
    """The random checkpoint of these settings in `directory`, written once. Its name begins with `name` and tells what is not the default."""
    from gr00t_fast.virtual.random_checkpoint import write_random_checkpoint

    width, height = resolution
    told = ((network, "n1.5"), (data_config, "so100"), (f"seed{seed}", "seed0"), (f"{width}x{height}", "640x480"))
    path = directory / "-".join([name, size, *(text for text, default in told if text != default)])
    if not ((path / "config.json").exists() and any(path.glob("model*.safetensors"))):
        write_random_checkpoint(path, size, data_config, resolution, seed=seed, network=network)
    return path


def weights_of(arguments: Any) -> str:
    """The checkpoint's name, or that its weights are random."""
    return Path(arguments.model_path).name if arguments.model_path else "RANDOM"


def make_directory(out: Path) -> None:
    """--out, with its parents. Raises ConfigError where it cannot be one."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "it is a file" if out.is_file() else f"{error.strerror}"
        raise ConfigError(f"--out={out}: expected a directory to write to, but {why}. Name another.") from error


# --- while it runs -------------------------------------------------------------------------------------------------------------------------


def end_with_parent() -> None:
    """In a process that another one started with multiprocessing: end when that one does, also when it was killed and could tell nobody, and leave
    Ctrl-C, which a terminal sends to all, to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def in_processes(call: Callable[..., T], jobs: Iterable[tuple[Any, ...]], processes: int) -> Iterator[tuple[tuple[Any, ...], T]]:
    """(job, what `call(*job)` returned) as they come in. Raises what a job raises. Then, on Ctrl-C and when the caller stops, the processes are
    ended."""
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        try:
            running = {pool.submit(call, *job): job for job in jobs}
            for future in as_completed(running):
                yield running[future], future.result()
        except BaseException:
            for child in multiprocessing.active_children():
                child.kill()  # or leaving the pool would wait for what has begun
            raise


def shuffled_rounds(arms: Iterable[T], rounds: int, warm_up: int = 0, seed: int = 0, what: str = "rounds") -> Iterator[tuple[list[T], bool]]:
    """Each round's arms in an order drawn anew, so that a disturbance of the machine hits all alike and none always follows the same one; and whether
    the round counts. Shows progress."""
    order, arms = random.Random(seed), list(arms)
    with progress_bar(what, warm_up + rounds) as tick:
        for number in range(warm_up + rounds):
            yield order.sample(arms, len(arms)), number >= warm_up
            tick()


def times_in_turns(calls: Mapping[str, Callable[[], object]], rounds: int, warm_up: int, seed: int) -> dict[str, list[float]]:
    """Milliseconds of each call, by round."""
    times_ms: dict[str, list[float]] = {name: [] for name in calls}
    for order, counts in shuffled_rounds(calls, rounds, warm_up, seed):
        for name in order:
            began_s = time.perf_counter()
            calls[name]()
            if counts:
                times_ms[name].append(1e3 * (time.perf_counter() - began_s))
    return times_ms


# --- what it leaves ------------------------------------------------------------------------------------------------------------------------


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[object]], texts: int = 1) -> str:
    """The first `texts` columns to the left, figures to the right."""
    ruler = ["---"] * texts + ["--:"] * (len(columns) - texts)
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (columns, ruler, *rows))


def figure(value: float | None, digits: int = 2) -> str:
    """A number in a table; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


@contextmanager
def drawing(path: Path, title: str, rows: int = 1, columns: int = 1, size: tuple[float, float] = (8, 4), **options: Any) -> Iterator[Any]:
    """Axes (rows, columns) to draw on; a titled picture at `path` afterwards. Raises MissingExtraError without matplotlib."""
    from gr00t_fast.base.errors import require

    require("matplotlib", "plots").use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
    figure.suptitle(title, fontsize=10)
    try:
        yield axes
        figure.savefig(path, dpi=110)
    finally:
        plt.close(figure)


def finish(
    name: str,
    arguments: Any,
    run: Callable[[Any], Result],
    as_table: Callable[[Result], str],
    plot: Callable[[Result, Path], None] | None = None,
    exit_code: Callable[[Result], int] = lambda result: 0,
    interrupted: str = "interrupted: no result",
) -> int:
    """Run, print the table, and leave NAME.json, NAME.md and NAME.png in --out; with --json the result is the last line.
    Returns the exit code. Without matplotlib, as on a bare GPU machine, there is no picture."""
    if getattr(arguments, "threads", None):
        import torch

        torch.set_num_threads(arguments.threads)

    def study() -> int:
        if arguments.out.resolve().is_relative_to(_RESULTS):
            raise ConfigError(f"--out={arguments.out}: only `make figures` writes there, from an unchanged checkout. Name another directory.")
        make_directory(arguments.out)
        result = run(arguments)
        table = as_table(result)
        print(table)
        (arguments.out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (arguments.out / f"{name}.md").write_text(table + "\n", encoding="utf-8")
        if plot is not None:
            try:
                plot(result, arguments.out / f"{name}.png")
            except MissingExtraError as error:
                print(f"no plot: {error}", file=sys.stderr)
        print(f"written to {arguments.out}", file=sys.stderr)
        if getattr(arguments, "json", True):
            print(json.dumps(result))
        return exit_code(result)

    existed = arguments.out.exists()
    code = guarded(study, interrupted)
    if not existed:
        with suppress(OSError):  # something is in it
            arguments.out.rmdir()
    return code
