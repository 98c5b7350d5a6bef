"""The critic: the diffusion model's own features read as a value function V(x_t, t, prompt) on noisy latents.

A head with single queries costs one read of the features: key and value projections fold away,
    u = W_k^T q(t);   p = sum_l softmax_l(u . n_l / sqrt(D)) n_l,  n_l = RMSNorm(h_l);   out = W_v p
with q(t) modulated by the timestep. Source: arXiv 2605.27736; the folding is ours.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from lacfast import ops
from lacfast.config import CriticConfig
from lacfast.precision import running_in
from lacfast.protocols import Backbone, Features, Trunk
from lacfast.records import Conditioning

TIME_CHANNELS = 64


class TapPool(nn.Module):
    """Attention of timestep-modulated queries over one tap: (B, L, D) -> (B, heads * head_dim)."""

    def __init__(self, dim: int, *, num_heads: int, head_dim: int, time_dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(num_heads, head_dim))
        self.key = nn.Parameter(torch.randn(num_heads, head_dim, dim) / head_dim**0.5)
        self.value = nn.Parameter(torch.randn(num_heads, dim, head_dim) / dim**0.5)
        self.norm_weight = nn.Parameter(torch.ones(dim))
        self.modulation = nn.Linear(time_dim, 2 * num_heads * head_dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, tokens: Tensor, time_embedding: Tensor) -> Tensor:
        batch, dim = tokens.shape[0], tokens.shape[-1]
        scale, shift = self.modulation(time_embedding).view(batch, 2, *self.query.shape).unbind(dim=1)
        normed = nn.functional.rms_norm(self.query, self.query.shape[-1:])
        query = torch.einsum("bhk,hkd->bhd", normed * (1 + scale) + shift, self.key) / dim**0.5
        # Feature maps come as views with the channels outermost.
        pooled = ops.value_pool(tokens.contiguous(), query.contiguous(), self.norm_weight)
        return torch.einsum("bhd,hdk->bhk", pooled, self.value).flatten(1)


class ValueHead(nn.Module):
    """Taps -> values (B, M), in float32.

    The last layer starts at zero: V = 0 makes the first advantages the rewards.
    """

    def __init__(self, tap_dims: tuple[int, ...], num_rewards: int, config: CriticConfig) -> None:
        super().__init__()
        time_dim = config.hidden_dim
        self.time_proj = Timesteps(TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(TIME_CHANNELS, time_dim)
        self.pools = nn.ModuleList(
            TapPool(dim, num_heads=config.num_heads, head_dim=config.head_dim, time_dim=time_dim)
            for dim in tap_dims
        )
        width = len(tap_dims) * config.num_heads * config.head_dim
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(time_dim, 2 * width)
        self.hidden = nn.Linear(width, config.hidden_dim)
        self.output = nn.Linear(config.hidden_dim, num_rewards)
        for layer in (self.modulation, self.output):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, taps: list[Tensor], timestep: Tensor) -> Tensor:
        """Values (B, M) of taps (B, L, D), in whatever dtype the model left them, at timesteps (B,)."""
        time_embedding = nn.functional.silu(self.time_embedding(self.time_proj(timestep)))
        pooled = torch.cat(
            [pool(tap, time_embedding) for pool, tap in zip(self.pools, taps, strict=True)], dim=-1
        )
        scale, shift = self.modulation(time_embedding).chunk(2, dim=-1)
        hidden = nn.functional.gelu(self.hidden(self.norm(pooled) * (1 + scale) + shift))
        values: Tensor = self.output(hidden)
        return values

    @torch.no_grad()
    def rescale(self, old_mean: Tensor, old_std: Tensor, new_mean: Tensor, new_std: Tensor) -> None:
        """Keep raw predictions std V + mean when the statistics (M,) change (PopArt, arXiv 1602.07714)."""
        self.output.weight.mul_((old_std / new_std)[:, None])
        self.output.bias.copy_((old_std * self.output.bias + old_mean - new_mean) / new_std)


class Critic(nn.Module):
    """Trunk and head. Predicts standardised rewards; see advantages.RewardNormalizer."""

    def __init__(self, trunk: Trunk, num_rewards: int, config: CriticConfig) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = ValueHead(trunk.tap_dims, num_rewards, config)
        self.config = config

    @property
    def num_rewards(self) -> int:
        return self.head.output.out_features

    def record(self, model: nn.Module, *, detach: bool = True) -> AbstractContextManager[Features]:
        """Within the context, a forward of the actor fills the returned dict with what the critic reads."""
        return self.trunk.record(model, detach=detach)

    def forward(
        self, features: Features, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Values (B, M) of the states (sample (B, ...), timestep (B,), conditioning (B, ...))."""
        with running_in(self.trunk.compute_dtype, sample):
            taps = self.trunk(features, sample, timestep, conditioning)
        return self.head(taps, timestep)  # type: ignore[no-any-return]


def build_critic(
    backbone: Backbone, num_rewards: int, config: CriticConfig, *, seed: int = 0
) -> Critic | None:
    """A new critic for `backbone` on its device, or None for trunk "none"."""
    if config.trunk == "none":
        return None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        critic = Critic(backbone.build_trunk(config), num_rewards, config)
    return critic.to(next(backbone.model.parameters()).device)
