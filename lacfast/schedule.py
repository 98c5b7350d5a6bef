"""Samplers as tables: every step is x' = a x + b v + std eps, with (a, b, std) made once in float64.

Changing the number of steps, the noise level, the window or the shift changes data, not code.
s is the noise level before a step, n after it, h = s - n. Sources: Flow-GRPO (arXiv 2505.05470),
DanceGRPO (arXiv 2505.07818), coefficients-preserving sampling (arXiv 2509.05952),
DDIM (arXiv 2010.02502), DDPM (arXiv 2006.11239).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lacfast.config import KL_KINDS
from lacfast.config.checks import unknown
from lacfast.config.sampling import require_noise_level
from lacfast.records import TransitionTable
from lacfast.transfer import to_device

Window = tuple[int, int]


def _check_sigmas(sigmas: Tensor) -> Tensor:
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(
            f"sigmas must be a vector of at least 2 noise levels, got shape {tuple(sigmas.shape)}; give that "
            "of the start and that after each step"
        )
    if not bool((sigmas[:-1] > sigmas[1:]).all()) or sigmas[0] > 1 or sigmas[-1] < 0:
        raise ValueError(
            f"sigmas must fall strictly within [0, 1], got {sigmas.tolist()}; give the noisiest level first"
        )
    return sigmas


def _windowed(
    kind: str,
    sigmas: Tensor,
    timesteps: Tensor,
    stochastic: Tensor,
    deterministic: Tensor,
    window: Window | None,
    prediction_type: str = "flow",
) -> TransitionTable:
    """Take the stochastic rows (T, 3) inside `window` (start, stop) and the deterministic ones outside it."""
    num_steps = len(stochastic)
    start, stop = (0, num_steps) if window is None else window
    if not 0 <= start <= stop <= num_steps:
        raise ValueError(
            f"window={window} must lie within the {num_steps} steps: 0 <= start <= stop <= {num_steps}"
        )
    inside = torch.zeros(num_steps, 1, dtype=torch.bool)
    inside[start:stop] = True
    a, b, std = torch.where(inside, stochastic, deterministic).unbind(dim=1)
    return TransitionTable(kind, a, b, std, timesteps, sigmas, prediction_type)


def _flow_table(
    kind: str,
    sigmas: Tensor,
    noise_level: float,
    rows: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    window: Window | None,
) -> TransitionTable:
    sigmas = _check_sigmas(sigmas)
    require_noise_level(kind, noise_level)
    s, n = sigmas[:-1], sigmas[1:]
    deterministic = torch.stack([torch.ones_like(s), n - s, torch.zeros_like(s)], dim=1)
    stochastic = torch.stack(rows(s, n), dim=1) if noise_level > 0 else deterministic
    return _windowed(kind, sigmas, (1000 * s).float(), stochastic, deterministic, window)


def _reverse_sde(s: Tensor, n: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Euler-Maruyama on the reverse SDE of a rectified flow with diffusion g (Flow-GRPO, eq. 9)."""
    h = s - n
    return 1 - g**2 * h / (2 * s), -h * (1 + g**2 * (1 - s) / (2 * s)), g * h.sqrt()


def flow_sde(sigmas: Tensor, noise_level: float, *, window: Window | None = None) -> TransitionTable:
    """Flow-GRPO's SDE, diffusion noise_level sqrt(s / (1 - s)).

    Args:
        sigmas: (T + 1,) noise levels, falling within [0, 1]. In the first step 1 - s counts as no less than
            the step itself: at s = 1 that is Flow-GRPO's sigmas[1], and solvers begin a little below.
        noise_level: eta, 0.7 in Flow-GRPO. 0 gives the ODE.
        window: (start, stop) steps that are stochastic; the others are ODE steps. None: all.

    Raises:
        ValueError: for noise levels that do not fall, a negative noise_level or a window outside the steps.
    """

    def rows(s: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        left = 1 - s
        left[0] = torch.maximum(left[0], s[0] - n[0])
        g = noise_level * (s / left).sqrt()
        return _reverse_sde(s, n, g)

    return _flow_table("flow_sde", sigmas, noise_level, rows, window)


def dance_sde(sigmas: Tensor, noise_level: float, *, window: Window | None = None) -> TransitionTable:
    """DanceGRPO's SDE, constant diffusion `noise_level`. Arguments as `flow_sde`."""

    def rows(s: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _reverse_sde(s, n, torch.full_like(s, noise_level))

    return _flow_table("dance_sde", sigmas, noise_level, rows, window)


def cps(sigmas: Tensor, noise_level: float, *, window: Window | None = None) -> TransitionTable:
    """Coefficients-preserving sampling, std = n sin(pi noise_level / 2); at most 1. As `flow_sde`."""
    angle = math.pi * noise_level / 2

    def rows(s: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept = n * math.cos(angle)
        return (1 - n) + kept, -s * (1 - n) + (1 - s) * kept, n * math.sin(angle)

    return _flow_table("cps", sigmas, noise_level, rows, window)


def flow_ddim(sigmas: Tensor, noise_level: float, *, window: Window | None = None) -> TransitionTable:
    """DDIM's transition in flow coordinates, noise_level = DDIM's eta, at most 1. Arguments as `flow_sde`."""

    def rows(s: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        std = noise_level * n * (1 - (n * (1 - s)) ** 2 / (s * (1 - n)) ** 2).sqrt()
        kept = (n**2 - std**2).clamp(min=0).sqrt()
        return (1 - n) + kept, -s * (1 - n) + (1 - s) * kept, std

    return _flow_table("flow_ddim", sigmas, noise_level, rows, window)


def ode(sigmas: Tensor, noise_level: float = 0.0, *, window: Window | None = None) -> TransitionTable:
    """The probability-flow ODE by Euler steps: evaluation. `noise_level` must be 0."""
    require_noise_level("ode", noise_level)
    sigmas = _check_sigmas(sigmas)
    rows = torch.stack(
        [torch.ones(len(sigmas) - 1).double(), sigmas[1:] - sigmas[:-1], torch.zeros(len(sigmas) - 1)], dim=1
    )
    return _windowed("ode", sigmas, (1000 * sigmas[:-1]).float(), rows, rows, window)


def ddim(
    alphas_cumprod: Tensor,
    timesteps: Tensor,
    eta: float,
    *,
    prediction_type: str = "epsilon",
    final_alpha_cumprod: float = 1.0,
    prev_timesteps: Tensor | None = None,
    window: Window | None = None,
) -> TransitionTable:
    """DDIM for models that predict epsilon, v or the sample.

    Args:
        alphas_cumprod: (train steps,) cumulative product of alphas.
        timesteps: (T,) integer timesteps, falling.
        eta: 0 deterministic, 1 DDPM's posterior variance.
        prediction_type: "epsilon", "v_prediction" or "sample".
        final_alpha_cumprod: cumulative alpha after the last step.
        prev_timesteps: (T,) timestep after each step, negative: the end. None: the next of `timesteps`.
        window: (start, stop) steps that are stochastic. None: all.

    Raises:
        ValueError: for an unknown prediction type, or an eta out of [0, 1].
    """
    require_noise_level("ddim", eta)
    timesteps = torch.as_tensor(timesteps, device="cpu").long()
    if prev_timesteps is None:
        prev_timesteps = torch.cat([timesteps[1:], torch.tensor([-1])])
    alphas = alphas_cumprod.detach().to("cpu", torch.float64)
    signal = alphas[timesteps]
    prev_signal = torch.where(
        prev_timesteps < 0, torch.tensor(final_alpha_cumprod).double(), alphas[prev_timesteps.clamp(min=0)]
    )
    return _ddim_table(signal, prev_signal, timesteps, eta, prediction_type, window)


def ddim_levels(
    sigmas: Tensor,
    timesteps: Tensor,
    eta: float,
    *,
    prediction_type: str = "epsilon",
    window: Window | None = None,
) -> TransitionTable:
    """DDIM on any noise levels, also between those of the training. At eta = 0 it is Euler's method on them.

    Args:
        sigmas: (T + 1,) noise over signal, sqrt((1 - A) / A), falling: what solvers of an ODE have.
        timesteps: (T,) that the model is told, whole or not.
        eta: 0 deterministic, 1 DDPM's posterior variance.
        prediction_type: "epsilon", "v_prediction" or "sample".
        window: (start, stop) steps that are stochastic. None: all.

    Raises:
        ValueError: for an unknown prediction type, or an eta out of [0, 1].
    """
    require_noise_level("ddim", eta)
    signal = 1 / (1 + torch.as_tensor(sigmas, dtype=torch.float64, device="cpu") ** 2)
    timesteps = torch.as_tensor(timesteps, device="cpu")
    return _ddim_table(signal[:-1], signal[1:], timesteps, eta, prediction_type, window)


def _ddim_table(
    signal: Tensor,
    prev_signal: Tensor,
    timesteps: Tensor,
    eta: float,
    prediction_type: str,
    window: Window | None,
) -> TransitionTable:
    """`signal` and `prev_signal` are A before and after each step."""
    std = eta * ((1 - prev_signal) / (1 - signal) * (1 - signal / prev_signal)).clamp(min=0).sqrt()
    stochastic = _ddim_rows(signal, prev_signal, std, prediction_type)
    deterministic = _ddim_rows(signal, prev_signal, torch.zeros_like(std), prediction_type)
    sigmas = torch.cat([(1 - signal).sqrt(), (1 - prev_signal[-1:]).sqrt()])
    return _windowed("ddim", sigmas, timesteps.float(), stochastic, deterministic, window, prediction_type)


def _ddim_rows(signal: Tensor, prev_signal: Tensor, std: Tensor, prediction_type: str) -> Tensor:
    direction = (1 - prev_signal - std**2).clamp(min=0).sqrt()
    if prediction_type == "epsilon":
        a, b = (prev_signal / signal).sqrt(), direction - (prev_signal * (1 - signal) / signal).sqrt()
    elif prediction_type == "v_prediction":
        a = (prev_signal * signal).sqrt() + direction * (1 - signal).sqrt()
        b = -(prev_signal * (1 - signal)).sqrt() + direction * signal.sqrt()
    elif prediction_type == "sample":
        a = direction / (1 - signal).sqrt()
        b = prev_signal.sqrt() - direction * (signal / (1 - signal)).sqrt()
    else:
        raise ValueError(
            f"unknown prediction_type {prediction_type!r}; known: 'epsilon', 'v_prediction', 'sample'"
        )
    return torch.stack([a, b, std], dim=1)


FLOW_KINDS: dict[str, Callable[..., TransitionTable]] = {
    "flow_sde": flow_sde,
    "dance_sde": dance_sde,
    "cps": cps,
    "flow_ddim": flow_ddim,
    "ode": ode,
}
"""Kinds for models that predict a flow's velocity. A new kind is such a function, an entry here and the
range of its noise level in lacfast.config.sampling."""


def flow_table(
    kind: str, sigmas: Tensor, noise_level: float, *, window: Window | None = None
) -> TransitionTable:
    """The table of a flow sampler by name.

    Raises:
        ValueError: for an unknown kind; the message lists the known ones.
    """
    if kind not in FLOW_KINDS:
        raise unknown("sampler kind", kind, sorted(FLOW_KINDS))
    return FLOW_KINDS[kind](sigmas, noise_level, window=window)


def uniform_sigmas(num_steps: int, *, shift: float = 1.0) -> Tensor:
    """(T + 1,) noise levels from 1 to 0, moved towards noise by `shift` (SD3's timestep shift)."""
    sigmas = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def forward_rows(table: TransitionTable) -> Tensor:
    """The forward process at the noise level before each step, and what the model predicts of it.

        x = signal x0 + noise eps,   target = c eps + d x0,   gain = |d x0 / d output| at x

    Returns:
        (T, 5) float64 on the host, columns signal, noise, c, d, gain.

    Raises:
        ValueError: an unknown prediction type.
    """
    noise, kind = table.sigmas[:-1], table.prediction_type
    signal = 1 - noise if kind == "flow" else (1 - noise**2).clamp(min=0).sqrt()
    one, zero = torch.ones_like(noise), torch.zeros_like(noise)
    targets = {
        "flow": (one, -one, noise),
        "epsilon": (one, zero, noise / signal),
        "v_prediction": (signal, -noise, noise),
        "sample": (zero, one, one),
    }
    if kind not in targets:
        raise unknown("prediction_type", kind, targets)
    return torch.stack([signal, noise, *targets[kind]], dim=1)


def kl_gains(
    table: TransitionTable,
    kind: str = "exact",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Gain (T,) of each step in kl_ref = reduce( gain (v - v_ref)^2 ), 0 where the step is deterministic.

        "exact":     b^2 / (2 std^2), the KL between the two transitions
        "velocity":  1, the squared distance of the models' outputs
        "flow_grpo": h b^2 / (2 std^2), flow_grpo's value (arXiv 2505.05470): the exact one times the step h

    Raises:
        ValueError: an unknown kind.
    """
    stochastic = table.std > 0
    exact = table.b**2 / (2 * torch.where(stochastic, table.std, 1.0) ** 2)
    step_sizes = table.sigmas[:-1] - table.sigmas[1:]
    kinds = dict(zip(KL_KINDS, (exact, torch.ones_like(exact), step_sizes * exact), strict=True))
    if kind not in kinds:
        raise unknown("kl kind", kind, kinds)
    return to_device(torch.where(stochastic, kinds[kind], 0.0), device, dtype)


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name == "from_scheduler":
            home = "lacfast.backbones.schedulers, which knows those of diffusers"
            raise AttributeError(f"from_scheduler is in {home}; import it from there")
        raise AttributeError(f"module 'lacfast.schedule' has no attribute {name!r}")
