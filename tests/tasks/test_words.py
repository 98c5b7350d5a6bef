"""The words task: pictures that RapidOCR reads, rewards that are its reading, and a run that raises it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import ocr
from lacfast.rewards.ocr import Pixels
from lacfast.rewards.registry import RewardSet
from lacfast.runs.recipes import recipe
from lacfast.runs.train import train
from lacfast.tasks import words
from lacfast.tasks.codec import fit_codec

PROMPTS = words.all_prompts()
TEXTS = [prompt.metadata["text"] for prompt in PROMPTS]
CAPTIONS, METADATA = [prompt.text for prompt in PROMPTS], [prompt.metadata for prompt in PROMPTS]


def pictures(seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(words.draw(PROMPTS, np.random.default_rng(seed)))


def test_words_differ_and_double_no_letter() -> None:
    assert len(set(TEXTS)) == words.NUM_WORDS
    assert {len(text) for text in TEXTS} == {words.LENGTH}
    assert not [text for text in TEXTS if text[0] == text[1] or text[1] == text[2]]
    train_prompts, held_out = words.TASK.split()
    assert (len(train_prompts), len(held_out)) == (240, 60)
    assert not {prompt.text for prompt in train_prompts} & {prompt.text for prompt in held_out}


def test_templates_read_every_picture_at_any_contrast() -> None:
    images = pictures().numpy()
    assert words.read_by_templates(images) == TEXTS
    assert words.read_by_templates(0.5 + 0.2 * (images - 0.5)) == TEXTS
    assert words.read_by_templates(np.full_like(images[:1], 0.8)) == [words.UNKNOWN * words.LENGTH]


def test_the_codec_keeps_pictures_whole() -> None:
    codec = fit_codec(words.TASK)
    assert (codec.decode(codec.encode(pictures())) - pictures()).abs().max() < 1e-3


def test_only_the_line_is_given_to_the_engine() -> None:
    seen: list[tuple[int, ...]] = []

    def engine(pixels: Pixels) -> list[str]:
        seen.append(pixels.shape)
        return ["XAN", "X"]

    wanted = [{"text": "anx"}, {"text": "ant"}]
    images = pictures()[:2]
    assert words.WordsOCR(engine=engine)(images, ["a", "b"], wanted).tolist() == pytest.approx([1, 1 / 3])
    assert words.WordsOCRStrict(engine=engine)(images, ["a", "b"], wanted).tolist() == [0, 0]
    assert seen == [(16, 32, 3)] * 4


def test_rapidocr_reads_the_tasks_own_pictures() -> None:
    pytest.importorskip("rapidocr")
    some = slice(0, 24)
    rewards = RewardSet.create([words.WordsOCR(), words.WordsOCRStrict(), words.words_gold])
    scores = rewards.score(pictures()[some], CAPTIONS[some], METADATA[some])
    assert scores["words_ocr_strict"].mean() >= 0.95
    assert scores["words_ocr"].mean() >= 0.98
    assert scores["words_gold"].tolist() == [1.0] * 24
    flat = torch.full((1, 3, 32, 32), 0.8)
    nothing = rewards.score(flat, CAPTIONS[:1], METADATA[:1])
    assert {name: float(values) for name, values in nothing.items()} == dict.fromkeys(rewards.names, 0.0)


@pytest.mark.slow
def test_ppo_raises_what_the_engine_reads_of_held_out_words(tmp_path: Path) -> None:
    pytest.importorskip("rapidocr")
    settings = recipe("words")
    short = replace(settings.train, iterations=24, eval_every=24, eval_samples=240)
    # The recipe's rate falls over five times as many iterations.
    short = replace(short, ppo=replace(short.ppo, final_learning_rate=None))
    train(replace(settings, out=str(tmp_path / "run"), train=short))
    ocr.record(tmp_path / "run", result=tmp_path / "ocr.json", pictures=tmp_path)
    found = json.loads((tmp_path / "ocr.json").read_text(encoding="utf-8"))
    assert found["curve"][-1] == {"images": 24 * 192, **found["after"]}
    assert 0.4 < found["before"]["words_ocr"] < 0.7
    assert found["after"]["words_ocr"] > found["before"]["words_ocr"] + 0.04
    assert (tmp_path / "words.png").exists()
    assert "| letters that the engine reads |" in ocr.table(found)
