"""The ops on latents: noise, the denoising step, its log-prob, the PPO loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import peers, roofline
from bench.shapes import LatentCase
from bench.workloads.workload import (
    COMPILED_PEER,
    OURS,
    OURS_DRAWN,
    PEER_DRAWN,
    PEERS,
    REFERENCES,
    Call,
    Inputs,
    Workload,
    variants,
)
from lacfast import ops, reference, schedule
from lacfast.records import NoiseKey, TrajectorySlab

SIGMA, NEXT_SIGMA, NOISE_LEVEL = 0.7, 0.6, 0.7
CLIP_RANGE = 1e-4
GUIDANCE_SCALE = 4.5
# Largest error relative to the largest entry. Float32: a few roundings; below: one rounding of the result,
# and for a log-prob of the stored latent, the rounding of that latent.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}
# A difference of two log-probs near -1 keeps a few digits of a log-ratio near 1e-6, and a stored latent of
# 8 bits shifts the noise that the peers' gradient is made of.
PEER_LOSS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


def transition_inputs(case: LatentCase, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Latents, an output, noise with its key, and the transition in our form and in the peers'."""
    generator = torch.Generator().manual_seed(0)
    sample, output = (torch.randn(case.shape, generator=generator) for _ in range(2))
    sigmas = torch.tensor([SIGMA, NEXT_SIGMA], dtype=torch.float64)
    steps = torch.zeros(case.batch, dtype=torch.int64)
    key = NoiseKey.create(0, range(case.batch))
    column = (case.batch,) + (1,) * len(case.latent)
    inputs = {
        "sample": sample.to(dtype),
        "model_output": output.to(dtype),
        "noise": reference.normal_noise(case.shape, steps, key),
        "coefficients": schedule.flow_sde(sigmas, NOISE_LEVEL).coefficients(),
        "steps": steps,
        "seed": key.seed,
        "sample_ids": key.sample_ids,
        "sigma": torch.full(column, SIGMA),
        "next_sigma": torch.full(column, NEXT_SIGMA),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _key(inputs: Inputs) -> NoiseKey:
    return NoiseKey(inputs["seed"], inputs["sample_ids"])


def normal_noise(case: LatentCase, dtype: torch.dtype, device: torch.device, *, compiled: bool) -> Workload:
    """Noise, beside the same generator in torch: no peer draws noise that does not depend on the batch."""
    inputs = transition_inputs(case, dtype, device)

    def drawn(function: Callable[..., Tensor]) -> Call:
        return lambda given: (function(case.shape, given["steps"], _key(given)),)

    providers = variants(REFERENCES, reference.normal_noise, drawn, compiled) | {
        OURS: drawn(ops.normal_noise)
    }
    cost = roofline.elementwise("normal_noise", case.elements, dtype)
    return Workload(
        op="normal_noise",
        case=case,
        dtype=torch.float32,
        inputs={name: inputs[name] for name in ("steps", "seed", "sample_ids")},
        providers=providers,
        costs=dict.fromkeys(providers, cost),
        baseline=list(providers)[-2],
        # The reference draws in float32 whatever it is given, with another library's sine and logarithm.
        tolerance=2e-5,
        peer_tolerance=2e-5,
    )


def gaussian_step(
    case: LatentCase, dtype: torch.dtype, device: torch.device, *, compiled: bool, guided: bool = False
) -> Workload:
    """Sampling: the next latent and its log-prob; `guided` combines two outputs in the same pass."""
    inputs = transition_inputs(case, dtype, device)
    if guided:
        shift = torch.randn(case.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        inputs["uncond_output"] = inputs["model_output"] + 0.1 * shift
        inputs["guidance_scale"] = torch.full((1,), GUIDANCE_SCALE, device=device)

    def ours(function: Callable[..., Any], *, draw: bool = False) -> Call:
        def call(given: Inputs) -> tuple[Tensor, ...]:
            result = function(
                given["sample"],
                given["model_output"],
                given["coefficients"],
                given["steps"],
                noise=_key(given) if draw else given["noise"],
                uncond_output=given.get("uncond_output"),
                guidance_scale=given.get("guidance_scale"),
            )
            return result.prev_sample, result.log_prob

        return call

    def peer(function: Callable[..., tuple[Tensor, ...]], *, draw: bool = False) -> Call:
        def call(given: Inputs) -> tuple[Tensor, ...]:
            noise = torch.randn(case.shape, device=device) if draw else given["noise"]
            names = ("model_output", "sample", "sigma", "next_sigma")
            transition = (*(given[name] for name in names), noise, NOISE_LEVEL)
            return function(*transition, given.get("uncond_output"), GUIDANCE_SCALE)

        return call

    formula = peers.sde_step_with_log_prob
    drawn = torch.compile(formula, fullgraph=True, dynamic=False) if compiled else formula
    providers = (
        variants(PEERS, formula, peer, compiled)
        | {PEER_DRAWN: peer(drawn, draw=True)}
        | variants(REFERENCES, reference.gaussian_step, ours, compiled)
        | {OURS: ours(ops.gaussian_step), OURS_DRAWN: ours(ops.gaussian_step, draw=True)}
    )
    name = "gaussian_step, guided" if guided else "gaussian_step"
    return _workload(name, case, dtype, inputs, providers, name, TOLERANCE[dtype], 2 * TOLERANCE[dtype])


def gaussian_step_in_place(
    case: LatentCase, dtype: torch.dtype, device: torch.device, *, compiled: bool
) -> Workload:
    """Sampling into a trajectory: latent, output and log-prob into their slices, and the latent moves on."""
    inputs = transition_inputs(case, dtype, device)
    inputs["moving"] = torch.empty_like(inputs["sample"])
    inputs["latents"] = inputs["sample"].new_empty((2, *case.shape))
    inputs["outputs"] = inputs["model_output"].new_empty((1, *case.shape))
    inputs["log_probs"] = torch.empty((1, case.batch), device=device)

    def stored(given: Inputs) -> tuple[Tensor, ...]:
        return given["latents"][1], given["log_probs"][0], given["moving"]

    def ours(function: Callable[..., None]) -> Call:
        def call(given: Inputs) -> tuple[Tensor, ...]:
            # Every call starts from the same latents; the copy counts against ours.
            given["moving"].copy_(given["sample"])
            slab = TrajectorySlab(given["latents"], given["outputs"], given["log_probs"])
            transition = (given["model_output"], given["coefficients"], given["steps"])
            function(given["moving"], *transition, noise=given["noise"], slab=slab)
            return stored(given)

        return call

    def peer(function: Callable[..., tuple[Tensor, ...]]) -> Call:
        def call(given: Inputs) -> tuple[Tensor, ...]:
            names = ("model_output", "sample", "sigma", "next_sigma", "noise")
            prev_sample, log_prob, *_ = function(*(given[name] for name in names), NOISE_LEVEL)
            given["latents"][1].copy_(prev_sample)
            given["outputs"][0].copy_(given["model_output"])
            given["log_probs"][0].copy_(log_prob)
            given["moving"].copy_(prev_sample)
            return stored(given)

        return call

    providers = (
        variants(PEERS, peers.sde_step_with_log_prob, peer, compiled)
        | {REFERENCES[0]: ours(reference.gaussian_step_)}
        | {OURS: ours(ops.gaussian_step_)}
    )
    name = "gaussian_step_"
    return _workload(name, case, dtype, inputs, providers, name, TOLERANCE[dtype], 2 * TOLERANCE[dtype])


def step_log_prob(case: LatentCase, dtype: torch.dtype, device: torch.device, *, compiled: bool) -> Workload:
    """Training in the peers' form: the log-prob of a stored transition and its gradient to the output."""
    inputs = transition_inputs(case, dtype, device)
    inputs["prev_sample"] = _stored_step(inputs).prev_sample
    inputs["model_output"].requires_grad_()

    def with_gradient(log_prob: Tensor, given: Inputs) -> tuple[Tensor, Tensor]:
        return log_prob, torch.autograd.grad(log_prob.sum(), given["model_output"])[0]

    def ours(function: Callable[..., Tensor]) -> Call:
        names = ("sample", "model_output", "prev_sample", "coefficients", "steps")
        return lambda given: with_gradient(function(*(given[name] for name in names)), given)

    def peer(function: Callable[..., Tensor]) -> Call:
        names = ("model_output", "sample", "prev_sample", "sigma", "next_sigma")
        return lambda given: with_gradient(function(*(given[name] for name in names), NOISE_LEVEL), given)

    providers = (
        variants(PEERS, peers.stored_log_prob, peer, compiled)
        | variants(REFERENCES, reference.step_log_prob, ours, compiled)
        | {OURS: ours(ops.step_log_prob)}
    )
    cost = roofline.elementwise("step_log_prob", case.elements, dtype)
    cost += roofline.elementwise("step_log_prob, backward", case.elements, dtype)
    return Workload(
        op="step_log_prob",
        case=case,
        dtype=dtype,
        inputs=inputs,
        providers=providers,
        costs=dict.fromkeys(providers, cost),
        baseline=COMPILED_PEER if compiled else PEERS[0],
        tolerance=TOLERANCE[dtype],
        peer_tolerance=2 * TOLERANCE[dtype],
    )


def ppo_loss(case: LatentCase, dtype: torch.dtype, device: torch.device, *, compiled: bool) -> Workload:
    """Training: loss and gradient of one microbatch."""
    inputs = transition_inputs(case, dtype, device)
    step = _stored_step(inputs)
    shift = torch.randn(case.shape, generator=torch.Generator().manual_seed(2)).to(device)
    inputs |= {
        "old_model_output": inputs["model_output"],
        "model_output": (inputs["model_output"].float() + 1e-3 * shift).to(dtype).requires_grad_(),
        "prev_sample": step.prev_sample,
        "old_log_prob": step.log_prob,
        # Their mean is not zero: the loss must be something to compare.
        "advantages": torch.linspace(-1, 2, case.batch, device=device),
    }

    def with_gradient(loss: Tensor, given: Inputs) -> tuple[Tensor, Tensor]:
        return loss, torch.autograd.grad(loss, given["model_output"])[0]

    def ours(function: Callable[..., Any], *, draw: bool = False) -> Call:
        names = ("model_output", "old_model_output", "advantages", "coefficients", "steps")

        def call(given: Inputs) -> tuple[Tensor, ...]:
            noise = _key(given) if draw else given["noise"]
            loss, _ = function(*(given[name] for name in names), noise=noise, clip_range=CLIP_RANGE)
            return with_gradient(loss, given)

        return call

    def peer(function: Callable[..., Tensor]) -> Call:
        names = ("model_output", "sample", "prev_sample", "old_log_prob", "advantages", "sigma", "next_sigma")
        return lambda given: with_gradient(
            function(*(given[name] for name in names), noise_level=NOISE_LEVEL, clip_range=CLIP_RANGE), given
        )

    providers = (
        variants(PEERS, peers.clipped_loss, peer, compiled)
        | variants(REFERENCES, reference.ppo_loss, ours, compiled)
        | {OURS: ours(ops.ppo_loss), OURS_DRAWN: ours(ops.ppo_loss, draw=True)}
    )
    tolerances = TOLERANCE[dtype], PEER_LOSS_TOLERANCE[dtype]
    return _workload("ppo_loss", case, dtype, inputs, providers, "ppo_loss", *tolerances, backward=True)


def _stored_step(inputs: Inputs) -> Any:
    names = ("sample", "model_output", "coefficients", "steps")
    return reference.gaussian_step(*(inputs[name] for name in names), noise=inputs["noise"])


def _workload(
    op: str,
    case: LatentCase,
    dtype: torch.dtype,
    inputs: Inputs,
    providers: dict[str, Call],
    traffic: str,
    tolerance: float,
    peer_tolerance: float,
    *,
    backward: bool = False,
) -> Workload:
    """A workload with costs that depend on whether a provider is given its noise."""
    costs = {}
    for name in providers:
        noise = "drawn" if name in (OURS_DRAWN, PEER_DRAWN) else "given"
        costs[name] = roofline.elementwise(traffic, case.elements, dtype, noise=noise)
        if backward:
            costs[name] += roofline.elementwise(f"{traffic}, backward", case.elements, dtype, noise=noise)
    return Workload(
        op=op,
        case=case,
        dtype=dtype,
        inputs=inputs,
        providers=providers,
        costs=costs,
        baseline=COMPILED_PEER if COMPILED_PEER in providers else PEERS[0],
        tolerance=tolerance,
        peer_tolerance=peer_tolerance,
    )
