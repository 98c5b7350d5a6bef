"""The command line: help without heavy imports, clean errors, `info` that tells the truth."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from refusals import Refusal

from lacfast.backbones.prompt_files import PromptFiles
from lacfast.cli import Command, main
from lacfast.config.checks import Config, field_types
from lacfast.config.choice import Choice
from lacfast.runs import phases
from lacfast.runs.endings import FAILURE, USAGE
from lacfast.runs.environment import extras
from lacfast.runs.help import PAGES, asked
from lacfast.runs.recipes import recipe_names
from lacfast.runs.warned import plain_warnings
from lacfast.tasks.pretraining import pretrain

HEAVY = ("torch", "diffusers", "matplotlib", "scipy", "numpy")


def lacfast(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "lacfast", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("--help", "Pretrain a tiny diffusion model"),
        ("train shapes --train.seeed 3", "did you mean --train.seed?"),
        ("train shapes --train.batch-size 0", "must be >= 1"),
    ],
)
def test_help_and_a_refusal_import_nothing_heavy(command: str, told: str) -> None:
    script = (
        "import sys, lacfast.cli\n"
        f"try:\n    lacfast.cli.main({command.split()})\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert told in result.stdout + result.stderr


def test_demo_help_explains_every_flag() -> None:
    result = lacfast("demo", "--help")
    assert result.returncode == 0
    for flag in ("--out", "--budget", "--seed", "--backbone", "--processes", "--quick"):
        assert flag in result.stdout


def help_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_of_a_recipe_has_the_twelve_flags_that_people_use_and_says_where_the_rest_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    short = help_of(["train", "sd15-ddpo", "--help"], capsys)
    flags = {
        "out", "model", "prompts", "held-out", "rewards", "device", "resume", "dry-run", "train.seed",
        "train.iterations", "train.batch-size", "train.ppo.policy-learning-rate",
    }  # fmt: skip
    assert set(re.findall(r"^\W --(\w[\w.-]*)", short, re.MULTILINE)) == flags
    assert "DDPO's first task" in short
    below = "lacfast train sd15-ddpo --help-all has all, --help TOPIC those of run, model, pipeline,"
    assert below in " ".join(short.split())
    whole = help_of(["train", "sd15-ddpo", "--help-all"], capsys)
    found = set(re.findall(r"^\W --(\w[\w.-]*)", whole, re.MULTILINE))
    assert flags < found
    assert {"lora.rank", "train.critic.trunk", "train.ppo.clip", "keep-last"} < found


def every_setting(kind: type[Config], prefix: str = "") -> list[str]:
    """Dotted names of all settings."""
    found = []
    for name, annotation in field_types(kind).items():
        parts = [each for each in (annotation, *get_args(annotation)) if _is_config(each)]
        found += every_setting(parts[0], f"{prefix}{name}.") if parts else [prefix + name]
    return found


def _is_config(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Config) and not issubclass(kind, Choice)


@pytest.mark.parametrize("command", PAGES)
def test_every_setting_is_in_one_topic_of_the_help(command: str) -> None:
    pages = PAGES[command]
    named = [name for topic in pages.topics.values() for name in topic.settings]
    for setting in every_setting(pages.root):
        inside = [name for name in named if f"{setting}.".startswith(f"{name}.")]
        assert len(inside) == 1, f"{setting} is in {inside}"


def test_help_is_80_columns_wide_and_a_topic_one_screen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    commands = {"train": ["train", "flow-grpo-geneval"], "steer": ["steer"]}
    screens = [[*words, "--help"] for words in commands.values()]
    screens += [[*commands[name], "--help", topic] for name in PAGES for topic in PAGES[name].topics]
    names = [kind.__name__.lower() for kind in get_args(Command)]
    screens += [["--help"], *([name, "--help"] for name in names if name not in PAGES)]
    wide = [["train", "--help"], *([*words, "--help-all"] for words in commands.values())]
    for words in screens + wide:
        lines = help_of(words, capsys).splitlines()
        assert max(map(len, lines)) <= 80, words
        assert len(lines) <= 55 or words in wide, (words, len(lines))
    assert "Two to six runs. (required)" in help_of(["compare", "--help"], capsys)


def test_help_says_none_of_a_default_that_is_empty(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["train", "sd15-ddpo", "--help", "run"],
        ["train", "sd15-ddpo", "--help-all"],
        ["steer", "-h"],
    ):
        printed = help_of(words, capsys)
        assert "(default: none)" in printed
        assert "(default: )" not in printed


def test_help_of_a_topic_has_its_settings_alone(capsys: pytest.CaptureFixture[str]) -> None:
    printed = help_of(["train", "sd15-ddpo", "--help", "optimizer"], capsys)
    flags = set(re.findall(r"^\W --(\w[\w.-]*)", printed, re.MULTILINE))
    assert {"train.ppo.betas", "train.ppo.moments"} < flags
    assert all(flag.startswith("train.ppo.") for flag in flags), flags
    assert "AdamW of actor and critic." in printed
    with Refusal(
        "unknown topic of --help 'optimiser'",
        cause="Help is asked of a topic that there is not.",
        remedy="did you mean 'optimizer'?",
    ).raised():
        asked(["train", "sd15-ddpo", "--help", "optimiser"])


def test_recipes_are_listed_with_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    printed = help_of(["train", "--help"], capsys)
    assert all(name in printed for name in recipe_names())
    assert "without downloads" in printed


def test_it_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert help_of(["--version"], capsys) == f"lacfast {version('lacfast')}\n"


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        (
            ["train", "shapes", "--device", "cuda"],
            Refusal(
                "device='cuda' cannot be used here",
                cause="A GPU where there is none, or where torch is built without CUDA.",
                remedy="see `lacfast info`, or leave the option out",
            ),
        ),
        (
            ["train", "shapes", "--device", "gpu"],
            Refusal(
                "device='gpu' is no device of torch",
                cause="A device by a name that torch does not have.",
                remedy="write cpu, cuda or cuda:1",
            ),
        ),
        (
            [
                "evaluate",
                "none",
                "--prompts",
                "shapes",
                "--rewards",
                "shapes",
                "--out",
                "file",
            ],
            Refusal(
                "cannot write to --out file",
                cause="Results into a file's place, or into a directory of somebody else's.",
                remedy="choose a directory that you may write to",
            ),
        ),
        (
            ["demo", "--out", "file/demo"],
            Refusal(
                "cannot write to --out file/demo",
                cause="A directory that cannot be made.",
                remedy="choose a directory that you may write to",
            ),
        ),
        (
            ["train", "shapes", "--prompts", "prompts.parquet"],
            Refusal(
                "prompts.parquet needs pyarrow",
                cause="Prompts in a format whose optional package is not installed.",
                remedy="pip install pyarrow",
            ),
        ),
        (
            ["train", "shapes", "--prompts", "folder"],
            Refusal(
                "the datasets directory folder needs datasets",
                cause="A directory of datasets where that package is not installed.",
                remedy="pip install 'lacfast[datasets]'",
            ),
        ),
        (
            ["train", "shapes", "--rewards", "ocr", "1"],
            Refusal(
                "engine='rapidocr' needs its package",
                cause="The OCR reward without its engine.",
                remedy="pip install 'lacfast[rewards]'",
            ),
        ),
        (
            ["train", "shapes", "--tensorboard"],
            Refusal(
                "tensorboard is not installed",
                cause="A tracker whose package is not installed.",
                remedy="pip install 'lacfast[tensorboard]'",
            ),
        ),
        (
            ["train", "shapes", "--rewards", "shape", "1", "--dry-run"],
            Refusal(
                "unknown reward 'shape'; did you mean 'shapes'?",
                cause="A reward's name with a letter missing, in a run or its dry run.",
                remedy="or pass a callable, 'package.module:callable', or the URL of a reward server",
            ),
        ),
        (
            ["train", "shapes", "--best", "beauty"],
            Refusal(
                "best='beauty' is no score of the evaluation",
                cause="A best checkpoint by a score that nothing measures.",
                remedy="use one of shapes, shapes_strict, shapes_gold, or name it with --evaluation-rewards",
            ),
        ),
        (
            ["train", "shapes", "--train.batch-size", "33", "--train.samples-per-prompt", "2"],
            Refusal(
                "batch_size=33 must be a multiple of samples_per_prompt=2",
                cause="A batch whose prompts cannot all have as many samples.",
                remedy="must be a multiple",
            ),
        ),
        (
            ["report", "folder"],
            Refusal(
                "folder holds no metrics.jsonl",
                cause="A report on a directory that is no run's.",
                remedy="give the directory of a training run",
            ),
        ),
    ],
    ids=lambda value: value.message if isinstance(value, Refusal) else "",
)
def test_what_cannot_work_is_one_line_and_exit_code_2(
    arguments: list[str],
    refused: Refusal,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("file", "prompts.parquet"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for package in ("pyarrow", "datasets", "rapidocr", "tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)
    # What only a model can tell is told of one that is not worth waiting for.
    monkeypatch.setattr(
        phases, "pretrain", lambda *given, **named: pretrain(*given, **(named | {"steps": 1}))
    )
    assert main(arguments) == USAGE
    printed = capsys.readouterr().err
    refused.check(printed)
    assert printed.startswith("lacfast: ")
    assert printed.count("\n") == 1


def test_a_dead_reward_server_ends_a_run_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(phases, "pretrain", pytest.fail)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    assert main(["train", "shapes", "--rewards", f"taste={url}", "1"]) == FAILURE
    printed = capsys.readouterr().err
    assert f"lacfast: remote reward 'taste' has no server that answers: {url}: ConnectionRefused" in printed


def test_a_warning_of_a_command_is_a_line_as_an_error_is() -> None:
    news, known = (
        logging.makeLogRecord({"msg": f"`CLIPImageProcessor` {what}"})
        for what in ("is broken", "requires torchvision (not installed); falling back to another")
    )
    processors = logging.getLogger("transformers.utils.import_utils")
    with plain_warnings():
        assert warnings.formatwarning("so", UserWarning, "loading.py", 3) == "warning: so\n"
        assert processors.filter(news)
        assert not processors.filter(known)
    assert "loading.py:3" in warnings.formatwarning("so", UserWarning, "loading.py", 3)
    assert processors.filter(known)


def test_info_json_says_which_kernels_are_usable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["versions"]["torch"].startswith("2.")
    assert described["kernels"]["reference"] == "usable"
    assert all(isinstance(reason, str) and reason for reason in described["kernels"].values())
    assert {"rewards", "test", "dev"} <= described["extras"].keys()


def test_info_says_where_encoded_prompts_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["files"]["encoded prompts"]
    files = PromptFiles.shared("encoder")
    assert files is not None
    assert files.directory == Path(told) / "encoder"


def test_an_extra_has_its_packages_and_no_other_extra() -> None:
    found = extras()
    assert found["rewards"] == ["rapidocr", "onnxruntime"]
    assert "ruff" in found["dev"]
    assert not any("lacfast" in packages for packages in found.values())


def test_info_table_tells_why_a_backend_is_not_usable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for section in ("versions", "processor", "cuda", "kernels", "extras"):
        assert section in printed
    assert "usable" in printed


def test_a_dry_run_shows_settings_and_costs_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "shapes", "--dry-run", "--train.batch-size", "24"]) == 0
    printed = capsys.readouterr().out
    assert '"batch_size": 24' in printed
    # Eight steps to sample, and the same states once more, noised anew.
    assert "384 forwards" in printed
    assert printed.index("Memory at its peak") < printed.index('"batch_size": 24')
    assert list(tmp_path.iterdir()) == []


def test_flags_reach_the_parts_of_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--model", str(tmp_path), "--lora.rank", "7", "--train.eval-sampler.num-steps", "3"]
    assert main(["train", "sd15-ddpo", *flags, "--rewards", "pickscore", "0.5", "--dry-run"]) == USAGE
    # Nothing was at --model, which only settings that were understood can say.
    assert str(tmp_path) in capsys.readouterr().err
