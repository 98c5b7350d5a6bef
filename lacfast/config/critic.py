"""The value function and the low-rank adapters."""

from __future__ import annotations

from dataclasses import dataclass

from lacfast.config.checks import require

TRUNKS = ("branch", "shared", "joint", "lora", "copy", "latent_net", "none")
"""What the value head reads; see CriticConfig.trunk."""


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
        require(self.trunk in TRUNKS, f"unknown critic trunk {self.trunk!r}; known: {', '.join(TRUNKS)}")
        require(self.joint_weight > 0, f"joint_weight={self.joint_weight} must be > 0; or use 'shared'")
        for name in ("num_blocks", "num_heads", "head_dim", "hidden_dim", "lora_rank"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")


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
        require(self.rank >= 1, f"rank={self.rank} must be at least 1")
        require(self.alpha is None or self.alpha > 0, f"alpha={self.alpha} must be > 0")
        # A tuple also when it comes from a JSON file.
        if self.target_modules is not None:
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
