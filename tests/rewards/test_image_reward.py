"""ImageReward runs the published BLIP weights in transformers, as the authors' own layout would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from lacfast.rewards import image_reward
from lacfast.rewards.image_reward import ImageReward
from lacfast.rewards.predictor import LinearStack
from lacfast.rewards.preprocessing import ImagePreprocessing

WIDTH, HEADS, SIZE, PATCH = 128, 2, 32, 16
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "two", "dogs"]
PREPARE = ImagePreprocessing(
    size=SIZE, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
)


class Block(nn.Module):
    """A block of the vision transformer with the published names."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(WIDTH, 3 * WIDTH), "proj": nn.Linear(WIDTH, WIDTH)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(WIDTH, 256), "fc2": nn.Linear(256, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + self.attn["proj"](attended)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, WIDTH))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, WIDTH, PATCH, PATCH)})
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(pixels), 1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)  # type: ignore[no-any-return]


class Published:
    """Networks with random weights and their checkpoint in the published layout."""

    def __init__(self, directory: Path) -> None:
        torch.manual_seed(0)
        self.vision = Vision().eval()
        config = transformers.BlipTextConfig(
            vocab_size=len(WORDS), hidden_size=WIDTH, encoder_hidden_size=WIDTH, intermediate_size=256,
            num_hidden_layers=2, num_attention_heads=HEADS, max_position_embeddings=40,
            bos_token_id=2, sep_token_id=3,
        )  # fmt: skip
        self.text = transformers.BlipTextModel(config, add_pooling_layer=False).eval()
        self.head = LinearStack(WIDTH)
        weights: dict[str, Tensor] = {"blip.vision_proj.weight": torch.zeros(2, 2)}
        parts = {"blip.visual_encoder.": self.vision, "blip.text_encoder.": self.text, "mlp.": self.head}
        for prefix, network in parts.items():
            for parameter in network.parameters():
                parameter.data += 0.05 * torch.randn_like(parameter)
            weights |= {prefix + name: weight for name, weight in network.state_dict().items()}
        weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
        self.weights = weights
        self.directory = directory
        torch.save(weights, directory / "ImageReward.pt")
        (directory / "vocab.txt").write_text("\n".join(WORDS) + "\n")
        (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')

    def expected(self, images: Tensor, tokens: Any) -> Tensor:
        with torch.no_grad():
            states = self.text(
                **tokens, encoder_hidden_states=self.vision(PREPARE(images)), is_decoder=False
            ).last_hidden_state
            return (self.head(states[:, 0]) - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return Published(tmp_path_factory.mktemp("image_reward"))


def test_scores_are_those_of_the_published_layout(published: Published) -> None:
    images = torch.rand(2, 3, 40, 36, generator=torch.Generator().manual_seed(0))
    directory = published.directory
    reward = ImageReward(checkpoint=directory, tokenizer=directory)
    scores = reward(images, ["a cat", "two dogs a cat"], [{}, {}])
    identifiers = torch.zeros(2, 35, dtype=torch.long)
    identifiers[0, :4] = torch.tensor([2, 5, 6, 3])
    identifiers[1, :6] = torch.tensor([2, 7, 8, 5, 6, 3])
    tokens = {"input_ids": identifiers, "attention_mask": (identifiers > 0).long()}
    assert torch.allclose(scores, published.expected(images, tokens), atol=1e-5)
    assert scores[0] != scores[1]


def test_sizes_are_read_from_the_weights(published: Published) -> None:
    reward = ImageReward(checkpoint=published.directory, tokenizer=published.directory)
    network: Any = reward.load()
    vision, text = network.encoder.vision.config, network.encoder.text.config
    assert (vision.image_size, vision.patch_size, vision.num_hidden_layers) == (SIZE, PATCH, 2)
    assert (vision.num_attention_heads, text.num_attention_heads) == (HEADS, HEADS)
    assert vision.layer_norm_eps == 1e-6


def test_another_checkpoint_is_refused(published: Published, tmp_path: Path) -> None:
    torch.save({"mlp.layers.0.weight": torch.zeros(1)}, tmp_path / "ImageReward.pt")
    with pytest.raises(
        ValueError, match=r"no checkpoint of ImageReward: no weight's name begins with 'blip\."
    ):
        ImageReward(checkpoint=tmp_path).load()
    with pytest.raises(ValueError, match="'head' is no weight of BLIP's vision transformer"):
        image_reward._vision_name("head")


def test_a_checkpoint_is_read_without_running_its_code(tmp_path: Path) -> None:
    path = tmp_path / "ImageReward.pt"
    torch.save({"blip": Path("code")}, path)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        ImageReward(checkpoint=path).load()
