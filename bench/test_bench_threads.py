"""bench.threads at tiny sizes."""

from __future__ import annotations

import pytest
import torch

from bench import machine, threads
from bench.shapes import TINY_LATENT, TINY_POOL, LatentCase, PoolCase
from bench.workloads.workload import WrongResultError

CPU = torch.device("cpu")
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
    found = {"rows": rows, "machine": machine.describe(CPU), "date": "today", "product_speed_up": 1.9}
    shown = threads.table(found)
    assert "| `gaussian_step`, noise drawn | bfloat16 | " in shown
    assert shown.splitlines()[2].count("x |") == 3


def test_other_bits_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def depends_on_threads(count, call, inputs):
        return (torch.tensor(float(count)),)

    monkeypatch.setattr(threads, "with_threads", depends_on_threads)
    with pytest.raises(WrongResultError, match=r"value_pool.*other bits than one"):
        threads.measure(TINY, rounds=1, ops=("value_pool",))


def test_nothing_is_measured_beside_another_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(threads, "product_gain", lambda *, rounds: 1.02)
    monkeypatch.setattr(threads, "measure", lambda *_, **__: pytest.fail("was measured"))
    assert threads.main([]) == 1
    assert "gains 1.02x" in capsys.readouterr().err
