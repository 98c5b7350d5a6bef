"""The value function and the low-rank adapters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from lacfast.config.checks import (
    Bound,
    Config,
    Count,
    OneOf,
    Positive,
    Range,
    Seed,
    require,
    unknown,
)
from lacfast.config.unread import Unread, readers

TRUNKS = (
    "branch",
    "shared",
    "joint",
    "lora",
    "copy",
    "clean_net",
    "none",
)
"""What the value head reads; see CriticConfig.trunk."""
REGISTERED_TRUNKS: dict[str, Callable[[Any, Any], Any]] = {}
"""Name -> builder of the trunks that lacfast.critic.trunk.register_trunk has added."""
TAPPED_TRUNKS = ("shared", "joint", "lora", "copy")
"""Trunks that read a whole model at some of its blocks."""
WEIGHTLESS_TRUNKS = ("shared", "joint")
"""Trunks that are the actor's own, so that the head's weights are all that the critic has."""
ACTOR_TRUNKS = ("branch", "shared", "clean_net")
"""Trunks that can learn on what the actor's own training forward gives them."""
VALUE_LOSSES = ("mse", "bce", "hl_gauss")
"""What values are trained with; see CriticConfig.loss."""
_TRUNK_READERS = {
    "num_blocks": ("branch",),
    "taps": TAPPED_TRUNKS,
    "joint_weight": ("joint",),
    "lora_rank": ("lora",),
    "keep_features": ACTOR_TRUNKS,
}
"""Setting -> the trunks of lacfast that read it; one that was registered may read all."""
_LOSS_READERS = {"num_bins": ("hl_gauss",), "bin_range": ("hl_gauss",), "value_clip": ("mse",)}
_HEAD = (
    *("time_conditioning", "text_conditioning", "loss", "num_bins", "bin_range", "value_clip"),
    *("num_heads", "head_dim", "hidden_dim"),
)
"""What describes a critic's head and its loss, which every trunk has but "none"."""
TEXT_CONDITIONINGS = ("none", "pooled", "tokens")
"""What the head reads of the prompt; see CriticConfig.text_conditioning."""


@dataclass(frozen=True, kw_only=True)
class CriticConfig(Config):
    """The value function on noisy latents."""

    UNREAD = (
        Unread(
            options=_HEAD,
            where=lambda critic: critic.trunk == "none",
            because=lambda critic: ": trunk='none' has no head",
        ),
        *readers("loss", _LOSS_READERS),
        *readers("trunk", _TRUNK_READERS, known=TRUNKS),
    )
    trunk: str = "branch"
    """"branch": the actor's lower features, own copy of the last blocks; "shared": heads on the actor's
    detached taps; "joint": the same, and the value's gradient trains the actor too; "lora": own LoRA on the
    actor's frozen or trained base; "copy": own full trunk; "clean_net": a small net on the actor's estimate
    of the clean latent; "none": no critic (group-relative baselines); or a name that `register_trunk` of
    lacfast.critic.trunk was given."""
    num_blocks: Count = 1
    """k, blocks of the branch; 1 of 3 in the tiny DiT, 2 to 6 of 24 for SD3.5-M."""
    keep_features: bool = True
    """Rollouts keep what the critic reads. False, for trunks that read the actor's forward ("branch",
    "shared", "clean_net"), where memory is short: the critic learns on features of the actor's own training
    forward, in steps of its own beside each of the actor's. Those are of the actor as it then is, and of the
    trained pairs alone: deterministic steps are left out. Value pretraining, where the actor has no such
    forward, keeps them all the same."""
    taps: tuple[Annotated[float, Range(above=0, most=1)], ...] | None = None
    """Depths of the tapped blocks as fractions of all, for "shared", "joint", "lora" and "copy". None: 1/3,
    2/3 and 1 of a transformer [paper], the mid and every up block of a UNet."""
    time_conditioning: bool = True
    """The timestep modulates the head's queries and hidden layer. [paper] essential."""
    text_conditioning: Annotated[str, OneOf(TEXT_CONDITIONINGS)] = "none"
    """What the head reads besides the trunk's taps: "none"; "pooled": the pooled prompt embedding, the mean
    token where the family has none; "tokens": all prompt tokens. [paper] matters less."""
    loss: Annotated[str, OneOf(VALUE_LOSSES)] = "mse"
    """"mse"; "bce": V is a probability, for rewards in [0, 1]; "hl_gauss": classification over bins
    (arXiv 2403.03950). Steering and GAE read values in the same units whatever it is."""
    num_bins: Annotated[int, Range(least=2)] = 51
    """Bins of "hl_gauss" (arXiv 2403.03950)."""
    bin_range: Positive = 6.0
    """"hl_gauss": bins reach so many standard deviations of the first rewards to each side of their mean; a
    little more than PPOConfig.target_clip, so that no clipped target lies at the edge."""
    value_clip: Bound = math.inf
    """"mse": PPO's bound on a value's move from that of the rollout, in standard deviations of the reward
    (openai/baselines' ppo2, 0.2 there); inf: off."""
    num_heads: Count = 4
    """Attention queries per tap."""
    head_dim: Count = 32
    """Features that each query returns."""
    hidden_dim: Count = 128
    """Width of the MLP behind the queries; small heads overfit less."""
    joint_weight: Positive = 1e-3
    """Weight of the value loss in the actor's, for "joint". A mean-reduced policy gradient is about 1/sqrt(N)
    of the value's, so 1/sqrt(N) weighs them alike."""
    lora_rank: Count = 16
    """Rank of the adapter of the trunk "lora"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known_trunks = (*TRUNKS, *REGISTERED_TRUNKS)
        if self.trunk not in known_trunks:
            raise unknown(
                "critic trunk",
                self.trunk,
                known_trunks,
                "One that was registered is known after importing the module that registers it: "
                "bench.learning.controls has 'latent_net', 'prompt_only' and 'pixel'",
            )
        require(self.taps != (), "taps=() has no depth to read; leave it out for the model's own")


BASE_PRECISIONS = ("model", "int8")
"""What the frozen base of a LoRA is kept in."""


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(Config):
    """A low-rank adapter through peft. It has no dropout: a ratio must be 1 before the first update."""

    rank: Count = 32
    """Rank of the change of every weight. flow_grpo: 32."""
    alpha: Positive | None = None
    """The change is scaled by alpha / rank. None: alpha = rank; flow_grpo: 2 rank."""
    target_modules: tuple[str, ...] | None = None
    """Ends of the names of the adapted modules. None: the family's attention projections."""
    seed: Seed = 0
    """Seed of the first weights; the adapter starts as the identity whatever they are."""
