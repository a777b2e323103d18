"""GR00T through gr00t_fast as a policy of lerobot's programs: `--policy.type=gr00t_fast`. lerobot imports every installed distribution called
`lerobot_policy_*`, and finds `modeling_*` and `processor_*` by the name of the module that holds the configuration."""

from lerobot_policy_gr00t_fast.configuration_gr00t_fast import Gr00tFastConfig

__all__ = ["Gr00tFastConfig"]
