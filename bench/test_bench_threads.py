"""bench.threads at tiny sizes."""

from __future__ import annotations

import pytest
import torch

from bench import threads
from bench.shapes import TINY_LATENT, TINY_POOL, LatentCase, PoolCase
from bench.workloads.workload import WrongResultError

TINY = {LatentCase: TINY_LATENT, PoolCase: TINY_POOL}


def test_every_row_has_both_times() -> None:
    rows = threads.measure(TINY, rounds=1, ops=("gaussian_step", "value_pool"))
    assert [(row["op"], row["dtype"]) for row in rows] == [
        ("gaussian_step", "float32"),
        ("gaussian_step", "float32"),
        ("gaussian_step", "bfloat16"),
        ("gaussian_step", "bfloat16"),
        ("value_pool", "float32"),
        ("value_pool", "bfloat16"),
    ]
    assert torch.get_num_threads() == 1
    shown = threads.table({"rows": rows, "label": "a processor", "torch": "2", "date": "today"})
    assert "| `gaussian_step`, noise drawn | bfloat16 | " in shown


def test_other_bits_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def depends_on_threads(count, call, inputs):
        return (torch.tensor(float(count)),)

    monkeypatch.setattr(threads, "with_threads", depends_on_threads)
    with pytest.raises(WrongResultError, match=r"value_pool.*other bits than one"):
        threads.measure(TINY, rounds=1, ops=("value_pool",))
