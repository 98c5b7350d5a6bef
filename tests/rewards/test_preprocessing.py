"""Images are prepared on tensors as transformers' own processor prepares them through Pillow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_clip import IMAGE_SIZE, PilProcessor, save_tiny_clip

from lacfast.rewards.image_files import to_uint8
from lacfast.rewards.preprocessing import ImagePreprocessing

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Pillow filters in fixed point, torch in float32: between two levels of 255 they may round differently, in
# the pass over rows and again in the pass over columns. Normalisation makes 1/255/std of a level.
TWO_LEVELS = 2.01 / 255 / min(STD)


def smooth_images(height: int, width: int) -> torch.Tensor:
    """Random images with edges, such as resizing sees them: noise that is enlarged, and a bar."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    noise = torch.rand(2, 3, 12, 12, generator=generator)
    images = torch.nn.functional.interpolate(noise, (height, width), mode="nearest")
    images[:, :, :, width // 3 : width // 2] = 1.0
    return images


@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (97, 61), (60, 111), (20, 24)])
def test_crop_agrees_with_the_clip_processor_to_two_levels(tmp_path: Path, shape: tuple[int, int]) -> None:
    save_tiny_clip(tmp_path, weights=False)
    images = smooth_images(*shape)
    pictures = [Image.fromarray(pixels) for pixels in to_uint8(images)]
    expected = PilProcessor.from_pretrained(tmp_path)(pictures, return_tensors="pt")["pixel_values"]
    ours = ImagePreprocessing.from_pretrained(tmp_path)(images)
    assert ours.shape == expected.shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
    difference = (ours - expected).abs()
    assert difference.max() <= TWO_LEVELS
    # Nearly everywhere it is none.
    assert (difference > 1e-5).float().mean() < 0.1


def test_stretch_agrees_with_a_processor_for_squares() -> None:
    size = {"height": 24, "width": 24}
    processor = PilProcessor(size=size, do_center_crop=False, resample=2, image_mean=[0.5] * 3)
    images = smooth_images(50, 33)
    pictures = [Image.fromarray(pixels) for pixels in to_uint8(images)]
    expected = processor(pictures, return_tensors="pt")["pixel_values"]
    ours = ImagePreprocessing.from_processor(processor)
    assert (ours.fit, ours.interpolation) == ("stretch", "bilinear")
    assert (ours(images) - expected).abs().max() <= TWO_LEVELS


def test_pad_keeps_the_whole_image_between_black_bars() -> None:
    prepare = ImagePreprocessing(size=16, mean=(0, 0, 0), std=(1, 1, 1), fit="pad", round_resized=False)
    prepared = prepare(torch.ones(1, 3, 20, 40))
    assert prepared.shape == (1, 3, 16, 16)
    assert torch.equal(prepared[0, 0, :, 0] > 0.5, torch.tensor([False] * 4 + [True] * 8 + [False] * 4))
    assert torch.allclose(prepared[:, :, 4:12], torch.ones(1, 3, 8, 16))


def test_rows_do_not_depend_on_their_batch() -> None:
    prepare = ImagePreprocessing(size=16, mean=MEAN, std=STD)
    images = smooth_images(40, 50)
    assert torch.equal(prepare(images)[1:], prepare(images[1:]))


@pytest.mark.parametrize(
    "settings",
    [
        {"resample": 0},
        {"do_normalize": False},
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 16, "width": 16}},
        {"size": {"height": 32, "width": 16}, "do_center_crop": False},
    ],
)
def test_a_processor_that_does_something_else_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="the image processor resizes to"):
        ImagePreprocessing.from_processor(PilProcessor(**settings))


@pytest.mark.parametrize(
    ("settings", "message"), [({"fit": "zoom"}, "fit 'zoom'"), ({"interpolation": "lanczos"}, "'lanczos'")]
)
def test_unknown_settings_list_the_known(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImagePreprocessing(size=16, mean=MEAN, std=STD, **settings)  # type: ignore[arg-type]
