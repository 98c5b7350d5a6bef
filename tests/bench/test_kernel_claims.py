"""What is claimed of the kernels on a CPU is what the recorded tables say."""

from __future__ import annotations

import json

import pytest

from bench import kernel_claims, report

TABLES = sorted(report.RESULTS.glob("kernels-*.json"))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_the_recorded_tables_bear_out_every_claim(path) -> None:
    assert kernel_claims.broken(json.loads(path.read_text(encoding="utf-8"))) == []


def test_a_claim_that_a_table_does_not_bear_out_is_named() -> None:
    result = json.loads(TABLES[-1].read_text(encoding="utf-8"))
    for row in result["rows"]:
        if row["op"] == "gae" and "speed_up" in row:
            row["speed_up"] /= 10
    result["rows"] = [row for row in result["rows"] if row["op"] != "value_pool"]
    slow, absent = kernel_claims.broken(result)[::-1]
    assert slow.startswith("gae, lacfast, float32: 2.4")
    assert absent == "value_pool, lacfast is not in the table"
