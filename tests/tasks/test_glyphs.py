"""The glyphs task: words, pictures and both readers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lacfast.tasks import glyphs
from lacfast.tasks.codec import fit_codec
from lacfast.tasks.pretraining import pretrain
from lacfast.tasks.storage import load_pretrained, save_pretrained

PROMPTS = glyphs.all_prompts()
WORDS = [prompt.metadata["word"] for prompt in PROMPTS]
METADATA = [prompt.metadata for prompt in PROMPTS]


def pictures(seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(glyphs.draw(PROMPTS, np.random.default_rng(seed)))


def test_there_are_a_hundred_different_words_of_each_length() -> None:
    assert len(set(WORDS)) == 300
    assert [sum(len(word) == length for word in WORDS) for length in (2, 3, 4)] == [100, 100, 100]


def test_the_split_holds_out_twenty_of_each_length() -> None:
    train, held_out = glyphs.TASK.split()
    assert len(train) == 240
    assert [sum(p.metadata["kind"] == f"{n} letters" for p in held_out) for n in (2, 3, 4)] == [20, 20, 20]
    assert not {p.text for p in train} & {p.text for p in held_out}


@pytest.mark.parametrize("reader", [glyphs.read, glyphs.read_gold])
def test_both_readers_read_every_picture(reader: Any) -> None:
    assert reader(pictures().numpy()) == WORDS


@pytest.mark.parametrize("reader", [glyphs.read, glyphs.read_gold])
def test_nothing_is_read_where_nothing_is_written(reader: Any) -> None:
    assert reader(np.full((2, 3, 32, 32), glyphs.BACKGROUND, dtype=np.float32)) == ["", ""]


@pytest.mark.parametrize("reader", [glyphs.read, glyphs.read_gold])
def test_ink_that_is_no_letter_is_unknown(reader: Any) -> None:
    image = np.full((1, 3, 32, 32), glyphs.BACKGROUND, dtype=np.float32)
    image[:, :, :16, :16] = glyphs.INK
    assert reader(image) == [glyphs.UNKNOWN]


def test_a_missing_letter_between_letters_is_a_space() -> None:
    image = glyphs.render("tea", np.random.default_rng(0))[None]
    image[:, :, :16, 16:] = glyphs.BACKGROUND
    assert glyphs.read(image) == ["t a"]


def test_the_reward_is_one_less_the_edit_distance_per_letter() -> None:
    images = torch.from_numpy(glyphs.render("tea", np.random.default_rng(0))).expand(4, -1, -1, -1)
    wanted = [{"word": word} for word in ("tea", "ten", "teacher", "x" * 40)]
    assert glyphs.glyphs_reward(images, [], wanted).tolist() == pytest.approx([1, 2 / 3, 3 / 7, 0])
    assert glyphs.glyphs_strict(images, [], wanted).tolist() == [1, 0, 0, 0]


def test_the_codec_keeps_grey_pictures_whole() -> None:
    codec = fit_codec(glyphs.TASK)
    assert (codec.decode(codec.encode(pictures())) - pictures()).abs().max() < 1e-3


def test_a_model_is_pretrained_on_the_task_and_loads_again(tmp_path: Any) -> None:
    pretrained = pretrain("dit", glyphs.TASK, steps=2)
    assert set(pretrained.text.words) == {"write", *glyphs.FONT}
    save_pretrained(pretrained, tmp_path)
    tokens = load_pretrained(tmp_path).text.encode(["write t e a"])["encoder_hidden_states"]
    assert torch.equal(tokens, pretrained.text.encode(["write t e a"])["encoder_hidden_states"])
