"""Which layers 8 bits hurt, measured where it counts: on the actions, in joint units.

Layers at the same place of every block are one group (`vision blocks.*.mlp.down`). Each group alone is rounded, everything else stays fp32, and the
actions are compared. Then all groups together; as long as that is above the limit, the group with the most squared error per multiplication goes
back to 16 bit. Groups with a negligible share of the multiplications stay in 16 bit without being asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from gr00t_fast.export.action_error import ActionError, action_error
from gr00t_fast.export.linear_layers import Graph
from gr00t_fast.export.qdq import LayerPlan, quantised_graph
from gr00t_fast.export.stage_chain import REFERENCE, STAGES, OrtStage, StageChain
from gr00t_fast.transforms import ActionTransform

T = TypeVar("T")
NEGLIGIBLE = 0.002  # share of all multiplications of an inference: nothing to gain from 8 bits
_TRIAL = "trial"


@dataclass(frozen=True)
class Group:
    """Layers of one stage at the same place of every block, and their share of an inference's multiplications."""

    stage: str
    kind: str
    labels: tuple[str, ...]
    work: float

    @property
    def name(self) -> str:
        return f"{self.stage} {self.kind}"


@dataclass(frozen=True)
class Verdict:
    """What a group does alone (None: not measured), and why it is kept in 16 bit, if it is."""

    group: Group
    alone: ActionError | None
    kept: str | None


class Trier(Protocol):
    """Runs the network with some layers rounded."""

    def error(self, groups: Iterable[Group]) -> ActionError: ...


class Trials:
    """A Trier: runs the chain with some layers rounded. The reference variant must have been run for the chain's samples."""

    def __init__(
        self, chain: StageChain, graphs: Mapping[str, Path], plans: Mapping[str, Mapping[str, LayerPlan]], scheme: str, transform: ActionTransform
    ) -> None:
        """graphs: stage -> fp32 file; plans: stage -> label -> plan."""
        self._chain, self._graphs, self._plans, self._scheme, self._transform = chain, graphs, plans, scheme, transform

    def error(self, groups: Iterable[Group]) -> ActionError:
        chosen: dict[str, list[str]] = {stage: [] for stage in STAGES}
        for group in groups:
            chosen[group.stage] += group.labels
        reads = REFERENCE
        for stage in STAGES:
            if not chosen[stage] and reads == REFERENCE:
                continue  # nothing has changed up to here
            self._chain.run(stage, OrtStage(self._graph(stage, chosen[stage])), reads, _TRIAL)
            reads = _TRIAL
        truth, noise = self._chain.actions(REFERENCE), np.concatenate([sample.noise for sample in self._chain.samples])
        return action_error(self._chain.actions(reads), truth, noise, self._transform)

    def _graph(self, stage: str, labels: list[str]) -> Graph:
        """In memory: of a trial only the 8-bit weights are new."""
        graph = Graph(self._graphs[stage])
        if labels:
            quantised_graph(graph, {label: self._plans[stage][label] for label in labels}, self._scheme)
        return graph


def choose(groups: list[Group], trials: Trier, limit: float, tick: Callable[[], None] = lambda: None) -> tuple[list[Verdict], ActionError | None]:
    """Verdicts on all groups, and the error with all that are not kept rounded; `limit`: p99 in joint units. `tick` is called per measured group."""
    small = [group for group in groups if group.work < NEGLIGIBLE]
    alone: dict[str, ActionError] = {}
    for group in (group for group in groups if group not in small):
        alone[group.name] = trials.error([group])
        tick()
    rounded = [group for group in groups if group.name in alone]
    kept: dict[str, str] = {group.name: f"less than {NEGLIGIBLE:.1%} of the multiplications" for group in small}
    total = trials.error(rounded) if rounded else None
    while rounded and not total.p99 <= limit:  # not: NaN is above every limit
        worst = max(rounded, key=lambda group: alone[group.name].rms ** 2 / group.work)
        rounded.remove(worst)
        kept[worst.name] = f"p99 was {total.p99:.3g} with it, limit {limit:g}"
        total = trials.error(rounded) if rounded else None
    return [Verdict(group, alone.get(group.name), kept.get(group.name)) for group in groups], total


def spread(samples: Sequence[T], count: int) -> list[T]:
    """At most `count` of the samples, evenly from first to last."""
    picked = np.unique(np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int))
    return [samples[index] for index in picked]
