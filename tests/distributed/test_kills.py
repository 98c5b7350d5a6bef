"""A run whose ranks are killed goes on to the bits of one that was never killed."""

from __future__ import annotations

import os
import random
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from killed_runs import CONFIG, contents
from ranks import started
from tiny_backbones import PROMPTS, tiny_backbone
from torch import distributed

from lacfast.distributed import joined
from lacfast.runs import train as run
from lacfast.runs.config import RunConfig

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch is without torch.distributed")
RANKS = 2
TIMEOUT = timedelta(seconds=20)


def begun(directory: Path) -> Path:
    directory.mkdir()
    (directory / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return directory


def trained(directory: Path, config: RunConfig, killed: tuple[int, float] | None = None) -> bool:
    """Train in `directory`, or go on there, with one rank killed after some seconds; whether it ended."""

    def work() -> None:
        os.chdir(directory)
        # What a rank says when it loses another is tested elsewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with joined(TIMEOUT):
            run.train(config, tell=lambda line: None)

    ranks, _store = started(RANKS, work, directory)
    if killed is not None:
        rank, seconds = killed
        time.sleep(seconds)
        ranks[rank].kill()
    for process in ranks:
        process.join(timeout=120)
    return all(process.exitcode == 0 for process in ranks)


def outcome(directory: Path) -> dict[str, Any]:
    return {name: found for name, found in contents(directory).items() if name.startswith("run/")}


APART = replace(CONFIG, train=replace(CONFIG.train, rollout_ranks=1, staleness=2))
SHARDED = replace(CONFIG, train=replace(CONFIG.train, shard=2))


@pytest.mark.parametrize(
    ("config", "kills"),
    [
        (CONFIG, 2),
        pytest.param(CONFIG, 20, marks=pytest.mark.slow),
        pytest.param(APART, 4, marks=pytest.mark.slow),
        pytest.param(SHARDED, 2, marks=pytest.mark.slow),
    ],
    ids=["2 times", "20 times", "apart", "sharded"],
)
def test_a_run_whose_ranks_are_killed_ends_with_the_bits_of_one_that_was_not(
    config: RunConfig,
    kills: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    backbone = tiny_backbone("dit")
    monkeypatch.setattr(run, "build_backbone", lambda *_: backbone)
    monkeypatch.setattr(run, "_require_memory", lambda *_: None)
    through = begun(tmp_path / "through")
    start = time.monotonic()
    assert trained(through, config)
    seconds, expected = time.monotonic() - start, outcome(through)
    generator = random.Random(kills)
    for number in range(kills):
        directory = begun(tmp_path / str(number))
        trained(directory, config, (number % RANKS, generator.uniform(0.2, 0.8) * seconds))
        assert trained(directory, config)
        found = outcome(directory)
        assert sorted(name for name in {**expected, **found} if expected.get(name) != found.get(name)) == []
