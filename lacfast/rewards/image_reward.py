"""ImageReward: human preference by BLIP and a head, from the published weights in transformers' BLIP.

The authors' own package imports parts of transformers that version 5 no longer has.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lacfast.rewards.model import checkpoint_file, load_exactly, read_weights
from lacfast.rewards.predictor import EncoderAndHead, LinearStack, PredictedScore
from lacfast.rewards.preprocessing import CLIP_MEAN, CLIP_STD, ImagePreprocessing

_MEAN, _STD = 0.16717362830052426, 1.0333394966054072
"""Mean and deviation of the raw score on the authors' data, who report (raw - mean) / std."""
_MAX_TOKENS = 35
_HEAD_DIM = 64
"""Features per attention head, of ViT-L and of BERT alike."""
_VISION_NAMES = (
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"blocks\.(\d+)\.norm1\.", r"encoder.layers.\1.layer_norm1."),
    (r"blocks\.(\d+)\.norm2\.", r"encoder.layers.\1.layer_norm2."),
    (r"blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"norm\.", "post_layernorm."),
)


class _BlipEncoder(nn.Module):
    """The text's first token after it has attended to the image."""

    def __init__(self, vision: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.vision = vision
        self.text = text

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, D) of preprocessed images and tokens (B, L)."""
        image_tokens = self.vision(pixel_values=pixels).last_hidden_state
        tokens: Tensor = self.text(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=image_tokens,
            is_decoder=False,
        ).last_hidden_state
        return tokens[:, 0]


@dataclass(kw_only=True, eq=False)
class ImageReward(PredictedScore):
    """Preference in standard deviations of the authors' data, about -2 to 2 (arXiv 2304.05977)."""

    name: str = "image_reward"
    checkpoint: str | Path = "THUDM/ImageReward"
    """The published weights: a file, or a directory or hub id that holds `filename`."""
    filename: str = "ImageReward.pt"
    tokenizer: str | Path = "google-bert/bert-base-uncased"
    """Directory or hub id of BERT's uncased tokenizer."""
    _tokenizer: Any = field(default=None, init=False, repr=False)
    _preprocess: ImagePreprocessing | None = field(default=None, init=False, repr=False)

    def load(self) -> nn.Module:
        from transformers import AutoTokenizer, BlipTextModel, BlipVisionModel

        path = checkpoint_file(self.checkpoint, self.filename)
        weights = read_weights(path)
        vision_weights = {
            _vision_name(name): weight
            for name, weight in _below(weights, "blip.visual_encoder.", path).items()
        }
        text_weights = _below(weights, "blip.text_encoder.", path)
        # Older versions of BERT store the numbers 0, 1, 2, ... as if they were weights.
        text_weights.pop("embeddings.position_ids", None)
        head_weights = _below(weights, "mlp.", path)
        vision_config, text_config = _configurations(vision_weights, text_weights)
        vision = BlipVisionModel(vision_config)
        text = BlipTextModel(text_config, add_pooling_layer=False)
        head = LinearStack(text_config.hidden_size)
        for network, part in ((vision, vision_weights), (text, text_weights), (head, head_weights)):
            load_exactly(network, {name: weight.float() for name, weight in part.items()}, path)
        self._tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        size = vision_config.image_size
        self._preprocess = ImagePreprocessing(size=size, mean=CLIP_MEAN, std=CLIP_STD)
        return EncoderAndHead(_BlipEncoder(vision, text), head)

    def score(
        self, network: nn.Module, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> Tensor:
        assert isinstance(network, EncoderAndHead)
        assert self._preprocess is not None
        tokens = self._tokenizer(
            prompts, padding="max_length", truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
        ).to(images.device)
        pixels = self._preprocess(images).to(next(network.encoder.parameters()).dtype)
        embeddings = network.encoder(pixels, tokens.input_ids, tokens.attention_mask)
        raw: Tensor = network.head(embeddings)
        return (raw - _MEAN) / _STD


def _below(weights: dict[str, Tensor], prefix: str, path: Path) -> dict[str, Tensor]:
    """The weights under a prefix, without it.

    Raises:
        ValueError: when there is none.
    """
    found = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    if not found:
        raise ValueError(f"{path} is no checkpoint of ImageReward: no weight's name begins with {prefix!r}")
    return found


def _vision_name(name: str) -> str:
    for pattern, replacement in _VISION_NAMES:
        renamed, count = re.subn(rf"^{pattern}", replacement, name)
        if count:
            return renamed
    raise ValueError(f"{name!r} is no weight of BLIP's vision transformer")


def _configurations(vision_weights: dict[str, Tensor], text_weights: dict[str, Tensor]) -> tuple[Any, Any]:
    """BLIP's configurations, with the sizes that the weights have."""
    from transformers import BlipTextConfig, BlipVisionConfig

    patches = vision_weights["embeddings.patch_embedding.weight"]
    vision_width, patch_size = patches.shape[0], patches.shape[-1]
    tokens = vision_weights["embeddings.position_embedding"].shape[1] - 1
    vision = BlipVisionConfig(
        hidden_size=vision_width,
        intermediate_size=vision_weights["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_count(vision_weights, r"encoder\.layers\.(\d+)\."),
        num_attention_heads=vision_width // _HEAD_DIM,
        image_size=patch_size * round(tokens**0.5),
        patch_size=patch_size,
        # BLIP's, which is not transformers' default.
        layer_norm_eps=1e-6,
    )
    vocabulary, text_width = text_weights["embeddings.word_embeddings.weight"].shape
    text = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=text_width,
        encoder_hidden_size=vision_width,
        intermediate_size=text_weights["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_count(text_weights, r"encoder\.layer\.(\d+)\."),
        num_attention_heads=text_width // _HEAD_DIM,
        max_position_embeddings=text_weights["embeddings.position_embeddings.weight"].shape[0],
    )
    return vision, text


def _count(weights: dict[str, Tensor], pattern: str) -> int:
    """Number of layers that the names count."""
    return 1 + max(int(match[1]) for name in weights if (match := re.match(pattern, name)))
