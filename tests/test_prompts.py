"""Prompts come in an order that the seed and the iteration decide alone."""

from __future__ import annotations

import pytest

from lacfast.prompts import PromptSet

PROMPTS = PromptSet.create([f"prompt {index}" for index in range(7)])


def test_every_prompt_is_drawn_once_per_pass() -> None:
    drawn = [text for iteration in range(7) for text in PROMPTS.draw(3, seed=0, iteration=iteration).texts]
    for start in range(0, 21, 7):
        assert sorted(drawn[start : start + 7]) == PROMPTS.texts
    assert drawn[:7] != drawn[7:14]


def test_a_draw_depends_on_seed_and_iteration_only() -> None:
    assert PROMPTS.draw(5, seed=1, iteration=4) == PROMPTS.draw(5, seed=1, iteration=4)
    assert PROMPTS.draw(5, seed=1, iteration=4) != PROMPTS.draw(5, seed=2, iteration=4)


def test_repeats_stand_side_by_side() -> None:
    texts = PROMPTS.draw(2, seed=0, iteration=0, repeats=3).texts
    assert len(texts) == 6
    assert texts[0] == texts[1] == texts[2] != texts[3]


def test_metadata_travels_with_its_prompt() -> None:
    class Entry:
        text, metadata = "a", {"kind": "x"}

    assert PromptSet.create([Entry()]).draw(2, seed=0, iteration=0).metadata == [{"kind": "x"}] * 2


def test_no_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no prompt"):
        PromptSet.create([])
