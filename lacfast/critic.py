"""The critic: the diffusion model's own features read as a value function V(x_t, t, prompt) on noisy latents.

A head with single queries costs one read of the features: key and value projections fold away,
    u = W_k^T q(t);   p = sum_l softmax_l(u . n_l / sqrt(D)) n_l,  n_l = RMSNorm(h_l);   out = W_v p
with q(t) modulated by the timestep. Source: arXiv 2605.27736; the folding is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from lacfast import ops
from lacfast.config import CriticConfig
from lacfast.precision import running_in
from lacfast.protocols import Backbone, Features, Trunk
from lacfast.records import Conditioning, Rollout
from lacfast.reference.objective import masked_mean
from lacfast.value_loss import SquaredError, build_value_loss

TIME_CHANNELS = 64
STATES_AT_ONCE = 32
"""That rollout_values takes together: larger products than a step's, and less memory than an update's."""


class TapPool(nn.Module):
    """Attention of timestep-modulated queries over one tap: (B, L, D) -> (B, heads * head_dim).

    `time_dim` 0: the queries do not depend on the timestep.
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
        normed = nn.functional.rms_norm(self.query, self.query.shape[-1:]).expand(batch, -1, -1)
        if self.modulation is not None:
            scale, shift = self.modulation(time_embedding).view(batch, 2, *self.query.shape).unbind(dim=1)
            normed = normed * (1 + scale) + shift
        query = torch.einsum("bhk,hkd->bhd", normed, self.key) / dim**0.5
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
        """Outputs (B, M, K) of taps (B, L, D), in whatever dtype the model left them, at timesteps (B,)."""
        time_embedding = self._embed(timestep)
        pooled = self.norm(
            torch.cat([pool(tap, time_embedding) for pool, tap in zip(self.pools, taps, strict=True)], dim=-1)
        )
        if self.modulation is not None:
            scale, shift = self.modulation(time_embedding).chunk(2, dim=-1)
            pooled = pooled * (1 + scale) + shift
        outputs: Tensor = self.output(nn.functional.gelu(self.hidden(pooled)))
        return outputs.view(len(outputs), self.num_rewards, -1)

    def _embed(self, timestep: Tensor) -> Tensor | None:
        if self.time_embedding is None:
            return None
        return nn.functional.silu(self.time_embedding(self.time_proj(timestep)))


def _zero_linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Critic(nn.Module):
    """Trunk and head. Predicts standardised rewards; see advantages.RewardNormalizer.

    `forward` gives values; how they are trained is the business of `outputs` and `loss` alone.
    """

    reward_mean: Tensor
    """(M,) float64 raw reward that V = 0 stands for."""
    reward_std: Tensor
    """(M,) float64 raw reward in one unit of V."""

    def __init__(self, trunk: Trunk, num_rewards: int, config: CriticConfig) -> None:
        super().__init__()
        self.trunk = trunk
        self.value_loss = build_value_loss(num_rewards, config)
        self.head = ValueHead(trunk.tap_dims, num_rewards, config, num_outputs=self.value_loss.num_outputs)
        self.config = config
        # In the weights' file, so that a critic knows its units wherever it is used.
        self.register_buffer("reward_mean", torch.zeros(num_rewards, dtype=torch.float64))
        self.register_buffer("reward_std", torch.ones(num_rewards, dtype=torch.float64))

    @property
    def num_rewards(self) -> int:
        return self.head.num_rewards

    def record(self, model: nn.Module, *, detach: bool = True) -> AbstractContextManager[Features]:
        """Within the context, a forward of the actor fills the returned dict with what the critic reads."""
        return self.trunk.record(model, detach=detach)

    def forward(
        self, features: Features, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Values (B, M) of the states (sample (B, ...), timestep (B,), conditioning (B, ...))."""
        return self.value_loss.values(self.outputs(features, sample, timestep, conditioning))

    def outputs(
        self, features: Features, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """The head's outputs (B, M, K), for `loss`; arguments as `forward`."""
        with running_in(self.trunk.compute_dtype, sample):
            taps = self.trunk(features, sample, timestep, conditioning)
        return self.head(taps, timestep)  # type: ignore[no-any-return]

    def loss(
        self,
        outputs: Tensor,
        targets: Tensor,
        old_values: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Mean loss () of config.loss over samples and rewards.

        Args:
            outputs: (B, M, K), see `outputs`.
            targets: (B, M) standardised.
            old_values: (B, M) of the rollout, for config.value_clip. None: values may move freely.
            mask: (B,) bool, samples that count. None: all.
        """
        clip = self.config.value_clip
        if old_values is not None and math.isfinite(clip) and isinstance(self.value_loss, SquaredError):
            losses = self.value_loss.clipped_losses(outputs, targets, old_values, clip)
        else:
            losses = self.value_loss.losses(outputs, targets)
        return losses.mean() if mask is None else masked_mean(losses.mean(dim=1), mask)

    @torch.no_grad()
    def rescale(self, old_mean: Tensor, old_std: Tensor, new_mean: Tensor, new_std: Tensor) -> None:
        """Keep raw predictions std V + mean when the statistics (M,) change (PopArt, arXiv 1602.07714)."""
        self.value_loss.rescale(self.head.output, old_mean, old_std, new_mean, new_std)


@torch.no_grad()
def rollout_values(critic: Critic, rollout: Rollout) -> Tensor:
    """Values (T, B, M) float32 of all states of a rollout, on the features kept from it.

    Whole steps are valued together as long as they have at most STATES_AT_ONCE states.
    """
    timesteps, batch = rollout.table.timesteps.to(rollout.latents.device), rollout.batch_size
    steps_at_once = max(STATES_AT_ONCE // batch, 1)
    values = []
    for first in range(0, rollout.table.num_steps, steps_at_once):
        part = timesteps[first : first + steps_at_once]
        steps = slice(first, first + len(part))
        rows = torch.arange(batch, device=part.device).repeat(len(part))
        values.append(
            critic(
                {name: tensor[steps].flatten(0, 1) for name, tensor in rollout.features.items()},
                rollout.latents[steps].flatten(0, 1),
                part.repeat_interleave(batch),
                rollout.conditioning.select(rows),
            ).float()
        )
    stacked = torch.cat(values)
    return stacked.view(-1, batch, stacked.shape[-1])


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


def attach_critic(backbone: Backbone, heads: Sequence[str], config: CriticConfig, *, seed: int = 0) -> None:
    """Give a backbone the critic that `config` describes, if it has none yet.

    Args:
        backbone: its critic is set.
        heads: names of what is valued, one head each.
        config: of the critic; trunk "none" takes the backbone's critic away.
        seed: of a new critic's weights.

    Raises:
        ValueError: when the backbone has another one.
    """
    attached = backbone.critic
    if config.trunk == "none":
        backbone.critic = None
    elif attached is None:
        backbone.critic = build_critic(backbone, len(heads), config, seed=seed)
    elif (attached.num_rewards, attached.config) != (len(heads), config):
        raise ValueError(
            f"the backbone's critic has {attached.num_rewards} heads and {attached.config}; {len(heads)} "
            f"rewards {list(heads)} and {config} do not fit it. Train with the critic's own, or set "
            "backbone.critic = None for a new one"
        )
