"""A small dual encoder, the embedded tasks' analogue of CLIP: a reward that is learnt and can be fooled.

Trained on a task's ground truth by the symmetric contrastive loss of CLIP (arXiv 2103.00020). Encoders of two
seeds make a proxy and a gold reward: what raises one and not the other is an exploit of its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lacfast.tasks import scenes
from lacfast.tasks.folders import read_folder, write_folder
from lacfast.tasks.task import BASE_SIZE, Task
from lacfast.tasks.text import WIDTH, WordEncoder, word_encoder

STEPS = 400
BATCH_SIZE = 128
LEARNING_RATE = 2e-3
TEMPERATURE = 0.07
NOISE = 0.1
"""Standard deviation of the noise on the training pictures, in brightness: generated images are not clean."""
IMAGE_FOLDER, TEXT_FOLDER = "image", "text"


class ImageEncoder(nn.Module):
    """Images (B, 3, H, W) in [0, 1] to features (B, D); H = W = image_size."""

    def __init__(self, *, width: int = WIDTH, channels: int = 32, image_size: int = BASE_SIZE) -> None:
        super().__init__()
        self.width, self.channels, self.image_size = width, channels, image_size
        self.layers = nn.Sequential(
            nn.Conv2d(3, channels, 5, stride=2, padding=2), nn.GELU(),
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(2 * channels, 2 * channels, 3, stride=2, padding=1), nn.GELU(),
            nn.Flatten(), nn.LazyLinear(width),
        )  # fmt: skip
        # The grid of features is flattened, not averaged: where a thing is matters to a prompt.
        self.layers(torch.zeros(1, 3, image_size, image_size))

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layers(images - 0.5)
        return features


class DualEncoder(nn.Module):
    """Cosine similarity of pictures and captions."""

    def __init__(self, image: ImageEncoder, text: WordEncoder) -> None:
        super().__init__()
        self.image = image
        self.text = text

    @classmethod
    def from_pretrained(cls, directory: Path) -> DualEncoder:
        """What `save_pretrained` wrote, without gradient for its weights.

        Raises:
            ValueError: the directory holds no encoder.
        """
        config, weights = read_folder(directory / IMAGE_FOLDER)
        with torch.random.fork_rng(devices=[]):
            image = ImageEncoder(**config)
        image.load_state_dict(weights)
        encoder = cls(image, WordEncoder.from_pretrained(directory / TEXT_FOLDER))
        return encoder.eval().requires_grad_(False)

    def save_pretrained(self, directory: Path) -> None:
        """Writes what `from_pretrained` reads."""
        config = {name: getattr(self.image, name) for name in ("width", "channels", "image_size")}
        write_folder(self.image, config, directory / IMAGE_FOLDER)
        self.text.save_pretrained(directory / TEXT_FOLDER)

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D) of images (B, 3, H, W) in [0, 1]."""
        return nn.functional.normalize(self.image(images), dim=-1)

    def embed_words(self, indices: Tensor) -> Tensor:
        """Unit vectors (B, D) of word numbers (B, L)."""
        return nn.functional.normalize(self.text.embed(indices)[1], dim=-1)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine similarity (B,) of each image with its prompt."""
        return (self.embed_images(images) * self.embed_words(self.text.indices(prompts))).sum(dim=-1)


@dataclass(frozen=True)
class SimilarityReward:
    """A trained encoder as a reward."""

    encoder: DualEncoder
    name: str
    """Name of the reward, e.g. "similarity" and "similarity_gold"."""

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Cosine similarity (B,) in [-1, 1] of images (B, 3, H, W) and prompts, on the CPU."""
        return self.encoder.score(images.to("cpu", torch.float32), prompts)


def train_dual_encoder(
    task: Task = scenes.TASK,
    *,
    seed: int = 0,
    steps: int = STEPS,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> DualEncoder:
    """Train an encoder on pictures of all prompts of a task, bit-identical for one seed.

        loss = -(log softmax_j(s_ij / tau)_ii + log softmax_i(s_ij / tau)_ii) / 2,   s_ij = cos(i, j)

    Args:
        task: whose pictures and prompts are learned; a batch holds no prompt twice.
        seed: of weights, pictures and noise.
        steps: optimizer steps.
        progress: called with the step and its loss.
    """
    generator = torch.Generator().manual_seed(1_000 + seed)
    random = np.random.default_rng(1_000 + seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1_000 + seed)
        encoder = DualEncoder(
            ImageEncoder(image_size=task.image_size), word_encoder(task, generator=generator)
        )
    prompts = task.prompts()
    words = encoder.text.indices([prompt.text for prompt in prompts])
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    target = torch.arange(min(BATCH_SIZE, len(prompts)))
    for step in range(steps):
        rows = torch.randperm(len(prompts), generator=generator)[:BATCH_SIZE]
        pictures = torch.from_numpy(task.draw([prompts[row] for row in rows.tolist()], random))
        pictures = pictures + NOISE * torch.randn(pictures.shape, generator=generator)
        similarity = encoder.embed_images(pictures) @ encoder.embed_words(words[rows]).T / TEMPERATURE
        loss = 0.5 * (
            nn.functional.cross_entropy(similarity, target)
            + nn.functional.cross_entropy(similarity.T, target)
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        progress(step, float(loss.detach()))
    return encoder.eval().requires_grad_(False)
