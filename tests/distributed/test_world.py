"""Each rank has its rows, and all have the same sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from refusals import Refusal
from torch import distributed

from lacfast.distributed import Share, World

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch is without torch.distributed")
SIZE = 3


def test_rows_are_split_evenly_and_in_order() -> None:
    shares = [World(rank, SIZE).share(8) for rank in range(SIZE)]
    assert shares == [Share(0, 3, 8, SIZE), Share(3, 3, 8, SIZE), Share(6, 2, 8, SIZE)]
    assert shares[0].owners(torch.arange(8)).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert World().share(8) == Share(0, 8, 8)
    refused = Refusal(
        "a batch of 2 is fewer than the 3 ranks",
        cause="more processes than trajectories of a batch",
        remedy="raise batch_size, or start fewer processes",
    )
    with refused.raised():
        World(0, SIZE).share(2)


def _collectives() -> dict[str, Any]:
    world = World.current()
    rank = world.rank
    own = torch.arange(2.0 * (rank + 1)).view(rank + 1, 2) + 10 * rank
    sums = [torch.full((2,), float(rank)), torch.full((), 1.0, dtype=torch.float64), torch.ones(3)]
    largest = [torch.tensor(float(rank)), torch.tensor(-float(rank))]
    world.sum_(sums, "sums", maxima=largest)
    first = torch.full((4,), float(rank) + 5)
    world.copy_from_first_([first], "weights")
    return {
        "rows": world.rows(own, "rows"),
        "columns": world.rows(own.T.contiguous(), "columns", dim=1),
        "first": world.rows_on_first(own, "images"),
        "entries": world.entries([f"rank {rank}"] * rank, "entries"),
        "of_first": world.of_first(rank + 7, "a number"),
        "sums": sums,
        "largest": largest,
        "copied": first,
        "own": own,
    }


def test_every_rank_has_the_rows_and_sums_of_all(tmp_path: Path) -> None:
    found = on_ranks(SIZE, _collectives, tmp_path)
    rows = torch.cat([each["own"] for each in found])
    for rank, each in enumerate(found):
        assert torch.equal(each["rows"], rows)
        assert torch.equal(each["columns"], rows.T)
        assert torch.equal(each["first"], rows if rank == 0 else each["own"])
        assert each["entries"] == ["rank 1", "rank 2", "rank 2"]
        assert each["of_first"] == 7
        assert [tensor.flatten()[0].item() for tensor in each["sums"]] == [3.0, 3.0, 3.0]
        assert [tensor.item() for tensor in each["largest"]] == [2.0, 0.0]
        assert each["copied"].tolist() == [5.0] * 4


def test_a_world_of_one_hands_back_what_it_gets() -> None:
    world, rows = World(), torch.ones(2, 2)
    assert world.rows(rows, "rows") is rows
    assert world.rows_on_first(rows, "rows") is rows
    assert world.entries(["x"], "entries") == ["x"]
    world.sum_([rows], "sums", maxima=[rows.sum()])
    assert torch.equal(rows, torch.ones(2, 2))


def test_a_process_of_a_launcher_without_a_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    refused = Refusal(
        "this is one of 4 processes of a launcher, and no process group joins them",
        cause="torchrun or srun started a script of one's own, which trains on each of them",
        remedy="enter lacfast.distributed.joined() before the trainer is made",
    )
    with refused.raised():
        World.current()
