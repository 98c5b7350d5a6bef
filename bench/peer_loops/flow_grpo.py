"""flow_grpo's loop (arXiv 2505.05470): SDE sampling with guidance, group advantages, update step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bench.peer_loops.samples import PROMPT, PeerModel, Samples, doubled, embeddings_of, rebatched
from bench.peers import mean_log_prob

Noise = Callable[[int, int, Tensor], Tensor]
"""(index of the first trajectory, step or -1 for the start, tensor of the shape) -> standard normal noise."""
Score = Callable[[Tensor, list[str]], Tensor]
"""Images (B, 3, H, W) and prompts -> rewards (B,)."""


def drawn(first: int, step: int, like: Tensor) -> Tensor:
    return torch.randn_like(like)


@dataclass(frozen=True, kw_only=True)
class FlowGRPOSettings:
    """The published script's, under our names."""

    batch_size: int = 9
    """Trajectories per forward while sampling, and pairs of one step per forward and backward."""
    noise_level: float = 0.7
    guidance_scale: float = 4.5
    kl_weight: float = 0.04
    """beta; 0 runs no reference."""
    clip_range: float = 1e-4
    advantage_clip: float = 5.0
    num_updates: int = 1
    """Optimizer steps per rollout, each after the gradients of its share of the batches."""
    learning_rate: float = 3e-4
    max_grad_norm: float = 1.0


class FlowGRPOLoop:
    """One process of the script. The last denoising step is deterministic and is not trained, as in its
    window mode."""

    def __init__(
        self, model: PeerModel, timesteps: Tensor, sigmas: Tensor, settings: FlowGRPOSettings
    ) -> None:
        """
        Args:
            model: with LoRA when kl_weight > 0.
            timesteps: (T,) of the scheduler.
            sigmas: (T + 1,) of the scheduler.
            settings: of the run.
        """
        self.model = model
        self.timesteps = timesteps.to(model.device)
        self.sigmas = sigmas.to(model.device)
        self.settings = settings
        self.parameters = model.backbone.policy_parameters()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.learning_rate, weight_decay=1e-4)
        self.executor = ThreadPoolExecutor(max_workers=8)

    @property
    def num_trained(self) -> int:
        return len(self.timesteps) - 1

    def _index(self, timestep: Tensor) -> int:
        # The host waits for the device twice: for the number of hits and for the hit.
        return int((self.timesteps == timestep).nonzero()[0].item())

    def sde_step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, noise_level: float,
        *, prev_sample: Tensor | None = None, noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """The next latent, its log-prob (B,), the mean, and the diffusion's scale before sqrt(-dt)."""
        model_output, sample = upcast(model_output), upcast(sample)
        rows = [self._index(entry) for entry in timestep]
        next_rows = [row + 1 for row in rows]
        shape = (-1,) + (1,) * (sample.ndim - 1)
        sigma, next_sigma = self.sigmas[rows].view(shape), self.sigmas[next_rows].view(shape)
        largest = self.sigmas[1].item()
        step_size = next_sigma - sigma
        scale = torch.sqrt(sigma / (1 - torch.where(sigma == 1, largest, sigma))) * noise_level
        mean = (
            sample * (1 + scale**2 / (2 * sigma) * step_size)
            + model_output * (1 + scale**2 * (1 - sigma) / (2 * sigma)) * step_size
        )
        std = scale * torch.sqrt(-step_size)
        if prev_sample is None:
            assert noise is not None
            prev_sample = mean + std * noise
        return prev_sample, mean_log_prob(upcast(prev_sample), mean, std), mean, scale

    @torch.no_grad()
    def sample(self, prompts: list[str], noise: Noise = drawn) -> list[Samples]:
        """Trajectories in batches; every batch encodes its prompts."""
        size = self.settings.batch_size
        return [
            self._sample_batch(prompts[first : first + size], first, noise)
            for first in range(0, len(prompts), size)
        ]

    def _sample_batch(self, prompts: list[str], first: int, noise: Noise) -> Samples:
        cond = self.model.encode(prompts)
        embeddings = doubled(self.model.encode_unconditional(len(prompts)), cond)
        shape = (len(prompts), *self.model.backbone.latent_shape)
        latents = noise(first, -1, torch.empty(shape, device=self.model.device))
        all_latents, all_log_probs = [latents], []
        for step, timestep in enumerate(self.timesteps):
            both = torch.cat([latents] * 2)
            output = self.model(both, timestep.expand(len(both)), embeddings)
            uncond_output, cond_output = output.chunk(2)
            output = uncond_output + self.settings.guidance_scale * (cond_output - uncond_output)
            noise_level = self.settings.noise_level if step < self.num_trained else 0.0
            latents, log_prob, _, _ = self.sde_step(
                output, timestep.unsqueeze(0), latents, noise_level, noise=noise(first, step, latents)
            )
            all_latents.append(latents)
            all_log_probs.append(log_prob)
        stacked = torch.stack(all_latents, dim=1)
        return {
            "latents": stacked[:, :-1],
            "next_latents": stacked[:, 1:],
            "timesteps": self.timesteps.repeat(len(prompts), 1),
            "log_probs": torch.stack(all_log_probs, dim=1),
            "latents_clean": latents,
        } | {f"{PROMPT}{name}": tensor for name, tensor in cond.items()}

    def score(self, batches: list[Samples], prompts: list[str], reward: Score) -> list[Samples]:
        """Decode batch by batch, rewards in a thread pool, advantages from each prompt's group."""
        size = self.settings.batch_size
        futures = []
        for index, batch in enumerate(batches):
            images = self.model.backbone.decode(batch["latents_clean"])
            part = prompts[index * size : (index + 1) * size]
            futures.append(self.executor.submit(reward, images, part))
        rewards = torch.cat([future.result() for future in futures]).double().cpu().numpy()
        names, advantages = np.array(prompts), np.zeros_like(rewards)
        for name in np.unique(names):
            own = names == name
            advantages[own] = (rewards[own] - rewards[own].mean()) / (rewards.std() + 1e-4)
        spread = torch.from_numpy(advantages).float()[:, None].repeat(1, len(self.timesteps))
        parts = spread.to(self.model.device).split(size)
        return [batch | {"advantages": part} for batch, part in zip(batches, parts, strict=True)]

    def _policy(
        self, batch: Samples, step: int, embeddings: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        latents, timestep = batch["latents"][:, step], batch["timesteps"][:, step]
        output = self.model(torch.cat([latents] * 2), torch.cat([timestep] * 2), embeddings)
        uncond_output, cond_output = output.chunk(2)
        uncond_output = uncond_output.detach()
        output = uncond_output + self.settings.guidance_scale * (cond_output - uncond_output)
        return self.sde_step(
            output, timestep, latents, self.settings.noise_level,
            prev_sample=batch["next_latents"][:, step],
        )  # fmt: skip

    @torch.no_grad()
    def reference(self, batch: Samples, step: int, embeddings: dict[str, Tensor]) -> Tensor:
        """The mean of a step under the model without its adapter."""
        with self.model.without_adapter():
            return self._policy(batch, step, embeddings)[2]

    def train(self, batches: list[Samples]) -> list[dict[str, float]]:
        """One pass: for every batch every step, forward, reference, loss and backward; metrics per update."""
        settings = self.settings
        order = torch.randperm(sum(len(batch["timesteps"]) for batch in batches))
        shuffled = rebatched(batches, order.to(self.model.device), settings.batch_size)
        passes = len(shuffled) * self.num_trained
        accumulated = math.ceil(passes / settings.num_updates)
        logged, info, count = [], {}, 0
        for batch in shuffled:
            uncond = self.model.encode_unconditional(len(batch["timesteps"]))
            embeddings = doubled(uncond, embeddings_of(batch))
            for step in range(self.num_trained):
                loss = self._loss(batch, step, embeddings, info)
                (loss / accumulated).backward()
                count += 1
                if count % accumulated and count < passes:
                    continue
                nn.utils.clip_grad_norm_(self.parameters, settings.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
                logged.append({name: torch.stack(values).mean().item() for name, values in info.items()})
                info = {}
        return logged

    def _loss(
        self, batch: Samples, step: int, embeddings: dict[str, Tensor], info: dict[str, list[Tensor]]
    ) -> Tensor:
        settings = self.settings
        _, log_prob, mean, scale = self._policy(batch, step, embeddings)
        bound = settings.advantage_clip
        advantages = batch["advantages"][:, step].clamp(-bound, bound)
        ratio = torch.exp(log_prob - batch["log_probs"][:, step])
        unclipped = -advantages * ratio
        clipped = -advantages * torch.clamp(ratio, 1.0 - settings.clip_range, 1.0 + settings.clip_range)
        loss = policy_loss = torch.maximum(unclipped, clipped).mean()
        if settings.kl_weight > 0:
            reference_mean = self.reference(batch, step, embeddings)
            elements = tuple(range(1, mean.ndim))
            distance = ((mean - reference_mean) ** 2).mean(dim=elements, keepdim=True)
            kl_loss = (distance / (2 * scale**2)).mean()
            loss = policy_loss + settings.kl_weight * kl_loss
            info.setdefault("kl_loss", []).append(kl_loss.detach())
        info.setdefault("approx_kl", []).append(
            0.5 * ((log_prob - batch["log_probs"][:, step]).detach() ** 2).mean()
        )
        info.setdefault("clipfrac", []).append(((ratio - 1.0).abs() > settings.clip_range).float().mean())
        info.setdefault("policy_loss", []).append(policy_loss.detach())
        return loss

    def iteration(self, prompts: list[str], reward: Score) -> list[dict[str, float]]:
        """Sampling, rewards, advantages and the pass of training."""
        return self.train(self.score(self.sample(prompts), prompts, reward))


def upcast(tensor: Tensor) -> Tensor:
    """Half precision to float32; float64, in which tests run the loop, stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
