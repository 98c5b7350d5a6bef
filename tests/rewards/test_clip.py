"""CLIP-based rewards give what transformers' own model and processor give, loaded from a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from refusals import Refusal
from tiny_clip import IMAGE_SIZE, PilProcessor, save_tiny_clip
from tolerances import assert_same_sum
from torch import Tensor

from lacfast.rewards.aesthetic import AestheticScore
from lacfast.rewards.clip import CLIPScore, PickScore
from lacfast.rewards.image_files import to_uint8
from lacfast.rewards.model import load_exactly
from lacfast.rewards.predictor import LinearStack

PROMPTS = ["a cat", "two dogs", "a cat", "a longer prompt than the model reads 12"]
IMAGES = torch.rand(4, 3, 40, 48, generator=torch.Generator().manual_seed(3))
METADATA: list[dict[str, Any]] = [{}] * 4
# Images may differ by one level of 255 from Pillow's (see test_rewards_preprocessing), in few pixels.
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


def logits(clip: Path) -> Tensor:
    """(B,) exp(logit_scale) cos(image, prompt) by transformers alone."""
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    pictures = [Image.fromarray(pixels) for pixels in to_uint8(IMAGES)]
    pixels = PilProcessor.from_pretrained(clip)(pictures, return_tensors="pt")
    tokens = transformers.AutoTokenizer.from_pretrained(clip)(
        PROMPTS, padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        return model(**tokens, **pixels).logits_per_image.diag()


def test_pickscore_is_the_models_own_logit(clip: Path) -> None:
    scores = PickScore(model=clip, processor=clip)(IMAGES, PROMPTS, METADATA)
    expected = logits(clip)
    assert expected.std() > 1
    assert torch.allclose(scores, expected, atol=100 * TOLERANCE)


def test_clip_score_is_the_cosine_times_two_and_a_half(clip: Path) -> None:
    scores = CLIPScore(model=clip)(IMAGES, PROMPTS, METADATA)
    assert torch.allclose(scores, 2.5 * (logits(clip) / 100).clamp(min=0), atol=2.5 * TOLERANCE)


@pytest.mark.isa
def test_scores_do_not_depend_on_the_batch_size(clip: Path) -> None:
    whole = PickScore(model=clip, processor=clip)(IMAGES, PROMPTS, METADATA)
    parts = PickScore(model=clip, processor=clip, batch_size=3)(IMAGES, PROMPTS, METADATA)
    # A cosine times 100.
    assert_same_sum(parts, whole, unit=100)


def test_bfloat16_keeps_the_order_of_the_scores(clip: Path) -> None:
    exact = PickScore(model=clip, processor=clip)(IMAGES, PROMPTS, METADATA)
    half = PickScore(model=clip, processor=clip, dtype=torch.bfloat16)(IMAGES, PROMPTS, METADATA)
    assert half.dtype == torch.float32
    # Eight bits of mantissa through four layers: about one percent of the scale of 100.
    assert torch.allclose(half, exact, atol=2.0)
    assert not torch.equal(half, exact)


def test_nothing_is_loaded_before_the_first_call_and_nothing_twice(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[int] = []
    original = PickScore.load_clip
    monkeypatch.setattr(PickScore, "load_clip", lambda self: (loads.append(1), original(self))[1])
    reward = PickScore(model=clip, processor=clip, offload=True)
    assert loads == []
    first = reward(IMAGES, PROMPTS, METADATA)
    assert torch.equal(reward(IMAGES, PROMPTS, METADATA), first)
    assert loads == [1]
    reward.unload()
    assert torch.equal(reward(IMAGES, PROMPTS, METADATA), first)
    assert loads == [1, 1]


def test_a_callers_autocast_and_gradients_do_not_reach_the_network(clip: Path) -> None:
    reward = PickScore(model=clip, processor=clip)
    expected = reward(IMAGES, PROMPTS, METADATA)
    with torch.autocast("cpu", torch.bfloat16):
        scores = reward(IMAGES.clone().requires_grad_(), PROMPTS, METADATA)
    assert torch.equal(scores, expected)
    assert not scores.requires_grad


def test_a_checkpoint_without_some_weights_is_refused(clip: Path, tmp_path: Path) -> None:
    save_tiny_clip(tmp_path, weights=False)
    vision = transformers.CLIPModel.from_pretrained(clip).vision_model
    weights = {f"vision_model.{name}": weight for name, weight in vision.state_dict().items()}
    transformers.CLIPModel.from_pretrained(clip).save_pretrained(tmp_path, state_dict=weights)
    with Refusal(
        "is no CLIPModel: it lacks ['logit_scale'",
        cause="A reward's model whose directory has not all of its weights.",
        remedy="pass the directory of a whole model",
    ).raised():
        PickScore(model=tmp_path, processor=clip)(IMAGES, PROMPTS, METADATA)


@pytest.mark.parametrize(
    ("images", "prompts"), [(IMAGES[:2], PROMPTS), (IMAGES[0], PROMPTS), (IMAGES[:, :1], PROMPTS)]
)
def test_images_that_do_not_fit_are_refused_before_loading(images: Tensor, prompts: list[str]) -> None:
    with Refusal(
        "reward 'pickscore' got images of shape (",
        cause="Images and prompts of different numbers, or images that are none.",
        remedy="give one (3, H, W) image in [0, 1] per prompt",
    ).raised():
        PickScore(model="nowhere")(images, prompts, METADATA)


def test_unusable_settings_are_refused() -> None:
    with Refusal(
        "batch_size=0 scores nothing",
        cause="A reward model that takes no image.",
        remedy="use 1 or more",
    ).raised():
        PickScore(batch_size=0)
    with Refusal(
        "dtype='half' is unknown",
        cause="A dtype's name in the place of torch's.",
        remedy="use 'auto' or a torch.dtype",
    ).raised():
        PickScore(dtype="half")


def test_aesthetic_score_is_the_head_on_the_unit_embedding(clip: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    head = LinearStack(16)
    torch.save(head.state_dict(), tmp_path / "aesthetic-model.pth")
    images = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    scores = AestheticScore(model=clip, head=tmp_path)(images, ["", "x"], [{}, {}])
    model: Any = transformers.CLIPModel.from_pretrained(clip).eval()
    pictures = [Image.fromarray(pixels) for pixels in to_uint8(images)]
    pixels = PilProcessor.from_pretrained(clip)(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        embeddings = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        expected = head(embeddings / embeddings.norm(dim=-1, keepdim=True))
    # Images of the model's own size are not resized, so nothing is rounded differently.
    assert torch.allclose(scores, expected, atol=1e-6)
    assert scores.std() > 1e-4


def test_the_heads_weights_have_their_published_names_and_stay_in_float32(clip: Path, tmp_path: Path) -> None:
    head = LinearStack(16)
    published = {f"layers.{index}.{kind}" for index in (0, 2, 4, 6, 7) for kind in ("weight", "bias")}
    assert set(head.state_dict()) == published
    torch.save(head.state_dict(), tmp_path / "head.pth")
    reward = AestheticScore(model=clip, head=tmp_path / "head.pth", dtype=torch.bfloat16)
    reward(IMAGES, PROMPTS, METADATA)
    network: Any = reward._network
    assert network.encoder.dtype == torch.bfloat16
    assert {weight.dtype for weight in network.head.parameters()} == {torch.float32}


def test_weights_of_another_model_are_refused(clip: Path, tmp_path: Path) -> None:
    torch.save(LinearStack(8).state_dict(), tmp_path / "head.pth")
    with Refusal(
        "head.pth does not fit LinearStack",
        cause="Weights of another network for a reward's head.",
        remedy="pass the weights of that network",
    ).raised():
        AestheticScore(model=clip, head=tmp_path / "head.pth")(IMAGES, PROMPTS, METADATA)
    with Refusal(
        "there is no 'aesthetic-model.pth' in",
        cause="A directory without the weights of a reward's head.",
        remedy="pass the file itself",
    ).raised():
        AestheticScore(model=clip, head=tmp_path)(IMAGES, PROMPTS, METADATA)
    with pytest.raises(ValueError, match="Missing key"):
        load_exactly(LinearStack(8), {}, "here")
