"""Text and image embeddings of a CLIP model in transformers: what the CLIP-based rewards are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lacfast.rewards.model import ModelReward
from lacfast.rewards.preprocessing import ImagePreprocessing
from lacfast.transfer import to_device


@dataclass(kw_only=True, eq=False)
class CLIPReward(ModelReward):
    """A reward of the similarity of a CLIP model's embeddings of image and prompt."""

    model: str | Path
    """Directory or hub id of a transformers CLIPModel."""
    processor: str | Path = "same"
    """Directory or hub id of its tokenizer and image processor; "same" is `model`."""
    preprocessing: ImagePreprocessing | str = "own"
    """"own": what the image processor of `processor` does."""
    _tokenizer: Any = field(default=None, init=False, repr=False)
    _preprocess: ImagePreprocessing | None = field(default=None, init=False, repr=False)
    _logit_scale: float = field(default=1.0, init=False, repr=False)

    def load(self) -> nn.Module:
        from transformers import AutoTokenizer

        origin = self.model if self.processor == "same" else self.processor
        self._tokenizer = AutoTokenizer.from_pretrained(origin)
        self._preprocess = (
            self.preprocessing
            if isinstance(self.preprocessing, ImagePreprocessing)
            else ImagePreprocessing.from_pretrained(origin)
        )
        network: Any = self.load_clip()
        # Read before the network becomes bfloat16, whose exponential would be off by a percent.
        self._logit_scale = float(network.logit_scale.detach().double().exp())
        module: nn.Module = network
        return module

    def load_clip(self) -> nn.Module:
        """The CLIPModel on the CPU in float32."""
        from transformers import CLIPModel

        return loaded_completely(CLIPModel, self.model)

    def similarity(self, network: nn.Module, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) float32 cosine of the angle between the embeddings of image and prompt, in [-1, 1]."""
        image_embeddings = self._embed_images(network, images)
        # Several images of one prompt are common: each text is encoded once.
        unique = list(dict.fromkeys(prompts))
        rows = to_device(torch.tensor([unique.index(prompt) for prompt in prompts]), images.device)
        text_embeddings = self._embed_texts(network, unique)[rows]
        return (image_embeddings * text_embeddings).sum(dim=-1)

    def _embed_images(self, network: Any, images: Tensor) -> Tensor:
        assert self._preprocess is not None
        pixels = self._preprocess(images).to(network.dtype)
        pooled = network.vision_model(pixel_values=pixels).pooler_output
        return _unit(network.visual_projection(pooled))

    def _embed_texts(self, network: Any, prompts: list[str]) -> Tensor:
        tokens = self._tokenizer(
            prompts,
            padding=True,
            truncation=True,
            max_length=network.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(network.device)
        pooled = network.text_model(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        ).pooler_output
        return _unit(network.text_projection(pooled))


def loaded_completely(network_class: Any, path: str | Path) -> nn.Module:
    """The pretrained network on the CPU in float32.

    Raises:
        ValueError: when the checkpoint lacks a weight, which transformers would draw at random.
    """
    network, report = network_class.from_pretrained(path, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(
            f"{str(path)!r} is no {network_class.__name__}: it lacks {sorted(report['missing_keys'])[:3]}; "
            "pass the directory of a whole model"
        )
    module: nn.Module = network.float()
    return module


def _unit(embeddings: Tensor) -> Tensor:
    return F.normalize(embeddings.float(), dim=-1)


_WEIGHT = 2.5


@dataclass(kw_only=True, eq=False)
class CLIPScore(CLIPReward):
    """2.5 max(cos(image, text), 0), in [0, 2.5] (arXiv 2104.08718, without its "A photo depicts")."""

    name: str = "clip_score"
    model: str | Path = "openai/clip-vit-large-patch14"

    def score(
        self, network: nn.Module, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> Tensor:
        return _WEIGHT * self.similarity(network, images, prompts).clamp(min=0)


@dataclass(kw_only=True, eq=False)
class PickScore(CLIPReward):
    """exp(logit_scale) cos(image, text), about 17 to 24 (arXiv 2305.01569); flow_grpo divides it by 26."""

    name: str = "pickscore"
    model: str | Path = "yuvalkirstain/PickScore_v1"
    processor: str | Path = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def score(
        self, network: nn.Module, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> Tensor:
        return self._logit_scale * self.similarity(network, images, prompts)
