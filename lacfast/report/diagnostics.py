"""What tends to go wrong in a run, told from its metrics: signature, evidence, remedy.

Reward hacking in RL of diffusion models: DDPO (arXiv 2305.13301), Flow-GRPO (arXiv 2505.05470).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from lacfast.report.records import Record, Records, average, named, phase, recent

EXACT_RATIO = 1e-7
"""Largest |log ratio| of a first minibatch that is rounding; in nats per element."""
SMALL_VARIANCE = 0.02
"""Explained variance above the floor that counts as nothing."""
MANY_CLIPPED = 0.5
"""Share of clipped pairs from which on most of the gradient is thrown away."""
OPPOSED = -0.3
"""Correlation of two rewards' advantages below which they fight."""
UNEQUAL = 10.0
"""Ratio of two rewards' advantage deviations from which on the smaller one does not count."""
COLLAPSED = 0.5
"""Share of the first diversity below which a policy has collapsed."""
USELESS_GROUPS = 0.5
"""Share of groups without any spread from which on most images teach nothing."""
OVERCONFIDENT = 0.5
"""Slope of returns over values below which a critic's differences are mostly invented."""
SIGNIFICANT = 2.8
"""Standard errors, 2 sqrt(2): two of the difference between two evaluations."""


@dataclass(frozen=True)
class Finding:
    """A failure signature that a run shows."""

    title: str
    evidence: str
    """The numbers."""
    remedy: str
    iteration: int
    """Where it was seen."""


def findings(records: Records) -> list[Finding]:
    """The failure signatures in the lines of a metrics.jsonl."""
    train, evaluations = phase(records, "train"), phase(records, "evaluate")
    found: list[Finding] = []
    for check in _TRAIN_CHECKS:
        if train:
            found += check(train)
    for judge in _EVALUATION_CHECKS:
        if len(evaluations) > 1:
            found += judge(evaluations, train)
    return found


def _ratio_is_one(train: Records) -> Iterator[Finding]:
    worst = max(train, key=lambda record: record.get("first_max_abs_log_ratio", 0.0))
    value = worst.get("first_max_abs_log_ratio", 0.0)
    if value > EXACT_RATIO:
        yield Finding(
            "The first ratio is not 1",
            f"|log ratio| reaches {value:.2g} before any update: rollout and update do not compute the same "
            "policy",
            "Use one dtype, attention backend and compile setting for both, without dropout and feature "
            "caches. FP8 rollouts have such a mismatch by design",
            int(worst["iteration"]),
        )


def _steps_are_taken(train: Records) -> Iterator[Finding]:
    for what in ("policy", "critic"):
        left_out = [record for record in train if f"bad_gradients/{what}" in record]
        if left_out:
            count = sum(record[f"bad_gradients/{what}"] for record in left_out)
            yield Finding(
                f"Steps of the {what} were left out",
                f"{count} optimizer steps in {len(left_out)} iterations had a gradient that is not finite",
                "Use bfloat16 or float32 where it is half precision, lower the learning rate or the guidance "
                "scale, and look at the rewards' extremes",
                int(left_out[-1]["iteration"]),
            )


def _critic_explains(train: Records) -> Iterator[Finding]:
    last = recent(train)
    variance = average(last, "explained_variance")
    floor = average(last, "explained_variance_floor")
    floor = 0.0 if math.isnan(floor) else floor
    if variance < floor + SMALL_VARIANCE:
        yield Finding(
            "The critic is at its floor",
            f"it explains {variance:.2f} of the rewards' variance over {_last(last)}; the "
            f"prompt alone explains {floor:.2f}",
            "Pretrain its values longer, give its branch more blocks, or lower its learning rate if it was "
            "better before. Until it explains more, a group-relative estimator costs less",
            int(last[-1]["iteration"]),
        )


def _clip_works(train: Records) -> Iterator[Finding]:
    last = recent(train)
    clipped = average(last, "clip_fraction_high") + average(last, "clip_fraction_low")
    if clipped == 0 and len(train) > 3:
        yield Finding(
            "The clip is inert",
            f"no pair was clipped in {_last(last)}",
            "If the reward rises too slowly, raise policy_learning_rate; if it should be held back, lower "
            "the clip",
            int(last[-1]["iteration"]),
        )
    if clipped > MANY_CLIPPED:
        yield Finding(
            "Most pairs are clipped",
            f"{clipped:.0%} of the pairs had no gradient in {_last(last)}",
            "Lower policy_learning_rate or num_inner_epochs, or widen the clip",
            int(last[-1]["iteration"]),
        )


def _rewards_agree(train: Records) -> Iterator[Finding]:
    last = recent(train)
    names = named(last[-1], "reward")
    matrix = last[-1].get("advantage_correlation")
    if isinstance(matrix, list):
        for row in range(len(matrix)):
            for column in range(row):
                if matrix[row][column] is not None and matrix[row][column] < OPPOSED:
                    pair = f"{names[column]} and {names[row]}" if len(names) == len(matrix) else "two rewards"
                    yield Finding(
                        "Two rewards fight",
                        f"the advantages of {pair} correlate by {matrix[row][column]:.2f}",
                        "Weigh them, give the more important one a floor (combination='constrained'), or let "
                        "the other count only where it passes (combination='conditional')",
                        int(last[-1]["iteration"]),
                    )
    spreads = {name: average(last, f"advantage_std/{name}") for name in names}
    spreads = {name: spread for name, spread in spreads.items() if math.isfinite(spread) and spread > 0}
    if len(spreads) > 1 and max(spreads.values()) > UNEQUAL * min(spreads.values()):
        largest, smallest = max(spreads, key=spreads.__getitem__), min(spreads, key=spreads.__getitem__)
        yield Finding(
            "One reward dominates",
            f"advantages of {largest} deviate by {spreads[largest]:.2g}, those of {smallest} by "
            f"{spreads[smallest]:.2g}",
            "Use combination='sum_normalized', which divides each by its own deviation, or weigh them",
            int(last[-1]["iteration"]),
        )


def _groups_differ(train: Records) -> Iterator[Finding]:
    last = recent(train)
    share = average(last, "zero_std_groups") / average(last, "groups")
    if share > USELESS_GROUPS:
        yield Finding(
            "Most groups teach nothing",
            f"in {share:.0%} of the groups all images have one reward",
            "Use a graded reward, larger groups, prompts of medium difficulty, or a critic",
            int(last[-1]["iteration"]),
        )


def _no_hacking(evaluations: Records, train: Records) -> Iterator[Finding]:
    """A score that nothing trains on falls from its best while a reward that trains is at its best."""
    last = evaluations[-1]
    trained = named(train[-1], "reward") if train else []
    scored = named(last, "standard_error")
    at_best = [name for name in scored if name in trained and _fall(evaluations, name) <= _margin(last, name)]
    for gold in scored:
        if gold in trained or not at_best or _fall(evaluations, gold) <= _margin(last, gold):
            continue
        best = max(evaluations, key=lambda record: float(record.get(gold, -math.inf)))
        yield Finding(
            "The reward is being hacked",
            f"{gold} has fallen by {_fall(evaluations, gold):.3g} from its best at iteration "
            f"{best['iteration']}, while {' and '.join(at_best)}, which trains, is at its best",
            f"Go back to the checkpoint of iteration {best['iteration']}; let early_stopping.score or --best "
            f"watch {gold}, train a second reward beside {' and '.join(at_best)}, or set PPOConfig.kl",
            int(last["iteration"]),
        )


def _fall(evaluations: Records, name: str) -> float:
    """How far a score lies below its best."""
    return max(float(record.get(name, -math.inf)) for record in evaluations) - float(evaluations[-1][name])


def _stays_diverse(evaluations: Records, train: Records) -> Iterator[Finding]:
    first, last = evaluations[0].get("diversity"), evaluations[-1].get("diversity")
    if first and last is not None and last < COLLAPSED * first:
        yield Finding(
            "The policy collapses",
            f"two images of one prompt differ by {last:.3g}, {first:.3g} at the start",
            "Set PPOConfig.kl, lower policy_learning_rate, or stop earlier",
            int(evaluations[-1]["iteration"]),
        )


def _values_are_calibrated(evaluations: Records, train: Records) -> Iterator[Finding]:
    last = evaluations[-1]
    for name in named(last, "calibration"):
        slope, error = calibration_slope(last[f"calibration/{name}"])
        if slope + 2 * error < OVERCONFIDENT:
            yield Finding(
                "The critic is overconfident",
                f"where its values for {name} differ by 1, the returns of "
                f"evaluation prompts differ by {slope:.2f} ± {error:.2f}",
                "It has learned its own prompts and images: lower value_learning_rate and, of a trunk with "
                "weights of its own, trunk_learning_rate; pretrain on more rollouts with fewer passes, or "
                "make its head smaller",
                int(last["iteration"]),
            )


def calibration_slope(bins: Sequence[Sequence[float | None]]) -> tuple[float, float]:
    """Least squares of returns over values from (3, K) bins, and its standard error; NaN without a spread.

    slope = sum_j d_j return_j / sum_j d_j^2;   error = sqrt(sum_j d_j^2 error_j^2) / sum_j d_j^2
    d_j = value_j - mean value
    """
    values, returns, errors = ([math.nan if number is None else number for number in row] for row in bins)
    centre = fmean(values)
    distances = [value - centre for value in values]
    spread = sum(distance**2 for distance in distances)
    if not spread > 0:
        return math.nan, math.nan
    slope = sum(distance * found for distance, found in zip(distances, returns, strict=True)) / spread
    squares = sum((distance * error) ** 2 for distance, error in zip(distances, errors, strict=True))
    return slope, math.sqrt(squares) / spread


def _last(records: Records) -> str:
    return "the last iteration" if len(records) == 1 else f"the last {len(records)} iterations"


def _margin(record: Record, name: str) -> float:
    return SIGNIFICANT * float(record.get(f"standard_error/{name}", 0.0))


_TRAIN_CHECKS: tuple[Callable[[Records], Iterator[Finding]], ...] = (
    _ratio_is_one,
    _steps_are_taken,
    _critic_explains,
    _clip_works,
    _rewards_agree,
    _groups_differ,
)
_EVALUATION_CHECKS: tuple[Callable[[Records, Records], Iterator[Finding]], ...] = (
    _no_hacking,
    _stays_diverse,
    _values_are_calibrated,
)
