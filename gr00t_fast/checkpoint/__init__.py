"""NVIDIA's published checkpoint formats, of N1.5 and N1.7, read strictly."""

from gr00t_fast.checkpoint.embodiment import EMBODIMENT_ROWS
from gr00t_fast.checkpoint.load import Checkpoint, load_model, open_checkpoint
from gr00t_fast.checkpoint.metadata import read_policy_metadata
from gr00t_fast.inputs.embodiment import ActionPart, EmbodimentMetadata, EmbodimentN1d7, PictureSettings, StatePart

__all__ = ["EMBODIMENT_ROWS", "ActionPart", "Checkpoint", "EmbodimentMetadata", "EmbodimentN1d7", "PictureSettings", "StatePart"]
__all__ += ["load_model", "open_checkpoint", "read_policy_metadata"]
