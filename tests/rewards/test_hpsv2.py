"""HPSv2 runs an open_clip checkpoint in transformers: the same numbers as open_clip's own layout gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny_clip import IMAGE_SIZE, VOCABULARY, save_tiny_clip
from torch import Tensor, nn

from lacfast.rewards.hpsv2 import PREPROCESSING, HPSv2, from_open_clip
from lacfast.rewards.preprocessing import ImagePreprocessing

PREPARE = ImagePreprocessing(
    size=IMAGE_SIZE, mean=PREPROCESSING.mean, std=PREPROCESSING.std, fit="pad", round_resized=False
)
PROMPTS = ["a cat", "two dogs", "a"]


class Block(nn.Module):
    """A transformer block with open_clip's names: (..., fused query, key and value)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, hidden), "c_proj": nn.Linear(hidden, width)})

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class OpenCLIP(nn.Module):
    """What open_clip computes for a vision transformer with a text model, in its layout."""

    def __init__(self) -> None:
        super().__init__()
        visual: Any = nn.Module()
        visual.class_embedding = nn.Parameter(torch.zeros(32))
        visual.positional_embedding = nn.Parameter(torch.zeros(17, 32))
        visual.proj = nn.Parameter(torch.zeros(32, 16))
        visual.conv1 = nn.Conv2d(3, 32, 8, 8, bias=False)
        visual.ln_pre, visual.ln_post = nn.LayerNorm(32), nn.LayerNorm(32)
        visual.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(Block(32, 64) for _ in range(2))})
        self.visual = visual
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(Block(24, 48) for _ in range(2))})
        self.token_embedding = nn.Embedding(len(VOCABULARY), 24)
        self.positional_embedding = nn.Parameter(torch.zeros(16, 24))
        self.ln_final = nn.LayerNorm(24)
        self.text_projection = nn.Parameter(torch.zeros(24, 16))
        self.logit_scale = nn.Parameter(torch.tensor(4.0))
        for parameter in self.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)

    def similarity(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        visual: Any = self.visual
        patches = visual.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(len(pixels), 1, -1), patches], dim=1)
        x = visual.ln_pre(x + visual.positional_embedding)
        for block in visual.transformer["resblocks"]:
            x = block(x, None)
        image = visual.ln_post(x[:, 0]) @ visual.proj
        length = tokens.shape[1]
        y = self.token_embedding(tokens) + self.positional_embedding[:length]
        causal = torch.full((length, length), -torch.inf).triu(1)
        for block in self.transformer["resblocks"]:  # type: ignore[union-attr]
            y = block(y, causal)
        last = y[torch.arange(len(y)), tokens.argmax(dim=-1)]
        return F.cosine_similarity(image, self.ln_final(last) @ self.text_projection)


@pytest.fixture(scope="module")
def open_clip() -> OpenCLIP:
    torch.manual_seed(0)
    return OpenCLIP().eval()


@pytest.fixture
def saved(open_clip: OpenCLIP, tmp_path: Path) -> Path:
    save_tiny_clip(tmp_path, weights=False)
    torch.save({"epoch": 1, "state_dict": open_clip.state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    return tmp_path


def test_scores_are_those_of_the_open_clip_layout(open_clip: OpenCLIP, saved: Path) -> None:
    images = torch.rand(3, 3, 48, 40, generator=torch.Generator().manual_seed(0))
    scores = HPSv2(model=saved, checkpoint=saved, preprocessing=PREPARE)(images, PROMPTS, [{}] * 3)
    tokens = transformers.AutoTokenizer.from_pretrained(saved)(
        PROMPTS, padding="max_length", max_length=16, return_tensors="pt"
    )["input_ids"]
    with torch.no_grad():
        expected = open_clip.similarity(PREPARE(images), tokens)
    assert expected.std() > 0.01
    # Float32 through two blocks each.
    assert torch.allclose(scores, expected, atol=2e-6)


def test_weights_in_half_precision_and_as_safetensors_are_read(open_clip: OpenCLIP, saved: Path) -> None:
    from safetensors.torch import save_file

    save_file(
        {name: weight.half() for name, weight in open_clip.state_dict().items()}, saved / "h.safetensors"
    )
    images = torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    half = HPSv2(model=saved, checkpoint=saved / "h.safetensors", preprocessing=PREPARE)
    exact = HPSv2(model=saved, checkpoint=saved, preprocessing=PREPARE)
    difference = half(images, ["a"], [{}]) - exact(images, ["a"], [{}])
    # Half precision keeps eleven bits.
    assert 0 < difference.abs() < 5e-3


@pytest.mark.parametrize("name", ["visual.attnpool.c_proj.weight", "transformer.resblocks.0.ls_1.gamma"])
def test_weights_of_other_architectures_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is no weight of an open_clip"):
        from_open_clip({name: torch.zeros(1)})


def test_published_preprocessing_is_that_of_vit_h() -> None:
    assert HPSv2().preprocessing == PREPROCESSING
    assert (PREPROCESSING.size, PREPROCESSING.fit) == (224, "pad")
