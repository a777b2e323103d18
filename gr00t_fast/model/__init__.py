"""The network, plain and exact: the eager truth that every engine is compared with. Imports torch and its siblings only."""

from gr00t_fast.model.gr00t import Gr00tN1d5, ModelInputs, StepTables

__all__ = ["Gr00tN1d5", "ModelInputs", "StepTables"]
