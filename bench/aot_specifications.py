"""What is compiled without a GPU: one record per variant of every Triton kernel.

A GPU is not needed to compile, so kernels are proven (no spills, few registers, vector loads) where none is.
"""

from __future__ import annotations

from bench.aot_spec import POINTER, AotSpec
from bench.aot_value_pool import VALUE_POOL, VALUE_POOL_BACKWARD, VALUE_POOL_TILES
from lacfast.kernels import (
    gaussian_step,
    launch,
    philox,
    ppo_gradient,
    ppo_loss,
    ppo_rows,
    step_log_prob,
)


def _key_arguments(noise: str | None) -> dict[str, str | None]:
    """AOT arguments for noise of this dtype, or for a key."""
    key = "*i64" if noise is None else None
    return {"noise_ptr": None if noise is None else POINTER[noise], "seed_ptr": key, "sample_ids_ptr": key}


def _split_arguments(split: bool) -> dict[str, str | int | bool | None]:
    """AOT arguments of a sum that several programs of a sample share, a packed FLUX latent's."""
    return {
        "partial_ptr": "*fp32" if split else None,
        "tickets_ptr": "*i32" if split else None,
        "IS_SPLIT": split,
        "BLOCK_S": 128 if split else 1,
    }


PHILOX = [
    AotSpec(
        f"normal_noise-{block_n}x{blocks}x{num_warps}",
        philox.normal_noise_kernel,
        {"steps_ptr": "*i64", "seed_ptr": "*i64", "sample_ids_ptr": "*i64", "out_ptr": "*fp32"}
        | {"N": "i32", "num_splits": "i32", "BLOCK_N": block_n, "BLOCKS": blocks},
        num_warps,
    )
    for block_n, blocks, num_warps in launch.shapes("normal_noise")
]


def _step_spec(
    sample: str,
    output: str,
    shape: tuple[int, int, int],
    *,
    guided: bool,
    noise: str | None,
    split: bool,
    slab: str | None = None,
) -> AotSpec:
    block_n, blocks, num_warps = shape
    arguments = {
        "sample_ptr": POINTER[sample],
        "model_output_ptr": POINTER[output],
        "uncond_output_ptr": POINTER[output] if guided else None,
        "guidance_scale_ptr": "*fp32" if guided else None,
        "coefficients_ptr": "*fp32",
        "steps_ptr": "*i64",
        "prev_sample_ptr": POINTER[sample],
        "log_prob_ptr": None if slab else "*fp32",
        "guided_output_ptr": POINTER[output] if guided and not slab else None,
        "latents_ptr": POINTER[slab] if slab else None,
        "model_outputs_ptr": POINTER[slab] if slab else None,
        "log_probs_ptr": "*fp32" if slab else None,
    }
    sizes = {
        "N": "i32",
        "T": "i32",
        "num_splits": "i32",
        "scale": "fp32",
        "BLOCK_N": block_n,
        "BLOCKS": blocks,
    }
    flags = {"HAS_GUIDANCE": guided, "HAS_NOISE": noise is not None}
    flags |= {"HAS_GUIDED_OUTPUT": guided and not slab, "HAS_SLAB": slab is not None}
    flags |= {"IS_SHARED_STEP": slab is not None} | _split_arguments(split)
    name = f"gaussian_step-{sample}-{output}-{block_n}x{blocks}x{num_warps}-noise_{noise}" + (
        "-guided" if guided else ""
    )
    name += f"-slab_{slab}" if slab else ""
    # Four elements per thread.
    vector_bits = 64 if "float16" in sample + output else 128
    return AotSpec(
        name,
        gaussian_step.gaussian_step_kernel,
        arguments | _key_arguments(noise) | sizes | flags,
        num_warps,
        vector_bits,
    )


_SMALL_STEP, *_BETWEEN_STEPS, _MEDIUM_STEP, _LARGE_STEP = launch.shapes("gaussian_step")

GAUSSIAN_STEP = [
    _step_spec("float32", "float32", _SMALL_STEP, guided=False, noise=None, split=False),
    _step_spec("float32", "float32", _MEDIUM_STEP, guided=True, noise=None, split=False),
    _step_spec("float32", "float32", _LARGE_STEP, guided=False, noise="float32", split=True),
    _step_spec("float32", "float32", _LARGE_STEP, guided=False, noise=None, split=True),
    _step_spec("float32", "bfloat16", _MEDIUM_STEP, guided=False, noise=None, split=False),
    _step_spec("float32", "bfloat16", _LARGE_STEP, guided=True, noise=None, split=True),
    _step_spec("bfloat16", "bfloat16", _MEDIUM_STEP, guided=True, noise="bfloat16", split=False),
    *(
        _step_spec("float32", "bfloat16", shape, guided=True, noise=None, split=False)
        for shape in _BETWEEN_STEPS
    ),
    _step_spec("bfloat16", "bfloat16", _LARGE_STEP, guided=True, noise=None, split=True),
    _step_spec("float16", "float16", _LARGE_STEP, guided=False, noise=None, split=True),
    _step_spec("float32", "float32", _SMALL_STEP, guided=True, noise="float32", split=False, slab="float32"),
    _step_spec("float32", "bfloat16", _LARGE_STEP, guided=True, noise=None, split=True, slab="float32"),
    _step_spec("float32", "bfloat16", _LARGE_STEP, guided=False, noise=None, split=True, slab="bfloat16"),
    _step_spec("bfloat16", "bfloat16", _MEDIUM_STEP, guided=True, noise=None, split=False, slab="bfloat16"),
]


def _log_prob_arguments(sample: str, output: str, shared: bool) -> dict[str, str | int | None]:
    return {
        "sample_ptr": POINTER[sample],
        "model_output_ptr": POINTER[output],
        "prev_sample_ptr": POINTER[sample],
        "coefficients_ptr": "*fp32",
        "steps_ptr": "*i64",
        "N": "i32",
        "num_splits": "i32",
        "scale": "fp32",
        "IS_SHARED_STEP": shared,
    }


def _log_prob_spec(sample: str, output: str, elements: int, *, shared: bool) -> AotSpec:
    block_n, blocks, num_warps, splits = launch.pick_launch("step_log_prob", elements, launch.DEFAULT)
    arguments = _log_prob_arguments(sample, output, shared) | {"log_prob_ptr": "*fp32"}
    arguments |= _split_arguments(splits > 1) | {"BLOCK_N": block_n, "BLOCKS": blocks}
    name = f"step_log_prob-{sample}-{output}-{block_n}x{blocks}x{num_warps}"
    return AotSpec(
        name,
        step_log_prob.step_log_prob_kernel,
        arguments,
        num_warps,
        64 if "float16" in sample + output else 128,
    )


def _log_prob_grad_spec(sample: str, output: str, elements: int, *, shared: bool, all_three: bool) -> AotSpec:
    block_n, blocks, num_warps, _ = launch.pick_launch("step_log_prob_backward", elements, launch.DEFAULT)
    arguments = _log_prob_arguments(sample, output, shared) | {"grad_log_prob_ptr": "*fp32"}
    arguments |= {
        "grad_sample_ptr": POINTER[sample] if all_three else None,
        "grad_model_output_ptr": POINTER[output],
        "grad_prev_sample_ptr": POINTER[sample] if all_three else None,
        "HAS_GRAD_SAMPLE": all_three,
        "HAS_GRAD_OUTPUT": True,
        "HAS_GRAD_PREV": all_three,
        "BLOCK_N": block_n,
        "BLOCKS": blocks,
    }
    name = f"step_log_prob_backward-{sample}-{output}-{block_n}x{blocks}x{num_warps}" + (
        "-all" if all_three else ""
    )
    vector_bits = 64 if "float16" in sample + output else 128
    return AotSpec(name, step_log_prob.step_log_prob_backward_kernel, arguments, num_warps, vector_bits)


STEP_LOG_PROB = [
    _log_prob_spec("float32", "float32", 512, shared=True),
    _log_prob_spec("float32", "bfloat16", 1024, shared=False),
    _log_prob_spec("float32", "bfloat16", 2048, shared=False),
    _log_prob_spec("float32", "bfloat16", 4096, shared=False),
    _log_prob_spec("float32", "float32", 65_536, shared=False),
    _log_prob_spec("bfloat16", "bfloat16", 65_536, shared=True),
    _log_prob_grad_spec("float32", "float32", 512, shared=True, all_three=True),
    _log_prob_grad_spec("float32", "bfloat16", 65_536, shared=False, all_three=False),
    _log_prob_grad_spec("bfloat16", "bfloat16", 65_536, shared=False, all_three=True),
]


def _row_arguments(*, mask: bool, weights: bool, kl_gains: bool) -> dict[str, str | None]:
    """AOT arguments of what a row needs besides its sums."""
    numbers = ("scale", "clip_low", "clip_high", "dual_clip", "kl_threshold", "kl_weight")
    return dict.fromkeys(numbers, "fp32") | {
        "advantages_ptr": "*fp32",
        "weights_ptr": "*fp32" if weights else None,
        "step_weights_ptr": "*fp32" if weights else None,
        "mask_ptr": "*i1" if mask else None,
        "kl_gains_ptr": "*fp32" if kl_gains else None,
        "rows_ptr": "*fp32",
        "shares_ptr": "*fp32",
    }


PPO_ROWS = [
    AotSpec(
        f"ppo_totals-{'masked' if mask else 'all'}",
        ppo_rows.totals_kernel,
        {"rows_ptr": "*fp32", "shares_ptr": "*fp32", "steps_ptr": "*i64", "mask_ptr": mask}
        | {
            "loss_ptr": "*fp32",
            "step_sums_ptr": "*fp32",
            "B": "i32",
            "T": "i32",
            "BLOCK_R": ppo_rows.BLOCK_R,
        },
        num_warps=ppo_rows.TOTAL_WARPS,
    )
    for mask in ("*i1", None)
]


def _transition_arguments(
    output: str, shape: tuple[int, int, int], *, reference: bool, noise: str | None
) -> dict[str, str | int | None]:
    return _key_arguments(noise) | {
        "model_output_ptr": POINTER[output],
        "old_model_output_ptr": POINTER[output],
        "anchor_output_ptr": POINTER[output] if reference else None,
        "coefficients_ptr": "*fp32",
        "steps_ptr": "*i64",
        "N": "i32",
        "num_splits": "i32",
        "scale": "fp32",
        "HAS_NOISE": noise is not None,
        "BLOCK_N": shape[0],
        "BLOCKS": shape[1],
    }


def _ratio_spec(
    output: str, shape: tuple[int, int, int], *, reference: bool, noise: str | None, split: bool,
    is_ppo: bool, everything: bool = False,
) -> AotSpec:  # fmt: skip
    name = f"{'ppo_loss' if is_ppo else 'log_ratio'}-{output}-{shape[0]}x{shape[1]}x{shape[2]}-noise_{noise}"
    arguments = _row_arguments(mask=everything, weights=everything, kl_gains=everything)
    if not is_ppo:
        arguments |= {"advantages_ptr": None, "shares_ptr": None}
    arguments |= _transition_arguments(output, shape, reference=reference, noise=noise)
    arguments |= _split_arguments(split) | {"IS_NORMALIZED": everything}
    name += "-everything" if everything else ""
    return AotSpec(
        name, ppo_loss.transition_sums_kernel, arguments, shape[2], 64 if "float16" in output else 128
    )


_SMALL_LOSS, *_, _LARGE_LOSS = _LOSS_SHAPES = launch.shapes("ppo_loss")

PPO_LOSS = [
    _ratio_spec("float32", _SMALL_LOSS, reference=False, noise=None, split=False, is_ppo=False),
    _ratio_spec("float32", _SMALL_LOSS, reference=True, noise=None, split=False, is_ppo=True),
    _ratio_spec("bfloat16", _SMALL_LOSS, reference=False, noise="float32", split=False, is_ppo=True),
    *(
        _ratio_spec(
            output,
            shape,
            reference=True,
            noise=noise,
            split=shape == _LARGE_LOSS,
            is_ppo=True,
            everything=True,
        )
        for shape in _LOSS_SHAPES
        for output, noise in (("float32", "float32"), ("bfloat16", None))
    ),
    _ratio_spec("bfloat16", _LARGE_LOSS, reference=True, noise=None, split=True, is_ppo=True),
    _ratio_spec("float16", _LARGE_LOSS, reference=True, noise="float16", split=True, is_ppo=False),
]


def _ratio_grad_spec(
    output: str, shape: tuple[int, int, int], *, reference: bool, noise: str | None, is_ppo: bool,
    everything: bool = False,
) -> AotSpec:  # fmt: skip
    arguments = _transition_arguments(output, shape, reference=reference, noise=noise)
    arguments |= {
        "kl_gains_ptr": "*fp32" if everything else None,
        "grad_terms_ptr": "*fp32",
        "grad_loss_ptr": "*fp32" if is_ppo else None,
        "grad_model_output_ptr": POINTER[output],
        "IS_NORMALIZED": everything,
    }
    size = "x".join(map(str, shape))
    name = f"{'ppo_loss' if is_ppo else 'log_ratio'}_grad-{output}-{size}-noise_{noise}"
    name += "-everything" if everything else ""
    return AotSpec(
        name, ppo_gradient.transition_grad_kernel, arguments, shape[2], 64 if "float16" in output else 128
    )


_SMALL_GRAD, *_, _LARGE_GRAD = _GRAD_SHAPES = launch.shapes("ppo_loss_backward")

PPO_GRADIENT = [
    _ratio_grad_spec("float32", _SMALL_GRAD, reference=False, noise=None, is_ppo=False),
    _ratio_grad_spec("float32", _LARGE_GRAD, reference=True, noise="float32", is_ppo=True),
    _ratio_grad_spec("bfloat16", _LARGE_GRAD, reference=True, noise=None, is_ppo=True),
    *(
        _ratio_grad_spec("bfloat16", shape, reference=True, noise=None, is_ppo=True, everything=True)
        for shape in _GRAD_SHAPES
    ),
    _ratio_grad_spec("float16", _LARGE_GRAD, reference=True, noise=None, is_ppo=False),
]

SPECIFICATIONS = {
    "philox": PHILOX,
    "gaussian_step": GAUSSIAN_STEP,
    "step_log_prob": STEP_LOG_PROB,
    "ppo_rows": PPO_ROWS,
    "ppo_loss": PPO_LOSS,
    "ppo_gradient": PPO_GRADIENT,
    "value_pool": VALUE_POOL,
    "value_pool_backward": VALUE_POOL_BACKWARD,
    "value_pool_tiles": VALUE_POOL_TILES,
}
"""File of kernels/ -> what is compiled of it."""
