"""The policies of one process, each made once: in this process, or behind a server in another."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from benchmarks.closed_loop.cells import Cell, split_engine
from benchmarks.served_policy import ServedPolicy
from gr00t_fast import load_policy
from gr00t_fast.contracts import Clock


@dataclass(frozen=True)
class PolicyRecipe:
    """What load_policy is asked for; travels to another process."""

    model_path: str
    engine: str  # as in Cell
    denoising_steps: int
    device: str = "auto"

    def build(self, clock: Clock | None = None) -> Any:
        import torch

        torch.set_num_threads(1)  # a core per process, and the same sums in every process
        name, precision, directory = split_engine(self.engine)
        return load_policy(
            self.model_path,
            engine=name,
            precision=precision,
            engine_path=directory,
            denoising_steps=self.denoising_steps,
            device=self.device,
            seed=0,
        )


class Policies:
    """Context manager. `of` gives the policy of a cell."""

    def __init__(self, model_path: str, device: str) -> None:
        self._model_path, self._device = model_path, device
        self._local: dict[str, Any] = {}
        self._served: dict[tuple[str, int], Any] = {}
        self._servers = ExitStack()

    def __enter__(self) -> Policies:
        return self

    def __exit__(self, *error: object) -> None:
        self._servers.close()

    def of(self, cell: Cell) -> Any:
        """Raises Gr00tFastError when the engine cannot be had."""
        if cell.controller == "server":
            return self._from_server(cell)
        if cell.engine not in self._local:
            self._local[cell.engine] = PolicyRecipe(self._model_path, cell.engine, cell.denoising_steps, self._device).build()
        policy = self._local[cell.engine]
        policy.denoising_steps = cell.denoising_steps
        return policy

    def _from_server(self, cell: Cell) -> Any:
        key = cell.engine, cell.denoising_steps
        if key not in self._served:
            recipe = PolicyRecipe(self._model_path, cell.engine, cell.denoising_steps, self._device)
            self._served[key] = self._servers.enter_context(ServedPolicy(recipe))
        return self._served[key]
