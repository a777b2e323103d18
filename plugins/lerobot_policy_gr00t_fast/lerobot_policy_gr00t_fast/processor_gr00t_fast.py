"""Identity processors: pictures, joints and actions are converted by gr00t_fast itself, with the statistics of the checkpoint."""

from __future__ import annotations

from typing import Any

from lerobot.processor import PolicyProcessorPipeline
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from lerobot.processor.pipeline import IdentityProcessorStep
from lerobot.utils.constants import POLICY_POSTPROCESSOR_DEFAULT_NAME, POLICY_PREPROCESSOR_DEFAULT_NAME

from lerobot_policy_gr00t_fast.configuration_gr00t_fast import Gr00tFastConfig


def make_gr00t_fast_pre_post_processors(config: Gr00tFastConfig, dataset_stats: Any = None) -> tuple[Any, Any]:
    """What lerobot calls; its statistics of the data set being recorded are none of this policy's business."""
    before = PolicyProcessorPipeline(steps=[IdentityProcessorStep()], name=POLICY_PREPROCESSOR_DEFAULT_NAME)
    after = PolicyProcessorPipeline(
        steps=[IdentityProcessorStep()],
        name=POLICY_POSTPROCESSOR_DEFAULT_NAME,
        to_transition=policy_action_to_transition,
        to_output=transition_to_policy_action,
    )
    return before, after
