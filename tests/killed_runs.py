"""Runs that are killed and go on, each in a process forked from one that has imported everything.

    python tests/killed_runs.py DIRECTORY KILLS SEED

Prints a line of JSON per kill: where it was, and in which files the run differs from one that was not killed.
Half of the kills are at random moments, half at random calls within saves.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from tiny_backbones import PROMPTS, SMALLEST, tiny_backbone, tiny_config

from lacfast import checkpoint
from lacfast.config import PPOConfig, Ratio, ValuePretrainingConfig
from lacfast.runs import train as run
from lacfast.runs.config import RunConfig
from lacfast.runtime import directories

CONFIG = RunConfig(
    out="run",
    model="tiny",
    prompts="prompts.txt",
    rewards=(("tiny_backbones:brightness", 1.0),),
    save_every=1,
    keep_last=2,
    train=tiny_config(
        ppo=PPOConfig(
            clip=Ratio(1e-3), num_minibatches=2, microbatch_size=4, warmup_steps=3, final_learning_rate=0.0
        ),
        pretrain=ValuePretrainingConfig(iterations=2, held_out_samples=4, minibatch_size=8),
        batch_size=4,
        iterations=2,
        ema_decay=0.5,
        eval_every=1,
        eval_samples=4,
    ),
)
STEPS_OF_A_SAVE = (
    (checkpoint, "save_file"),
    (checkpoint.torch, "save"),
    (checkpoint, "write_json"),
    (directories, "write_json"),
    (directories, "_checksum"),
    (directories, "_rename"),
    (directories.shutil, "rmtree"),
)


def count_saves(die_at: int) -> Callable[[], int]:
    """Let this process be killed at a call within a save, counted from 1; returns how many there were."""
    calls = [0]

    def counted(step: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            calls[0] += 1
            if calls[0] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*arguments, **keywords)

        return call

    for owner, name in STEPS_OF_A_SAVE:
        setattr(owner, name, counted(getattr(owner, name)))
    return lambda: calls[0]


def forked(directory: Path, die_at: int = 0, seconds: float | None = None) -> tuple[bool, int]:
    """Train in `directory` in a process of its own, killed within a save or after some seconds.

    Returns:
        Whether it came to its end, and the calls within saves until then.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.chdir(directory)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        saves = count_saves(die_at)
        run.train(CONFIG, tell=lambda line: None)
        os.write(writing, str(saves()).encode())
        os._exit(0)
    os.close(writing)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        calls = pipe.read()
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"the run in {directory} failed")
    return not os.WIFSIGNALED(status), int(calls or 0)


_OF_ITS_PROCESSES = ("seconds", "weight_bytes", "traffic_bytes")
"""Metrics that tell of a start too: a run that goes on agrees with the other ranks once more."""


def contents(directory: Path) -> dict[str, Any]:
    """What a run has left, without the time that it took, what it sent and the numbers of its processes."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in (directory / "run").rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        found[name] = path.read_bytes()
        if path.name == "metrics.jsonl":
            entries = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = str(
                [
                    {key: entry[key] for key in entry if not key.startswith(_OF_ITS_PROCESSES)}
                    for entry in entries
                ]
            )
        elif path.name in (directories.LOCK, ".metadata"):
            # torch gives every checkpoint of shards a number of its own.
            found[name] = ""
        elif path.name == directories.MANIFEST:
            found[name] = list(json.loads(path.read_text())["files"])
        elif path.name == checkpoint.TRAINER_STATE:
            found[name] = str(plain(torch.load(path, weights_only=True)))
    return found


def plain(value: Any) -> Any:
    """Tensors as their bytes."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.contiguous().view(-1).numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def main(root: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    backbone = tiny_backbone("dit", size=SMALLEST)
    run.build_backbone = lambda *_: backbone
    # There is no pipeline of the config's name.
    run._require_memory = lambda *_: None

    def begun(name: str) -> Path:
        directory = root / name
        directory.mkdir(parents=True)
        (directory / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
        return directory

    through = begun("through")
    start = time.monotonic()
    _, calls = forked(through)
    seconds = time.monotonic() - start
    expected = contents(through)
    generator = random.Random(seed)
    for number in range(kills):
        in_save = number % 2 == 0
        where = generator.randint(1, calls) if in_save else generator.uniform(0, seconds)
        for attempt in count():
            directory = begun(f"killed-{number}-{attempt}")
            if in_save:
                finished, _ = forked(directory, die_at=int(where))
            else:
                # Another time it may run faster and be through before.
                finished, _ = forked(directory, seconds=where / 2**attempt)
            if not finished:
                break
        forked(directory)
        found = contents(directory)
        differs = sorted(name for name in {**expected, **found} if expected.get(name) != found.get(name))
        told = {"in_save": in_save, "where": where, "differs": differs}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
