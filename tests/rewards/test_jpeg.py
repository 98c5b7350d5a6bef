"""JPEG rewards measure the file that Pillow writes, in kilobytes."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from lacfast.rewards.image_files import encode_images, to_uint8
from lacfast.rewards.jpeg import jpeg_compressibility, jpeg_incompressibility
from lacfast.rewards.registry import RewardSet
from lacfast.rewards.reward import RewardError

GENERATOR = torch.Generator().manual_seed(0)
FLAT, NOISE = torch.full((3, 64, 64), 0.5), torch.rand(3, 64, 64, generator=GENERATOR)
IMAGES = torch.stack([FLAT, (FLAT + NOISE) / 2, NOISE])


def test_size_is_that_of_a_jpeg_of_quality_95_in_kilobytes() -> None:
    sizes = jpeg_incompressibility(IMAGES, [""] * 3, [{}] * 3)
    for image, size in zip(IMAGES, sizes, strict=True):
        buffer = io.BytesIO()
        levels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(levels).save(buffer, format="JPEG", quality=95)
        assert size.item() == pytest.approx(len(buffer.getvalue()) / 1000)


def test_smoother_images_are_more_compressible() -> None:
    rewards = RewardSet.create({"jpeg_compressibility": 1.0, "jpeg_incompressibility": 0.0})
    scores = rewards.score(IMAGES, [""] * 3, [{}] * 3)
    small = scores["jpeg_compressibility"]
    assert small[0] > small[1] > small[2]
    assert torch.equal(scores["jpeg_incompressibility"], -small)
    assert scores["jpeg_compressibility"].dtype == torch.float32


def test_an_image_of_nan_would_be_the_best_file_and_is_an_error() -> None:
    images = IMAGES.clone()
    images[2] = torch.nan
    alone = jpeg_compressibility(images, [""] * 3, [{}] * 3)
    assert alone[2] == pytest.approx(float(alone[0]), abs=0.01), "black is as small a file as flat grey"
    with pytest.raises(RewardError, match="made NaN or infinity in the images"):
        RewardSet.create("jpeg_compressibility").score(images, [""] * 3, [{}] * 3)


def test_values_outside_the_range_are_clamped_and_others_rounded() -> None:
    images = torch.tensor([-0.5, 1.5, 0.5, 0.499]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert to_uint8(images)[0, :, :, 0].tolist() == [[0, 255], [128, 127]]


def test_a_png_file_keeps_every_bit() -> None:
    (file,) = encode_images(NOISE[None].bfloat16(), image_format="PNG")
    decoded = torch.tensor(list(Image.open(io.BytesIO(file)).tobytes())).reshape(64, 64, 3)
    assert torch.equal(decoded, torch.from_numpy(to_uint8(NOISE[None].bfloat16()))[0].long())


def test_no_image_gives_no_score() -> None:
    assert jpeg_compressibility(torch.zeros(0, 3, 8, 8), [], []).shape == (0,)
