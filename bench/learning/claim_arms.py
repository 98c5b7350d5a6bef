"""The arms of every claim: functions of the backbone, arms by name, the first is what is claimed for."""

from __future__ import annotations

from dataclasses import replace

from bench.learning.arms import (
    SMALL_ROLLOUTS,
    UNET_RATE,
    advantage_weighted_matching,
    at_levels,
    at_rate,
    batch_mean,
    batch_mean_weighted,
    conditional,
    constrained,
    critic_weighted,
    diffusion_nft,
    distributional,
    group_relative,
    group_std,
    history_weighted,
    kl_mask,
    latent_critic,
    leave_one_out,
    pretrained_for,
    ratio_norm,
    replayed,
    running_prompt_statistics,
    scalarized,
    shuffled_critic,
    slowed,
    taught_critic,
    with_trunk,
)
from bench.learning.runs import Arm
from lacfast.config import GRPO, AdvantageConfig, TrainConfig
from lacfast.tasks.models import BackboneName

NOT_THE_NOISIEST = (1, 8)
"""Steps of the sampler's 8 that are trained; AWM's authors leave out the first too."""
CHECKER_FLOOR = 0.57
"""Mean of the checker's reward that the constrained arm must keep, a little less than the base model's."""
CHECKER_PASSED = 0.99
"""The checker's reward of images that obey the whole prompt is 1."""
TAUGHT_ROLLOUTS = 250
"""Rollouts of value pretraining that cost the control of small rollouts nothing."""
HEIGHT_SHARE = 0.42
"""Deviation of the reward for height over the checker's on the base model's images, rounded: what a plain sum
of both amounts to once each is normalised."""


def _unpretrained(config: TrainConfig) -> Arm:
    return Arm(config=config, value_pretraining=False)


def baselines(backbone: BackboneName) -> dict[str, Arm]:
    return {
        "latent critic": _unpretrained(latent_critic(backbone)),
        "GRPO": Arm(config=group_relative(backbone, GRPO())),
        "DDPO": Arm(config=running_prompt_statistics(backbone)),
    }


def objectives(backbone: BackboneName) -> dict[str, Arm]:
    return {
        "critic-weighted NFT": _unpretrained(critic_weighted(backbone)),
        "DiffusionNFT": Arm(config=diffusion_nft(backbone)),
        **baselines(backbone),
    }


def matching(backbone: BackboneName) -> dict[str, Arm]:
    arms = objectives(backbone)
    kept = {name: arms[name] for name in ("critic-weighted NFT", "DiffusionNFT")}
    return kept | {"AWM": Arm(config=advantage_weighted_matching(backbone))}


def levels(backbone: BackboneName) -> dict[str, Arm]:
    made = critic_weighted, diffusion_nft, batch_mean_weighted, history_weighted
    size = SMALL_ROLLOUTS[backbone]
    critic, groups, batch, history = (replace(config(backbone), batch_size=size) for config in made)
    return {
        "critic-weighted NFT": _unpretrained(critic),
        "DiffusionNFT": Arm(config=groups),
        "batch mean": Arm(config=batch),
        "prompt history": Arm(config=history),
        "critic with replay": _unpretrained(replayed(critic)),
        "critic, not the noisiest": _unpretrained(at_levels(critic, NOT_THE_NOISIEST)),
        "groups, not the noisiest": Arm(config=at_levels(groups, NOT_THE_NOISIEST)),
    }


def combined(backbone: BackboneName) -> dict[str, Arm]:
    arms = levels(backbone)
    critic = arms["critic with replay"]
    both = replace(critic, config=at_levels(critic.config, NOT_THE_NOISIEST))
    return {"critic, replay, not the noisiest": both} | {
        name: arms[name] for name in ("groups, not the noisiest", "DiffusionNFT")
    }


def inference(backbone: BackboneName) -> dict[str, Arm]:
    arms = levels(backbone)
    return {name: arms[name] for name in ("critic with replay", "DiffusionNFT")}


def forward_process(backbone: BackboneName) -> dict[str, Arm]:
    arms = levels(backbone)
    return {"critic-weighted NFT": arms["critic with replay"], "DiffusionNFT": arms["DiffusionNFT"]}


def forward_process_and_history(backbone: BackboneName) -> dict[str, Arm]:
    """With a control on the DiT, one image of a prompt and no critic."""
    arms = forward_process(backbone)
    return arms | {"prompt history": levels(backbone)["prompt history"]} if backbone == "dit" else arms


def forward_process_and_ppo(backbone: BackboneName) -> dict[str, Arm]:
    """With PPO's arms on the UNet, at the rate that was chosen for them there with another reward."""
    arms = forward_process(backbone)
    if backbone == "unet":
        for name in ("GRPO", "DDPO"):
            arms[name] = Arm(config=at_rate(baselines(backbone)[name].config, UNET_RATE))
    return arms


def taught(backbone: BackboneName) -> dict[str, Arm]:
    arms = forward_process(backbone)
    config = pretrained_for(arms["critic-weighted NFT"].config, TAUGHT_ROLLOUTS)
    return {"taught critic": Arm(config=config, counts_pretraining=False), **arms}


def slow(backbone: BackboneName) -> dict[str, Arm]:
    arms = forward_process(backbone)
    critic = arms["critic-weighted NFT"]
    return {"slow critic": replace(critic, config=slowed(critic.config)), **arms}


def chosen(backbone: BackboneName) -> dict[str, Arm]:
    critic = forward_process(backbone)["critic-weighted NFT"]
    return {
        "best of four": replace(critic, choice="best"),
        "best and worst of four": replace(critic, choice="extremes"),
        "critic-weighted NFT": critic,
    }


def joint(backbone: BackboneName) -> dict[str, Arm]:
    similarity, checker = {"similarity": 1.0}, {"shapes": 1.0}
    arms = levels(backbone)
    critic, groups = arms["critic with replay"], arms["DiffusionNFT"]
    shared = replace(critic.config, advantages=AdvantageConfig(combination="scalarized"))
    return {
        "two heads": replace(critic, rewards=similarity | checker),
        "one shared head": replace(critic, config=shared, rewards=similarity | checker),
        "DiffusionNFT": replace(groups, rewards=similarity | checker),
        "similarity alone": replace(critic, rewards=similarity),
        "checker alone": replace(critic, rewards=checker),
    }


def controls(backbone: BackboneName) -> dict[str, Arm]:
    critic = latent_critic(backbone)
    arms = {
        "latent critic": _unpretrained(critic),
        "shuffled critic": _unpretrained(shuffled_critic(backbone)),
        "leave one out": Arm(config=leave_one_out(backbone)),
    }
    if backbone == "unet":
        arms["clean estimate"] = _unpretrained(with_trunk(backbone, "clean_net"))
        return {name: replace(arm, config=at_rate(arm.config, UNET_RATE)) for name, arm in arms.items()}
    return arms | {
        "branch": _unpretrained(with_trunk(backbone, "branch")),
        "head alone": _unpretrained(with_trunk(backbone, "shared")),
        "joint head": _unpretrained(with_trunk(backbone, "joint")),
        "copied trunk": _unpretrained(with_trunk(backbone, "copy")),
        "HL-Gauss loss": _unpretrained(distributional(critic)),
        "replay": _unpretrained(replayed(critic)),
        "value pretraining": Arm(config=critic),
        "taught critic": Arm(config=taught_critic(backbone), counts_pretraining=False),
    }


def estimators(backbone: BackboneName) -> dict[str, Arm]:
    return {
        "latent critic": _unpretrained(latent_critic(backbone)),
        "GRPO": Arm(config=group_relative(backbone, GRPO())),
        "group std": Arm(config=group_std(backbone)),
        "KL mask": Arm(config=kl_mask(backbone)),
        "ratio norm": Arm(config=ratio_norm(backbone)),
        "batch mean": Arm(config=batch_mean(backbone)),
    }


def multi_reward(backbone: BackboneName) -> dict[str, Arm]:
    checker, height = {"shapes": 1.0}, {"shapes_height": 1.0}
    branch = with_trunk(backbone, "branch")
    return {
        "two heads": Arm(config=branch, rewards=checker | {"shapes_height": HEIGHT_SHARE}),
        "one shared head": Arm(config=scalarized(backbone), rewards=checker | height),
        "two heads lighter": Arm(config=branch, rewards=checker | {"shapes_height": HEIGHT_SHARE / 2}),
        "two heads alike": Arm(config=branch, rewards=checker | height),
        "checker alone": Arm(config=branch, rewards=checker),
        "height alone": Arm(config=branch, rewards=height),
    }


def hacking(backbone: BackboneName) -> dict[str, Arm]:
    both = {"shapes": 1.0, "jpeg_compressibility": 1.0}
    branch = with_trunk(backbone, "branch")
    return {
        "checker and JPEG": Arm(config=branch, rewards=both),
        "JPEG alone": Arm(config=branch, rewards={"jpeg_compressibility": 1.0}),
        "checker constrained": Arm(config=constrained(backbone, "shapes", CHECKER_FLOOR), rewards=both),
        "checker first": Arm(
            config=conditional(backbone, "jpeg_compressibility", "shapes", CHECKER_PASSED), rewards=both
        ),
    }


def budget(backbone: BackboneName) -> dict[str, Arm]:
    checker, budget = {"shapes": 1.0}, {"jpeg_budget": 1.0}
    branch = with_trunk(backbone, "branch")
    return {
        "checker and budget": Arm(config=branch, rewards=checker | budget),
        "checker alone": Arm(config=branch, rewards=checker),
        "budget alone": Arm(config=branch, rewards=budget),
        "checker first": Arm(
            config=conditional(backbone, "jpeg_budget", "shapes", CHECKER_PASSED), rewards=checker | budget
        ),
    }


def staleness(backbone: BackboneName) -> dict[str, Arm]:
    config = latent_critic(backbone)
    return {
        "no staleness": _unpretrained(config),
        "one update behind": _unpretrained(replace(config, staleness=1)),
        "two updates behind": _unpretrained(replace(config, staleness=2)),
    }
