"""Records that travel between the layers: what a rollout, a schedule and a loss hand on.

Shape letters, everywhere: B trajectories (or flattened pairs), T denoising steps, C H W latent,
L tokens, D features, M rewards, N elements of one latent.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import Any, Self

import torch
from torch import Tensor

from lacfast.distributed import Share
from lacfast.transfer import to_device

MIN_STD = 1e-6
"""Smallest standard deviation of a stochastic step: a few roundings of a float32 latent."""
INITIAL_STEP = -1
"""Step counter of the noise that starts a trajectory; denoising steps count from 0."""


class FirstSampleId(IntEnum):
    """Where the sample ids of each kind of rollout begin, so that no two share noise.

    Noise is a function of (seed, sample id). Training counts its ids from 0.
    """

    EVALUATION = 1 << 40
    """The same noise for every evaluation."""
    VALUE_PRETRAINING = 1 << 41
    SELECTION = 1 << 42
    """The held-out rollout that measures value pretraining and chooses its critic."""
    COMPLETIONS = 1 << 43
    """Branched completions, which measure what a state tells of its reward."""
    STEERING = 1 << 44
    """Steered images; the trajectories of one image are so far apart too."""


@dataclass(frozen=True)
class Static:
    """A record of tensors that a captured graph reads where they lie; subclasses are frozen dataclasses.

    Its fields are tensors, dicts of them, other static records, and plain numbers, which a graph freezes.
    """

    @property
    def layout(self) -> Hashable:
        """All that a graph freezes of the record: names, shapes, dtypes, numbers, but no tensor's values."""
        return tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in _leaves(self))

    def clone(self) -> Self:
        """The record with tensors of its own."""
        return replace(self, **{each.name: _cloned(getattr(self, each.name)) for each in fields(self)})

    @property
    def flat(self) -> list[Tensor]:
        """All tensors, in the order of the fields."""
        return [leaf for leaf in _leaves(self) if isinstance(leaf, Tensor)]

    def copy_(self, other: Self) -> None:
        """Take over the values of a record of the same layout, in place."""
        # One call: the dispatcher takes as long as a small copy.
        torch._foreach_copy_(self.flat, other.flat)


def _leaves(value: Any, leaves: list[Any] | None = None) -> list[Any]:
    """Tensors, numbers and the names in dicts, in the order of the fields, appended to `leaves`."""
    leaves = [] if leaves is None else leaves
    if isinstance(value, Static):
        for name in value.__dataclass_fields__:
            _leaves(getattr(value, name), leaves)
    elif isinstance(value, dict):
        for name, part in value.items():
            leaves.append(name)
            _leaves(part, leaves)
    else:
        leaves.append(value)
    return leaves


def _cloned(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _cloned(part) for name, part in value.items()}
    return value.clone() if isinstance(value, Tensor | Static) else value


def padding_rows(length: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Rows (count,) int64 that repeat the last of `length` where they end."""
    return torch.arange(count, device=device).clamp(max=length - 1)


@dataclass(frozen=True)
class NoiseKey(Static):
    """Key of the noise of B trajectories: a counter-based generator needs nothing else.

    The tensors live on the device, so that a captured graph reads new values at every replay.
    """

    seed: Tensor
    """(1,) int64, the Philox key."""
    sample_ids: Tensor
    """(B,) int64, one number per trajectory, unique within a run."""

    @staticmethod
    def create(seed: int, sample_ids: Tensor | range, device: torch.device | str = "cpu") -> NoiseKey:
        """Make a key from host numbers."""
        if isinstance(sample_ids, range):
            ids = torch.arange(sample_ids.start, sample_ids.stop, device=device)
        else:
            ids = to_device(sample_ids, device, torch.int64)
        return NoiseKey(torch.full((1,), seed, dtype=torch.int64, device=device), ids)

    def select(self, rows: Tensor) -> NoiseKey:
        """The key of the trajectories `rows`."""
        return NoiseKey(self.seed, self.sample_ids[rows])


@dataclass(frozen=True)
class TransitionTable:
    """A sampler as numbers: x' = a x + b v + std eps, one row per denoising step, float64 on the host."""

    kind: str
    """Sampler kind, for messages and logs."""
    a: Tensor
    """(T,) float64, weight of the sample."""
    b: Tensor
    """(T,) float64, weight of the model output."""
    std: Tensor
    """(T,) float64, standard deviation of the transition; 0 marks a deterministic step without log-prob."""
    timesteps: Tensor
    """(T,) float32, what the model is conditioned on, descending."""
    sigmas: Tensor
    """(T + 1,) float64, noise level before each step and after the last. 1: pure noise; DDIM: sqrt(1 - A)."""
    prediction_type: str = "flow"
    """What the model predicts: "flow" (noise - data), "epsilon", "v_prediction" or "sample"."""

    def __post_init__(self) -> None:
        for step, row in enumerate(zip(self.a.tolist(), self.b.tolist(), self.std.tolist(), strict=True)):
            if not all(map(math.isfinite, row)):
                raise ValueError(
                    f"step {step} of {self.kind!r} has (a, b, std) = {row}; use a smaller noise_level"
                )
            if row[-1] < 0 or 0 < row[-1] < MIN_STD:
                raise ValueError(
                    f"step {step} of {self.kind!r} has std {row[-1]:.3g}, and a log-prob would be made of "
                    f"rounding errors; use a larger noise_level, or leave the step out of the window"
                )

    @property
    def num_steps(self) -> int:
        return self.a.shape[0]

    @property
    def trainable_steps(self) -> list[int]:
        """Steps that have a log-prob."""
        return [step for step, std in enumerate(self.std.tolist()) if std > 0]

    def coefficients(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """(T, 3) columns a, b, std, as every op reads them."""
        return to_device(torch.stack([self.a, self.b, self.std], dim=1), device, dtype)

    def origin_of_nan(self, is_finite: Tensor) -> str:
        """The first step behind which latents are not finite, by is_finite (T,) bool; or the decoder."""
        step = int(is_finite.long().cumprod(dim=0).sum())
        if step == self.num_steps:
            return "the decoder, of finite latents,"
        return f"denoising step {step} of {self.num_steps} (timestep {float(self.timesteps[step]):g})"


@dataclass(frozen=True)
class StepOutput:
    """The next sample of one transition, with its log-probability."""

    prev_sample: Tensor
    """(B, ...) in the sample's dtype."""
    log_prob: Tensor
    """(B,) of the stored prev_sample; 0 where the step is deterministic."""
    model_output: Tensor
    """(B, ...) the output that was used, after guidance."""


@dataclass(frozen=True)
class TrajectorySlab:
    """Memory of a batch of trajectories while it is sampled; step k fills slice k.

    A dtype narrower than that of the maths saves memory. The step then uses the model output as it is stored
    here, and the sampled state is the latent as it is stored here: training sees what was acted on.
    """

    latents: Tensor
    """(T + 1, B, ...), slice k is the state before step k."""
    model_outputs: Tensor
    """(T, B, ...), after guidance."""
    log_probs: Tensor
    """(T, B) in the dtype of the maths."""


@dataclass(frozen=True)
class TransitionTerms:
    """Per-sample sums that PPO needs of a transition, from the innovation form."""

    log_ratio: Tensor
    """(B,) log of new over old probability."""
    kl_old: Tensor
    """(B,) KL from the rollout's policy."""
    kl_ref: Tensor
    """(B,) KL from the anchor; 0 without one."""


@dataclass(frozen=True)
class PPOStats:
    """Detached statistics of one minibatch, still on the device."""

    rows: Tensor
    """(B, 4) of each pair: log_ratio, kl_old, kl_ref, clipped; 0 where masked or deterministic."""
    step_sums: Tensor
    """(T, 6) sums over a step's pairs: count, log_ratio, kl_old, kl_ref, clipped from above, from below."""

    @property
    def log_ratio(self) -> Tensor:
        """(B,) log of the ratio that the loss used."""
        return self.rows[:, 0]

    @property
    def kl_old(self) -> Tensor:
        """(B,) KL from the rollout's policy."""
        return self.rows[:, 1]

    @property
    def kl_ref(self) -> Tensor:
        """(B,) KL from the anchor; 0 without one."""
        return self.rows[:, 2]

    @property
    def clipped(self) -> Tensor:
        """(B,) +1 where a bound holds the ratio from above, -1 from below, 0 neither."""
        return self.rows[:, 3]


@dataclass(frozen=True, kw_only=True)
class RewardCondition:
    """An easy reward that counts only where a hard one passes."""

    reward: int
    """Index of the easy reward."""
    on: int
    """Index of the hard reward."""
    threshold: float
    """Raw value that the hard reward must reach; below it the easy one counts as its mean."""


@dataclass(frozen=True)
class NormalizedAdvantages:
    """Advantages and value targets of a rollout, detached, for M heads of the critic."""

    advantages: Tensor
    """(B, T) combined over the heads, normalised and clipped; 0 for masked trajectories."""
    raw: Tensor
    """(B, T, M) per head, in units of the standardised reward."""
    targets: Tensor
    """(B, T, M) standardised value targets, clipped."""


@dataclass(frozen=True)
class Conditioning(Static):
    """Inputs of a model besides sample and timestep: batch-first tensors by name."""

    tensors: dict[str, Tensor]

    def select(self, rows: Tensor | slice) -> Conditioning:
        """The conditioning of the samples `rows` (int64)."""
        return Conditioning({name: tensor[rows] for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str) -> Conditioning:
        return Conditioning({name: to_device(tensor, device) for name, tensor in self.tensors.items()})

    def padded(self, count: int) -> Conditioning:
        """The conditioning of `count` samples, of which those beyond these repeat the last."""
        return self.select(padding_rows(len(self), count))

    @staticmethod
    def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
        """The samples of all parts in their order."""
        names = parts[0].tensors
        return Conditioning({name: torch.cat([part.tensors[name] for part in parts]) for name in names})

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))


@dataclass(frozen=True)
class Rollout:
    """A batch of denoising trajectories. Stacked tensors are (T, B, ...): each step writes one slice."""

    table: TransitionTable
    latents: Tensor
    """(T + 1, B, C, H, W), x_0 pure noise, x_T the clean latent; (T + 1, B, C, F, H, W) of videos, and
    (T + 1, B, L, D) where the model takes packed ones."""
    model_outputs: Tensor
    """(T, B, ...) as the policy gave them, after guidance; NaN at noised states that no forward saw yet."""
    log_probs: Tensor
    """(T, B)"""
    values: Tensor
    """(T, B, M) standardised value predictions; M = 0 without a critic."""
    features: dict[str, Tensor]
    """name -> (T, B, ...), what the critic's trunk reads; empty when it reads latents only."""
    conditioning: Conditioning
    """(B, ...)"""
    uncond_conditioning: Conditioning | None
    """(B, ...) with guidance, else None."""
    noise: NoiseKey
    prompts: list[str]
    metadata: list[dict[str, Any]]
    rewards: dict[str, Tensor] = field(default_factory=dict)
    """name -> (B,) float32; empty until the rewards are in."""
    policy_version: int | None = None
    """Learner.version of the weights that made it. None: unknown."""
    share: Share | None = None
    """Rows of the whole batch that these are, where several ranks have it; None: all."""
    forward_steps: tuple[int, ...] | None = None
    """Steps that a loss on the forward process trains, whose latents are noised anew; None: it is a chain."""

    @property
    def num_steps(self) -> int:
        return self.table.num_steps

    @property
    def trained_steps(self) -> Sequence[int]:
        return self.table.trainable_steps if self.forward_steps is None else self.forward_steps

    @property
    def batch_size(self) -> int:
        return self.latents.shape[1]

    @property
    def total(self) -> int:
        """Trajectories of the whole batch, those of other ranks included."""
        return self.batch_size if self.share is None else self.share.total

    @property
    def clean_latents(self) -> Tensor:
        """(B, ...)"""
        return self.latents[-1]

    def origin_of_nan(self) -> str:
        """What made NaN or infinity of images that have some: a denoising step, or the decoder."""
        return self.table.origin_of_nan(self.latents[1:].isfinite().flatten(1).all(dim=1))

    def with_rewards(self, rewards: dict[str, Tensor]) -> Rollout:
        return replace(self, rewards=rewards)


@dataclass(frozen=True)
class Evaluation:
    """Scores on held-out prompts, with the noise that every evaluation shares."""

    rewards: dict[str, Tensor]
    """name -> (n,) float32"""
    explained_variance: Tensor
    """(T, M); M = 0 without a critic."""
    images: Tensor
    """(n, 3, H, W) in [0, 1] on the CPU, of videos judged frames (n, F, 3, H, W); later ranks: own ones."""
    prompts: list[str]
    typical_latents: Tensor
    """(n, K) of the clean latents, on the CPU; see rollout.drift."""
    calibration: dict[str, Tensor] = field(default_factory=dict)
    """Head -> (3, K) mean value, mean return, its standard error in bins of the value; see rollout.scored."""

    def means(self) -> dict[str, float]:
        return {name: float(rewards.mean()) for name, rewards in self.rewards.items()}

    def standard_errors(self) -> dict[str, float]:
        """Standard error of each mean, from the spread over the images; NaN for one image."""
        return {name: float(rewards.std()) / len(rewards) ** 0.5 for name, rewards in self.rewards.items()}


@dataclass(frozen=True)
class Advantages:
    """Advantages and targets of an update, over the trained steps K = len(steps)."""

    steps: Tensor
    """(K,) int64 rows of the transition table."""
    policy: Tensor
    """(K, B) combined and clipped."""
    targets: Tensor
    """(B, M) standardised and clipped returns, the same all along a trajectory; M = 0 without a critic."""
    raw: Tensor
    """(K, B, M) per head, before combination."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Counts of the estimator, by metric name."""

    def of_rows(self, rows: slice) -> Advantages:
        """The advantages of some trajectories."""
        policy, raw = self.policy[:, rows], self.raw[:, rows]
        return replace(self, policy=policy, targets=self.targets[rows], raw=raw)
