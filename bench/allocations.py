"""Every allocation of a whole run, followed on a model without values, beside the memory that was planned.

python -m bench.allocations sd35m-ocr     follows a recipe in full size; adds to results/allocations.json

The trainer itself runs, on the meta device: value pretraining, two iterations and an evaluation, with the
recipe's batches. What repeats an allocation runs once or twice instead of often: see `shortened`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from lacfast import LatentActorCriticTrainer
from lacfast.backbone import build_critic
from lacfast.backbones.blueprint import load_blueprint
from lacfast.backbones.latent import LatentBackbone
from lacfast.config import TrainConfig
from lacfast.records import Conditioning
from lacfast.rewards.registry import declared_heads
from lacfast.rollout import scored
from lacfast.runs.capacity import MemoryPlan
from lacfast.runs.config import RunConfig
from lacfast.runs.costs import LiveBytes, fused_attention
from lacfast.runs.memory import memory_plan
from lacfast.runs.plan import model_arguments
from lacfast.runs.recipes import recipes

RESULT = Path(__file__).parent / "results" / "allocations.json"
_ATEN = torch.ops.aten


class WithoutValues(LiveBytes):
    """Follows memory of a meta model in code that reads values: what the host asks for is 1 or zeros."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _ATEN._local_scalar_dense.default and args[0].is_meta:
            return 1.0 if args[0].is_floating_point() else 1
        if func is _ATEN.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0]
        if func is _ATEN._to_copy.default and args[0].is_meta:
            named = kwargs or {}
            if torch.device(named.get("device") or "meta").type == "cpu":
                func, kwargs = _ATEN.zeros.default, {"dtype": named.get("dtype") or args[0].dtype}
                args = (args[0].shape,)
        return super().__torch_dispatch__(func, types, args, kwargs)


class Unscored:
    """A queue that decodes, and scores nothing."""

    def __init__(self, rewards: Any, *, decode: Callable[[Tensor], Tensor], decode_aside: bool) -> None:
        self.decode = decode

    def submit(self, batch: Tensor, prompts: list[str], *_: Any) -> Future[dict[str, Tensor]]:
        with torch.no_grad():
            self.decode(batch)
        scores: Future[dict[str, Tensor]] = Future()
        scores.set_result({"unscored": torch.zeros(len(prompts))})
        return scores

    def close(self) -> None:
        """Nothing is open."""

    def __enter__(self) -> Unscored:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Moments(torch.optim.Optimizer):
    """The memory of a fused AdamW, which the meta device has not."""

    def __init__(self, parameters: Any, lr: float = 1e-3, **_: Any) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    for name in ("exp_avg", "exp_avg_sq"):
                        self.state[parameter][name] = torch.zeros_like(parameter)


def unscored(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return torch.zeros(len(prompts))


@dataclass(frozen=True)
class Peak:
    """Bytes at the peak of a phase."""

    device: int
    """Weights of the model and the critic included."""
    host: int


def followed(backbone: LatentBackbone, one: Conditioning, config: TrainConfig) -> dict[str, Peak]:
    """Phase -> what a whole run has at its peak.

    Args:
        backbone: on the meta device, with its critic; trained afterwards, if values can be said to be.
        one: (1, ...) conditioning of a prompt.
        config: what is run, without ranks.
    """

    def encoded(count: int) -> Conditioning:
        shapes = {name: (count, *tensor.shape[1:]) for name, tensor in one.tensors.items()}
        return Conditioning(
            {
                name: torch.empty(shape, device="meta", dtype=one.tensors[name].dtype)
                for name, shape in shapes.items()
            }
        )

    modules: list[nn.Module] = [backbone.model, *([] if backbone.critic is None else [backbone.critic])]
    there = sum(tensor.nbytes for module in modules for tensor in module.parameters())
    live, found = WithoutValues(), {}

    def part(name: str, body: Callable[[], Any]) -> Any:
        live.peak = dict(live.live)
        result = body()
        found[name] = Peak(live.peak.get("meta", 0) + there, live.peak.get("cpu", 0))
        return result

    with ExitStack() as stack:
        for target, name, instead in (
            (scored, "RewardQueue", Unscored),
            (backbone, "encode_prompts", lambda prompts: encoded(len(prompts))),
            (backbone, "encode_unconditional", encoded),
            (torch.optim, "AdamW", Moments),
        ):
            stack.enter_context(mock.patch.object(target, name, instead))
        stack.enter_context(fused_attention())
        stack.enter_context(live)
        trainer = LatentActorCriticTrainer(backbone, unscored, ["a", "b", "c"], config)
        if trainer.critic is not None:
            part("value pretraining", trainer.pretrain_critic)
        trainer.update(trainer.next_rollout())
        rollout = part("rollout", trainer.next_rollout)
        part("update", lambda rollout=rollout: trainer.update(rollout))
        part("evaluation", trainer.evaluate)
    return found


def planned(plan: MemoryPlan) -> dict[str, Peak]:
    """Phase of `followed` -> what was planned for it."""
    found: dict[str, Peak] = {}
    for phase in plan.phases:
        name = phase.name.partition(",")[0].removeprefix("policy ").removeprefix("critic ")
        before = found.get(name, Peak(0, 0))
        found[name] = Peak(max(before.device, phase.device), max(before.host, phase.host))
    return found


def shortened(config: TrainConfig) -> TrainConfig:
    """A run with all sizes of `config` and fewer rollouts, minibatches and images."""
    pretrain = replace(
        config.pretrain,
        iterations=2,
        held_out_samples=config.rollout_batch_size or config.batch_size,
    )
    # The microbatch is found from the free memory where none is given, of which there is none here.
    ppo = replace(config.ppo, timestep_fraction=0.1, microbatch_size=config.ppo.microbatch_size or 4)
    return replace(
        config, pretrain=pretrain, ppo=ppo, eval_samples=min(config.eval_samples, config.eval_batch_size)
    )


def beside(config: RunConfig) -> dict[str, dict[str, int]]:
    """Phase -> bytes "planned" and "followed" on the device, for a recipe's `shortened` run.

    Raises:
        ValueError: when shortening changes what is planned for the device, but for held-out values.
    """
    short = shortened(config.train)
    blueprint = load_blueprint(config.model, **model_arguments(config))
    backbone, one = blueprint.backbone, blueprint.conditioning()
    heads = [head for name, _ in config.rewards for head in declared_heads(name)]
    backbone.critic = build_critic(backbone, len(heads), short.critic)
    table = backbone.transition_table(short.sampler.at(0, seed=short.seed))
    plan = memory_plan(backbone, backbone.critic, table, one, short, overlaps=False)
    whole = planned(memory_plan(backbone, backbone.critic, table, one, config.train, overlaps=False))
    foretold, found = planned(plan), followed(backbone, one, short)
    for name, peak in whole.items():
        if peak.device != foretold[name].device:
            raise ValueError(
                f"{name}: {foretold[name].device} B are planned shortened, {peak.device} B whole"
            )
    return {name: {"planned": foretold[name].device, "followed": peak.device} for name, peak in found.items()}


def table(result: dict[str, dict[str, dict[str, int]]]) -> str:
    """What was planned over what was followed, as Markdown."""
    phases = list(next(iter(result.values())))
    lines = [f"| planned / followed | {' | '.join(phases)} |", "|---" * (len(phases) + 1) + "|"]
    for name, row in result.items():
        cells = [f"{row[phase]['planned'] / row[phase]['followed']:.4f}" for phase in phases]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    note = (
        "Followed are the allocations of the trainer itself on a model without values, in full size and with "
        "the recipe's batches: value pretraining, two iterations and an evaluation "
        "(`python -m bench.allocations`). The critic's next minibatch is copied ahead on CUDA alone, so of "
        "FLUX's value pretraining one of two slots is followed."
    )
    return "\n".join([*lines, "", note])


def main(names: list[str]) -> None:
    found = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    known = recipes()
    for name in names:
        found[name] = beside(known[name].settings)
        RESULT.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for phase, row in found[name].items():
            print(name, phase, row)


if __name__ == "__main__":
    main(sys.argv[1:])
