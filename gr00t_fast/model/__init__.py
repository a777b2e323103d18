"""The networks, plain and exact: the eager truth that every engine is compared with. Imports torch and its siblings only."""

from gr00t_fast.config import ModelConfig, QwenVisionConfig
from gr00t_fast.model.action_head import Condition, StepTables
from gr00t_fast.model.gr00t import Gr00tN1d5, ModelInputs
from gr00t_fast.model.gr00t_n1d7 import Gr00tN1d7

__all__ = ["Condition", "Gr00tN1d5", "Gr00tN1d7", "ModelInputs", "Network", "StepTables", "network"]

Network = Gr00tN1d5 | Gr00tN1d7


def network(config: ModelConfig) -> Network:
    """The network that `config` describes, its weights not yet filled."""
    return (Gr00tN1d7 if isinstance(config.vision, QwenVisionConfig) else Gr00tN1d5)(config)
