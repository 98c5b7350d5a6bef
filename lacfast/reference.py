"""The algorithm in eager PyTorch, in reading order: noise, transition, ratio, loss, advantages, critic.

Every fast path is one of these functions with the same name and signature. Source of the method:
"Explicit Critic Guidance for Aligning Diffusion Models" (arXiv 2605.27736).

A denoising trajectory is an episode: the state is (x_k, t_k, prompt), the action x_{k+1}, the policy
N(a x + b v, std^2 I) with the model's output v, the reward comes after the last step.
Half-precision inputs are computed in float32, float64 stays float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lacfast.records import NoiseKey, PPOStats, StepOutput, TransitionTerms

# 1. Noise: a counter in place of a generator's state


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011): four random words for every counter.

    Args:
        counter: (..., 4) int64 holding 32-bit words.
        key: (2,) int64 holding 32-bit words.

    Returns:
        (..., 4) int64 holding 32-bit words.
    """
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        high0, low0 = _multiply_32(c0, 0xD2511F53)
        high1, low1 = _multiply_32(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return torch.stack([c0, c1, c2, c3], dim=-1)


def _multiply_32(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product, in int64 without overflow."""
    low_part = (x & 0xFFFF) * factor
    high_part = (x >> 16) * factor
    return (high_part + (low_part >> 16)) >> 16, (low_part + ((high_part & 0xFFFF) << 16)) & 0xFFFFFFFF


def normal_noise(shape: tuple[int, ...], steps: Tensor, key: NoiseKey) -> Tensor:
    """Standard normals that depend on (seed, sample id, step, element) only, never on the batch layout.

        words = philox(counter = (element / 4, step, sample id low, sample id high), key = seed)
        u_i = (words_i >> 8) 2^-24 + 2^-25;   pairs (u_0, u_1), (u_2, u_3) by Box-Muller

    Args:
        shape: (B, ...) of the result.
        steps: (B,) int64; INITIAL_STEP for the latent that starts a trajectory.
        key: seed (1,) and sample ids (B,).

    Returns:
        (B, ...) float32.
    """
    batch, elements = shape[0], math.prod(shape[1:])
    quads = (elements + 3) // 4
    mask = 0xFFFFFFFF
    ids = key.sample_ids
    per_sample = torch.stack([steps & mask, ids & mask, (ids >> 32) & mask], dim=-1)
    quad = torch.arange(quads, device=ids.device).view(1, quads, 1).expand(batch, quads, 1)
    counter = torch.cat([quad, per_sample[:, None, :].expand(batch, quads, 3)], dim=-1)
    words = philox(counter, torch.cat([key.seed & mask, (key.seed >> 32) & mask]))
    uniform = (words >> 8).to(torch.float32) * 2**-24 + 2**-25
    radius = (-2 * uniform[..., 0::2].log()).sqrt()
    angle = 2 * math.pi * uniform[..., 1::2]
    normals = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return normals.reshape(batch, quads * 4)[:, :elements].reshape(shape).contiguous()


def _noise_for(sample: Tensor, steps: Tensor, noise: Tensor | NoiseKey) -> Tensor:
    return normal_noise(tuple(sample.shape), steps, noise) if isinstance(noise, NoiseKey) else noise


# 2. Transition: one affine step


def _compute_dtype(sample: Tensor) -> torch.dtype:
    return torch.float64 if sample.dtype == torch.float64 else torch.float32


def _rows(coefficients: Tensor, steps: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a, b, std of every sample, shaped to multiply `like` (B, ...)."""
    rows = coefficients.to(_compute_dtype(like))[steps]
    shape = (-1,) + (1,) * (like.ndim - 1)
    a, b, std = rows.unbind(dim=1)
    return a.view(shape), b.view(shape), std.view(shape)


def _reduce(terms: Tensor, reduction: str) -> Tensor:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"unknown reduction {reduction!r}; known: 'mean' (per element), 'sum' (joint)")
    flat = terms.flatten(1)
    return flat.mean(dim=1) if reduction == "mean" else flat.sum(dim=1)


def gaussian_step(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    steps: Tensor,
    *,
    noise: Tensor | NoiseKey,
    uncond_output: Tensor | None = None,
    guidance_scale: Tensor | None = None,
    reduction: str = "mean",
) -> StepOutput:
    """One denoising step and the log-probability of where it landed.

        v  = v_uncond + guidance_scale (v_cond - v_uncond)        with guidance
        x' = a x + b v + std eps
        log_prob = reduce( -(x' - mu)^2 / (2 std^2) - log std - log(2 pi) / 2 ),   mu = a x + b v

    The log-prob is that of the stored x', after rounding to the sample's dtype, and treats x' as a
    constant; x' itself carries gradients a and b. Where std = 0 the step is deterministic, log_prob 0.

    Args:
        sample: (B, ...) latents.
        model_output: (B, ...) prediction of the model, conditional half when guided.
        coefficients: (T, 3) columns a, b, std.
        steps: (B,) int64 row of `coefficients` for each sample.
        noise: (B, ...) eps, or the key that regenerates it.
        uncond_output: (B, ...) unconditional prediction.
        guidance_scale: (1,) float, needed with `uncond_output`.
        reduction: "mean" over elements (the field's convention) or "sum".
    """
    dtype = _compute_dtype(sample)
    a, b, std = _rows(coefficients, steps, sample)
    if uncond_output is not None and guidance_scale is not None:
        guided = uncond_output.to(dtype) + guidance_scale.to(dtype) * (
            model_output.to(dtype) - uncond_output.to(dtype)
        )
        model_output = guided.to(model_output.dtype)
    mean = a * sample.to(dtype) + b * model_output.to(dtype)
    eps = torch.where(std > 0, _noise_for(sample, steps, noise).to(dtype), 0.0)
    prev_sample = (mean + std * eps).to(sample.dtype)
    return StepOutput(
        prev_sample, _log_prob(prev_sample.detach().to(dtype), mean, std, reduction), model_output
    )


def _log_prob(prev_sample: Tensor, mean: Tensor, std: Tensor, reduction: str) -> Tensor:
    stochastic = std > 0
    safe_std = torch.where(stochastic, std, torch.ones_like(std))
    terms = -((prev_sample - mean) ** 2) / (2 * safe_std**2) - safe_std.log() - math.log(2 * math.pi) / 2
    return _reduce(torch.where(stochastic, terms, torch.zeros_like(terms)), reduction)


def step_log_prob(
    sample: Tensor,
    model_output: Tensor,
    prev_sample: Tensor,
    coefficients: Tensor,
    steps: Tensor,
    *,
    reduction: str = "mean",
) -> Tensor:
    """Log-probability (B,) of a given transition sample -> prev_sample; arguments as `gaussian_step`."""
    dtype = _compute_dtype(sample)
    a, b, std = _rows(coefficients, steps, sample)
    mean = a * sample.to(dtype) + b * model_output.to(dtype)
    return _log_prob(prev_sample.to(dtype), mean, std, reduction)


# 3. Ratio and loss: PPO in innovation form


def log_ratio(
    model_output: Tensor,
    old_model_output: Tensor,
    coefficients: Tensor,
    steps: Tensor,
    *,
    noise: Tensor | NoiseKey,
    reference_output: Tensor | None = None,
    reduction: str = "mean",
) -> TransitionTerms:
    """Log of the new over the old transition probability, from the noise that was drawn.

    The old policy made x' = a x + b v_old + std eps, so with dv = v - v_old
        log_ratio = reduce( eps b dv / std - (b dv)^2 / (2 std^2) )
        kl_old    = reduce( (b dv)^2 / (2 std^2) )
        kl_ref    = reduce( (b (v - v_ref))^2 / (2 std^2) )
    It needs neither x nor x', is exactly 0 when v = v_old in any storage dtype, and keeps its precision
    where the difference of two log-probs has none. All three are 0 where std = 0.

    Args:
        model_output: (B, ...) of the policy that is trained; gradients flow to it alone.
        old_model_output: (B, ...) of the policy that made the rollout.
        coefficients: (T, 3) columns a, b, std.
        steps: (B,) int64 row of `coefficients`.
        noise: (B, ...) the eps of the rollout, or the key that regenerates it.
        reference_output: (B, ...) of the reference model.
        reduction: "mean" over elements or "sum".
    """
    dtype = _compute_dtype(model_output)
    _, b, std = _rows(coefficients, steps, model_output)
    stochastic = std > 0
    gain = torch.where(
        stochastic, b / torch.where(stochastic, std, torch.ones_like(std)), torch.zeros_like(std)
    )
    eps = torch.where(stochastic, _noise_for(model_output, steps, noise).to(dtype), 0.0)
    shift = gain * (model_output.to(dtype) - old_model_output.detach().to(dtype))
    kl_old = _reduce(shift**2 / 2, reduction)
    ratio_terms = _reduce(eps * shift - shift**2 / 2, reduction)
    if reference_output is None:
        return TransitionTerms(ratio_terms, kl_old, torch.zeros_like(kl_old))
    shift_ref = gain * (model_output.to(dtype) - reference_output.detach().to(dtype))
    return TransitionTerms(ratio_terms, kl_old, _reduce(shift_ref**2 / 2, reduction))


def ppo_loss(
    model_output: Tensor,
    old_model_output: Tensor,
    advantages: Tensor,
    coefficients: Tensor,
    steps: Tensor,
    *,
    noise: Tensor | NoiseKey,
    clip_range: float,
    weights: Tensor | None = None,
    reference_output: Tensor | None = None,
    kl_weight: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor, PPOStats]:
    """Clipped surrogate of PPO (arXiv 1707.06347, eq. 7) over transitions, with a KL to the reference.

        rho  = exp(log_ratio)
        loss = mean_i w_i [ -min( rho A, clip(rho, 1 - c, 1 + c) A ) + kl_weight kl_ref ]

    Args:
        model_output: (B, ...) of the policy that is trained.
        old_model_output: (B, ...) of the policy that made the rollout.
        advantages: (B,)
        coefficients: (T, 3) columns a, b, std.
        steps: (B,) int64 row of `coefficients`.
        noise: (B, ...) the eps of the rollout, or the key that regenerates it.
        clip_range: c, in the units of `reduction` ("mean": nats per element).
        weights: (B,) of the pairs. None: 1.
        reference_output: (B, ...) of the reference model.
        kl_weight: beta, needs `reference_output`.
        reduction: "mean" over elements or "sum".

    Returns:
        The loss () and detached statistics (B,).
    """
    terms = log_ratio(
        model_output,
        old_model_output,
        coefficients,
        steps,
        noise=noise,
        reference_output=reference_output,
        reduction=reduction,
    )
    advantages = advantages.to(terms.log_ratio.dtype)
    ratio = terms.log_ratio.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    losses = -torch.minimum(unclipped, clipped) + kl_weight * terms.kl_ref
    loss = (losses if weights is None else weights.to(losses.dtype) * losses).mean()
    high = (ratio > 1 + clip_range) & (advantages > 0)
    low = (ratio < 1 - clip_range) & (advantages < 0)
    side = high.to(ratio.dtype) - low.to(ratio.dtype)
    return loss, PPOStats(terms.log_ratio.detach(), terms.kl_old.detach(), terms.kl_ref.detach(), side)


# 4. Advantages


def gae(
    rewards: Tensor, values: Tensor, *, gamma: float = 1.0, gae_lambda: float = 1.0, value_lambda: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16), one chain per trajectory and reward.

        delta_k = r_k + gamma V_{k+1} - V_k,   V_T = 0
        A_k = delta_k + gamma lambda A_{k+1};   returns_k = A_k at value_lambda + V_k

    Chains have a fixed length, so there are no done flags. gae_lambda = 1 gives A_k = R - V_k.

    Args:
        rewards: (B, T, M) reward after each step.
        values: (B, T, M) value before each step.
        gamma: discount, 1 in the paper: the horizon is fixed.
        gae_lambda: of the policy's advantages.
        value_lambda: of the value targets.

    Returns:
        advantages (B, T, M) and returns (B, T, M).
    """
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * next_values - values
    advantages = _discounted_sum(deltas, gamma * gae_lambda)
    returns = _discounted_sum(deltas, gamma * value_lambda) + values
    return advantages, returns


def _discounted_sum(terms: Tensor, discount: float) -> Tensor:
    """(B, T, M): s_k = terms_k + discount s_{k+1}."""
    total = torch.zeros_like(terms[:, 0])
    sums = []
    for term in reversed(terms.unbind(dim=1)):
        total = term + discount * total
        sums.append(total)
    return torch.stack(sums[::-1], dim=1)


# 5. Critic


def value_pool(
    features: Tensor, query: Tensor, norm_weight: Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    """Attention of single queries over normalised tokens.

    The key projection is folded into the query, the value projection into the caller.

        n_l = RMSNorm(features_l) norm_weight;   out_h = sum_l softmax_l(query_h . n_l) n_l

    Args:
        features: (B, L, D) tokens.
        query: (B, H, D), the caller's scale folded in.
        norm_weight: (D,), or None for 1.
        eps: of the RMSNorm.

    Returns:
        (B, H, D) in the query's dtype; computed in float32 at least.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    tokens = features.to(dtype)
    tokens = tokens * (tokens.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    if norm_weight is not None:
        tokens = tokens * norm_weight.to(dtype)
    weights = (query.to(dtype) @ tokens.mT).softmax(dim=-1)
    return (weights @ tokens).to(query.dtype)


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """EV = 1 - Var(R - V) / Var(R) over the first dimension; 0 where the returns do not vary.

    Args:
        values: (B, ...) predictions.
        returns: (B, ...) what they predict.

    Returns:
        (...) at most 1; below 0 when the prediction is worse than the mean.
    """
    variance = returns.var(dim=0, correction=0)
    residual = (returns - values).var(dim=0, correction=0)
    safe = torch.where(variance > 0, variance, torch.ones_like(variance))
    return torch.where(variance > 0, 1 - residual / safe, torch.zeros_like(variance))
