"""When to ask the policy for a chunk, and which of its rows is due at a tick. Time is counted in ticks of the policy's rate.

A chunk knows the tick of its observation; its row i is for i ticks later. While the policy was computing, the arm moved on: a chunk that arrives d
ticks later is entered at row d, the action that is due now. Where the arm has stood still meanwhile, it is entered at its first row.

There is one number, the *lead*: a chunk is asked for when so many rows or fewer are left. With a lead of 0 the arm waits for each inference; with a
longer one it moves meanwhile. The policy runs in a worker's thread, one call at a time.

Axis alphabet of this file: J joints of the arm.
"""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from statistics import median_low
from typing import Any, Literal

import numpy as np

from gr00t_fast.base.contracts import ActionChunk, ActionPrefix, Clock, Observation, Policy
from gr00t_fast.base.errors import ConfigError, InferenceTimeoutError, UnsafeActionError, check_ranges
from gr00t_fast.base.measurement import percentiles
from gr00t_fast.base.worker import ThreadWorker, Worker
from gr00t_fast.control.binding import RobotBinding

# How long the arm may hold its pose because no action is left. With half a second of actions still to play, an inference that hangs leads to
# torque off within three seconds.
DEFAULT_MAX_HOLD_S = 2.0
_WARM_UP_LIMIT_S = 600.0  # for another instruction: engines that compile take minutes
# Where inference takes seconds (a CPU), the arm waits so many times the median of the last ones: garbage, a busy machine, a cold cache. Not times the
# slowest, of which each slow one would allow a slower one.
USUAL_TIMES = 3.0
_DELAY_WINDOW = 20  # chunks, some seconds: a spike must not count for longer
_USUAL_WINDOW = 5  # chunks whose median says whether the arm moves during inferences: three in a row change that
_TELL_AFTER_S = 2.0  # longer than one or two late chunks last


@dataclass(frozen=True)
class PlannerOptions:
    """Whether and how inference and motion overlap; fields are flags.

    controller: sync: the arm waits for each inference; threaded: it moves meanwhile, and whenever no inference runs the next one begins; auto:
    threaded where a chunk bridges an inference, else sync.
    smoothing: how a chunk joins the one before: the policy continues it (see Policy.continues).
    max_hold_s: how long the arm may hold its pose for want of actions before the run ends, or USUAL_TIMES an ordinary inference where that is longer;
    None: no limit (the policy has one of its own).
    action_horizon: rows of a chunk that may play; None: all the policy returns.
    """

    controller: Literal["auto", "sync", "threaded"] = "auto"
    smoothing: Literal["none", "prefix"] = "none"
    max_hold_s: float | None = DEFAULT_MAX_HOLD_S
    action_horizon: int | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError for what excludes each other or makes no sense."""
        check_ranges(self, max_hold_s=(0.05, 3600.0), action_horizon=(1, 1e6))
        if self.controller == "sync" and self.smoothing != "none":
            raise ConfigError(f"--smoothing={self.smoothing} needs --controller=auto or threaded: only there inference overlaps the motion.")

    @property
    def continuing(self) -> bool:
        return self.smoothing != "none"


@dataclass(frozen=True)
class PolicyRunner:
    """A policy with what turns its answer into targets for one arm and one instruction."""

    policy: Policy
    binding: RobotBinding
    instruction: str
    clock: Clock

    def infer(self, observation: Observation, **options: Any) -> tuple[ActionChunk, dict[str, np.ndarray]]:
        """One inference: the chunk in robot order, and the policy's answer as it came. `options` go to `get_action`. Raises what that
        raises, and UnsafeActionError as `RobotBinding.action_targets`."""
        began_s = self.clock.now_s()
        actions = self.policy.get_action(self.binding.policy_observation(observation, self.instruction), **options)
        inference_ms = 1000 * (self.clock.now_s() - began_s)
        return ActionChunk(self.binding.action_targets(actions), inference_ms, dict(self.policy.last_timing)), actions


@dataclass(frozen=True)
class TimedChunk:
    """A chunk and where it belongs. observed: the tick of its observation. actions: the policy's own answer, rows aligned with `chunk.targets`: the
    next inference may continue it. horizon: how many rows may play; None: all."""

    chunk: ActionChunk
    observed: int
    actions: Mapping[str, np.ndarray] = field(default_factory=dict)
    horizon: int | None = None


@dataclass(frozen=True)
class DueTarget:
    """The target (J,) of a tick, and the ticks since the observation behind it."""

    target: np.ndarray
    age_ticks: int


class ChunkBuffer:
    """Plays the chunk of the newest observation, each row at its tick. Pure bookkeeping: the same calls give the same answers.

    entered, expired: chunks that played, and that came when every row was over.
    """

    def __init__(self, in_order: bool = False) -> None:
        """`in_order`: the rows of ticks that the loop missed are not left out; a recording is not about the present."""
        self.entered = self.expired = 0
        self._in_order = in_order
        self.clear()

    def clear(self) -> None:
        """Nothing of what was planned plays any more."""
        self._chunk: TimedChunk | None = None  # the one that plays
        self._origin, self._rows = 0, 0  # the tick of its row 0, and the row after its last
        self._last_tick = -1

    def offer(self, chunk: TimedChunk, tick: int, stood: bool) -> bool:
        """A chunk of a later observation than those before is there and may play from `tick` on. `stood`: the arm has stood still since that
        observation. Returns whether a row of it is left then."""
        elapsed, rows = 0 if stood else tick - chunk.observed, len(chunk.chunk.targets)
        if elapsed >= rows:
            self.expired += 1
            return False
        self.entered += 1
        self._chunk, self._origin = chunk, tick - elapsed
        self._rows = rows if chunk.horizon is None else min(rows, elapsed + chunk.horizon)
        return True

    def due(self, tick: int) -> DueTarget | None:
        """The target of `tick`, or None when no row is for it. Ticks must increase."""
        if self._chunk is None:
            return None
        if self._in_order and self._origin <= self._last_tick:
            self._origin += tick - self._last_tick - 1
        self._last_tick = tick
        row = tick - self._origin
        return DueTarget(self._chunk.chunk.targets[row], tick - self._chunk.observed) if row < self._rows else None

    def leftover(self, tick: int | None = None) -> dict[str, np.ndarray]:
        """What the playing chunk holds from `tick` on (None: behind the last row that was due), as the policy's own arrays; empty when it has run
        out."""
        tick = max(self._origin, self._last_tick + 1) if tick is None else tick
        if self._chunk is None or not self.rows_left(tick):
            return {}
        return {key: values[tick - self._origin : self._rows] for key, values in self._chunk.actions.items()}

    def rows_left(self, tick: int) -> int:
        """How many rows are left from `tick` on."""
        return 0 if self._chunk is None else max(self._origin + self._rows - tick, 0)

    def ahead(self, tick: int, rows: int) -> np.ndarray:
        """The targets (L, J) of the chunk that plays from `tick` on, at most `rows`; L 0 when it has run out."""
        if self._chunk is None:
            return np.empty((0, 0), np.float32)
        return self._chunk.chunk.targets[tick - self._origin : self._rows][:rows]


class Planner:
    """Asks for chunks and says what is due. One thread calls it; the policy, its reset included, runs in the worker only. Nothing here waits but
    `warm_up`.

    buffer: the chunk that plays. lead: the next one is asked for when so many rows or fewer are left; 0: the arm waits for each. limit_s: how long
    the arm may hold for want of one.
    """

    def __init__(
        self,
        policy: Policy,
        binding: RobotBinding,
        instruction: str,
        clock: Clock,
        fps: float,
        options: PlannerOptions | None = None,
        worker: Worker | None = None,
        recoverable: tuple[type[Exception], ...] = (),
        echo: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`recoverable`: errors of the policy after which the arm holds and the next observation is tried (a server that restarts, which tells of
        waiting itself); others end the run. `echo` gets a line about what `auto` chooses and why. Raises ConfigError."""
        self.options = options or PlannerOptions()
        if self.options.continuing and not policy.continues:
            raise ConfigError(
                f"--smoothing={self.options.smoothing} needs a policy that can continue a chunk; {type(policy).__name__} cannot. "
                "Use --engine=eager, or --smoothing=none."
            )
        self._runner = PolicyRunner(policy, binding, instruction, clock)
        self._fps, self._clock, self._recoverable, self._echo = fps, clock, recoverable, echo
        self._worker = worker or ThreadWorker()
        self.buffer = ChunkBuffer(in_order=not policy.computes)
        self._call: Future[Any] | None = None  # what runs, or has ended and was not taken yet
        self._dropped = self._dropped_before = False  # whether what the call that runs makes is over already, and that of the call before was
        self._getting_ready: tuple[str, float] | None = None  # the next instruction, and until when the policy may take for it
        self._warming_up = False  # whether it has begun
        self._rest: Mapping[str, np.ndarray] = {}  # of a recording that was interrupted
        self._reset_policy = self._played = False
        self._idle = True  # whether no row was left when the call that runs was made
        self._recent_ticks: deque[int] = deque(maxlen=_DELAY_WINDOW)  # from an observation to the tick its chunk is there
        self._recent_s: deque[float] = deque(maxlen=_DELAY_WINDOW)  # what an inference took
        self._lost_inferences = self._rows = 0  # rows: of the last chunk
        self._delays = array("q")
        self._left_running = False
        self._overlapped: bool | None = None  # what was said last of `auto`
        self._reason = ""

    @property
    def instruction(self) -> str:
        """What the robot shall do."""
        return self._runner.instruction

    def warm_up(self) -> Mapping[str, float]:
        """Pay first-call costs in the worker's thread, for thread pools and library handles belong to a thread; returns what `Policy.warm_up` does,
        and raises what it raises. Waits for it; the arm is not connected yet.

        The first chunk continues none and is cheaper to make than those after it: the delay of these is taken from here."""
        call = self._worker.submit(lambda: self._runner.policy.warm_up(self.instruction, self.options.continuing))
        call.exception()
        timing_ms: Mapping[str, float] = call.result()
        if "total" in timing_ms:
            self._note(timing_ms["total"] / 1000)
        if self.options.controller == "auto":
            self._say_choice()
        return timing_ms

    def instruct(self, instruction: str) -> None:
        """Another instruction for the episodes to come; between episodes only. `getting_ready` says when the policy is ready for it."""
        self._getting_ready, self._warming_up = (instruction, self._clock.now_s() + _WARM_UP_LIMIT_S), False

    def getting_ready(self) -> bool:
        """Whether the policy still makes itself ready for a new instruction: for minutes where it compiles. Raises what the policy raises about the
        instruction, which stays the old one then, and InferenceTimeoutError when that takes longer than ten minutes."""
        if self._getting_ready is None:
            return False
        instruction, end_s = self._getting_ready
        if self._call is not None and not self._call.done():
            if self._clock.now_s() >= end_s:
                raise self.timed_out(_WARM_UP_LIMIT_S, "the policy still makes itself ready for the instruction")
            return True
        if not self._warming_up:  # nothing of the last episode runs any more
            self._call, self._warming_up = self._worker.submit(lambda: self._runner.policy.warm_up(instruction, self.options.continuing)), True
            return True
        call, self._call, self._getting_ready = self._call, None, None
        call.result()  # type: ignore[union-attr]  # it was submitted above
        self._runner = dataclasses.replace(self._runner, instruction=instruction)
        return False

    def reset(self) -> None:
        """An episode begins; the policy is reset before its next call."""
        self.expire()
        self._runner.binding.reset()
        self._reset_policy, self._rest = True, {}
        self._played = self._dropped_before = False

    def expire(self, forget: bool = False) -> None:
        """What was planned is over, also what an inference under way makes of it. What was recorded goes on where it stopped: the next call of such a
        policy gets the rest to continue. `forget`: it was no inference that held up the program."""
        self._dropped_before &= not forget
        if not self._runner.policy.computes:
            self._rest = self.buffer.leftover() or self._rest
        self.buffer.clear()
        self._dropped = self._call is not None

    # At each tick

    def arrived(self, tick: int, holding: bool) -> ActionChunk | None:
        """Take what the worker has finished; it may play from `tick` on. `holding`: the arm had nothing to play at the tick before. Returns the chunk
        that was entered. Raises the policy's error, and ConfigError where the arm is to move during inferences and the first one takes so long that
        no row of a later chunk would be left."""
        if self._call is None or not self._call.done():
            return None
        call, self._call = self._call, None
        try:
            timed: TimedChunk = call.result()
        except self._recoverable:
            if not self._played and not self._dropped:
                raise  # there is nothing to hold yet
            self._lost_inferences += 1
            self._dropped = False
            return None
        # An inference that itself holds up the program for so long that its plan is over is not made for ever.
        self._dropped, self._dropped_before = False, self._dropped and not self._dropped_before
        if self._dropped_before:
            self._reset_policy |= not self._played
            return None
        self._rows = len(timed.chunk.targets)
        self._note(timed.chunk.inference_ms / 1000, max(1, tick - timed.observed))
        if not self.buffer.offer(timed, tick, self._idle and holding):
            return None
        self._played, self._rest = True, {}
        return timed.chunk

    def want_inference(self, tick: int) -> bool:
        """Whether to ask now: nothing runs, and `lead` rows or fewer are left after `tick`."""
        return self._call is None and self.buffer.rows_left(tick + 1) <= self.lead

    def ask(self, observation: Observation, tick: int) -> None:
        """Begin the inference of the next chunk, from an observation made at `tick` after its target was sent."""
        left = self.buffer.rows_left(tick + 1)
        self._idle = not left
        prefix = ActionPrefix(self._rest, 0) if self._rest else self._prefix(tick) if left else None
        options: dict[str, Any] = {} if prefix is None else {"prefix": prefix}
        if left and self._runner.policy.takes_deadline:
            options["deadline_s"] = left / self._fps  # until the arm has no action left
        runner, horizon = self._runner, self.options.action_horizon
        reset, self._reset_policy = self._reset_policy, False

        def infer() -> TimedChunk:
            if reset:
                runner.policy.reset()
            chunk, actions = runner.infer(observation, **options)
            if horizon is not None and len(chunk.targets) < horizon:
                raise UnsafeActionError(
                    f"the policy returned {len(chunk.targets)} actions, fewer than the {horizon} to be executed (--action_horizon). "
                    "Load the policy with the same action horizon."
                )
            return TimedChunk(chunk, tick, actions, horizon)

        self._call = self._worker.submit(infer)

    def remember(self, observation: Observation) -> None:
        """Each tick's observation, as it comes: what a policy that reads earlier ones will be shown."""
        self._runner.binding.remember(observation)

    # How long inferences take, and what follows

    @property
    def lead(self) -> float:
        """Rows."""
        if self.options.controller == "sync":
            return 0.0
        if self.options.controller == "threaded":
            return math.inf
        usual = median_low([*self._recent_ticks][-_USUAL_WINDOW:] or [1])
        # As many rows are over on arrival as play until the next one. How many there are may not be known before the first. A chunk that is to be
        # continued must be there still.
        bridged = (usual if self.options.continuing else 2 * usual) <= (self._horizon or math.inf)
        return math.inf if bridged else 0.0

    @property
    def limit_s(self) -> float:
        """How long the arm may hold its pose for want of actions; infinite without a limit."""
        if self.options.max_hold_s is None:
            return math.inf
        return max(self.options.max_hold_s, USUAL_TIMES * median_low(self._recent_s) if self._recent_s else 0.0)

    @property
    def tell_after_s(self) -> float:
        """How long the arm may hold its pose before that is worth a word; infinite where the policy speaks for itself."""
        if self._recoverable:
            return math.inf
        usual_s = median_low(self._recent_s) if self._recent_s else 0.0
        return min(max(_TELL_AFTER_S, 2 * usual_s), self.limit_s / 2)

    def timed_out(self, limit_s: float, why: str) -> InferenceTimeoutError:
        """The error that ends a run whose arm has held its pose for too long."""
        return InferenceTimeoutError(
            f"the arm has held its pose for {limit_s:.1f} s, as long as --max_hold_s and {USUAL_TIMES:g} times an ordinary inference allow: "
            f"{why}, because inference hangs or comes too late. Check the device (nvidia-smi, dmesg); for one that pauses now and then give a longer "
            "--max_hold_s, or null for no limit."
        )

    def summary(self) -> dict[str, Any]:
        """Figures for the report, JSON-ready; `kind` says whether the arm waits for inferences (sync) or moves meanwhile (threaded)."""
        return {
            "kind": "threaded" if self.lead else "sync",
            "smoothing": self.options.smoothing,
            "chunks_entered": self.buffer.entered,
            "chunks_expired": self.buffer.expired,
            "lost_inferences": self._lost_inferences,
            "delay_ticks": percentiles(self._delays),
            "inference_left_running": self._left_running,
            **({"chosen_because": self._reason} if self.options.controller == "auto" else {}),
            **self._runner.policy.summary(),
        }

    def close(self, timeout_s: float) -> bool:
        """Take no more observations; called once the arm has landed. Never raises. False when an inference still runs after `timeout_s`."""
        self._left_running = not self._worker.close(timeout_s)
        return not self._left_running

    def _prefix(self, tick: int) -> ActionPrefix | None:
        """What the new chunk shall continue; None when that is nothing, or nothing to rely on (the policy returned NaN)."""
        left = self.buffer.leftover(tick) if self.options.continuing else {}
        if not left or not all(np.isfinite(values).all() for values in left.values()):
            return None
        rows = min(len(values) for values in left.values())
        return ActionPrefix(left, min(self._expected_ticks, rows))

    def _note(self, inference_s: float, ticks: int | None = None) -> None:
        """An inference has taken so long, and its chunk was there `ticks` after its observation; None: it was no chunk's."""
        self._recent_s.append(inference_s)
        first = not self._delays
        if ticks is not None:
            self._delays.append(ticks)
        took = max(1, math.ceil(inference_s * self._fps))
        self._recent_ticks.append(took if ticks is None else ticks)
        if ticks is not None and first and self.options.controller == "threaded" and took >= self._horizon:
            raise ConfigError(
                f"an inference takes {took} ticks at {self._fps:g} Hz, but a chunk has {self._horizon} actions: all would be over when it "
                "arrives. Leave --action_horizon out if it was given, or use --controller=sync or auto (the arm waits), a lower --fps or a faster "
                "device."
            )
        if ticks is not None and self.options.controller == "auto":
            self._say_choice()

    @property
    def _expected_ticks(self) -> int:
        """A row that plays but was not committed is a jump; one committed too many only fades a little later: the longest (as Black et al.)."""
        return max(self._recent_ticks, default=1)

    def _say_choice(self) -> None:
        overlapped = self.lead > 0
        if overlapped is self._overlapped:
            return
        self._overlapped, took = overlapped, f"an inference takes up to {1000 * self._expected_ticks / self._fps:.0f} ms"
        bridges = f"and {self._horizon} actions per chunk bridge it" if overlapped else f"which {self._horizon} actions per chunk do not bridge"
        does = "the arm moves while the next chunk is computed" if overlapped else "the arm waits for each inference"
        self._reason = f"{took}, {bridges}"
        self._echo(f"controller: {does}, because {self._reason} (--controller=auto)")

    @property
    def _horizon(self) -> int:
        """Actions of a chunk that may play; 0: not known yet."""
        policy = self._runner.policy
        trained = 0 if policy.metadata is None else policy.metadata.trained_horizon
        return self.options.action_horizon or policy.action_horizon or trained or self._rows
