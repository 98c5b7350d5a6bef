"""Controls that exist to be beaten: critic trunks that know less, or pay more, and values of others.

Importing this module registers the trunks "latent_net", "prompt_only" and "pixel" and gives the
estimator ShuffledCritic its baseline.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from lacfast.advantages import with_baseline
from lacfast.backbones.estimate_trunks import CONVOLUTIONS, CleanEstimate, EstimateTrunk, halvings
from lacfast.backbones.latent import LatentBackbone
from lacfast.backbones.prompt_trunks import pooled_prompt, prompt_tokens
from lacfast.backbones.taps import feature_map_tokens
from lacfast.backbones.trunks import OwnForwardTrunk
from lacfast.config import CriticConfig, CriticValues
from lacfast.critic.trunk import Features, register_trunk
from lacfast.records import Conditioning, Rollout
from lacfast.rewards.frames import is_video
from lacfast.seeds import derived_seed

FIRST_CHANNELS = 16
"""Channels of the first map of "pixel", doubled with every halving."""


class LatentNetTrunk(OwnForwardTrunk):
    """Two transformer layers on patches of the latent and the prompt's mean token: the control of trunks.

    It knows nothing that the diffusion model learned.
    """

    def __init__(self, latent_shape: tuple[int, ...], prompt_dim: int, dim: int) -> None:
        super().__init__()
        channels, *sides = latent_shape
        self.embed: nn.Module
        if len(sides) == 1:
            length, self.embed = channels, nn.Linear(sides[0], dim)
        else:
            # A frame of a video is not joined with the next.
            patch = (1,) * (len(sides) - 2) + (2, 2)
            self.embed = CONVOLUTIONS[len(sides)](channels, dim, kernel_size=patch, stride=patch)  # type: ignore[arg-type]
            length = math.prod(side // step for side, step in zip(sides, patch, strict=True))
        self.position = nn.Parameter(0.02 * torch.randn(length, dim))
        self.prompt = nn.Linear(prompt_dim, dim)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim,
                nhead=max(dim // 32, 1),
                dim_feedforward=2 * dim,
                dropout=0.0,
                batch_first=True,
                norm_first=True,
            )
            for _ in range(2)
        )
        self.tap_dims = (dim,)

    def forward(
        self, features: Features, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> list[Tensor]:
        embedded = self.embed(sample)
        tokens = (embedded if embedded.ndim == 3 else feature_map_tokens(embedded)) + self.position
        prompt = self.prompt(conditioning.tensors["encoder_hidden_states"].to(sample.dtype).mean(dim=1))
        hidden = torch.cat([prompt[:, None].to(tokens.dtype), tokens], dim=1)
        for layer in self.layers:
            hidden = layer(hidden)
        return [hidden]


class PromptTrunk(OwnForwardTrunk):
    """The prompt's tokens and nothing of the state: the head knows a prompt's difficulty and the timestep.

    A critic that explains no more than this one has learned no state; see lacfast.learning.value_bounds.
    """

    def __init__(self, example: Conditioning) -> None:
        """`example`: of any prompt, for its widths."""
        super().__init__()
        self.tap_dims = (prompt_tokens(example).shape[-1], pooled_prompt(example).shape[-1])

    def forward(
        self, features: Features, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> list[Tensor]:
        return [prompt_tokens(conditioning), pooled_prompt(conditioning)[:, None]]


class PixelTrunk(EstimateTrunk):
    """Strided convolutions on the decoded estimate, each modulated by the prompt's embedding.

    Reward models of images read noisy states so, at the price of the decoder in every value; "Diffusion Model
    as a Noise-Aware Latent Reward Model" (arXiv 2502.01051) describes the practice and its weakness at high
    noise.
    """

    def __init__(
        self,
        estimate: CleanEstimate,
        decode: Callable[[Tensor], Tensor],
        latent_shape: tuple[int, ...],
        prompt_dim: int,
        dim: int,
        *,
        device: torch.device,
    ) -> None:
        """
        Args:
            estimate: state and model output to clean latents.
            decode: clean latents to images (B, 3, H, W) in [0, 1]; frozen.
            latent_shape: of one latent.
            prompt_dim: P of the pooled prompt.
            dim: channels of the last map.
            device: of the decoder.
        """
        super().__init__(estimate)
        # In a tuple, so that the decoder is no part of the critic's own weights.
        self.decoder = (decode,)
        with torch.no_grad():
            _, *sides = _channels_first(decode(torch.zeros(1, *latent_shape, device=device)))[0].shape
        depth = max(halvings(max(sides)), 1)
        widths = [3] + [min(FIRST_CHANNELS * 2**stage, dim) for stage in range(depth - 1)] + [dim]
        self.convolutions = nn.ModuleList(
            CONVOLUTIONS[len(sides)](narrow, wide, kernel_size=3, stride=2, padding=1)
            for narrow, wide in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(1, width, affine=False) for width in widths[1:])
        self.modulations = nn.ModuleList(nn.Linear(prompt_dim, 2 * width) for width in widths[1:])
        self.tap_dims = (dim,)

    def forward(
        self, features: Features, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> list[Tensor]:
        (decode,) = self.decoder
        # A decoder has a dtype of its own: SDXL's overflows in float16.
        with torch.autocast(sample.device.type, enabled=False):
            images = _channels_first(decode(self.clean(features, sample, timestep)))
        prompt = pooled_prompt(conditioning).to(sample.dtype)
        hidden = 2 * images - 1
        for convolution, norm, modulation in zip(
            self.convolutions, self.norms, self.modulations, strict=True
        ):
            scale, shift = modulation(prompt).view(len(prompt), -1, *(1,) * (hidden.ndim - 2)).chunk(2, dim=1)
            hidden = nn.functional.silu(norm(convolution(hidden)) * (1 + scale) + shift)
        return [feature_map_tokens(hidden)]


def _channels_first(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) as they are, videos (B, F, 3, H, W) as (B, 3, F, H, W)."""
    return images.transpose(1, 2) if is_video(images) else images


@dataclass(frozen=True)
class ShuffledCritic(CriticValues):
    """A critic that knows nothing of the state: its baseline is the value of another trajectory."""


@with_baseline.register
def with_values_of_others(estimator: ShuffledCritic, rollout: Rollout) -> Rollout:
    """The rollout with every trajectory's values replaced by those of another one, at the same steps.

    A control: these values have the right distribution and know nothing of the trajectory. Who gets whose
    depends on the rollout's noise key alone.

    Raises:
        ValueError: for a single trajectory.
    """
    count = rollout.batch_size
    if count < 2:
        raise ValueError(f"a batch of {count} has no other trajectory whose values it could take")
    key = derived_seed(int(rollout.noise.seed), int(rollout.noise.sample_ids[0]))
    # torch takes seeds of 64 bits.
    order = torch.randperm(count, generator=torch.Generator().manual_seed(key % 2**63))
    # Along the cycle that the permutation lists, nobody follows himself.
    giver = torch.empty_like(order)
    giver[order] = order.roll(1)
    return replace(rollout, values=rollout.values[:, giver.to(rollout.values.device)])


def latent_net(backbone: LatentBackbone, config: CriticConfig) -> LatentNetTrunk:
    """The trunk "latent_net"; its width is the head's."""
    prompt_dim = prompt_tokens(backbone.any_prompt()).shape[-1]
    return LatentNetTrunk(backbone.latent_shape, prompt_dim, config.hidden_dim)


def prompt_only(backbone: LatentBackbone, config: CriticConfig) -> PromptTrunk:
    """The trunk "prompt_only".

    Raises:
        ValueError: for a head that reads the prompt itself.
    """
    if config.text_conditioning != "none":
        raise ValueError(
            f"text_conditioning={config.text_conditioning!r} would give 'prompt_only' the prompt twice; "
            "leave it out"
        )
    return PromptTrunk(backbone.any_prompt())


def pixel(backbone: LatentBackbone, config: CriticConfig) -> PixelTrunk:
    """The trunk "pixel"; its last map is as wide as the head."""
    return PixelTrunk(
        CleanEstimate(backbone.scheduler, backbone.prediction),
        backbone.codec.decode,
        backbone.latent_shape,
        pooled_prompt(backbone.any_prompt()).shape[-1],
        config.hidden_dim,
        device=backbone.device,
    )


CONTROL_TRUNKS = {"latent_net": latent_net, "prompt_only": prompt_only, "pixel": pixel}
for name, build in CONTROL_TRUNKS.items():
    register_trunk(name, build)
