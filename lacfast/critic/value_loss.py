"""How a value head's outputs become values, and what they are trained with: mean squared, BCE or HL-Gauss.

A value is always in units of the standardised reward: that is what GAE, steering and evaluation read. Each
loss also says how raw predictions survive a change of the reward's statistics (PopArt, arXiv 1602.07714).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lacfast.config import CriticConfig

SMOOTHING = 0.75
"""HL-Gauss: std of a target's Gaussian in bin widths (arXiv 2403.03950, section 4)."""


class ValueLoss(nn.Module):
    """Outputs (B, M, K) of a head to values (B, M), and a loss against targets (B, M) in the same units."""

    num_outputs = 1
    """K, outputs per value."""

    def values(self, outputs: Tensor) -> Tensor:
        """(B, M) standardised values; gradients flow."""
        raise TypeError(f"{type(self).__name__} does not define values")

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(B, M), one loss per value."""
        raise TypeError(f"{type(self).__name__} does not define losses")

    def rescale(
        self, layer: nn.Linear, old_mean: Tensor, old_std: Tensor, new_mean: Tensor, new_std: Tensor
    ) -> None:
        """Keep raw predictions std V + mean when the statistics (M,) change; `layer` is the head's last."""
        raise TypeError(f"{type(self).__name__} does not define rescale")

    def units(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std (M,) that a head without statistics was in; the first ones, as V = 0 is "the mean"."""
        return mean, std

    def require_representable(self, rewards: Tensor) -> None:
        """
        Raises:
            ValueError: for raw rewards (B, M) that no output can express.
        """


class SquaredError(ValueLoss):
    """V = output, loss (V - target)^2."""

    def values(self, outputs: Tensor) -> Tensor:
        return outputs[..., 0]

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.values(outputs), targets, reduction="none")

    def clipped_losses(
        self, outputs: Tensor, targets: Tensor, old_values: Tensor, value_clip: float
    ) -> Tensor:
        """max( (V - target)^2, (V_old + clip(V - V_old, -c, c) - target)^2 ), PPO's value clip, (B, M)."""
        values = self.values(outputs)
        clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
        return torch.maximum((values - targets).square(), (clipped - targets).square())

    def rescale(
        self, layer: nn.Linear, old_mean: Tensor, old_std: Tensor, new_mean: Tensor, new_std: Tensor
    ) -> None:
        layer.weight.mul_((old_std / new_std)[:, None])
        layer.bias.copy_((old_std * layer.bias + old_mean - new_mean) / new_std)


class _AnchoredLoss(ValueLoss):
    """A head that predicts in units of its own, V = scale z + offset: the statistics move this map alone.

    Scaling the last layer, as PopArt does, would change a sigmoid's or a softmax's predictions.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, num_rewards: int, offset: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(num_rewards))
        self.register_buffer("offset", torch.full((num_rewards,), offset))

    def rescale(
        self, layer: nn.Linear, old_mean: Tensor, old_std: Tensor, new_mean: Tensor, new_std: Tensor
    ) -> None:
        self.scale.copy_(self.scale * old_std / new_std)
        self.offset.copy_((old_std * self.offset + old_mean - new_mean) / new_std)


class BinaryCrossEntropy(_AnchoredLoss):
    """P(R = 1) = sigmoid(output) for rewards in [0, 1], in raw units; V = (P - mean) / std."""

    def __init__(self, num_rewards: int) -> None:
        # sigmoid(0) = 1/2 is the value 0 before there are statistics.
        super().__init__(num_rewards, offset=-0.5)

    def values(self, outputs: Tensor) -> Tensor:
        return self.scale * outputs[..., 0].sigmoid() + self.offset

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        # Standardising and back rounds 0 and 1 by an ulp.
        raw = ((targets - self.offset) / self.scale).clamp(0, 1)
        return nn.functional.binary_cross_entropy_with_logits(outputs[..., 0], raw, reduction="none")

    def units(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        return -(self.offset / self.scale).to(mean), (1 / self.scale).to(std)

    def require_representable(self, rewards: Tensor) -> None:
        low, high = rewards.min(), rewards.max()
        if low < 0 or high > 1:
            raise ValueError(
                f"loss='bce' values rewards in [0, 1], got {float(low):.4g} to {float(high):.4g}; "
                "use loss='mse' or 'hl_gauss', or rescale the reward"
            )


class HLGauss(_AnchoredLoss):
    """A softmax over bins with the cross-entropy to a Gaussian around the target (arXiv 2403.03950).

        V = sum_i p_i c_i,   target_i = Phi((e_{i+1} - y) / s) - Phi((e_i - y) / s), normalised to sum 1

    with centres c, edges e and s = 0.75 bin widths. The bins cover the mean of the first statistics by
    `bin_range` of their standard deviations to each side, for good.
    """

    edges: Tensor
    centers: Tensor

    def __init__(self, num_rewards: int, *, num_bins: int, bin_range: float) -> None:
        super().__init__(num_rewards)
        self.num_outputs = num_bins
        edges = torch.linspace(-bin_range, bin_range, num_bins + 1, dtype=torch.float64)
        self.register_buffer("edges", edges.float(), persistent=False)
        self.register_buffer("centers", ((edges[1:] + edges[:-1]) / 2).float(), persistent=False)

    def values(self, outputs: Tensor) -> Tensor:
        return self.scale * (outputs.softmax(dim=-1) @ self.centers) + self.offset

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -(self.target_probabilities(targets) * outputs.log_softmax(dim=-1)).sum(dim=-1)

    def target_probabilities(self, targets: Tensor) -> Tensor:
        """(B, M, K) of standardised targets (B, M)."""
        within = ((targets - self.offset) / self.scale).clamp(self.edges[0], self.edges[-1])
        std = SMOOTHING * (self.edges[1] - self.edges[0])
        cumulative = torch.erf((self.edges - within[..., None]) / (math.sqrt(2) * std))
        masses = cumulative[..., 1:] - cumulative[..., :-1]
        return masses / (cumulative[..., -1:] - cumulative[..., :1])


def build_value_loss(num_rewards: int, config: CriticConfig) -> ValueLoss:
    """The loss that `config` names, for M rewards."""
    if config.loss == "bce":
        return BinaryCrossEntropy(num_rewards)
    if config.loss == "hl_gauss":
        return HLGauss(num_rewards, num_bins=config.num_bins, bin_range=config.bin_range)
    return SquaredError()
