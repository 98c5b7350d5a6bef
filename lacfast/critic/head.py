"""The value head: attention queries over the trunk's taps, then a small MLP, both modulated by the timestep.

Single queries cost one read of the features: key and value projections fold away,
    u = W_k^T q(t);   p = sum_l softmax_l(u . n_l / sqrt(D)) n_l,  n_l = RMSNorm(h_l);   out = W_v p
with q(t) modulated by the timestep. Source: arXiv 2605.27736; the folding is ours. What depends on the
timestep alone, its embedding, the modulation and u, is computed once for all states that share it.
"""

from __future__ import annotations

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from lacfast import ops
from lacfast.config import CriticConfig

TIME_CHANNELS = 64


class TapPool(nn.Module):
    """Attention of timestep-modulated queries over one tap: (B, L, D) -> (B, heads * head_dim).

    Embeddings (S, time_dim) are of S runs of B / S states each. `time_dim` 0: the queries do not depend on
    the timestep.
    """

    def __init__(self, dim: int, *, num_heads: int, head_dim: int, time_dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(num_heads, head_dim))
        self.key = nn.Parameter(torch.randn(num_heads, head_dim, dim) / head_dim**0.5)
        self.value = nn.Parameter(torch.randn(num_heads, dim, head_dim) / dim**0.5)
        self.norm_weight = nn.Parameter(torch.ones(dim))
        self.modulation = _zero_linear(time_dim, 2 * num_heads * head_dim) if time_dim else None

    def forward(self, tokens: Tensor, time_embedding: Tensor | None) -> Tensor:
        batch, dim = tokens.shape[0], tokens.shape[-1]
        runs = 1 if time_embedding is None else len(time_embedding)
        normed = nn.functional.rms_norm(self.query, self.query.shape[-1:]).expand(runs, -1, -1)
        if self.modulation is not None:
            scale, shift = self.modulation(time_embedding).view(runs, 2, *self.query.shape).unbind(dim=1)
            normed = normed * (1 + scale) + shift
        query = of_states(torch.einsum("bhk,hkd->bhd", normed, self.key) / dim**0.5, batch)
        # Feature maps come as views with the channels outermost.
        pooled = ops.value_pool(tokens.contiguous(), query.contiguous(), self.norm_weight)
        return torch.einsum("bhd,hdk->bhk", pooled, self.value).flatten(1)


class ValueHead(nn.Module):
    """Taps to outputs (B, M, K), in float32; a ValueLoss says what they mean.

    The last layer starts at zero: V = 0 makes the first advantages the rewards.
    """

    def __init__(
        self, tap_dims: tuple[int, ...], num_rewards: int, config: CriticConfig, *, num_outputs: int = 1
    ) -> None:
        """`num_outputs`: K per reward."""
        super().__init__()
        time_dim = config.hidden_dim if config.time_conditioning else 0
        self.num_rewards = num_rewards
        self.time_proj = Timesteps(TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(TIME_CHANNELS, time_dim) if time_dim else None
        self.pools = nn.ModuleList(
            TapPool(dim, num_heads=config.num_heads, head_dim=config.head_dim, time_dim=time_dim)
            for dim in tap_dims
        )
        width = len(tap_dims) * config.num_heads * config.head_dim
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = _zero_linear(time_dim, 2 * width) if time_dim else None
        self.hidden = nn.Linear(width, config.hidden_dim)
        self.output = _zero_linear(config.hidden_dim, num_rewards * num_outputs)

    def forward(self, taps: list[Tensor], timestep: Tensor) -> Tensor:
        """Outputs (B, M, K) of taps (B, L, D), in whatever dtype the model left them.

        `timestep`: (B,), or (S,) of S runs of B / S states that share theirs.
        """
        time_embedding = self._embed(timestep)
        pooled = self.norm(
            torch.cat([pool(tap, time_embedding) for pool, tap in zip(self.pools, taps, strict=True)], dim=-1)
        )
        if self.modulation is not None:
            pooled = _modulated(pooled, *self.modulation(time_embedding).chunk(2, dim=-1))
        outputs: Tensor = self.output(nn.functional.gelu(self.hidden(pooled)))
        return outputs.view(len(outputs), self.num_rewards, -1)

    def _embed(self, timestep: Tensor) -> Tensor | None:
        if self.time_embedding is None:
            return None
        return nn.functional.silu(self.time_embedding(self.time_proj(timestep)))


def of_states(rows: Tensor, batch: int) -> Tensor:
    """(batch, ...) of (S, ...): each row for as many neighbours."""
    if len(rows) == batch:
        return rows
    return rows[:, None].expand(-1, batch // len(rows), *rows.shape[1:]).flatten(0, 1)


def _modulated(states: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(B, W) of states (B, W) and of what runs of them share, (S, W)."""
    if len(scale) == len(states):
        return states * (1 + scale) + shift
    runs = states.view(len(scale), -1, states.shape[-1])
    modulated = runs * (1 + scale[:, None]) + shift[:, None]
    return modulated.flatten(0, 1)


def _zero_linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
