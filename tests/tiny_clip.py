"""A CLIP of a few thousand random weights, saved as transformers saves the real ones, tokenizer included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

IMAGE_SIZE = 32
LETTERS = [*"abcdefghijklmnopqrstuvwxyz", *'"0123456789']
VOCABULARY = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
# transformers 5 calls the class that works without torchvision so; before, it was the plain one.
PilProcessor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor


def configuration() -> Any:
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu"}
    text = {"hidden_size": 24, "intermediate_size": 48, "max_position_embeddings": 16, **layers}
    words = {"vocab_size": len(VOCABULARY), "bos_token_id": len(VOCABULARY) - 2, "pad_token_id": 0}
    vision = {"hidden_size": 32, "intermediate_size": 64, "image_size": IMAGE_SIZE, "patch_size": 8, **layers}
    return transformers.CLIPConfig(
        projection_dim=16,
        text_config={**text, **words, "eos_token_id": len(VOCABULARY) - 1, "projection_dim": 16},
        vision_config={**vision, "projection_dim": 16},
    )


def save_tiny_clip(directory: Path, *, seed: int = 0, weights: bool = True) -> Path:
    """Write model, tokenizer and image processor; without `weights` only the model's configuration."""
    config = configuration()
    if weights:
        torch.manual_seed(seed)
        model = transformers.CLIPModel(config)
        for parameter in model.parameters():
            # Fresh weights are so small that all embeddings would be alike.
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.logit_scale.data.fill_(4.6052)
        model.save_pretrained(directory)
    else:
        config.save_pretrained(directory)
    vocabulary = directory / "vocab.json"
    vocabulary.write_text(json.dumps({token: index for index, token in enumerate(VOCABULARY)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    save_tokenizer(directory)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    PilProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size).save_pretrained(directory)
    return directory


def save_tokenizer(directory: Path) -> None:
    tokens = {token: index for index, token in enumerate(VOCABULARY)}
    try:
        tokenizer = transformers.CLIPTokenizer(vocab=tokens, merges=[])
    except TypeError:
        # Before transformers 5 tokenizers are made from files.
        files = {"vocab_file": directory / "vocab.json", "merges_file": directory / "merges.txt"}
        tokenizer = transformers.CLIPTokenizer(**files)
    tokenizer.save_pretrained(directory)
