"""What may change when a run goes on from a checkpoint, and what must stay as it was."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lacfast.config.stored import to_json

CHANGEABLE = {
    *("iterations", "rollout_batch_size", "rollout_precision", "rollout_ranks", "ema_decay"),
    *("on_reward_error", "on_bad_gradient"),
    *("graph", "gradient_checkpointing", "compile", "early_stopping", "shard", "shard_gradients"),
    *("eval_every", "eval_samples", "eval_batch_size", "eval_sampler"),
    *("critic.value_clip", "critic.joint_weight"),
    *("ppo.clip", "ppo.dual_clip", "ppo.ratio", "ppo.balance_steps", "ppo.cfg_grad"),
    *("ppo.kl", "ppo.hold", "ppo.kl_limit"),
    *("ppo.gae_lambda", "ppo.lambda_gate", "ppo.advantage_clip", "ppo.target_clip"),
    *("ppo.num_minibatches", "ppo.critic_minibatches", "ppo.critic_rollouts", "ppo.num_inner_epochs"),
    "ppo.minibatch_draw",
    *("ppo.timestep_fraction", "ppo.microbatch_size"),
    *("ppo.policy_learning_rate", "ppo.warmup_steps", "ppo.final_learning_rate"),
    *("ppo.value_learning_rate", "ppo.trunk_learning_rate", "ppo.final_value_learning_rate"),
    *("ppo.betas", "ppo.weight_decay", "ppo.adam_eps", "ppo.max_grad_norm"),
}
"""Settings of TrainConfig that nothing in a checkpoint depends on. The others say what its numbers mean, as
the critic's shape and the sampler do, or which noise and prompts come next, as seed and batch_size do."""

REMEDY = (
    "take the old value, or start another run from the checkpoint's weights: --model CHECKPOINT --out NEW"
)


def changes(before: Any, now: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> both values, of every setting that two configurations differ in."""
    old, new = _flat(to_json(before)), _flat(to_json(now))
    names = [*old, *(name for name in new if name not in old)]
    pairs = {name: (old.get(name), new.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def require_resumable(before: Any, now: Any, changeable: Collection[str]) -> None:
    """
    Raises:
        ValueError: naming every setting that differs and is not one of the `changeable` or inside one.
    """
    fixed = [
        f"{name} was {old!r} and is {new!r} now"
        for name, (old, new) in changes(before, now).items()
        if not any(name == each or name.startswith(f"{each}.") for each in changeable)
    ]
    if fixed:
        raise ValueError(f"a run cannot go on with other settings: {'; '.join(fixed)}; {REMEDY}")


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(settings, dict):
        return {prefix: _plain(settings)}
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{prefix}.{name}" if prefix else name)
    return found


def _plain(value: Any) -> Any:
    return tuple(_plain(entry) for entry in value) if isinstance(value, list | tuple) else value
