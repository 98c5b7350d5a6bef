"""How benches run: one thread, tiny sizes unless real ones are asked for, ratios within a round.

pytest bench                            a check of every bench: tiny sizes, nothing compiled, one round
pytest bench --sizes claim              timings at the claim's sizes, torch.compile beside (also: all)
pytest bench -m claim -s                the ratios that are asserted
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import pytest
import torch

from bench import shapes
from bench.interleaved import Provider, race, speed_ups
from bench.workloads import WORKLOADS, verified

torch.set_num_threads(1)

CPU = torch.device("cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sizes", choices=shapes.SELECTIONS, default="tiny", help="cases of bench/shapes.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "claim" in config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="asserts a ratio of speeds: run it with -m claim")
    for item in items:
        if "claim" in item.keywords:
            item.add_marker(skip)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`timed` is every (op, case, dtype, provider) of the sizes that were asked for."""
    if "timed" not in metafunc.fixturenames:
        return
    selection = metafunc.config.getoption("--sizes")
    parameters = []
    for op, entry in WORKLOADS.items():
        for dtype in entry.dtypes:
            # The names alone, which do not depend on the size.
            tiny = shapes.select(entry.kind, "tiny")[0]
            names = entry.build(tiny, dtype, CPU, compiled=selection != "tiny").providers
            for case in shapes.select(entry.kind, selection):
                group = f"{op}, {case}, {str(dtype).removeprefix('torch.')}"
                parameters += [pytest.param((op, case, dtype, name), id=f"{group}, {name}") for name in names]
    metafunc.parametrize("timed", parameters)


@pytest.fixture
def is_smoke(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--sizes") == "tiny")


@pytest.fixture
def report_ratios(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, float]]:
    """report_ratios(title, providers, baseline_of): prints the table, returns each provider's speed-up.

    The speed-up is the median over rounds of baseline / provider within the round.
    """

    def report(
        title: str, providers: dict[str, Provider], baseline_of: Callable[[str], str]
    ) -> dict[str, float]:
        seconds = race(providers)
        ratios = {name: speed_ups(seconds, baseline_of(name))[name] for name in providers}
        with capsys.disabled():
            print(f"\n{title}, {torch.get_num_threads()} thread, interleaved medians")
            for name, times in seconds.items():
                milliseconds = statistics.median(times) * 1e3
                print(f"  {name:<28} {milliseconds:9.3f} ms   {ratios[name]:6.2f}x of {baseline_of(name)}")
        return ratios

    return report


@pytest.fixture
def claimed_ratios(report_ratios: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
    """claimed_ratios(op, dtype): the same for an op at the claim's size, after torch.compile."""

    def ratios(op: str, dtype: torch.dtype) -> dict[str, float]:
        (case,) = shapes.select(WORKLOADS[op].kind, "claim")
        workload = verified(op, case, dtype, compiled=True)
        calls = {name: partial(call, workload.inputs) for name, call in workload.providers.items()}
        return report_ratios(workload.title(), calls, workload.baseline_of)

    return ratios
