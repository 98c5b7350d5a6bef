"""What several ranks cannot do is refused before any work, and told once."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stderr
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from ranked_runs import trainer_for
from ranks import started
from torch import distributed

from lacfast import cli
from lacfast.cli import main
from lacfast.config import to_json
from lacfast.distributed import world
from lacfast.runs.directory import SETTINGS
from lacfast.runs.endings import FAILURE, USAGE
from lacfast.runs.recipes import recipe
from lacfast.runtime.directories import LOCK, locked

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch is without torch.distributed")
NO_SERVER = ("--rewards", "flow_grpo+http://127.0.0.1:9", "1.0")


class Bad(NamedTuple):
    """A command that several ranks cannot do."""

    options: tuple[str, ...]
    told: str
    """A part of what the first rank says."""
    of_second: tuple[str, ...] = ()
    """Options that the second rank alone has."""
    code: int = USAGE


BAD = {
    "shards": Bad(("--train.shard", "3"), "lacfast: shard=3 does not divide the 2 ranks"),
    "graphs": Bad(
        ("--train.shard", "2", "--train.graph.mode", "on"), "lacfast: graph.mode='on' would freeze"
    ),
    "batch": Bad(
        ("--train.batch-size", "1"), "lacfast: a batch of 1 is fewer than the 2 ranks; raise batch_size"
    ),
    "evaluation": Bad(
        ("--train.eval-samples", "1"), "lacfast: a batch of 1 is fewer than the 2 ranks; raise eval_samples"
    ),
    "held out": Bad(("--train.pretrain.held-out-samples", "1"), "raise pretrain.held_out_samples"),
    "rollout ranks": Bad(("--train.rollout-ranks", "2"), "lacfast: rollout_ranks=2 of 2 leave no rank"),
    "server": Bad(NO_SERVER, "lacfast: remote reward", code=FAILURE),
    "server of one rank": Bad((), "lacfast: rank 1 of 2: remote reward", NO_SERVER, FAILURE),
    "directory": Bad((), "is in use by process"),
    "checkpoint": Bad(("--resume", "{root}/another"), "model was 'words-dit' and is 'shapes-dit' now"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Exit code and words of each rank for each command, and what the run's directory holds then."""
    root = tmp_path_factory.mktemp("runs")

    stores = {
        name: distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for name in BAD
    }

    def refused() -> dict[str, Any]:
        # Here no launcher ends the one that tells.
        world.TELL_SECONDS = cli.FIRST_TELLS_SECONDS = 0.0
        found = {}
        for name, bad in BAD.items():
            # As with torchrun, every start meets in a store of its own.
            os.environ["MASTER_PORT"] = str(stores[name].port)
            options = (
                *(word.format(root=root) for word in bad.options),
                *(bad.of_second if os.environ["RANK"] == "1" else ()),
            )
            with redirect_stderr(io.StringIO()) as written:
                # The recipe's hold refuses shards and small batches itself.
                run = ["train", "shapes-ppo", "--out", str(root / name), "--train.ppo.hold", "none"]
                code = main([*run, *options])
            found[name] = code, written.getvalue(), sorted(path.name for path in root.glob(f"{name}/*"))
        return found

    other = to_json(replace(recipe("shapes-ppo"), model="words-dit"))
    trainer_for().save(root / "another", notes={SETTINGS: other})
    with locked(root / "directory"):
        ranks, _store = started(2, refused, root)
        for process in ranks:
            process.join(timeout=120)
    first, second = (torch.load(root / f"{rank}.pt") for rank in range(2))
    return {name: [first[name], second[name]] for name in BAD}


@pytest.mark.parametrize("name", BAD)
def test_the_first_rank_alone_refuses_before_any_work(name: str, found: dict[str, list[Any]]) -> None:
    (code, first, left), (_, second, _) = found[name]
    assert BAD[name].told in first
    assert code == BAD[name].code
    assert second == ""
    # A checkpoint is asked for in the run's directory.
    assert left == {"directory": [LOCK], "checkpoint": ["checkpoints", LOCK, "samples"]}.get(name, [])
