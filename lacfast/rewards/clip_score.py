"""CLIPScore: how well an image agrees with its prompt, by the angle between their CLIP embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lacfast.rewards.clip import CLIPReward

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
