"""Train the small GR00T N1.5 that reaches for the block of the simulated arm.

    python training/samples.py --count=20000 --seed=1 --out=outputs/reach/samples/1
    python training/samples.py --count=500 --seed=99 --out=outputs/reach/held_out
    python training/train.py --samples=outputs/reach/samples --held_out=outputs/reach/held_out --out=outputs/reach/run
    python benchmarks/evaluate.py --model_path=outputs/reach/run/checkpoint --scenes still --controllers sync

Behaviour cloning with GR00T N1.5's flow-matching loss (flow.py), AdamW, cosine. --held_out may be left out; then nothing is checked on the way, and
the JSON line and the plot have no held-out figures. The same command continues a run that was stopped, by Ctrl-C or by --minutes, to the same bits.
Leaves DIR/checkpoint (the published format), DIR/state.pt, DIR/loss.csv, DIR/loss.png; the last line is JSON, also after Ctrl-C (exit code 130).
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import torch

from gr00t_fast.engine import select_device
from gr00t_fast.errors import ConfigError, attempt
from gr00t_fast.measurement import git_commit, machine, versions
from training.data import TrainingSet
from training.run import Options
from training.samples import load_samples
from training.session import Log, pursue, stopped_from_outside
from training.trainer import Trainer

_COLUMNS = ("flow", "finder", "gradient_norm", "rate", "held_out_flow", "held_out_finder", "action_error_deg")
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if min(arguments.steps, arguments.batch, arguments.draws, arguments.check_every, arguments.threads) < 1 or arguments.seed < 0:
        raise ConfigError("--steps, --batch, --draws, --check_every and --threads must be at least 1, and --seed not negative.")
    torch.set_num_threads(arguments.threads)
    options = Options(arguments.steps, arguments.batch, arguments.draws, arguments.rate, arguments.decay, arguments.seed)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(load_samples([arguments.samples]), options, select_device(arguments.device))
    state = out / "state.pt"
    if state.exists():
        trainer.load(state)
        print(f"continuing {out} at step {trainer.steps_done}", file=sys.stderr)
    held_out = TrainingSet.of(load_samples([arguments.held_out]), trainer.metadata, trainer.config.head.state_dim) if arguments.held_out else None
    log = Log(out / "loss.csv", trainer.steps_done, _COLUMNS)
    check = (lambda: trainer.check(held_out)) if held_out else dict
    reason = pursue(trainer, log, check, state, arguments.minutes, arguments.check_every, arguments.save_minutes)
    trainer.write_checkpoint(out / "checkpoint", _DTYPES[arguments.dtype])
    log.plot(out / "loss.png")
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return {
        "run": "training",
        "stopped_by": reason,
        "steps": trainer.steps_done,
        "samples": len(trainer.data),
        "parameters": parameters,
        **log.last(),
    }


def main(argv: list[str] | None = None) -> int:
    defaults = Options()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--samples", type=Path, required=True, help="directory of samples, sub-directories included")
    parser.add_argument("--held_out", type=Path, help="directory of samples to check on")
    parser.add_argument("--out", type=Path, required=True, help="directory to create, or to continue")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="updates in the whole run; the learning rate falls over them")
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command continues")
    parser.add_argument("--batch", type=int, default=defaults.batch, help="observations per step")
    parser.add_argument("--draws", type=int, default=defaults.draws, help="noise and time drawn per observation")
    parser.add_argument("--rate", type=float, default=defaults.rate, help="highest learning rate")
    parser.add_argument("--decay", type=float, default=defaults.decay, help="weight decay of matrices")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU; on a machine that has other work, two are slower than one")
    parser.add_argument("--dtype", choices=_DTYPES, default="fp32", help="of the checkpoint's weights; training is in fp32")
    parser.add_argument("--check_every", type=int, default=100, help="steps between rows of loss.csv")
    parser.add_argument("--save_minutes", type=float, default=3.0, help="minutes between saved states")
    arguments = parser.parse_args(argv)
    result, code = attempt(lambda: run(arguments), f"interrupted: the same command goes on from what is saved in {arguments.out}")
    if result is None:
        return code
    command = "python training/train.py " + shlex.join(sys.argv[1:] if argv is None else argv)
    print(json.dumps({**result, "machine": machine(), "versions": versions(), "commit": git_commit(), "command": command}))
    reason = result["stopped_by"]
    if stopped_from_outside(reason):
        print(f"stopped by {reason} at step {result['steps']} of {arguments.steps}; the same command goes on from there", file=sys.stderr)
        return 128 + signal.Signals[reason]  # so that a script does not go on with half a training
    return 0


if __name__ == "__main__":
    sys.exit(main())
