"""lacfast.steer: settings checked, images steered batch by batch, choices made and scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lacfast.backbone import Backbone
from lacfast.config import SamplerConfig, SteeringConfig
from lacfast.critic.critic import Critic
from lacfast.prompts import PromptEntry, PromptSet
from lacfast.records import FirstSampleId, TransitionTable
from lacfast.rewards.heads import RewardHeads
from lacfast.rewards.registry import RewardSet, RewardSpec
from lacfast.rewards.scoring import require_finite
from lacfast.runtime.memory import BatchSize
from lacfast.steering.cost import EvaluationCounter, FunctionEvaluations, SteeringStats, prune_steps
from lacfast.steering.denoising import SignTest, denoise
from lacfast.steering.forward import SteeredModel
from lacfast.steering.guidance import guided_steps
from lacfast.steering.method import Method
from lacfast.steering.methods import METHODS
from lacfast.steering.objective import Objective
from lacfast.steering.particles import Particles


def steer(
    backbone: Backbone,
    prompts: PromptSet | Sequence[PromptEntry],
    config: SteeringConfig | None = None,
    *,
    sampler: SamplerConfig | None = None,
    rewards: RewardSet | RewardSpec | None = None,
    gold: RewardSet | RewardSpec | None = None,
    head_weights: Tensor | None = None,
    more_critics: Sequence[Critic] = (),
) -> tuple[Tensor, SteeringStats]:
    """Images of `prompts`, one each, sampled with the critic's help.

    Args:
        backbone: with a trained critic; without one only best_of_n by reward works.
        prompts: n of them, with metadata where the rewards need some.
        config: method and strength.
        sampler: as in training, guidance_scale included; the critic knows the states of that sampler.
        rewards: the critic's rewards in its order, for selection="reward" and for the report. Weights of
            theirs must be those of the training: `head_weights` gives others.
        gold: rewards that are only reported.
        head_weights: (M,) weight of each value head. None: those of the critic's training; without a critic
            the rewards'.
        more_critics: an ensemble beside the backbone's own on the same rewards, of which the minimum counts.

    Returns:
        images (n, 3, H, W), or videos (n, F, 3, H, W), float in [0, 1], and what they cost and scored.

    Raises:
        ValueError: for settings that cannot work or would be ignored, before any image is made; when V does
            not rise along its own gradient; when a reward fails.
        NotFiniteError: for images that are NaN; it names the denoising step or the decoder.
    """
    config, sampler = config or SteeringConfig(), sampler or SamplerConfig()
    prompts = PromptSet.create(prompts)
    critics = (() if backbone.critic is None else (backbone.critic,)) + tuple(more_critics)
    scorer, gold_scorer = (_reward_set(each, backbone.judged_frames) for each in (rewards, gold))
    for judges in (scorer, gold_scorer):
        if judges is not None:
            judges.require_prompts(prompts)
    table = backbone.transition_table(sampler)
    _require_usable(config, table, has_critic=bool(critics), has_rewards=scorer is not None)
    scorer, gold_scorer = (judge and judge.prepared() for judge in (scorer, gold_scorer))
    device = next(backbone.model.parameters()).device
    if head_weights is None and scorer is not None and critics:
        head_weights = _asked_weights(rewards, scorer, critics[0].rewards)
    model = SteeredModel(
        backbone,
        critics,
        Objective.create(critics, scorer, head_weights, config, device),
        EvaluationCounter(),
        backbone.encode_unconditional(1) if sampler.guidance_scale > 1 else None,
        BatchSize(config.batch_size, unit="latent", setting="batch_size"),
    )
    by_reward = scorer if config.selection == "reward" else None
    sign_test = SignTest()
    images: list[Tensor] = []
    found: list[SteeringStats] = []
    with model.counter.counting(backbone.model, critics):
        for part in prompts.split(max(config.batch_size // config.width, 1)):
            first = FirstSampleId.STEERING + config.first_image + sum(map(len, images))
            image_ids = torch.arange(first, first + len(part), device=device)
            method = METHODS[config.method](config, table, image_ids)
            particles, is_finite = denoise(
                model,
                table,
                config,
                method,
                Particles.start(backbone.latent_shape, image_ids, config.particles, config.seed),
                backbone.encode_prompts(part.texts),
                sampler.guidance_scale,
                sign_test,
            )
            origin = partial(table.origin_of_nan, is_finite)
            made, stats = _finished(model, method, particles, part, by_reward, scorer, gold_scorer, origin)
            images.append(made)
            found.append(stats)
    counter = model.counter
    return torch.cat(images), replace(
        SteeringStats.concatenate(found),
        evaluations=FunctionEvaluations(counter.forwards, counter.backwards, len(prompts)),
        gradient_gain=sign_test.gain,
    )


def _reward_set(rewards: RewardSet | RewardSpec | None, judged: int) -> RewardSet | None:
    return None if rewards is None else RewardSet.create(rewards).judging(judged)


def _asked_weights(
    rewards: RewardSet | RewardSpec | None, scorer: RewardSet, trained: RewardHeads | None
) -> Tensor | None:
    """Weights that a call gives with its rewards; None where it names them alone."""
    is_weighted = isinstance(rewards, Mapping) or bool((scorer.weights != 1).any())
    if not is_weighted or (trained is not None and tuple(scorer.names) != trained.rewards):
        return None
    if trained is None:
        return scorer.weights
    if not torch.allclose(scorer.weights, torch.tensor(trained.weights)):
        raise ValueError(
            f"rewards weigh {scorer.weights.tolist()}, in the critic's training {list(trained.weights)}; "
            "leave the weights out, or give others as head_weights"
        )
    return None


def _finished(
    model: SteeredModel,
    method: Method,
    particles: Particles,
    prompts: PromptSet,
    by_reward: RewardSet | None,
    scorer: RewardSet | None,
    gold: RewardSet | None,
    origin: Callable[[], str],
) -> tuple[Tensor, SteeringStats]:
    """Choose by the rewards `by_reward` of all that reached the end, or else by their last values.

    The statistics are of these images alone, and count no evaluation: the call's counter has them.

    Raises:
        NotFiniteError: for images that are NaN, of which `origin` says what made them.
    """
    if by_reward is not None:
        candidates = prompts.take(particles.rows.tolist())
        decoded = _decoded(model, particles.sample)
        scores = by_reward.score(decoded, candidates.texts, candidates.metadata, origin)
        chosen = method.finish(particles, model.objective.of_rewards(scores).to(decoded.device))
        images = decoded[chosen]
        rewards = {name: tensor[chosen.cpu()] for name, tensor in scores.items()}
    else:
        # Without a critic there is one trajectory per image.
        only = particles.sample.new_zeros(len(particles))
        chosen = method.finish(particles, particles.values[-1] if len(particles.values) else only)
        images = _decoded(model, particles.sample[chosen])
        require_finite(images, prompts.texts, origin)
        rewards = _scores(scorer, images, prompts)
    return images, SteeringStats(
        evaluations=FunctionEvaluations(0, 0, len(prompts)),
        values=particles.values[:, chosen],
        rewards=rewards,
        gold=_scores(gold, images, prompts),
        reward_calls=0 if by_reward is None else len(particles),
        gradient_gain=math.nan,
        particles=method.stats(),
    )


def _decoded(model: SteeredModel, latents: Tensor) -> Tensor:
    return torch.cat([model.backbone.decode(part) for part in torch.split(latents, model.size.size)])


def _scores(scorer: RewardSet | None, images: Tensor, prompts: PromptSet) -> dict[str, Tensor]:
    return {} if scorer is None else scorer.score(images, prompts.texts, prompts.metadata)


def _require_usable(
    config: SteeringConfig, table: TransitionTable, *, has_critic: bool, has_rewards: bool
) -> None:
    """
    Raises:
        ValueError: for settings that this sampler, critic or reward cannot serve.
    """
    by_value = config.selection == "value" and config.width > 1
    if not has_critic and (by_value or config.guided or config.method != "best_of_n"):
        raise ValueError(
            "steering needs a critic; load a backbone that was saved with one, pass load_backbone a "
            "critic_file, or use method='best_of_n' with selection='reward'"
        )
    if config.selection == "reward" and not has_rewards:
        raise ValueError("selection='reward' has no reward to select by; pass rewards, or use 'value'")
    if config.method in ("smc", "beam") and not table.trainable_steps:
        raise ValueError(
            f"every step of the {table.kind!r} sampler is deterministic, so {config.method} would only copy; "
            "use noise_level > 0 (0.7 for 'flow_sde'), or method='pruning'"
        )
    if config.guided and not any(guided_steps(config, table)):
        raise ValueError(
            f"guidance_weight={config.guidance_weight} would be ignored: no step's noise level lies within "
            f"{config.guidance_window} where {config.guidance_form!r} with {config.method!r} can move it; "
            f"the levels are {[round(level, 3) for level in table.sigmas.tolist()]}"
        )
    prune_steps(config, table)
