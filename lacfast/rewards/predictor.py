"""A score as a stack of linear layers on an embedding: the head of two published reward models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lacfast.rewards.model import ModelReward


class LinearStack(nn.Module):
    """D -> 1024 -> 128 -> 64 -> 16 -> 1 without nonlinearities, as both authors published it.

    Their dropouts only count in training; empty places keep the published names of the weights.
    """

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dimension, 1024),
            nn.Identity(),
            nn.Linear(1024, 128),
            nn.Identity(),
            nn.Linear(128, 64),
            nn.Identity(),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        """(B,) float32 scores of embeddings (B, D)."""
        scores: Tensor = self.layers(embeddings.float())
        return scores.squeeze(-1)


class EncoderAndHead(nn.Module):
    """A large encoder and the small head that scores its embedding."""

    def __init__(self, encoder: nn.Module, head: LinearStack) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head


class PredictedScore(ModelReward):
    """A reward whose network is an EncoderAndHead: the head stays in float32.

    bfloat16 has 8 bits: a score of 5.5 would come in steps of 0.03.
    """

    def place(self, network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        assert isinstance(network, EncoderAndHead)
        network.encoder.to(device, dtype)
        network.head.to(device)
