"""lacfast evaluate: scores of a saved model on prompts that nothing trains on here."""

from __future__ import annotations

from lacfast.backbones import load_backbone
from lacfast.config import GraphConfig, to_json
from lacfast.distributed import World
from lacfast.records import Evaluation
from lacfast.report.pictures import contact_sheet
from lacfast.rewards.normalizer import RewardNormalizer
from lacfast.rewards.registry import RewardSet
from lacfast.rollout.sampler import RolloutSampler
from lacfast.rollout.scored import evaluate, judged
from lacfast.runs.config import EVALUATION_SAMPLER, EvaluationRun
from lacfast.runs.devices import torch_device, torch_dtype
from lacfast.runs.directory import EVALUATION, require_own
from lacfast.runs.embedded import prompts_of
from lacfast.runs.phases import EvaluationLines
from lacfast.runs.saved import evaluation_sampler, saved_model
from lacfast.runs.terminal import phase_log
from lacfast.runtime.files import require_writable, write_json
from lacfast.runtime.graph import GraphRunner
from lacfast.runtime.memory import BatchSize


def evaluate_model(settings: EvaluationRun) -> Evaluation:
    """Scores of a saved model on prompts that nothing trains on here.

    With several ranks each makes its share of the images, and the first one shows and writes.

    Raises:
        ValueError: for settings that cannot work, before the model is loaded where that can be told.
    """
    world, device = World.current().able_to_share(settings.samples), torch_device(settings.device)
    scorer = RewardSet.create(settings.rewards)
    prompts = prompts_of(settings.prompts).cycle(settings.samples)
    model, sampler = saved_model(settings.source), settings.sampler
    if sampler == EVALUATION_SAMPLER:
        sampler = evaluation_sampler(model) or sampler
    scorer.require_prompts(prompts)
    if settings.out is not None:
        require_own(settings.out, EVALUATION)
        require_writable(settings.out)
    scorer, log = scorer.prepared(), phase_log(world)
    with log.phase("loading", f"Load {model}"):
        backbone = load_backbone(model, device=device, dtype=torch_dtype(settings.dtype))
    with EvaluationLines(log) as lines:
        parts = judged(
            RolloutSampler(backbone, None, GraphRunner(GraphConfig(), backbone.device)),
            backbone.transition_table(sampler),
            prompts,
            seed=settings.seed,
            guidance_scale=sampler.guidance_scale,
            part_size=BatchSize(settings.batch_size, unit="sample", setting="batch_size"),
            watcher=lines.images,
            world=world,
        )
        scorer = scorer.judging(backbone.judged_frames)
        unused = RewardNormalizer.create(len(scorer.names))
        evaluation = evaluate(parts, backbone, [scorer], unused, world)
        lines.scores(evaluation)
    if settings.out is not None and world.is_first:
        told = {"model": model, "samples": settings.samples, "seed": settings.seed}
        scores = told | {"sampler": to_json(sampler), "means": evaluation.means()}
        write_json(settings.out / "scores.json", scores)
        contact_sheet(evaluation.images).save(settings.out / "samples.png")
    return evaluation
