"""What a peer's script has in hand: the diffusers model and dictionaries of stacked trajectories."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from lacfast.backbones.latent import LatentBackbone
from lacfast.records import Advantages, Conditioning, Rollout

Samples = dict[str, Tensor]
"""One batch of trajectories, batch first: "latents" and "next_latents" (B, T, ...), "timesteps" and
"log_probs" (B, T), "advantages" (B, T), "latents_clean" (B, ...), and every tensor of the prompt's
conditioning (B, ...) under "prompt/NAME"."""

PROMPT = "prompt/"


@dataclass(frozen=True)
class PeerModel:
    """The model as a script calls it: no cache, no engine."""

    backbone: LatentBackbone
    """A model whose diffusers model, prompt encoder and decoder are called directly."""
    autocast_dtype: torch.dtype | None = None
    """accelerate's mixed precision, over a float32 base. None: float32, as on a CPU."""

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    def __call__(self, sample: Tensor, timestep: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        context: AbstractContextManager[object] = nullcontext()
        if self.autocast_dtype is not None:
            context = torch.autocast(sample.device.type, self.autocast_dtype)
        with context:
            return self.backbone.predict_with(self.backbone.model, sample, timestep, Conditioning(embeddings))

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        return self._conditioning(self.backbone.prompt_encoder.encode(prompts))

    @torch.no_grad()
    def encode_unconditional(self, count: int) -> dict[str, Tensor]:
        embeddings = self.backbone.prompt_encoder.encode_unconditional()
        return self._conditioning(
            {name: tensor.repeat(count, *(1,) * (tensor.ndim - 1)) for name, tensor in embeddings.items()}
        )

    def _conditioning(self, embeddings: dict[str, Tensor]) -> dict[str, Tensor]:
        dtype = self.backbone.dtype
        own = {name: tensor.to(self.device, dtype) for name, tensor in embeddings.items()}
        return self.backbone.conditioning(own).tensors

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The reference model, by the library's own switch, which walks over all modules each time.

        Raises:
            ValueError: without an adapter.
        """
        if self.backbone.lora is None:
            raise ValueError("the peers' reference is the model without its adapter; train a LoRA")
        self.backbone.model.disable_adapters()
        try:
            yield
        finally:
            self.backbone.model.enable_adapters()


def embeddings_of(samples: Samples) -> dict[str, Tensor]:
    """The prompt's conditioning of a batch."""
    return {name.removeprefix(PROMPT): tensor for name, tensor in samples.items() if name.startswith(PROMPT)}


def doubled(uncond: dict[str, Tensor], cond: dict[str, Tensor]) -> dict[str, Tensor]:
    """Both halves of classifier-free guidance as one batch."""
    return {name: torch.cat([uncond[name], cond[name]]) for name in cond}


def rebatched(batches: list[Samples], order: Tensor, size: int) -> list[Samples]:
    """All trajectories in the order given, in batches of `size`."""
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    return [{name: tensor[rows] for name, tensor in whole.items()} for rows in order.split(size)]


def samples_of(rollout: Rollout, advantages: Advantages) -> Samples:
    """A rollout of ours as a peer stores it: for comparing updates on the same data."""
    steps, batch = rollout.table.num_steps, rollout.batch_size
    spread = advantages.policy.new_zeros((batch, steps))
    spread[:, advantages.steps] = advantages.policy.T
    timesteps = rollout.table.timesteps.to(rollout.latents.device)
    samples = {
        "latents": rollout.latents[:-1].transpose(0, 1),
        "next_latents": rollout.latents[1:].transpose(0, 1),
        "timesteps": timesteps.expand(batch, -1),
        "log_probs": rollout.log_probs.T,
        "advantages": spread,
        "latents_clean": rollout.clean_latents,
    }
    samples |= {f"{PROMPT}{name}": tensor for name, tensor in rollout.conditioning.tensors.items()}
    return samples
