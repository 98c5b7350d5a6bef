"""Derived seeds are what torch takes for every seed of a config, and what they were for small ones."""

from __future__ import annotations

import pytest
import torch
from refusals import Refusal

from lacfast.config import TrainConfig
from lacfast.seeds import derived_seed, epoch_seed


@pytest.mark.parametrize("seed", [0, 2**40, 2**62])
def test_every_seed_of_a_config_gives_seeds_that_torch_takes(seed: int) -> None:
    TrainConfig(seed=seed)
    drawn = [derived_seed(seed, 299), epoch_seed(seed, 299, 1)]
    for each in drawn:
        torch.tensor([each], dtype=torch.int64)
        torch.Generator().manual_seed(each)
    assert len(set(drawn)) == 2


def test_small_seeds_are_not_taken_modulo_anything() -> None:
    assert derived_seed(7, 3) == 7_000_024
    assert epoch_seed(7, 3, 1) == 7_000_024 * 97 + 1


def test_a_seed_out_of_range_is_refused() -> None:
    with Refusal("seed=-1 must lie in", cause="A seed below 0.", remedy="[0, 4611686018427387904]").raised():
        TrainConfig(seed=-1)
