"""What becomes of optimizer steps whose gradient is not finite: off on the device, counted on the host."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lacfast.distributed.sharding import clip_gradients_
from lacfast.learning.optimizers import parameters_of
from lacfast.runtime.profiling import span

IN_A_ROW = 5
"""Bad gradients after which the rate is halved, and the run ended where it was before: what one rollout did
passes with it, what the weights do stays."""


class GradientGuard:
    """The steps of one optimizer.

    Under "skip" a step with a bad gradient is left out, and the steps after it are taken. After IN_A_ROW of
    them the learning rate is halved, once; after as many more the run ends. Under "raise" the first one ends
    it, and nothing that was asked for after it has been done.
    """

    def __init__(self, what: str, policy: str, failed: Tensor) -> None:
        """
        Args:
            what: the optimizer trains, for messages and metrics.
            policy: TrainConfig.on_bad_gradient.
            failed: () float32 on the device, 0. Under "raise" guards that share it stop each other's steps.
        """
        self.what = what
        self.failed = failed
        self.in_a_row = 0
        self.rate_factor = 1.0
        """Factor of the learning rate."""
        self._raises = policy == "raise"
        self._is_due = False

    @torch.no_grad()
    def step(self, optimizer: Optimizer, norm: Tensor, *, max_grad_norm: float) -> None:
        """Clip the gradients and step, unless a gradient is not finite, or under "raise" was not before.

        The host does not wait: fused optimizers read `failed` on the device and leave weights and moments
        alone where it is 1. `admits` tells the host later.

        Args:
            optimizer: fused.
            norm: () filled with the norm of all gradients together, before they are clipped.
            max_grad_norm: their bound.
        """
        norm.copy_(clip_gradients_(parameters_of(optimizer), max_grad_norm))
        is_bad = (~torch.isfinite(norm)).to(self.failed.dtype)
        if self._raises:
            torch.maximum(self.failed, is_bad, out=self.failed)
        else:
            self.failed.copy_(is_bad)
        with span("optimizer"):
            optimizer.found_inf = self.failed  # type: ignore[attr-defined]
            optimizer.step()

    def admits(self, norm: float) -> bool:
        """Take in the norm of a step; whether the step was taken.

        Raises:
            FloatingPointError: under "raise", when it was not.
        """
        if math.isfinite(norm):
            self.in_a_row = 0
            return True
        if self._raises:
            raise FloatingPointError(
                f"the gradient norm of the {self.what} is {norm}; no optimizer step was taken from there on "
                f"and the weights are as before it. {_REMEDY}, or set on_bad_gradient='skip'"
            )
        self.in_a_row += 1
        self._is_due = self._is_due or self.in_a_row >= IN_A_ROW
        return False

    def settle(self) -> None:
        """Halve the rate, or end the run, where too many were left out of the steps that were taken in.

        Raises:
            FloatingPointError: at the end.
        """
        if not self._is_due:
            return
        self._is_due, self.in_a_row = False, 0
        if self.rate_factor < 1:
            raise FloatingPointError(
                f"the gradient norm of the {self.what} was not finite in {IN_A_ROW} optimizer steps in a row"
                f", at half the learning rate too; none was taken. {_REMEDY}, or use float32 or bfloat16"
            )
        self.rate_factor = 0.5
        warnings.warn(
            f"the gradient norm of the {self.what} was not finite in {IN_A_ROW} optimizer steps in a row; "
            "its learning rate is half of what it was from here on",
            stacklevel=4,
        )

    def metrics(self) -> dict[str, Any]:
        """The factor of the learning rate, once there is one."""
        return {} if self.rate_factor == 1 else {f"rate_factor/{self.what}": self.rate_factor}

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs."""
        return {"in_a_row": self.in_a_row, "rate_factor": self.rate_factor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.in_a_row, self.rate_factor = state["in_a_row"], state["rate_factor"]


_REMEDY = "Lower the learning rate or the clip range, and check the rewards"
