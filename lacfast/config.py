"""Settings as frozen dataclasses: the docstring under a field gives unit, range and source of its default."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

TRUNKS = ("branch", "shared", "joint", "lora", "copy", "latent_net", "none")
"""What the value head reads; see CriticConfig.trunk."""
RATIOS = ("innovation", "ratio_norm")
"""Kinds of likelihood ratio; see PPOConfig.ratio."""
KL_KINDS = ("exact", "velocity", "flow_grpo")
"""Kinds of KL to the reference model; see PPOConfig.kl."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How trajectories are made."""

    kind: str = "flow_sde"
    """Sampler kind, see lacfast.schedule. Source: Flow-GRPO."""
    num_steps: int = 10
    """T, denoising steps. Flow-GRPO trains with 10."""
    noise_level: float = 0.7
    """eta of the kind, >= 0. Flow-GRPO."""
    shift: float = 1.0
    """Timestep shift of the noise levels, > 0; 1 is uniform, SD3 uses 3."""
    window: tuple[int, int] | None = None
    """(start, stop) stochastic steps. None: all but the last, whose std is too small to train."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 runs without the unconditional half, as the paper does."""

    def __post_init__(self) -> None:
        _require(self.num_steps >= 1, f"num_steps={self.num_steps} must be at least 1")
        _require(self.noise_level >= 0, f"noise_level={self.noise_level} must be >= 0")
        _require(self.shift > 0, f"shift={self.shift} must be > 0")
        _require(
            self.guidance_scale >= 1, f"guidance_scale={self.guidance_scale} must be >= 1 (1: no guidance)"
        )

    @property
    def stochastic_window(self) -> tuple[int, int]:
        """The window with its default resolved: the last step runs as ODE."""
        return (0, max(self.num_steps - 1, 1)) if self.window is None else self.window


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The value function on noisy latents."""

    trunk: str = "branch"
    """"branch": the actor's lower features, own copy of the last blocks; "shared": heads on the actor's
    detached taps; "joint": the same, and the value's gradient trains the actor too; "lora": own LoRA on the
    actor's frozen or trained base; "copy": own full trunk; "latent_net": a small net on the latents (a
    control); "none": no critic (group-relative baselines)."""
    num_blocks: int = 1
    """k, blocks of the branch; 1 of 3 in the demo, 2 to 6 of 24 for SD3.5-M."""
    num_heads: int = 4
    """Attention queries per tap."""
    head_dim: int = 32
    """Features that each query returns."""
    hidden_dim: int = 128
    """Width of the MLP behind the queries; small heads overfit less. Of "latent_net" too."""
    joint_weight: float = 1e-3
    """Of the value loss in the actor's, for "joint". A mean-reduced policy gradient is about 1/sqrt(N) of
    the value's, so 1/sqrt(N) weighs them alike."""
    lora_rank: int = 16
    """Of the trunk "lora"."""

    def __post_init__(self) -> None:
        _require(self.trunk in TRUNKS, f"unknown critic trunk {self.trunk!r}; known: {', '.join(TRUNKS)}")
        _require(self.joint_weight > 0, f"joint_weight={self.joint_weight} must be > 0; or use 'shared'")
        for name in ("num_blocks", "num_heads", "head_dim", "hidden_dim", "lora_rank"):
            _require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """A low-rank adapter through peft. It has no dropout: a ratio must be 1 before the first update."""

    rank: int = 32
    """Of the change of every weight. flow_grpo: 32."""
    alpha: int | None = None
    """The change is scaled by alpha / rank. None: alpha = rank; flow_grpo: 2 rank."""
    target_modules: tuple[str, ...] | None = None
    """Ends of the names of the adapted modules. None: the family's attention projections."""
    seed: int = 0
    """Of the first weights; the adapter starts as the identity whatever they are."""

    def __post_init__(self) -> None:
        _require(self.rank >= 1, f"rank={self.rank} must be at least 1")
        _require(self.alpha is None or self.alpha > 0, f"alpha={self.alpha} must be > 0")
        # A tuple also when it comes from a JSON file.
        if self.target_modules is not None:
            object.__setattr__(self, "target_modules", tuple(self.target_modules))


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Advantages, loss and optimizers."""

    clip_range: float | tuple[float, float] | None = 1e-4
    """Clip of the ratio, or (low, high), in nats per element (the field's unit); exactly one of this,
    clip_nats and kl_threshold is set. [paper] 1e-4 for SD3.5-M, 1e-5 for SD1.5."""
    clip_nats: float | tuple[float, float] | None = None
    """The same clip on the joint, clip_range = clip_nats / N."""
    kl_threshold: float | None = None
    """No clip, but the KL mask of Flow-DPPO: a pair that moves with its advantage is dropped from this KL per
    element on. 1e-5 there."""
    dual_clip: float = math.inf
    """c > 1: where A < 0 the gain is at least c A (arXiv 1912.09729, 3 there); inf: off."""
    ratio: str = "innovation"
    """"innovation": the transitions' likelihood ratio; "ratio_norm": GRPO-Guard's, on another scale per step,
    so its clip is another one too."""
    kl_weight: float = 0.0
    """beta of the KL to the reference model; 0 keeps no reference. [paper] 0."""
    kl: str = "exact"
    """Kind of that KL, see lacfast.schedule.kl_gains: "exact", "velocity" or "flow_grpo"."""
    kl_limit: float = math.inf
    """Mean KL(old, new) per element that ends the updates on a rollout."""
    gamma: float = 1.0
    """Discount; the horizon is fixed, so 1."""
    gae_lambda: float = 1.0
    """Lambda of the policy's advantages. [paper] 1; lower only helps once the critic explains something."""
    advantage_clip: float = 10.0
    """Bound of the normalised advantages. [paper]"""
    target_clip: float = 5.0
    """Bound of the standardised value targets. [paper]"""
    balance_steps: bool = False
    """Weight every step by std / |b|, mean 1. For one change of the model a late step's ratio moves |b| / std
    times as far and drowns the early steps' gradient; GRPO-Guard's RatioNorm has the same aim."""
    num_minibatches: int = 4
    """Optimizer steps per pass over a rollout. [paper] 4."""
    num_inner_epochs: int = 1
    """Passes over a rollout."""
    timestep_fraction: float = 1.0
    """Share of a rollout's (sample, step) pairs that a pass trains the policy on, drawn at random."""
    microbatch_size: int = 512
    """(sample, step) pairs per forward and backward; bounds memory, does not change the result."""
    policy_learning_rate: float = 1e-4
    """[paper]"""
    warmup_steps: int = 0
    """Optimizer steps of the policy over which its rate rises linearly to policy_learning_rate."""
    value_learning_rate: float = 1e-3
    """Of the value head. [paper]"""
    trunk_learning_rate: float = 3e-4
    """Of the critic's own blocks."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW. [paper]"""
    weight_decay: float = 1e-4
    """AdamW. [paper]"""
    adam_eps: float = 1e-15
    """Far below the gradients of a mean-reduced log-prob, whose RMS is near 5e-9."""
    max_grad_norm: float = 1.0
    """Of actor and critic, each on its own."""
    cfg_grad: str = "cond"
    """"cond": the unconditional half runs without gradient (flow_grpo); "both": DDPO, TRL."""

    def __post_init__(self) -> None:
        bounds = {
            "clip_range": self.clip_range, "clip_nats": self.clip_nats, "kl_threshold": self.kl_threshold,
        }  # fmt: skip
        given = [(name, value) for name, value in bounds.items() if value is not None]
        _require(
            len(given) == 1, f"set exactly one of {', '.join(bounds)}, got {bounds}; the others are None"
        )
        name, bound = given[0]
        values = bound if isinstance(bound, tuple) else (bound,)
        _require(all(value > 0 for value in values), f"{name} must be > 0, got {bound}")
        _require(self.dual_clip > 1, f"dual_clip={self.dual_clip} must be above 1 (inf: off)")
        for option, known in (("ratio", RATIOS), ("kl", KL_KINDS)):
            chosen = getattr(self, option)
            _require(chosen in known, f"unknown {option} {chosen!r}; known: {', '.join(known)}")
        _require(
            self.cfg_grad in ("cond", "both"), f"unknown cfg_grad {self.cfg_grad!r}; known: 'cond', 'both'"
        )
        _require(
            0 < self.timestep_fraction <= 1, f"timestep_fraction={self.timestep_fraction} must lie in (0, 1]"
        )
        _require(0 <= self.gae_lambda <= 1, f"gae_lambda={self.gae_lambda} must lie in [0, 1]")
        _require(self.warmup_steps >= 0, f"warmup_steps={self.warmup_steps} must be >= 0 (0: none)")
        for name in ("num_minibatches", "num_inner_epochs", "microbatch_size"):
            _require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ValuePretrainingConfig:
    """Value pretraining: the actor is frozen, the critic learns Monte-Carlo returns."""

    iterations: int = 15
    """Rollouts. [paper] about 15, more is worse."""
    kept_rollouts: int = 15
    """Rollouts to learn from, the latest; the actor is frozen, so old ones stay true. [paper] 3."""
    passes: float = 0.5
    """Passes over the kept states per iteration."""
    minibatch_size: int = 256
    """(sample, step) pairs per optimizer step."""
    held_out_samples: int = 512
    """Trajectories on held-out prompts that choose when to stop."""
    initial_rate_factor: float = 3.0
    """The critic's learning rates start at this multiple and fall linearly to 1 over the iterations."""
    patience: int = 4
    """Iterations without a better held-out explained variance before it stops; the best critic is kept."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    seed: int = 0
    """Of noise, prompts and initial weights."""
    batch_size: int = 128
    """Trajectories per rollout, one per prompt draw."""
    rollout_batch_size: int = 0
    """Trajectories sampled at a time; the rewards of one part are computed while the next is sampled. Bounds
    memory, does not change the result. 0: the whole rollout at once."""
    samples_per_prompt: int = 1
    """Consecutive trajectories that share a prompt; 1 for the critic, a group for group-relative methods."""
    iterations: int = 300
    """Rollout and update cycles. [paper] 300."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    pretrain: ValuePretrainingConfig = field(default_factory=ValuePretrainingConfig)
    ema_decay: float = 0.0
    """Decay per iteration of the average of the policy's weights that evaluation uses; 0 keeps none."""
    gradient_checkpointing: bool = False
    """Recompute activations of the update instead of keeping them; bounds memory, costs a forward."""
    eval_every: int = 0
    """Iterations between evaluations on held-out prompts; 0: only when asked."""
    eval_samples: int = 1024
    """Images per evaluation; below about 1000 rankings flip."""
    eval_batch_size: int = 256
    """Images per batch of an evaluation."""
    eval_sampler: SamplerConfig | None = None
    """How evaluation samples, e.g. kind "ode" with noise_level 0 and more steps. None: as training does."""
    on_reward_error: str = "raise"
    """"raise": a reward that fails ends the run, the rollout stays in trainer.last_rollout;
    "skip": the rollout is dropped with a warning and never trained on."""

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, f"batch_size={self.batch_size} must be at least 1")
        _require(
            self.samples_per_prompt >= 1 and self.batch_size % self.samples_per_prompt == 0,
            f"batch_size={self.batch_size} must be a multiple of "
            f"samples_per_prompt={self.samples_per_prompt}",
        )
        _require(
            self.rollout_batch_size >= 0,
            f"rollout_batch_size={self.rollout_batch_size} must be >= 0 (0: the whole rollout)",
        )
        _require(self.eval_batch_size >= 1, f"eval_batch_size={self.eval_batch_size} must be at least 1")
        _require(0 <= self.ema_decay < 1, f"ema_decay={self.ema_decay} must lie in [0, 1)")
        _require(
            self.on_reward_error in ("raise", "skip"),
            f"unknown on_reward_error {self.on_reward_error!r}; known: 'raise', 'skip'",
        )


@dataclass(frozen=True, kw_only=True)
class SteeringConfig:
    """Steering of sampling by the critic at inference."""

    particles: int = 4
    """Trajectories per image at the start, a power of two; 1 does not prune."""
    prune_fractions: tuple[float, ...] = (0.5, 0.75)
    """When to halve the particles, as fractions of the steps."""
    guidance_weight: float = 0.0
    """Length of the move along the value gradient, as a fraction of the model output's; 0: no gradient."""
    guidance_window: tuple[float, float] = (0.2, 0.9)
    """Noise levels between which the gradient is used."""
    batch_size: int = 256
    """Images per batch."""
    seed: int = 0
    """Of the noise."""

    def __post_init__(self) -> None:
        _require(
            self.particles >= 1 and self.particles & (self.particles - 1) == 0,
            f"particles={self.particles} must be a power of two",
        )
        _require(
            self.guidance_weight >= 0, f"guidance_weight={self.guidance_weight} must be >= 0 (0: no guidance)"
        )
        low, high = self.guidance_window
        _require(
            0 <= low < high <= 1, f"guidance_window={self.guidance_window} must satisfy 0 <= low < high <= 1"
        )
