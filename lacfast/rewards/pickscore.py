"""PickScore: which image people would pick for a prompt, by a CLIP model tuned on their choices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lacfast.rewards.clip import CLIPReward


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
