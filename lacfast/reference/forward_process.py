"""7. Forward process: clean latents noised anew, and losses that learn from them without a chain.

    x = signal x0 + noise eps,   target = c eps + d x0,   error of the clean latent = gain |v - target|

with a row (signal, noise, c, d, gain) of lacfast.schedule.forward_rows per step: target is what a model that
knew x0 would predict of x, and an error of its prediction is gain times as large in the clean latent.
"""

from __future__ import annotations

from torch import Tensor

from lacfast.reference.transition import arithmetic_dtype, reduce

SMALLEST_ERROR = 1e-5
"""Least mean error of the clean latent that nft_losses divides by, as in its authors' script."""
SMALLEST_SQUARE = 1e-10
"""What awm_losses adds to a squared error, whose root then has a slope at 0, as in its authors' script."""


def noised(clean: Tensor, noise: Tensor, rows: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Clean latents with new noise, and what a model that knew them would predict.

    Args:
        clean: (B, ...) x0.
        noise: (B, ...) eps.
        rows: (T, 5) of lacfast.schedule.forward_rows.
        steps: (B,) int64 row of each sample.

    Returns:
        x and target, (B, ...) each in the dtype of the maths.
    """
    dtype = arithmetic_dtype(clean)
    columns = rows.to(dtype)[steps].view(-1, *(1,) * (clean.ndim - 1), rows.shape[-1])
    signal, level, of_noise, of_clean, _ = columns.unbind(dim=-1)
    clean, noise = clean.to(dtype), noise.to(dtype)
    return signal * clean + level * noise, of_noise * noise + of_clean * clean


def nft_losses(
    model_output: Tensor, old_output: Tensor, target: Tensor, weights: Tensor, gains: Tensor, *, beta: float
) -> Tensor:
    """DiffusionNFT's loss of every sample (arXiv 2509.16117), with its adaptive weight.

        v+ = v_old + beta (v - v_old),   v- = v_old - beta (v - v_old),   r = (1 + w) / 2
        loss = ( r L(v+) + (1 - r) L(v-) ) / beta,   L(u) = mean e^2 / stop(max(mean |e|, 1e-5)),
        e = gain (u - target)

    Args:
        model_output: (B, ...) v of the policy that is trained; gradients flow to it alone.
        old_output: (B, ...) v_old of the old policy.
        target: (B, ...) of `noised`.
        weights: (B,) w in [-1, 1], 1 for the best.
        gains: (B,) of the steps.
        beta: how far the policy is mixed with the old one.

    Returns:
        (B,)
    """
    dtype = arithmetic_dtype(model_output)
    old, gain = old_output.detach().to(dtype), gains.to(dtype).view(-1, *(1,) * (target.ndim - 1))
    move, miss = beta * (model_output.to(dtype) - old), old - target.to(dtype)
    positive, negative = (_normalized_error(gain * (miss + side * move)) for side in (1, -1))
    share = (1 + weights.to(dtype)) / 2
    return (share * positive + (1 - share) * negative) / beta


def _normalized_error(error: Tensor) -> Tensor:
    size = reduce(error.detach().abs(), "mean").clamp(min=SMALLEST_ERROR)
    return reduce(error**2, "mean") / size


def awm_losses(
    model_output: Tensor, target: Tensor, weights: Tensor, levels: Tensor, *, power: float
) -> Tensor:
    """Advantage weighted matching's loss of every sample (arXiv 2509.25050; its script's "ghuber" weighting).

        l = -level ( (m + 1e-10)^p - 1e-10^p ) / p,   m = mean (v - target)^2,   loss = -w l

    Its gradient is that of the script's ratio exp(l - stop(l)), which is 1 on its own policy.

    Args:
        model_output: (B, ...) v of the policy that is trained.
        target: (B, ...) of `noised`.
        weights: (B,) w, the advantages in units of their bound.
        levels: (B,) noise level of the steps.
        power: p in (0, 1]; 1 is the pretraining's squared error.

    Returns:
        (B,)
    """
    dtype = arithmetic_dtype(model_output)
    square = reduce((model_output.to(dtype) - target.to(dtype)) ** 2, "mean")
    error: Tensor = ((square + SMALLEST_SQUARE) ** power - SMALLEST_SQUARE**power) / power
    return weights.to(dtype) * levels.to(dtype) * error
