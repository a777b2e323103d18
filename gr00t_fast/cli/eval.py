"""`gr00t-fast eval`: does the checkpoint predict what was recorded, and if not, is it the model, the units, the cameras, the rate or the timing?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gr00t_fast.cli.main import EXIT_OK, Command, leave_result
from gr00t_fast.cli.run import RunConfig
from gr00t_fast.cli.shared_flags import OutputFlags
from gr00t_fast.evaluation.eval import EvalOptions, as_table, evaluate

# Settings of a run's file that mean something else here, or that the recording tells.
_NOT_OF_A_RUN = ("seed", "episodes", "action_horizon", "lang_instruction", "camera_map")


@dataclass(kw_only=True)
class EvalConfig(OutputFlags, EvalOptions):
    """Compare a checkpoint's actions with those of a recorded data set, joint by joint, and say what is wrong where they differ.

        gr00t-fast eval --model_path=./gr00t-n1.5-so100-finetuned --dataset=./my-lerobot-dataset --episodes 0 3

    A good result on the training data says that units and cameras are right, not that the policy generalises: use held-out episodes.
    """

    out: Path = Path("outputs/eval")  # directory for eval.json and eval.md, which are replaced


def run(config: EvalConfig) -> int:
    """Compare, print, and leave eval.json and eval.md. Raises Gr00tFastError."""
    result = evaluate(config)
    leave_result(config.out, result, as_table(result) + "\n", f"Verdict: {result['verdict']['kind']}. {result['verdict']['advice']}", config)
    return EXIT_OK


main = Command(
    EvalConfig,
    run,
    "usage: gr00t-fast eval --model_path=DIR --dataset=DIR [--episodes 0 3 | all] [--flag=value ...]",
    file_of=RunConfig,
    not_from_file=_NOT_OF_A_RUN,
)
