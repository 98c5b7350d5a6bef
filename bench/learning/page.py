"""docs/results.md from what has been run: wins and losses alike, and what is still missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from bench.learning import (
    climb_section,
    critics_section,
    figures,
    gradients_section,
    old_outputs,
    steering_section,
    tables,
    units,
)
from bench.learning.analysis import images, seconds
from bench.learning.claims import CLAIMS, Claim
from bench.learning.figures import Curves
from bench.learning.runs import Budget
from bench.learning.scales import SCALES, Scale
from bench.learning.tuning import Tuning
from lacfast.tasks.models import BackboneName

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "results.md"
RIVALS = {"latent critic": ("GRPO", "DDPO"), "critic-weighted NFT": ("GRPO", "DDPO", "AWM", "DiffusionNFT")}
"""Forms of the critic, and the published methods that a conclusion counts against each."""
BEST = """The arms of sections objectives and matching, which tune rollout and rate in short runs. Where an
arm of section baselines, tuned over the rate alone in longer runs, learned more by what is reported, it
stands here instead, which favours the rivals. On the UNet PPO's arms have no other runs: their rate stays and
their rollouts are not tuned, which may favour the others, whose rate falls to 0. So it is in sections
proxy-nft and glyphs-proxy-nft, where the reward is learnt and the losses on the forward process are not
tuned: PPO's arms are those of sections proxy and glyphs-proxy, tuned over the rate. In section glyphs-nft
nothing is tuned; on the UNet PPO's arms have the rollout and the rate of section proxy. Sections were run on
several machines, so seconds are shown of a section's own runs alone."""
OVERVIEW = ("objectives", "glyphs-nft", "proxy-nft", "glyphs-proxy-nft")
"""Claims that the page opens with: all methods, each with its best rollout and rate."""
OTHERS = ("latent critic", "GRPO", "DDPO", "AWM")
"""What the losses on the forward process are compared with where another claim has it."""
HEAD = """# What learning shows

To see which method learns more, per image and per second, and where this one loses.

Written by `python -m bench.learning`, `bench.learning.steering`, `.critics`, `.gradient_noise` and
`.gradient_climb`; every study is a file.
Pictures have {size}x{size} pixels, those of crowds half as many again on a side. All arms run in the same
trainer and start from the same base model. Where
a section says that the learning rate was tuned, every arm had the same grid and number of tuning runs, on
prompts that are neither trained on nor reported. Arms are judged on held-out prompts, with noise that the
arms of a seed share ({samples:,} images, standard error of one judgement near {error:.3f}). Intervals are 95
% bootstrap intervals of the mean difference of paired seeds; "ahead" and "behind" mean that they exclude 0,
which with three seeds says little more than that all three differences have one sign. Images count those of
value pretraining. Seconds are without judging, CPU seconds of one thread where no GPU worked; a reward's cost
is added per image.
"""


ADVICE = """## What to take

- **A loss on the forward process**: it needs no SDE and no ratio, and is far ahead of PPO's arms on scenes,
  and with the UNet on words; with the DiT those are nearly learnt out, and DDPO ends as high as DiffusionNFT.
  That one on GRPO's groups is the simplest and takes the least time. AWM, tuned alike, gains less by gold on
  the DiT; on the UNet short runs chose it a rate that a long one does not bear (section matching; there two
  pairs).
- **Weighted by the critic**, the recipes `shapes`, `shapes-unet` and `sd35m-pickscore`
  (`TrainConfig.objective=NFT()`, estimator `critic`), where the reward is learnt, as most are. With the
  similarity of a dual encoder for the reward, judged by a checker that nothing trains on, it ends ahead of
  DiffusionNFT and of PPO's arms on the DiT on both tasks, scenes and words, and has what DiffusionNFT ends
  with after 1.7 and 1.8 times fewer images (sections proxy-nft and glyphs-proxy-nft). On the UNet it ends
  ahead of PPO's arms on scenes and is ahead of DiffusionNFT over the run, not at the end. It takes 1.6 to 1.7
  times the seconds per image: the critic learns at every state of a rollout, of which the policy trains half,
  and on a small model its own passes are dear. In equal time it is ahead on the DiT where an image's reward
  takes 50 ms, on words undecided; with a free reward it is level at the end, and on scenes behind over the
  run. Its words keep to their places: on the DiT they are less diverse than DiffusionNFT's.
  Each noised state has an advantage of its own, R - V(x, t, prompt), and an image of each prompt is enough.
  Without the critic that is not so: against the rollout's mean the same loss falls back to the base model,
  against the prompt's own history the learnt reward ends far below the base model's, and with the checker's
  it gains more by the checker and half as much by gold (section levels).
- **A critic that knows the reward** when training begins is not shown to be worth more, on the UNet. With 250
  rollouts of value pretraining, as many images as the run has, it explains 0.34 to 0.44 of the learnt reward
  beforehand, where one without them explains 0.14 to 0.30 at a run's end, and the runs end level, by the
  checker 0.008 apart. Three seeds had it ahead, five do not. A critic that takes short steps on the states of
  64 rollouts, the recipe `shapes-unet`'s, explains 0.31 to 0.43 at the end and costs no image: the same. Both
  end ahead of DiffusionNFT by the learnt reward, the gold encoder and diversity, by the checker 0.021 and
  0.025 higher, undecided (sections taught and slow, five seeds). A critic that explains more did not make
  these runs learn more.
- **A reward that reads**, for words on the UNet. By similarity no method learns them: in 4,000 images it
  rises by 0.09 with both losses on the forward process, the share of words that can be read by 0.04, and the
  critic explains nothing (section glyphs-proxy-nft, unet). The reader's own reward teaches the same base
  model to write half of the words in as many images, and the critic-weighted loss ends ahead of DiffusionNFT,
  GRPO and DDPO by that reader and by the second one, is ahead over the run, and in equal time where the
  reward takes 50 ms. With a free one, in the time of PPO's arms, it is level with those and behind
  DiffusionNFT. Its pictures are a little less diverse (section glyphs-nft, unet; five seeds). On the DiT
  there is nothing to win: its base model writes two thirds, all methods write 98 to 99 % after 8,000 images,
  PPO's arms at half the diversity, and the critic's passes only take time (sections glyphs-nft and glyphs,
  dit).
- **Nothing yet**, for crowds of five to eight objects: in 4,000 images neither loss raises the share of
  pictures that obey by more than 0.03 on either backbone, from 0.11 and 0.15, and the critic's values end
  farther from the rewards than their mean is. On the DiT it ends 0.009 ahead of DiffusionNFT for all that, on
  the UNet level, and behind by the second checker (section crowds, three seeds). More images were not tried.
- **A head per reward**, where several train (section joint). With the learnt reward and the checker's, two
  heads end ahead of one head on the sum and of the checker alone by the second checker, which neither trains
  on, level with the learnt reward alone, and ahead of groups on both over the run. The checker that trains
  gains 0.13 over the learnt reward alone, which gives a tenth of what it gains for that. PPO's two heads, on
  a checker and a height that a scene does not ask for, do not show it (section multi-reward).
- **Weighted by groups**, where the reward is a rule on scenes: of the checker's reward the critic explains
  0.15 after 8,000 images, 0.3 of the learnt one. On the DiT it ends 0.035 behind groups, level by the second
  checker (section objectives, five seeds); with a replay it is level by the first one too, and without the
  noisiest step besides ahead of DiffusionNFT over the run by 0.010 (sections levels and combined, three
  seeds). On the UNet it ends 0.014 higher, undecided, and ahead by the second checker, in equal time too, for
  its rollouts of 32 images take no more time per image than the groups' of 16 (section objectives, unet). A
  baseline of the state changes this loss's expected gradient: after value pretraining the critic
  takes out a third of the noise and as much of the signal, which are equal at 300 to 440 trajectories under
  every baseline. PPO's take 18,500 with the critic and 25,000 against the rollout's mean (section gradients;
  the base model, one seed).
- **Steering** is worth what the critic knows. The demo's, after 16 rollouts of value pretraining, adds 10, 15
  and 8 points on its three seeds, at three times the compute ([demo](demo/README.md)). Without pretraining
  it adds 3 at the end of a run on the checker, as three times the steps do, which gain more by gold (section
  inference, one seed). To learn from the one of four trajectories that the critic prefers ends 0.033 behind
  learning from every one that is made (section chosen, three seeds).
- **PPO with the critic**, the recipes `shapes-ppo` and `shapes-unet-ppo`, where the likelihood ratio itself
  is needed: a bound on the sampler's own transitions, weights in shards, ranks that sample apart. The losses
  on the forward process refuse those.
- **Small rollouts** with these losses, as long as images and calls of the reward are what counts. They take
  more time per image, and PPO does not bear them.

All of it is measured on tiny models, on two tasks with a rule and a learnt reward each, training all weights.
[Objectives](objectives.md) tells how to switch, and [performance](performance.md) what a critic costs on
published models."""


def write(results: Path, page: Path = PAGE, scale: Scale = SCALES["cpu"]) -> None:
    """Write the page, and its figures in a folder of its name, from the folder of runs."""
    pictures, claims = page.with_suffix(""), {name: scale.claim(claim) for name, claim in CLAIMS.items()}
    sections = [
        section
        for name, claim in claims.items()
        for backbone in claim.budgets
        if (section := _section(results, name, claim, backbone, pictures))
    ]
    sections += steering_section.sections(results, pictures)
    sections += critics_section.sections(results, pictures)
    sections += gradients_section.sections(results)
    sections += climb_section.sections(results)
    summary = list(tables.summary(results, claims))
    opening = list(_overview(results, claims, pictures))
    short = ["\n".join(opening)] if opening else []
    if opening and scale == SCALES["cpu"]:
        short.append(ADVICE)
    if summary:
        short.append("\n\n".join(["## In short", *_conclusions(results, claims), "\n".join(summary)]))
    missing = list(_missing(results, claims))
    rest = ["## Not run to the end\n\n" + "\n".join(missing)] if missing else []
    samples = round(scale.samples * Budget.samples)
    head = HEAD.format(samples=samples, error=0.5 / samples**0.5, size=scale.model.image_size)
    page.parent.mkdir(parents=True, exist_ok=True)
    noted = [line for line in [old_outputs.told(results)] if line]
    page.write_text("\n\n".join([head.strip(), *noted, *short, *sections, *rest]) + "\n", encoding="utf-8")


def _conclusions(results: Path, claims: Mapping[str, Claim]) -> Iterator[str]:
    """How often each form of the critic is ahead of the published methods, undecided and behind."""
    studies = tables.comparable(results, claims)
    found = [lead for _, claim, curves in studies for lead in tables.leads(curves, claim)]
    for form, rivals in RIVALS.items():
        leads = [lead for lead in found if lead[1] in {f"{form} minus {rival}" for rival in rivals}]
        if leads:
            at_end, over_run, equal_time = (counted([lead[column] for lead in leads]) for column in (2, 3, 4))
            yield (
                f"Against {', '.join(rivals[:-1])} and {rivals[-1]} the {form} ends {at_end} comparisons at "
                f"equal images; over the run it is {over_run} at equal images, and in equal time with a free "
                f"reward {equal_time}."
            )


def _overview(results: Path, claims: Mapping[str, Claim], pictures: Path) -> Iterator[str]:
    """Lines on the claims that all published methods are in: one figure, without controls, and how soon each
    is overtaken."""
    found, methods = {}, [*claims[OVERVIEW[0]].arms("dit"), "AWM"]
    for name in OVERVIEW:
        for backbone in claims[name].budgets:
            if curves := tables.at_best(results, claims, name, backbone, OTHERS):
                shown = {arm: curves[arm] for arm in methods if arm in curves}
                own = tables.paired_curves(results, name, claims[name], backbone)
                timed = {arm: shown[arm] for arm in shown if own.get(arm) == shown[arm]}
                found[f"{name}, {backbone}"] = claims[name].metrics[0], shown, timed
    if not found:
        return
    picture = pictures / "overview.png"
    figures.overview(found, picture)
    yield from (
        "## All methods, each at its best",
        "",
        BEST,
        "",
        f"![curves]({pictures.name}/{picture.name})",
    )
    for title, (metric, curves, _) in found.items():
        yield from ("", f"{title}, {metric} at equal images:", "", *tables.speed(curves, metric))


def counted(cells: Sequence[str]) -> str:
    """How many of the differences are of which kind; those of too few seeds and empty ones do not count."""
    kinds = ("ahead", "undecided", "behind")
    count = Counter(cell.rpartition(" ")[2] for cell in cells)
    return (
        f"{', '.join(f'{kind} in {count[kind]}' for kind in kinds)} of {sum(count[kind] for kind in kinds)}"
    )


def _missing(results: Path, claims: Mapping[str, Claim]) -> Iterator[str]:
    for name, claim in claims.items():
        for backbone in claim.budgets:
            wanted = claim.seeds * len(claim.arms(backbone).keys() - claim.runs_of.keys())
            found = _count(results / name / backbone)
            if found < wanted:
                yield f"- {name}, {backbone}: {found} of {wanted} runs"
    for study in ("steering", "critics"):
        if not any(map(_count, units.studies(results / study))):
            yield f"- {study}: nothing"


def _count(study: Path) -> int:
    """Runs that are reported, those that tune aside."""
    return sum("-seed" in key for key in units.load(study))


def _section(results: Path, name: str, claim: Claim, backbone: BackboneName, pictures: Path) -> str:
    curves = tables.paired_curves(results, name, claim, backbone)
    if not curves:
        return ""
    seeds = len(next(iter(curves.values())))
    picture = pictures / f"{name}-{backbone}.png"
    figures.draw(curves, claim.metrics, picture, not claim.runs_of)
    lines = [
        f"## {name}, {backbone}",
        "",
        f"{claim.question} Problem `{claim.problem}`, paired seeds: {seeds}. "
        + _tuning(results, name, claim, backbone, curves)
        + _not_run(claim.arms(backbone), curves),
        *(["", claim.note] if claim.note else []),
        "",
        f"![curves]({pictures.name}/{picture.name})",
        "",
        *tables.comparison("equal images", images, curves, claim.metrics),
    ]
    for cost in claim.reward_costs:
        title = f"equal time, reward of {1000 * cost:.0f} ms per image"
        lines += ["", *tables.comparison(title, seconds(cost), curves, claim.metrics[:2])]
    if claim.reward_costs:
        lines += ["", tables.time_per_image(curves)]
    if known := tables.explained(curves):
        lines += ["", known]
    if claim.more_compute:
        lines += ["", *tables.more_compute(curves, claim.metrics)]
    return "\n".join(lines)


def _not_run(arms: Iterable[str], curves: Curves) -> str:
    missing = [arm for arm in arms if arm not in curves]
    return f" Not run yet: {', '.join(missing)}." if missing else ""


def _tuning(results: Path, name: str, claim: Claim, backbone: BackboneName, curves: Curves) -> str:
    tuning, arms = claim.tuning, claim.arms(backbone)
    tried = tuning.described(list(arms.values()))
    if not tuning.rounds:
        return f"Policy learning rate fixed at {tried}."
    found = tables.reported(results, name, claim, backbone, curves)
    chosen = ", ".join(f"{_chosen(made[0], tuning)} ({arm})" for arm, made in found.items())
    how = " by successive halving" if len(tuning.rounds) > 1 else ""
    falls = ", from where it falls to 0 over a run" if tuning.falls else ""
    return f"Policy learning rate tuned{how} over {tried}{falls}; chosen: {chosen}."


def _chosen(unit: units.Unit, tuning: Tuning) -> str:
    rate = f"{unit['policy_learning_rate']:g}"
    return f"{rate} at {unit['batch_size']}" if len(tuning.batches) > 1 else rate
