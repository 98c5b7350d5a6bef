"""A choice with its settings is one word, on the command line and in messages."""

from __future__ import annotations

from typing import Any, get_type_hints

import pytest
from refusals import Refusal

from lacfast.cli import main
from lacfast.config import Fixed, KLMask, Nats, PPOConfig, Random, Ratio, SamplerConfig, Sliding
from lacfast.config.choice import parse, usage, variants
from lacfast.runs.endings import USAGE

CLIPS = variants(get_type_hints(PPOConfig)["clip"])
WINDOWS = variants(get_type_hints(SamplerConfig)["window"])


@pytest.mark.parametrize(
    ("word", "choice"),
    [
        ("ratio:0.0001", Ratio(1e-4)),
        ("ratio:1e-05..2e-05", Ratio((1e-5, 2e-5))),
        ("nats:5", Nats(5)),
        ("kl_mask:1e-05", KLMask(1e-5)),
        ("fixed:0..5", Fixed((0, 5))),
        ("random:2,within=1..8", Random(2, within=(1, 8))),
        ("sliding:4,25", Sliding(4, every=25)),
        ("sliding:4,25,stride=2,within=0..8", Sliding(4, every=25, stride=2, within=(0, 8))),
    ],
)
def test_a_word_names_a_choice_and_a_choice_is_its_word(word: str, choice: Any) -> None:
    assert parse(word, CLIPS | WINDOWS) == choice
    assert str(choice) == word


def test_settings_may_be_named() -> None:
    assert parse("sliding:every=25,size=4", WINDOWS) == Sliding(4, every=25)


def test_usage_names_every_choice_and_what_it_needs() -> None:
    assert usage(CLIPS) == "ratio:CLIP_RANGE|nats:CLIP_NATS|kl_mask:KL_THRESHOLD"
    assert usage(WINDOWS) == "fixed:STEPS|random:SIZE|sliding:SIZE,EVERY"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("ration:1", r"unknown choice 'ration'; did you mean 'ratio'\? .* Write ratio:CLIP_RANGE\|nats"),
        ("ratio", "'ratio' does not fit ratio, whose settings are clip_range; write ratio:CLIP_RANGE"),
        ("ratio:1e-4,2e-4", "does not fit ratio"),
        ("ratio:wide", "clip_range='wide' must be a number or a tuple"),
        ("nats:-1", "clip_nats=-1 must be > 0"),
        ("ratio:clip=1", "whose settings are clip_range; write ratio:CLIP_RANGE"),
    ],
)
def test_a_word_that_does_not_fit_says_how_to_write_one(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(word, CLIPS)


def test_a_window_of_one_number_is_refused() -> None:
    with Refusal(
        "steps=5 must be a tuple",
        cause="A fixed window of one number.",
        remedy="(a whole number, a whole number)",
    ).raised():
        parse("fixed:5", WINDOWS)


def dry_run(*flags: str) -> list[str]:
    return ["train", "shapes-ppo", "--dry-run", *flags]


def test_the_command_line_takes_the_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(dry_run("--train.ppo.clip", "nats:5", "--train.sampler.window", "sliding:4,every=25")) == 0
    printed = "".join(capsys.readouterr().out.split())
    assert '"clip":{"choice":"nats","clip_nats":5}' in printed
    assert '"window":{"choice":"sliding","size":4,"every":25,"stride":1,"within":null}' in printed
    assert '"kl":null' in printed
    assert main(dry_run("--train.sampler.window", "none", "--train.ppo.kl", "penalty:0.1,kind=velocity")) == 0
    printed = "".join(capsys.readouterr().out.split())
    assert '"window":null' in printed
    assert (
        '"kl":{"choice":"penalty","weight":0.1,"kind":"velocity","target":null,"anchor":"start"}' in printed
    )


def test_help_shows_how_to_write_a_choice(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "shapes-ppo", "--help-all"])
    printed = capsys.readouterr().out
    assert "--train.ppo.clip ratio:CLIP_RANGE|nats:CLIP_NATS|kl_mask" in printed
    assert "(default: ratio:0.001)" in printed
    assert "--train.sampler.window none|fixed:STEPS" in printed


def test_a_word_that_is_wrong_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(dry_run("--train.ppo.clip", "nat:5")) == USAGE
    assert "--train.ppo.clip: unknown choice 'nat'" in capsys.readouterr().err
