"""What compiling the repeated blocks gains on the tiny DiT: eager / compiled, forward and forward + backward.

python -m bench.compiled_blocks

Both arms are the same weights on the same inputs, timed in turn. Correctness first: outputs and gradients
must agree. It writes bench/results/compiled-blocks.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import machine
from bench.interleaved import race, speed_ups
from lacfast.backbones.compilation import compile_blocks
from lacfast.backbones.sd3 import SD3Backbone
from lacfast.tasks.models import tiny_backbone
from lacfast.tasks.text import WIDTH

RESULT = Path(__file__).parent / "results" / "compiled-blocks.json"
BATCH_SIZES = (8, 128, 512)
PROMPT_TOKENS = 12


def inputs(model: Any, batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    size = model.config["sample_size"]
    return {
        "hidden_states": torch.randn((batch, model.config["in_channels"], size, size), generator=generator),
        "encoder_hidden_states": torch.randn((batch, PROMPT_TOKENS, WIDTH), generator=generator),
        "pooled_projections": torch.randn((batch, WIDTH), generator=generator),
        "timestep": 1000 * torch.rand(batch, generator=generator),
    }


def sampled(model: Any, given: dict[str, Tensor]) -> Callable[[], Tensor]:
    """The forward of a rollout."""

    def forward() -> Tensor:
        with torch.no_grad():
            output: Tensor = model(**given, return_dict=False)[0]
        return output

    return forward


def trained(model: Any, given: dict[str, Tensor]) -> Callable[[], Tensor]:
    """The forward and backward of an update; returns the gradient of one weight."""
    weight = model.transformer_blocks[0].attn.to_q.weight

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        model(**given, return_dict=False)[0].square().mean().backward()
        gradient: Tensor = weight.grad
        return gradient

    return step


def measure(batch: int, arms: dict[str, Any], rounds: int) -> dict[str, Any]:
    given = inputs(arms["eager"], batch)
    row: dict[str, Any] = {"batch": batch}
    for name, work in (("forward", sampled), ("forward_backward", trained)):
        providers = {arm: work(model, given) for arm, model in arms.items()}
        eager, compiled = providers["eager"](), providers["compiled"]()
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-5)
        row[name] = speed_ups(race(providers, rounds=rounds, warmup=2), "eager")["compiled"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    arms = {
        name: tiny_backbone("dit", generator=torch.Generator().manual_seed(0)).eval()
        for name in ("eager", "compiled")
    }
    compile_blocks([arms["compiled"]], SD3Backbone.repeated_blocks)
    rows = [measure(batch, arms, rounds) for batch in BATCH_SIZES]
    for row in rows:
        print(
            f"batch {row['batch']:4d}  forward {row['forward']:.2f}  + backward {row['forward_backward']:.2f}"
        )
    result = {
        "date": machine.today(),
        "machine": machine.describe(torch.device("cpu")),
        "threads": 1,
        "rounds": rounds,
        "eager_over_compiled": rows,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
