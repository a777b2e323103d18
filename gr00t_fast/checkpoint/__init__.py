"""NVIDIA's published checkpoint format, read strictly."""

from gr00t_fast.checkpoint.load import Checkpoint, load_model, open_checkpoint
from gr00t_fast.checkpoint.metadata import EMBODIMENT_ROWS, EmbodimentMetadata

__all__ = ["EMBODIMENT_ROWS", "Checkpoint", "EmbodimentMetadata", "load_model", "open_checkpoint"]
