"""What an export keeps outside its graphs: the token embedding, and the tables of each step count. The runtimes look rows up on the host."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gr00t_fast.checkpoint.tensor_file import TensorFile
from gr00t_fast.errors import ConfigError
from gr00t_fast.model import StepTables

TABLES_NAME = "tables.safetensors"
EMBEDDING, TAU, MODULATION = "embedding", "tau", "modulation"
_WORDS = {1: np.uint8, 2: np.int16, 4: np.int32}  # NumPy knows no bf16: rows travel as integers of the same size


class ExportTables:
    """tables.safetensors, opened but not read: an inference looks up a row for each token of its prompt, of 150 000."""

    def __init__(self, directory: Path, remedy: str) -> None:
        """`remedy`: the command that makes the export with other step counts. Raises CheckpointError for a damaged file."""
        self._path, self._remedy = directory / TABLES_NAME, remedy
        with TensorFile(self._path) as file:
            self._entries = file.entries
        entry = self._entries[EMBEDDING]
        self.dtype = entry.dtype
        self._embedding = np.memmap(self._path, _WORDS[entry.dtype.itemsize], "r", entry.offset, entry.shape)
        self._steps: dict[int, StepTables] = {}

    def embed(self, ids: Tensor) -> Tensor:
        """ids int64 (S,) on the CPU -> embeddings (1, S, width)."""
        return torch.from_numpy(self._embedding[ids.numpy()]).view(self.dtype).unsqueeze(0)

    def steps(self, count: int) -> StepTables:
        """tau (count, D) and modulation (count, L + 1, 2, D) as `denoise_step` takes them. Raises ConfigError for a count that was not exported."""
        if count not in self._steps:
            names = [f"{kind}.{count}" for kind in (TAU, MODULATION)]
            if names[0] not in self._entries:
                there = sorted(int(name.rpartition(".")[2]) for name in self._entries if name.startswith(f"{TAU}."))
                raise ConfigError(
                    f"denoising_steps={count}: this export holds tables for {', '.join(map(str, there))} steps. Choose one of them, or make "
                    f"the graphs again with gr00t-fast export onnx and --denoising_steps={count}, and what was made from them: {self._remedy}"
                )
            with TensorFile(self._path) as file:
                self._steps[count] = StepTables(*(self._read(file, name) for name in names))
        return self._steps[count]

    def _read(self, file: TensorFile, name: str) -> Tensor:
        entry = self._entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        file.read_into(tensor, entry)
        return tensor
