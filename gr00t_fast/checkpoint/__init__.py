"""A checkpoint, opened and read strictly: its small files, and its weights without a second copy in memory."""

from gr00t_fast.checkpoint.load import Checkpoint, load_model, open_checkpoint, read_policy_metadata

__all__ = ["Checkpoint", "load_model", "open_checkpoint", "read_policy_metadata"]
