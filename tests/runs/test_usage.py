"""What the parser refuses is one line with the remedy, and exit code 2."""

from __future__ import annotations

import pytest
from refusals import Refusal

from lacfast.cli import main
from lacfast.runs.endings import USAGE
from lacfast.runs.usage import refusal

REFUSED = [
    (
        "train shapes --train.seed abc",
        Refusal(
            "--train.seed cannot be 'abc'",
            cause="A word for a number.",
            remedy="write --train.seed INT",
        ),
    ),
    (
        "demo --out x --budget=soon",
        Refusal("--budget cannot be 'soon'", cause="A word for a number.", remedy="write --budget FLOAT"),
    ),
    (
        "train shapes --pipeline.resolution 64",
        Refusal(
            "--pipeline.resolution cannot be '64'",
            cause="One number for a pair.",
            remedy="write --pipeline.resolution {None}|{INT INT}",
        ),
    ),
    (
        "train shapes --rewards shapes ocr",
        Refusal(
            "--rewards cannot be 'shapes ocr'",
            cause="Rewards without their weights.",
            remedy="write --rewards [STR FLOAT [STR FLOAT ...]]",
        ),
    ),
    (
        "train shapes --train.ppo.clip ration:3",
        Refusal(
            "--train.ppo.clip: unknown choice 'ration'; did you mean 'ratio'?",
            cause="A choice that is misspelled.",
            remedy="Write ratio:CLIP_RANGE|nats:CLIP_NATS|kl_mask:KL_THRESHOLD",
        ),
    ),
    (
        "train shapes --train.ppo.clip ratio",
        Refusal(
            "--train.ppo.clip: 'ratio' does not fit ratio, whose settings are clip_range",
            cause="A choice without its setting.",
            remedy="write ratio:CLIP_RANGE",
        ),
    ),
    (
        "demo --out x --backbone dot",
        Refusal(
            "unknown --backbone 'dot'; did you mean 'dit'?",
            cause="A word that an option does not know.",
            remedy="Known: dit, unet",
        ),
    ),
    (
        "train shapes --train.seeed 3",
        Refusal(
            "unknown option --train.seeed of lacfast train shapes",
            cause="An option that is misspelled.",
            remedy="did you mean --train.seed?",
        ),
    ),
    (
        "steer x --out y --prompts a --settings.method smc",
        Refusal(
            "unknown option --settings.method of lacfast steer",
            cause="An option that there is not.",
            remedy="see lacfast steer --help",
        ),
    ),
    (
        "train shapes --dry-run yes",
        Refusal(
            "unknown word yes of lacfast train shapes",
            cause="A value for a switch.",
            remedy="see lacfast train shapes --help-all",
        ),
    ),
    (
        "train shapes --lora.rank 4",
        Refusal(
            "lacfast train shapes has no --lora.rank",
            cause="An option of other recipes.",
            remedy="it is an option of lacfast train",
        ),
    ),
    (
        "train shapez",
        Refusal(
            "unknown recipe 'shapez'; did you mean 'shapes'?",
            cause="A recipe that is misspelled.",
            remedy="A file of your own ends in .yaml",
        ),
    ),
    (
        "trian shapes",
        Refusal(
            "unknown command 'trian'; did you mean 'train'?",
            cause="A command that is misspelled.",
            remedy="Known: demo, train, evaluate, steer, report, watch, compare, info",
        ),
    ),
    (
        "train",
        Refusal(
            "lacfast train needs one of shapes",
            cause="A training without its recipe.",
            remedy="see lacfast train --help",
        ),
    ),
    (
        "evaluate",
        Refusal(
            "lacfast evaluate needs SOURCE, --prompts STR, --rewards [STR [STR ...]]",
            cause="A command without what it must know.",
            remedy="see lacfast evaluate --help",
        ),
    ),
    (
        "train shapes --device",
        Refusal(
            "--device needs a value",
            cause="An option at the end of the line.",
            remedy="see lacfast train shapes --help-all",
        ),
    ),
]


@pytest.mark.parametrize(("command", "refused"), REFUSED, ids=[command for command, _ in REFUSED])
def test_wrong_usage_is_one_line_and_exit_code_2(
    command: str, refused: Refusal, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.split()) == USAGE
    printed = capsys.readouterr().err
    refused.check(printed)
    assert printed.startswith("lacfast: ")
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    "box",
    [
        "╭─ No ────╮\n│ \x1b[1mtwo of  │\n│ a kind\x1b[0m  │\n│ ─────── │\n│ more    │\n╰─────────╯\n",
        " No      \n ------- \n  two of \n  a kind \n  -------\n  more   \n         \n",
    ],
    ids=["lines", "ascii"],
)
def test_a_box_of_another_kind_is_its_first_part_in_one_line(box: str) -> None:
    assert refusal(box, ["info"], "lacfast info") == "two of a kind; see lacfast info --help"
