"""A run goes on with what may change, from what is whole, loses nothing, and says what it does."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_backbones
import torch
from refusals import Refusal
from reward_server import Server
from safetensors.torch import load_file
from tiny_backbones import PROMPTS, tiny_backbone, tiny_config

from lacfast.cli import main
from lacfast.config import (
    AdvantageConfig,
    BatchMean,
    LoRAConfig,
    PipelineSettings,
    PPOConfig,
    Ratio,
    TrainConfig,
    ValuePretrainingConfig,
)
from lacfast.learning.pretraining_state import PretrainingState
from lacfast.learning.run_state import Counts
from lacfast.rewards.reward import RewardError
from lacfast.runs import train as run
from lacfast.runs.config import RunConfig
from lacfast.runs.directory import RunDirectory
from lacfast.runs.endings import FAILURE, USAGE
from lacfast.runtime.directories import DamagedError, locked
from lacfast.runtime.signals import Stopped, raised

REWARD = "tiny_backbones:brightness"


@pytest.fixture(autouse=True)
def _tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    build_a_tiny_model(monkeypatch)


def build_a_tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the pipeline that the config names, whose memory nobody can plan."""
    monkeypatch.setattr(run, "build_backbone", lambda *_: tiny_backbone("dit"))
    monkeypatch.setattr(run, "_require_memory", lambda *_: None)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run of three iterations without a critic, which takes a second."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    ppo = PPOConfig(clip=Ratio(1e-3), num_minibatches=2, microbatch_size=8, policy_learning_rate=1e-3)
    train = tiny_config(ppo=ppo, iterations=3, advantages=AdvantageConfig(estimator=BatchMean()))
    return RunConfig(
        out=str(tmp_path / "run"),
        model="tiny",
        prompts=str(prompts),
        rewards=((REWARD, 1.0),),
        save_every=1,
        keep_last=9,
        # It evaluates nothing.
        train=replace(train, eval_samples=TrainConfig.eval_samples),
    )


def changed(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, train=replace(config.train, **changes))


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    loaded = load_file(checkpoint / "model" / "diffusion_pytorch_model.safetensors")
    # A loaded tensor is the file itself.
    return {name: tensor.clone() for name, tensor in loaded.items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def same(one: Path, other: Path) -> bool:
    return equal(weights(one), weights(other))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def train(config: RunConfig, **arguments: Any) -> tuple[Path, list[str]]:
    """The last checkpoint, and what was told."""
    told: list[str] = []
    return run.train(config, tell=told.append, **arguments), told


def test_a_finished_run_says_so_and_changes_nothing(config: RunConfig) -> None:
    last, told = train(config)
    assert told == []
    before = (Path(config.out) / "metrics.jsonl").read_text()
    again, told = train(config)
    assert again == last
    assert told == [
        f"goes on from {last}, iteration 3 of 3",
        "all 3 iterations were done before; --train.iterations asks for more",
    ]
    assert (Path(config.out) / "metrics.jsonl").read_text() == before


def test_settings_that_may_change_are_told_and_written(config: RunConfig) -> None:
    train(config)
    ppo = replace(config.train.ppo, policy_learning_rate=5e-4)
    last, told = train(changed(config, iterations=4, ppo=ppo))
    assert last.name == "00000004"
    assert told[1:] == [
        "train.iterations was 3 and is 4 from here on",
        "train.ppo.policy_learning_rate was 0.001 and is 0.0005 from here on",
    ]
    for place in (Path(config.out), last):
        written = json.loads((place / "run.json").read_text())["train"]
        assert (written["iterations"], written["ppo"]["policy_learning_rate"]) == (4, 5e-4)


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (
            {"model": "shapes-unet"},
            Refusal(
                "model was 'tiny' and is 'shapes-unet' now",
                cause="`lacfast train --model B` goes on in the directory of A's run.",
                remedy="or start another run from the checkpoint's weights: --model CHECKPOINT --out NEW",
            ),
        ),
        (
            {"lora": LoRAConfig(rank=4, alpha=8)},
            Refusal(
                "lora.alpha was None and is 8 now",
                cause="A run goes on with a LoRA of another scale.",
                remedy="take the old value",
            ),
        ),
        (
            {"pipeline": PipelineSettings(resolution=(64, 64))},
            Refusal(
                "pipeline.resolution was None and is (64, 64) now",
                cause="A run goes on with images of another size.",
                remedy="take the old value",
            ),
        ),
    ],
)
def test_settings_that_must_stay_are_refused_before_anything_changes(
    config: RunConfig, change: dict[str, Any], refusal: Refusal
) -> None:
    started = replace(config, lora=LoRAConfig(rank=4)) if "lora" in change else config
    train(changed(started, iterations=1))
    before = {path: path.read_bytes() for path in Path(config.out).rglob("*.json*")}
    with refusal.raised():
        train(replace(started, **change))
    assert {path: path.read_bytes() for path in Path(config.out).rglob("*.json*")} == before


def test_a_run_from_an_older_checkpoint_is_saved_and_loses_nothing_of_the_newer_ones(
    config: RunConfig,
) -> None:
    out = Path(config.out)
    last, _ = train(changed(config, eval_every=3, eval_samples=8))
    third = weights(last)
    pictures, metrics = names(out / "samples"), (out / "metrics.jsonl").read_text()
    ppo = replace(config.train.ppo, policy_learning_rate=1e-2)
    older = replace(
        changed(config, ppo=ppo, eval_every=3, eval_samples=8), resume=str(out / "checkpoints" / "00000001")
    )
    with pytest.warns(UserWarning, match=r"later or damaged entries .* are in .*replaced/1 now"):
        branch, _ = train(older)
    assert branch == last
    assert not equal(third, weights(branch))
    kept = out / "replaced" / "1"
    assert {"00000002", "00000003"} <= set(names(kept / "checkpoints"))
    assert equal(third, weights(kept / "checkpoints" / "00000003"))
    assert (kept / "metrics.jsonl").read_text() == metrics
    assert pictures == ["00000000.png", "00000003.png"] == names(out / "samples")
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [entry["iteration"] for entry in entries if entry["phase"] == "train"] == [1, 2, 3]


def test_a_run_goes_on_from_another_directory(config: RunConfig, tmp_path: Path) -> None:
    last, _ = train(config)
    other = replace(config, out=str(tmp_path / "other"), resume=str(last.parent / "00000002"))
    moved, told = train(other)
    assert told[0].endswith("iteration 2 of 3")
    assert same(last, moved)
    assert names(moved.parent) == ["00000002", "00000003"]


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_taken(config: RunConfig) -> None:
    out = Path(config.out)
    last, _ = train(config)
    intact = weights(last)
    (file,) = (last / "model").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DamagedError, match=r"00000003 is damaged"):
        train(replace(config, resume=str(last)))
    with pytest.warns(UserWarning, match=r"00000003 is damaged: model/.* has \d+ bytes of"):
        again, told = train(config)
    assert told[0] == f"goes on from {last.with_name('00000002')}, iteration 2 of 3"
    assert equal(intact, weights(again))
    assert names(out / "replaced" / "1" / "checkpoints") == ["00000003"]


@pytest.mark.filterwarnings("ignore:.*is damaged")
def test_a_run_without_a_whole_checkpoint_does_not_begin_anew(config: RunConfig) -> None:
    last, _ = train(changed(config, iterations=1))
    for checkpoint in last.parent.iterdir():
        (checkpoint / "trainer.pt").unlink()
    with Refusal(
        "every checkpoint in",
        cause="All checkpoints of a run were damaged.",
        remedy="restore one from a copy, or start again with another --out",
        error=DamagedError,
    ).raised():
        train(config)


def test_only_exact_names_are_taken_for_checkpoints(config: RunConfig) -> None:
    out = Path(config.out)
    last, _ = train(changed(replace(config, keep_last=1), iterations=1))
    mine = ["00000004_good", "9-backup", "000000009", "12"]
    for name in mine:
        (out / "checkpoints" / name).mkdir()
    (out / "checkpoints" / "00000008").write_text("a file")
    assert RunDirectory(out, keep_last=1).checkpoints() == [last]
    train(changed(replace(config, keep_last=1), iterations=2))
    assert set(mine) < set(names(out / "checkpoints"))
    (out / "checkpoints" / "00000002" / "notes.txt").write_text("mine")
    train(changed(replace(config, keep_last=1), iterations=3))
    assert {"00000002", "00000003"} < set(names(out / "checkpoints"))


def test_one_process_at_a_time_trains_into_a_directory(config: RunConfig) -> None:
    with locked(Path(config.out)), pytest.raises(ValueError, match=rf"in use by process {os.getpid()} on "):
        train(config)


def test_metrics_of_another_trainer_are_not_deleted(config: RunConfig) -> None:
    out = Path(config.out)
    out.mkdir()
    (out / "metrics.jsonl").write_text("mine")
    with Refusal(
        "is of no run of lacfast train, which would replace it",
        cause="`lacfast train --out` names the directory of a trainer of one's own.",
        remedy="choose another --out",
    ).raised():
        train(config)
    assert (out / "metrics.jsonl").read_text() == "mine"


def fails_at(calls: int) -> Callable[..., torch.Tensor]:
    left = [calls]

    def reward(images: torch.Tensor, *_: Any) -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("the server is gone")
        return images.mean(dim=(1, 2, 3))

    return reward


@pytest.mark.parametrize("calls", [2, 5])
def test_a_reward_that_fails_leaves_the_last_whole_iteration(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """Also in an evaluation, which is made again: what the run gives is what it gives without a failure."""
    config = changed(replace(config, save_every=0), eval_every=1, eval_samples=8)
    through, _ = train(replace(config, out=str(tmp_path / "through")))
    monkeypatch.setattr(tiny_backbones, "brightness", fails_at(calls))
    told: list[str] = []
    with pytest.raises(RewardError, match="the server is gone"):
        run.train(config, tell=told.append)
    saved = Path(config.out) / "checkpoints" / f"{calls // 2:08d}"
    assert told == [f"stopped; {saved} has the last whole iteration, and --resume auto goes on from it"]
    monkeypatch.undo()
    build_a_tiny_model(monkeypatch)
    last, told = train(config)
    assert told[0].startswith(f"goes on from {saved}")
    assert same(through, last)
    assert logged(through) == logged(last)


def logged(checkpoint: Path) -> str:
    """The lines of the run's metrics without the time that it took."""
    lines = (checkpoint.parents[1] / "metrics.jsonl").read_text().splitlines()
    return str(
        [
            {name: value for name, value in json.loads(line).items() if not name.startswith("seconds")}
            for line in lines
        ]
    )


class Rising:
    """A tracker like W&B, which drops what comes of a step behind the last."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, str]] = []

    def numbers(self, step: int, values: dict[str, float]) -> None:
        assert not self.steps or step >= self.steps[-1][0]
        self.steps.append((step, min(values).partition("/")[0]))

    def picture(self, step: int, name: str, image: object) -> None:
        assert step == self.steps[-1][0]

    def close(self) -> None:
        pass


def test_a_run_that_is_stopped_within_value_pretraining_goes_on_with_rising_steps(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same bits and lines, and a tracker that goes on with the run loses nothing."""
    pretrain = ValuePretrainingConfig(iterations=3, held_out_samples=4, minibatch_size=16)
    settings = tiny_config(ppo=config.train.ppo, pretrain=pretrain, iterations=2, eval_every=1)
    config = replace(config, train=settings, tensorboard=True, save_every=0)
    trackers = [Rising(), Rising()]
    monkeypatch.setattr(run, "TensorBoardTracker", lambda _: trackers[0])
    through, _ = train(replace(config, out=str(tmp_path / "through")))
    monkeypatch.setattr(run, "TensorBoardTracker", lambda _: trackers[1])
    with monkeypatch.context() as patch:
        patch.setattr(tiny_backbones, "brightness", fails_at(3))
        with pytest.raises(RewardError, match="the server is gone"):
            train(config)
    last, told = train(config)
    assert told[0].endswith("00000000, iteration 2 of 3 of value pretraining")
    assert same(through, last)
    assert logged(through) == logged(last)
    phases = ["value_pretraining"] * 3 + ["evaluate", "train", "evaluate", "train", "evaluate"]
    assert trackers[0].steps == trackers[1].steps == list(zip([0, 1, 2, 3, 4, 4, 5, 5], phases, strict=True))


def test_lines_that_will_be_logged_again_are_dropped(config: RunConfig) -> None:
    """Also those of an evaluation that was skipped, which is due again, and of value pretraining."""
    directory = RunDirectory(Path(config.out), keep_last=1)
    lines = [("value_pretraining", number) for number in range(3)]
    lines += [("skipped_evaluation", 0), ("train", 1), ("skipped_evaluation", 1), ("train", 2)]
    source = directory.checkpoint(1)

    def left(counts: Counts, pretraining: PretrainingState) -> list[tuple[str, int]]:
        text = "".join(json.dumps({"phase": phase, "iteration": number}) + "\n" for phase, number in lines)
        directory.metrics.write_text(text)
        directory.go_on_from(source, counts, pretraining, is_same=True)
        kept = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
        return [(entry["phase"], entry["iteration"]) for entry in kept]

    assert left(Counts(1, 8, -1), PretrainingState(3)) == lines[:5]
    assert left(Counts(0, 8, -1), PretrainingState(2, is_under_way=True)) == lines[:2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_the_last_whole_iteration(config: RunConfig, number: signal.Signals) -> None:
    config = replace(config, save_every=0)

    def stop(metrics: dict[str, Any]) -> None:
        if metrics["iteration"] == 2:
            signal.raise_signal(number)

    with pytest.raises(Stopped) as caught, raised():
        run.train(config, stop, tell=lambda _: None)
    assert caught.value.exit_code == 128 + number
    assert names(Path(config.out) / "checkpoints") == ["00000000", "00000002"]


def test_one_signal_ends_a_run_within_seconds_while_a_reward_server_is_dead(config: RunConfig) -> None:
    # It takes a connection, and never answers.
    server = socket.create_server(("127.0.0.1", 0))
    dead = replace(config, rewards=((f"http://127.0.0.1:{server.getsockname()[1]}/score", 1.0),))
    sent: list[float] = []

    def interrupt() -> None:
        while not (Path(config.out) / "checkpoints" / "00000000").exists():
            time.sleep(0.05)
        time.sleep(1)
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with server, pytest.raises(Stopped), raised():
        train(dead)
    assert time.monotonic() - sent[0] < 15
    assert names(Path(config.out) / "checkpoints") == ["00000000"]


def lengths(prompts: list[str]) -> tuple[int, bytes]:
    return 200, json.dumps({"scores": [float(len(prompt)) for prompt in prompts]}).encode()


def test_a_run_goes_on_with_a_reward_server_that_has_moved(config: RunConfig, tmp_path: Path) -> None:
    """Under a name of its own; a server that is its address would be another reward."""
    servers = [Server(then=lengths) for _ in range(2)]

    def served(number: int, out: str, iterations: int, name: str = "length=") -> RunConfig:
        asked = replace(config, rewards=((f"{name}{servers[number].url}", 1.0),), out=str(tmp_path / out))
        return changed(asked, iterations=iterations)

    through, _ = train(served(1, "through", 2))
    train(served(0, "moved", 1))
    answered = len(servers[1].requests)
    servers[0].close()
    last, told = train(served(1, "moved", 2))
    assert len(servers[1].requests) == answered + 1
    assert told[0].endswith("iteration 1 of 2")
    assert any(line.startswith("rewards was (('length=http://127.0.0.1") for line in told)
    assert same(through, last)
    with Refusal(
        "the checkpoint was trained on rewards {'length': 1.0}, this trainer has {'http://127.0.0.1",
        cause="A reward server without a name of its own has moved, so it counts as another reward.",
        remedy="use the same",
    ).raised():
        train(served(1, "moved", 3, name=""))
    servers[1].close()


def test_exit_codes_tell_usage_from_failure_and_signals(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ends_with(error: BaseException) -> Callable[..., Any]:
        def work(*_: Any, **__: Any) -> None:
            raise error

        return work

    expected = {
        ValueError("settings"): USAGE,
        RewardError("reward"): FAILURE,
        DamagedError("disk"): FAILURE,
        FloatingPointError("weights"): FAILURE,
        Stopped(signal.SIGINT): 130,
        Stopped(signal.SIGTERM): 143,
        Stopped(signal.SIGHUP): 129,
    }
    for error, code in expected.items():
        monkeypatch.setattr(run, "train", ends_with(error))
        assert main(["train", "shapes", "--out", config.out]) == code
        assert str(error) in capsys.readouterr().err
