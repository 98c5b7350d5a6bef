"""Every field of every config declares what it may be, and refuses everything else by its name."""

from __future__ import annotations

import math
import pickle
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
from every_config import CONFIGS, REQUIRED
from refusals import Refusal

from lacfast.config import (
    Fixed,
    Hold,
    KLMask,
    KLPenalty,
    LoRAConfig,
    Nats,
    PPOConfig,
    Random,
    Ratio,
    SamplerConfig,
    Sliding,
)
from lacfast.config.checks import Config, Range, field_types, unknown
from lacfast.config.choice import Choice
from lacfast.runs.config import EvaluationRun, RunConfig, SteeringRun

WRONG = (-1, 0, 0.5, math.nan, math.inf, -math.inf, "x", None, True, [1], 2**80)


MADE: dict[type[Config], Any] = {
    Ratio: Ratio(1e-4), Nats: Nats(1.0), KLMask: KLMask(1e-5), KLPenalty: KLPenalty(0.1),
    Hold: Hold(0.1),
    Fixed: Fixed((0, 2)), Random: Random(2), Sliding: Sliding(2, 25),
    RunConfig: RunConfig(**REQUIRED[RunConfig]), EvaluationRun: EvaluationRun(**REQUIRED[EvaluationRun]),
}  # fmt: skip


def made(kind: type[Config]) -> Any:
    if kind in MADE:
        return MADE[kind]
    paths = {field.name: Path("x") for field in fields(kind) if field.name == "out"}  # type: ignore[arg-type]
    words = {"source": "x", "prompts": ("x",)} if kind is SteeringRun else {}
    return kind(**paths, **words)


def numbers_of(annotation: Any, ranges: tuple[Any, ...] = ()) -> list[tuple[type, tuple[Any, ...]]]:
    """Every number in a type, with what is annotated to it."""
    if get_origin(annotation) is Annotated:
        inner, *rules = get_args(annotation)
        return numbers_of(inner, tuple(rules))
    if annotation in (int, float):
        return [(annotation, ranges)]
    return [number for member in get_args(annotation) for number in numbers_of(member)]


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_every_number_of_every_config_declares_its_range(kind: type[Config]) -> None:
    assert issubclass(kind, Config)
    for name, annotation in field_types(kind).items():
        for _, rules in numbers_of(annotation):
            assert any(isinstance(rule, Range) for rule in rules), f"{kind.__name__}.{name} has no range"


def allowed(value: Any, annotation: Any) -> bool:
    """Whether the declaration of a field takes the value, read a second time and plainly."""
    if get_origin(annotation) is Annotated:
        inner, *rules = get_args(annotation)
        return allowed(value, inner) and all(
            value in (rule if isinstance(rule, Range) else tuple(getattr(rule, "names", (value,))))
            for rule in rules
        )
    if annotation is float:
        return type(value) in (int, float)
    if annotation is int:
        return type(value) is int
    if annotation in (str, bool, type(None)):
        return type(value) is annotation
    origin = get_origin(annotation)
    if origin is tuple:
        return False
    if str(origin) == "typing.Literal":
        return value in get_args(annotation)
    return any(allowed(value, member) for member in get_args(annotation)) and origin is not dict


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_a_value_that_a_field_does_not_declare_is_refused_with_its_name(kind: type[Config]) -> None:
    settings = made(kind)
    for name, annotation in field_types(kind).items():
        for value in WRONG:
            if allowed(value, annotation):
                continue
            with pytest.raises(ValueError, match=name) as caught:
                replace(settings, **{name: value})
            assert repr(value) in str(caught.value) or str(value) in str(caught.value)


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_a_bad_entry_of_a_pair_is_refused_with_its_place(kind: type[Config]) -> None:
    settings = made(kind)
    for name, annotation in field_types(kind).items():
        pairs = [member for member in (annotation, *get_args(annotation)) if get_origin(member) is tuple]
        for pair in pairs:
            if Ellipsis in get_args(pair) or len(numbers_of(pair)) != 2:
                continue
            for value in (-1, math.nan, math.inf, "x"):
                with pytest.raises(ValueError, match=name):
                    replace(settings, **{name: (0.5, value)})


def test_no_float_declares_infinity_but_to_turn_something_off() -> None:
    off = {
        f"{kind.__name__}.{name}": rule.off
        for kind in CONFIGS
        for name, annotation in field_types(kind).items()
        for _, rules in numbers_of(annotation)
        for rule in rules
        if isinstance(rule, Range) and rule.off is not None
    }
    assert all(math.isinf(value) for value in off.values())
    assert {"PPOConfig.max_grad_norm", "PPOConfig.target_clip", "CriticConfig.value_clip"} <= off.keys()


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        (
            {"max_grad_norm": -1.0},
            Refusal("max_grad_norm=-1.0", cause="A bound below 0.", remedy="must be > 0 (inf: off)"),
        ),
        (
            {"advantage_clip": math.nan},
            Refusal("advantage_clip=nan", cause="A number that is none.", remedy="must be > 0 (inf: off)"),
        ),
        (
            {"betas": (0.9, 2)},
            Refusal("betas[1]=2", cause="One of a pair is out of its range.", remedy="must lie in [0, 1)"),
        ),
        (
            {"num_minibatches": 2.5},
            Refusal("num_minibatches=2.5", cause="Half an optimizer step.", remedy="must be a whole number"),
        ),
        (
            {"policy_learning_rate": "1e-4"},
            Refusal("policy_learning_rate='1e-4'", cause="Text for a number.", remedy="must be a number"),
        ),
        (
            {"ratio": "inovation"},
            Refusal(
                "unknown ratio 'inovation'", cause="A misspelled word.", remedy="did you mean 'innovation'?"
            ),
        ),
    ],
)
def test_the_error_says_what_is_allowed(changes: dict[str, Any], refusal: Refusal) -> None:
    with refusal.raised():
        PPOConfig(**changes)


def test_a_whole_number_is_a_float_and_a_truth_value_is_no_number() -> None:
    assert PPOConfig(weight_decay=0).weight_decay == 0
    with Refusal("seed=True", cause="True for a number.", remedy="must be a whole number").raised():
        LoRAConfig(seed=True)


@pytest.mark.parametrize(("kind", "level"), [("flow_ddim", 1.5), ("cps", 2.0), ("ddim", 1.01), ("ode", 0.7)])
def test_a_noise_level_that_the_kind_cannot_make_is_refused(kind: str, level: float) -> None:
    with pytest.raises(ValueError, match=rf"noise_level={level} of kind='{kind}' must"):
        SamplerConfig(kind=kind, noise_level=level)


def test_a_sampler_kind_is_known_before_any_model_is() -> None:
    with Refusal("unknown sampler kind 'heun'", cause="A kind that nobody wrote.", remedy="known: ").raised():
        SamplerConfig(kind="heun")


@pytest.mark.parametrize(
    ("kind", "options", "refusal"),
    [
        (
            PPOConfig,
            {"clip_range": 1e-4},
            Refusal(
                "PPOConfig has no option 'clip_range'",
                cause="An option that an earlier version had.",
                remedy="write PPOConfig(clip=Ratio(clip_range=0.0001))",
                error=TypeError,
            ),
        ),
        (
            PPOConfig,
            {"kl_weight": 0.04},
            Refusal(
                "PPOConfig has no option 'kl_weight'",
                cause="A weight that is a part of a choice today.",
                remedy="write PPOConfig(kl=KLPenalty(weight=0.04, kind='exact'))",
                error=TypeError,
            ),
        ),
        (
            SamplerConfig,
            {"nose_level": 0.7},
            Refusal(
                "SamplerConfig has no option 'nose_level'",
                cause="A misspelled option.",
                remedy="did you mean 'noise_level'?",
                error=TypeError,
            ),
        ),
        (
            LoRAConfig,
            {"dropout": 0.1},
            Refusal(
                "LoRAConfig has no option 'dropout'",
                cause="An option that never was.",
                remedy="known: rank, alpha, target_modules, seed",
                error=TypeError,
            ),
        ),
    ],
)
def test_an_option_that_a_config_does_not_have_is_told_its_name_of_today(
    kind: type[Config], options: dict[str, Any], refusal: Refusal
) -> None:
    with refusal.raised():
        kind(**options)


def test_a_config_survives_pickle_and_replace() -> None:
    settings = PPOConfig(clip=Nats(5.0))
    assert pickle.loads(pickle.dumps(settings)) == replace(settings, num_minibatches=4) == settings


def test_a_name_far_from_all_gets_no_guess() -> None:
    assert "did you mean" not in str(unknown("kind", "zzz", ["flow_sde", "cps"]))
    assert str(unknown("kind", "flow_sd", ["flow_sde"], "Read the docs")).endswith(
        "did you mean 'flow_sde'? Known: flow_sde. Read the docs"
    )


def test_choices_are_checked_like_every_config() -> None:
    assert issubclass(Choice, Config)
    with Refusal("steps=5", cause="A fixed window of one number.", remedy="must be a tuple").raised():
        Fixed(5)  # type: ignore[arg-type]
