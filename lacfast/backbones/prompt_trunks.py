"""The prompt as one more tap beside another trunk's."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import Tensor, nn

from lacfast.critic.trunk import Features, Trunk
from lacfast.records import Conditioning

POOLED_NAMES = ("pooled_projections", "text_embeds")
"""What the families call a pooled prompt embedding."""
MASK_NAMES = {"encoder_hidden_states_mask", "encoder_attention_mask"}
"""What they call the mask of a prompt's tokens (B, L)."""


def prompt_tokens(conditioning: Conditioning) -> Tensor:
    """(B, L, D) embeddings of the prompt's tokens."""
    return conditioning.tensors["encoder_hidden_states"]


def pooled_prompt(conditioning: Conditioning) -> Tensor:
    """(B, P) pooled embedding, the mean token of the prompt where the family has none."""
    for name in POOLED_NAMES:
        if name in conditioning.tensors:
            return conditioning.tensors[name]
    tokens, masks = prompt_tokens(conditioning), conditioning.tensors.keys() & MASK_NAMES
    if not masks:
        return tokens.mean(dim=1)
    present = conditioning.tensors[masks.pop()][..., None].to(tokens.dtype)
    return (tokens * present).sum(dim=1) / present.sum(dim=1)


class PromptTap(Trunk):
    """Another trunk's taps, and the prompt as one more."""

    def __init__(self, inner: Trunk, text_conditioning: str, example: Conditioning) -> None:
        """
        Args:
            inner: gives the other taps.
            text_conditioning: "pooled" or "tokens".
            example: of any prompt, for its width.
        """
        super().__init__()
        self.inner = inner
        self.text_conditioning = text_conditioning
        self.tap_dims = (*inner.tap_dims, self._tap(example).shape[-1])

    def _tap(self, conditioning: Conditioning) -> Tensor:
        if self.text_conditioning == "tokens":
            return prompt_tokens(conditioning)
        return pooled_prompt(conditioning)[:, None]

    def record(self, model: nn.Module, *, detach: bool = True) -> AbstractContextManager[Features]:
        return self.inner.record(model, detach=detach)

    def forward(
        self, features: Features, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> list[Tensor]:
        return [*self.inner(features, sample, timestep, conditioning), self._tap(conditioning)]
