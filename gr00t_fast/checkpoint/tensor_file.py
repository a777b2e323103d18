"""A .safetensors file through the safetensors library, with errors that name the file and the remedy.

The library maps the file: of a per-embodiment weight only the pages of the row that is asked for are read. Pages of the map count as resident until
the file is closed, but they are the page cache, which the system takes back whenever it needs memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gr00t_fast.base.errors import CheckpointError
from gr00t_fast.base.files import check_no_pointer

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class TensorEntry:
    """What one tensor is, by the file's header. name: as the file has it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorFile:
    """A .safetensors file that is open. Safe to read from several threads.

    entries: its tensors by name. others: name -> dtype of those in formats that no weight has here: whole numbers (counters, positions), 8 bits.
    """

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError when the file is not a whole safetensors file."""
        self.path = path
        try:
            check_no_pointer(path)
            self._file = safe_open(path, framework="pt")
        except OSError as error:
            raise CheckpointError(f"cannot open {path}: {error.strerror or error}. Expected a readable weight file.") from error
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged or cut short: {error}. Copy or download it again.") from error
        self.entries: dict[str, TensorEntry] = {}
        self.others: dict[str, str] = {}
        for name in self._file.keys():  # noqa: SIM118 - it is no mapping
            header = self._file.get_slice(name)
            if (dtype := _DTYPES.get(header.get_dtype())) is not None:
                self.entries[name] = TensorEntry(name, dtype, tuple(header.get_shape()))
            else:
                self.others[name] = header.get_dtype()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.__exit__(None, None, None)

    def read(self, name: str, row: int | None = None) -> Tensor:
        """A tensor of the file on the CPU, or one row (1, ...) of it: a view of the file, to be copied before the file is closed."""
        return self._file.get_tensor(name) if row is None else self._file.get_slice(name)[row : row + 1]
