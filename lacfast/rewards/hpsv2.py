"""HPSv2.1: human preference by a CLIP model whose open_clip checkpoint runs in transformers here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lacfast.rewards.clip import CLIPReward
from lacfast.rewards.model import checkpoint_file, load_exactly, read_weights
from lacfast.rewards.preprocessing import CLIP_MEAN, CLIP_STD, ImagePreprocessing

PREPROCESSING = ImagePreprocessing(size=224, mean=CLIP_MEAN, std=CLIP_STD, fit="pad", round_resized=False)
_WHOLE_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "logit_scale": "logit_scale",
}
# `pre_layrnorm` is transformers' spelling.
_PREFIXES = {
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "ln_final.": "text_model.final_layer_norm.",
}
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")


def from_open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an open_clip vision transformer and text model under the names of transformers' CLIPModel.

    Raises:
        ValueError: for a name that no such model has.
    """
    converted: dict[str, Tensor] = {}
    for name, weight in weights.items():
        block = _BLOCK.fullmatch(name)
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        if block is not None:
            tower = "vision_model" if block[1] else "text_model"
            converted |= _block_weights(f"{tower}.encoder.layers.{block[2]}", block[3], weight)
        elif name in ("visual.proj", "text_projection"):
            # open_clip multiplies from the right, a Linear holds the transpose.
            converted[f"{'visual' if name == 'visual.proj' else 'text'}_projection.weight"] = weight.T
        elif name in _WHOLE_NAMES:
            converted[_WHOLE_NAMES[name]] = weight
        elif prefix is not None:
            converted[_PREFIXES[prefix] + name.removeprefix(prefix)] = weight
        elif name != "attn_mask":
            raise ValueError(f"{name!r} is no weight of an open_clip vision transformer with a text model")
    return converted


def _block_weights(target: str, name: str, weight: Tensor) -> dict[str, Tensor]:
    if name.startswith("attn.in_proj_"):
        kind = name.removeprefix("attn.in_proj_")
        parts = zip("qkv", weight.chunk(3), strict=True)
        return {f"{target}.self_attn.{letter}_proj.{kind}": part.clone() for letter, part in parts}
    module, _, kind = name.rpartition(".")
    if module not in _IN_BLOCK:
        raise ValueError(f"{name!r} is no weight of an open_clip transformer block")
    return {f"{target}.{_IN_BLOCK[module]}.{kind}": weight}


@dataclass(kw_only=True, eq=False)
class HPSv2(CLIPReward):
    """cos(image, text) of the HPSv2.1 model, about 0.2 to 0.35 (arXiv 2306.09341).

    Images are fitted as the authors' inference code does: longest edge to 224, black at the sides. Their
    torchvision may resize without antialiasing, which differs on large images; here it is on.
    """

    name: str = "hpsv2"
    model: str | Path = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """Directory or hub id of the configuration and the tokenizer; its weights are not read."""
    checkpoint: str | Path = "xswu/HPSv2"
    """A file, or a directory or hub id that holds `filename`."""
    filename: str = "HPS_v2.1_compressed.pt"
    """"HPS_v2_compressed.pt" is version 2.0."""
    preprocessing: ImagePreprocessing | str = PREPROCESSING
    """The authors' inference code's; "own" would be the image processor's of `model`."""

    def load_clip(self) -> nn.Module:
        from transformers import CLIPConfig, CLIPModel

        network = CLIPModel(CLIPConfig.from_pretrained(self.model))
        path = checkpoint_file(self.checkpoint, self.filename)
        weights = from_open_clip(read_weights(path))
        # The published file is in half precision.
        load_exactly(network, {key: weight.float() for key, weight in weights.items()}, path)
        module: nn.Module = network
        return module

    def score(
        self, network: nn.Module, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> Tensor:
        return self.similarity(network, images, prompts)
