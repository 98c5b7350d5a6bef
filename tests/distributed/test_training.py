"""The number of ranks changes the order of sums and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranked_runs import ARMS, CRITIC_ROUNDING, state, trained, trainer_for
from ranks import on_ranks
from torch import distributed

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch is without torch.distributed")
CASES = {arm: (2, 3, 4) if arm in ("branch", "two rewards") else (2,) for arm in ARMS}
"""Arm -> the numbers of ranks that it is tried on."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """Every arm on every number of ranks."""

    def work(size: int) -> Callable[[], Any]:
        return lambda: trained({arm: ARMS[arm] for arm, sizes in CASES.items() if size in (1, *sizes)})

    return {
        size: on_ranks(size, work(size), tmp_path_factory.mktemp(f"ranks{size}")) for size in (1, 2, 3, 4)
    }


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_gradients_are_sent_once_per_optimizer_step(size: int, runs: dict[int, list[dict[str, Any]]]) -> None:
    for found in runs[size]:
        # The sums of the optimizer steps' records come on top.
        assert 0 <= found["branch"]["traffic"] - found["branch"]["gradient_bytes"] < 8000


@pytest.mark.parametrize(("arm", "size"), [(arm, size) for arm, sizes in CASES.items() for size in sizes])
def test_a_run_does_not_depend_on_the_number_of_ranks(
    arm: str, size: int, runs: dict[int, list[dict[str, Any]]]
) -> None:
    alone, ranks = runs[1][0][arm], [found[arm] for found in runs[size]]
    assert torch.equal(torch.cat([found["ids"] for found in ranks]), alone["ids"])
    latents = torch.cat([found["latents"] for found in ranks], dim=1)
    if 8 % (2 * size):
        # Parts of other sizes may take another kernel.
        torch.testing.assert_close(latents, alone["latents"], rtol=0, atol=1e-5)
    else:
        assert torch.equal(latents, alone["latents"])
    for found in ranks:
        for kind, close in (("policy", 1e-6), ("critic", CRITIC_ROUNDING.get(arm, 2e-5))):
            torch.testing.assert_close(found[kind], alone[kind], rtol=0, atol=close)
            assert all(map(torch.equal, found[kind], ranks[0][kind]))
        torch.testing.assert_close(found["std"], alone["std"], rtol=1e-5, atol=0)
        assert found["rewards"] == pytest.approx(alone["rewards"], abs=1e-6)
        assert found["history"] == pytest.approx(alone["history"], abs=1e-5)
        assert found["images_made"] == alone["images_made"]
        assert found["evaluation"] == pytest.approx(alone["evaluation"], abs=1e-6)
    torch.testing.assert_close(ranks[0]["images"], alone["images"], rtol=0, atol=1e-4)


SAVED = {"replay": ARMS["replay"], "groups": ARMS["groups"]}


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    def saved() -> None:
        for name, changes in SAVED.items():
            trainer = trainer_for(**changes)
            trainer.train_iteration()
            trainer.save(tmp_path / name)

    def resumed() -> dict[str, Any]:
        found = {}
        for name, changes in SAVED.items():
            trainer, rollouts = trainer_for(**changes), []
            trainer.load(tmp_path / name)
            trainer.train_iteration(rollouts.append)
            found[name] = state(trainer) | {"latents": rollouts[0].latents}
        return found

    on_ranks(4, saved, tmp_path / "4")
    alone = resumed()
    for size in (2, 3):
        ranks = on_ranks(size, resumed, tmp_path / str(size))
        for name, expected in alone.items():
            latents = torch.cat([found[name]["latents"] for found in ranks], dim=1)
            torch.testing.assert_close(latents, expected["latents"], rtol=0, atol=0 if size == 2 else 1e-5)
            torch.testing.assert_close(ranks[0][name]["policy"], expected["policy"], rtol=0, atol=1e-6)
            torch.testing.assert_close(ranks[0][name]["critic"], expected["critic"], rtol=0, atol=2e-5)
