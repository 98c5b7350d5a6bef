"""Every command of the pages runs: as it is written, or with settings that take seconds."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lacfast import cli
from lacfast.config import GRPO
from lacfast.rewards import names
from lacfast.runs import demo, terminal, train
from lacfast.runs.config import RunConfig
from lacfast.runs.endings import USAGE
from lacfast.runs.recipes import recipe, recipe_names
from lacfast.tasks.pretraining import pretrain

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
QUICK = (
    "--train.batch-size 8 --train.eval-samples 4 --train.eval-batch-size 4 --train.pretrain.iterations 1 "
    "--train.pretrain.held-out-samples 4 --train.pretrain.patience 1"
)
"""A training run of seconds."""
TRAINED = "lacfast train shapes --out runs/shapes --train.iterations 5"
"""The run of docs/steering.md."""
INSTEAD = {
    "--samples 60": "--samples 2",
    "--prompts animals": "--samples 4 --prompts shapes",
    "--particles 8": "--particles 2",
    "runs/cats": "runs/shapes",
}
"""What commands on a run say, and what stands here in its place."""
BASELINE = "--train.advantages.estimator grpo --train.critic.trunk none --train.samples-per-prompt 8"
"""What docs/training.md says of all recipes."""


WHOLE = re.compile(r"lacfast (info$|train [a-z][\w./-]+ -|(demo|evaluate|steer|report|watch|compare) \S)")


def commands() -> Iterator[str]:
    """The lacfast commands of the pages, without comments; those with a placeholder are no whole ones."""
    for page in PAGES:
        text = re.sub(r"\s*\\\n\s*", " ", page.read_text(encoding="utf-8"))
        fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        lines = [line for language, block in fenced if language != "python" for line in block.splitlines()]
        for line in [*lines, *re.findall(r"`([^`\n]+)`", text)]:
            for command in line.partition(" #")[0].split(" && "):
                words = command.strip().removeprefix(".venv/bin/")
                if WHOLE.match(words) and not re.search(r"[A-Z]{3}|\.\.\.", words):
                    yield words


def run(command: str) -> int:
    try:
        return cli.main(shlex.split(command)[1:])
    except SystemExit as stopped:
        return int(stopped.code or 0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with the run of docs/steering.md, whose model was pretrained for two steps."""

    def briefly(*arguments: Any, **settings: Any) -> Any:
        return pretrain(*arguments, **(settings | {"steps": 2}))

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("commands"))
        patch.setattr("lacfast.runs.phases.pretrain", briefly)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert run(f"{TRAINED} {QUICK} --train.eval-every 5") == 0
        (Path.cwd() / "printed.txt").write_text(printed.getvalue(), encoding="utf-8")
        yield Path.cwd()


def brightness(images: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> torch.Tensor:
    return images.mean(dim=(1, 2, 3))


FOUND = sorted(set(commands()))
TRAINING = [command for command in FOUND if command.startswith("lacfast train")]
REST = [command for command in FOUND if command not in TRAINING and not command.startswith("lacfast demo")]


def test_the_pages_have_commands_of_every_kind() -> None:
    assert {command.split()[1] for command in FOUND} >= {
        "demo",
        "train",
        "evaluate",
        "steer",
        "report",
        "watch",
    }
    assert TRAINED in TRAINING


@pytest.mark.parametrize("command", REST)
def test_a_command_on_a_run_runs(command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(names.BUILT_IN, "pickscore", f"{__name__}:brightness")
    for shown, here in INSTEAD.items():
        command = command.replace(shown, here)
    assert run(command) == 0


@pytest.mark.parametrize(
    "command", [*TRAINING, *(f"lacfast train {name} {BASELINE}" for name in recipe_names())]
)
def test_a_training_command_means_settings(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They train in tests/runs/, and their dry runs count there."""
    # Where the recipes lie that the pages name by their path.
    monkeypatch.chdir(ROOT)
    asked: list[RunConfig] = []
    monkeypatch.setattr(train, "train", lambda config, *_: asked.append(config))
    monkeypatch.setattr("lacfast.runs.plan.plan", lambda config, **_: asked.append(config))
    monkeypatch.setattr(terminal, "show_plan", lambda *_: None)
    assert run(command) == 0
    (config,) = asked
    assert config.model == recipe(command.split()[2]).model
    if BASELINE in command:
        assert config.train.advantages.estimator == GRPO()
        assert config.train.critic.trunk == "none"


def test_a_recipe_becomes_a_baseline_and_trains(place: Path) -> None:
    assert BASELINE in (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    quick = f"{BASELINE} --train.batch-size 8 --train.eval-every 0 --train.iterations 1"
    assert run(f"lacfast train shapes --out runs/grpo {quick}") == 0


def test_a_run_tells_what_it_waits_for_and_the_scores_of_its_evaluations(place: Path) -> None:
    printed = (place / "printed.txt").read_text(encoding="utf-8")
    waits = ["  Pretrain a tiny dit ...", "  Value pretraining, actor frozen ...", "  Evaluation ..."]
    places = [printed.index(line) for line in waits]
    assert places == sorted(places)
    assert "explained variance" in printed
    score = r"shapes \d\.\d{4} ± \d\.\d{4}, shapes_strict \S+ ± \S+, shapes_gold \S+ ± \S+ of 4"
    # Of the start and of the end; between them a line per iteration.
    assert len(re.findall(score, printed)) == 2
    assert len(re.findall(r"^ +\d  reward/shapes", printed, re.MULTILINE)) == 5


def test_the_demo_s_command_asks_for_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run at its smallest scale in tests/runs/test_demo.py."""
    asked: list[Path] = []

    def recorded(out: Path, **settings: Any) -> dict[str, Any]:
        asked.append(out)
        raise ValueError("asked")

    monkeypatch.setattr(demo, "run_demo", recorded)
    (command,) = (command for command in FOUND if command.startswith("lacfast demo "))
    assert run(command) == USAGE
    assert asked == [Path("runs/demo")]
