"""What each critic trunk learns and costs on the shapes task: the evidence for the demo's choice.

python -m bench.critic_trunks runs/demo/pretrained --backbone dit

Every trunk is pretrained on the same rollouts of the same frozen actor: noise and prompts are functions of
the seed. Then one training iteration of each is timed in turn, medians of several rounds.
It writes bench/results/critic-trunks.json.

python -m bench.critic_trunks --measures                       DiT: about 40 minutes of a quiet core
python -m bench.critic_trunks --measures trunks --seeds 0 --minutes 10

measures explained variance by step between floor and ceiling instead: of every trunk, of 0 to 40 iterations
of value pretraining, of heads with and without timestep or prompt, and when asked for of every loss. Each
cell is a file under bench/results/learning/critics, so the next call goes on; docs/results.md has the tables.
--smoke takes a minute, and wants an --out of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import critic_variance
from bench.critic_variance import Scale
from bench.learning import page
from bench.learning.problems import Materials
from lacfast import presets
from lacfast.backbones import adapt_pretrained
from lacfast.tasks.shapes import held_out_prompts, train_prompts
from lacfast.tasks.storage import load_pretrained
from lacfast.trainer import LatentActorCriticTrainer

RESULT = Path(__file__).parent / "results" / "critic-trunks.json"
LEARNING = RESULT.parent / "learning"
DEFAULT_MEASURES = ("trunks", "iterations", "time", "text")
TRUNKS = ("branch", "shared", "copy")
TIMED_ROUNDS = 5
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


def trainer_for(directory: Path, backbone: str, trunk: str) -> LatentActorCriticTrainer:
    preset = presets.shapes(backbone)
    config = replace(preset, critic=replace(preset.critic, trunk=trunk))
    return LatentActorCriticTrainer(
        adapt_pretrained(load_pretrained(directory)),
        "shapes",
        train_prompts(),
        config,
        held_out=held_out_prompts(),
    )


def pretrain(trainer: LatentActorCriticTrainer) -> dict[str, Any]:
    start = time.perf_counter()
    result = trainer.pretrain_critic()
    variance = result.explained_variance.mean(dim=-1)
    critic = trainer.critic
    assert critic is not None
    return {
        "explained_variance": variance.tolist(),
        "explained_variance_second_half": float(variance[len(variance) // 2 :].mean()),
        "parameters": sum(parameter.numel() for parameter in critic.parameters()),
        "images": result.images,
        "seconds_value_pretraining": time.perf_counter() - start,
    }


def iteration_seconds(trainers: dict[str, LatentActorCriticTrainer]) -> dict[str, float]:
    """Median seconds of a training iteration, the trunks in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(TIMED_ROUNDS + 1):
        for name, trainer in trainers.items():
            start = time.perf_counter()
            trainer.train_iteration()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pretrained", type=Path, nargs="?", help="the pretrained/ folder of a demo run")
    parser.add_argument("--backbone", choices=("dit", "unet"), default="dit")
    parser.add_argument(
        "--measures",
        nargs="*",
        choices=[*critic_variance.MEASURES, []],
        help="without a name: " + ", ".join(DEFAULT_MEASURES),
    )
    parser.add_argument("--materials", type=Path, default=Path("runs/learning"), help="base models")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--smoke", action="store_true", help="tiny rollouts: does it run")
    parser.add_argument("--train-iterations", type=int, default=15, help="of PPO after value pretraining")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after these")
    parser.add_argument("--out", type=Path, help="folder of --measures; default: critics/BACKBONE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.measures is not None:
        scale = replace(SMOKE if arguments.smoke else FULL, train_iterations=arguments.train_iterations)
        critic_variance.run(
            Materials(arguments.materials),
            arguments.backbone,
            arguments.measures or DEFAULT_MEASURES,
            arguments.seeds,
            scale,
            arguments.out or LEARNING / "critics" / arguments.backbone,
            deadline=time.monotonic() + 60 * arguments.minutes,
        )
        page.write(LEARNING)
        return
    if arguments.pretrained is None:
        parser.error("name the pretrained/ folder of a demo run, or ask for --measures")
    trainers = {trunk: trainer_for(arguments.pretrained, arguments.backbone, trunk) for trunk in TRUNKS}
    actor_parameters = sum(parameter.numel() for parameter in trainers["branch"].backbone.model.parameters())
    initial = copy.deepcopy(trainers["branch"].backbone.model.state_dict())
    rows = {}
    for trunk, trainer in trainers.items():
        rows[trunk] = pretrain(trainer)
        print(trunk, rows[trunk], flush=True)
        after = trainer.backbone.model.state_dict()
        assert all(torch.equal(initial[name], after[name]) for name in initial), "the actor must stay frozen"
    times = iteration_seconds(trainers)
    for trunk, row in rows.items():
        row["seconds_per_iteration"] = times[trunk]
        row["iteration_time_over_shared"] = times[trunk] / times["shared"]
    result = {
        "backbone": arguments.backbone,
        "actor_parameters": actor_parameters,
        "timed_rounds": TIMED_ROUNDS,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "trunks": rows,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
