"""What every op asks of its tensors before an address is taken: device, dtype, shape, memory order.

The kernels read raw pointers, so nothing else would notice. A step beyond the table of coefficients is found
by the CPU kernels only: on a GPU, `steps` cannot be looked at without a synchronisation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor

from lacfast.ops.backend import layout_reader
from lacfast.records import NoiseKey
from lacfast.reference.transition import arithmetic_dtype as arithmetic_dtype

Found = TypeVar("Found")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


MOST_LAYOUTS = 1024
"""How many of them a check remembers; a run has a few."""


def once_per_layout(check: Callable[..., Found]) -> Callable[..., Found]:
    """A check that asks of its tensors nothing but device, dtype, shape and memory order, once for all alike.

    The settings that it takes by keyword are a part of what is alike; what it found is returned again. What
    C++ cannot look at, as a fake tensor, is checked each time.
    """
    passed: dict[object, tuple[Found]] = {}

    @wraps(check)
    def checked(*tensors: Tensor | None, **settings: object) -> Found:
        if torch.compiler.is_compiling():
            return check(*tensors, **settings)
        layout = layout_reader()(tensors)
        key = (layout, *settings.values()) if settings else layout
        if known := passed.get(key):
            return known[0]
        found = check(*tensors, **settings)
        if layout is not None and len(passed) < MOST_LAYOUTS:
            passed[key] = (found,)
        return found

    return checked


def check_first(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """The operand that the others are compared with: one of these dtypes, contiguous."""
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {tensor.dtype}; use {_or(dtypes)}")
    if not tensor.is_contiguous():
        raise _not_contiguous(name, tensor)


def check_latents(name: str, tensor: Tensor) -> None:
    """(B, ...), floating, contiguous, not empty."""
    check_first(name, tensor)
    if tensor.ndim < 2 or tensor.numel() == 0:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; it must be (B, ...) with at least one element"
        )


def check_operand(
    name: str,
    tensor: Tensor,
    like_name: str,
    like: Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """One further operand: on the device of `like`, of this shape, one of these dtypes, contiguous."""
    # Two devices take longer to compare than two tensors to be found on the CPU.
    if not (tensor.is_cpu and like.is_cpu) and tensor.device != like.device:
        raise ValueError(
            f"{name} is on {tensor.device} but {like_name} on {like.device}; "
            f"move it with {name}.to({str(like.device)!r})"
        )
    if tensor.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; with this {like_name} it must be {tuple(shape)}"
        )
    if tensor.dtype not in dtypes:
        raise ValueError(
            f"{name} has dtype {tensor.dtype}; with this {like_name} ({like.dtype}) it must be {_or(dtypes)}"
        )
    if not tensor.is_contiguous():
        raise _not_contiguous(name, tensor)


def check_transition(
    coefficients: Tensor, steps: Tensor, like_name: str, like: Tensor, *, may_share_step: bool = False
) -> None:
    """coefficients (T, 3) in the arithmetic type and steps (B,) int64, or (1,) for all samples."""
    if coefficients.ndim != 2:
        raise ValueError(
            f"coefficients has shape {tuple(coefficients.shape)}; it must be (T, 3): a, b, std per step"
        )
    table_shape = (max(coefficients.shape[0], 1), 3)
    check_operand("coefficients", coefficients, like_name, like, table_shape, (arithmetic_dtype(like),))
    steps_shape = (1,) if may_share_step and steps.shape == (1,) else (like.shape[0],)
    check_operand("steps", steps, like_name, like, steps_shape, (torch.int64,))


@once_per_layout
def check_step(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    steps: Tensor,
    uncond_output: Tensor | None,
    guidance_scale: Tensor | None,
    *key: Tensor | None,
) -> None:
    """What both forms of gaussian_step ask; `key` is the noise as split_noise gives it."""
    check_latents("sample", sample)
    same_maths = FLOATS[3:] if sample.dtype == torch.float64 else FLOATS[:3]
    check_operand("model_output", model_output, "sample", sample, sample.shape, same_maths)
    check_transition(coefficients, steps, "sample", sample, may_share_step=True)
    if (uncond_output is None) != (guidance_scale is None):
        given = "guidance_scale" if uncond_output is None else "uncond_output"
        raise ValueError(f"only {given} is given; guidance needs both uncond_output and guidance_scale")
    if uncond_output is not None and guidance_scale is not None:
        like = ("model_output", model_output, sample.shape, (model_output.dtype,))
        check_operand("uncond_output", uncond_output, *like)
        check_operand("guidance_scale", guidance_scale, "sample", sample, (1,), (torch.float32,))
    check_noise("sample", sample, *key)


def split_noise(noise: Tensor | NoiseKey) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The noise as (tensor, seed, sample ids), of which either the first or the other two are None."""
    return (None, noise.seed, noise.sample_ids) if isinstance(noise, NoiseKey) else (noise, None, None)


def check_noise(
    like_name: str, like: Tensor, noise: Tensor | None, seed: Tensor | None, sample_ids: Tensor | None
) -> None:
    """Noise that was split: eps of the latents' shape, or seed (1,) and sample ids (B,) int64."""
    if noise is not None:
        check_operand("noise", noise, like_name, like, like.shape, (torch.float32, like.dtype))
        return
    if seed is None or sample_ids is None:
        raise ValueError(
            "noise is neither a tensor nor a key with a seed and sample ids; "
            "pass the eps that was drawn, or NoiseKey.create(seed, sample_ids)"
        )
    check_operand("noise.seed", seed, like_name, like, (1,), (torch.int64,))
    check_operand("noise.sample_ids", sample_ids, like_name, like, like.shape[:1], (torch.int64,))


def reduction_scale(reduction: str, like: Tensor) -> float:
    """1 / N for "mean" over the N elements of a latent, 1 for "sum"."""
    if reduction == "mean":
        return like.shape[0] / like.numel()
    if reduction == "sum":
        return 1.0
    raise ValueError(f"unknown reduction {reduction!r}; known: 'mean' (per element), 'sum' (joint)")


def _or(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(dict.fromkeys(str(dtype) for dtype in dtypes))


def _not_contiguous(name: str, tensor: Tensor) -> ValueError:
    return ValueError(
        f"{name} of shape {tuple(tensor.shape)} has strides {tensor.stride()}; "
        f"the kernels read memory in order: pass {name}.contiguous()"
    )
