"""The sizes that are measured: latents, critic features and advantages of the models that lacfast trains."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LatentCase:
    """Latents of one microbatch."""

    model: str
    batch: int
    latent: tuple[int, ...]
    """(C, H, W), or (L, D) where the model packs patches."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch, *self.latent)

    @property
    def elements(self) -> int:
        """B N"""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.model}, {' x '.join(map(str, self.shape))}"


@dataclass(frozen=True)
class PoolCase:
    """Features that a value head pools."""

    model: str
    batch: int
    tokens: int
    """L"""
    features: int
    """D"""
    heads: int = 4

    def __str__(self) -> str:
        return f"{self.model}, B = {self.batch}, L = {self.tokens}, D = {self.features}, Q = {self.heads}"


@dataclass(frozen=True)
class AdvantageCase:
    """Rewards and values of one rollout."""

    name: str
    batch: int
    steps: int
    rewards: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.batch, self.steps, self.rewards)

    def __str__(self) -> str:
        return f"{self.name}, {self.batch} x {self.steps} x {self.rewards}"


@dataclass(frozen=True)
class ParticleCase:
    """Particles of one steered batch."""

    name: str
    groups: int
    """G images"""
    particles: int
    """N of each"""

    def __str__(self) -> str:
        return f"{self.name}, {self.groups} x {self.particles}"


Case = LatentCase | PoolCase | AdvantageCase | ParticleCase

TINY_LATENT = LatentCase("tiny", 3, (4, 5, 7))
"""For tests of the benches themselves."""
CLAIM_LATENT = LatentCase("SD3.5-M 512 px", 8, (16, 64, 64))
"""What the README's ratios are stated for."""
LATENTS = (
    LatentCase("tiny DiT of the demo", 256, (8, 8, 8)),
    LatentCase("SD1.5 512 px", 8, (4, 64, 64)),
    CLAIM_LATENT,
    LatentCase("SD3.5-M 512 px", 1, (16, 64, 64)),
    LatentCase("SD3.5-M 1024 px", 4, (16, 128, 128)),
    LatentCase("FLUX 1024 px, packed", 4, (4096, 64)),
)

TINY_POOL = PoolCase("tiny", 2, 7, 24, 2)
CLAIM_POOL = PoolCase("SD3.5-M 512 px", 8, 1024, 1536)
POOLS = (
    PoolCase("tiny DiT of the demo", 256, 16, 96),
    PoolCase("SD1.5 512 px, middle block", 8, 64, 1280),
    CLAIM_POOL,
    PoolCase("SD3.5-M 512 px", 1, 1024, 1536),
    PoolCase("SD3.5-M 1024 px", 2, 4096, 1536),
    PoolCase("FLUX 1024 px", 1, 4096, 3072),
)

TINY_ADVANTAGE = AdvantageCase("tiny", 5, 4, 2)
CLAIM_ADVANTAGE = AdvantageCase("long rollouts", 4096, 50, 1)
ADVANTAGES = (
    AdvantageCase("demo", 256, 8, 1),
    AdvantageCase("three rewards", 512, 10, 3),
    CLAIM_ADVANTAGE,
)

TINY_PARTICLES = ParticleCase("tiny", 3, 5)
CLAIM_PARTICLES = ParticleCase("a batch of images", 64, 16)
PARTICLES = (CLAIM_PARTICLES, ParticleCase("one image", 1, 4096))

BEYOND_CACHE: dict[type[Case], tuple[Case, ...]] = {
    LatentCase: (LatentCase("FLUX 1024 px, packed", 128, (4096, 64)),),
    PoolCase: (
        PoolCase("SD3.5-M 1024 px", 16, 4096, 1536),
        PoolCase("FLUX 1024 px", 8, 4096, 3072),
    ),
}
"""At least 32 M elements each, 64 MB in 16 bits: beyond an H100's L2 cache, so bandwidth is the memory's."""

CASES: dict[type[Case], tuple[Case, Case, tuple[Case, ...]]] = {
    LatentCase: (TINY_LATENT, CLAIM_LATENT, LATENTS),
    PoolCase: (TINY_POOL, CLAIM_POOL, POOLS),
    AdvantageCase: (TINY_ADVANTAGE, CLAIM_ADVANTAGE, ADVANTAGES),
    ParticleCase: (TINY_PARTICLES, CLAIM_PARTICLES, PARTICLES),
}
"""Kind -> the tiny case, the claim's, all real ones."""
SELECTIONS = ("tiny", "claim", "all", "beyond-cache")


def select(kind: type[Case], selection: str) -> tuple[Case, ...]:
    """The cases of a kind under a name of SELECTIONS; a kind may have none beyond the cache."""
    if selection not in SELECTIONS:
        raise ValueError(f"unknown selection {selection!r}; known: {', '.join(SELECTIONS)}")
    tiny, claim, everything = CASES[kind]
    beyond = BEYOND_CACHE.get(kind, ())
    return {"tiny": (tiny,), "claim": (claim,), "all": everything, "beyond-cache": beyond}[selection]
