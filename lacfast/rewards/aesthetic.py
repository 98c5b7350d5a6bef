"""LAION's improved aesthetic predictor: how people would rate a picture, from its CLIP embedding alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lacfast.rewards.clip import loaded_completely
from lacfast.rewards.model import checkpoint_file, load_exactly, read_weights
from lacfast.rewards.predictor import EncoderAndHead, LinearStack, PredictedScore
from lacfast.rewards.preprocessing import ImagePreprocessing


@dataclass(kw_only=True, eq=False)
class AestheticScore(PredictedScore):
    """Mean rating of an image, about 1 to 10; the prompt does not matter."""

    name: str = "aesthetic"
    model: str | Path = "openai/clip-vit-large-patch14"
    """Directory or hub id of the transformers CLIPModel that the head was trained on, with its processor."""
    head: str | Path = "trl-lib/ddpo-aesthetic-predictor"
    """The head's weights (sac+logos+ava1-l14-linearMSE): a file, or a directory or hub id with `filename`."""
    filename: str = "aesthetic-model.pth"
    _preprocess: ImagePreprocessing | None = field(default=None, init=False, repr=False)

    def load(self) -> nn.Module:
        from transformers import CLIPModel

        self._preprocess = ImagePreprocessing.from_pretrained(self.model)
        encoder: Any = loaded_completely(CLIPModel, self.model)
        # Not needed to judge a picture, and more than a quarter of the memory.
        del encoder.text_model
        head = LinearStack(encoder.config.projection_dim)
        path = checkpoint_file(self.head, self.filename)
        load_exactly(head, {name: weight.float() for name, weight in read_weights(path).items()}, path)
        return EncoderAndHead(encoder, head)

    def score(
        self, network: nn.Module, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> Tensor:
        assert isinstance(network, EncoderAndHead)
        assert self._preprocess is not None
        encoder: Any = network.encoder
        pooled = encoder.vision_model(pixel_values=self._preprocess(images).to(encoder.dtype)).pooler_output
        embeddings = encoder.visual_projection(pooled).float()
        scores: Tensor = network.head(F.normalize(embeddings, dim=-1))
        return scores
