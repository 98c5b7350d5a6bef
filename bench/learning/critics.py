"""Explained variance by step of every critic on the shapes task, between floor and ceiling.

python -m bench.learning.critics                                DiT: about half an hour of a core per seed
python -m bench.learning.critics trunks --seeds 0 --minutes 10  every trunk, begins nothing after 10 minutes

Measures: every trunk, 0 to 40 iterations of value pretraining, heads with and without timestep or prompt, and
when asked for every loss. All train on the same rollouts of the same frozen actor: noise and prompts are
functions of the seed. Each cell is kept in bench/results/learning/critics, so the next call goes on;
docs/results.md has the tables. --smoke takes a minute, and wants an --out of its own.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from bench.learning import critic_variance, page
from bench.learning.critic_variance import Scale
from bench.learning.problems import Materials

LEARNING = Path(__file__).resolve().parents[1] / "results" / "learning"
DEFAULT_MEASURES = ("trunks", "iterations", "time", "text")
FULL = Scale(
    batch_size=192,
    iterations=16,
    held_out_samples=240,
    reported_samples=480,
    completions=4,
    bound_states=96,
    train_iterations=15,
    eval_samples=1024,
)
SMOKE = Scale(
    batch_size=16,
    iterations=1,
    held_out_samples=48,
    reported_samples=120,
    completions=2,
    bound_states=8,
    train_iterations=1,
    eval_samples=16,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "measures",
        nargs="*",
        choices=[*critic_variance.MEASURES, []],
        help="default: " + ", ".join(DEFAULT_MEASURES),
    )
    parser.add_argument("--backbone", choices=("dit", "unet"), default="dit")
    parser.add_argument("--materials", type=Path, default=Path("runs/learning"), help="base models")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--smoke", action="store_true", help="tiny rollouts: does it run")
    parser.add_argument("--train-iterations", type=int, default=15, help="of PPO after value pretraining")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after these")
    parser.add_argument("--out", type=Path, help="file of the cells without .json; default: critics/BACKBONE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    critic_variance.run(
        Materials(arguments.materials),
        arguments.backbone,
        arguments.measures or DEFAULT_MEASURES,
        arguments.seeds,
        replace(SMOKE if arguments.smoke else FULL, train_iterations=arguments.train_iterations),
        arguments.out or LEARNING / "critics" / arguments.backbone,
        deadline=time.monotonic() + 60 * arguments.minutes,
    )
    page.write(LEARNING)


if __name__ == "__main__":
    main()
