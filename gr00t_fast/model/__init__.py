"""The network, plain and exact: the eager truth that every engine is compared with. Imports torch and its siblings only."""

from gr00t_fast.model.action_head import Condition, StepTables
from gr00t_fast.model.config import ModelConfig
from gr00t_fast.model.gr00t import Gr00t, ModelInputs

__all__ = ["Condition", "Gr00t", "ModelConfig", "ModelInputs", "StepTables"]
