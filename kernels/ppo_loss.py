"""Likelihood ratio, both KLs and the clipped PPO loss of a transition, from the innovation form.

    z = b (v - v_old) / std,   z_ref = b (v - v_ref) / std
    log_ratio = reduce( eps z - z^2 / 2 )      kl_old = reduce( z^2 / 2 )      kl_ref = reduce( z_ref^2 / 2 )
    loss_i = w_i [ -min( rho A, clip(rho, 1 - c, 1 + c) A ) + kl_weight kl_ref ],   rho = exp(log_ratio)
    grad v = scale (b / std) [ g_ratio (eps - z) + g_old z + g_ref z_ref ]

The clip is PPO's (arXiv 1707.06347, eq. 7). Bytes per element: forward reads v and v_old; backward reads
them again and writes the gradient; v_ref and a given noise are one read more in each. Nothing of latent size
is kept for backward: the noise is drawn again. Eagerly the form is a dozen launches over float32 copies,
several of which autograd keeps.

The sums are split by the latent's size alone and added in a fixed order without atomics: they do not depend
on the batch. v = v_old gives z = 0 and so a log_ratio of exactly 0. std = 0 gives zeros throughout.
"""

# Constants of a kernel are upper case.
# ruff: noqa: N803

import torch
import triton
import triton.language as tl

from .aot import POINTER, AotSpec
from .gaussian_step import transition_row
from .philox import block_offsets, innovation_block, key_arguments, load_key, pick_launch

# Elements of one latent up to which a launch is used -> (BLOCK_N, BLOCKS per program, num_warps).
# A starting point by reasoning about occupancy, not measured on a GPU.
FORWARD_LAUNCHES = {512: (512, 1, 4), 4096: (1024, 4, 8), 2**31: (1024, 2, 4)}
BACKWARD_LAUNCHES = {512: (512, 1, 4), 2**31: (1024, 1, 4)}


@triton.jit
def expm1(x):
    """exp(x) - 1 without the cancellation that costs a clip range of 1e-5 its last two digits."""
    series = x * (1.0 + x * (0.5 + x * (0.16666667 + x * (0.041666667 + x * 0.0083333333))))
    return tl.where(tl.abs(x) < 0.1, series, tl.exp(x) - 1.0)


@triton.jit
def clipped_surrogate(log_ratio, advantage, clip_range):
    """Loss, its derivative by log_ratio, and the side of the clip that is active: -1, +1, else 0."""
    # In terms of rho - 1, so that the clip is decided on digits that exist.
    excess = expm1(log_ratio)
    is_high = (excess > clip_range) & (advantage > 0)
    is_low = (excess < -clip_range) & (advantage < 0)
    clipped = tl.where(is_high, clip_range, tl.where(is_low, -clip_range, excess))
    loss = -(advantage + clipped * advantage)
    grad_log_ratio = tl.where(is_high | is_low, 0.0, loss)
    side = tl.where(is_high, 1.0, tl.where(is_low, -1.0, 0.0))
    return loss, grad_log_ratio, side


@triton.jit
def store_row(
    cross, squares, squares_ref, i_b, std, scale, advantages_ptr, weights_ptr, clip_range, kl_weight, out_ptr,
    IS_PPO: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """From the sums of eps z, z^2, z_ref^2 to a row of terms (3 numbers) or, for PPO, of the loss (6)."""
    is_stochastic = std > 0
    log_ratio = tl.where(is_stochastic, scale * (cross - 0.5 * squares), 0.0)
    kl_old = tl.where(is_stochastic, scale * (0.5 * squares), 0.0)
    kl_ref = tl.where(is_stochastic, scale * (0.5 * squares_ref), 0.0)
    row_ptr = out_ptr + i_b * (6 if IS_PPO else 3)
    tl.store(row_ptr, log_ratio)
    tl.store(row_ptr + 1, kl_old)
    tl.store(row_ptr + 2, kl_ref)
    if IS_PPO:
        advantage = tl.load(advantages_ptr + i_b).to(tl.float32)
        loss, grad_log_ratio, side = clipped_surrogate(log_ratio, advantage, clip_range)
        loss += kl_weight * kl_ref
        if HAS_WEIGHTS:
            weight = tl.load(weights_ptr + i_b).to(tl.float32)
            loss *= weight
            grad_log_ratio *= weight
        tl.store(row_ptr + 3, loss)
        tl.store(row_ptr + 4, grad_log_ratio)
        tl.store(row_ptr + 5, side)


@triton.jit
def transition_sums_kernel(
    model_output_ptr, old_model_output_ptr, reference_output_ptr, advantages_ptr, weights_ptr,
    coefficients_ptr, steps_ptr, noise_ptr, seed_ptr, sample_ids_ptr, partial_ptr, out_ptr,
    N, num_splits, scale, clip_range, kl_weight,
    BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, HAS_REFERENCE: tl.constexpr, HAS_NOISE: tl.constexpr,
    IS_SPLIT: tl.constexpr, IS_PPO: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0) // num_splits
    i_split = tl.program_id(0) % num_splits
    row = i_b.to(tl.int64) * N
    step = tl.load(steps_ptr + i_b)
    _, b, std, inverse_std = transition_row(coefficients_ptr, step)
    seed, sample_id = load_key(seed_ptr, sample_ids_ptr, i_b, HAS_NOISE)
    gain = b * inverse_std
    b_cross = tl.zeros((BLOCK_N,), tl.float32)
    b_squares = tl.zeros((BLOCK_N,), tl.float32)
    b_squares_ref = tl.zeros((BLOCK_N,), tl.float32)
    for i_block in tl.static_range(BLOCKS):
        first = (i_split * BLOCKS + i_block) * BLOCK_N
        offs_n = block_offsets(first, BLOCK_N)
        mask_n = offs_n < N
        # Elements past the end load as 0 everywhere, so z = 0 and they add nothing.
        b_v = tl.load(model_output_ptr + row + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        b_v_old = tl.load(old_model_output_ptr + row + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        b_eps = innovation_block(noise_ptr, seed, sample_id, step, row, first, N, BLOCK_N, HAS_NOISE)
        b_z = gain * (b_v - b_v_old)
        b_cross += b_eps * b_z
        b_squares += b_z * b_z
        if HAS_REFERENCE:
            b_v_ref = tl.load(reference_output_ptr + row + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            b_z_ref = gain * (b_v - b_v_ref)
            b_squares_ref += b_z_ref * b_z_ref
    cross = tl.sum(b_cross, axis=0)
    squares = tl.sum(b_squares, axis=0)
    squares_ref = tl.sum(b_squares_ref, axis=0) if HAS_REFERENCE else 0.0
    if IS_SPLIT:
        cell_ptr = partial_ptr + i_b.to(tl.int64) * 3 * num_splits + i_split
        tl.store(cell_ptr, cross)
        tl.store(cell_ptr + num_splits, squares)
        tl.store(cell_ptr + 2 * num_splits, squares_ref)
    else:
        store_row(
            cross, squares, squares_ref, i_b, std, scale, advantages_ptr, weights_ptr, clip_range, kl_weight,
            out_ptr, IS_PPO, HAS_WEIGHTS,
        )  # fmt: skip


@triton.jit
def finish_rows_kernel(
    partial_ptr, advantages_ptr, weights_ptr, coefficients_ptr, steps_ptr, out_ptr,
    num_splits, scale, clip_range, kl_weight,
    BLOCK_S: tl.constexpr, IS_PPO: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0)
    offs_s = tl.arange(0, BLOCK_S)
    mask_s = offs_s < num_splits
    cell_ptr = partial_ptr + i_b.to(tl.int64) * 3 * num_splits + offs_s
    cross = tl.sum(tl.load(cell_ptr, mask=mask_s, other=0.0), axis=0)
    squares = tl.sum(tl.load(cell_ptr + num_splits, mask=mask_s, other=0.0), axis=0)
    squares_ref = tl.sum(tl.load(cell_ptr + 2 * num_splits, mask=mask_s, other=0.0), axis=0)
    _, _, std, _ = transition_row(coefficients_ptr, tl.load(steps_ptr + i_b))
    store_row(
        cross, squares, squares_ref, i_b, std, scale, advantages_ptr, weights_ptr, clip_range, kl_weight,
        out_ptr, IS_PPO, HAS_WEIGHTS,
    )  # fmt: skip


@triton.jit
def transition_grad_kernel(
    model_output_ptr, old_model_output_ptr, reference_output_ptr, coefficients_ptr, steps_ptr,
    noise_ptr, seed_ptr, sample_ids_ptr, grad_terms_ptr, grad_model_output_ptr, N, num_splits, scale,
    BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, HAS_REFERENCE: tl.constexpr, HAS_NOISE: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0) // num_splits
    i_split = tl.program_id(0) % num_splits
    row = i_b.to(tl.int64) * N
    step = tl.load(steps_ptr + i_b)
    _, b, std, inverse_std = transition_row(coefficients_ptr, step)
    seed, sample_id = load_key(seed_ptr, sample_ids_ptr, i_b, HAS_NOISE)
    gain = b * inverse_std
    grad_ratio = scale * tl.load(grad_terms_ptr + i_b * 3).to(tl.float32)
    grad_old = scale * tl.load(grad_terms_ptr + i_b * 3 + 1).to(tl.float32)
    grad_ref = scale * tl.load(grad_terms_ptr + i_b * 3 + 2).to(tl.float32)
    for i_block in tl.static_range(BLOCKS):
        first = (i_split * BLOCKS + i_block) * BLOCK_N
        offs_n = block_offsets(first, BLOCK_N)
        mask_n = offs_n < N
        b_v = tl.load(model_output_ptr + row + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        b_v_old = tl.load(old_model_output_ptr + row + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        b_eps = innovation_block(noise_ptr, seed, sample_id, step, row, first, N, BLOCK_N, HAS_NOISE)
        b_z = gain * (b_v - b_v_old)
        b_grad = grad_ratio * (b_eps - b_z) + grad_old * b_z
        if HAS_REFERENCE:
            b_v_ref = tl.load(reference_output_ptr + row + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            b_grad += grad_ref * (gain * (b_v - b_v_ref))
        b_grad = tl.where(std > 0, gain * b_grad, 0.0).to(grad_model_output_ptr.dtype.element_ty)
        tl.store(grad_model_output_ptr + row + offs_n, b_grad, mask=mask_n)


def _forward(
    model_output: torch.Tensor,
    old_model_output: torch.Tensor,
    reference_output: torch.Tensor | None,
    advantages: torch.Tensor | None,
    weights: torch.Tensor | None,
    coefficients: torch.Tensor,
    steps: torch.Tensor,
    noise: torch.Tensor | None,
    seed: torch.Tensor | None,
    sample_ids: torch.Tensor | None,
    scale: float,
    clip_range: float,
    kl_weight: float,
    out: torch.Tensor,
) -> None:
    batch = steps.numel()
    num_elements = model_output.numel() // batch
    block_n, blocks, num_warps, num_splits = pick_launch(FORWARD_LAUNCHES, num_elements)
    is_split = num_splits > 1
    is_ppo, has_weights = advantages is not None, weights is not None
    partial = None
    if is_split:
        partial = torch.empty(batch * 3 * num_splits, dtype=torch.float32, device=model_output.device)
    transition_sums_kernel[(batch * num_splits,)](
        model_output, old_model_output, reference_output, advantages, weights,
        coefficients, steps, noise, seed, sample_ids, partial, out,
        num_elements, num_splits, scale, clip_range, kl_weight,
        BLOCK_N=block_n, BLOCKS=blocks,
        HAS_REFERENCE=reference_output is not None, HAS_NOISE=noise is not None,
        IS_SPLIT=is_split, IS_PPO=is_ppo, HAS_WEIGHTS=has_weights,
        num_warps=num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    if is_split:
        finish_rows_kernel[(batch,)](
            partial, advantages, weights, coefficients, steps, out, num_splits, scale, clip_range, kl_weight,
            BLOCK_S=triton.next_power_of_2(num_splits), IS_PPO=is_ppo, HAS_WEIGHTS=has_weights,
            num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip


def log_ratio_forward(
    model_output: torch.Tensor,
    old_model_output: torch.Tensor,
    reference_output: torch.Tensor | None,
    coefficients: torch.Tensor,
    steps: torch.Tensor,
    noise: torch.Tensor | None,
    seed: torch.Tensor | None,
    sample_ids: torch.Tensor | None,
    scale: float,
    terms: torch.Tensor,
) -> None:
    """Fill terms (B, 3) float32: log_ratio, kl_old, kl_ref."""
    _forward(
        model_output, old_model_output, reference_output, None, None, coefficients, steps,
        noise, seed, sample_ids, scale, 0.0, 0.0, terms,
    )  # fmt: skip


def ppo_loss_forward(
    model_output: torch.Tensor,
    old_model_output: torch.Tensor,
    reference_output: torch.Tensor | None,
    advantages: torch.Tensor,
    weights: torch.Tensor | None,
    coefficients: torch.Tensor,
    steps: torch.Tensor,
    noise: torch.Tensor | None,
    seed: torch.Tensor | None,
    sample_ids: torch.Tensor | None,
    scale: float,
    clip_range: float,
    kl_weight: float,
    rows: torch.Tensor,
) -> None:
    """Fill rows (B, 6) float32: log_ratio, kl_old, kl_ref, loss, d loss / d log_ratio, side of the clip."""
    _forward(
        model_output, old_model_output, reference_output, advantages, weights, coefficients, steps,
        noise, seed, sample_ids, scale, clip_range, kl_weight, rows,
    )  # fmt: skip


def log_ratio_backward(
    model_output: torch.Tensor,
    old_model_output: torch.Tensor,
    reference_output: torch.Tensor | None,
    coefficients: torch.Tensor,
    steps: torch.Tensor,
    noise: torch.Tensor | None,
    seed: torch.Tensor | None,
    sample_ids: torch.Tensor | None,
    scale: float,
    grad_terms: torch.Tensor,
    grad_model_output: torch.Tensor,
) -> None:
    """Fill grad_model_output (B, ...) from the gradients (B, 3) of log_ratio, kl_old, kl_ref."""
    batch = steps.numel()
    num_elements = model_output.numel() // batch
    block_n, blocks, num_warps, num_splits = pick_launch(BACKWARD_LAUNCHES, num_elements)
    transition_grad_kernel[(batch * num_splits,)](
        model_output, old_model_output, reference_output, coefficients, steps,
        noise, seed, sample_ids, grad_terms, grad_model_output, num_elements, num_splits, scale,
        BLOCK_N=block_n, BLOCKS=blocks, num_warps=num_warps,
        HAS_REFERENCE=reference_output is not None, HAS_NOISE=noise is not None,
        enable_fp_fusion=False,
    )  # fmt: skip


def _transition_arguments(output: str, reference: bool, noise: str | None) -> dict[str, str | int | None]:
    return key_arguments(noise) | {
        "model_output_ptr": POINTER[output],
        "old_model_output_ptr": POINTER[output],
        "reference_output_ptr": POINTER[output] if reference else None,
        "coefficients_ptr": "*fp32",
        "steps_ptr": "*i64",
        "N": "i32",
        "num_splits": "i32",
        "scale": "fp32",
        "HAS_REFERENCE": reference,
        "HAS_NOISE": noise is not None,
    }


def _row_arguments(is_ppo: bool, weights: bool) -> dict[str, str | int | None]:
    return {
        "advantages_ptr": "*fp32" if is_ppo else None,
        "weights_ptr": "*fp32" if weights else None,
        "out_ptr": "*fp32",
        "clip_range": "fp32",
        "kl_weight": "fp32",
        "IS_PPO": is_ppo,
        "HAS_WEIGHTS": weights,
    }


def _forward_spec(
    output: str,
    launch: tuple[int, int, int],
    *,
    reference: bool,
    noise: str | None,
    split: bool,
    is_ppo: bool,
) -> AotSpec:
    block_n, blocks, num_warps = launch
    name = f"{'ppo_loss' if is_ppo else 'log_ratio'}-{output}-{block_n}x{blocks}-noise_{noise}"
    arguments = _transition_arguments(output, reference, noise) | _row_arguments(is_ppo, is_ppo)
    arguments |= {
        "partial_ptr": "*fp32" if split else None,
        "IS_SPLIT": split,
        "BLOCK_N": block_n,
        "BLOCKS": blocks,
    }
    return AotSpec(name, transition_sums_kernel, arguments, num_warps, 64 if "float16" in output else 128)


def _backward_spec(
    output: str, launch: tuple[int, int, int], *, reference: bool, noise: str | None
) -> AotSpec:
    block_n, blocks, num_warps = launch
    arguments = _transition_arguments(output, reference, noise)
    arguments |= {"grad_terms_ptr": "*fp32", "grad_model_output_ptr": POINTER[output]}
    arguments |= {"BLOCK_N": block_n, "BLOCKS": blocks}
    name = f"transition_grad-{output}-{block_n}x{blocks}-noise_{noise}"
    return AotSpec(name, transition_grad_kernel, arguments, num_warps, 64 if "float16" in output else 128)


_SMALL, _MEDIUM, _LARGE = FORWARD_LAUNCHES.values()
_SMALL_GRAD, _LARGE_GRAD = BACKWARD_LAUNCHES.values()

AOT_SPECS = [
    _forward_spec("float32", _SMALL, reference=False, noise=None, split=False, is_ppo=False),
    _forward_spec("float32", _MEDIUM, reference=True, noise=None, split=False, is_ppo=True),
    _forward_spec("bfloat16", _MEDIUM, reference=False, noise="float32", split=False, is_ppo=True),
    _forward_spec("bfloat16", _LARGE, reference=True, noise=None, split=True, is_ppo=True),
    _forward_spec("float16", _LARGE, reference=True, noise="float16", split=True, is_ppo=False),
    _backward_spec("float32", _SMALL_GRAD, reference=False, noise=None),
    _backward_spec("float32", _LARGE_GRAD, reference=True, noise="float32"),
    _backward_spec("bfloat16", _LARGE_GRAD, reference=True, noise=None),
    _backward_spec("float16", _LARGE_GRAD, reference=True, noise=None),
    AotSpec(
        "finish_rows",
        finish_rows_kernel,
        _row_arguments(True, True)
        | {"partial_ptr": "*fp32", "coefficients_ptr": "*fp32", "steps_ptr": "*i64"}
        | {"num_splits": "i32", "scale": "fp32", "BLOCK_S": 128},
        num_warps=1,
    ),
]
