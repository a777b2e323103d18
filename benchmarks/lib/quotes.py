"""Which sentence of which page quotes which number of which file in benchmarks/results. Where they differ tests/docs/test_figures.py fails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.lib.results import RESULTS
from gr00t_fast.base.files import read_json


@dataclass(frozen=True)
class Quote:
    """text: as the page has it, with a format in place of each number. keys: where each number stands in `file`, dotted; `100*KEY` is in per cent."""

    page: str
    file: str
    text: str
    keys: tuple[str, ...]

    def said(self) -> str:
        """The text with the file's numbers. Raises KeyError and OSError."""
        result = read_json(RESULTS / self.file, nan=True)
        return self.text.format(*(value_at(result, key) for key in self.keys))


def value_at(result: Any, key: str) -> Any:
    """`100*rows.0.rate` -> 100 times that number."""
    factor, star, path = key.rpartition("*")
    for name in path.split("."):
        result = result[int(name)] if isinstance(result, list) else result[name]
    return float(factor) * result if star else result


_README, _RESULTS, _CHECKPOINT = "README.md", "docs/results.md", "checkpoints/so100-sim-reach/README.md"
_FUSED, _N1D6, _LEROBOT = "bench_engines/n1.5_fp32.json", "bench_policy_n1d6_cpu.json", "bench_lerobot/n1d5.json"
_N1D5, _N1D7, _N1D5_BF16 = "bench_policy/n1.5_fp32.json", "bench_policy/n1.7_fp32.json", "bench_policy/n1.5_bf16.json"
_BF16, _TWO, _N1D7_BF16, _INT8 = (f"bench_engines/{name}.json" for name in ("n1.5_bf16", "n1.5_bf16_two_cameras", "n1.7_bf16", "n1.5_int8"))
_SYNC, _THREADED, _TRIALS = "evaluate/speed_up_sync.json", "evaluate/speed_up_threaded.json", "trials/sync_or_threaded.json"
_AB, _ARMS, _POLICIES = "ab_server/ab_server.json", "ab_server/arms.json", "simple_benchmark/simple_benchmark.json"
_LEROBOT_N1D7, _INT8_TWO, _VLA_CPP = "bench_lerobot/n1d7.json", "bench_engines/n1.5_int8_two_cameras.json", "bench_vla_cpp/n1.5_bf16.json"
_REACH, _OPEN_LOOP, _STEPS = "reach_real_time.json", "open_loop/eval.json", "evaluate/evaluate.json"
_STILL = ("100*rows.7.within.1.wilson_95.0", "100*rows.7.within.1.wilson_95.1", "rows.7.mean_time_s")
_RATIO = ("median", "p25", "p75")
_OF_POLICY = ("refill_ms.p50", "actions_per_chunk", "amortised_ms_per_tick")
_STAGES = ("vision", "language", "refine", "denoise", "total")
_AS_EAGER = tuple(f"engines.fused.times_as_fast_as.4.eager.{part}" for part in _RATIO)
_AS_INT8 = tuple(f"engines.openvino.times_as_fast_as.4.eager.{part}" for part in _RATIO)
_AS_LEROBOT = tuple(f"speed_up.{part}" for part in _RATIO)


def _within_1_s(row: int) -> tuple[str, ...]:
    at = f"rows.{row}"
    rates = (f"100*{at}.within.1.rate", f"100*{at}.within.1.wilson_95.0", f"100*{at}.within.1.wilson_95.1")
    return (*rates, f"{at}.mean_time_s", f"{at}.mean_time_95_s.0", f"{at}.mean_time_95_s.1")


def _engines(*names: str, steps: int = 4, of: str = "") -> tuple[str, ...]:
    """Medians of calls, ms; then how many times as fast as eager, and as `of`, `fused` is."""
    ratios = tuple(f"engines.fused.times_as_fast_as.{steps}.{other}.{part}" for other in ("eager", of) if other for part in _RATIO)
    return (*(f"engines.{name}.times_ms.{steps}.p50" for name in names), *ratios)


_TIMES, _OVER = "{:.2f} ({:.2f} to {:.2f})", ("reference", "eager", "fused")
_REACHED = "{:.1f} ({:.1f} to {:.1f}) | {:.2f} ({:.2f} to {:.2f})"
QUOTES = (
    Quote(_README, _BF16, "{:.2f} times as fast as eager in bf16 (quartiles {:.2f} to {:.2f})", _AS_EAGER),
    Quote(_README, _FUSED, "{:.2f} in fp32 (quartiles {:.2f} to {:.2f})", _AS_EAGER),
    Quote(_README, _N1D5_BF16, "{:.2f} times as fast as the reference's modules (quartiles {:.2f} to {:.2f})", _AS_LEROBOT),
    Quote(_README, _INT8, "{:.2f} times as fast as eager in bf16 (quartiles {:.2f} to {:.2f})", _AS_INT8),
    Quote(_README, _LEROBOT, "{:.2f} times as fast as 0.4.4 (quartiles {:.2f} to {:.2f})", _AS_LEROBOT),
    Quote(_README, _LEROBOT_N1D7, "{:.2f} times as fast as 0.6.1 (quartiles {:.2f} to {:.2f})", _AS_LEROBOT),
    Quote(_README, _REACH, "{} of {} layouts", ("run.episodes_solved", "run.episodes")),
    Quote(_README, _THREADED, "{:.1f} % where it infers while it moves", ("100*rows.0.within.1.rate",)),
    Quote(_README, _SYNC, "{:.1f} % where it waits", ("100*rows.1.within.1.rate",)),
    Quote(
        _README,
        _TRIALS,
        "{} of {} trials against {} of {}",
        tuple(f"result.settings.{arm}.{what}" for arm in "ba" for what in ("successes", "trials")),
    ),
    *(
        Quote(_RESULTS, file, "|{:.0f}|{:.0f}|{:.0f}|{:.0f}|{:.0f}|", tuple(f"times_ms.ours.{stage}.p50" for stage in _STAGES))
        for file in (_N1D5, _N1D6, _N1D7)
    ),
    Quote(_RESULTS, _N1D5, "**{:.2f} times** (quartiles {:.2f} to {:.2f}) as fast as the modules", _AS_LEROBOT),
    Quote(_RESULTS, _N1D5, "takes {:.1f} times the floor", ("total_over_floor",)),
    Quote(_RESULTS, _N1D5_BF16, "**{:.2f} times** (quartiles {:.2f} to {:.2f}) as fast as the modules in bf16", _AS_LEROBOT),
    Quote(_RESULTS, _N1D5_BF16, "takes {:.2f} times the floor", ("total_over_floor",)),
    *(
        Quote(_RESULTS, file, f"|{steps}|{{:.0f}}|{{:.0f}}|{{:.0f}}|{_TIMES}|{_TIMES}|", _engines(*_OVER, steps=steps, of="reference"))
        for file in (_BF16, _TWO)
        for steps in (4, 2)
    ),
    *(
        Quote(_RESULTS, file, f"|{steps}|-|{{:.0f}}|{{:.0f}}|{_TIMES}|-|", _engines("eager", "fused", steps=steps))
        for file, steps in ((_N1D7_BF16, 4), (_N1D7_BF16, 2), (_FUSED, 4))
    ),
    Quote(_RESULTS, _BF16, "`compiled` takes {:.0f} ms", ("engines.compiled.times_ms.4.p50",)),
    Quote(_RESULTS, "bench_policy/n1.5_int8.json", "takes {:.2f} times its floor", ("total_over_floor",)),
    Quote(_RESULTS, _INT8, "**{:.2f} times** (quartiles {:.2f} to {:.2f}) as fast as `eager`", _AS_INT8),
    Quote(_RESULTS, _INT8_TWO, "**{:.2f} times** (quartiles {:.2f} to {:.2f}) as fast", _AS_INT8),
    Quote(_RESULTS, _VLA_CPP, "**{:.2f} times** (quartiles {:.2f} to {:.2f}) as fast as vla.cpp's {:.0f} ms", (*_AS_LEROBOT, "times_ms.vla_cpp.p50")),
    Quote(_RESULTS, _VLA_CPP, "differ by {:.4f}", ("relative_difference",)),
    Quote(_RESULTS, _LEROBOT, "**{:.2f} times** (quartiles {:.2f} to {:.2f}", _AS_LEROBOT),
    Quote(_RESULTS, _LEROBOT_N1D7, "**{:.2f} times** (quartiles {:.2f} to {:.2f}", _AS_LEROBOT),
    *(
        Quote(_RESULTS, file, "{:.1f} s, lerobot's {:.1f} s", ("0.001*times_ms.gr00t_fast.p50", "0.001*times_ms.lerobot.p50"))
        for file in (_LEROBOT, _LEROBOT_N1D7)
    ),
    *(Quote(_RESULTS, file, "differ by up to {:.1f} degrees", ("difference_joint_units.largest",)) for file in (_LEROBOT, _LEROBOT_N1D7)),
    Quote(_RESULTS, _AB, "adds {:.1f} ms to a call of {:.1f} ms", ("alone.0.worth_ms.median", "arms.3.latency_ms.p50")),
    Quote(_RESULTS, _AB, "it takes {:.1f} ms", ("arms.0.latency_ms.p50",)),
    Quote(_RESULTS, _ARMS, "chunks of {:.2f} s", ("0.001*rows.0.chunk_ms",)),
    Quote(_RESULTS, _ARMS, "{:.1f} % came too late one at a time, together {:.1f} %", ("100*rows.0.missed_share", "100*rows.1.missed_share")),
    Quote(_RESULTS, _AB, "**{:.2f} times** (quartiles {:.2f} to {:.2f})", tuple(f"ratio.{part}" for part in _RATIO)),
    Quote(_RESULTS, _ARMS, "together {:.1f} requests a second, one at a time {:.1f}", ("rows.1.requests_per_s", "rows.0.requests_per_s")),
    *(
        Quote(_RESULTS, _POLICIES, f"|{name}|{{:.0f}}|{{}}|{{:.1f}}|", tuple(f"policies.{name}.{key}" for key in _OF_POLICY))
        for name in ("act", "smolvla", "diffusion_ddim", "gr00t")
    ),
    Quote(_RESULTS, _REACH, "**{} of {}** layouts", ("run.episodes_solved", "run.episodes")),
    Quote(_RESULTS, _REACH, "{:.2f} ms (p50) and {:.1f} ms (p99)", ("pacing.tick_error_ms.p50", "pacing.tick_error_ms.p99")),
    Quote(_RESULTS, _REACH, "{} of {} ticks were missed", ("pacing.missed_ticks", "run.ticks")),
    Quote(_RESULTS, _SYNC, _REACHED, _within_1_s(0)),
    Quote(_RESULTS, _SYNC, _REACHED, _within_1_s(1)),
    Quote(_RESULTS, _THREADED, _REACHED, _within_1_s(0)),
    Quote(
        _RESULTS,
        _TRIALS,
        "{} of {} blocks in time, the one that waits {} of {}",
        tuple(f"result.settings.{arm}.{what}" for arm in "ba" for what in ("successes", "trials")),
    ),
    Quote(_RESULTS, _OPEN_LOOP, "{:.2f} times what holding still errs", ("ratio_to_hold",)),
    Quote(
        _CHECKPOINT,
        _STEPS,
        "{} of {} are reached within 1 s (95 % interval {:.1f} to {:.1f} %), after {:.2f} s on average",
        tuple(f"rows.7.{key}" for key in ("within.1.successes", "episodes")) + _STILL,
    ),
    Quote(_RESULTS, _OPEN_LOOP, "{} held-out episodes ({} frames)", ("verdict.rests_on.episodes", "verdict.rests_on.frames")),
)
