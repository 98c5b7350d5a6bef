"""The command line: typed settings in, one clean line for what is wrong. Heavy imports wait for a command."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

USAGE_ERROR = 2


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Pretrain a tiny diffusion model, teach it by actor-critic PPO to obey its prompts, and show it."""

    out: Path
    """Directory for summary.json, metrics.jsonl, images/, report.html and the models."""
    budget: float = 450.0
    """Seconds in all; reinforcement learning gets what the other phases leave."""
    seed: int = 0
    """Of weights, prompts and noise."""
    backbone: Literal["dit", "unet"] = "dit"
    """dit: SD3's transformer; unet: Stable Diffusion's, slower on a CPU: give it a larger budget."""
    threads: int = 1
    """CPU threads of torch; more than one only pays on idle cores."""
    quick: bool = False
    """Cut every phase short: shows that it runs, not that it learns. Stops long before the budget."""

    def run(self) -> None:
        from lacfast.demo import FULL, QUICK, QUICK_BUDGET, run_demo
        from lacfast.terminal import show_summary

        budget = min(self.budget, QUICK_BUDGET) if self.quick else self.budget
        scale = QUICK if self.quick else FULL
        summary = run_demo(
            self.out, budget=budget, seed=self.seed, backbone=self.backbone, threads=self.threads, scale=scale
        )
        show_summary(summary, self.out)


@dataclass(frozen=True, kw_only=True)
class Info:
    """Versions, processor, CUDA, and which kernels are usable here and why others are not."""

    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> None:
        from rich.console import Console

        from lacfast import environment

        if self.json:
            print(json.dumps(environment.describe(), indent=2))
        else:
            # Lines are not broken where no terminal bounds them.
            environment.show(Console(width=None if sys.stdout.isatty() else 200))


Command = Annotated[Demo, tyro.conf.subcommand("demo")] | Annotated[Info, tyro.conf.subcommand("info")]


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code, 2 for settings that cannot work."""
    command = tyro.cli(
        Command,
        prog="lacfast",
        description="Latent actor-critic post-training of diffusion models.",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    try:
        command.run()
    except ValueError as error:
        print(f"lacfast: {error}", file=sys.stderr)
        return USAGE_ERROR
    except FloatingPointError as error:
        print(f"lacfast: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lacfast: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
