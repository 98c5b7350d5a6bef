"""Pictures of a run: grids of images, rows of a video's frames, and videos that play."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lacfast.report.pictures import (
    GRID_IMAGES,
    Gallery,
    comparison,
    contact_sheet,
    prompts_of,
    save_sample,
    save_with_prompts,
    shown_in_sheet,
    to_image,
)
from lacfast.rewards.image_files import to_uint8

VIDEOS = torch.rand(3, 5, 3, 100, 120, generator=torch.Generator().manual_seed(0))


def test_the_frames_of_a_video_are_a_row() -> None:
    sheet = np.asarray(contact_sheet(VIDEOS[:2, :3]))
    assert sheet.shape == (2 * 102 + 2, 3 * 122 + 2, 4)
    assert np.array_equal(sheet[104:204, 124:244, :3], to_uint8(VIDEOS[1, 1:2])[0])
    videos = torch.zeros(50, 4, 3, 100, 100)
    assert contact_sheet(videos).size == (4 * 102 + 2, (GRID_IMAGES // 4) * 102 + 2)
    assert [shown_in_sheet(each) for each in (videos, videos[:, 0])] == [GRID_IMAGES // 4, GRID_IMAGES]
    long = contact_sheet(torch.zeros(2, GRID_IMAGES + 1, 3, 100, 100))
    assert long.size == ((GRID_IMAGES + 1) * 102 + 2, 104)


def test_a_grid_with_its_prompts_is_whole_or_not_there(tmp_path: Path) -> None:
    class Cut(Image.Image):
        def save(self, fp: Any, format: str | None = None, **params: Any) -> None:  # noqa: A002 - Pillow's name
            Path(fp).write_bytes(b"half")
            raise OSError("the disk is full")

    save_with_prompts(to_image(VIDEOS[0, 0]), tmp_path / "00000000.png", ["a cat"])
    with pytest.raises(OSError, match="full"):
        save_with_prompts(Cut(), tmp_path / "00000000.png", ["a dog"])
    with Image.open(tmp_path / "00000000.png") as found:
        assert prompts_of(found) == ["a cat"]


def test_an_image_is_a_png_and_a_video_plays(tmp_path: Path) -> None:
    image = save_sample(VIDEOS[0, 0], tmp_path / "00000")
    assert image == tmp_path / "00000.png"
    with Image.open(image) as found:
        assert np.array_equal(np.asarray(found), np.asarray(to_image(VIDEOS[0, 0])))
    # Smooth frames, for the file is lossy.
    ramp = torch.linspace(0, 1, 4).view(4, 1, 1, 1).expand(4, 3, 32, 48)
    video = save_sample(ramp, tmp_path / "00001")
    assert video == tmp_path / "00001.webp"
    with Image.open(video) as found:
        assert found.n_frames == 4
        assert found.size == (48, 32)
        for number in range(4):
            found.seek(number)
            mean = np.asarray(found.convert("RGB")).mean() / 255
            assert abs(mean - number / 3) < 0.02
        assert found.info["duration"] == 62


def test_a_prompt_that_names_prices_is_no_formula() -> None:
    gallery = Gallery(["a $5_x and a $6^2"], {"before": (torch.zeros(1, 3, 4, 4), torch.ones(1))})
    figure = comparison(gallery)
    (axis,) = figure.axes
    assert axis.title.get_text() == "a $5_x and a\n$6^2"
    # What draws it, instead of a formula.
    assert axis.title._preprocess_math(axis.title.get_text())[1] is False
