"""Embedded tasks with larger pictures: both judges see what was drawn, and models of their size learn it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from lacfast.backbones import adapt_pretrained
from lacfast.config import SamplerConfig
from lacfast.tasks import glyphs, scenes
from lacfast.tasks.models import SMALL, TINY, BackboneName, ModelSize, tiny_backbone
from lacfast.tasks.pretraining import PretrainConfig, pretrain
from lacfast.tasks.shapes import shapes_gold, shapes_strict
from lacfast.tasks.task import Task, scale_of

Made = Callable[[int], Task]


@pytest.mark.parametrize("made", [scenes.task, glyphs.task], ids=["shapes", "glyphs"])
@pytest.mark.parametrize("scale", [1, 2, 3])
def test_both_judges_accept_the_ground_truth_of_every_size(made: Made, scale: int) -> None:
    task = made(scale)
    prompts = task.prompts()[::7]
    images = torch.from_numpy(task.draw(prompts, np.random.default_rng(0)))
    assert images.shape[1:] == (3, task.image_size, task.image_size) == (3, 32 * scale, 32 * scale)
    judges = (
        (shapes_strict, shapes_gold) if made is scenes.task else (glyphs.glyphs_strict, glyphs.glyphs_gold)
    )
    metadata = [prompt.metadata for prompt in prompts]
    for judge in judges:
        assert bool((judge(images, [prompt.text for prompt in prompts], metadata) == 1).all())
    # Of other prompts the same pictures are wrong.
    moved = [*metadata[1:], metadata[0]]
    assert float(judges[0](images, [prompt.text for prompt in prompts], moved).mean()) < 0.2


def test_a_larger_picture_is_the_same_scene() -> None:
    small, large = (
        torch.from_numpy(scenes.task(scale).draw(scenes.TASK.prompts()[:20], np.random.default_rng(3)))
        for scale in (1, 2)
    )
    shrunk = torch.nn.functional.avg_pool2d(large, 2)
    torch.testing.assert_close(shrunk, small, rtol=0, atol=0.02)


@pytest.mark.parametrize("shape", [(2, 3, 32, 64), (2, 3, 48, 48), (2, 1, 64, 64), (2, 3, 16, 16)])
def test_pictures_of_no_scale_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="or a multiple of that size"):
        scale_of(np.zeros(shape, dtype=np.float32))


@pytest.mark.parametrize(("name", "parameters"), [("dit", 7_776_256), ("unet", 3_965_136)])
def test_the_model_for_a_gpu_is_larger(name: BackboneName, parameters: int) -> None:
    sizes = [
        sum(
            parameter.numel()
            for parameter in tiny_backbone(name, generator=torch.Generator(), size=size).parameters()
        )
        for size in (TINY, SMALL)
    ]
    assert sizes[1] == parameters > 3 * sizes[0]


def test_a_model_of_another_size_is_pretrained_and_sampled() -> None:
    size = ModelSize(image_size=64, num_layers=1, num_heads=2)
    recipe = PretrainConfig(steps=2, batch_size=4, pictures_per_prompt=1)
    backbone = adapt_pretrained(pretrain("dit", scenes.task(2), size=size, config=recipe))
    assert backbone.latent_shape == (16, 16, 16)
    assert backbone.transition_table(SamplerConfig(num_steps=2)).num_steps == 2
    assert backbone.decode(torch.zeros(1, 16, 16, 16)).shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="a model of 32 pixels cannot learn the task 'shapes-64' of 64"):
        pretrain("dit", scenes.task(2), size=TINY)
