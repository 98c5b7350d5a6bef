"""Likelihood ratio, both KLs and the PPO loss of a transition, from the innovation form: one read.

    log_ratio = reduce( eps z - z^2 / 2 ),   kl_old = reduce( z^2 / 2 ),   z = b (v - v_old) / std
    kl_ref = reduce( g (v - v_ref)^2 )

The loss of a row, and what follows from rows: ppo_rows.py; the gradient: ppo_gradient.py. Bytes per element:
reads v and v_old; v_ref and a given noise are one read more each. Rows that are masked or deterministic are
not read. Eagerly the form is a dozen launches over float32 copies, several of which autograd keeps.

The sums are split by the latent's size alone and added in a fixed order without atomics: they do not depend
on the batch. v = v_old gives z = 0 and so a log_ratio of exactly 0. std = 0 gives zeros throughout.
"""

# Constants of a kernel are upper case.
# ruff: noqa: N803

import torch
import triton
import triton.language as tl

from . import launch
from .aot import POINTER, AotSpec
from .gaussian_step import transition_row
from .philox import block_offsets, innovation_block, key_arguments, load_key
from .ppo_rows import add_splits, add_up, finish_rows, row_arguments, store_row


@triton.jit
def store_terms(cross, squares, squares_ref, i_b, b, inverse_std, scale, terms_ptr):
    """log_ratio, kl_old, kl_ref of one pair."""
    gain = b * inverse_std
    kl_old = scale * (0.5 * gain * gain * squares)
    tl.store(terms_ptr + i_b * 3, scale * (gain * cross) - kl_old)
    tl.store(terms_ptr + i_b * 3 + 1, kl_old)
    tl.store(terms_ptr + i_b * 3 + 2, scale * (0.5 * gain * gain * squares_ref))


@triton.jit
def transition_sums_kernel(
    model_output_ptr, old_model_output_ptr, reference_output_ptr,
    coefficients_ptr, steps_ptr, noise_ptr, seed_ptr, sample_ids_ptr,
    advantages_ptr, weights_ptr, step_weights_ptr, mask_ptr, kl_gains_ptr,
    scale, clip_low, clip_high, dual_clip, kl_threshold, kl_weight, rows_ptr, shares_ptr,
    partial_ptr, N, num_splits,
    BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, HAS_NOISE: tl.constexpr, IS_SPLIT: tl.constexpr,
    IS_NORMALIZED: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0) // num_splits
    i_split = tl.program_id(0) % num_splits
    row = i_b.to(tl.int64) * N
    step = tl.load(steps_ptr + i_b)
    _, b, std, inverse_std = transition_row(coefficients_ptr, step)
    seed, sample_id = load_key(seed_ptr, sample_ids_ptr, i_b, HAS_NOISE)
    is_read = std > 0
    if mask_ptr is not None:
        is_read = is_read & (tl.load(mask_ptr + i_b) != 0)
    # A product keeps N's divisibility, by which loads become vectors.
    limit = N * is_read.to(tl.int32)
    b_cross = tl.zeros((BLOCK_N,), tl.float32)
    b_squares = tl.zeros((BLOCK_N,), tl.float32)
    b_squares_ref = tl.zeros((BLOCK_N,), tl.float32)
    for i_block in tl.static_range(BLOCKS):
        first = (i_split * BLOCKS + i_block) * BLOCK_N
        offs_n = block_offsets(first, BLOCK_N)
        mask_n = offs_n < limit
        # Elements past the end load as 0 everywhere, so they add nothing.
        b_v = tl.load(model_output_ptr + row + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        b_v_old = tl.load(old_model_output_ptr + row + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        b_eps = innovation_block(noise_ptr, seed, sample_id, step, row, first, limit, BLOCK_N, HAS_NOISE)
        b_difference = b_v - b_v_old
        b_cross += b_eps * b_difference
        b_squares += b_difference * b_difference
        if reference_output_ptr is not None:
            b_v_ref = tl.load(reference_output_ptr + row + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            b_squares_ref += (b_v - b_v_ref) * (b_v - b_v_ref)
    cross = tl.sum(b_cross, axis=0)
    squares = tl.sum(b_squares, axis=0)
    squares_ref = tl.sum(b_squares_ref, axis=0) if reference_output_ptr is not None else 0.0
    if IS_SPLIT:
        cell_ptr = partial_ptr + i_b.to(tl.int64) * 3 * num_splits + i_split
        tl.store(cell_ptr, cross)
        tl.store(cell_ptr + num_splits, squares)
        tl.store(cell_ptr + 2 * num_splits, squares_ref)
    elif advantages_ptr is None:
        store_terms(cross, squares, squares_ref, i_b, b, inverse_std, scale, rows_ptr)
    else:
        store_row(
            cross, squares, squares_ref, i_b, step, b, std, inverse_std, scale,
            advantages_ptr, weights_ptr, step_weights_ptr, mask_ptr, kl_gains_ptr,
            clip_low, clip_high, dual_clip, kl_threshold, kl_weight, rows_ptr, shares_ptr, IS_NORMALIZED,
        )  # fmt: skip


@triton.jit
def finish_terms_kernel(
    partial_ptr, coefficients_ptr, steps_ptr, scale, terms_ptr, num_splits, BLOCK_S: tl.constexpr
):
    i_b = tl.program_id(0)
    cross, squares, squares_ref = add_splits(partial_ptr, i_b, num_splits, BLOCK_S)
    _, b, _, inverse_std = transition_row(coefficients_ptr, tl.load(steps_ptr + i_b))
    store_terms(cross, squares, squares_ref, i_b, b, inverse_std, scale, terms_ptr)


Shared = tuple[torch.Tensor | None, ...]


def _sums(
    shared: Shared, per_pair: Shared, numbers: tuple[float, ...], is_normalized: bool, rows: torch.Tensor,
    shares: torch.Tensor | None,
) -> tuple[torch.Tensor | None, int]:  # fmt: skip
    """Launch the pass over the latents; partial sums (None where rows are finished) and how many parts."""
    model_output, steps, noise = shared[0], shared[4], shared[5]
    batch = steps.numel()
    num_elements = model_output.numel() // batch
    architecture = launch.architecture_of(rows.device)
    block_n, blocks, num_warps, num_splits = launch.pick_launch("ppo_loss", num_elements, architecture)
    partial = None
    if num_splits > 1:
        partial = torch.empty(batch * 3 * num_splits, dtype=torch.float32, device=model_output.device)
    transition_sums_kernel[(batch * num_splits,)](
        *shared, *per_pair, *numbers, rows, shares, partial, num_elements, num_splits,
        BLOCK_N=block_n, BLOCKS=blocks, HAS_NOISE=noise is not None, IS_SPLIT=num_splits > 1,
        IS_NORMALIZED=is_normalized, num_warps=num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return partial, num_splits


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
    shared = (model_output, old_model_output, reference_output, coefficients, steps, noise, seed, sample_ids)
    numbers = (scale, 0.0, 0.0, 0.0, 0.0, 0.0)
    partial, num_splits = _sums(shared, (None,) * 5, numbers, False, terms, None)
    if partial is not None:
        finish_terms_kernel[(steps.numel(),)](
            partial, coefficients, steps, scale, terms, num_splits,
            BLOCK_S=triton.next_power_of_2(num_splits), num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip


def ppo_loss_forward(
    model_output: torch.Tensor,
    old_model_output: torch.Tensor,
    reference_output: torch.Tensor | None,
    coefficients: torch.Tensor,
    steps: torch.Tensor,
    noise: torch.Tensor | None,
    seed: torch.Tensor | None,
    sample_ids: torch.Tensor | None,
    advantages: torch.Tensor,
    weights: torch.Tensor | None,
    step_weights: torch.Tensor | None,
    mask: torch.Tensor | None,
    kl_gains: torch.Tensor | None,
    scale: float,
    is_normalized: bool,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl_threshold: float,
    kl_weight: float,
    loss: torch.Tensor,
    rows: torch.Tensor,
    step_sums: torch.Tensor,
    shares: torch.Tensor,
) -> None:
    """Fill loss (), rows (B, 4), step_sums (T, 6) and shares (B, 3), all float32; see ppo_rows.py."""
    shared = (model_output, old_model_output, reference_output, coefficients, steps, noise, seed, sample_ids)
    per_pair = (advantages, weights, step_weights, mask, kl_gains)
    numbers = (scale, clip_low, clip_high, dual_clip, kl_threshold, kl_weight)
    partial, num_splits = _sums(shared, per_pair, numbers, is_normalized, rows, shares)
    if partial is not None:
        finish_rows(
            partial, num_splits, is_normalized, coefficients, steps, *per_pair, *numbers, rows, shares
        )
    add_up(rows, shares, steps, mask, loss, step_sums)


def transition_arguments(
    output: str, shape: tuple[int, int, int], *, reference: bool, noise: str | None
) -> dict[str, str | int | None]:
    return key_arguments(noise) | {
        "model_output_ptr": POINTER[output],
        "old_model_output_ptr": POINTER[output],
        "reference_output_ptr": POINTER[output] if reference else None,
        "coefficients_ptr": "*fp32",
        "steps_ptr": "*i64",
        "N": "i32",
        "num_splits": "i32",
        "scale": "fp32",
        "HAS_NOISE": noise is not None,
        "BLOCK_N": shape[0],
        "BLOCKS": shape[1],
    }


def _forward_spec(
    output: str, shape: tuple[int, int, int], *, reference: bool, noise: str | None, split: bool,
    is_ppo: bool, everything: bool = False,
) -> AotSpec:  # fmt: skip
    name = f"{'ppo_loss' if is_ppo else 'log_ratio'}-{output}-{shape[0]}x{shape[1]}-noise_{noise}"
    arguments = row_arguments(mask=everything, weights=everything, kl_gains=everything)
    if not is_ppo:
        arguments |= {"advantages_ptr": None, "shares_ptr": None}
    arguments |= transition_arguments(output, shape, reference=reference, noise=noise)
    arguments |= {"partial_ptr": "*fp32" if split else None, "IS_SPLIT": split, "IS_NORMALIZED": everything}
    name += "-everything" if everything else ""
    return AotSpec(name, transition_sums_kernel, arguments, shape[2], 64 if "float16" in output else 128)


_SMALL, *_, _LARGE = _SHAPES = launch.shapes("ppo_loss")

AOT_SPECS = [
    _forward_spec("float32", _SMALL, reference=False, noise=None, split=False, is_ppo=False),
    _forward_spec("float32", _SMALL, reference=True, noise=None, split=False, is_ppo=True),
    _forward_spec("bfloat16", _SMALL, reference=False, noise="float32", split=False, is_ppo=True),
    *(
        _forward_spec(
            output, shape, reference=True, noise=noise, split=shape == _LARGE, is_ppo=True, everything=True
        )
        for shape in _SHAPES
        for output, noise in (("float32", "float32"), ("bfloat16", None))
    ),
    _forward_spec("bfloat16", _LARGE, reference=True, noise=None, split=True, is_ppo=True),
    _forward_spec("float16", _LARGE, reference=True, noise="float16", split=True, is_ppo=False),
    AotSpec(
        "finish_terms",
        finish_terms_kernel,
        {"partial_ptr": "*fp32", "coefficients_ptr": "*fp32", "steps_ptr": "*i64", "terms_ptr": "*fp32"}
        | {"num_splits": "i32", "scale": "fp32", "BLOCK_S": 128},
        num_warps=1,
    ),
]
