"""Codec, text encoder, tiny backbones, pretraining and storage of the shapes task."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from ranks import on_ranks
from refusals import Refusal

from lacfast.distributed import World
from lacfast.tasks.codec import PatchCodec, fit_codec
from lacfast.tasks.models import BackboneName, predict_velocity, tiny_backbone
from lacfast.tasks.pretraining import Pretrained, pretrain
from lacfast.tasks.scenes import BACKGROUND
from lacfast.tasks.shapes import (
    all_prompts,
    ground_truth,
    load_pretrained,
    save_pretrained,
    shapes_gold,
    shapes_strict,
)
from lacfast.tasks.text import WordEncoder, word_encoder

BACKBONES: tuple[BackboneName, ...] = ("dit", "unet")


@pytest.fixture(scope="module")
def codec() -> PatchCodec:
    return fit_codec()


@pytest.fixture(scope="module")
def text() -> WordEncoder:
    return word_encoder(generator=torch.Generator().manual_seed(0))


def embedded(text: WordEncoder, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    embeddings = text.encode(prompts)
    return embeddings["encoder_hidden_states"], embeddings["pooled_projections"]


def velocity_of(pretrained: Pretrained) -> torch.Tensor:
    sample = torch.randn((2, 16, 8, 8), generator=torch.Generator().manual_seed(3))
    tokens, pooled = embedded(pretrained.text, ["two red circles", "a red circle left of a blue square"])
    return predict_velocity(pretrained.model, sample, torch.tensor([1000.0, 250.0]), tokens, pooled)


def strict_after_round_trip(codec: PatchCodec, noise: float) -> tuple[float, float]:
    prompts = all_prompts()
    latents = codec.encode(ground_truth(prompts, seed=1))
    latents += noise * torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    images, metadata = codec.decode(latents), [prompt.metadata for prompt in prompts]
    return shapes_strict(images, [], metadata).mean().item(), shapes_gold(images, [], metadata).mean().item()


def test_the_round_trip_of_ground_truth_obeys_its_prompts(codec: PatchCodec) -> None:
    assert min(strict_after_round_trip(codec, 0.0)) >= 0.97


def test_latents_bear_small_errors(codec: PatchCodec) -> None:
    assert min(strict_after_round_trip(codec, 0.2)) >= 0.97


def test_latents_have_unit_variance(codec: PatchCodec) -> None:
    latents = codec.encode(ground_truth(all_prompts()))
    assert latents.shape == (306, 16, 8, 8)
    assert 0.9 < latents.square().mean().item() < 1.1


def test_the_codec_is_differentiable_and_keeps_its_latents(codec: PatchCodec) -> None:
    latents = codec.encode(ground_truth(all_prompts()[:4]))
    torch.testing.assert_close(codec.encode(codec.decode(latents)), latents, rtol=0, atol=0.4)
    latents.requires_grad_()
    (gradient,) = torch.autograd.grad(codec.decode(latents).sum(), latents)
    assert gradient.abs().sum() > 0


def test_decoding_cuts_at_the_range_and_squeezes_nothing_into_it(codec: PatchCodec) -> None:
    images = codec.decode(5 * torch.randn((2, 16, 8, 8), generator=torch.Generator().manual_seed(4)))
    assert images.shape == (2, 3, 32, 32)
    assert (float(images.min()), float(images.max())) == (0, 1)
    # The empty patch is latent zero.
    assert torch.equal(codec.decode(torch.zeros(1, 16, 8, 8)), torch.full((1, 3, 32, 32), BACKGROUND))


def test_the_codec_is_fitted_the_same_every_time(codec: PatchCodec) -> None:
    assert torch.equal(fit_codec().encoder, codec.encoder)


def test_prompts_become_tokens_and_a_pooled_embedding(text: WordEncoder) -> None:
    tokens, pooled = embedded(text, [prompt.text for prompt in all_prompts()])
    assert tokens.shape == (306, text.length, text.width)
    assert pooled.shape == (306, text.width)


def test_no_two_prompts_share_a_pooled_embedding(text: WordEncoder) -> None:
    _, pooled = embedded(text, [prompt.text for prompt in all_prompts()])
    distances = torch.cdist(pooled.double(), pooled.double()) + 10 * torch.eye(306)
    assert distances.min() > 0.1


def test_an_unknown_word_is_named_with_the_known_ones(text: WordEncoder) -> None:
    with Refusal(
        "unknown word 'purple' in prompt 'a purple circle'",
        cause="A prompt in other words than those of the tiny model's task.",
        remedy="known words: a, above",
    ).raised():
        text.encode(["two red circles", "a purple circle"])


def test_a_prompt_of_too_many_words_is_refused(text: WordEncoder) -> None:
    with Refusal(
        "has 9 words", cause="A long prompt for a tiny model.", remedy="at most 8 are allowed"
    ).raised():
        text.encode(["a red circle left of a blue square square"])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbones_are_diffusers_own_and_small(backbone: BackboneName) -> None:
    model = tiny_backbone(backbone, generator=torch.Generator().manual_seed(0))
    assert isinstance(model, SD3Transformer2DModel | UNet2DConditionModel)
    assert sum(parameter.numel() for parameter in model.parameters()) < 2.5e6


@pytest.mark.parametrize("backbone", BACKBONES)
def test_pretraining_repeats_bit_for_bit_and_leaves_the_global_random_state(backbone: BackboneName) -> None:
    before = torch.get_rng_state()
    first, second = (pretrain(backbone, seed=5, steps=2) for _ in range(2))
    assert first.history == second.history
    assert torch.equal(velocity_of(first), velocity_of(second))
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_share_the_batches_of_one_process(tmp_path: Path) -> None:
    def made() -> tuple[tuple[float, ...], torch.Tensor]:
        found = pretrain("dit", seed=5, steps=3, world=World.current())
        return found.history, velocity_of(found)

    (losses, velocity), *others = on_ranks(3, made, tmp_path)
    assert losses == pytest.approx(pretrain("dit", seed=5, steps=3).history, rel=1e-4)
    assert all(theirs == losses and torch.equal(moves, velocity) for theirs, moves in others)


def test_pretraining_lowers_the_loss() -> None:
    calls: list[tuple[int, int]] = []
    pretrained = pretrain(
        "dit", seed=0, steps=16, progress=lambda step, steps, loss: calls.append((step, steps))
    )
    assert calls == [(step, 16) for step in range(16)]
    assert sum(pretrained.history[-5:]) < 0.9 * sum(pretrained.history[:5])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_saved_backbone_loads_bit_identical(backbone: BackboneName, tmp_path: Path) -> None:
    pretrained = pretrain(backbone, seed=6, steps=1)
    save_pretrained(pretrained, tmp_path / "pretrained")
    before = torch.get_rng_state()
    loaded = load_pretrained(tmp_path / "pretrained")
    assert torch.equal(torch.get_rng_state(), before)
    latents = pretrained.codec.encode(ground_truth(all_prompts()[:4]))
    assert torch.equal(loaded.codec.decode(latents), pretrained.codec.decode(latents))
    assert torch.equal(velocity_of(loaded), velocity_of(pretrained))


def test_loading_an_empty_directory_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model/config\.json in"):
        load_pretrained(tmp_path)


def test_an_unknown_backbone_is_refused() -> None:
    with Refusal(
        "unknown backbone 'vit'", cause="A tiny model that there is not.", remedy="did you mean 'dit'?"
    ).raised():
        pretrain("vit")  # type: ignore[arg-type]


def test_pretraining_for_no_steps_is_refused() -> None:
    with Refusal("steps=0 trains nothing", cause="No step at all.", remedy="give at least 1").raised():
        pretrain("dit", steps=0)
