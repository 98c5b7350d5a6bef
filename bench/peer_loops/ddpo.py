"""ddpo-pytorch's loop (arXiv 2305.13301): DDIM sampling with guidance, steps shuffled per trajectory."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.peer_loops.flow_grpo import Noise, Score, drawn, upcast
from bench.peer_loops.samples import PROMPT, PeerModel, Samples, doubled, embeddings_of, rebatched
from bench.peers import mean_log_prob

PER_STEP = ("latents", "next_latents", "timesteps", "log_probs")
"""What is shuffled along the steps; advantages are the same at all of them."""


@dataclass(frozen=True, kw_only=True)
class DDPOSettings:
    """The published script's, under our names."""

    batch_size: int = 8
    """Trajectories per forward while sampling."""
    train_batch_size: int = 8
    """(sample, step) pairs per forward and backward. The script's multi-GPU setting is 4, its default 1."""
    eta: float = 1.0
    guidance_scale: float = 5.0
    clip_range: float = 1e-4
    advantage_clip: float = 5.0
    num_updates: int = 1
    """Optimizer steps per rollout."""
    learning_rate: float = 3e-4
    max_grad_norm: float = 1.0


class DDPOLoop:
    """One process of the script, for a model that predicts the noise."""

    def __init__(
        self, model: PeerModel, timesteps: Tensor, alphas_cumprod: Tensor, settings: DDPOSettings
    ) -> None:
        """
        Args:
            model: the UNet.
            timesteps: (T,) of the scheduler.
            alphas_cumprod: (1000,) of the scheduler; the first one stands for the step after the last.
            settings: of the run.
        """
        self.model = model
        self.timesteps = timesteps.to(model.device, torch.int64)
        # On the host, as the scheduler keeps it: every step fetches its timesteps to read it.
        self.alphas_cumprod = alphas_cumprod.cpu()
        self.spacing = len(alphas_cumprod) // len(timesteps)
        self.settings = settings
        self.parameters = model.backbone.policy_parameters()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.learning_rate, weight_decay=1e-4)
        self.executor = ThreadPoolExecutor(max_workers=2)

    def _alphas(self, timestep: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cumulative alphas (B, 1, 1, 1) before and after a step."""
        host = timestep.cpu()
        previous = host - self.spacing
        now = self.alphas_cumprod.gather(0, host)
        after = torch.where(
            previous >= 0, self.alphas_cumprod.gather(0, previous.clamp(min=0)), self.alphas_cumprod[0]
        )
        shape = (-1,) + (1,) * (like.ndim - 1)
        dtype = upcast(like).dtype
        return now.view(shape).to(like.device, dtype), after.view(shape).to(like.device, dtype)

    def ddim_step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor,
        *, prev_sample: Tensor | None = None, noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The next latent and its log-prob (B,)."""
        now, after = self._alphas(timestep, sample)
        clean = (sample - (1 - now) ** 0.5 * model_output) / now**0.5
        variance = (1 - after) / (1 - now) * (1 - now / after)
        std = self.settings.eta * variance**0.5
        direction = (1 - after - std**2) ** 0.5 * model_output
        mean = after**0.5 * clean + direction
        if prev_sample is None:
            assert noise is not None
            prev_sample = mean + std * noise
        return prev_sample, mean_log_prob(prev_sample, mean, std)

    def _guided(self, sample: Tensor, timestep: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
        both, times = torch.cat([sample] * 2), torch.cat([timestep] * 2)
        output = self.model(both, times.to(sample.dtype), embeddings)
        uncond_output, cond_output = output.chunk(2)
        return uncond_output + self.settings.guidance_scale * (cond_output - uncond_output)

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
            times = timestep.repeat(len(prompts))
            output = self._guided(latents, times, embeddings)
            latents, log_prob = self.ddim_step(output, times, latents, noise=noise(first, step, latents))
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
        """Decode batch by batch, rewards in a thread pool, advantages from all of them."""
        size = self.settings.batch_size
        futures = []
        for index, batch in enumerate(batches):
            images = self.model.backbone.decode(batch["latents_clean"])
            futures.append(self.executor.submit(reward, images, prompts[index * size : (index + 1) * size]))
        rewards = torch.cat([future.result() for future in futures]).double().cpu().numpy()
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
        spread = torch.from_numpy(advantages).float()[:, None].repeat(1, len(self.timesteps))
        parts = spread.to(self.model.device).split(size)
        return [batch | {"advantages": part} for batch, part in zip(batches, parts, strict=True)]

    def train(self, batches: list[Samples]) -> list[dict[str, float]]:
        """One pass: for every batch every step, forward, loss and backward; metrics per update."""
        settings, device = self.settings, self.model.device
        total, steps = sum(len(batch["timesteps"]) for batch in batches), len(self.timesteps)
        (whole,) = rebatched(batches, torch.randperm(total).to(device), total)
        permutations = torch.stack([torch.randperm(steps) for _ in range(total)]).to(device)
        rows = torch.arange(total, device=device)[:, None]
        whole |= {name: whole[name][rows, permutations] for name in PER_STEP}
        shuffled = rebatched([whole], torch.arange(total, device=device), settings.train_batch_size)
        uncond = self.model.encode_unconditional(settings.train_batch_size)
        passes = len(shuffled) * steps
        accumulated = math.ceil(passes / settings.num_updates)
        logged, info, count = [], {}, 0
        for batch in shuffled:
            embeddings = doubled(uncond, embeddings_of(batch))
            for step in range(steps):
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
        latents, timestep = batch["latents"][:, step], batch["timesteps"][:, step].to(torch.int64)
        output = self._guided(latents, timestep, embeddings)
        _, log_prob = self.ddim_step(output, timestep, latents, prev_sample=batch["next_latents"][:, step])
        bound = settings.advantage_clip
        advantages = batch["advantages"][:, step].clamp(-bound, bound)
        old_log_prob = batch["log_probs"][:, step]
        ratio = torch.exp(log_prob - old_log_prob)
        unclipped = -advantages * ratio
        clipped = -advantages * torch.clamp(ratio, 1.0 - settings.clip_range, 1.0 + settings.clip_range)
        loss = torch.maximum(unclipped, clipped).mean()
        info.setdefault("approx_kl", []).append(0.5 * ((log_prob - old_log_prob).detach() ** 2).mean())
        info.setdefault("clipfrac", []).append(((ratio - 1.0).abs() > settings.clip_range).float().mean())
        info.setdefault("loss", []).append(loss.detach())
        return loss

    def iteration(self, prompts: list[str], reward: Score) -> list[dict[str, float]]:
        """Sampling, rewards, advantages and the pass of training."""
        return self.train(self.score(self.sample(prompts), prompts, reward))
