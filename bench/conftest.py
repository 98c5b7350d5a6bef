"""How benches measure: one thread, and ratios within a round."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch

from bench.interleaved import Provider, race

torch.set_num_threads(1)


@pytest.fixture
def report_ratios(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, float]]:
    """report_ratios(title, providers, baseline): prints the table, returns each provider's speed-up.

    The speed-up is the median over rounds of baseline / provider within the round.
    """

    def report(title: str, providers: dict[str, Provider], baseline: str) -> dict[str, float]:
        seconds = race(providers)
        ratios = {
            name: statistics.median(base / own for base, own in zip(seconds[baseline], times, strict=True))
            for name, times in seconds.items()
        }
        with capsys.disabled():
            print(f"\n{title}, {torch.get_num_threads()} thread, interleaved medians")
            for name, times in seconds.items():
                milliseconds = statistics.median(times) * 1e3
                print(f"  {name:<28} {milliseconds:9.3f} ms   {ratios[name]:6.2f}x of {baseline}")
        return ratios

    return report
