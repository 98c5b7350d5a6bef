"""The drop-ins beside the originals' formulas, eager and under torch.compile, at the sizes of their users.

    OMP_NUM_THREADS=1 python -m bench.compat_steps        writes results/compat.json, docs/migration.md

Every provider is what a trainer calls: the timestep is looked up and, when sampling, the noise drawn from a
generator. "train" is the log-prob of a stored transition with its gradient to the model output. Providers
run in turn; times are medians, and results are compared before they are timed.
"""

from __future__ import annotations

import json
import platform
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from bench import peers
from bench.interleaved import race
from lacfast.compat import ddpo, flow_grpo

RESULT = Path(__file__).parent / "results" / "compat.json"
PAGE = Path(__file__).parents[1] / "docs" / "migration.md"
BEGIN, END = "<!-- compat:begin -->\n", "<!-- compat:end -->"
EAGER, COMPILED, OURS = "the original's formula, eager", "torch.compile of it", "lacfast.compat"
FLOW_SHAPE = (8, 16, 64, 64)
"""SD3.5-M at 512 pixels."""
DDIM_SHAPE = (8, 4, 64, 64)
"""SD1.x at 512 pixels."""
Results = Callable[[], tuple[Tensor, ...]]
PROMPTS, SAMPLES = 512, 4096
"""Distinct prompts and samples of a reward update."""


def tensors(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Sample, model output and a result of the step."""
    generator = torch.Generator().manual_seed(0)
    sample, output, offset = (torch.randn(shape, generator=generator) for _ in range(3))
    return sample, output.to(dtype), sample + 0.1 * offset


def flow_formula(
    output: Tensor,
    sample: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    noise: Tensor | None,
    landed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    mean, std = peers.sde_transition(output.float(), sample, sigma, next_sigma, 0.7)
    prev_sample = mean + std * noise if landed is None else landed
    return prev_sample, peers.mean_log_prob(prev_sample, mean, std), mean


def ddim_formula(
    output: Tensor,
    sample: Tensor,
    signal: Tensor,
    next_signal: Tensor,
    noise: Tensor | None,
    landed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """DDIM at eta = 1 for a model that predicts noise (arXiv 2010.02502, eq. 12 and 16)."""
    clean = (sample - (1 - signal) ** 0.5 * output) / signal**0.5
    std = ((1 - next_signal) / (1 - signal) * (1 - signal / next_signal)) ** 0.5
    mean = next_signal**0.5 * clean + (1 - next_signal - std**2) ** 0.5 * output
    prev_sample = mean + std * noise if landed is None else landed
    return prev_sample, peers.mean_log_prob(prev_sample, mean, std)


def column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def flow_calls(dtype: torch.dtype) -> dict[str, Callable[..., tuple[Tensor, ...]]]:
    """name -> (output, landed, generator) -> prev_sample, log_prob, ..."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    sample = tensors(FLOW_SHAPE, dtype)[0]
    timestep = scheduler.timesteps[3].repeat(len(sample))

    def original(formula: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
        def call(output: Tensor, landed: Tensor | None, generator: torch.Generator) -> tuple[Tensor, ...]:
            steps = [scheduler.index_for_timestep(entry) for entry in timestep]
            sigma, following = (
                column(scheduler.sigmas[[step + offset for step in steps]]) for offset in (0, 1)
            )
            noise = None if landed is not None else torch.randn(FLOW_SHAPE, generator=generator)
            return formula(output, sample, sigma, following, noise, landed)

        return call

    def ours(output: Tensor, landed: Tensor | None, generator: torch.Generator) -> tuple[Tensor, ...]:
        return flow_grpo.sde_step_with_logprob(
            scheduler, output, timestep, sample, prev_sample=landed, generator=generator
        )

    return {EAGER: original(flow_formula), COMPILED: original(torch.compile(flow_formula)), OURS: ours}


def ddim_calls(dtype: torch.dtype) -> dict[str, Callable[..., tuple[Tensor, ...]]]:
    """As flow_calls."""
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
    )
    scheduler.set_timesteps(50)
    sample = tensors(DDIM_SHAPE, dtype)[0]
    timestep = scheduler.timesteps[20].repeat(len(sample))

    def original(formula: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
        def call(output: Tensor, landed: Tensor | None, generator: torch.Generator) -> tuple[Tensor, ...]:
            following = torch.clamp(timestep - 20, 0, 999)
            signal, next_signal = (
                column(scheduler.alphas_cumprod.gather(0, times.cpu())) for times in (timestep, following)
            )
            noise = None if landed is not None else torch.randn(DDIM_SHAPE, generator=generator, dtype=dtype)
            return formula(output.float(), sample, signal, next_signal, noise, landed)

        return call

    def ours(output: Tensor, landed: Tensor | None, generator: torch.Generator) -> tuple[Tensor, ...]:
        drawing = None if landed is not None else generator
        return ddpo.ddim_step_with_logprob(
            scheduler, output, timestep, sample, 1.0, generator=drawing, prev_sample=landed
        )

    return {EAGER: original(ddim_formula), COMPILED: original(torch.compile(ddim_formula)), OURS: ours}


def sampling(call: Callable[..., tuple[Tensor, ...]], output: Tensor) -> Results:
    generator = torch.Generator()

    def provider() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return call(output, None, generator.manual_seed(0))[:2]

    return provider


def training(call: Callable[..., tuple[Tensor, ...]], output: Tensor, landed: Tensor) -> Results:
    trained = output.detach().clone().requires_grad_()

    def provider() -> tuple[Tensor, ...]:
        log_prob = call(trained, landed, None)[1]
        return log_prob.detach(), *torch.autograd.grad(log_prob.sum(), trained)

    return provider


def statistics_providers() -> dict[str, Results]:
    """ddpo's reward statistics: a search through all prompts for every prompt, or one sort."""
    random = np.random.default_rng(0)
    prompts = [f"a photo of object {row}" for row in random.integers(0, PROMPTS, SAMPLES)]
    rewards = random.normal(size=SAMPLES)

    def original() -> tuple[Tensor]:
        kept: dict[str, deque[float]] = {}
        names, advantages = np.array(prompts), np.empty_like(rewards)
        for name in np.unique(names):
            own = rewards[names == name]
            history = kept.setdefault(name, deque(maxlen=16))
            history.extend(own)
            advantages[names == name] = (own - np.mean(history)) / (np.std(history) + 1e-6)
        return (torch.from_numpy(advantages),)

    return {
        EAGER: original,
        OURS: lambda: (torch.from_numpy(ddpo.PerPromptStatTracker(16, 1).update(prompts, rewards)),),
    }


def compare(providers: dict[str, Results]) -> None:
    """Equal results, relative to the largest element."""
    expected = providers[EAGER]()
    for provider in providers.values():
        for ours, theirs in zip(provider(), expected, strict=True):
            rounding = 2**-7 if theirs.dtype == torch.bfloat16 else 2e-5
            torch.testing.assert_close(ours, theirs, rtol=0, atol=rounding * theirs.abs().max().item())


def measured(providers: dict[str, Results], rounds: int) -> dict[str, Any]:
    compare(providers)
    times = {name: statistics.median(values) for name, values in race(providers, rounds=rounds).items()}
    row: dict[str, Any] = {"milliseconds": {name: 1e3 * seconds for name, seconds in times.items()}}
    row["speed_over"] = {name: times[name] / times[OURS] for name in times if name != OURS}
    return row


def table(rows: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| | milliseconds | over eager | over torch.compile |", "|---|---|---|---|"]
    for name, row in rows.items():
        ratios = [row["speed_over"].get(peer) for peer in (EAGER, COMPILED)]
        cells = [f"{row['milliseconds'][OURS]:.2f}", *("" if r is None else f"{r:.2f}" for r in ratios)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    torch.set_num_threads(1)
    rows = {}
    for peer, calls_of, shape in (("flow_grpo", flow_calls, FLOW_SHAPE), ("ddpo", ddim_calls, DDIM_SHAPE)):
        for dtype in (torch.float32, torch.bfloat16):
            calls, (_, output, landed) = calls_of(dtype), tensors(shape, dtype)
            label = str(dtype).removeprefix("torch.")
            rows[f"{peer} sample {label}"] = measured(
                {name: sampling(call, output) for name, call in calls.items()}, 20
            )
            rows[f"{peer} train {label}"] = measured(
                {name: training(call, output, landed) for name, call in calls.items()}, 20
            )
    rows["ddpo PerPromptStatTracker"] = measured(statistics_providers(), 10)
    for name, row in rows.items():
        ratios = ", ".join(f"{ratio:.2f}x {peer}" for peer, ratio in row["speed_over"].items())
        print(f"{name}: {row['milliseconds'][OURS]:.2f} ms, {ratios}")
    result = {
        "device": f"CPU, one thread, {platform.machine()}",
        "torch": torch.__version__,
        "flow_grpo": {"shape": FLOW_SHAPE, "steps": 10},
        "ddpo": {"shape": DDIM_SHAPE, "steps": 50},
        "statistics": {"prompts": PROMPTS, "samples": SAMPLES},
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(before + BEGIN + table(rows) + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
