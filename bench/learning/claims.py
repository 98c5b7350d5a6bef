"""The claims: which arms, on which problem, for which budget, and which of them are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from bench.learning import claim_arms
from bench.learning.arms import (
    AWM_OLD_WEIGHT,
    REPLAYED_MINIBATCHES,
    REPLAYED_ROLLOUTS,
    SLOW_RATE,
    SLOW_ROLLOUTS,
    SMALL_ROLLOUTS,
    TAUGHT_ITERATIONS,
)
from bench.learning.choosing import CANDIDATES
from bench.learning.runs import Arm, Budget
from bench.learning.tuning import FIXED, RATES, Tuning
from lacfast.tasks.models import BackboneName

HALVING = Tuning(rates=(0.5, 1.0, 2.0), batches=(1.0, 0.5, 0.25, 0.125), rounds=(1 / 4, 1 / 2), falls=True)
"""Less noise in the gradient pays as smaller rollouts, so they are tuned too."""
AS_CHOSEN = Tuning(rates=(1.0,), rounds=(), falls=True)
"""Rollout and rate as section objectives chose them."""
CHOSEN_ELSEWHERE = (
    f"Critic-weighted NFT has a replay of {REPLAYED_ROLLOUTS} rollouts. Rollouts of "
    f"{SMALL_ROLLOUTS['dit']} images, {SMALL_ROLLOUTS['unet']} on the UNet, and the rate, which falls to 0 "
    "over a run, are what section objectives chose with the checker's reward, on the UNet the rollout of "
    "DiffusionNFT and the rate of the other; nothing was tuned here."
)
CHECKER_BUDGETS: dict[BackboneName, Budget] = {
    "dit": Budget(images=8_000, seconds=0, judged_every=2_000),
    "unet": Budget(images=4_000, seconds=0, judged_every=1_000),
}
LEARNT_REWARD_BUDGETS: dict[BackboneName, Budget] = {
    "dit": Budget(images=8_000, seconds=0, judged_every=1_000),
    "unet": Budget(images=4_000, seconds=0, judged_every=1_000),
}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One question about the algorithm, answered by paired runs."""

    question: str
    problem: str
    """Key of problems.PROBLEMS."""
    arms: Callable[[BackboneName], dict[str, Arm]]
    """Backbone -> arms by name; the first is what is claimed for."""
    budgets: dict[BackboneName, Budget]
    metrics: tuple[str, ...]
    """Scores that are compared, higher is better; the headline first."""
    reward_costs: tuple[float, ...] = ()
    """Seconds per image at which arms are compared at equal time; none: at equal images alone."""
    tuning: Tuning = RATES
    """How each arm gets its settings."""
    seeds: int = 5
    """Paired runs per arm."""
    runs_of: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Arm -> claim and arm whose runs are this one's: of the same settings, rewards and budget, run once."""
    more_compute: bool = False
    """Whether the ends are compared by what they make of more compute per image, too."""
    note: str = ""
    """What a reader of the results must know besides."""

    def __post_init__(self) -> None:
        if self.runs_of and self.reward_costs:
            raise ValueError("runs of another claim may be another machine's: leave reward_costs empty")


CLAIMS = {
    "baselines": Claim(
        question="Does the latent critic learn more than GRPO and DDPO, per image and per second?",
        problem="shapes",
        arms=claim_arms.baselines,
        budgets={
            "dit": Budget(images=14_000, seconds=150, judged_every=2_000),
            "unet": Budget(images=8_000, seconds=250, judged_every=2_000),
        },
        metrics=("shapes_strict", "shapes_gold", "diversity"),
        reward_costs=(0.0, 0.05, 0.1),
        note="The latent critic had more choices than the others. On the DiT: a small net on the estimate "
        "of the clean latent for a branch, after section controls had shown both on the prompts that "
        "are reported here; no value pretraining, for the larger area on tuning prompts than with 4 "
        "iterations of it, on a branch; the prompt's tokens and a wider head, for what they explain "
        "of the base model's rewards on prompts that train. On the UNet: a head alone on the actor's "
        "features, as good on tuning prompts as a branch, which takes twice the time. Curves behind "
        "the choices on tuning prompts are in bench/results/learning/baselines/BACKBONE.json.",
    ),
    "objectives": Claim(
        question="Every method at its best rollout and rate: which learns most per image and per second?",
        problem="shapes",
        arms=claim_arms.objectives,
        budgets=CHECKER_BUDGETS,
        metrics=("shapes_strict", "shapes_gold", "diversity"),
        reward_costs=(0.0, 0.05),
        tuning=HALVING,
        note="DiffusionNFT has GRPO's groups and advantages, critic-weighted NFT has the critic's "
        "at each noised state and one image per prompt. Both train as many (sample, step) pairs as PPO "
        "and sample as it does, and all arms take as many optimizer steps per rollout. Beyond that they have "
        "its authors' settings for GenEval, but for the KL to the first model, which no arm has. By their "
        "first images halving chose small rollouts for PPO's arms, and they do not last: section baselines "
        "has those arms at their best, on the UNet all of them. Losses on the forward process are tuned "
        "around the rate that it chose there.",
    ),
    "matching": Claim(
        question="Does advantage weighted matching, tuned alike, learn more?",
        problem="shapes",
        arms=claim_arms.matching,
        budgets=CHECKER_BUDGETS,
        metrics=("shapes_strict", "shapes_gold", "diversity"),
        tuning=HALVING,
        runs_of={arm: ("objectives", arm) for arm in ("critic-weighted NFT", "DiffusionNFT")},
        note="The two other arms are those of section objectives. AWM has GRPO's groups and advantages, and "
        "its authors' settings for GenEval, but for the KL to the first model and the distance from the old "
        f"policy, whose weight is {AWM_OLD_WEIGHT} for 1: they take one optimizer step per rollout, at which "
        "that distance is 0.",
    ),
    "levels": Claim(
        question="With DiffusionNFT's loss, is it the baseline, and which noise levels are worth training?",
        problem="shapes",
        arms=claim_arms.levels,
        budgets={"dit": Budget(images=8_000, seconds=0, judged_every=2_000)},
        metrics=("shapes_strict", "shapes_gold", "diversity"),
        tuning=AS_CHOSEN,
        seeds=3,
        runs_of={arm: ("objectives", arm) for arm in ("critic-weighted NFT", "DiffusionNFT")},
        note=f"Rollouts of {SMALL_ROLLOUTS['dit']} images and the rate as section objectives chose them for "
        "both of its arms with this loss, whose runs these are. Batch mean and prompt history are "
        "controls without critic or groups: one image per prompt, each reward against the rollout's mean, or "
        "against the last ones of its prompt, as DDPO has it, for prompts that come again. Replay: "
        f"{REPLAYED_MINIBATCHES} critic steps per pass, on the last {REPLAYED_ROLLOUTS} rollouts. Not the "
        "noisiest: the sampler's first step is not trained, along whose gradient "
        "the reward does not rise (section climb).",
    ),
    "combined": Claim(
        question="With both of what helped in section levels, does the critic learn more than groups?",
        problem="shapes",
        arms=claim_arms.combined,
        budgets={"dit": Budget(images=8_000, seconds=0, judged_every=2_000)},
        metrics=("shapes_strict", "shapes_gold", "diversity"),
        tuning=AS_CHOSEN,
        seeds=3,
        runs_of={
            "groups, not the noisiest": ("levels", "groups, not the noisiest"),
            "DiffusionNFT": ("objectives", "DiffusionNFT"),
        },
        note=f"The critic learns from the last {REPLAYED_ROLLOUTS} rollouts, and no arm but DiffusionNFT "
        "trains the sampler's first step. The other arms are those of sections levels and objectives. Both "
        "switches were seen to help on the prompts that are reported here, one by one.",
    ),
    "inference": Claim(
        question="Does the critic pay where the trained model is sampled, at equal compute per image?",
        problem="shapes",
        arms=claim_arms.inference,
        budgets={"dit": Budget(images=8_000, seconds=0, judged_every=2_000)},
        metrics=("shapes_strict", "shapes_gold", "diversity"),
        tuning=AS_CHOSEN,
        more_compute=True,
        note="The arms are those of section levels. The last policies make an image of every prompt in "
        "several ways, with the noise of the training and by the ODE: in as many steps, in three times as "
        "many, the best of four trajectories by V, of which the worse are given up on the way, and the best "
        "of three by the true reward, which asks it for every image that is delivered.",
    ),
    "controls": Claim(
        question="Is it the critic? Others' values, other trunks, a replay, no critic, a pretrained one.",
        problem="shapes",
        arms=claim_arms.controls,
        budgets={
            "dit": Budget(images=8_000, seconds=0, judged_every=2_000),
            "unet": Budget(images=8_000, seconds=0, judged_every=2_000),
        },
        metrics=("shapes_strict", "shapes_gold"),
        reward_costs=(0.0, 0.05),
        tuning=FIXED,
        seeds=3,
        note="On the DiT the latent critic reads the estimate of the clean latent, on the UNet it is a head "
        "alone; branch, copied trunk, clean estimate, head alone and joint head, whose error trains the "
        "actor's features too, are other trunks. The UNet's rate is the one that section baselines chose "
        f"for its latent critic. Replay: {REPLAYED_MINIBATCHES} critic steps per pass, on the last "
        f"{REPLAYED_ROLLOUTS} rollouts. The taught critic had {TAUGHT_ITERATIONS} rollouts of value "
        "pretraining that are not counted: it tells what a critic would be worth that knows this much "
        "when training begins.",
    ),
    "estimators": Claim(
        question="What do the switches of the methods without a critic change?",
        problem="shapes",
        arms=claim_arms.estimators,
        budgets={"dit": Budget(images=8_000, seconds=0, judged_every=2_000)},
        metrics=("shapes_strict", "shapes_gold", "diversity"),
        tuning=FIXED,
        seeds=3,
        note="GRPO divides by the rollout's deviation as Flow-GRPO does, group std by the group's as "
        "DanceGRPO; KL mask is Flow-DPPO's, ratio norm GRPO-Guard's; batch mean compares with the "
        "rollout.",
    ),
    "glyphs": Claim(
        question="Does it hold on another task, words that a reader must read?",
        problem="glyphs",
        arms=claim_arms.baselines,
        budgets={"dit": Budget(images=8_000, seconds=0, judged_every=2_000)},
        metrics=("glyphs_strict", "glyphs_gold", "diversity"),
        reward_costs=(0.0, 0.05),
        seeds=3,
    ),
    "crowds": Claim(
        question="Does it hold where much is to be right at once?",
        problem="crowds",
        arms=claim_arms.forward_process,
        budgets=dict.fromkeys(("dit", "unet"), Budget(images=4_000, seconds=0, judged_every=1_000)),
        metrics=("crowds_strict", "crowds_gold", "diversity"),
        reward_costs=(0.0, 0.05),
        tuning=AS_CHOSEN,
        seeds=3,
        note=CHOSEN_ELSEWHERE + " Pictures have 48x48 pixels. PPO's arms were not run.",
    ),
    "proxy": Claim(
        question="With a learnt reward that can be fooled, what happens to what it stands for?",
        problem="similarity",
        arms=claim_arms.baselines,
        budgets=LEARNT_REWARD_BUDGETS,
        metrics=("shapes_gold", "similarity_gold", "similarity", "diversity"),
    ),
    "glyphs-proxy": Claim(
        question="And on the second task, where the learnt reward compares words with pictures of them?",
        problem="glyphs-similarity",
        arms=claim_arms.baselines,
        budgets=LEARNT_REWARD_BUDGETS,
        metrics=("glyphs_gold", "similarity_gold", "similarity", "diversity"),
    ),
    "glyphs-nft": Claim(
        question="Do losses on the forward process learn more than PPO on the second task, too?",
        problem="glyphs",
        arms=claim_arms.forward_process_and_ppo,
        budgets=CHECKER_BUDGETS,
        metrics=("glyphs_strict", "glyphs_gold", "diversity"),
        reward_costs=(0.0, 0.05),
        tuning=AS_CHOSEN,
        note=CHOSEN_ELSEWHERE + " On the UNet GRPO and DDPO have the rollout and the rate of section proxy, "
        "which falls here. On the DiT section glyphs has PPO's arms, tuned on this task.",
    ),
    "proxy-nft": Claim(
        question="With the learnt reward, what do losses on the forward process do to what it stands for?",
        problem="similarity",
        arms=claim_arms.forward_process_and_history,
        budgets=LEARNT_REWARD_BUDGETS,
        metrics=("shapes_gold", "similarity_gold", "similarity", "diversity"),
        reward_costs=(0.0, 0.05),
        tuning=AS_CHOSEN,
        note=CHOSEN_ELSEWHERE + " Section proxy has PPO's arms, tuned on this reward. Prompt history is a "
        "control: one image of a prompt too, and no critic.",
    ),
    "glyphs-proxy-nft": Claim(
        question="Is it so on the second task, where a learnt reward compares words with pictures of them?",
        problem="glyphs-similarity",
        arms=claim_arms.forward_process,
        budgets=LEARNT_REWARD_BUDGETS,
        metrics=("glyphs_gold", "similarity_gold", "similarity", "diversity"),
        reward_costs=(0.0, 0.05),
        tuning=AS_CHOSEN,
        note=CHOSEN_ELSEWHERE + " Section glyphs-proxy has PPO's arms, tuned on this reward.",
    ),
    "taught": Claim(
        question="What would a critic be worth that knows the learnt reward when training begins?",
        problem="similarity",
        arms=claim_arms.taught,
        budgets={"unet": LEARNT_REWARD_BUDGETS["unet"]},
        metrics=("shapes_gold", "similarity_gold", "similarity", "diversity"),
        tuning=AS_CHOSEN,
        note=f"A control: the taught critic has had {claim_arms.TAUGHT_ROLLOUTS} rollouts of the base model "
        "for value pretraining, which are not counted. All else is as in section proxy-nft, on a base model "
        "made anew.",
    ),
    "slow": Claim(
        question="Does a critic that takes shorter steps on more rollouts need no teaching?",
        problem="similarity",
        arms=claim_arms.slow,
        budgets={"unet": LEARNT_REWARD_BUDGETS["unet"]},
        metrics=("shapes_gold", "similarity_gold", "similarity", "diversity"),
        tuning=AS_CHOSEN,
        runs_of={arm: ("taught", arm) for arm in ("DiffusionNFT", "critic-weighted NFT")},
        note=f"The slow critic learns at the rate {SLOW_RATE} from the last {SLOW_ROLLOUTS} rollouts, all "
        "else is critic-weighted NFT. The other arms are those of section taught. Rate and rollouts were "
        "chosen by one run each of four pairs on tuning prompts.",
    ),
    "chosen": Claim(
        question="Is more learnt from trajectories that the critic chooses before they are scored?",
        problem="similarity",
        arms=claim_arms.chosen,
        budgets={"dit": Budget(images=4_000, seconds=0, judged_every=1_000)},
        metrics=("shapes_gold", "similarity_gold", "similarity", "diversity"),
        tuning=AS_CHOSEN,
        seeds=3,
        note=f"A control: every prompt of a rollout gets {CANDIDATES} trajectories, of which the one of "
        "highest V is scored and learnt from, or that of highest for one prompt and of lowest for the next. "
        "Images that are not scored are not counted. All else is as in section proxy-nft, for half of its "
        "images.",
    ),
    "joint": Claim(
        question="Does the critic join a learnt reward and a rule so that neither is hacked?",
        problem="both",
        arms=claim_arms.joint,
        budgets={"dit": Budget(images=8_000, seconds=0, judged_every=1_000)},
        metrics=("shapes_gold", "similarity_gold", "shapes_strict", "similarity", "diversity"),
        tuning=AS_CHOSEN,
        runs_of={"similarity alone": ("proxy-nft", "critic-weighted NFT")},
        note="Settings are those of section proxy-nft, whose arm similarity alone is. Two heads: a value and "
        "an advantage for each reward, both in their own deviation, alike in weight. One shared head learns "
        "the plain sum, in which the checker counts more. shapes_gold and similarity_gold train nothing.",
    ),
    "multi-reward": Claim(
        question="Do two heads keep the first reward while a compatible second one rises?",
        problem="layout",
        arms=claim_arms.multi_reward,
        budgets={"dit": Budget(images=8_000, seconds=0, judged_every=2_000)},
        metrics=("shapes_strict", "shapes_gold", "shapes_height", "diversity"),
        tuning=FIXED,
        seeds=3,
        note="The critic is a branch. The shared head learns the plain sum of both rewards, in which the "
        "one with the larger deviation counts more. Two heads normalise each: with the weight "
        f"{claim_arms.HEIGHT_SHARE} for height they weigh both as that sum does, with half of it (lighter) "
        "height counts less, with equal weights (alike) more than twice as much.",
    ),
    "hacking": Claim(
        question="What does a reward that ignores the prompt do to the checker, alone and joined with it?",
        problem="jpeg",
        arms=claim_arms.hacking,
        budgets={"dit": Budget(images=6_000, seconds=0, judged_every=1_000)},
        metrics=("shapes_strict", "shapes_gold", "diversity"),
        tuning=FIXED,
        seeds=3,
        note="The critic is a branch. The smallest file is a flat picture: this second reward fights the "
        "first one. The constrained arm raises the checker's weight while its reward is below "
        f"{claim_arms.CHECKER_FLOOR}; where the checker comes first, JPEG counts only for images that obey "
        "the prompt.",
    ),
    "budget": Claim(
        question="Does the checker survive a budget for the file that a quarter of real pictures keep?",
        problem="budget",
        arms=claim_arms.budget,
        budgets={"dit": Budget(images=6_000, seconds=0, judged_every=1_000)},
        metrics=("shapes_strict", "shapes_gold", "jpeg_budget", "diversity"),
        tuning=FIXED,
        seeds=3,
        note="The critic is a branch. The second reward is minus the kB beyond the budget, so a flat "
        "picture gains nothing more than a plain one of the data; both rewards weigh alike after "
        "normalising each. Where the checker comes first, the budget counts only for images that obey the "
        "prompt.",
    ),
    "staleness": Claim(
        question="What do rollouts of a policy that has not seen the last updates cost?",
        problem="shapes",
        arms=claim_arms.staleness,
        budgets={"dit": Budget(images=4_800, seconds=0, judged_every=2_400)},
        metrics=("shapes_strict", "shapes_gold", "diversity"),
        tuning=FIXED,
        seeds=3,
        note="All arms run in one process, so their seconds say nothing of what rollout ranks save; "
        "trajectories and weights are those of ranks apart.",
    ),
}
