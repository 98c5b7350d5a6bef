"""Advantages, loss and optimizers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from lacfast.config.checks import (
    Bound,
    Config,
    Count,
    CountOrNone,
    NonNegative,
    OneOf,
    Positive,
    Range,
    Share,
    require,
)
from lacfast.config.choice import Choice
from lacfast.config.unread import Unread

RATIOS = ("innovation", "ratio_norm")
"""Kinds of likelihood ratio; see PPOConfig.ratio."""
KL_KINDS = ("exact", "velocity", "flow_grpo")
"""Kinds of KL to the anchor; see KLPenalty.kind."""
ANCHORS = ("start", "base")
"""Policies that the KL is measured from; see KLPenalty.anchor."""
_Beta = Annotated[float, Range(least=0, below=1)]


@dataclass(frozen=True)
class Ratio(Choice):
    """PPO's clip of the likelihood ratio (arXiv 1707.06347, eq. 7)."""

    clip_range: Positive | tuple[Positive, Positive]
    """Both sides, or (low, high), > 0, in nats per element, as flow_grpo's: 1e-5 to 1e-4."""


@dataclass(frozen=True)
class Nats(Choice):
    """PPO's clip on the joint ratio of all N elements: Ratio(clip_nats / N)."""

    clip_nats: Positive | tuple[Positive, Positive]
    """Both sides, or (low, high), > 0, in nats."""


@dataclass(frozen=True)
class KLMask(Choice):
    """No clip, but the mask of Flow-DPPO (arXiv 2606.11025): a pair far out that moves with its advantage is
    dropped."""

    kl_threshold: Positive
    """KL(old, new) per element from which on it is, > 0. Flow-DPPO: 1e-5."""


@dataclass(frozen=True)
class KLPenalty(Choice, name="penalty"):
    """The KL to the anchor, a frozen policy, in the policy's loss."""

    weight: Positive
    """beta. flow_grpo: 0.04."""
    kind: Annotated[str, OneOf(KL_KINDS)] = "exact"
    """Which KL, see lacfast.schedule.kl_gains: "exact", "velocity" or "flow_grpo"."""
    target: Positive | None = None
    """KL per element, in the unit of its kind, that the weight holds by a rule of proportion, from where it
    is set; see lacfast.learning.adaptive_kl. None: the weight stays."""
    anchor: Annotated[str, OneOf(ANCHORS)] = "start"
    """Which policy: "start", as it was before this training, with the LoRA that it went on from; "base", the
    model without its LoRA."""


@dataclass(frozen=True)
class Hold(Choice):
    """Keeps the steps that no ratio reaches, the deterministic ones, where the anchor has them:

        loss += weight mean( (v - v_anchor)^2 )    over elements and pairs of such steps

    Weights are shared between steps. What early steps learn moves late ones too, where neither ratio nor KL
    sees it, and a faint pattern comes up in every image.
    """

    weight: Positive
    """Weight of the squared distance in the policy's loss. The demo: 1e-2."""
    share: Annotated[float, Range(above=0, most=1)] = 0.2
    """Share of a rollout's (sample, step) pairs at such steps that a pass holds, drawn at random. Each costs
    a forward and backward of the policy and a forward of the anchor."""


MINIBATCH_DRAWS = ("free", "stratified")


@dataclass(frozen=True, kw_only=True)
class PPOConfig(Config):
    """Advantages, loss and optimizers."""

    UNREAD = (
        Unread(
            options=("lambda_gate",),
            where=lambda ppo: ppo.gae_lambda == 1,
            because=lambda ppo: " where gae_lambda is 1",
            remedy="use gae_lambda < 1",
        ),
    )

    clip: Ratio | Nats | KLMask = Ratio(1e-4)
    """How far an update may move a pair. [paper] Ratio(1e-4) for SD3.5-M, Ratio(1e-5) for SD1.5."""
    dual_clip: Annotated[float, Range(above=1, off=math.inf)] = math.inf
    """c > 1: where A < 0 the gain is at least c A (arXiv 1912.09729, 3 there); inf: off."""
    ratio: Annotated[str, OneOf(RATIOS)] = "innovation"
    """"innovation": the transitions' likelihood ratio; "ratio_norm": GRPO-Guard's, on another scale per step,
    so its clip is another one too."""
    kl: KLPenalty | None = None
    """Penalty on the distance from the policy as it was before training. [paper] None."""
    hold: Hold | None = None
    """Keeps the steps outside the window where they were before training, or where KLPenalty.anchor is."""
    kl_limit: Bound = math.inf
    """Mean KL(old, new) per element that ends the updates on a rollout."""
    gae_lambda: Share = 1.0
    """Lambda of the policy's advantages. [paper] 1; lower only helps once the critic explains something."""
    lambda_gate: Annotated[float, Range(above=0, off=-math.inf)] = -math.inf
    """Score of the critic's explained variance from which on gae_lambda holds at a step, above 0, that of a
    critic which explains nothing; below it lambda is 1 there, which trusts no value. The score is the
    explained variance itself, or its place between floor and ceiling where value pretraining measured them.
    -inf: no gate."""
    advantage_clip: Bound = 10.0
    """Bound of the normalised advantages. [paper]"""
    target_clip: Bound = 5.0
    """Bound of the standardised value targets. [paper]"""
    balance_steps: bool = False
    """Weight every step by std / |b|, mean 1. For one change of the model a late step's ratio moves |b| / std
    times as far and drowns the early steps' gradient; GRPO-Guard's RatioNorm has the same aim."""
    num_minibatches: Count = 4
    """Optimizer steps per pass over a rollout. [paper] 4."""
    critic_minibatches: CountOrNone = 0
    """Optimizer steps of the critic per pass, which together see as many states as a rollout has; 0:
    num_minibatches."""
    critic_rollouts: Count = 1
    """Last rollouts whose states a pass of the critic draws from; 1: today's alone. The latents and features
    of the others stay in the host's memory and go into checkpoints."""
    minibatch_draw: Annotated[str, OneOf(MINIBATCH_DRAWS)] = "free"
    """"free": any (sample, step) pairs, in random order; "stratified": of every sample as many steps as of
    any other, to within one, which steps at random. Then several GPUs have the same work in a minibatch."""
    num_inner_epochs: Count = 1
    """Passes over a rollout."""
    timestep_fraction: Annotated[float, Range(above=0, most=1)] = 1.0
    """Share of a rollout's (sample, step) pairs that a pass trains the policy on, drawn at random."""
    microbatch_size: CountOrNone = 0
    """(sample, step) pairs per forward and backward; bounds memory, changes the result by the order of sums
    alone. 0: found at the first update from the free memory, at most 256 on a CPU. Halved when memory runs
    out."""
    policy_learning_rate: NonNegative = 1e-4
    """[paper]"""
    warmup_steps: CountOrNone = 0
    """Optimizer steps of the policy over which its rate rises linearly to policy_learning_rate."""
    final_learning_rate: NonNegative | None = None
    """Rate towards which the policy's falls linearly until the run ends: with TrainConfig.iterations, or with
    the iterations or seconds that `train` was given. None: it stays."""
    value_learning_rate: Positive = 1e-3
    """AdamW's rate of the value head, > 0. [paper]"""
    trunk_learning_rate: Positive = 3e-4
    """AdamW's rate of the critic's own blocks, > 0."""
    final_value_learning_rate: NonNegative | None = None
    """Rate towards which value_learning_rate falls as final_learning_rate says, and trunk_learning_rate by as
    large a share. None: both stay."""
    betas: tuple[_Beta, _Beta] = (0.9, 0.95)
    """AdamW. [paper]"""
    weight_decay: NonNegative = 1e-4
    """AdamW. [paper]"""
    adam_eps: Positive = 1e-15
    """Far below the gradients of a mean-reduced log-prob, whose RMS is near 5e-9."""
    moments: Annotated[str, OneOf(("float32", "int8"))] = "float32"
    """What AdamW's moments of actor and critic are kept in: "int8" takes a byte each and a scale per block of
    256 (arXiv 2110.02861), for small GPUs; the steps are no longer AdamW's to the last digit."""
    max_grad_norm: Bound = 1.0
    """Bound of the gradients' norm, of actor and critic each on its own."""
    cfg_grad: Annotated[str, OneOf(("cond", "both"))] = "cond"
    """"cond": the unconditional half runs without gradient (flow_grpo), and in the first optimizer step on a
    rollout, whose weights made it, for 8 pairs alone; "both": DDPO, TRL."""

    @property
    def repeats(self) -> bool:
        """Whether passes over a rollout come back to pairs that they had."""
        return self.num_inner_epochs * self.timestep_fraction > 1

    @property
    def anchor(self) -> str | None:
        """Which frozen policy the loss needs, see KLPenalty.anchor; None: none."""
        if self.kl is not None:
            return self.kl.anchor
        return None if self.hold is None else "start"

    def __post_init__(self) -> None:
        super().__post_init__()
        final = self.final_learning_rate
        require(
            final is None or final < self.policy_learning_rate,
            f"final_learning_rate={final} must be less than policy_learning_rate="
            f"{self.policy_learning_rate}, or None: the rate stays",
        )
        final = self.final_value_learning_rate
        require(
            final is None or final < self.value_learning_rate,
            f"final_value_learning_rate={final} must be less than value_learning_rate="
            f"{self.value_learning_rate}, or None: the rate stays",
        )

    def require_pairs_to_hold(self, num_steps: int, trained: int, *, batch_size: int, shard: int) -> None:
        """
        Raises:
            ValueError: where the hold has no steps beside the `trained` ones, too few pairs, or shards.
        """
        assert self.hold is not None
        require(
            trained < num_steps,
            f"ppo.hold={self.hold} keeps the steps outside the window, and all {trained} steps are trained; "
            "narrow sampler.window, for example fixed:0..5, or leave the hold out (--train.ppo.hold none): "
            "ppo.kl reaches every trained step",
        )
        held = math.ceil(self.hold.share * (num_steps - trained) * batch_size)
        require(
            held >= self.num_minibatches,
            f"ppo.hold={self.hold} has {held} pairs for num_minibatches={self.num_minibatches}; raise share "
            "or batch_size, or lower num_minibatches",
        )
        require(
            shard == 1,
            f"ppo.hold={self.hold} runs forwards of its own, which shard={shard} does not divide; use "
            "shard=1, or leave the hold out (--train.ppo.hold none)",
        )
