"""A critic trunk that reads the actor's own estimate of the clean latent, which every sampling forward gives.

"clean_net" is a small convolutional net on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lacfast.backbones.scheduler_choice import is_flow
from lacfast.backbones.taps import Tap, feature_map_tokens, record_taps
from lacfast.critic.trunk import Features, Trunk
from lacfast.records import Conditioning

FLOW_TIMESTEPS = 1000
"""timestep = 1000 sigma, where no scheduler says otherwise."""
MAP_SIDE = 8
"""A net halves what it reads until its sides are at most this long."""
CLEAN_CHANNELS = 32
"""Channels of "clean_net", everywhere."""


class CleanEstimate(nn.Module):
    """x0^ = c_x x + c_v v of a state x at timestep t with model output v, by the prediction type.

    flow:          x - s v,   s = t / 1000
    epsilon:       (x - sqrt(1 - A) v) / sqrt(A),   A = alphas_cumprod[t]        (arXiv 2010.02502, eq. 9)
    v_prediction:  sqrt(A) x - sqrt(1 - A) v                                     (arXiv 2202.00512)
    sample:        v
    """

    alphas_cumprod: Tensor

    def __init__(self, scheduler: Any, prediction: Callable[[Tensor], Tensor] | None = None) -> None:
        """
        Args:
            scheduler: diffusers' for DDIM, DDPM or flow matching; None: flow matching.
            prediction: what a step takes of the model's output. None: all of it.

        Raises:
            ValueError: for a prediction type that is none of these.
        """
        super().__init__()
        self.prediction = prediction
        config = {} if scheduler is None else scheduler.config
        self.num_timesteps: float = config.get("num_train_timesteps", FLOW_TIMESTEPS)
        has_flow = is_flow(scheduler)
        self.prediction_type = "flow" if has_flow else config["prediction_type"]
        if self.prediction_type not in ("flow", "epsilon", "v_prediction", "sample"):
            raise ValueError(
                f"no estimate of the clean latent for prediction_type {self.prediction_type!r}; "
                "use a critic trunk that reads no estimate, like 'branch'"
            )
        alphas = torch.ones(1) if has_flow else scheduler.alphas_cumprod.float()
        self.register_buffer("alphas_cumprod", alphas, persistent=False)

    def forward(self, sample: Tensor, model_output: Tensor, timestep: Tensor) -> Tensor:
        """(B, ...) of states (B, ...), the model's outputs (B, ...) and timesteps (B,)."""
        if self.prediction is not None:
            model_output = self.prediction(model_output)
        scales = timestep.view(-1, *(1,) * (sample.ndim - 1))
        if self.prediction_type == "flow":
            return sample - scales / self.num_timesteps * model_output
        if self.prediction_type == "sample":
            return model_output
        # Between two timesteps of the training the level is the lower one's: a critic's feature, no step.
        alpha: Tensor = self.alphas_cumprod[scales.long()]
        signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
        if self.prediction_type == "v_prediction":
            return signal * sample - noise * model_output
        return (sample - noise * model_output) / signal


class EstimateTrunk(Trunk):
    """A trunk that reads nothing of the actor's forward but its output."""

    def __init__(self, estimate: CleanEstimate) -> None:
        super().__init__()
        self.estimate = estimate

    def record(self, model: nn.Module, *, detach: bool = True) -> AbstractContextManager[Features]:
        def read(arguments: dict[str, Any], output: Any) -> Features:
            return {"model_output": output[0]}

        return record_taps(model, [Tap("", read)], detach=detach)

    def clean(self, features: Features, sample: Tensor, timestep: Tensor) -> Tensor:
        """Estimates (B, ...) in the sample's dtype."""
        estimate: Tensor = self.estimate(sample, features["model_output"].to(sample.dtype), timestep)
        return estimate


CONVOLUTIONS: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
"""Convolution by the number of a map's sides: height and width, before which a video has its frames."""


def halvings(side: int) -> int:
    """How often `side` must be halved until it is at most MAP_SIDE."""
    return max(math.ceil(math.log2(side / MAP_SIDE)), 0)


class CleanNetTrunk(EstimateTrunk):
    """Convolutions on the estimate itself: halvings down to MAP_SIDE, then two that keep the size."""

    def __init__(
        self,
        estimate: CleanEstimate,
        latent_maps: Callable[[Tensor], Tensor],
        latent_shape: tuple[int, ...],
    ) -> None:
        """
        Args:
            estimate: state and model output to clean latents.
            latent_maps: latents as the model takes them (B, ...) to maps (B, C, H, W) or (B, C, F, H, W).
            latent_shape: of one latent.
        """
        super().__init__(estimate)
        self.latent_maps = latent_maps
        channels, *sides = latent_maps(torch.zeros(1, *latent_shape)).shape[1:]
        strides = [2] * halvings(max(sides)) + [1, 1]
        widths = [channels] + [CLEAN_CHANNELS] * len(strides)
        self.convolutions = nn.ModuleList(
            CONVOLUTIONS[len(sides)](before, after, kernel_size=3, stride=stride, padding=1)
            for (before, after), stride in zip(pairwise(widths), strides, strict=True)
        )
        # At high noise an epsilon model's estimate is large: normalised behind the first convolution.
        self.norm = nn.GroupNorm(1, CLEAN_CHANNELS, affine=False)
        self.tap_dims = (CLEAN_CHANNELS,)

    def forward(
        self, features: Features, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> list[Tensor]:
        hidden = self.latent_maps(self.clean(features, sample, timestep))
        for convolution in self.convolutions:
            hidden = nn.functional.silu(self.norm(convolution(hidden)))
        return [feature_map_tokens(hidden)]
