"""NVIDIA's published checkpoint formats, of N1.5 and N1.7, read strictly."""

from gr00t_fast.checkpoint.embodiment import EMBODIMENT_ROWS, EmbodimentMetadata
from gr00t_fast.checkpoint.load import Checkpoint, load_model, open_checkpoint
from gr00t_fast.checkpoint.processor_n1d7 import ActionPart, EmbodimentN1d7, PictureSettings, StatePart

__all__ = ["EMBODIMENT_ROWS", "ActionPart", "Checkpoint", "EmbodimentMetadata", "EmbodimentN1d7", "PictureSettings", "StatePart"]
__all__ += ["load_model", "open_checkpoint"]
