"""Launch tables are data: complete, ascending, and what a tuner writes is what is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

launch = pytest.importorskip("lacfast.kernels.launch", reason="Triton is not installed")


@pytest.mark.parametrize("op", launch.names())
def test_every_table_covers_every_size_in_ascending_order(op: str) -> None:
    tables = launch.table(op)
    assert launch.DEFAULT in tables
    for rows in tables.values():
        limits = [row.elements for row in rows]
        assert limits == sorted(set(limits))
        assert limits[-1] >= 2**31 - 1
        for row in rows:
            assert row.block & (row.block - 1) == 0
            assert row.num_warps in (1, 2, 4, 8, 16)


@pytest.mark.parametrize("op", launch.names())
def test_default_rows_do_not_claim_to_be_measured(op: str) -> None:
    assert not any(row.measured for row in launch.table(op)[launch.DEFAULT])


@pytest.mark.parametrize("op", launch.names())
@pytest.mark.parametrize("elements", [1, 512, 513, 4096, 65_536, 2**28])
def test_the_programs_of_a_launch_cover_the_latent_once(op: str, elements: int) -> None:
    block, blocks, _, splits = launch.pick_launch(op, elements, "sm_90")
    assert (splits - 1) * block * blocks < elements <= splits * block * blocks


@pytest.mark.parametrize("op", [name for name in launch.names() if name != "value_pool"])
@pytest.mark.parametrize("elements", [512, 1024, 2048, 4096])
def test_small_latents_have_no_block_of_nothing_but_a_mask(op: str, elements: int) -> None:
    block, blocks, _, splits = launch.pick_launch(op, elements, launch.DEFAULT)
    assert block * blocks * splits == elements


def test_an_architecture_without_a_table_uses_the_default() -> None:
    assert launch.pick_launch("gaussian_step", 4096, "sm_61") == launch.pick_launch(
        "gaussian_step", 4096, launch.DEFAULT
    )
    assert launch.architecture_of(torch.device("cpu")) == launch.DEFAULT


def test_written_rows_replace_one_architecture_and_leave_the_others(tmp_path: Path) -> None:
    path = tmp_path / "launches.json"
    small, large = launch.Launch(512, 512, 1, 4, True), launch.Launch(2**31, 2048, 2, 8, True)
    launch.write("gaussian_step", launch.DEFAULT, [small, large], path)
    launch.write("gaussian_step", "sm_90", [large, small], path)
    launch.write("gaussian_step", "sm_90", [large], path)
    written = json.loads(path.read_text())
    assert [launch.Launch(**row) for row in written["gaussian_step"][launch.DEFAULT]] == [small, large]
    assert [launch.Launch(**row) for row in written["gaussian_step"]["sm_90"]] == [large]


def test_the_file_is_written_the_way_it_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "launches.json"
    for op in launch.names():
        for architecture, rows in launch.table(op).items():
            launch.write(op, architecture, rows, path)
    assert path.read_text() == launch.LAUNCHES.read_text()


def test_candidates_hold_the_tables_launches() -> None:
    for op in ("gaussian_step", "ppo_loss", "normal_noise"):
        assert set(launch.shapes(op)) <= set(launch.candidates(op))


def test_an_unknown_op_and_an_empty_table_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no launch table for 'sort'; known: normal_noise, gaussian_step"):
        launch.table("sort")
    with pytest.raises(ValueError, match="no rows for gaussian_step on sm_90"):
        launch.write("gaussian_step", "sm_90", [], tmp_path / "launches.json")
